"""What a run reports beside its loss: bits per byte, depth, loads, agreement of both rules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mor_ext.models import MoRConfig, MoRForCausalLM, MoROutput
from mor_ext.nn import Router

IGNORED = -100  # as a label


class Meter:
    """Sums over batches that stay on the device until they are read: no batch waits for them.

    It reads, each a mean over everything that was added:

    * ``nll``: nats a scored token; ``aux_loss``: the routers' losses; ``loss``: both.
    * ``bits_per_byte``: of the UTF-8 text that the scored tokens stand for.
    * ``effective_depth``: layers that a token goes through, those of its own included.
    * ``load_<d>``: share of the tokens of depth d among those of all depths that the training rule
      has (from 0 where it may skip a block, else from 1), over all routed blocks;
      ``max_vio``: largest load / mean load - 1, and ``load_entropy``, in nats: means over routed
      blocks. The loads are those of the rule that was run: the training rule in training, else the
      causal one.

    If batches come with what the training rule makes of them:

    * ``agreement``: share of tokens to which both rules give the same depth in every block.
    * ``dead_tokens``: share of the positions of a sequence that the last depth of a routed block
      chose in no sequence by the training rule, a mean over routed blocks. With few sequences
      it is large by chance.
    """

    def __init__(self, model: MoRForCausalLM, device: torch.device) -> None:
        config = model.config
        routers = [stage.router for stage in model.recursions()]
        self.routed = [i for i, router in enumerate(routers) if type(router) is not Router]
        self.depths = torch.arange(config.num_recursions + 1, device=device)
        self.least_depth = least_depth(config)
        self.positions = config.max_position_embeddings
        self.device = device
        self.reset()

    def reset(self) -> None:
        def zero() -> Tensor:
            return torch.zeros((), dtype=torch.float64, device=self.device)

        self.nll, self.aux_loss, self.scored, self.num_bytes = zero(), zero(), zero(), zero()
        self.tokens, self.layers, self.compared, self.agreed = zero(), zero(), zero(), zero()
        size = (len(self.routed), len(self.depths))
        self.load = torch.zeros(size, dtype=torch.float64, device=self.device)
        # By position: how often the last depth of a routed block chose it, and how often it was.
        self.reached = self.load.new_zeros(len(self.routed) + 1, self.positions)

    @torch.no_grad()
    def add(
        self,
        output: MoROutput,
        labels: Tensor,
        num_bytes: Tensor | None = None,
        trained: MoROutput | None = None,
    ) -> None:
        """Adds a batch.

        Args:
            output: of the model.
            labels: ``[batch, length]``, no padding.
            num_bytes: int64 ``[batch]``, of the text of the scored tokens.
            trained: output by the training rule, if ``output`` is by the causal rule.
        """
        assert output.nll is not None and output.aux_loss is not None
        assert output.layers is not None and output.stage_depth is not None
        scored = (labels[:, 1:] != IGNORED).sum()
        self.nll += torch.where(scored > 0, output.nll.double() * scored, 0.0)
        self.aux_loss += output.aux_loss.double() * scored
        self.scored += scored
        if num_bytes is not None:
            self.num_bytes += num_bytes.sum()
        self.tokens += labels.numel()
        self.layers += output.layers.sum()
        if not self.routed:
            return
        depth = output.stage_depth[..., self.routed]  # [batch, length, routed blocks]
        self.load += (depth.unsqueeze(-1) == self.depths).sum(dim=(0, 1))
        if trained is not None:
            assert trained.stage_depth is not None
            other = trained.stage_depth[..., self.routed]
            self.compared += labels.numel()
            self.agreed += (depth == other).all(dim=-1).sum()
            chosen = (other == len(self.depths) - 1).sum(dim=0).T  # [routed blocks, length]
            self.reached[:-1, : labels.shape[1]] += chosen
            self.reached[-1, : labels.shape[1]] += len(labels)

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means, and starts anew; ``reduce`` sums a tensor over processes.

        Waits for the device, once.
        """
        sums = [self.nll, self.aux_loss, self.scored, self.num_bytes]
        sums += [self.tokens, self.layers, self.compared, self.agreed]
        parts = [torch.stack(sums), self.load.flatten(), self.reached.flatten()]
        split = reduce(torch.cat(parts)).cpu().split([part.numel() for part in parts])
        nll, aux_loss, scored, num_bytes, tokens, layers, compared, agreed = split[0].tolist()
        load, reached = split[1].view_as(self.load), split[2].view_as(self.reached)
        self.reset()

        scored = scored or math.nan
        result = {
            "loss": (nll + aux_loss) / scored,
            "nll": nll / scored,
            "aux_loss": aux_loss / scored,
            "effective_depth": layers / (tokens or math.nan),
        }
        if num_bytes:
            result["bits_per_byte"] = nll / math.log(2) / num_bytes
        if compared:
            result["agreement"] = agreed / compared
            positions = reached[:-1, reached[-1] > 0]
            result["dead_tokens"] = (positions == 0).double().mean().item()
        return result | self._loads(load[:, self.least_depth :])

    def _loads(self, load: Tensor) -> dict[str, float]:  # [routed blocks, depths]
        if not self.routed:
            return {}
        share = load / load.sum(dim=1, keepdim=True)
        entropy = -(share * share.clamp(min=1e-300).log()).sum(dim=1)
        violation = share.amax(dim=1) * share.shape[1] - 1
        return {
            "max_vio": violation.mean().item(),
            "load_entropy": entropy.mean().item(),
            **{
                f"load_{depth}": part
                for depth, part in enumerate(share.mean(dim=0).tolist(), self.least_depth)
            },
        }


def least_depth(config: MoRConfig) -> int:
    """The least depth that the training rule gives: 0 where a token may skip a routed block."""
    capacity = config.capacity
    skips = isinstance(capacity, (tuple, list)) and capacity[0] < 1
    return 0 if skips or config.routing == "action" else 1
