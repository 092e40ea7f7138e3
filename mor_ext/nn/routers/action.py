"""The skip / forward / recurse router."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_ext import ops
from mor_ext.nn.routers.router import Router, widen
from mor_ext.nn.tokens import Tokens

WIDTH = 128


@dataclass
class ActionPlan:
    tokens: Tokens  # all
    gates: Tensor  # fp32 [total, num_recursions], 1 where a token goes on
    index: Tensor  # int32 [num_recursions, total]
    cu_seqlens: Tensor  # int32 [num_recursions, batch + 1]
    lengths: list[list[int]]  # [num_recursions][batch]
    loss: Tensor


class ActionRouter(Router):
    """Skips a block, applies it once, or again (Sultana & Mazumder): action a, a applications.

    P = softmax(W2 relu(W1 h + b1) + b2) over the actions 0 .. num_recursions. In training the
    action is drawn by Gumbel-softmax, straight through: one-hot y forward, the gradient of the soft
    sample backward. Application r enters as ``H + y_{>= r} * (f(H) - H)`` with y_{>= r} the sum of
    y over the actions of at least r, so its value is f(H) for the tokens that go on; the branches
    that a token does not take are not computed, and give it no gradient. The causal rule, and
    evaluation, take the arg max; a depth depends on its own token only.

    The loss is ``loss_coef * E``, E = the mean of applications of a token, sum_a a * y_a.

    Args:
        gumbel_temperature: of the Gumbel-softmax.
    """

    def __init__(
        self,
        hidden_size: int,
        num_recursions: int,
        loss_coef: float = 0.1,
        gumbel_temperature: float = 1.0,
    ) -> None:
        super().__init__("delta")
        self.loss_coef = loss_coef
        self.gumbel_temperature = gumbel_temperature
        self.num_recursions = num_recursions
        self.up = nn.Linear(hidden_size, WIDTH)
        self.down = nn.Linear(WIDTH, num_recursions + 1)

    def begin(self, hidden: Tensor, tokens: Tokens, causal: bool) -> ActionPlan:
        logits = self._logits(hidden)  # [total, 1 + num_recursions]
        if causal:
            action = F.one_hot(logits.argmax(dim=-1), logits.shape[1]).to(logits.dtype)
        else:
            action = F.gumbel_softmax(logits, self.gumbel_temperature, hard=True)
        # gates[:, r]: the action is to apply the block more than r times.
        gates = action.flip(-1).cumsum(-1).flip(-1)[:, 1:]
        depth = (gates.detach() > 0.5).sum(dim=-1, dtype=torch.int32)
        index, cu_seqlens = ops.compact_depth(depth, tokens.cu_seqlens, self.num_recursions)
        loss = self.loss_coef * gates.sum() / max(1, tokens.total)
        return ActionPlan(tokens, gates, index, cu_seqlens, cu_seqlens.diff().tolist(), loss)

    def enter(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return (self._logits(hidden).argmax(dim=-1),)

    def goes_on(
        self, depth: int, hidden: Tensor, rows: Tensor, entered: tuple[Tensor, ...]
    ) -> tuple[Tensor, None]:
        return entered[0][rows] > depth, None

    def _logits(self, hidden: Tensor) -> Tensor:
        return widen(self.down(self.up(hidden).relu()))

    def select(
        self, depth: int, hidden: Tensor, active: Tokens, plan: ActionPlan
    ) -> tuple[Tokens, Tensor | None]:
        lengths = plan.lengths[depth]
        index = plan.index[depth, : sum(lengths)]
        gate = ops.gather_tokens(plan.gates[:, depth], index)
        active = plan.tokens.select(index, lengths, plan.cu_seqlens[depth], gate)
        return active, plan.loss if depth == 0 else None
