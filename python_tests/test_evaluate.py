"""Evaluation on text: every number against one computed by hand from the logits in fp64."""

import argparse
import json
import math
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mor_ext.evaluation import command, score
from mor_ext.evaluation.dump import DepthWriter, pieces, read_depths
from mor_ext.evaluation.evaluate import Evaluation, Measures, evaluate
from mor_ext.evaluation.ngram import ngram_scores
from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.training.dataset import PackedDataset, join
from mor_ext.training.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "fixed_depth": {"fixed_depth": 2},
    "expert_choice": {},
    "token_choice": {},
    "random": {},
    "mixture_of_depths": {"num_recursions": 1, "capacity": 0.4},
    "action": {"num_recursions": 2, "sharing": "sequence"},
}
TEXT = "Zwölf Boxkämpfer jagen 家 quer über den Sylter Deich; 🦊 schaut zu.\n" * 5


def small(routing: str = "expert_choice", dtype=torch.float64, **fields) -> MoRForCausalLM:
    defaults = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_recursions": 3,
        "initializer_range": 0.3,  # large enough that tokens differ in depth
        "max_position_embeddings": 64,
    }
    config = MoRConfig(**{**defaults, **VARIANTS[routing], "routing": routing, **fields})
    return MoRForCausalLM(config).to(dtype)


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(257, (rows, length))


