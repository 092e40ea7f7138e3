"""Sample arguments for every op of torch.ops.mor: the larger n, the longer the sequences."""

from collections.abc import Callable
from typing import Any

import torch
from helpers import cu_seqlens_of
from torch import Tensor

from mor_ext.reference import attention as reference_attention
from mor_ext.reference import compact as reference_compact

Args = dict[str, Any]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def some_rows(n: int) -> Tensor:
    """Unique rows of [0, n), ascending, and padding."""
    return torch.cat([torch.randperm(n)[: n // 2].sort().values, int32(-1)]).int()


def route_topk(n: int) -> Args:
    return {
        "scores": torch.randn(3 * n),
        "cu_seqlens": cu_seqlens_of([n, 0, 2 * n]),
        "cu_seqlens_out": cu_seqlens_of([n // 2, 0, n]),
        "total_out": n // 2 + n,
        "max_seqlen": 2 * n,
    }


def route_depth(n: int) -> Args:
    return {"logits": torch.randn(n, 3), "bias": torch.randn(3)}


def compact_depth(n: int) -> Args:
    depth = torch.randint(4, (3 * n,), dtype=torch.int32)
    return {"depth": depth, "cu_seqlens": cu_seqlens_of([n, 0, 2 * n]), "num_recursions": 3}


def gather_tokens(n: int) -> Args:
    return {"x": torch.randn(n, 24), "index": some_rows(n)}


def gather_tokens_bwd(n: int) -> Args:
    return {"grad": torch.randn(n // 2 + 1, 24), "index": some_rows(n), "num_rows": n}


def scatter_tokens(n: int) -> Args:
    count = n // 2 + 1
    return {
        "x": torch.randn(n, 24),
        "update": torch.randn(count, 24),
        "index": some_rows(n),
        "gate": torch.rand(count),
    }


def scatter_tokens_bwd(n: int) -> Args:
    args = scatter_tokens(n)
    return {"grad": args.pop("x"), "index": args["index"], **args}


def gather_rms_norm(n: int) -> Args:
    return {"x": torch.randn(n, 24), "index": some_rows(n), "weight": torch.randn(24), "eps": 1e-6}


def gather_rms_norm_bwd(n: int) -> Args:
    args = gather_rms_norm(n)
    rows, _, rstd = reference_compact.gather_rms_norm(**args)
    return {
        "grad_rows": torch.randn(rows.shape),
        "grad_normed": torch.randn(rows.shape),
        "rows": rows,
        "rstd": rstd,
        "index": args["index"],
        "weight": args["weight"],
        "num_rows": n,
    }


def rotary(n: int) -> Args:
    angles = torch.arange(n).unsqueeze(1) * torch.logspace(0, -2, 8)
    return {
        "query": torch.randn(n, 4, 16),
        "key": torch.randn(n, 2, 16),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.randint(max(n, 1), (n,), dtype=torch.int32),
    }


def kv_append(n: int) -> Args:
    """Three lanes, the second without new tokens, in blocks of 4."""
    blocks = n // 4 + 2
    return {
        "key": torch.randn(n, 2, 16),
        "value": torch.randn(n, 2, 16),
        "key_cache": torch.randn(3 * blocks + 1, 4, 2, 16),
        "value_cache": torch.randn(3 * blocks + 1, 4, 2, 16),
        "block_table": torch.randperm(3 * blocks).view(3, blocks).int(),
        "cache_seqlens": int32(3, 2, 0),
        "cu_seqlens": cu_seqlens_of([n // 3, 0, n - n // 3]),
    }


def rotary_kv_append(n: int) -> Args:
    args = {**rotary(n), **kv_append(n)}
    return {"query": args["query"], "key": args["key"], "value": args["value"], **args}


def attention(n: int) -> Args:
    limits = torch.randint(2 * n + 1, (n,)).sort().values
    return {
        "query": torch.randn(n + 3, 4, 16),
        "key": torch.randn(2 * n + 5, 2, 16),
        "value": torch.randn(2 * n + 5, 2, 16),
        "cu_seqlens_q": cu_seqlens_of([n, 0, 3]),
        "cu_seqlens_k": cu_seqlens_of([2 * n, 3, 2]),
        "key_limit": torch.cat([limits, int32(0, 1, 2)]).int(),
        "max_seqlen_q": n + 3,
        "max_seqlen_k": 2 * n + 3,
        "softmax_scale": 0.25,
    }


def attention_bwd(n: int) -> Args:
    args = attention(n)
    out, lse = reference_attention.attention(**args)
    grads = {"grad_out": torch.randn(out.shape), "grad_lse": torch.randn(lse.shape)}
    data = {name: args.pop(name) for name in ("query", "key", "value")}
    return {**grads, **data, "out": out, "lse": lse, **args}


def paged_attention(n: int) -> Args:
    cache = kv_append(n)
    return {
        "query": torch.randn(n + 1, 4, 16),
        **{name: cache[name] for name in ("key_cache", "value_cache", "block_table")},
        "cache_seqlens": int32(n, 2, n),
        "cu_seqlens_q": cu_seqlens_of([1, 0, n]),
        "key_limit": None,
        "max_seqlen_q": n + 1,
        "softmax_scale": 0.25,
    }


SAMPLES: dict[str, Callable[[int], Args]] = {
    f.__name__: f
    for f in (
        route_topk,
        route_depth,
        compact_depth,
        gather_tokens,
        gather_tokens_bwd,
        scatter_tokens,
        scatter_tokens_bwd,
        gather_rms_norm,
        gather_rms_norm_bwd,
        rotary,
        kv_append,
        rotary_kv_append,
        attention,
        attention_bwd,
        paged_attention,
    )
} | {"scatter_tokens_": scatter_tokens}
