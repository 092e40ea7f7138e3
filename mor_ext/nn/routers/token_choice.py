"""Token choice: each token picks its depth at the entry."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mor_ext import ops
from mor_ext.nn.routers.router import Router, Scorer
from mor_ext.nn.tokens import Tokens


@dataclass
class DepthPlan:
    """What token choice decides at the entry."""

    tokens: Tokens  # all
    entry: Tensor  # [total, hidden_size], the hidden state at the entry
    depth: Tensor  # int32 [total], from 1
    weights: Tensor  # fp32 [total, num_recursions]
    index: Tensor  # int32 [num_recursions, total]
    cu_seqlens: Tensor  # int32 [num_recursions, batch + 1]
    lengths: list[list[int]]  # [num_recursions][batch]
    loss: Tensor


class TokenChoiceRouter(Router):
    """Each token picks its depth at the entry (arXiv 2507.10524, section 2.2.1).

    g = alpha * activation(theta H^1) over the depths; a token's depth i is the arg max, and
    equation 2 of the paper gives its hidden state::

        H^{r+1} = g_r f(H^r)          for r < i
        H^{i+1} = g_i f(H^i) + H^1

    A depth depends on its own token only, so the rules of training and of inference are one.

    Args:
        kind: of the scorer, see :class:`Scorer`.
        activation: "softmax" or "sigmoid".
        balancing: "loss" adds ``loss_coef * sum_r f_r P_r``, f_r = num_recursions * share of tokens
            of depth r, P_r = mean of g_r, normalised over the depths. "bias" (arXiv 2408.15664)
            adds a bias to the logits for the choice alone, and moves it after each optimizer step
            by ``bias_update_rate`` towards the depths with less than the mean load of all ranks.
        gate_at: "each" step, the equation above, or "last" (the authors' code): g_r = 1 for r < i.
        z_loss_coef: of the mean of logsumexp(logits) ** 2.
    """

    bias: Tensor  # fp32 [num_recursions]
    load: Tensor  # fp32 [num_recursions], tokens of each depth since the last optimizer step

    def __init__(
        self,
        hidden_size: int,
        num_recursions: int,
        kind: str = "linear",
        activation: str = "softmax",
        alpha: float = 1.0,
        balancing: str = "loss",
        loss_coef: float = 0.1,
        bias_update_rate: float = 0.001,
        gate_at: str = "each",
        z_loss_coef: float = 0.0,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.alpha = alpha
        self.balancing = balancing
        self.loss_coef = loss_coef
        self.bias_update_rate = bias_update_rate
        self.gate_at = gate_at
        self.z_loss_coef = z_loss_coef
        self.scorer = Scorer(kind, hidden_size, num_recursions)
        if balancing == "bias":
            self.register_buffer("bias", torch.zeros(num_recursions))
            self.register_buffer("load", torch.zeros(num_recursions), persistent=False)

    def begin(self, hidden: Tensor, tokens: Tokens, causal: bool) -> DepthPlan:
        logits = self.scorer(hidden, tokens)  # [total, num_recursions]
        weights = self._weights(logits)
        biased = self.balancing == "bias"
        depth, load = ops.route_depth(logits.detach(), self.bias if biased else None)
        if biased and self.training:
            self.load += load
        index, cu_seqlens = ops.compact_depth(depth, tokens.cu_seqlens, logits.shape[1])
        lengths = cu_seqlens.diff().tolist()  # the one device-to-host copy of the pass
        loss = self._loss(logits, weights, load)
        return DepthPlan(tokens, hidden, depth, weights, index, cu_seqlens, lengths, loss)

    def _weights(self, logits: Tensor) -> Tensor:
        softmax = self.activation == "softmax"
        return self.alpha * (logits.softmax(dim=-1) if softmax else logits.sigmoid())

    def _loss(self, logits: Tensor, weights: Tensor, load: Tensor) -> Tensor:
        loss = logits.new_zeros(())
        if logits.shape[0] == 0:
            return loss
        if self.balancing == "loss":
            share = logits.shape[1] * load / logits.shape[0]
            probability = weights / weights.sum(dim=-1, keepdim=True)
            loss = loss + self.loss_coef * (share * probability.mean(dim=0)).sum()
        return loss + self.z_loss_coef * logits.logsumexp(dim=-1).square().mean()

    def select(
        self, depth: int, hidden: Tensor, active: Tokens, plan: DepthPlan
    ) -> tuple[Tokens, Tensor | None]:
        lengths = plan.lengths[depth]
        index = plan.index[depth, : sum(lengths)]
        gate = ops.gather_tokens(plan.weights[:, depth], index)
        if self.gate_at == "last":
            gate = torch.where(plan.depth[index] == depth + 1, gate, 1.0)
        active = plan.tokens.select(index, lengths, plan.cu_seqlens[depth], gate)
        return active, plan.loss if depth == 0 else None

    def merge(
        self, depth: int, hidden: Tensor, output: Tensor, active: Tokens, plan: DepthPlan
    ) -> Tensor:
        assert active.index is not None and active.gate is not None
        last = plan.depth[active.index] == depth + 1
        entry = ops.gather_tokens(plan.entry, torch.where(last, active.index, -1))  # zero rows else
        new = active.gate.to(output.dtype).unsqueeze(-1) * output + entry
        return hidden.index_copy(0, active.index.long(), new)

    def enter(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        logits = self.scorer(hidden)
        depth, _ = ops.route_depth(logits, self.bias if self.balancing == "bias" else None)
        return depth, self._weights(logits), hidden

    def goes_on(
        self, depth: int, hidden: Tensor, rows: Tensor, entered: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        chosen, weights = entered[0][rows], entered[1][rows, depth]
        if self.gate_at == "last":
            weights = torch.where(chosen == depth + 1, weights, 1.0)
        return chosen > depth, weights

    def merge_rows(
        self,
        hidden: Tensor,
        output: Tensor,
        rows: Tensor,
        gate: Tensor | None,
        depths: Tensor,
        entered: tuple[Tensor, ...],
    ) -> None:
        assert gate is not None
        chosen, _, entry = entered
        last = chosen[rows] == depths + 1
        new = gate.to(output.dtype).unsqueeze(-1) * output
        new += ops.gather_tokens(entry, torch.where(last, rows, -1))
        hidden.index_copy_(0, rows.long(), new)

    @torch.no_grad()
    def after_step(self) -> None:
        if self.balancing != "bias":
            return
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.load)
        self.bias += self.bias_update_rate * torch.sign(self.load.mean() - self.load)
        self.load.zero_()
