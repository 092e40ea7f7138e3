"""What a case of the GPU bench is.

A family's file, gpu_<family>.py, has functions that make the work and the table CASES. Tensors are
made on torch's default device: the GPU, or in a dry run the CPU.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from harness import flat
from torch import Tensor

F32, BF16, F16, I32 = torch.float32, torch.bfloat16, torch.float16, torch.int32
Sizes = dict[str, int]
Call = Callable[[], Any]
Tensors = Sequence[Tensor]


# Sizes in tables: S is a sequence's length, N a number of tokens, K those of them that are active,
# W their width.
LETTERS = {
    "batch": "B",
    "length": "S",
    "tokens": "N",
    "active": "K",
    "width": "W",
    "heads": "H",
    "kv_heads": "Hkv",
    "head_dim": "D",
}


@dataclass(frozen=True)
class Goal:
    """A bound on one number of a measured case; stretch is what would be better still.

    kind: "us" (at most), or at least: "share" of the ceiling, "tflop_s", "ratio" of a peer's time
    to ours, "rate": our FLOP/s over those of a yardstick.
    """

    kind: str
    bound: float
    peer: str = ""
    stretch: float | None = None

    def __str__(self) -> str:
        return {
            "us": f"<= {self.bound:g} us",
            "share": f">= {self.bound:.0%} of ceiling",
            "tflop_s": f">= {self.bound:g} TFLOP/s",
            "ratio": f">= {self.bound:g}x {self.peer}",
            "rate": f">= {self.bound:g} of TFLOP/s of {self.peer}",
        }[self.kind]


@dataclass
class Work:
    """One piece of work on tensors that exist: equal inputs, equal results.

    exact computes the result, or the part of it that `part` takes out of any result, in fp64.
    bytes and flops are what the work needs at least, whoever does it; fixed_us is what no version
    avoids (launch, latency). A yardstick is other work, with the FLOPs that it needs.
    """

    ours: Call
    exact: Call
    peers: dict[str, Call]
    bytes: int
    flops: int = 0
    fixed_us: float = 0
    part: Callable[[Any], Any] = lambda results: results
    yardsticks: dict[str, tuple[Call, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A row of the table: make(**sizes, dtype=dtype), with flags passed as True, gives the Work."""

    family: str
    op: str  # of torch.ops.mor
    label: str
    make: Callable[..., Work]
    flags: tuple[str, ...]
    small: Sizes  # sizes for when only the result counts
    sizes: Sizes
    dtype: torch.dtype
    goals: tuple[Goal, ...]

    @property
    def name(self) -> str:
        words = (self.op, self.label, "backward" if "backward" in self.flags else "")
        return " ".join(filter(None, words))

    @property
    def shape(self) -> str:
        return " ".join(f"{LETTERS.get(name, f'{name} ')}{n}" for name, n in self.sizes.items())

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def ops(self) -> list[str]:
        """All that ours calls. The backward pass of rotary is rotary."""
        with_backward = "backward" in self.flags and self.op != "rotary"
        return [self.op, f"{self.op}_bwd"] if with_backward else [self.op]

    def __str__(self) -> str:
        return f"{self.family}: {self.name}, {self.dtype_name}, {self.shape}"

    def build(self, small: bool = False) -> Work:
        sizes = self.small if small else self.sizes
        return self.make(**sizes, dtype=self.dtype, **dict.fromkeys(self.flags, True))


Row = tuple[Any, ...]  # sizes, dtype, goals


def cases(
    family: str,
    op: str,
    make: Callable[..., Work],
    small: Sizes,
    rows: list[Row],
    label: str = "",
    flags: tuple[str, ...] = (),
) -> list[Case]:
    return [
        Case(family, op, label, make, flags, small, sizes, dtype, tuple(goals))
        for sizes, dtype, *goals in rows
    ]


def wide(*tensors: Tensor) -> list[Tensor]:
    return [t.double() for t in tensors]


def backward_pass(function: Callable[..., Any], inputs: Tensors, grads: Tensors) -> Call:
    """The backward pass alone: gradients of the inputs, the forward pass done beforehand."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = flat(function(*leaves))
    grads = [g.to(out.dtype) for g, out in zip(grads, outputs, strict=True)]
    return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True)


def one_pass(
    ours: Callable[..., Any],
    exact: Callable[..., Any],
    peers: dict[str, Callable[..., Any]],
    inputs: Tensors,
    grads: Tensors,
) -> dict[str, Any]:
    """ours, exact and peers of Work, from functions of the inputs: the forward pass, or, where
    there are gradients of the outputs, the backward pass alone."""
    if grads:
        return {
            "ours": backward_pass(ours, inputs, grads),
            "exact": lambda: backward_pass(exact, wide(*inputs), grads)(),
            "peers": {name: backward_pass(f, inputs, grads) for name, f in peers.items()},
        }
    return {
        "ours": partial(ours, *inputs),
        "exact": lambda: exact(*wide(*inputs)),
        "peers": {name: partial(f, *inputs) for name, f in peers.items()},
    }
