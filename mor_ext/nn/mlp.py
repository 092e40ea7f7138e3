"""The feed-forward network of a layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mor_ext.nn.linear import Linear

CHUNK_BYTES = 3 << 20  # of gate_up on a CPU: what three or four passes over it keep in the cache


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))`` (Shazeer, arXiv 2002.05202); gate and up are one product."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:  # [k, hidden_size]
        return self.down_proj(gated(self.gate_up_proj(x)))


def gated(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` ``[k, width]`` of gate_up ``[k, 2 * width]``."""
    if torch.compiler.is_compiling():  # fuses this, and decides itself what to keep
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _Gated.apply(gate_up)


class _Gated(torch.autograd.Function):
    """Keeps gate_up alone for the backward pass, which runs silu again: the time that this takes
    is that of the copies and allocations which it saves. Differentiable once."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        for rows in _chunks(gate_up):
            gate, up = gate_up[rows].chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=out[rows]).mul_(up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad_gate_up = torch.empty_like(gate_up)
        for rows in _chunks(gate_up):
            gate, up = gate_up[rows].chunk(2, dim=-1)
            grad_gate, grad_up = grad_gate_up[rows].chunk(2, dim=-1)
            torch.ops.aten.silu.out(gate, out=grad_up).mul_(grad[rows])
            torch.mul(grad[rows], up, out=grad_gate)
            torch.ops.aten.silu_backward.grad_input(grad_gate, gate, grad_input=grad_gate)
        return grad_gate_up


def _chunks(gate_up: Tensor) -> list[slice]:
    total, width = gate_up.shape
    rows = max(1, CHUNK_BYTES // (width * gate_up.itemsize)) if gate_up.is_cpu else max(1, total)
    return [slice(start, start + rows) for start in range(0, total, rows)]
