"""``mor train`` and ``mor info``: what a run leaves, resumption, a line for each mistake."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import mor_ext.models  # registers them
from mor_ext.cli import main
from mor_ext.training.checkpoints import last_whole
from mor_ext.training.corpus import load_corpus
from mor_ext.training.recipe import RunRecipe
from mor_ext.training.run import facts_of, make_trainer, optimizer_steps, spread, train

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_recursions": 3,
    "routing": "expert_choice",
    "initializer_range": 0.1,
}
TRAINING = {"steps": 6, "batch_size": 2, "length": 32, "log_every": 1, "save_every": 2}
KILLED = 7  # the step after which the process is


@pytest.fixture
def config(tmp_path):
    """Writes a config; ``model`` and ``training`` are added to those above, the rest replaced."""

    def write(output="out", model=None, training=None, **sections):
        (tmp_path / "text.txt").write_text(TEXT)
        content = {
            "output": str(tmp_path / output),
            "data": {"files": str(tmp_path / "text.txt")},
            "tokenizer": {"kind": "char"},
            "model": MODEL | (model or {}),
            "training": TRAINING | (training or {}),
        }
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump(content | sections))
        return str(path)

    return write


def losses(output: Path) -> list[tuple]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(r["step"], r["loss"], r["grad_norm"], r["nll"]) for r in log if "grad_norm" in r]


def test_a_run_and_what_it_leaves(config, tmp_path, capsys):
    assert main(["train", "--config", config(), "training.learning_rate=5e-3"]) == 0
    shown = capsys.readouterr().out
    assert "bits a byte" in shown and "routing, share of a training step" in shown
    output = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert model.config.vocab_size == len(tokenizer) and model.config.eos_token_id is not None
    ids = tokenizer("the quick", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    assert RunRecipe.load(output / "recipe.yaml").training.learning_rate == 5e-3
    metrics = json.loads((output / "metrics.json").read_text())
    assert 0 < metrics["router_share"] < 0.9 and metrics["eval_bits_per_byte"] > 0
    page = (output / "index.html").read_text()
    assert "Depth of held-out text" in page and "Training" in page
    assert list((output / "runs").rglob("events.out.tfevents.*"))
    assert len(losses(output)) == 6


@pytest.mark.parametrize(
    "model",
    [
        {"routing": "token_choice", "balancing": "bias", "bias_update_rate": 0.2},
        {"routing": "random"},  # numbers of its own for every batch
    ],
    ids=["bias", "random"],
)
def test_a_killed_run_resumes_to_the_digit(model, config, tmp_path):
    """Killed after a checkpoint within the second epoch, with batches accumulated."""
    training = {"steps": 9, "gradient_accumulation": 3, "batch_size": 8}  # 4 an epoch
    program = (
        "import os, signal, sys\n"
        "from mor_ext.cli import main\n"
        "from mor_ext.training.trainer import RouterCallback\n"
        "def kill(self, args, state, control, **others):\n"
        f"    if state.global_step == {KILLED}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "RouterCallback.on_step_begin = kill\n"
        "sys.exit(main(['train', '--config', sys.argv[1]]))\n"
    )
    killed = config("killed", model, training)
    result = subprocess.run(
        [sys.executable, "-c", program, killed],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == -signal.SIGKILL, result.stdout + result.stderr
    assert last_whole(tmp_path / "killed").name == "checkpoint-6"
    assert main(["train", "--config", killed, "--resume", "auto"]) == 0
    train(RunRecipe.load(config("whole", model, training)), None, Console(quiet=True))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 9
    states = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("killed", "whole")
    ]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_a_run_that_has_finished_resumes_without_a_step(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = config()
    assert main(["train", "--config", path]) == 0
    before, weights = losses(tmp_path / "out"), (tmp_path / "out/model.safetensors").read_bytes()
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    (tmp_path / "out/index.html").unlink()
    assert main(["train", "--config", path, "--resume", "auto"]) == 0
    assert losses(tmp_path / "out") == before
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights
    again = json.loads((tmp_path / "out/metrics.json").read_text())
    assert again["eval_nll"] == metrics["eval_nll"]
    assert (tmp_path / "out/index.html").exists()
    assert not (tmp_path / "runs").exists() and (tmp_path / "out/runs/evaluation").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text(TEXT)
    content = {
        "output": str(folder / "out"),
        "data": {"files": str(folder / "text.txt")},
        "model": MODEL,
        "training": TRAINING | {"steps": 4},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    recipe = RunRecipe.load(folder / "run.yaml")
    corpus = load_corpus(recipe)
    make_trainer(recipe, corpus, 1, Console(quiet=True)).train()
    return folder


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", ["cut short", "missing"])
def test_a_checkpoint_that_is_not_whole(name, damage, finished, capsys):
    checkpoint = finished / "out" / "checkpoint-4"
    file = checkpoint / name
    content = file.read_bytes()
    try:
        if damage == "missing":
            file.unlink()
        else:
            file.write_bytes(content[: len(content) // 2])
        assert last_whole(finished / "out").name == "checkpoint-2"
        arguments = ["train", "--config", str(finished / "run.yaml"), "--resume", str(checkpoint)]
        assert main(arguments) == 2
    finally:
        file.write_bytes(content)
    error = capsys.readouterr().err
    assert error.startswith(f"mor train: checkpoint must be whole, got {file}: ")
    assert error.count("\n") == 1


def test_a_run_is_not_overwritten(finished, capsys):
    assert main(["train", "--config", str(finished / "run.yaml")]) == 2
    assert "output must have no checkpoints without --resume, got" in capsys.readouterr().err


MISTAKES = {
    "no config": (["--config", "no.yaml"], "config must be a file or one of char_small"),
    "unknown key": (["training.step=3"], "got training.step (did you mean steps?)"),
    "unknown field": (["model.num_layers=3"], "got model.num_layers"),
    "wrong type": (["training.batch_size=many"], "training.batch_size must be int, got 'many'"),
    "no override": (["faster"], "overrides must be key=value, got 'faster'"),
    "layers that do not divide": (["model.num_hidden_layers=6"], "must be 5, 8, 11, ..."),
    "field of another routing": (["model.balancing=bias"], "balancing must be None for routing"),
    "missing file": (["data.files=none.txt"], "none.txt"),
    "empty file": (["data.files={folder}/empty.txt"], "empty.txt must have text"),
    "binary file": (["data.files={folder}/binary.txt"], "binary.txt must be text, got a NUL byte"),
    "not UTF-8": (["data.files={folder}/latin.txt"], "latin.txt must be UTF-8, got 0xe9 at byte 3"),
    "short text": (["data.files={folder}/short.txt"], "must have at least length = 32 tokens"),
    "small vocabulary": (["model.vocab_size=9"], "vocab_size must be at least the tokenizer's"),
    "long windows": (
        ["training.length=64", "model.max_position_embeddings=48"],
        "model.max_position_embeddings must be at least training.length = 64, got 48",
    ),
    "one sharded process": (["training.fsdp=true"], "fsdp must be false for one process"),
    "no checkpoint": (["--resume", "nowhere"], "checkpoint must be a folder, got nowhere"),
    "no Llama": (["model={{from_llama: nowhere}}"], "nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, config, tmp_path, capsys):
    arguments, message = MISTAKES[mistake]
    files = {"empty": b" \n", "binary": b"a\0b", "latin": b"caf\xe9 au lait", "short": b"a" * 30}
    for name, content in files.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    if "--config" not in arguments:
        arguments = ["--config", config(), *arguments]
    assert main(["train", *(part.format(folder=tmp_path) for part in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mor train: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_a_traceback_is_there_for_the_asking(config):
    with pytest.raises(ValueError, match="num_hidden_layers"):
        main(["--traceback", "train", "--config", config(model={"num_hidden_layers": 6})])


# The paper's table 3, at 360M: non-embedding parameters, in millions. 4 recursions do not divide 30
# layers: the authors' 98M is that of 8 shared ones, here 34 unrolled.
PAPER = {(1, 32): 315, (2, 32): 167, (3, 32): 118, (4, 34): 98}


@pytest.mark.parametrize(("recursions", "layers"), PAPER)
def test_parameters_of_the_paper(recursions, layers):
    sizes = [f"model.num_recursions={recursions}", f"model.num_hidden_layers={layers}"]
    facts = facts_of(RunRecipe.load("paper_360m", sizes))
    assert facts.embeddings == 49152 * 960
    expected = PAPER[recursions, layers] * 1e6
    assert facts.parameters - facts.embeddings == pytest.approx(expected, rel=0.01)
    assert facts.layers == layers


@pytest.mark.parametrize("name", ["paper_135m", "paper_360m", "paper_730m", "paper_1_7b"])
def test_one_step_of_a_shrunken_paper_recipe(name, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    recipe = RunRecipe.load(
        name,
        [
            f"output={tmp_path / 'out'}",
            f"data={{files: {tmp_path / 'text.txt'}}}",
            "tokenizer={kind: byte}",
            *("model.hidden_size=64", "model.intermediate_size=64", "model.head_dim=8"),
            *("training.steps=1", "training.batch_size=1", "training.gradient_accumulation=2"),
            *("training.length=32", "training.warmup=0", "training.log_every=1"),
            *("training.compile=false", "training.fsdp=false"),
        ],
    )
    trainer = make_trainer(recipe, load_corpus(recipe), 1, Console(quiet=True))
    trainer.train()
    assert trainer.args.bf16 and trainer.state.log_history[0]["loss"] == pytest.approx(10.8, abs=1)


def test_dry_run(config, tmp_path, capsys):
    assert main(["train", "--config", config(), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    aimed = 2 + 1 + 21 / 32 + 10 / 32  # of 32 tokens int(c * 32) at each depth
    assert "parameters" in shown and f"{aimed:.2f}" in shown and "FLOPs a token" in shown
    assert not (tmp_path / "out").exists()


def test_info(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert mor_ext.__version__ in shown and torch.__version__ in shown and "transformers" in shown


def test_steps_of_epochs(config, finished):
    """75 windows by 2 processes of 4 are 10 batches, by 3 accumulated 4 steps an epoch."""
    recipe = RunRecipe.load(
        config(training={"steps": None, "epochs": 2, "batch_size": 4, "gradient_accumulation": 3})
    )
    assert optimizer_steps(recipe, range(75), processes=2) == 8
    assert optimizer_steps(RunRecipe.load(finished / "run.yaml"), range(75), processes=2) == 4


def test_evaluations_in_mid_run_spread_over_the_text():
    items = spread(range(10), 4)
    assert [items[i] for i in range(len(items))] == [0, 2, 5, 7]
    assert spread(range(3), 4) == range(3)


def test_the_example_of_the_docs(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "training.md").read_text()
    content, program = (
        re.search(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
        for language in ("yaml", "python")
    )
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(content)
    Path("text.txt").write_text(TEXT * 3)
    exec(compile(program.replace("steps=20", "steps=2"), "training.md", "exec"), {})
    assert float(capsys.readouterr().out.split()[-1]) > 0
