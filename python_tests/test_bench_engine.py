"""The engine's bench: what it compares is equal, what it counts is right, its table reads so."""

import importlib
import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.training.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(BENCH)
    return importlib.import_module


@pytest.fixture
def sizes(bench):
    return bench("models_worker").Sizes(2, 64, 40, 32, 64, 8, 4, 2)


def lengths(bench):
    work = bench("engine_work")
    return work.Lengths(8, 0.5, 2, 20), work.Lengths(6, 0.8, 2, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_bench(bench, sizes, dtype, tmp_path, monkeypatch, seed) -> None:
    """Small models through all of it, a trained one's router included."""
    module = bench("bench_engine")
    model = MoRForCausalLM(
        MoRConfig(
            vocab_size=257, num_recursions=3, routing="expert_choice", max_position_embeddings=64
        )
    )
    model.save_pretrained(tmp_path / "model")
    train_tokenizer("byte", [""]).save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("some text to cut prompts from. " * 20)
    own = tmp_path / "model", tmp_path / "text.txt"
    monkeypatch.setattr(module, "largest_batch", lambda *_: 4)
    prompt, new = lengths(bench)
    device = torch.device("cpu")
    setting = module.Setting(
        sizes, device, dtype, (32, None), (1.33, 1.95), 2, requests=2, prompt=prompt, new=new
    )
    energy = bench("energy").Energy(device)
    found = list(module.comparisons(setting, energy, own))
    assert len(found) == 5
    assert [len(comparison["goals"]) for comparison in found] == [4, 4, 1, 1, 1]
    for comparison in found[:2]:
        vanilla = comparison["jobs"]["vanilla"]["facts"]
        assert vanilla["layers"] == 8 and vanilla["kv_bytes"] == 8 * 2 * 2 * 8 * dtype.itemsize
        for name, entry in comparison["jobs"].items():
            assert len(entry["turns"]) == 2 and all(turn["tokens"] > 0 for turn in entry["turns"])
            facts = entry["facts"]
            assert 0 < facts["scheduler_share"] < 0.5
            assert facts["kv_bytes_held"] >= facts["kv_bytes"], name
    described = module.conditions(setting, energy, own)
    result = json.loads(json.dumps({"conditions": described, "comparisons": found}))
    text = bench("engine_report").engine_section(result)
    last = [line.split("|")[-2].strip() for line in text.splitlines() if line.endswith("|")]
    assert last.count("yes") + last.count("**no**") == 11
    assert sum("MoR, sequence-wise" in line for line in text.splitlines()) == 3
    assert "J a token" not in text and f"{str(dtype)[6:]}, random weights" in text


def test_settings_of_devices(bench) -> None:
    module = bench("bench_engine")
    cpu, cuda = (module.Setting.on(torch.device(name)) for name in ("cpu", "cuda"))
    assert (cpu.dtype, cpu.batches, cpu.bounds) == (torch.float32, (32,), (1.25,))
    assert (cuda.dtype, cuda.batches, cuda.bounds) == (torch.bfloat16, (32, None), (1.33, 1.95))
    for setting in (cpu, cuda):
        assert setting.sizes.length == setting.prompt.most + setting.new.most
        layers = setting.sizes.num_hidden_layers
        assert (layers - 2) % 3 == 0  # middle-cycle, 3 recursions


def test_the_largest_batch_is_what_memory_holds(bench, sizes, monkeypatch) -> None:
    work = bench("engine_work")
    vanilla, _ = work.vanilla_and_llama(sizes)
    request = 3 * 8 * 16 * 2 * 2 * 8 * 4  # pages, layers, entries, K and V, heads, head_dim, bytes
    prompt, new = lengths(bench)  # at most 40 tokens
    for requests, batch in ((1, 1), (63.9, 32), (64, 64), (5000, 4096)):
        free = int(requests * request / work.FREE_FOR_KV)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free + 9, 0))
        assert work.largest_batch(vanilla, prompt, new) == batch


class NVMLError(Exception):
    pass


def nvml(**changed: Any) -> ModuleType:
    """A stand-in for pynvml, of a GPU that uses 5 J between any two looks."""
    module = ModuleType("pynvml")
    counter = itertools.count(1000, 5000)
    handles = {"GPU-a-b": "handle"}
    functions = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": handles.__getitem__,
        "nvmlDeviceGetTotalEnergyConsumption": lambda handle: next(counter),
    }
    vars(module).update(NVMLError=NVMLError, **functions | changed)
    return module


