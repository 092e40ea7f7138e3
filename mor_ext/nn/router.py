"""Routers: which tokens go on at each depth, and how a depth's output enters the hidden state.

The recursion loop (``recursion.py``) asks a router three things::

    plan         = router.begin(hidden, tokens, causal)                 # once, at the entry
    active, loss = router.select(depth, hidden, active, plan)           # at each depth, from 0
    hidden       = router.merge(depth, hidden, output, active, plan)    # after the block

Below, H is the hidden state and f the whole shared block, its residual included; so f(H) - H is
what the block adds. ``update`` says which of the two enters:

* "output": H + gate * f(H), the paper's equation 1 and its authors' code. With gate 1 the residual
  counts twice, H + f(H) = 2 H + (f(H) - H).
* "delta": H + gate * (f(H) - H). With gate 1 this is f(H), an ordinary residual network.

The fixed-depth router has gate 1, and "delta" makes it the vanilla and the recursive transformer.
Under either rule expert-choice with capacity 1 and gate 1 is the recursive model of that rule.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_ext import ops
from mor_ext.nn.tokens import Tokens, cu_seqlens_of


class Router(nn.Module):
    """Every token to the full depth, gate 1: the router of models that do not route."""

    def __init__(self, update: str = "delta") -> None:
        super().__init__()
        self.update = update

    def begin(self, hidden: Tensor, tokens: Tokens, causal: bool) -> Any:
        """Whatever is decided once for hidden ``[total, hidden_size]``.

        ``causal`` asks for a rule by which a token's depth depends on nothing after it.
        """
        return None

    def select(
        self, depth: int, hidden: Tensor, active: Tokens, plan: Any
    ) -> tuple[Tokens, Tensor | None]:
        """Those of the active tokens that go through the block at this depth; auxiliary loss."""
        return active, None

    def merge(
        self, depth: int, hidden: Tensor, output: Tensor, active: Tokens, plan: Any
    ) -> Tensor:
        """The next hidden state from the block's output ``[k, hidden_size]``."""
        if active.index is None:
            return hidden + output if self.update == "output" else output
        if self.update == "delta":
            output = output - ops.gather_tokens(hidden, active.index)
        return ops.scatter_tokens(hidden, output, active.index, active.gate)


class ExpertChoiceRouter(Router):
    """Each depth picks its tokens (arXiv 2507.10524, section 2.2.1).

    At depth r the logit of a token still active is ``theta_r . H``, its gate
    ``alpha * sigmoid(logit)``. In training depth r keeps the ``max(1, int(c_r * T))`` highest
    logits of a sequence of T tokens; that choice looks at the whole sequence. The causal rule keeps
    a token when ``sigmoid(logit) >= 0.5``. A binary cross entropy draws the logits to the top-k
    membership, so that the two rules come to agree.
    """

    def __init__(
        self,
        hidden_size: int,
        capacity: tuple[float, ...],
        alpha: float = 0.1,
        coef: float = 0.001,
        update: str = "output",
    ) -> None:
        super().__init__(update)
        self.capacity = capacity  # of the full sequence, one for each depth
        self.alpha = alpha
        self.coef = coef
        self.weight = nn.Parameter(torch.empty(len(capacity), hidden_size))

    def begin(self, hidden: Tensor, tokens: Tokens, causal: bool) -> tuple[int, ...] | None:
        return None if causal else tokens.lengths  # the lengths that capacities refer to

    def select(
        self, depth: int, hidden: Tensor, active: Tokens, plan: tuple[int, ...] | None
    ) -> tuple[Tokens, Tensor | None]:
        logits = _widen(hidden @ self.weight[depth])  # [total]
        if active.index is not None:
            logits = ops.gather_tokens(logits, active.index)  # [k of the depth before]
        if plan is None:
            rows, lengths, cu_seqlens = _where(logits >= 0, active)
            loss = None
        else:
            rows, lengths, cu_seqlens = self._top(depth, logits.detach(), active, plan)
            chosen = torch.zeros_like(logits).index_fill(0, rows.long(), 1.0)
            loss = self.coef * F.binary_cross_entropy_with_logits(logits, chosen)
        gate = self.alpha * torch.sigmoid(ops.gather_tokens(logits, rows))
        return active.select(rows, lengths, cu_seqlens, gate), loss

    def _top(
        self, depth: int, scores: Tensor, active: Tokens, full: tuple[int, ...]
    ) -> tuple[Tensor, list[int], Tensor]:
        """Rows of the k highest scores of each sequence, and how many each has."""
        wanted = [max(1, int(self.capacity[depth] * length)) for length in full]
        lengths = [min(k, have) for k, have in zip(wanted, active.lengths, strict=True)]
        cu_seqlens = cu_seqlens_of(lengths, scores.device)
        rows = ops.route_topk(
            scores, active.cu_seqlens, cu_seqlens, sum(lengths), active.max_seqlen
        )
        return rows, lengths, cu_seqlens


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

    g = alpha * softmax(theta H^1) over the depths; a token's depth i is the arg max, and
    equation 2 of the paper gives its hidden state::

        H^{r+1} = g_r f(H^r)          for r < i
        H^{i+1} = g_i f(H^i) + H^1

    The loss balances the depths: ``coef * sum_r f_r P_r``, f_r = num_recursions * share of tokens
    of depth r, P_r = mean of g_r. A depth depends on its own token only, so both rules are one.
    """

    def __init__(
        self, hidden_size: int, num_recursions: int, alpha: float = 1.0, coef: float = 0.1
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.coef = coef
        self.weight = nn.Parameter(torch.empty(num_recursions, hidden_size))

    def begin(self, hidden: Tensor, tokens: Tokens, causal: bool) -> DepthPlan:
        logits = _widen(F.linear(hidden, self.weight))  # [total, num_recursions]
        weights = self.alpha * logits.softmax(dim=-1)
        depth, load = ops.route_depth(logits.detach(), None)
        index, cu_seqlens = ops.compact_depth(depth, tokens.cu_seqlens, logits.shape[1])
        lengths = cu_seqlens.diff().tolist()  # the one device-to-host copy of the pass
        share = logits.shape[1] * load / max(1, tokens.total)
        loss = self.coef * (share * weights.mean(dim=0)).sum()
        return DepthPlan(tokens, hidden, depth, weights, index, cu_seqlens, lengths, loss)

    def select(
        self, depth: int, hidden: Tensor, active: Tokens, plan: DepthPlan
    ) -> tuple[Tokens, Tensor | None]:
        lengths = plan.lengths[depth]
        index = plan.index[depth, : sum(lengths)]
        gate = ops.gather_tokens(plan.weights[:, depth], index)
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


def _where(keep: Tensor, active: Tokens) -> tuple[Tensor, list[int], Tensor]:
    """The rows where ``keep`` (bool ``[k]``) holds, and how many each sequence has."""
    index, cu_seqlens = ops.compact_depth(keep.int(), active.cu_seqlens, 1)
    lengths = cu_seqlens[0].diff().tolist()
    return index[0, : sum(lengths)], lengths, cu_seqlens[0]


def _widen(logits: Tensor) -> Tensor:
    """At least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
