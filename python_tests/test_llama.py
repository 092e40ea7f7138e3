"""from_llama: the same function as a Llama, the layers that uptraining starts from, and errors."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_accurate
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from mor_ext.models import MoRForCausalLM, from_llama

pytestmark = pytest.mark.usefixtures("one_thread")
STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260K"
SHARINGS = ("cycle", "sequence", "middle_cycle", "middle_sequence")
INITS = ("stepwise", "average", "lower", "upper")


def llama(layers: int = 5, **fields) -> LlamaForCausalLM:
    """Random, with grouped queries and a head of its own."""
    config = LlamaConfig(
        **{
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 32,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            **fields,
        }
    )
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:  # ones in a new model
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@pytest.fixture
def folder(seed, tmp_path) -> Path:
    """A Llama of five layers in shards."""
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return tmp_path


@pytest.fixture(scope="module")
def stories() -> Path:
    if not STORIES.exists():
        pytest.skip(f"no {STORIES}")
    return STORIES


# ---- the same function ----


def test_logits_of_a_real_model_equal_those_of_transformers(stories, seed):
    ids = torch.randint(512, (2, 300))
    with torch.no_grad():
        ours = from_llama(stories)(ids).logits
        theirs = LlamaForCausalLM.from_pretrained(stories)(ids).logits
        exact = from_llama(stories, dtype=torch.float64)(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)  # logits up to 20
    assert_accurate(ours, theirs, exact, atol=1e-5)


def test_a_real_model_writes_the_same_story(stories):
    start = torch.tensor([[1]])
    ours, theirs = (
        model.generate(start, max_new_tokens=120, do_sample=False)[0].tolist()
        for model in (from_llama(stories), LlamaForCausalLM.from_pretrained(stories))
    )
    tokens = json.loads((stories / "tok512.json").read_text())["tokens"]
    assert [tokens[i] for i in ours] == [tokens[i] for i in theirs]
    assert "".join(tokens[i] for i in ours[1:]).lstrip().startswith("Once upon a time")


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("init", INITS)
def test_one_recursion_is_the_same_function(sharing, init, seed):
    source = llama()
    ids = torch.randint(40, (2, 12))
    model = from_llama(source, sharing=sharing, init=init)
    torch.testing.assert_close(model(ids).logits, source(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_size", ["20KB", "1GB"])
def test_files_give_what_the_model_gives(tied, max_shard_size, tmp_path, seed):
    source = llama(tie_word_embeddings=tied)
    source.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    from_files, from_model = from_llama(tmp_path).state_dict(), from_llama(source).state_dict()
    assert from_files.keys() == from_model.keys()
    assert all(torch.equal(from_files[name], from_model[name]) for name in from_files)
    assert ("lm_head.weight" in from_files) != tied


def test_the_result_owns_its_weights(seed):
    source = llama()
    model = from_llama(source)
    before = {name: weight.clone() for name, weight in source.state_dict().items()}
    for weight in model.parameters():
        assert weight.requires_grad
        weight.data.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in source.state_dict().items())


def test_an_untied_result_of_a_tied_source_starts_with_its_head(seed):
    source = llama(tie_word_embeddings=True)
    model = from_llama(source, tie_word_embeddings=False)
    assert torch.equal(model.lm_head.weight, source.get_input_embeddings().weight)
    assert model.lm_head.weight.data_ptr() != model.embed_tokens.weight.data_ptr()


def test_old_checkpoints_may_have_tied_heads_and_rotary_frequencies(tmp_path, seed):
    source = llama(tie_word_embeddings=True)
    source.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.3.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors")
    ids = torch.randint(40, (2, 12))
    logits = from_llama(tmp_path)(ids).logits
    torch.testing.assert_close(logits, source(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("given", [None, torch.float32, torch.float16])
def test_weights_have_the_dtype_of_the_checkpoint_or_the_given_one(given, tmp_path, seed):
    llama().bfloat16().save_pretrained(tmp_path)
    model = from_llama(tmp_path, dtype=given, num_recursions=3, routing="expert_choice")
    assert {weight.dtype for weight in model.parameters()} == {given or torch.bfloat16}
    assert torch.equal(model.rotary.cos, from_llama(llama()).rotary.cos)  # not rounded


def test_generation_settings_come_along(tmp_path, seed):
    source = llama(eos_token_id=[7, 9])
    source.generation_config.max_new_tokens = 3
    source.save_pretrained(tmp_path)
    for model in (from_llama(source), from_llama(tmp_path)):
        assert model.config.eos_token_id == [7, 9]
        assert model.generation_config.eos_token_id == [7, 9]
        assert model.generation_config.max_new_tokens == 3


# ---- where uptraining starts ----


def layers_of(source: LlamaForCausalLM) -> list[dict[str, Tensor]]:
    """In the layout of this package."""
    return [
        {
            "attention_norm.weight": layer.input_layernorm.weight,
            "attention.qkv_proj.weight": torch.cat(
                [getattr(layer.self_attn, f"{name}_proj").weight for name in "qkv"]
            ),
            "attention.o_proj.weight": layer.self_attn.o_proj.weight,
            "mlp_norm.weight": layer.post_attention_layernorm.weight,
            "mlp.gate_up_proj.weight": torch.cat(
                [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]
            ),
            "mlp.down_proj.weight": layer.mlp.down_proj.weight,
        }
        for layer in source.model.layers
    ]


def assert_layers_are(model: MoRForCausalLM, source: LlamaForCausalLM, numbers: list[list[int]]):
    """Each layer of the model is the mean of the source's of those numbers."""
    own = [layer for stage in model.stages for layer in stage.block.layers]
    theirs = layers_of(source)
    for layer, group in zip(own, numbers, strict=True):
        for name, weight in layer.named_parameters():
            mean = torch.stack([theirs[number][name] for number in group]).mean(dim=0)
            torch.testing.assert_close(weight, mean, msg=lambda m, at=(name, group): f"{at}: {m}")


