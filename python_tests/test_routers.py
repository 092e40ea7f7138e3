"""Every router in a recursion of two passes, computed by hand to the digit; and how they learn."""

import math

import pytest
import torch
from torch import Tensor, nn

from mor_ext.nn import (
    ActionRouter,
    ExpertChoiceRouter,
    FixedDepthRouter,
    PackedKV,
    RandomRouter,
    Recursion,
    Rotary,
    Router,
    TokenChoiceRouter,
    Tokens,
)
from mor_ext.nn.recursion import Passed
from mor_ext.nn.routers.controls import hashed

CPU = torch.device("cpu")


class Affine(nn.Module):
    """A block of hand: f(H) = 2 H + 1."""

    layers = (None,)

    def forward(self, hidden: Tensor, view: object, index: Tensor | None) -> Tensor:
        return 2 * (hidden if index is None else hidden[index]) + 1


def passed(
    router: Router, rows: list[list[float]], causal: bool = False, recursions: int = 2
) -> Passed:
    """One sequence of these rows through f, as deep as the router says."""
    store = PackedKV("recursion_wise", Rotary(8, 16, 1e4))
    hidden = torch.tensor(rows, dtype=torch.float64)
    tokens = store.enter([len(rows)], CPU)
    return Recursion(recursions, Affine(), router.double())(hidden, tokens, store, 0, causal)


def expert_choice(*capacity: float, **settings) -> ExpertChoiceRouter:
    """Depth r reads its logits off column r of the hidden state, its predictor off the column
    after those."""
    router = ExpertChoiceRouter(4, capacity, **settings)
    for depth, scorer in enumerate(router.scorers):
        scorer.weight.data = torch.eye(4)[[depth]]
    for depth, scorer in enumerate(router.predictors or []):
        scorer.weight.data = torch.eye(4)[[2 + depth]]
    return router


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(logits: list[float], chosen: list[int]) -> float:
    terms = [math.log1p(math.exp(-x if row in chosen else x)) for row, x in enumerate(logits)]
    return sum(terms) / len(terms)


