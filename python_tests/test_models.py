"""Models: every layout against an unrolled reference, and the invariants that users rely on."""

import copy
import math

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mor_ext.inference import PagedKV, generate
from mor_ext.models import MoRConfig, MoRForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = {"cycle": 6, "sequence": 6, "middle_cycle": 8, "middle_sequence": 8}
VARIANTS = [
    (routing, kv_strategy)
    for routing in ("none", "expert_choice", "token_choice")
    for kv_strategy in ("recursion_wise", "shared")
]
LENGTHS = [9, 0, 1, 16, 4]


def small(
    routing: str, kv_strategy: str, sharing: str = "middle_cycle", **fields
) -> MoRForCausalLM:
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
            **fields,
        }
    )
    return MoRForCausalLM(config).double().eval()


# The reference: unrolled layers, dense masks, nothing skipped. Every token goes through every
# layer; one that is not active keeps the hidden state of before.


def reference(model: MoRForCausalLM, ids: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Logits [T, vocab] and depth [T] of one sequence."""
    config = model.config
    n, edge = config.num_recursions, int(config.sharing.startswith("middle"))
    layers = [layer for stage in model.stages for layer in stage.block.layers]
    past = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    block = (config.num_hidden_layers - 2 * edge) // n  # layers with weights of their own

    hidden = model.embed_tokens.weight[ids]
    depth = torch.zeros(len(ids), dtype=torch.int32)
    if edge:
        hidden, _ = reference_layer(layers[0], model, hidden, past)
    for unrolled in range(block * n):
        if config.sharing.endswith("cycle"):  # (0 1) (0 1) (0 1)
            step, number = divmod(unrolled, block)
            group, starts, ends = 0, number == 0, number == block - 1
        else:  # (0) (0) (0) (1) (1) (1)
            group, step = divmod(unrolled, n)
            number, starts, ends = group, True, True
        if starts and step == 0:
            entry, active, kept = hidden, torch.ones(len(ids), dtype=torch.bool), {}
        if starts:
            router = model.stages[edge + group].router
            active, gate, last = reference_choice(
                config, router, step, hidden, entry, active, causal
            )
            if step == 0:
                first = active
            depth += active
            x = hidden
        shared = config.kv_strategy == "shared"
        visible = past & (first if shared else active)
        kv = kept.get(number) if shared else None
        x, kept[number] = reference_layer(layers[edge + number], model, x, visible, kv)
        if ends:
            if config.routing == "token_choice":
                new = gate * x + last * entry  # equation 2
            elif router.update == "output":
                new = hidden + gate * x  # equation 1
            else:
                new = hidden + gate * (x - hidden)
            hidden = torch.where(active.unsqueeze(1), new, hidden)
    if edge:
        hidden, _ = reference_layer(layers[-1], model, hidden, past)
    return reference_norm(model.norm, hidden) @ model.head_weight().T, depth


def reference_choice(config, router, step, hidden, entry, active, causal):
    """Active tokens [T] and gates [T, 1] of a step, and for whom it is the last [T, 1]."""
    if config.routing == "none":
        return active, 1.0, None
    if config.routing == "token_choice":
        g = router.alpha * torch.softmax(entry @ router.weight.T, dim=1)
        choice = g.argmax(dim=1)
        return choice >= step, g[:, step : step + 1], (choice == step).unsqueeze(1)
    logits = hidden @ router.weight[step]
    gate = router.alpha * torch.sigmoid(logits).unsqueeze(1)
    if causal:
        return active & (torch.sigmoid(logits) >= 0.5), gate, None
    k = min(len(hidden), max(1, int(router.capacity[step] * len(hidden))))
    top = logits.masked_fill(~active, -math.inf).topk(k).indices
    return torch.zeros_like(active).index_fill(0, top, True), gate, None


def reference_layer(layer, model, x, visible, kv=None):
    """A Llama layer on all tokens of a sequence, visible [T, T]; its K/V [T, Hkv, D] too."""
    config = model.config
    d, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    normed = reference_norm(layer.attention_norm, x)
    weights = layer.attention.qkv_proj.weight.split([heads * d, kv_heads * d, kv_heads * d])
    q, k, v = ((normed @ w.T).unflatten(1, (-1, d)) for w in weights)
    k, v = kv or (reference_rotary(k, config.rope_theta), v)
    q = reference_rotary(q, config.rope_theta)
    out = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        scores = (q[:, h] @ k[:, g].T / math.sqrt(d)).masked_fill(~visible, -math.inf)
        # A row that sees nothing belongs to a token that is not active: its value is not used.
        out.append(scores.softmax(dim=1).nan_to_num() @ v[:, g])
    x = x + torch.cat(out, dim=1) @ layer.attention.o_proj.weight.T
    gate, up = (reference_norm(layer.mlp_norm, x) @ layer.mlp.gate_up_proj.weight.T).chunk(2, 1)
    return x + (gate * torch.sigmoid(gate) * up) @ layer.mlp.down_proj.weight.T, (k, v)


def reference_norm(norm, x):
    return x / (x.pow(2).mean(dim=1, keepdim=True) + norm.eps).sqrt() * norm.weight


def reference_rotary(x, theta):
    """Turns the pairs (x[i], x[i + D / 2]) as complex numbers."""
    d = x.shape[2]
    frequency = theta ** -(torch.arange(0, d, 2).double() / d)
    angle = torch.outer(torch.arange(len(x)).double(), frequency).unsqueeze(1)
    turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.exp(1j * angle)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sharing", LAYERS)
@pytest.mark.parametrize(("routing", "kv_strategy"), VARIANTS)
def test_every_layout_equals_the_unrolled_reference(routing, kv_strategy, sharing, causal, seed):
    model = small(routing, kv_strategy, sharing)
    ids = torch.randint(50, (sum(LENGTHS),))
    output = model(ids, LENGTHS, causal=causal)
    expected = [reference(model, part, causal) for part in ids.split(LENGTHS)]
    torch.testing.assert_close(output.logits, torch.cat([logits for logits, _ in expected]))
    assert torch.equal(output.depth, torch.cat([depth for _, depth in expected]))


@pytest.mark.parametrize(("routing", "kv_strategy"), VARIANTS)
def test_gradients_equal_the_reference(routing, kv_strategy, seed):
    model = small(routing, kv_strategy).train()
    ids = torch.randint(50, (12,))
    weight = torch.randn(12, 50).double()
    grads = []
    for logits in (model(ids, [12]).logits, reference(model, ids, causal=False)[0]):
        model.zero_grad()
        (logits * weight).sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for (name, _), actual, expected in zip(model.named_parameters(), *grads, strict=True):
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(actual, expected, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("update", ["output", "delta"])
@pytest.mark.parametrize("kv_strategy", ["recursion_wise", "shared"])
def test_capacity_1_and_gate_1_is_the_recursive_model(kv_strategy, update, seed):
    fields = {"update": update, "capacity": (1.0, 1.0, 1.0), "router_alpha": 2.0}
    mor = small("expert_choice", kv_strategy, **fields).train()
    mor.stages[1].router.weight.data.zero_()  # gate 2 * sigmoid(0)
    recursive = small("none", kv_strategy, update=update)
    recursive.load_state_dict(mor.state_dict(), strict=False)
    ids = torch.randint(50, (3, 10))
    torch.testing.assert_close(mor(ids).logits, recursive(ids).logits)
    assert (mor(ids).depth == 3).all()


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
    model = small(routing, kv_strategy).train(training)
    ids = torch.randint(50, (sum(LENGTHS),))
    together = model(ids, LENGTHS)
    alone = [model(part, [len(part)]) for part in ids.split(LENGTHS)]
    torch.testing.assert_close(together.logits, torch.cat([o.logits for o in alone]))
    assert torch.equal(together.depth, torch.cat([o.depth for o in alone]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("sharing", ["middle_cycle", "sequence"])
@pytest.mark.parametrize(("routing", "kv_strategy"), VARIANTS)
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
            output = model(torch.cat(parts), chunks, store=store)
            for b, chunk in enumerate(chunks):
                logits[b].append(output.logits.split(chunks)[b])
                depth[b].append(output.depth.split(chunks)[b])
                position[b] += chunk
    assert position == [23, 20, 30]
    for b, sequence in enumerate(sequences):
        full = model(sequence, [len(sequence)])
        tolerance = {} if dtype == torch.float64 else {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(torch.cat(logits[b]), full.logits, **tolerance)
        assert torch.equal(torch.cat(depth[b]), full.depth)


@pytest.mark.parametrize(("routing", "kv_strategy"), VARIANTS)
def test_greedy_generation_takes_the_most_likely_token(routing, kv_strategy, seed):
    model = small(routing, kv_strategy)
    prompts = [torch.randint(50, (length,)) for length in (4, 9)]
    for prompt, result in zip(prompts, generate(model, prompts, 6, temperature=0), strict=True):
        full = model(result.tokens, [len(result.tokens)])
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
    assert model.stages[1].router.weight.grad.abs().sum(dim=1).min() > 0  # each depth's row


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
    assert (tmp_path / "model.pt").stat().st_size < 4 * count + 30_000
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert loaded.config == model.config


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
    output = model(ids, [5, 4], labels=ids)
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
        ({"kv_strategy": ""}, "kv_strategy must be one of recursion_wise, shared, got ''"),
        ({"update": "x"}, "update must be one of output, delta, got 'x'"),
        ({"num_recursions": 0}, "num_recursions must be at least 1, got 0"),
        ({"router_alpha": 1.0}, "router_alpha must be None for routing 'none', got 1.0"),
        ({"routing": "token_choice", "update": "delta"}, "update must be None .* got delta"),
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
        model(torch.zeros(3, dtype=torch.long), [4])
    with pytest.raises(ValueError, match="lengths must be at most 64, got 65"):
        model(torch.zeros(1, 65, dtype=torch.long))
