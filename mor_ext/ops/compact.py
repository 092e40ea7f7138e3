"""Token compaction: the rows that a recursion works on, out of a packed tensor and back."""

from typing import Any

import torch
from torch import Tensor

from mor_ext.ops._fake import register_fake


def compact_depth(depth: Tensor, cu_seqlens: Tensor, num_recursions: int) -> tuple[Tensor, Tensor]:
    """The active rows of every recursion at once, from the depth of each token.

    Args:
        depth: int32 ``[N]``, in ``[0, num_recursions]``: how many recursions a token takes.
        cu_seqlens: int32 ``[batch + 1]``, cumulative lengths of the sequences in tokens.
        num_recursions: number of recursions, in [1, 1024].

    Returns:
        index int32 ``[num_recursions, N]``: row r lists, ascending, the rows with depth > r, then
        -1; cu_seqlens_out int32 ``[num_recursions, batch + 1]``, cumulative numbers of them.

    Raises:
        RuntimeError: ``mor::compact_depth: <argument> must be <rule>, got <value>``.
    """
    return torch.ops.mor.compact_depth(depth, cu_seqlens, num_recursions)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a packed tensor.

    Args:
        x: ``[N, ...]``, fp32, bf16 or fp16 (fp64 too on CPU).
        index: int32 ``[K]``, rows in ``[0, N)``; -1 gives a zero row.

    Returns:
        ``[K, ...]`` of x's dtype. Differentiable in x, deterministically, also where index
        repeats a row.

    Raises:
        RuntimeError: ``mor::gather_tokens: <argument> must be <rule>, got <value>``.
    """
    return torch.ops.mor.gather_tokens(x, index)


def scatter_tokens(x: Tensor, update: Tensor, index: Tensor, gate: Tensor | None = None) -> Tensor:
    """A copy of x with gated updates added to rows: ``y[index[i]] += gate[i] * update[i]``.

    Args:
        x: ``[N, ...]``, fp32, bf16 or fp16 (fp64 too on CPU).
        update: ``[K, ...]``, dtype of x.
        index: int32 ``[K]``, unique rows in ``[0, N)`` in any order; -1 is skipped.
        gate: ``[K]``, fp32 or dtype of x; None is 1.

    Returns:
        ``[N, ...]`` of x's dtype, computed in fp32 (fp64 for fp64) and rounded once.
        Differentiable in x, update and gate.

    Raises:
        RuntimeError: ``mor::scatter_tokens: <argument> must be <rule>, got <value>``.
    """
    return torch.ops.mor.scatter_tokens(x, update, index, gate)


def scatter_tokens_(x: Tensor, update: Tensor, index: Tensor, gate: Tensor | None = None) -> None:
    """:func:`scatter_tokens` into x itself, for inference: not differentiable.

    Arguments as there; x may be strided but not expanded, and nothing may require a gradient
    while gradients are recorded.

    Raises:
        RuntimeError: ``mor::scatter_tokens_: <argument> must be <rule>, got <value>``.
    """
    torch.ops.mor.scatter_tokens_(x, update, index, gate)


def gather_rms_norm(
    x: Tensor, index: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a packed tensor, and their RMSNorm, in one pass over memory.

    Args:
        x: ``[N, hidden]``, fp32, bf16 or fp16 (fp64 too on CPU).
        index: int32 ``[K]``, rows in ``[0, N)``; -1 gives zeros in every output.
        weight: ``[hidden]``, fp32 or dtype of x.
        eps: added to the mean square, at least 0.

    Returns:
        rows ``[K, hidden]`` of x's dtype; normed = rows * rstd * weight ``[K, hidden]`` of x's
        dtype, computed in fp32 (fp64 for fp64) and rounded once; rstd ``[K]`` fp32 (fp64 for
        fp64), 1 / sqrt(mean(rows ** 2) + eps). rows and normed are differentiable in x and
        weight, deterministically.

    Raises:
        RuntimeError: ``mor::gather_rms_norm: <argument> must be <rule>, got <value>``.

    Source: RMSNorm (arXiv 1910.07467).
    """
    return torch.ops.mor.gather_rms_norm(x, index, weight, eps)


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ---- fakes ----


