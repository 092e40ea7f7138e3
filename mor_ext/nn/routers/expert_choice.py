"""Expert choice: each depth picks its tokens; with one depth of small capacity, MoD."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_ext import ops
from mor_ext.nn.routers.router import Router, Scorer, rows_where
from mor_ext.nn.tokens import Tokens, cu_seqlens_of

ACTIVATIONS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "identity": lambda logits: logits}


class ExpertChoiceRouter(Router):
    """Each depth picks its tokens (arXiv 2507.10524, section 2.2.1; arXiv 2404.02258).

    At depth r a token still active has a logit from a scorer of that depth and the gate
    ``alpha * activation(logit)``. In training depth r keeps the ``max(1, int(c_r * T))`` highest
    logits of a sequence of T tokens; that choice looks at the whole sequence. The causal rule keeps
    a token whose logit, or that of a predictor, is at least a threshold, by default 0 (a
    probability of 0.5). Where c_r is no less than c_{r-1}, or than 1 at the first depth, training
    keeps every token, and so does the causal rule if no threshold is given.

    Args:
        capacity: c_r, of the full sequence, one for each depth.
        kind: of the scorers, see :class:`Scorer`.
        activation: "sigmoid", "tanh" or "identity".
        causal_rule: what learns to foresee the top-k, by a binary cross entropy: "aux_loss" the
            logits themselves, "aux_router" scorers of their own that leave the hidden states alone,
            "none" nothing; then there is no causal rule.
        loss_coef: of that cross entropy.
        z_loss_coef: of the mean of logit ** 2 (the z-loss of a single logit).
        thresholds: of the causal rule, one for each depth; None, there or for all, is the default.

    Attributes:
        thresholds: as above; may be set at any time.
    """

    thresholds: tuple[float | None, ...]

    def __init__(
        self,
        hidden_size: int,
        capacity: tuple[float, ...],
        kind: str = "linear",
        activation: str = "sigmoid",
        alpha: float = 0.1,
        causal_rule: str = "aux_loss",
        loss_coef: float = 0.001,
        z_loss_coef: float = 0.0,
        thresholds: tuple[float | None, ...] | None = None,
        update: str = "output",
    ) -> None:
        super().__init__(update)
        self.capacity = capacity
        self.thresholds = (None,) * len(capacity) if thresholds is None else thresholds
        self.activation = activation
        self.alpha = alpha
        self.causal = causal_rule != "none"
        self.loss_coef = loss_coef
        self.z_loss_coef = z_loss_coef
        self.scorers = nn.ModuleList(Scorer(kind, hidden_size, 1) for _ in capacity)
        self.predictors = None
        if causal_rule == "aux_router":
            self.predictors = nn.ModuleList(Scorer(kind, hidden_size, 1) for _ in capacity)

    def begin(self, hidden: Tensor, tokens: Tokens, causal: bool) -> tuple[int, ...] | None:
        return None if causal else tokens.lengths  # the lengths that capacities refer to

    def select(
        self, depth: int, hidden: Tensor, active: Tokens, plan: tuple[int, ...] | None
    ) -> tuple[Tokens, Tensor | None]:
        lengths: Sequence[int]
        logits = self.scorers[depth](hidden, active).squeeze(1)  # [k of the depth before]
        predicted = logits
        if self.predictors is not None:
            predicted = self.predictors[depth](hidden.detach(), active).squeeze(1)
        threshold = self._threshold(depth)
        if plan is None and threshold is not None:
            rows, lengths, cu_seqlens = rows_where(predicted >= threshold, active)
        elif plan is not None and self._chooses(depth):
            rows, lengths, cu_seqlens = top(self.capacity[depth], logits.detach(), active, plan)
        else:
            rows = torch.arange(active.total, dtype=torch.int32, device=logits.device)
            lengths, cu_seqlens = active.lengths, active.cu_seqlens
        gate = self.alpha * ACTIVATIONS[self.activation](ops.gather_tokens(logits, rows))
        loss = None if plan is None else self._loss(logits, predicted, rows)
        return active.select(rows, lengths, cu_seqlens, gate), loss

    def goes_on(
        self, depth: int, hidden: Tensor, rows: Tensor, entered: tuple[Tensor, ...]
    ) -> tuple[Tensor | bool, Tensor]:
        hidden = ops.gather_tokens(hidden, rows)
        logits = predicted = self.scorers[depth](hidden).squeeze(1)
        gate = self.alpha * ACTIVATIONS[self.activation](logits)
        threshold = self._threshold(depth)
        if threshold is None:
            return True, gate
        if self.predictors is not None:
            predicted = self.predictors[depth](hidden).squeeze(1)
        return predicted >= threshold, gate

    def _chooses(self, depth: int) -> bool:
        """Whether the capacity of a depth leaves tokens out."""
        return self.capacity[depth] < (self.capacity[depth - 1] if depth > 0 else 1)

    def _threshold(self, depth: int) -> float | None:
        """Of the causal rule; None keeps every token."""
        given = self.thresholds[depth]
        return given if given is not None else 0.0 if self._chooses(depth) else None

    def _loss(self, logits: Tensor, predicted: Tensor, chosen: Tensor) -> Tensor:
        """chosen: int32 rows of the top-k among the logits ``[k]``."""
        loss = self.z_loss_coef * logits.square().mean()
        if self.causal:
            member = torch.zeros_like(logits).index_fill(0, chosen.long(), 1.0)
            loss = loss + self.loss_coef * F.binary_cross_entropy_with_logits(predicted, member)
        return loss


def top(
    capacity: float, scores: Tensor, active: Tokens, full: tuple[int, ...]
) -> tuple[Tensor, list[int], Tensor]:
    """The highest ``max(1, int(capacity * full))`` scores of each sequence.

    Args:
        scores: ``[k]``, of the active tokens.
        full: the lengths of the sequences that capacity is a share of.

    Returns rows (int32, ascending), how many of each sequence, and their cu_seqlens.
    """
    wanted = [max(1, int(capacity * length)) for length in full]
    lengths = [min(k, have) for k, have in zip(wanted, active.lengths, strict=True)]
    cu_seqlens = cu_seqlens_of(lengths, scores.device)
    rows = ops.route_topk(scores, active.cu_seqlens, cu_seqlens, sum(lengths), active.max_seqlen)
    return rows, lengths, cu_seqlens