EXPECTED = {  # of 9 layers three times three, of 11 with a first and a last of their own
    ("cycle", "stepwise"): [[0], [4], [8]],
    ("cycle", "average"): [[0, 3, 6], [1, 4, 7], [2, 5, 8]],
    ("cycle", "lower"): [[0], [1], [2]],
    ("cycle", "upper"): [[6], [7], [8]],
    ("sequence", "stepwise"): [[0], [4], [8]],
    ("sequence", "average"): [[0, 1, 2], [3, 4, 5], [6, 7, 8]],
    ("sequence", "lower"): [[0], [1], [2]],
    ("sequence", "upper"): [[6], [7], [8]],
    ("middle_cycle", "stepwise"): [[0], [1], [5], [9], [10]],
    ("middle_cycle", "average"): [[0], [1, 4, 7], [2, 5, 8], [3, 6, 9], [10]],
    ("middle_cycle", "lower"): [[0], [1], [2], [3], [10]],
    ("middle_cycle", "upper"): [[0], [7], [8], [9], [10]],
    ("middle_sequence", "stepwise"): [[0], [1], [5], [9], [10]],
    ("middle_sequence", "average"): [[0], [1, 2, 3], [4, 5, 6], [7, 8, 9], [10]],
    ("middle_sequence", "lower"): [[0], [1], [2], [3], [10]],
    ("middle_sequence", "upper"): [[0], [7], [8], [9], [10]],
}


@pytest.mark.parametrize(("sharing", "init"), EXPECTED)
def test_shared_layers_start_from(sharing, init, seed):
    source = llama(11 if sharing.startswith("middle") else 9)
    model = from_llama(source, num_recursions=3, sharing=sharing, init=init)
    assert_layers_are(model, source, EXPECTED[sharing, init])
    assert model.config.num_hidden_layers == source.config.num_hidden_layers
    for ours, theirs in (
        (model.embed_tokens, source.model.embed_tokens),
        (model.norm, source.model.norm),
    ):
        assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("stepwise", [[0], [1], [9], [10]]),
        ("average", [[0], [1, 4, 7], [3, 6, 9], [10]]),  # 1, 2.6, 4.2, 5.8, 7.4, 9 rounded
        ("lower", [[0], [1], [2], [10]]),
        ("upper", [[0], [8], [9], [10]]),
    ],
)
def test_a_shallower_result_starts_from(init, expected, seed):
    source = llama(11)
    model = from_llama(source, num_recursions=3, init=init, num_hidden_layers=8)
    assert_layers_are(model, source, expected)


def test_a_block_of_one_layer_starts_from_the_first(seed):
    source = llama(5)
    assert_layers_are(from_llama(source, num_recursions=3), source, [[0], [1], [4]])


def test_every_layer_can_get_a_router_of_its_own(seed):
    """The skip / forward / recurse router: the unrolled depth is twice the source's."""
    source = llama(5)
    model = from_llama(source, 2, "sequence", routing="action", num_hidden_layers=10)
    assert_layers_are(model, source, [[0], [1], [2], [3], [4]])


