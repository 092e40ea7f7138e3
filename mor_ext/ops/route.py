"""Routing decisions: which tokens a recursion works on, or how deep each token goes."""

import torch
from torch import Tensor

from mor_ext.ops._fake import register_fake


def route_topk(
    scores: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_out: Tensor,
    total_out: int,
    max_seqlen: int,
) -> Tensor:
    """The highest scores of each sequence of a packed batch, as ascending rows.

    Exact and deterministic: of equal scores the lower row wins, -0.0 equals 0.0, and NaN ranks
    above every number, as in ``torch.topk``, so that it stays visible.

    Args:
        scores: ``[N]``, fp32, bf16 or fp16 (fp64 too on CPU), compared as given.
        cu_seqlens: int32 ``[batch + 1]``, cumulative lengths of the sequences in tokens.
        cu_seqlens_out: int32 ``[batch + 1]``, cumulative numbers of tokens to pick; a sequence
            gives at most its length.
        total_out: last element of cu_seqlens_out, so that the size of the output is known
            without reading device memory.
        max_seqlen: at least the longest sequence.

    Returns:
        int32 ``[total_out]``, rows in ``[0, N)``, ascending within a sequence.

    Raises:
        RuntimeError: ``mor::route_topk: <argument> must be <rule>, got <value>``.

    Source: expert-choice routing of Mixture-of-Recursions (arXiv 2507.10524), section 2.2.
    """
    return torch.ops.mor.route_topk(scores, cu_seqlens, cu_seqlens_out, total_out, max_seqlen)


def route_depth(logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The recursion depth of each token: the largest of its biased logits.

    Args:
        logits: ``[N, num_recursions]``, fp32, bf16 or fp16 (fp64 too on CPU).
        bias: ``[num_recursions]``, fp32 or dtype of logits, added in fp32 (fp64 for fp64) for
            the selection alone; None adds nothing.

    Returns:
        depth int32 ``[N]``, 1 + argmax (the lowest of equals; NaN ranks above every number), and
        load int32 ``[num_recursions]``, how many tokens chose each depth.

    Raises:
        RuntimeError: ``mor::route_depth: <argument> must be <rule>, got <value>``.

    Source: token-choice routing of Mixture-of-Recursions (arXiv 2507.10524), section 2.2; bias
    of loss-free balancing (arXiv 2408.15664).
    """
    return torch.ops.mor.route_depth(logits, bias)


@register_fake("route_topk")
def _(
    scores: Tensor, cu_seqlens: Tensor, cu_seqlens_out: Tensor, total_out: int, max_seqlen: int
) -> Tensor:
    return scores.new_empty((total_out,), dtype=torch.int32)


@register_fake("route_depth")
def _(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    depth = logits.new_empty((logits.shape[0],), dtype=torch.int32)
    return depth, logits.new_empty((logits.shape[1],), dtype=torch.int32)
