"""FLOPs: against torch's counter on real models of every variant, and by hand."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mor_ext
from mor_ext.analysis.flops import aimed_shares, executed_flops, expected_flops
from mor_ext.models import MoRConfig, MoRForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = [9, 0, 1, 16, 4]
KV_STRATEGY = ["recursion_wise", "shared", "hybrid", "frozen"]
ROUTED = {  # what each routing needs beside SIZES
    "none": {},
    "expert_choice": {},
    "token_choice": {},
    "random": {"capacity": 0.6},
    "fixed_depth": {"fixed_depth": 2},
    "action": {"sharing": "sequence", "num_hidden_layers": 6, "num_recursions": 2},
    "mixture_of_depths": {"num_recursions": 1, "capacity": 0.5},
}
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_recursions": 3,
    "initializer_range": 0.3,  # large enough that tokens differ in depth
    "max_position_embeddings": 64,
}


def config_of(routing: str, **fields) -> MoRConfig:
    return MoRConfig(routing=routing, **{**SIZES, **ROUTED[routing], **fields})


def measured(run) -> Counter:
    """FLOPs by op; those of ``mor::attention`` from the keys that its arguments let be seen."""

    def attention(query, key, value, cu_q, cu_k, key_limit, *args, out_val, **kwargs) -> int:
        if key_limit is None:
            pairs = sum(n * (n + 1) // 2 for n in cu_q.diff().tolist())
        else:
            pairs = key_limit.sum().item()
        return 4 * query.shape[1] * query.shape[2] * pairs

    def backward(grad_out, grad_lse, query, key, value, out, lse, *args, **kwargs) -> int:
        return 2 * attention(query, key, value, *args, **kwargs)

    attention._get_raw = backward._get_raw = True
    ops = torch.ops.mor
    formulas = {ops.attention: attention, ops.attention_bwd: backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return Counter({str(op): n for op, n in counter.get_flop_counts()["Global"].items()})


def products(counted: Counter) -> int:
    return sum(n for op, n in counted.items() if not op.startswith("mor."))


@pytest.mark.parametrize("kv_strategy", KV_STRATEGY)
@pytest.mark.parametrize("routing", ROUTED)
def test_executed_flops_are_those_of_the_profiler(routing, kv_strategy, seed):
    config = config_of(routing, kv_strategy=kv_strategy)
    model = MoRForCausalLM(config).eval()
    outputs = []
    ids = torch.randint(50, (sum(LENGTHS),))
    counted = measured(lambda: outputs.append(model(ids, lengths=LENGTHS)))
    flops = executed_flops(config, outputs[0].stage_depth, LENGTHS)
    assert flops.total.shape == ids.shape
    assert flops.attention.sum() == counted["mor.attention"]
    assert (flops.total - flops.attention).sum() == products(counted)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("routing", "fields"),
    [
        (routing, {"router_kind": kind})
        for routing in ("expert_choice", "token_choice", "mixture_of_depths")
        for kind in ("mlp", "wide_mlp")
    ]
    + [
        ("expert_choice", {"router_kind": kind, "causal_rule": "aux_router"})
        for kind in ("linear", "mlp")
    ],
)
def test_routers_count_by_their_kind(routing, fields, causal, seed):
    config = config_of(routing, **fields)
    model = MoRForCausalLM(config).eval()
    outputs = []
    ids = torch.randint(50, (2, 12))
    counted = measured(lambda: outputs.append(model(ids, causal=causal)))
    flops = executed_flops(config, outputs[0].stage_depth)
    assert flops.total.shape == ids.shape
    assert (flops.total - flops.attention).sum() == products(counted)


@pytest.mark.parametrize("sharing", ["cycle", "sequence", "middle_cycle", "middle_sequence"])
def test_the_formula_of_expert_choice_is_what_a_training_pass_executes(sharing, seed):
    layers = 8 if sharing.startswith("middle") else 6
    config = config_of("expert_choice", sharing=sharing, num_hidden_layers=layers)
    model = MoRForCausalLM(config).train()
    ids = torch.randint(50, (2, 16))
    counted = measured(lambda: model(ids))
    flops = expected_flops(config, 16)
    assert flops.attention.item() * ids.numel() == pytest.approx(counted["mor.attention"])
    rest = (flops.total - flops.attention).item() * ids.numel()
    assert rest == pytest.approx(products(counted))


@pytest.mark.parametrize(
    ("routing", "kv_strategy"),
    [("token_choice", "recursion_wise"), ("none", "recursion_wise")]
    + [("expert_choice", kv_strategy) for kv_strategy in KV_STRATEGY],
)
def test_training_counts_three_times_the_forward_pass(routing, kv_strategy, seed):
    config = config_of(routing, kv_strategy=kv_strategy)
    model = MoRForCausalLM(config).train()
    ids = torch.randint(50, (2, 12))
    outputs = []

    def step():
        outputs.append(model(ids, labels=ids))
        outputs[0].loss.backward()

    counted = measured(step)
    flops = executed_flops(config, outputs[0].stage_depth).training()
    assert flops.total.sum() == sum(counted.values())


@pytest.mark.parametrize("kv_strategy", KV_STRATEGY)
def test_the_formula_is_the_mean_over_tokens_that_lie_evenly(kv_strategy, seed):
    config = config_of("expert_choice", kv_strategy=kv_strategy, capacity=(0.75, 0.5, 0.25))
    length, batch = 32, 400
    order = torch.rand(batch, length).argsort(dim=1).argsort(dim=1)  # a permutation each
    depth = sum((order < length * share).int() for share in aimed_shares(config, length))
    edge = torch.ones_like(depth)
    executed = executed_flops(config, torch.stack([edge, depth, edge], dim=-1)).mean()
    for name, part in expected_flops(config, length).parts().items():
        tolerance = 0.03 if name == "attention" else 1e-12  # which is by chance
        assert part.item() == pytest.approx(executed.parts()[name].item(), rel=tolerance), name


def by_hand(stage_depth: list[list[int]], **fields) -> dict[str, list[int]]:
    """Of one sequence, and layers of 8 wide: one head, ffn 16, 10 tokens."""
    sizes = {
        "vocab_size": 10,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "sharing": "cycle",
    }
    flops = executed_flops(MoRConfig(**sizes, **fields), torch.tensor([stage_depth]))
    return {name: part[0].tolist() for name, part in flops.parts().items()}


def test_a_vanilla_layer_by_hand():
    assert by_hand([[1], [1], [1]], num_hidden_layers=1) == {
        "head": [160] * 3,  # 2 * 8 * 10
        "projections": [512] * 3,  # 2 * 8 * 8 each for query, key, value and output
        "attention": [32, 64, 96],  # 4 * 8 a visible key
        "mlp": [768] * 3,  # 2 * 8 * 16 each for gate, up and down
        "router": [0] * 3,
    }


@pytest.mark.parametrize(
    ("kv_strategy", "projections", "attention"),
    [  # 256 for query and output, 256 for key and value; 32 a visible key
        ("recursion_wise", [512, 1024, 0, 1024], [32, 96, 0, 160]),  # 1, 2 + 1, 0, 3 + 2 keys
        ("shared", [512, 768, 0, 768], [32, 128, 0, 192]),  # 1, 2 + 2, 0, 3 + 3
        ("hybrid", [512, 1024, 0, 1024], [32, 128, 0, 192]),
        ("frozen", [768, 1024, 256, 1024], [32, 128, 0, 256]),  # 1, 2 + 2, 0, 4 + 4
    ],
)
def test_the_kv_strategies_by_hand(kv_strategy, projections, attention):
    """Tokens of depth 1, 2, 0 and 2 in two recursions of a layer, with a linear router each."""
    fields = {"num_hidden_layers": 2, "num_recursions": 2, "routing": "expert_choice"}
    assert by_hand([[1], [2], [0], [2]], kv_strategy=kv_strategy, **fields) == {
        "head": [160] * 4,
        "projections": projections,
        "attention": attention,
        "mlp": [768, 1536, 0, 1536],
        "router": [32] * 4,  # 2 * 8 at each depth, on every row
    }


def test_a_depth_that_nobody_reaches_costs_its_router_alone():
    """Not even the K/V of the tokens that have left, for nobody sees them."""
    fields = {"num_hidden_layers": 2, "num_recursions": 2, "routing": "expert_choice"}
    flops = by_hand([[1], [1]], kv_strategy="frozen", **fields)
    assert flops["projections"] == [512, 512]
    assert flops["router"] == [32, 32]


def test_shares_that_routings_aim_at():
    assert aimed_shares(config_of("none"), 10) == [1, 1, 1]
    assert aimed_shares(config_of("expert_choice"), 10) == [1, 0.6, 0.3]  # 6 and 3 whole tokens
    rising = config_of("expert_choice", capacity=(0.5, 0.8, 0.2))
    assert aimed_shares(rising, 10) == [0.5, 0.5, 0.2]  # of those of the depth before
    assert aimed_shares(config_of("token_choice"), 10) == [1, 2 / 3, 1 / 3]
    assert aimed_shares(config_of("action"), 10) == [2 / 3, 1 / 3]
    assert aimed_shares(config_of("fixed_depth"), 10) == [1, 1, 0]
    assert aimed_shares(config_of("mixture_of_depths"), 11) == [5 / 11]
    assert aimed_shares(config_of("random"), 1) == [1, 1, 1]  # one token at least


def test_fewer_active_tokens_cost_less():
    config = config_of("expert_choice")
    totals = [
        expected_flops(config, 64, shares).total.item()
        for shares in ([1, 1, 1], [1, 0.5, 0.25], [1, 0, 0], [0, 0, 0])
    ]
    assert totals == sorted(totals, reverse=True)
    vanilla = expected_flops(config_of("none"), 64)
    everyone = expected_flops(config, 64, [1, 1, 1])
    assert everyone.total - everyone.router == vanilla.total


def test_the_next_routers_must_be_counted_too(monkeypatch):
    class Unknown(mor_ext.nn.Router):
        def __init__(self, *args, **fields):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

    monkeypatch.setattr("mor_ext.models.layout.TokenChoiceRouter", Unknown)
    with pytest.raises(ValueError, match="router must be one whose products are counted, got Unkn"):
        expected_flops(config_of("token_choice"), 8)


@pytest.mark.parametrize(
    ("length", "shares", "message"),
    [
        (0, None, "length must be at least 1, got 0"),
        (8, [1.0, 0.5], r"shares must be 3 numbers from 1 down to 0, got \[1.0, 0.5\]"),
        (8, [1.0, 0.5, 0.6], "shares must be 3 numbers from 1 down to 0"),
        (8, [1.1, 0.5, 0.2], "shares must be 3 numbers from 1 down to 0"),
        (8, [1.0, 0.5, -0.2], "shares must be 3 numbers from 1 down to 0"),
    ],
)
def test_errors_of_the_formula(length, shares, message):
    with pytest.raises(ValueError, match=message):
        expected_flops(config_of("expert_choice"), length, shares)


@pytest.mark.parametrize(
    ("shape", "lengths"), [((2, 5, 2), None), ((5, 3), None), ((5, 3), [4]), ((3,), None)]
)
def test_errors_of_shapes(shape, lengths):
    with pytest.raises(ValueError, match=r"stage_depth must be \[batch, length, 3\].* got \["):
        executed_flops(config_of("expert_choice"), torch.ones(shape, dtype=torch.int32), lengths)