@pytest.mark.parametrize(
    "fields",
    [
        {"routing": "expert_choice", "router_kind": "mlp", "causal_rule": "aux_router"},
        {"routing": "token_choice", "balancing": "bias"},
        {"routing": "action"},
        {"routing": "mixture_of_depths", "num_recursions": 1},
    ],
    ids=lambda fields: fields["routing"],
)
def test_routers_start_as_in_a_new_model(fields, seed):
    model = from_llama(llama(5), **{"num_recursions": 3} | fields)
    new = MoRForCausalLM(model.config)
    routers, expected = (
        {name: tensor for name, tensor in m.state_dict().items() if ".router." in name}
        for m in (model, new)
    )
    assert routers.keys() == expected.keys() and routers
    for name, tensor in routers.items():
        bound = 10 * model.config.initializer_range / tensor.numel() ** 0.5
        assert tensor.any() == expected[name].any(), name
        for statistic in (torch.mean, lambda t: t.std(correction=0)):
            assert abs(statistic(tensor) - statistic(expected[name])) <= bound, name


def test_a_real_model_trains_on_as_mixture_of_recursions(stories, seed):
    model = from_llama(stories, num_recursions=3, init="average", routing="expert_choice").train()
    vanilla = LlamaForCausalLM.from_pretrained(stories)
    ids = vanilla.generate(torch.tensor([[1]]), max_new_tokens=63, do_sample=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        output = model(ids, labels=ids)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.nll.item())
    assert losses[-1] < losses[0] - 1


# ---- errors ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init": "random"}, "init must be one of stepwise, average, lower, upper, got 'random'"),
        ({"sharing": "cyclic"}, "sharing must be one of cycle, .*, got 'cyclic'"),
        (
            {"num_recursions": 2},
            "num_hidden_layers must be 4, 6, 8, ... for sharing 'middle_cycle' with 2 recursions, "
            "got 5",
        ),
        (
            {"num_recursions": 2, "num_hidden_layers": 10},
            "num_hidden_layers must be at most 8 for sharing 'middle_cycle' of a source of 5 "
            "layers with 2 recursions, got 10",
        ),
        ({"depth": 3}, "depth must be a field of MoRConfig"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False for a source with a"),
    ],
)
def test_what_the_source_cannot_become(fields, message, seed):
    with pytest.raises(ValueError, match=message):
        from_llama(llama(), **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_bias": True}, "attention_bias of the source must be False, got True"),
        ({"mlp_bias": True}, "mlp_bias of the source must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act of the source must be 'silu', got 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type of the source must be 'default', got 'linear'",
        ),
        ({"head_dim": 12}, "head_dim must be a multiple of 8 up to 256, got 12"),
    ],
)
def test_llamas_that_are_another_function(fields, message, seed):
    with pytest.raises(ValueError, match=message):
        from_llama(llama(**fields))


def test_folders_that_hold_no_llama(tmp_path):
    with pytest.raises(ValueError, match=r"source must be a folder with a config.json, got '.*no"):
        from_llama(tmp_path / "no")
    (tmp_path / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(ValueError, match=r"config.json must be that of a Llama, got .*lama"):
        from_llama(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be that of a Llama, got .*JSON"):
        from_llama(tmp_path)
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="source must be a Llama, got a model of type 'gpt2'"):
        from_llama(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold model.safetensors or model.safetensors.index"):
        from_llama(tmp_path)


def shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


NAME = "model.layers.2.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {NAME: t[NAME][:55]}, r"{name} in {file} must be of shape \[56, 32\], got"),
        (lambda t: t | {NAME: t[NAME].T}, r"{name} in {file} must .* \[56, 32\], got \[32, 56\]"),
        (
            lambda t: {n: t[n] for n in t if n != NAME},
            "{name} must be in {folder}, but is missing",
        ),
        (lambda t: t | {NAME + "s": t[NAME].clone()}, "{name}s in {file} must not be there"),
    ],
    ids=["short", "transposed", "missing", "unexpected"],
)
def test_a_tensor_that_does_not_fit_is_named(change, message, folder):
    path = shard_of(folder, NAME)
    tensors = {name: t.contiguous() for name, t in change(load_file(path)).items()}
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message.format(name=NAME, file=path, folder=folder)):
        from_llama(folder)


def test_a_layer_too_many_is_named(tmp_path, seed):
    llama(6).save_pretrained(tmp_path)
    llama(5).config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model.layers.5.\S+ in .*model.safetensors must not be"):
        from_llama(tmp_path)


def test_a_file_that_is_cut_short_or_missing_is_named(folder):
    path = shard_of(folder, NAME)
    whole = path.read_bytes()
    for size in (0, 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{path} must be a whole safetensors file, got"):
            from_llama(folder)
    path.unlink()
    with pytest.raises(ValueError, match=f"{path} must be there, but is missing"):
        from_llama(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": []}'])
def test_an_index_that_is_none_is_named(text, folder):
    path = folder / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path} must be the index of a checkpoint, got"):
        from_llama(folder)