@register_fake("compact_depth")
def _(depth: Tensor, cu_seqlens: Tensor, num_recursions: int) -> tuple[Tensor, Tensor]:
    index = depth.new_empty((num_recursions, depth.shape[0]))
    return index, depth.new_empty((num_recursions, cu_seqlens.shape[0]))


@register_fake("gather_tokens")
def _(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((index.shape[0], *x.shape[1:]))


@register_fake("gather_tokens_bwd")
def _(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return grad.new_empty((num_rows, *grad.shape[1:]))


@register_fake("scatter_tokens")
def _(x: Tensor, update: Tensor, index: Tensor, gate: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("scatter_tokens_")
def _(x: Tensor, update: Tensor, index: Tensor, gate: Tensor | None) -> None:
    return None


@register_fake("scatter_tokens_bwd")
def _(
    grad: Tensor, index: Tensor, update: Tensor | None, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    grad_update = grad.new_empty((index.shape[0], *grad.shape[1:]))
    like = grad if gate is None else gate
    return grad_update, like.new_empty((0 if update is None else index.shape[0],))


@register_fake("gather_rms_norm")
def _(x: Tensor, index: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.new_empty((index.shape[0], x.shape[1]))
    rstd = x.new_empty((index.shape[0],), dtype=_accumulate_dtype(x))
    return rows, torch.empty_like(rows), rstd


@register_fake("gather_rms_norm_bwd")
def _(
    grad_rows: Tensor | None,
    grad_normed: Tensor | None,
    rows: Tensor,
    rstd: Tensor,
    index: Tensor,
    weight: Tensor,
    num_rows: int,
) -> tuple[Tensor, Tensor]:
    return rows.new_empty((num_rows, rows.shape[1])), weight.new_empty(weight.shape)


# ---- autograd ----


def _scatter_tokens_autograd(
    keyset: Any, x: Tensor, update: Tensor, index: Tensor, gate: Tensor | None
) -> None:
    """Refuses to record a gradient, and counts the mutation: a graph that saved x must notice."""
    if torch.is_grad_enabled():
        for name, tensor in (("x", x), ("update", update), ("gate", gate)):
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"mor::scatter_tokens_: {name} must be without gradient (use scatter_tokens "
                    "or torch.no_grad), got requires_grad=True"
                )
    torch.autograd.graph.increment_version(x)
    below = keyset & torch._C._after_ADInplaceOrView_keyset
    torch.ops.mor.scatter_tokens_.default.redispatch(below, x, update, index, gate)


_library = torch.library.Library("mor", "FRAGMENT")
_library.impl("scatter_tokens_", _scatter_tokens_autograd, "Autograd", with_keyset=True)


def _gather_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index = inputs
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(index)


def _gather_tokens_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (index,) = ctx.saved_tensors
    return torch.ops.mor.gather_tokens_bwd(grad, index, ctx.num_rows), None


def _scatter_tokens_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, update, index, gate = inputs
    gate_needs_grad = gate is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(index, update if gate_needs_grad else None, gate)


def _scatter_tokens_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    index, update, gate = ctx.saved_tensors
    grad_update, grad_gate = torch.ops.mor.scatter_tokens_bwd(grad, index, update, gate)
    return grad, grad_update, None, None if update is None else grad_gate


def _gather_rms_norm_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, index, weight, _ = inputs
    rows, _, rstd = output
    ctx.num_rows = x.shape[0]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(rstd)
    ctx.save_for_backward(rows, rstd, index, weight)


def _gather_rms_norm_backward(
    ctx: Any, grad_rows: Tensor | None, grad_normed: Tensor | None, _: None
) -> tuple[Any, ...]:
    grad_x, grad_weight = torch.ops.mor.gather_rms_norm_bwd(
        grad_rows, grad_normed, *ctx.saved_tensors, ctx.num_rows
    )
    return grad_x, None, grad_weight, None


torch.library.register_autograd(
    "mor::gather_tokens", _gather_tokens_backward, setup_context=_gather_tokens_setup
)
torch.library.register_autograd(
    "mor::scatter_tokens", _scatter_tokens_backward, setup_context=_scatter_tokens_setup
)
torch.library.register_autograd(
    "mor::gather_rms_norm", _gather_rms_norm_backward, setup_context=_gather_rms_norm_setup
)