def test_energy_is_read_where_it_can_be(bench, monkeypatch) -> None:
    energy, module = bench("energy").Energy, bench("bench_engine")
    cuda = torch.device("cuda")
    properties = SimpleNamespace(uuid="a-b")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    meter = energy(cuda)
    assert meter.missing is None
    turn = module.timed(lambda: 10, cuda, meter)
    assert turn["joules"] == 5 and turn["tokens"] == 10
    report = bench("engine_report")
    jobs = {"vanilla": {"facts": None, "turns": [turn, turn]}}
    header, _, row = report.speeds([{"title": "some", "jobs": jobs}]).splitlines()
    assert [line.split("|")[-2].strip() for line in (header, row)] == ["J a token", "0.5"]

    def refuse(*_: Any) -> None:
        raise NVMLError("Not Supported")

    monkeypatch.setitem(sys.modules, "pynvml", nvml(nvmlDeviceGetTotalEnergyConsumption=refuse))
    assert (energy(cuda).missing, energy(cuda).joules()) == ("NVML: Not Supported", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy(cuda).missing == "nvidia-ml-py is not installed"
    assert energy(torch.device("cpu")).missing == "no counter for cpu"


def test_forced_depths_have_the_shares_of_the_capacities(bench, sizes, seed) -> None:
    work = bench("engine_work")
    tokens = work.random_tokens(sizes)
    requests = work.requests_of(40, tokens, *lengths(bench))
    for depthwise in (True, False):
        job = work.EngineJob(work.forced_mor(sizes), requests, 8, 1, depthwise=depthwise)
        results = job.run(job.engine.step)
        assert sum(len(result.tokens) for result in results) == requests.total_new
        depth = torch.tensor([depth for result in results for depth in result.depth])
        spread = 4 / len(depth) ** 0.5
        for passes, share in enumerate(work.CAPACITY, 1):
            assert (depth >= passes).double().mean() == pytest.approx(share, abs=spread)


def test_a_steady_job_ends_when_none_waits(bench, sizes, seed) -> None:
    work = bench("engine_work")
    requests = work.requests_of(12, work.random_tokens(sizes), *lengths(bench))
    job = work.EngineJob(work.forced_mor(sizes), requests, 4, 1, steady=True)
    for _ in range(2):
        results = job.run(job.engine.step)
        assert len(results) == 12
        cancelled = sum(result.finish_reason == "cancelled" for result in results)
        assert 0 < cancelled <= 4
        job.engine.step()  # takes note of who was cancelled
        assert not job.engine.busy and job.engine.statistics().blocks_used == 0


def test_vanilla_and_transformers_do_the_same(bench, sizes, seed) -> None:
    """In fp64, so that rounding does not choose between the two best tokens."""
    work = bench("engine_work")
    vanilla, theirs = (model.double() for model in work.vanilla_and_llama(sizes))
    requests = work.requests_of(3, work.random_tokens(sizes), *lengths(bench))
    job = work.EngineJob(vanilla, requests, 2, 0)
    assert job() == work.transformers_job(theirs, requests)() == requests.total_new
    results = sorted(job.run(job.engine.step), key=lambda result: result.request)
    for prompt, new, result in zip(requests.prompts, requests.new, results, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),  # else zeros of the prompt are padding
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        assert prompt + result.tokens == expected[0].tolist()


def test_lengths_keep_to_their_distribution(bench) -> None:
    some = bench("engine_work").Lengths(48, 1.0, 8, 384)
    generator = random.Random(1)
    drawn = sorted(some.draw(generator) for _ in range(2000))
    assert drawn[0] == 8 and drawn[-1] == 384
    assert drawn[1000] == pytest.approx(48, rel=0.15)


def test_ratios_are_judged(bench) -> None:
    """Made-up times: a round in which the machine was busy changes no ratio."""
    module = bench("bench_engine")
    facts = {"kv_bytes": 100.0, "scheduler_share": 0.02}

    def entry(seconds: list[float], **changed: float) -> dict:
        turns = [{"tokens": 10, "seconds": s, "cpu": 2 * s} for s in seconds]
        return {"turns": turns, "facts": facts | changed}

    found = {
        module.VANILLA: entry([1.3, 6.5, 1.3]),
        module.MOR: entry([1.0, 5.0, 1.0], kv_bytes=73.0, scheduler_share=0.04),
    }
    outcomes = [goal.outcome(found) for goal in module.mor_goals(1.25)]
    assert {o["what"]: (o["measured"], o["met"]) for o in outcomes} == {
        "tokens/s, MoR / vanilla": (pytest.approx(1.3), True),
        "KV bytes a token, MoR / vanilla": (pytest.approx(0.73), False),
        "scheduler's share, MoR": (0.04, False),
        "scheduler's share, vanilla": (0.02, True),
    }


def test_command_line(bench, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_engine.py", "--trained", "somewhere"])
    with pytest.raises(SystemExit):
        bench("bench_engine").main()
    assert "--trained and --text must be given together" in capsys.readouterr().err
