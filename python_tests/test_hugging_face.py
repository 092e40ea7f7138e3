"""What users of Hugging Face expect of a model: saving, padding, checkpointing, compiling."""

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.nn import Rotary

pytestmark = pytest.mark.usefixtures("one_thread")
ROUTINGS = {
    "none": {},
    "expert_choice": {"capacity": (1.0, 0.7, 0.4)},
    "token_choice": {},
    "action": {},
    "mixture_of_depths": {"num_recursions": 1, "capacity": 0.5},
    "random": {},
    "fixed_depth": {"fixed_depth": 2},
}
KV_STRATEGIES = ["recursion_wise", "shared", "hybrid", "frozen"]
every_routing = pytest.mark.parametrize("routing", ROUTINGS)
every_strategy = pytest.mark.parametrize("kv_strategy", KV_STRATEGIES)


def small(routing: str, kv_strategy: str = "recursion_wise", **fields) -> MoRForCausalLM:
    return MoRForCausalLM(
        MoRConfig(
            **{
                "vocab_size": 50,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 8,
                "max_position_embeddings": 64,
                "initializer_range": 0.3,  # large enough that tokens differ in depth
                "num_recursions": 3,
                "routing": routing,
                "kv_strategy": kv_strategy,
                **ROUTINGS[routing],
                **fields,
            }
        )
    ).eval()


def words(batch: int, length: int) -> Tensor:
    """Rows without a token twice: two equal ones at the start would tie in every router."""
    return torch.stack([torch.randperm(40)[:length] for _ in range(batch)])


# ---- saving and loading ----


@pytest.mark.parametrize("kv_strategy", ["recursion_wise", "hybrid"])
@every_routing
def test_a_loaded_model_is_the_saved_one(routing, kv_strategy, tmp_path, seed):
    model = small(routing, kv_strategy)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MoRForCausalLM and not loaded.training
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is MoRConfig
    for fields in (config.to_dict(), loaded.config.to_dict()):
        for name, value in model.config.to_dict().items():
            if not name.startswith("_") and name not in ("dtype", "architectures"):
                assert fields[name] == value, name
    assert type(config.capacity) is type(model.config.capacity)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = words(2, 12)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_biases_that_balance_loads_are_saved(tmp_path, seed):
    model = small("token_choice", balancing="bias").train()
    ids = words(2, 11)  # 22 tokens, so that three depths cannot all have the mean load
    model(ids, labels=ids).loss.backward()
    model.update_routers()
    model.save_pretrained(tmp_path)
    saved, loaded = model.state_dict(), MoRForCausalLM.from_pretrained(tmp_path).state_dict()
    biases = [name for name in saved if "router.bias" in name]
    assert biases and all(saved[name].any() for name in biases)
    assert all(torch.equal(loaded[name], saved[name]) for name in biases)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_stored_once(tied, tmp_path, seed):
    model = small("expert_choice", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    assert sum(stored.values()) == sum(weight.numel() for weight in model.parameters())
    assert sum("qkv_proj" in name for name in stored) == 4  # of 8 unrolled layers
    assert ("lm_head.weight" in stored) != tied
    loaded = MoRForCausalLM.from_pretrained(tmp_path)
    shared = loaded.head_weight().data_ptr() == loaded.embed_tokens.weight.data_ptr()
    assert shared == tied


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_loading_in_bf16_leaves_the_rotary_tables_exact(saved, tmp_path, seed):
    small("expert_choice").to(saved).save_pretrained(tmp_path)
    assert MoRForCausalLM.from_pretrained(tmp_path).dtype == saved
    loaded = MoRForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    exact = Rotary(8, 64, 10000.0)
    for model in (loaded, loaded.half(), loaded.float()):
        for name in ("cos", "sin"):
            assert getattr(model.rotary, name).dtype == torch.float32
            assert torch.equal(getattr(model.rotary, name), getattr(exact, name))


@pytest.mark.parametrize("load", [MoRForCausalLM, AutoModelForCausalLM])
def test_a_checkpoint_that_is_cut_short_or_missing_is_a_clear_error(load, tmp_path, seed):
    small("none").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{tmp_path} must hold whole safetensors files, got"):
            load.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(OSError, match=f"no file named model.safetensors.* {tmp_path}"):
        load.from_pretrained(tmp_path)


# ---- padding ----

LENGTHS = (9, 4, 12)


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Ids ``[3, 14]`` with random ones in the padding, and their mask."""
    mask = torch.zeros(3, 14, dtype=torch.long)
    for row, length in zip(mask, LENGTHS, strict=True):
        start = {"left": 14 - length, "right": 0, "both": (14 - length) // 2}[side]
        row[start : start + length] = 1
    return words(3, 14), mask


@pytest.mark.parametrize("side", ["left", "right", "both"])
@every_strategy
@every_routing
def test_padding_changes_nothing(routing, kv_strategy, side, seed):
    model = small(routing, kv_strategy).double()
    ids, mask = padded(side)
    output = model(ids, attention_mask=mask)
    assert output.logits.shape == (3, 14, 50)
    for name in ("depth", "layers", "stage_depth"):
        assert not output[name][mask == 0].any()
    for b in range(3):
        alone = model(ids[b : b + 1, mask[b] == 1])
        torch.testing.assert_close(output.logits[b, mask[b] == 1], alone.logits[0])
        for name in ("depth", "layers", "stage_depth"):
            assert torch.equal(output[name][b, mask[b] == 1], alone[name][0])


@pytest.mark.parametrize("side", ["left", "right", "both"])
@every_strategy
@every_routing
def test_padding_takes_no_part_in_training(routing, kv_strategy, side, seed):
    """Losses and gradients are those of the packed sequences, whatever stands in the padding."""
    model = small(routing, kv_strategy).double().train()
    ids, mask = padded(side)
    results = []
    for call in (
        {"input_ids": ids, "attention_mask": mask, "labels": ids},
        {"input_ids": ids[mask == 1], "lengths": LENGTHS, "labels": ids[mask == 1]},
    ):
        torch.manual_seed(seed)  # action and random draw
        model.zero_grad()
        output = model(**call)
        output.loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([output.loss, output.nll, output.aux_loss, *grads])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert output.aux_loss > 0 or routing in ("none", "random", "fixed_depth")


@every_routing
def test_the_loss_of_padded_sequences_is_that_of_each_alone(routing, seed):
    """Weighted by their numbers of labels; a causal rule, as evaluation has none of the draws."""
    model = small(routing).double()
    ids, mask = padded("left")
    together = model(ids, attention_mask=mask, labels=ids)
    alone = [
        model(row[keep == 1][None], labels=row[keep == 1][None])
        for row, keep in zip(ids, mask, strict=True)
    ]
    weights = [length - 1 for length in LENGTHS]
    mean = sum(w * o.nll for w, o in zip(weights, alone, strict=True)) / sum(weights)
    torch.testing.assert_close(together.nll, mean)


def test_a_row_of_padding_only_is_an_empty_sequence(seed):
    model = small("expert_choice").double()
    ids, mask = padded("left")
    mask[1] = 0
    output = model(ids, attention_mask=mask, labels=ids)
    torch.testing.assert_close(
        output.nll, model(ids[::2], attention_mask=mask[::2], labels=ids[::2]).nll
    )


# ---- losses ----


def test_labels_of_minus_100_are_ignored(seed):
    model = small("expert_choice").double()
    ids = words(2, 10)
    labels = torch.where(torch.rand(2, 10) < 0.4, -100, ids)
    labels[0, :2] = ids[0, :2]
    logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=labels).nll, expected)


def test_losses_of_micro_batches_add_up_to_that_of_the_batch(seed):
    """By num_items_in_batch, as Trainer accumulates gradients: uneven numbers of labels too."""
    model = small("none").double().train()
    ids = words(4, 10)
    labels = ids.masked_fill(torch.rand(4, 10) < 0.4, -100)
    whole = model(ids, labels=labels).loss
    items = (labels[:, 1:] != -100).sum()
    parts = [
        model(i, labels=part, num_items_in_batch=items).loss
        for i, part in zip(ids.split(1), labels.split(1), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_routers_loss_counts_once_over_micro_batches(seed):
    model = small("token_choice").double().train()
    ids = words(4, 10)
    items = 4 * 9
    parts = [model(i, labels=i, num_items_in_batch=items) for i in ids.split(2)]
    nll = sum(part.nll for part in parts) / 2
    aux = sum(part.aux_loss for part in parts) / 2
    assert aux > 0
    torch.testing.assert_close(sum(part.loss for part in parts), nll + aux)


def test_a_tuple_has_what_the_output_has(seed):
    model = small("expert_choice")
    ids = words(2, 10)
    output = model(ids, labels=ids)
    values = model(ids, labels=ids, return_dict=False)
    assert all(torch.equal(a, b) for a, b in zip(values, output.values(), strict=True))


# ---- training ----


def step(model, ids: Tensor, seed: int) -> list[Tensor]:
    """The losses and gradients of a training step."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    return [
        output.loss,
        output.aux_loss,
        *(p.grad for p in model.parameters() if p.grad is not None),
    ]