def by_hand(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """nll fp64 and correct bool, both [rows, length - 1]."""
    log_probs = logits.double() - logits.double().logsumexp(dim=-1, keepdim=True)
    targets = ids[:, 1:]
    nll = -log_probs[:, :-1].gather(2, targets.unsqueeze(-1)).squeeze(-1)
    return nll, logits[:, :-1].argmax(dim=-1) == targets


# ---- the numbers ----


@pytest.mark.parametrize("routing", VARIANTS)
def test_measures_are_those_of_the_logits_by_both_rules(routing: str, seed: int) -> None:
    model, ids = small(routing), ids_of(5, 13)
    result = evaluate(model, ids)
    model.eval()
    torch.manual_seed(0)  # what evaluate draws from; the training rule comes first
    training, causal = model(ids, causal=False), model(ids, causal=True)
    assert (result.windows, result.tokens, result.num_bytes) == (5, 60, None)
    blocks = [
        i
        for i, stage in enumerate(model.stages)
        if stage.num_recursions > 1 or (routing == "mixture_of_depths" and i in (2, 4, 6))
    ]
    for measures, output in ((result.training, training), (result.causal, causal)):
        assert_measures(measures, output, ids, blocks, model.config.num_recursions)
    same = (training.stage_depth == causal.stage_depth)[..., blocks]
    assert result.agreement == pytest.approx(same.double().mean().item())
    if routing in ("expert_choice", "random", "action"):
        assert 0 < result.agreement < 1  # or this shows little


def assert_measures(
    measures: Measures, output: Any, ids: Tensor, blocks: list[int], passes: int
) -> None:
    nll, correct = by_hand(output.logits, ids)
    assert measures.nll == pytest.approx(nll.mean().item(), rel=1e-12)
    assert measures.nll_error == pytest.approx(nll.mean(1).std().item() / math.sqrt(len(ids)))
    assert measures.perplexity == pytest.approx(math.exp(nll.mean().item()))
    assert measures.accuracy == pytest.approx(correct.double().mean().item())
    assert measures.layers == pytest.approx(output.layers.double().mean().item())
    assert measures.depth == pytest.approx(output.depth.double().mean().item())
    assert measures.bits_per_byte is None
    depths = output.stage_depth[..., blocks]  # [rows, length, blocks]
    load = [(depths == d).double().mean().item() for d in range(passes + 1)]
    assert measures.load == pytest.approx(load)
    dead = (depths < passes).all(dim=0).double().mean().item()
    assert measures.dead == pytest.approx(dead)


def test_a_vanilla_model_has_nothing_to_choose(seed: int) -> None:
    result = evaluate(small("none", num_recursions=1), ids_of(3, 9))
    assert result.causal is result.training
    assert (result.causal.layers, result.causal.depth) == (8, 1)
    assert (result.causal.load, result.causal.dead, result.agreement) == ([], 0, 1)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("routing", ["expert_choice", "token_choice", "mixture_of_depths"])
def test_batch_size_and_parts_of_the_head_change_nothing(
    routing: str, batch_size: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = small(routing), ids_of(7, 12)
    whole = evaluate(model, ids, batch_size=7).to_dict()
    monkeypatch.setattr(score, "LOGITS", 5 * 257 + 3)
    assert_same(evaluate(model, ids, batch_size).to_dict(), whole)


def assert_same(actual: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_same(actual[name], value)
    else:
        assert actual == (expected and pytest.approx(expected, rel=1e-12))


def test_there_are_never_more_logits_than_said(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, shapes = score._judge, []

    def watched(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        shapes.append(logits.shape)
        return judge(logits, targets)

    monkeypatch.setattr(score, "LOGITS", 5 * 257)
    monkeypatch.setattr(score, "_judge", watched)
    evaluate(small("none"), ids_of(2, 11))
    assert shapes == [(5, 257)] * 4 + [(2, 257)]


def test_bits_are_counted_by_the_bytes_of_the_scored_tokens(seed: int) -> None:
    tokenizer = train_tokenizer("bpe", [TEXT], 280)
    tokens = join(tokenizer, [TEXT])
    model = small(vocab_size=280)
    windows = PackedDataset(tokens, 32, 31)
    result = evaluate(model, windows)
    assert result.tokens == len(tokens) - 1  # each once, but the first
    first = len(tokenizer.decode(tokens.ids[:1].tolist()).encode())
    assert result.num_bytes == len(TEXT.encode()) - first

    model.eval()
    nats, scored = 0.0, 0
    for item in windows:
        ids = item["input_ids"].unsqueeze(0)
        nll, _ = by_hand(model(ids).logits, ids)
        nll = nll[item["labels"][1:].unsqueeze(0) != -100]
        nats, scored = nats + nll.sum().item(), scored + nll.numel()
    assert scored == result.tokens
    assert result.causal.nll == pytest.approx(nats / scored)
    assert result.causal.bits_per_byte == pytest.approx(nats / math.log(2) / result.num_bytes)


def test_a_standard_error_counts_windows_by_their_tokens(seed: int) -> None:
    model, ids = small(), ids_of(4, 12)
    labels = ids.clone()
    labels[2, :7] = -100
    items = [{"input_ids": i, "labels": row} for i, row in zip(ids, labels, strict=True)]
    result = evaluate(model, items)
    nll, _ = by_hand(model.eval()(ids).logits, ids)
    nll[2, :6] = 0
    counts = torch.tensor([11.0, 11.0, 5.0, 11.0])
    mean = nll.sum() / counts.sum()
    spread = (nll.sum(1) - mean * counts).square().sum() * 4 / 3
    assert result.tokens == 38
    assert result.causal.nll == pytest.approx(mean.item())
    assert result.causal.nll_error == pytest.approx((spread.sqrt() / counts.sum()).item())
    assert evaluate(model, ids[:1]).causal.nll_error is None


def test_a_llama_of_transformers_has_its_own_loss(seed: int) -> None:
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    model, ids = LlamaForCausalLM(config).eval(), ids_of(6, 20)
    result = evaluate(model, ids, batch_size=4)
    assert result.causal.nll == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-6)
    assert (result.causal.layers, result.causal.depth, result.agreement) == (3, 1, 1)


def test_bfloat16_is_near_fp32_and_not_the_same(seed: int) -> None:
    model, ids = small("none", torch.float32), ids_of(6, 30)
    exact = evaluate(model, ids).causal.nll
    rounded = evaluate(model, ids, dtype=torch.bfloat16).causal.nll
    assert 0 < abs(rounded - exact) < 0.1


@pytest.mark.filterwarnings("ignore:this model has no causal rule")
def test_without_a_causal_rule_only_that_of_training_is_reported(seed: int) -> None:
    model, ids, seen = small(causal_rule="none"), ids_of(3, 9), []
    result = evaluate(model, ids, on_batch=lambda batch, scores: seen.append(scores))
    assert result.causal is None and result.agreement is None
    assert result.to_dict()["causal"] is None
    assert_measures(result.training, model.eval()(ids, causal=False), ids, [1], 3)
    assert len(seen) == 1


def test_a_model_that_diverged_is_not_hidden(seed: int) -> None:
    model = small("none")
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    measures = evaluate(model, ids_of(2, 9)).causal
    assert math.isnan(measures.nll) and math.isnan(measures.perplexity)


@pytest.mark.parametrize("training", [True, False])
def test_the_callers_generator_and_the_mode_stay(training: bool, seed: int) -> None:
    model, ids = small("random").train(training), ids_of(3, 9)
    state = torch.get_rng_state()
    first, second = evaluate(model, ids), evaluate(model, ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == second
    assert model.training is training


def test_a_stream_is_read_no_further_than_the_limit(seed: int) -> None:
    model, ids, read = small(), ids_of(5, 9), []

    def stream():
        for number in count():
            read.append(number)
            yield {"input_ids": ids[number % 5], "labels": ids[number % 5]}

    result = evaluate(model, stream(), batch_size=2, limit=5)
    assert read == [0, 1, 2, 3, 4]
    assert result == evaluate(model, ids, batch_size=2, progress=True)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([], "windows must be at least one, got none"),
        (torch.zeros(5, dtype=torch.long), r"windows must be \[count, length\], got shape \[5\]"),
        (torch.zeros(3, 1, dtype=torch.long), "windows must have tokens to score, got 3 windows"),
        (
            [
                dict.fromkeys(("input_ids", "labels"), torch.zeros(n, dtype=torch.long))
                for n in (4, 6)
            ],
            "windows must be of one length, got 4 and 6",
        ),
    ],
)
def test_bad_windows_are_errors(windows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(small(), windows)


# ---- depth dumps ----


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "sentencepiece"])
def test_pieces_joined_are_the_text(kind: str) -> None:
    tokenizer = train_tokenizer(kind, [TEXT], None if kind in ("byte", "char") else 320)
    ids = join(tokenizer, [TEXT]).ids.tolist()
    parts = pieces(tokenizer, ids)
    assert len(parts) == len(ids) and "".join(parts) == TEXT
    assert pieces(tokenizer, ids[:7]) == parts[:7]


def test_a_character_of_several_tokens_goes_to_the_last() -> None:
    tokenizer = train_tokenizer("byte", [])
    assert pieces(tokenizer, list("aö家".encode())) == ["a", "", "ö", "", "", "家"]
    assert pieces(tokenizer, [0xC3]) == ["\ufffd"]  # cut short
    assert "".join(pieces(tokenizer, [0xFF] * 20)) == "\ufffd" * 20  # not UTF-8 at all


def test_a_dump_has_every_tokens_depth_and_loss(seed: int, tmp_path: Path) -> None:
    tokenizer = train_tokenizer("byte", [])
    model, windows = small(), PackedDataset(join(tokenizer, [TEXT]), 32, 31)
    with DepthWriter(tmp_path / "depths.jsonl", tokenizer) as writer:
        result = evaluate(model, windows, on_batch=writer)
    lines = read_depths(tmp_path / "depths.jsonl")
    assert len(lines) == len(windows)
    model.eval()
    for item, line in zip(windows, lines, strict=True):
        ids = item["input_ids"].unsqueeze(0)
        output = model(ids)
        assert line["token_ids"] == ids[0].tolist()
        assert "".join(line["pieces"]) == tokenizer.decode(ids[0])
        for name in ("depth", "layers", "stage_depth"):
            assert line[name] == getattr(output, name)[0].tolist()
        nll, _ = by_hand(output.logits, ids)
        scored = (item["labels"][1:] != -100).tolist()
        expected = [x if s else None for x, s in zip(nll[0].tolist(), scored, strict=True)]
        assert line["nll"] == [*(x and pytest.approx(x, abs=1e-6) for x in expected), None]
    nats = sum(x for line in lines for x in line["nll"] if x is not None)
    assert nats / result.tokens == pytest.approx(result.causal.nll, abs=1e-6)


# ---- mor eval ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small(dtype=torch.float32).save_pretrained(folder)
    train_tokenizer("byte", []).save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    (folder / "train.txt").write_text(TEXT[::-1], encoding="utf-8")
    return folder


def run(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(argument) for argument in arguments]))


