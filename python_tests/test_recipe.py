"""Recipes: what a file may say, overrides, and errors that name what is wrong."""

import dataclasses
from pathlib import Path

import pytest
import torch
import yaml

from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.training.recipe import RunRecipe, config_names, find_config

SMALL = """
data:
  files: text.txt
model:
  hidden_size: 64
  num_hidden_layers: 8
  num_recursions: 3
  routing: expert_choice
  capacity: [1.0, 0.5, 1]
training:
  steps: 10
  learning_rate: 3e-3
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_a_file_and_the_defaults(small):
    recipe = RunRecipe.load(small)
    assert recipe.data.files == "text.txt" and recipe.training.steps == 10
    assert recipe.training.learning_rate == 0.003  # which YAML takes for text
    assert recipe.training.betas == (0.9, 0.95) and recipe.training.weight_decay == 0.1
    assert recipe.training.clip == 1 and recipe.tokenizer.kind == "byte"
    assert recipe.model["capacity"] == (1.0, 0.5, 1.0)


def test_overrides(small):
    recipe = RunRecipe.load(
        small,
        [
            "training.steps=null",
            "training.epochs=2",
            "training.betas=[0.8, 0.99]",
            "training.bf16=true",
            "tokenizer.kind=bpe",
            "tokenizer.vocab_size=512",
            "data.files=[a.txt, b=c.txt]",
            "model.hidden_size=96",
            "output=elsewhere",
        ],
    )
    assert recipe.training.epochs == 2.0 and isinstance(recipe.training.epochs, float)
    assert recipe.training.betas == (0.8, 0.99) and recipe.training.bf16
    assert recipe.tokenizer.vocab_size == 512
    assert recipe.data.files == ["a.txt", "b=c.txt"]
    assert recipe.model["hidden_size"] == 96 and recipe.model["num_recursions"] == 3
    assert recipe.output == "elsewhere"


def test_a_saved_recipe_is_read_as_it_was(small, tmp_path):
    recipe = RunRecipe.load(small, ["training.schedule=wsd", "tokenizer.kind=char"])
    path = recipe.save(tmp_path / "new" / "folder")
    assert path.name == "recipe.yaml"
    assert RunRecipe.load(path) == recipe


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "training.batchsize=8",
            r"training must be .*, got training.batchsize \(.* batch_size\?\)",
        ),
        (
            "trainig.steps=8",
            r"a recipe must be among data, .*, got trainig \(did you mean training",
        ),
        ("model.num_recursion=2", r"got model.num_recursion \(did you mean num_recursions\?\)"),
        ("data.zzz=1", r"keys of data must be among files, .*, got data.zzz$"),
        ("training.steps=many", "training.steps must be int or null, got 'many'"),
        ("training.steps=1.5", "training.steps must be int or null, got 1.5"),
        ("training.batch_size=true", "training.batch_size must be int, got True"),
        ("training.clip=big", "training.clip must be float, got 'big'"),
        ("training.clip=false", "training.clip must be float, got False"),
        ("training.bf16=1", "training.bf16 must be bool, got 1"),
        ("training.betas=[0.9]", r"training.betas must be tuple\[float, float\], got \[0.9\]"),
        ("training.schedule=linear", "training.schedule must be one of cosine, wsd, got 'linear'"),
        ("training=fast", "training must be a section with keys, got 'fast'"),
        ("model.hidden_size=wide", "model.hidden_size must be int, got 'wide'"),
        ("model.capacity=[a]", "model.capacity must be .*, got .'a'."),
        ("data.files=3", r"data.files must be str or list\[str\] or null, got 3"),
        ("training.epochs=1", "training must have one of steps and epochs, got steps = 10, ep"),
        ("training.batch_size=0", "training.batch_size must be above 0, got 0"),
        ("training.length=1", "training.length must be above 1, got 1"),
        ("training.warmup=2", "training.warmup must be from 0 to 1, got 2"),
        ("data.dataset=c4", "data must have one of files and dataset, got files = text.txt, data"),
        ("data.held_out=1", "data.held_out must be between 0 and 1, got 1"),
        ("data.streaming=true", "data.streaming must be false for files, got true"),
        ("tokenizer.kind=bpe", "tokenizer.vocab_size must be given for bpe and .*, got None"),
        ("tokenizer.name=gpt2", "tokenizer.name must be given for pretrained alone, got gpt2 for"),
        ("steps", "overrides must be key=value, got 'steps'"),
        ("training.steps=[1", r"training.steps must be YAML, got '\[1'"),
        ("output.name=x", "output.name must be in a section, got output = 'out'"),
    ],
)
def test_what_is_wrong_is_named(small, override, message):
    small.write_text(SMALL + "output: out\n")
    with pytest.raises(ValueError, match=message) as error:
        RunRecipe.load(small, [override])
    assert "\n" not in str(error.value)


def test_settings_that_exclude_each_other(small):
    wsd = ["training.schedule=wsd", "training.warmup=0.5", "training.decay=0.6"]
    with pytest.raises(ValueError, match=r"decay must be at most 1 - warmup = 0.5, got 0.6"):
        RunRecipe.load(small, wsd)
    stream = ["data.files=null", "data.dataset=c4", "data.streaming=true"]
    with pytest.raises(ValueError, match=r"data.stride must be null for streaming, got 8"):
        RunRecipe.load(small, [*stream, "data.stride=8"])
    with pytest.raises(ValueError, match=r"training.steps must be given for streaming"):
        RunRecipe.load(small, [*stream, "training.steps=null", "training.epochs=1"])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"training: [", "bad.yaml must be YAML, got"),
        (b"\xff\xfe", "bad.yaml must be YAML, got"),
        (b"- a\n- b\n", r"bad.yaml must have keys and values, got \['a', 'b'\]"),
        (b"", "training must have one of steps and epochs|data must have one of files"),
        (b"1: 2\n", "keys of a recipe must be among .*, got 1"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        RunRecipe.load(path)
    assert "\n" not in str(error.value)


def test_configs_are_found_by_name():
    assert find_config("char_small").name == "char_small.yaml"
    with pytest.raises(
        ValueError, match=r"config must be a file or one of char_small, .*, got char"
    ):
        find_config("char")


@pytest.mark.parametrize("name", config_names())
def test_example_configs_are_recipes_of_models(name):
    recipe = RunRecipe.load(name)
    config = MoRConfig(**recipe.model)
    assert config.max_position_embeddings >= recipe.training.length
    assert config.num_recursions > 1 and config.routing == "expert_choice"
    content = yaml.safe_load(find_config(name).read_text())
    saved = dataclasses.asdict(recipe)
    assert all(saved[section].keys() >= content[section].keys() for section in ("data", "training"))


# Layers, width, heads, KV heads, MLP; millions of parameters without the embedding's, of the
# vanilla model and of ours, whose layers recur.
PAPER = {
    "paper_135m": (30, 576, 9, 3, 1536, 106.2, 56.6),
    "paper_360m": (32, 960, 15, 5, 2560, 314.6, 118.0),
    "paper_730m": (26, 1536, 24, 8, 4096, 654.4, 251.7),
    "paper_1_7b": (24, 2048, 32, 32, 8192, 1610.6, 872.4),
}


def millions(fields: dict) -> float:
    with torch.device("meta"):
        model = MoRForCausalLM(MoRConfig(**fields))
    total = sum(parameter.numel() for parameter in model.parameters())
    return (total - model.embed_tokens.weight.numel()) / 1e6


@pytest.mark.parametrize("name", PAPER)
def test_sizes_of_the_paper(name):
    layers, hidden, heads, kv_heads, intermediate, *sizes = PAPER[name]
    recipe = RunRecipe.load(name)
    config = MoRConfig(**recipe.model)
    assert (config.num_hidden_layers, config.hidden_size) == (layers, hidden)
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, kv_heads)
    assert (config.intermediate_size, config.head_dim) == (intermediate, 64)
    assert config.vocab_size == 49152 and config.sharing == "middle_cycle"
    vanilla = {"num_recursions": 1, "routing": "none", "router_alpha": None}
    vanilla = recipe.model | vanilla | {"router_loss_coef": None}
    assert [millions(vanilla), millions(recipe.model)] == pytest.approx(sizes, rel=1e-3)
    training = recipe.training
    assert 8 * training.batch_size * training.gradient_accumulation * training.length == 2**21
