"""The modules that models are made of, one at a time, against hand computation."""

import torch
import torch.nn.functional as F

from mor_ext.nn import (
    Attention,
    PackedKV,
    RMSNorm,
    Rotary,
    SwiGLU,
    Tokens,
)
from mor_ext.nn.kv import shared_key_limit

CPU = torch.device("cpu")


def tokens_of(*lengths: int) -> Tokens:
    return Tokens.of_batch(lengths, CPU)


def test_tokens_of_a_batch_and_those_selected():
    tokens = Tokens.of_batch([2, 0, 3], CPU, past=torch.tensor([4, 1, 0], dtype=torch.int32))
    assert tokens.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert tokens.positions.tolist() == [4, 5, 0, 1, 2]
    assert (tokens.total, tokens.max_seqlen) == (5, 3)
    some = tokens.select(
        torch.tensor([1, 2, 4]), [1, 0, 2], torch.tensor([0, 1, 1, 3]), torch.ones(3)
    )
    assert some.index.tolist() == [1, 2, 4]
    assert some.positions.tolist() == [5, 0, 2]
    fewer = some.select(torch.tensor([0, 2]), [1, 0, 1], torch.tensor([0, 1, 1, 2]), torch.ones(2))
    assert fewer.index.tolist() == [1, 4]
    assert fewer.positions.tolist() == [5, 2]


def test_rms_norm_gathers(seed):
    norm = RMSNorm(16, eps=1e-5)
    norm.weight.data.uniform_()
    x = torch.randn(6, 16)
    rows, normed = norm.gather(x, torch.tensor([1, 4], dtype=torch.int32))
    assert torch.equal(rows, x[[1, 4]])
    torch.testing.assert_close(normed, norm(x)[[1, 4]])
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-5))


def test_swiglu_by_hand(seed):
    mlp, x = SwiGLU(8, 5), torch.randn(3, 8)
    gate, up = mlp.gate_up_proj.weight.chunk(2)
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(x), expected)


def test_attention_equals_sdpa(seed):
    """Of each sequence alone; rotary makes scores depend on the distance of positions only."""
    attention, rotary = Attention(0, 32, 4, 2, 8), Rotary(8, 100, 1e4)
    x = torch.randn(12, 32)
    for past in (0, 50):
        past = torch.full((2,), past, dtype=torch.int32)
        tokens = Tokens.of_batch([5, 7], CPU, past)
        out = attention(x, PackedKV("recursion_wise", rotary).view(0, 0, tokens))
        start = 0
        for length in (5, 7):
            part = x[start : start + length]
            q, k, v = attention.qkv_proj(part).split([32, 16, 16], dim=1)
            q, k = rotary(
                q.view(-1, 4, 8), k.view(-1, 2, 8), torch.arange(length, dtype=torch.int32)
            )
            expected = F.scaled_dot_product_attention(
                *(t.transpose(0, 1).unsqueeze(0) for t in (q, k, v.view(-1, 2, 8))),
                is_causal=True,
                enable_gqa=True,
            )
            expected = attention.o_proj(expected[0].transpose(0, 1).flatten(1))
            torch.testing.assert_close(out[start : start + length], expected)
            start += length


def test_shared_key_limit():
    """Sequence rows 0-3 with 0, 2, 3 active at depth 1, rows 4-5 with none, rows 6-7 with both."""
    tokens = tokens_of(4, 2, 2)

    def active(rows: list[int], lengths: list[int]) -> Tokens:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        index = torch.tensor(rows, dtype=torch.int32)
        return tokens.select(index, lengths, cu_seqlens, torch.ones(len(rows)))

    first = active([0, 2, 3, 6, 7], [3, 0, 2])
    second = active([0, 3, 7], [2, 0, 1])
    assert shared_key_limit(second, first).tolist() == [1, 3, 2]
    past = torch.tensor([10, 20, 30], dtype=torch.int32)
    assert shared_key_limit(second, first, past).tolist() == [11, 13, 32]
    assert shared_key_limit(second, tokens).tolist() == [1, 4, 2]  # all active: position + 1
    assert shared_key_limit(tokens, tokens).tolist() == [1, 2, 3, 4, 1, 2, 1, 2]


def test_shared_views_keep_the_first_depths_keys(seed):
    attention, store = Attention(0, 32, 4, 2, 8), PackedKV("shared", Rotary(8, 100, 1e4))
    tokens = tokens_of(6)
    x = torch.randn(6, 32)
    first = store.view(0, 0, tokens)
    out = attention(x, first)
    index, cu_seqlens = torch.tensor([[2, 5], [0, 2]], dtype=torch.int32)
    deeper = store.view(0, 1, tokens.select(index, [2], cu_seqlens, torch.ones(2)))
    assert deeper.new_rows == 0 and first.new_rows is None
    torch.testing.assert_close(attention(x[[2, 5]], deeper), out[[2, 5]])