def test_the_command_reports_what_evaluate_gives(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    options = ("--text", saved / "text.txt", "--length", 40, "--dump", tmp_path / "depths")
    tables = ("--ngram", 3, "--train-text", saved / "train.txt")
    run(saved, *options, *tables, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())

    tokenizer = train_tokenizer("byte", [])
    tokens = join(tokenizer, [TEXT])
    model = MoRForCausalLM.from_pretrained(saved)
    expected: Evaluation = evaluate(model, PackedDataset(tokens, 40, 39))
    assert report["text"] == expected.to_dict()
    assert expected.num_bytes == len(TEXT.encode()) - 1
    assert len(read_depths(tmp_path / "depths")) == expected.windows
    scores = ngram_scores(join(tokenizer, [TEXT[::-1]]).ids, tokens.ids, 257, 3)
    for entry, table in zip(report["ngram"], scores, strict=True):
        assert (entry["order"], entry["nll"], entry["accuracy"]) == (
            table.order,
            table.nll,
            table.accuracy,
        )
        assert entry["bits_per_byte"] == pytest.approx(table.nll / math.log(2))  # a byte a token
    shown = capsys.readouterr().out
    numbers = (expected.causal.nll, expected.training.nll, expected.causal.bits_per_byte)
    for number in (*numbers, *(table.nll for table in scores)):
        assert f"{number:.4f}" in shown
    assert f"{expected.agreement:.2%}" in shown


def test_the_command_takes_the_first_windows_of_a_data_set(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data"
    data.mkdir()
    (data / "test.jsonl").write_text(json.dumps({"story": TEXT}) + "\n", encoding="utf-8")
    options = ("--dataset", data, "--column", "story", "--windows", 2)
    run(saved, *options, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["length"], report["text"]["windows"]) == (64, 2)
    windows = PackedDataset(join(train_tokenizer("byte", []), [TEXT]), 64, 63)
    model = MoRForCausalLM.from_pretrained(saved)
    assert report["text"] == evaluate(model, windows, limit=2).to_dict()


def test_the_documentations_example_runs(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text("utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "evaluation.md", "exec"), {})
    assert re.match(r"\d+\.\d+ bits a byte, \d\.\d of 5 layers\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of --text, --dataset, --tasks must be given, got none"),
        (["--text", "a", "--dataset", "b"], "--text and --dataset must not both be given, got b"),
        (["--tasks", "a"], "--tasks and --data must be given together, got a"),
        (["--text", "a", "--ngram", "2"], "--ngram and --train-text must be given together, got 2"),
        (["--text", "a", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--text", "no-such-file"], "files must exist, got no-such-file"),
    ],
)
def test_bad_arguments_are_errors(options: list[str], message: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(saved, *options)


def test_a_model_that_does_not_load_is_an_error(saved: Path, tmp_path: Path) -> None:
    weights = (saved / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    for content, reason in ((b"", ""), (weights[: len(weights) // 2], "incomplete")):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=f"must hold whole safetensors files, got .*{reason}"):
            run(tmp_path, "--text", saved / "text.txt")
    with pytest.raises(ValueError, match=r"model must be one that loads, got .*/nowhere"):
        run(tmp_path / "nowhere", "--text", saved / "text.txt")