def assert_rows(actual: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


ROWS = [[2.0, 0.0, 1.0, 1.0], [-1.0, 9.0, 1.0, 1.0], [1.0, -2.0, -1.0, 1.0], [3.0, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("update", ["output", "delta"])
def test_expert_choice_by_hand(update):
    """Depth 1 takes rows 0, 2, 3 of logits 2, -1, 1, 3; depth 2 the best of what those became."""
    router = expert_choice(0.75, 0.25, alpha=0.1, loss_coef=0.5, update=update)
    result = passed(router, ROWS)

    def step(row: list[float], logit: float) -> list[float]:
        gate = 0.1 * sigmoid(logit)
        kept = 1 if update == "output" else 1 - gate
        return [kept * h + gate * (2 * h + 1) for h in row]

    first = [step(row, row[0]) if i != 1 else row for i, row in enumerate(ROWS)]
    logits = [first[row][1] for row in (0, 2, 3)]
    assert max(logits) == logits[2]  # row 1 has a higher one but is out
    second = [*first[:3], step(first[3], first[3][1])]
    assert_rows(result.hidden, second)
    assert result.depth.tolist() == [1, 0, 1, 2]
    loss = 0.5 * (cross_entropy([2, -1, 1, 3], [0, 2, 3]) + cross_entropy(logits, [2]))
    assert result.loss.item() == pytest.approx(loss)


def test_expert_choice_by_the_causal_rule():
    router = expert_choice(0.9, 0.5, alpha=1.0, activation="identity", update="delta")
    result = passed(router, [[0.0, 0.0, 0, 0], [-0.1, 9.0, 0, 0], [3.0, -1.0, 0, 0]], causal=True)
    # Logit 0 is a probability of 0.5: goes on. Gates 0, -, 3; then 0, -, -1 + 3 (-2 + 1 + 1) = -1.
    assert result.depth.tolist() == [2, 0, 1]
    assert_rows(result.hidden, [[0, 0, 0, 0], [-0.1, 9, 0, 0], [15, -1, 3, 3]])
    assert result.loss == 0


@pytest.mark.parametrize("causal", [True, False])
def test_a_depth_that_keeps_everybody_has_no_threshold(causal):
    router = expert_choice(1.0, 1.0, 0.5, alpha=1.0, activation="identity", update="delta")
    rows = [[-1.0, -1.0, 1.0, 0], [2.0, 2.0, -1.0, 0], [-3.0, 0.0, 0.0, 0], [1.0, 1.0, -2.0, 0]]
    depth = passed(router, rows, causal, recursions=2).depth
    assert depth.tolist() == [2, 2, 2, 2]
    kept = passed(router, rows, causal, recursions=3).depth
    assert kept.sum() < 12  # the third depth chooses


def test_a_predictor_decides_in_the_gates_place_and_leaves_the_hidden_state_alone():
    router = expert_choice(0.5, 0.25, causal_rule="aux_router", loss_coef=1.0, z_loss_coef=0.1)
    # Columns 2 and 3 say who goes on: rows 0, 1, 3 twice, whatever their own logits.
    assert passed(router, ROWS, causal=True).depth.tolist() == [2, 2, 0, 2]
    store, hidden = PackedKV("recursion_wise", Rotary(8, 16, 1e4)), torch.tensor(ROWS)
    hidden = hidden.double().requires_grad_()
    tokens = store.enter([4], CPU)
    active, loss = router.select(0, hidden, tokens, router.begin(hidden, tokens, False))
    assert active.index.tolist() == [0, 3]
    z = 0.1 * (2**2 + 1 + 1 + 3**2) / 4
    assert loss.item() == pytest.approx(z + cross_entropy([1, 1, -1, 1], [0, 3]))
    loss.backward()
    assert hidden.grad[:, 1:].abs().max() == 0  # the z-loss alone reaches it
    assert router.predictors[0].weight.grad.abs().max() > 0


def test_mixture_of_depths_by_hand():
    """The best eighth of 8 tokens; x + r * (f(x) - x) with r the logit itself."""
    router = expert_choice(0.125, alpha=1.0, activation="identity", update="delta")
    rows = [[float(i), 1.0, 0.0, 0.0] for i in (0, 3, 1, 5, 2, -4, 4, -9)]
    result = passed(router, rows, recursions=1)
    expected = [list(row) for row in rows]
    expected[3] = [5 + 5 * 6, 1 + 5 * 2, 5, 5]
    assert_rows(result.hidden, expected)
    assert result.depth.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("gate_at", ["each", "last"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_token_choice_by_hand(activation, gate_at):
    """Depths 1 and 2; equation 2: gated at every step or the last, the entry added at the end."""
    router = TokenChoiceRouter(
        2, 2, activation=activation, alpha=0.5, loss_coef=0.1, gate_at=gate_at, z_loss_coef=0.01
    )
    router.scorer.weight.data = torch.eye(2)
    rows = [[3.0, 1.0], [-1.0, 0.0], [0.0, 0.0]]
    result = passed(router, rows)

    def gates(row: list[float]) -> list[float]:
        if activation == "sigmoid":
            return [0.5 * sigmoid(x) for x in row]
        total = sum(math.exp(x) for x in row)
        return [0.5 * math.exp(x) / total for x in row]

    g = [gates(row) for row in rows]
    expected = [[g[i][0] * (2 * h + 1) + h for h in rows[i]] for i in range(3)]  # depth 1; ties too
    first = [(g[1][0] if gate_at == "each" else 1) * (2 * h + 1) for h in rows[1]]
    expected[1] = [g[1][1] * (2 * f + 1) + h for f, h in zip(first, rows[1], strict=True)]
    assert_rows(result.hidden, expected)
    assert result.depth.tolist() == [1, 2, 1]

    share = [2 * 2 / 3, 2 * 1 / 3]
    mean = [sum(x[r] / sum(x) for x in g) / 3 for r in range(2)]
    z = sum(math.log(math.exp(a) + math.exp(b)) ** 2 for a, b in rows) / 3
    balance = sum(f * p for f, p in zip(share, mean, strict=True))
    assert result.loss.item() == pytest.approx(0.1 * balance + 0.01 * z)


def test_loss_free_balancing_by_hand():
    """The bias moves the choice but no gate, and goes towards the depths with too few tokens."""
    router = TokenChoiceRouter(2, 2, balancing="bias", bias_update_rate=0.25).train()
    router.scorer.weight.data = torch.eye(2)
    rows = [[1.0, 0.9], [1.0, 0.4], [1.0, 0.0]]
    result = passed(router, rows)
    assert result.depth.tolist() == [1, 1, 1]
    assert result.loss == 0
    router.after_step()
    assert router.bias.tolist() == [-0.25, 0.25]
    assert router.load.tolist() == [0, 0]
    result = passed(router, rows)  # 0.75 against 1.15, 0.65, 0.25
    assert result.depth.tolist() == [2, 1, 1]
    gate = [math.exp(x) / (math.exp(1.0) + math.exp(0.9)) for x in (1.0, 0.9)]
    first = [gate[0] * (2 * h + 1) for h in rows[0]]
    expected = [gate[1] * (2 * f + 1) + h for f, h in zip(first, rows[0], strict=True)]
    assert_rows(result.hidden[:1], [expected])
    passed(router.eval(), rows)
    router.train().after_step()  # loads 2, 1 of training alone, mean 1.5
    assert router.bias.tolist() == [-0.5, 0.5]


def test_the_skip_forward_recurse_router_by_hand():
    """Logits are the first three of four columns: skip, forward, recurse."""
    router = ActionRouter(4, 2, loss_coef=0.1)
    router.up.weight.data = torch.eye(128, 4)
    router.up.bias.data.zero_()
    router.down.weight.data = torch.eye(3, 128)
    router.down.bias.data = torch.tensor([0.5, 0.0, 0.0])
    rows = [[1.0, 0.0, 0.0, 7.0], [0.0, 0.4, 0.0, 7.0], [0.0, 2.0, 1.0, 7.0], [1.0, 1.0, 9.0, 7.0]]
    result = passed(router, rows, causal=True)
    assert result.depth.tolist() == [0, 0, 1, 2]  # 0.5 against 0.4: skip
    assert_rows(result.hidden, [*rows[:2], [1, 5, 3, 15], [7, 7, 39, 31]])
    assert result.loss.item() == pytest.approx(0.1 * (0 + 0 + 1 + 2) / 4)


def test_the_skip_forward_recurse_router_draws_its_actions(seed):
    """As often as the softmax says, with the gradient of the soft sample."""
    router = ActionRouter(2, 2, loss_coef=1.0)
    router.down.weight.data.zero_()
    probability = torch.tensor([0.2, 0.5, 0.3])
    router.down.bias.data = probability.log()
    rows = [[0.0, 0.0]] * 20_000
    result = passed(router, rows)
    share = torch.bincount(result.depth, minlength=3) / 20_000
    torch.testing.assert_close(share, probability, atol=0.02, rtol=0)
    assert result.loss.item() == pytest.approx(result.depth.double().mean().item())
    result.loss.backward()
    grad = router.down.bias.grad
    assert grad[0] < 0 < grad[2] and abs(grad.sum()) < 1e-6  # deeper costs


@pytest.mark.parametrize("causal", [True, False])
def test_random_routing_by_hand(causal, seed):
    rows = torch.randn(12, 2).tolist()
    router = RandomRouter((0.75, 0.25), alpha=0.5, update="delta")
    state = torch.get_rng_state()
    result = passed(router, rows, causal)
    torch.set_rng_state(state)
    u = hashed(torch.arange(12)) if causal else torch.rand(12)
    if causal:
        depth = (u < 0.75).int() + (u < 0.25).int()
    else:
        rank = u.argsort().argsort()
        depth = (rank < 9).int() + (rank < 3).int()
    assert torch.equal(result.depth, depth.int())
    # H + (2 H + 1 - H) / 2 = 1.5 H + 0.5, then 2.25 H + 1.25
    expected = [
        [[h, 1.5 * h + 0.5, 2.25 * h + 1.25][d] for h in row]
        for d, row in zip(depth.tolist(), rows, strict=True)
    ]
    assert_rows(result.hidden, expected)


def test_hashed_positions_are_spread_evenly():
    u = hashed(torch.arange(100_000, dtype=torch.int32))
    assert u.min() >= 0 and u.max() < 1
    assert (torch.histc(u, 20, 0, 1) / 5000 - 1).abs().max() < 0.05
    pairs = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(pairs) < 0.02


def test_the_fixed_depth_router_stops_there():
    result = passed(FixedDepthRouter(1), [[1.0, 2.0]])
    assert_rows(result.hidden, [[3, 5]])
    assert result.depth.tolist() == [1]


def test_the_router_of_models_that_do_not_route():
    assert_rows(passed(Router("delta"), [[1.0, 2.0]]).hidden, [[7, 11]])
    assert_rows(passed(Router("output"), [[1.0, 2.0]]).hidden, [[13, 22]])


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
    tokens = Tokens.of_batch(lengths, CPU)
    hidden = torch.randn(tokens.total, 4)
    plan, active = router.begin(hidden, tokens, causal=False), tokens
    for depth in range(3):
        previous = active
        active, _ = router.select(depth, hidden, active, plan)
        assert list(active.lengths) == kept[depth]
        assert active.cu_seqlens.diff().tolist() == kept[depth]
        assert torch.equal(active.positions, tokens.positions[active.index])
        if previous.index is not None:  # only survivors compete
            assert set(active.index.tolist()) <= set(previous.index.tolist())


def test_a_depth_that_nobody_takes():
    router = TokenChoiceRouter(2, 2)
    router.scorer.weight.data = torch.eye(2)
    for training in (True, False):
        result = passed(router.train(training), [[3.0, 1.0], [2.0, 0.0]])
        assert result.depth.tolist() == [1, 1]
        assert result.loss.isfinite()
