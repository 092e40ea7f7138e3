"""The head and the cross entropy in one: the logits of a few rows at a time, never all of them."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

IGNORED = -100  # as in F.cross_entropy
# A chunk's logits: small enough for the cache. The rows: enough for a matrix product, which reads
# the whole weight for every chunk.
CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 256


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, num_items: int | Tensor | None = None
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden, weight), targets)`` without the ``[n, vocab]`` logits.

    The forward pass takes the logits of some rows, and at once what these add to the gradients of
    hidden and weight; the backward pass scales these. Softmax and loss are in fp32 (fp64 for fp64),
    and so is the sum of the weight's gradient over the chunks.

    Args:
        hidden: ``[n, d]``, fp32, bf16, fp16 or fp64.
        weight: ``[vocab, d]``, dtype of hidden. Under autocast both are multiplied in the autocast
            dtype, whatever they are.
        targets: int64 ``[n]`` in ``[0, vocab)``, or -100 for a row that does not count.
        num_items: what the sum over rows is divided by; None is the number of rows that count.

    Returns:
        Mean negative log likelihood in nats, fp32 (fp64 for fp64) ``[]``; 0 where no row counts.
        Differentiable once in hidden and weight.

    Raises:
        ValueError: shapes or dtypes that do not fit.
        IndexError: on the CPU, a target that is neither in range nor -100.

    Source: Liger Kernel (arXiv 2410.10989), section 3.2, with PyTorch's own kernels.
    """
    _check(hidden, weight, targets)
    dtype, device = hidden.dtype, hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif weight.dtype != dtype:
        raise ValueError(f"weight must be of hidden's dtype {dtype}, got {weight.dtype}")
    record = torch.is_grad_enabled()
    total, _, _ = torch.ops.mor_ext.linear_cross_entropy(
        hidden,
        weight,
        targets,
        dtype,
        record and hidden.requires_grad,
        record and weight.requires_grad,
    )
    if num_items is None:
        num_items = (targets != IGNORED).sum().clamp(min=1)
    return total / num_items


def _check(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [n, d], got shape {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must be [vocab, {hidden.shape[1]}], got shape {list(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 [{hidden.shape[0]}], "
            f"got {targets.dtype} of shape {list(targets.shape)}"
        )


def sum_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss ``[]``, and its gradients: of hidden in hidden's dtype, of weight in fp32.

    ``dtype`` is that of the products; a gradient that is not asked for is an empty tensor.
    """
    wide = _wide(dtype)
    total = hidden.new_zeros((), dtype=wide)
    grad_hidden = torch.empty_like(hidden if for_hidden else hidden[:0])
    grad_weight = torch.zeros_like(weight if for_weight else weight[:0], dtype=wide)
    # The op is opaque to autocast, what it calls is not.
    with torch.autocast(hidden.device.type, enabled=False):
        matrix = weight.to(dtype)
        rows = max(CHUNK_ROWS, CHUNK_BYTES // (weight.shape[0] * wide.itemsize))
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            chunk = hidden[part].to(dtype)  # [rows, d]
            target = targets[part].unsqueeze(1)
            ignored = target == IGNORED  # [rows, 1]
            target = target.masked_fill(ignored, 0)
            log_probs = (chunk @ matrix.T).log_softmax(dim=-1, dtype=wide)  # [rows, vocab]
            total -= log_probs.gather(1, target).masked_fill_(ignored, 0).sum()
            if not (for_hidden or for_weight):
                continue
            # d loss / d logits = softmax - one-hot
            grad = log_probs.exp_()
            grad.scatter_add_(1, target, grad.new_full((), -1).expand_as(target))
            grad = grad.masked_fill_(ignored, 0).to(dtype)
            if for_hidden:
                grad_hidden[part] = grad @ matrix
            if not for_weight:
                continue
            if dtype == wide:
                grad_weight.addmm_(grad.T, chunk)
            else:
                grad_weight += grad.T @ chunk
    return total, grad_hidden, grad_weight


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# One op, whose loop torch.compile does not unroll: the number of chunks is its own affair.
_op = torch.library.custom_op("mor_ext::linear_cross_entropy", sum_and_gradients, mutates_args=())


@_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    dtype: torch.dtype,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = _wide(dtype)
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden if for_hidden else hidden[:0]),
        torch.empty_like(weight if for_weight else weight[:0], dtype=wide),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, *_ = inputs
    _, grad_hidden, grad_weight = output
    ctx.weight_dtype = weight.dtype
    ctx.mark_non_differentiable(grad_hidden, grad_weight)
    ctx.save_for_backward(grad_hidden, grad_weight)


@once_differentiable
def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_hidden, grad_weight = ctx.saved_tensors
    need_hidden, need_weight, *_rest = ctx.needs_input_grad
    return (
        (grad_hidden * grad).to(grad_hidden.dtype) if need_hidden else None,
        (grad_weight * grad).to(ctx.weight_dtype) if need_weight else None,
        None,
        None,
        None,
        None,
    )


_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.mor_ext.linear_cross_entropy)
def _flops(
    hidden: Any, weight: Any, targets: Any, dtype: Any, for_hidden: bool, for_weight: bool, **_: Any
) -> int:
    """A product forward and one for each gradient; FlopCounterMode does not look inside the op."""
    return 2 * hidden[0] * hidden[1] * weight[0] * (1 + for_hidden + for_weight)