@every_strategy
@every_routing
def test_gradient_checkpointing_changes_no_gradient_and_keeps_less(routing, kv_strategy, seed):
    model = small(routing, kv_strategy).double().train()
    ids = words(2, 12)

    def run() -> tuple[list[Tensor], int]:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return [t.clone() for t in step(model, ids, seed)], kept

    expected, kept = run()
    model.activation_checkpointing_enable()
    actual, kept_less = run()
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert kept_less < 0.6 * kept
    model.activation_checkpointing_disable()
    assert run()[1] == kept


@pytest.mark.parametrize(
    ("routing", "kv_strategy", "fullgraph"),
    [
        ("expert_choice", "recursion_wise", True),
        ("token_choice", "shared", False),
        ("action", "frozen", False),
    ],
)
def test_a_compiled_training_step_is_the_eager_one(routing, kv_strategy, fullgraph, seed):
    model = small(routing, kv_strategy, sharing="cycle", num_hidden_layers=3).train()
    ids = words(2, 12)
    expected = [t.clone() for t in step(model, ids, seed)]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    actual = [t.clone() for t in step(compiled, ids, seed)]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [40, 61])
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_can_be_resized(tied, size, tmp_path, seed):
    model = small("expert_choice", tie_word_embeddings=tied)
    ids = words(2, 10)
    before = model(ids).logits
    model.resize_token_embeddings(size)
    after = model(ids)
    kept = min(size, 50)
    assert model.config.vocab_size == after.logits.shape[-1] == size
    torch.testing.assert_close(after.logits[..., :kept], before[..., :kept])
    model.save_pretrained(tmp_path)
    loaded = MoRForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, after.logits)
