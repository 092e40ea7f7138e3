"""Models: every layout against an unrolled reference, and the invariants that users rely on."""

import copy

import pytest
import torch
from model_reference import reference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mor_ext.inference import PagedKV, generate
from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.models.config import CHOICES

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = {"cycle": 6, "sequence": 6, "middle_cycle": 8, "middle_sequence": 8}
VARIANTS = [(r, kv) for r in CHOICES["routing"] for kv in CHOICES["kv_strategy"]]
SETTINGS = [  # what routers can be told besides their defaults
    (
        "expert_choice",
        {
            "router_kind": "mlp",
            "router_activation": "tanh",
            "router_alpha": 0.7,
            "initializer_range": 0.1,  # beyond some 19, tanh has no gradient at all
        },
    ),
    ("expert_choice", {"router_kind": "wide_mlp", "causal_rule": "aux_router"}),
    ("expert_choice", {"router_update": "delta", "capacity": (0.9, 0.4, 0.2)}),
    ("token_choice", {"router_activation": "sigmoid", "gate_at": "last"}),
    ("token_choice", {"router_kind": "mlp", "balancing": "bias", "router_alpha": 2.0}),
    ("mixture_of_depths", {"router_activation": "sigmoid", "capacity": 0.5}),
    ("action", {"gumbel_temperature": 0.5}),
    ("random", {"capacity": 0.5, "router_update": "delta"}),
]
RANDOM_IN_TRAINING = ("action", "random")
LENGTHS = [9, 0, 1, 16, 4]


def small(
    routing: str, kv_strategy: str, sharing: str = "middle_cycle", **fields
) -> MoRForCausalLM:
    special = {"mixture_of_depths": {"num_recursions": 1}, "fixed_depth": {"fixed_depth": 2}}
    config = MoRConfig(
        **{
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": LAYERS[sharing],
            "initializer_range": 0.3,  # large enough that tokens differ in depth
            "max_position_embeddings": 64,
            "num_recursions": 3,
            "sharing": sharing,
            "routing": routing,
            "kv_strategy": kv_strategy,
            **special.get(routing, {}),
            **fields,
        }
    )
    return MoRForCausalLM(config).double().eval()


def words(*lengths: int) -> Tensor:
    """Sequences without a token twice: two equal ones at the start would tie in every router."""
    return torch.cat([torch.randperm(50)[:length] for length in lengths])


