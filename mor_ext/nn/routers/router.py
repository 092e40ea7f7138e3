"""What a router is: which tokens go on at each depth, and how a depth's output is taken in.

The recursion loop (``recursion.py``) asks a router three things::

    plan         = router.begin(hidden, tokens, causal)                 # once, at the entry
    active, loss = router.select(depth, hidden, active, plan)           # at each depth, from 0
    hidden       = router.merge(depth, hidden, output, active, plan)    # after the block

The engine (``mor_ext.inference``), whose tokens are at several depths at once, asks for the causal
rule by ``enter``, ``goes_on`` and ``merge_rows``. Its hidden states, and all else that it keeps of
tokens, are tables; ``rows`` (int32 ``[k]``) are those of the tokens in question.

Below, H is the hidden state and f the whole shared block, its residual included; so f(H) - H is
what the block adds. ``update`` says which of the two enters:

* "output": H + gate * f(H), the paper's equation 1 and its authors' code. With gate 1 the residual
  counts twice, H + f(H) = 2 H + (f(H) - H).
* "delta": H + gate * (f(H) - H). With gate 1 this is f(H), an ordinary residual network.

The fixed-depth router has gate 1, and "delta" makes it the vanilla and the recursive transformer.
Under either rule expert-choice with capacity 1 and gate 1 is the recursive model of that rule.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mor_ext import ops
from mor_ext.nn.linear import Linear
from mor_ext.nn.tokens import Tokens


class Router(nn.Module):
    """Every token to the full depth, gate 1: the router of models that do not route.

    Attributes:
        causal: whether there is a rule by which a token's depth depends on nothing after it.
    """

    causal = True

    def __init__(self, update: str = "delta") -> None:
        super().__init__()
        self.update = update

    def begin(self, hidden: Tensor, tokens: Tokens, causal: bool) -> Any:
        """Whatever is decided once for hidden ``[total, hidden_size]``.

        ``causal`` asks for the causal rule instead of that of training.
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

    def after_step(self) -> None:
        """What changes after an optimizer step, in training."""

    def enter(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """What is decided once for tokens at the entry, each ``[k, ...]``.

        hidden: ``[k, hidden_size]``, of these tokens alone; positions: int32 ``[k]``.
        """
        return ()

    def goes_on(
        self, depth: int, hidden: Tensor, rows: Tensor, entered: tuple[Tensor, ...]
    ) -> tuple[Tensor | bool, Tensor | None]:
        """Who goes through the block at this depth, of the tokens that did at the depth before.

        Returns flags, bool ``[k]`` or one for all, and gates ``[k]``; None is 1.
        """
        return True, None

    def merge_rows(
        self,
        hidden: Tensor,
        output: Tensor,
        rows: Tensor,
        gate: Tensor | None,
        depths: Tensor,
        entered: tuple[Tensor, ...],
    ) -> None:
        """:meth:`merge`, into hidden ``[N, hidden_size]`` itself, of rows at ``depths`` (int32
        ``[k]``)."""
        if self.update == "delta":
            if gate is None:
                hidden.index_copy_(0, rows.long(), output)
                return
            output = output - ops.gather_tokens(hidden, rows)
        ops.scatter_tokens_(hidden, output, rows, gate)


class Scorer(nn.Module):
    """Logits of hidden states (arXiv 2507.10524, table 3); no biases.

    Args:
        kind: "linear", "mlp" (hidden width ``2 * hidden_size``) or "wide_mlp" (4 times, as the
            paper says; its code has 2 there too), with GELU between.
        outputs: logits of a token.
    """

    WIDTH = {"mlp": 2, "wide_mlp": 4}  # noqa: RUF012

    def __init__(self, kind: str, hidden_size: int, outputs: int) -> None:
        super().__init__()
        width = self.WIDTH.get(kind, 1) * hidden_size
        self.up = None if kind == "linear" else Linear(hidden_size, width)
        self.weight = nn.Parameter(torch.empty(outputs, width))

    def forward(self, hidden: Tensor, active: Tokens | None = None) -> Tensor:
        """At least fp32 ``[k, outputs]`` of the active rows of hidden ``[total, hidden_size]``;
        None is every row."""
        if active is None or active.index is None:
            return self._logits(hidden)
        if self.up is not None:
            return self._logits(ops.gather_tokens(hidden, active.index))
        # Cheaper on every row than a gather before it.
        return ops.gather_tokens(self._logits(hidden), active.index)

    def _logits(self, hidden: Tensor) -> Tensor:
        if self.up is not None:
            hidden = nn.functional.gelu(self.up(hidden))
        return widen(hidden @ self.weight.T)


def rows_where(keep: Tensor, active: Tokens) -> tuple[Tensor, list[int], Tensor]:
    """The rows where ``keep`` (bool ``[k]``) holds, how many of each sequence, and cu_seqlens.

    Waits for the device: the numbers are data.
    """
    index, cu_seqlens = ops.compact_depth(keep.int(), active.cu_seqlens, 1)
    lengths = cu_seqlens[0].diff().tolist()
    return index[0, : sum(lengths)], lengths, cu_seqlens[0]


def widen(logits: Tensor) -> Tensor:
    """At least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
