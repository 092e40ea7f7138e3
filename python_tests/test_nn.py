"""The modules that models are made of, one at a time, against hand computation."""

import math

import pytest
import torch
import torch.nn.functional as F

from mor_ext.nn import (
    Attention,
    ExpertChoiceRouter,
    PackedKV,
    RMSNorm,
    Rotary,
    Router,
    SwiGLU,
    TokenChoiceRouter,
    Tokens,
)
from mor_ext.nn.kv import shared_key_limit

CPU = torch.device("cpu")


def tokens_of(*lengths: int) -> Tokens:
    return Tokens.of_batch(lengths, CPU)


def expert_choice(*capacity: float, coef: float = 1.0) -> ExpertChoiceRouter:
    """A router that reads its logits off the hidden state: depth r takes column r."""
    router = ExpertChoiceRouter(len(capacity), capacity, alpha=0.1, coef=coef, update="output")
    router.weight.data = torch.eye(len(capacity))
    return router


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


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ([9], [[9], [6], [3]]),
        ([10], [[10], [6], [3]]),  # int(6.67), int(3.33)
        ([1, 2, 0], [[1, 2, 0], [1, 1, 0], [1, 1, 0]]),  # at least one, if there is one
    ],
)
def test_expert_choice_keeps_its_share_of_the_full_sequence(lengths, kept, seed):
    router = expert_choice(1.0, 2 / 3, 1 / 3)
    tokens = tokens_of(*lengths)
    hidden = torch.randn(tokens.total, 3)
    plan, active = router.begin(hidden, tokens, causal=False), tokens
    for depth in range(3):
        previous = active
        active, _ = router.select(depth, hidden, active, plan)
        assert list(active.lengths) == kept[depth]
        assert active.cu_seqlens.diff().tolist() == kept[depth]
        if previous.index is not None:  # only survivors compete
            assert set(active.index.tolist()) <= set(previous.index.tolist())


def test_expert_choice_by_hand():
    """Depth 1 takes rows 0, 2, 3 of logits 2, -1, 1, 3; depth 2 takes row 3 among those."""
    router = expert_choice(0.75, 0.25, coef=0.5)
    hidden = torch.tensor([[2.0, 0.0], [-1.0, 9.0], [1.0, -2.0], [3.0, 1.0]])
    tokens = tokens_of(4)
    plan = router.begin(hidden, tokens, causal=False)
    first, loss = router.select(0, hidden, tokens, plan)
    assert first.index.tolist() == [0, 2, 3]
    assert first.positions.tolist() == [0, 2, 3]
    sigmoid = [1 / (1 + math.exp(-x)) for x in (2, -1, 1, 3)]
    torch.testing.assert_close(first.gate, torch.tensor([0.1 * sigmoid[i] for i in (0, 2, 3)]))
    cross_entropy = [-math.log(sigmoid[i] if i != 1 else 1 - sigmoid[1]) for i in range(4)]
    assert loss.item() == pytest.approx(0.5 * sum(cross_entropy) / 4)

    second, loss = router.select(1, hidden, first, plan)
    assert second.index.tolist() == [3]  # row 1 has the highest logit but is out
    cross_entropy = [math.log1p(math.exp(x)) for x in (0, -2, -1)]  # rows 0, 2 out, row 3 in
    assert loss.item() == pytest.approx(0.5 * sum(cross_entropy) / 3)

    update = torch.full((1, 2), 10.0)
    merged = router.merge(1, hidden, update, second, plan)
    gate = 0.1 / (1 + math.exp(-1))
    torch.testing.assert_close(merged[3], hidden[3] + 10 * gate)
    assert torch.equal(merged[:3], hidden[:3])


def test_expert_choice_by_the_causal_rule():
    router = expert_choice(1.0, 0.5)
    hidden = torch.tensor([[2.0, 0.0], [-1.0, 9.0], [0.0, -2.0], [3.0, 1.0]])
    tokens = tokens_of(2, 2)
    first, loss = router.select(0, hidden, tokens, router.begin(hidden, tokens, causal=True))
    assert first.index.tolist() == [0, 2, 3]  # sigmoid(0) is 0.5: goes on
    assert first.lengths == (1, 2)
    assert loss is None
    second, _ = router.select(1, hidden, first, None)
    assert second.index.tolist() == [0, 3]
    assert second.lengths == (1, 1)


def test_token_choice_by_hand():
    """Depths 1, 3, 2, 3; equation 2: gated at every step, the entry added at the last."""
    router = TokenChoiceRouter(3, 3, alpha=1.0, coef=0.1)
    router.weight.data = torch.eye(3)
    hidden = torch.tensor([[5.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [1.0, 0.0, 4.0]])
    tokens = tokens_of(3, 1)
    plan = router.begin(hidden, tokens, causal=False)
    g = torch.softmax(hidden, dim=1)
    active, losses = tokens, []
    state = hidden
    for depth, rows in enumerate([[0, 1, 2, 3], [1, 2, 3], [1, 3]]):
        active, loss = router.select(depth, state, active, plan)
        losses.append(loss)
        assert active.index.tolist() == rows
        torch.testing.assert_close(active.gate, g[rows, depth])
        output = torch.randn(len(rows), 3)
        merged = router.merge(depth, state, output, active, plan)
        last = torch.tensor([[1, 3, 2, 3][row] == depth + 1 for row in rows]).unsqueeze(1)
        expected = state.clone()
        expected[rows] = g[rows, depth].unsqueeze(1) * output + last * hidden[rows]
        torch.testing.assert_close(merged, expected)
        state = merged
    share = torch.tensor([1.0, 1.0, 2.0]) / 4
    torch.testing.assert_close(losses[0], 0.1 * (3 * share * g.mean(dim=0)).sum())
    assert losses[1:] == [None, None]


def test_a_depth_that_nobody_takes():
    router = TokenChoiceRouter(2, 2, alpha=1.0, coef=0.1)
    router.weight.data = torch.eye(2)
    hidden = torch.tensor([[3.0, 1.0], [2.0, 0.0]])
    tokens = tokens_of(2)
    plan = router.begin(hidden, tokens, causal=True)
    active, _ = router.select(1, hidden, tokens, plan)
    assert active.total == 0
    assert torch.equal(router.merge(1, hidden, hidden[:0], active, plan), hidden)


def test_the_router_of_models_that_do_not_route():
    tokens, hidden, output = tokens_of(2), torch.randn(2, 4), torch.randn(2, 4)
    router = Router("delta")
    assert router.select(0, hidden, tokens, router.begin(hidden, tokens, True)) == (tokens, None)
    assert router.merge(0, hidden, output, tokens, None) is output
    assert torch.equal(Router("output").merge(0, hidden, output, tokens, None), hidden + output)


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
        out = attention(x, PackedKV(False, rotary).view(0, 0, tokens))
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
    attention, store = Attention(0, 32, 4, 2, 8), PackedKV(True, Rotary(8, 100, 1e4))
    tokens = tokens_of(6)
    x = torch.randn(6, 32)
    first = store.view(0, 0, tokens)
    out = attention(x, first)
    index, cu_seqlens = torch.tensor([[2, 5], [0, 2]], dtype=torch.int32)
    deeper = store.view(0, 1, tokens.select(index, [2], cu_seqlens, torch.ones(2)))
    assert deeper.queries_only and not first.queries_only
    torch.testing.assert_close(attention(x[[2, 5]], deeper), out[[2, 5]])