def assert_equals_the_reference(model: MoRForCausalLM, causal: bool) -> None:
    ids = words(*LENGTHS)
    if not causal and model.config.routing in RANDOM_IN_TRAINING:  # the same draws
        ids, lengths = ids[: LENGTHS[0]], LENGTHS[:1]
    else:
        lengths = LENGTHS
    state = torch.get_rng_state()
    output = model(ids, lengths=lengths, causal=causal)
    torch.set_rng_state(state)
    expected = [reference(model, part, causal) for part in ids.split(lengths)]
    torch.testing.assert_close(output.logits, torch.cat([logits for logits, _ in expected]))
    assert torch.equal(output.depth, torch.cat([depth for _, depth in expected]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sharing", LAYERS)
@pytest.mark.parametrize(("routing", "kv_strategy"), VARIANTS)
def test_every_layout_equals_the_unrolled_reference(routing, kv_strategy, sharing, causal, seed):
    assert_equals_the_reference(small(routing, kv_strategy, sharing), causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("routing", "fields"), SETTINGS)
def test_every_setting_equals_the_unrolled_reference(routing, fields, causal, seed):
    model = small(routing, "recursion_wise", **fields)
    if fields.get("balancing") == "bias":
        model.stages[1].router.bias.copy_(torch.randn(3))
    assert_equals_the_reference(model, causal)


@pytest.mark.parametrize(
    ("routing", "kv_strategy", "fields"),
    [(*v, {}) for v in VARIANTS] + [(r, "shared", fields) for r, fields in SETTINGS],
)
def test_gradients_equal_the_reference(routing, kv_strategy, fields, seed):
    model = small(routing, kv_strategy, **fields).train()
    ids = words(12)
    weight = torch.randn(12, 50).double()
    grads = []
    for run in (lambda: model(ids, lengths=[12]).logits, lambda: reference(model, ids, False)[0]):
        torch.manual_seed(seed)
        model.zero_grad()
        (run() * weight).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[1].items():
        actual = grads[0][name]
        if "predictors" in name:  # learn from their loss alone
            assert actual is None and expected is None
            continue
        # A token that a stochastic router sends past every block leaves nothing to learn from.
        assert expected.abs().max() > 0 or routing == "action", name
        torch.testing.assert_close(actual, expected, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("update", ["output", "delta"])
@pytest.mark.parametrize("kv_strategy", CHOICES["kv_strategy"])
def test_capacity_1_and_gate_1_is_the_recursive_model(kv_strategy, update, seed):
    fields = {"router_update": update, "capacity": (1.0, 1.0, 1.0), "router_alpha": 2.0}
    mor = small("expert_choice", kv_strategy, **fields).train()
    for scorer in mor.stages[1].router.scorers:
        scorer.weight.data.zero_()  # gate 2 * sigmoid(0)
    recursive = small("none", kv_strategy, router_update=update)
    recursive.load_state_dict(mor.state_dict(), strict=False)
    ids = torch.randint(50, (3, 10))
    torch.testing.assert_close(mor(ids).logits, recursive(ids).logits)
    assert (mor(ids).depth == 3).all()


def test_fixed_depth_is_the_recursive_model_of_that_depth(seed):
    deep = small("fixed_depth", "recursion_wise")
    shallow = small("none", "recursion_wise", num_recursions=2, num_hidden_layers=6)
    shallow.load_state_dict(deep.state_dict())
    ids = torch.randint(50, (3, 10))
    torch.testing.assert_close(deep(ids).logits, shallow(ids).logits)
    assert (deep(ids).layers == 6).all()


@pytest.mark.parametrize(("routing", "kv_strategy"), VARIANTS)
def test_later_tokens_change_no_earlier_logit(routing, kv_strategy, seed):
    model = small(routing, kv_strategy)
    ids = torch.randint(50, (2, 20))
    changed = torch.cat([ids[:, :13], torch.randint(50, (2, 7))], dim=1)
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before.logits[:, :13], after.logits[:, :13])
    assert torch.equal(before.depth[:, :13], after.depth[:, :13])
    assert not torch.allclose(before.logits[:, 13:], after.logits[:, 13:])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("routing", "kv_strategy"), VARIANTS)
def test_a_packed_batch_equals_each_sequence_alone(routing, kv_strategy, training, seed):
    if training and routing in RANDOM_IN_TRAINING:
        training = False  # a batch draws other numbers than its sequences
    model = small(routing, kv_strategy).train(training)
    ids = words(*LENGTHS)
    together = model(ids, lengths=LENGTHS)
    alone = [model(part, lengths=[len(part)]) for part in ids.split(LENGTHS)]
    torch.testing.assert_close(together.logits, torch.cat([o.logits for o in alone]))
    assert torch.equal(together.depth, torch.cat([o.depth for o in alone]))


@pytest.mark.parametrize(
    ("routing", "kv_strategy", "sharing", "dtype"),
    [(*v, sharing, torch.float64) for v in VARIANTS for sharing in ("middle_cycle", "sequence")]
    + [
        (r, kv, "cycle", torch.float32) for r in ("none", "random") for kv in CHOICES["kv_strategy"]
    ],
)
def test_cached_steps_give_the_logits_of_one_pass(routing, kv_strategy, sharing, dtype, seed):
    """Prefill in uneven chunks, then token by token, of sequences of different lengths."""
    model = small(routing, kv_strategy, sharing).to(dtype)
    sequences = [torch.randint(50, (length,)) for length in (23, 20, 30)]
    store = PagedKV(model, 3, max_length=30)
    logits, depth = [[], [], []], [[], [], []]
    position = [0, 0, 0]
    with torch.no_grad():
        for chunks in [(7, 0, 3), (0, 5, 17)] + [(1, 1, 1)] * 10 + [(6, 5, 0)]:
            parts = [s[p : p + c] for s, p, c in zip(sequences, position, chunks, strict=True)]
            output = model(torch.cat(parts), lengths=chunks, cache=store)
            for b, chunk in enumerate(chunks):
                logits[b].append(output.logits.split(chunks)[b])
                depth[b].append(output.depth.split(chunks)[b])
                position[b] += chunk
    assert position == [23, 20, 30]
    for b, sequence in enumerate(sequences):
        full = model(sequence, lengths=[len(sequence)])
        tolerance = {} if dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(torch.cat(logits[b]), full.logits, **tolerance)
        assert torch.equal(torch.cat(depth[b]), full.depth)


@pytest.mark.parametrize(("routing", "kv_strategy"), VARIANTS)
def test_greedy_generation_takes_the_most_likely_token(routing, kv_strategy, seed):
    model = small(routing, kv_strategy)
    prompts = [torch.randint(50, (length,)) for length in (4, 9)]
    for prompt, result in zip(prompts, generate(model, prompts, 6, temperature=0), strict=True):
        full = model(result.tokens, lengths=[len(result.tokens)])
        assert torch.equal(result.tokens[: len(prompt)], prompt)
        assert torch.equal(
            result.tokens[len(prompt) :], full.logits.argmax(1)[len(prompt) - 1 : -1]
        )
        assert torch.equal(result.depth, full.depth)


def test_sampling_repeats_with_a_seed(seed):
    model = small("expert_choice", "recursion_wise")
    prompt = [torch.tensor([1, 2, 3])]
    first, second, other = (
        generate(model, prompt, 20, generator=torch.Generator().manual_seed(s))[0].tokens
        for s in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_generation_refuses_prompts_that_do_not_fit():
    model = small("none", "recursion_wise")
    for prompt in ([], [1] * 60):
        with pytest.raises(
            ValueError, match=rf"prompts must have 1 to 54 tokens, got {len(prompt)}"
        ):
            generate(model, [torch.tensor(prompt, dtype=torch.long)], 10)


@pytest.mark.parametrize("kv_strategy", ["recursion_wise", "shared"])
def test_skipped_tokens_cost_no_products(kv_strategy, seed):
    """FLOPs of all matrix products equal those of the rows that each depth works on."""
    model = small("expert_choice", kv_strategy).train()
    config, (batch, length) = model.config, (2, 16)
    with FlopCounterMode(display=False) as counter:
        model(torch.randint(50, (batch, length)))
    d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    row = 2 * (2 * d * d + 3 * d * config.intermediate_size)  # q, o, gate, up, down
    key_value = 2 * d * 2 * kv
    kept = [batch * int(c * length) for c in (1, 2 / 3, 1 / 3)]  # 32, 20, 10 rows
    block = config.shared_layers
    expected = 2 * (row + key_value) * batch * length + 2 * d * 50 * batch * length  # edges, head
    expected += block * row * sum(kept)
    expected += block * key_value * (kept[0] if kv_strategy == "shared" else sum(kept))
    routers = 3 * 2 * d * batch * length  # a matrix-vector product; not every torch counts it
    assert counter.get_total_flops() in (expected, expected + routers)


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_routers_learn(routing, seed):
    model = small(routing, "recursion_wise").train()
    ids = torch.randint(50, (2, 12))
    model(ids, labels=ids).nll.backward()
    for name, parameter in model.stages[1].router.named_parameters():
        assert parameter.grad.abs().sum(dim=-1).min() > 0, name  # each depth's row


@pytest.mark.parametrize("sharing", LAYERS)
def test_weights_stay_tied_through_training_saving_and_loading(sharing, tmp_path, seed):
    model = small("expert_choice", "recursion_wise", sharing).float().train()
    count = sum(parameter.numel() for parameter in model.parameters())
    layers = LAYERS[sharing] // 3 + (2 if sharing.startswith("middle") else 0)
    assert sum(name.endswith("qkv_proj.weight") for name in model.state_dict()) == layers
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(50, (2, 12))
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = MoRForCausalLM.from_pretrained(tmp_path)
    for m in (model, loaded):
        assert m.head_weight().data_ptr() == m.embed_tokens.weight.data_ptr()
        storages = {tensor.untyped_storage().data_ptr() for tensor in m.state_dict().values()}
        assert len(storages) == len(m.state_dict()) == len(list(m.parameters()))
        assert sum(parameter.numel() for parameter in m.parameters()) == count
    assert (tmp_path / "model.safetensors").stat().st_size < 4 * count + 30_000
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    # Where a weight lies in memory decides on the order of sums in a matrix product.
    torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()


def test_untied_embeddings_have_a_head():
    model = small("none", "recursion_wise", tie_word_embeddings=False)
    assert model.head_weight() is model.lm_head.weight


@pytest.mark.parametrize(
    ("kv_strategy", "backend"), [("recursion_wise", "inductor"), ("shared", "aot_eager")]
)
def test_expert_choice_training_compiles_into_one_graph(kv_strategy, backend, seed):
    """Forward and backward; inductor generates code for the smallest model of two depths only."""
    torch._dynamo.reset()
    fields = {"sharing": "cycle", "num_hidden_layers": 2, "num_recursions": 2}
    model = small("expert_choice", kv_strategy, **fields).float().train()
    ids = torch.randint(50, (2, 12))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    outputs = [m(ids, labels=ids) for m in (model, compiled)]
    for output in outputs:
        output.loss.backward()
    assert torch.equal(outputs[0].depth, outputs[1].depth)
    for expected, actual in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, atol=1e-4, rtol=1e-3)


def test_bfloat16_keeps_the_rotary_angles():
    model = small("expert_choice", "recursion_wise").bfloat16()
    assert model.rotary.cos.dtype == torch.float32
    assert model(torch.randint(50, (2, 12))).logits.dtype == torch.bfloat16


def test_labels_do_not_cross_sequences(seed):
    model = small("none", "recursion_wise")
    ids = torch.randint(50, (9,))
    output = model(ids, lengths=[5, 4], labels=ids)
    scored = [0, 1, 2, 3, 5, 6, 7]
    log_probs = output.logits.log_softmax(dim=1)
    expected = -torch.stack([log_probs[t, ids[t + 1]] for t in scored]).mean()
    torch.testing.assert_close(output.nll, expected)


@pytest.mark.parametrize(
    ("sharing", "layers", "valid"),
    [
        ("cycle", 7, "3, 6, 9"),
        ("sequence", 2, "3, 6, 9"),
        ("middle_cycle", 6, "5, 8, 11"),
        ("middle_sequence", 2, "5, 8, 11"),
    ],
)
def test_layers_that_do_not_divide_name_the_valid_numbers(sharing, layers, valid):
    with pytest.raises(ValueError, match=rf"num_hidden_layers must be {valid}, .* got {layers}"):
        MoRConfig(sharing=sharing, num_hidden_layers=layers, num_recursions=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sharing": "ring"}, "sharing must be one of cycle, .* got 'ring'"),
        ({"routing": "top"}, "routing must be one of none, .* got 'top'"),
        ({"kv_strategy": ""}, "kv_strategy must be one of recursion_wise, shared, .* got ''"),
        ({"router_update": "x"}, "router_update must be one of output, delta, got 'x'"),
        ({"num_recursions": 0}, "num_recursions must be at least 1, got 0"),
        ({"router_alpha": 1.0}, "router_alpha must be None for routing 'none', got 1.0"),
        (
            {"routing": "token_choice", "router_update": "delta"},
            "router_update must be None .* got delta",
        ),
        (
            {"routing": "token_choice", "router_activation": "tanh"},
            "router_activation must be one of softmax, sigmoid for routing .* got 'tanh'",
        ),
        ({"routing": "fixed_depth"}, "fixed_depth must be from 1 to 1, got None"),
        (
            {"routing": "mixture_of_depths", "num_recursions": 3},
            "num_recursions must be 1 for routing 'mixture_of_depths', got 3",
        ),
        ({"hidden_sise": 4}, r"hidden_sise must be a field of MoRConfig \(vocab_size, .* got 4"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}},
            "rope_parameters must be of rope_type 'default', got .*yarn",
        ),
        (
            {"routing": "expert_choice", "capacity": (1.0, 0.5)},
            r"capacity must be 1 numbers in \(0, 1\].* got",
        ),
        (
            {"routing": "expert_choice", "capacity": (1.5,)},
            r"capacity must be 1 numbers in \(0, 1\].* got",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads must be a multiple .* got 4"),
        ({"head_dim": 12}, "head_dim must be a multiple of 8 up to 256, got 12"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        MoRConfig(**fields)


def test_input_errors():
    model = small("none", "recursion_wise")
    with pytest.raises(ValueError, match=r"input_ids must be \[batch, length\] .* shape \[3\]"):
        model(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="lengths must add up to 3, got 4"):
        model(torch.zeros(3, dtype=torch.long), lengths=[4])
    with pytest.raises(ValueError, match="lengths must be at most 64, got 65"):
        model(torch.zeros(1, 65, dtype=torch.long))
