"""Tasks of lm-evaluation-harness: its numbers against log-likelihoods computed directly."""

import json
import math
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.training.tokenizer import train_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed")
from lm_eval.evaluator import simple_evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from mor_ext.evaluation import harness  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SHARED = Path(__file__).parents[2] / "shared" / "data"
CHOICES = [
    {
        "query": f"Question: what is {number} und zwölf?\n",
        "choices": ["a", f"eine längere Antwort, {number}", f"{number} " * (1 + number % 3)],
        "gold": number % 3,
    }
    for number in range(6)
]
WORDS = [{"context": f"It was the {word} of", "continuation": word} for word in ("best", "Zeiten")]


def write_lines(path: Path, items: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def save_small(folder: Path, **fields: Any) -> None:
    config = MoRConfig(
        **{
            "vocab_size": 257,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 8,
            "num_recursions": 3,
            "routing": "expert_choice",
            "initializer_range": 0.3,
            "max_position_embeddings": 512,
            **fields,
        }
    )
    MoRForCausalLM(config).save_pretrained(folder)
    train_tokenizer("byte", []).save_pretrained(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def model_dir(seed: int, tmp_path: Path) -> Path:
    save_small(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_lines(folder / "quiz.jsonl", CHOICES)
    write_lines(folder / "words_two.jsonl", WORDS)
    return folder


# ---- the same, directly ----

Encode = Callable[[str], list[int]]


def of_bytes(text: str) -> list[int]:
    return list(text.encode())


def log_likelihood(model: Any, encode: Encode, context: str, rest: str) -> tuple[float, bool]:
    """Log probability of ``rest``, and whether greedy decoding gives it. One text, no padding."""
    before, after = encode(context), encode(rest)
    limit = model.config.max_position_embeddings
    ids = torch.tensor((before + after)[-(limit + 1) :])
    with torch.no_grad():
        logits = model(ids[None, :-1]).logits[0, -len(after) :].double()
    log_probs: Tensor = logits.log_softmax(dim=-1)
    targets = ids[-len(after) :]
    total = log_probs.gather(1, targets[:, None]).sum().item()
    return total, bool((log_probs.argmax(dim=-1) == targets).all())


def quiz_by_hand(model: Any, encode: Encode, items: list[dict[str, Any]]) -> dict[str, float]:
    acc, acc_norm = [], []
    for item in items:
        scores = [
            log_likelihood(model, encode, item["query"] + "Answer:", " " + choice)[0]
            for choice in item["choices"]
        ]
        by_length = [s / len(c) for s, c in zip(scores, item["choices"], strict=True)]
        acc.append(float(scores.index(max(scores)) == item["gold"]))
        acc_norm.append(float(by_length.index(max(by_length)) == item["gold"]))
    return {**summary("acc", acc), **summary("acc_norm", acc_norm), "items": len(items)}


def words_by_hand(model: Any, encode: Encode, items: list[dict[str, Any]]) -> dict[str, float]:
    pairs = [
        log_likelihood(model, encode, item["context"], " " + item["continuation"]) for item in items
    ]
    sums = [total for total, _ in pairs]
    perplexity = math.exp(-mean(sums))
    error = perplexity * stdev(sums) / math.sqrt(len(sums))
    return {
        "perplexity": perplexity,
        "perplexity_stderr": error,
        **summary("acc", [float(greedy) for _, greedy in pairs]),
        "items": len(items),
    }


def summary(name: str, values: list[float]) -> dict[str, float]:
    return {name: mean(values), f"{name}_stderr": stdev(values) / math.sqrt(len(values))}


# ---- tests ----


@pytest.mark.parametrize("batch_size", [1, 7])
def test_scores_are_those_of_the_log_likelihoods(
    batch_size: int, model_dir: Path, tasks: Path
) -> None:
    results = harness.run(model_dir, ["quiz", "words"], tasks, batch_size=batch_size)
    model = MoRForCausalLM.from_pretrained(model_dir).eval()
    assert results["quiz"] == pytest.approx(quiz_by_hand(model, of_bytes, CHOICES))
    assert results["words"] == pytest.approx(words_by_hand(model, of_bytes, WORDS), rel=1e-4)


def test_the_model_type_hf_gives_the_same(model_dir: Path, tasks: Path) -> None:
    task = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "quiz.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}Answer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
    }
    theirs = simple_evaluate(
        model="hf",
        model_args=f"pretrained={model_dir}",
        tasks=[task],
        device="cpu",
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    ours = harness.run(model_dir, ["quiz"], tasks)["quiz"]
    for metric in ("acc", "acc_norm"):
        assert theirs["results"]["mine"][f"{metric},none"] == ours[metric]


def test_as_a_command_it_is_the_harness_that_knows_our_models(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["lm-eval", "run", "--help"])
    with pytest.raises(SystemExit, match="0"), pytest.warns(RuntimeWarning, match="sys.modules"):
        runpy.run_module("mor_ext.evaluation.harness", run_name="__main__")
    assert "--model_args" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["MoR", "stories260K"])
def test_shared_tasks_agree_with_direct_computation(kind: str, tmp_path: Path, seed: int) -> None:
    """The first items; some are longer than the context of the models, and cut on the left."""
    data, stories = SHARED / "eval", SHARED / "stories260K"
    for folder in (data, stories):
        if not folder.exists():
            pytest.skip(f"no {folder}")
    if kind == "MoR":
        save_small(tmp_path)
        encode = of_bytes
    else:
        for file in ("config.json", "model.safetensors"):
            shutil.copy(stories / file, tmp_path)
        tokenizer = stories_tokenizer(stories / "tok512.json")
        tokenizer.save_pretrained(tmp_path)
        encode = tokenizer.encode
    names = {"arc_easy": quiz_by_hand, "piqa": quiz_by_hand, "lambada": words_by_hand}
    results = harness.run(tmp_path, list(names), data, limit=8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for name, by_hand in names.items():
        (path,) = data.glob(f"{name}*.jsonl")
        items = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:8]]
        assert results[name] == pytest.approx(by_hand(model, encode, items), rel=1e-4), name


def stories_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The checkpoint's tokens, joined in the order of their scores; bytes for what has none."""
    from tokenizers import Tokenizer, decoders, models

    tokens = json.loads(path.read_text("utf-8"))["tokens"]
    ids = {token: number for number, token in enumerate(tokens)}
    merges = [  # of all splits: a pair that is never made costs nothing
        (token[:cut], token[cut:])
        for token in tokens[259:]
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=tokens[1], eos_token=tokens[2], unk_token="<unk>"
    )


@pytest.mark.filterwarnings("ignore:this model has no causal rule")
def test_a_model_without_a_causal_rule_is_an_error(tmp_path: Path, tasks: Path) -> None:
    save_small(tmp_path, causal_rule="none")
    with pytest.raises(ValueError, match="model must have a causal rule for tasks"):
        harness.run(tmp_path, ["quiz"], tasks)


def test_a_continuation_longer_than_the_context_is_an_error(tmp_path: Path, tasks: Path) -> None:
    save_small(tmp_path, max_position_embeddings=16)
    with pytest.raises(ValueError, match="at most max_position_embeddings = 16 tokens, got 25"):
        harness.run(tmp_path, ["quiz"], tasks)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "must have lines, got none"),
        ('{"query": 1\n', "must be JSON Lines, got .* in line 1"),
        (
            '{"context": "a"}\n',
            r"must have query, choices, gold or .*, got \['context'\] in line 1",
        ),
        (
            json.dumps(WORDS[0]) + "\n" + json.dumps(CHOICES[0]) + "\n",
            r"must have query, .*, got \['choices', 'gold', 'query'\] in line 2",
        ),
    ],
)
def test_files_of_another_form_are_errors(lines: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        harness.run(tmp_path, ["task"], tmp_path)


def test_an_unknown_task_is_an_error(tasks: Path) -> None:
    with pytest.raises(ValueError, match=r"\(quiz, words_two\), got no-such"):
        harness.run(tasks, ["quiz", "no-such"], tasks)
