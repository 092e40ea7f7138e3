"""``mor calibrate``: the wanted depth is what evaluation, generate() and the engine then have."""

import json
from pathlib import Path

import pytest
import torch

from mor_ext.cli import main
from mor_ext.evaluation.calibrate import Calibration, save_thresholds, shares_of, threshold_for
from mor_ext.evaluation.evaluate import evaluate
from mor_ext.inference import Engine, SamplingParams, generate
from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.training.dataset import PackedDataset, join
from mor_ext.training.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = (Path(__file__).parents[1] / "docs" / "models.md").read_text("utf-8")
VARIANTS = {  # with a depth to ask for
    "expert_choice": ({"num_recursions": 3}, 1.6),
    "aux_router": ({"num_recursions": 3, "causal_rule": "aux_router"}, 2.5),
    "sequence": ({"num_recursions": 3, "sharing": "middle_sequence"}, 4.0),
    "shared": ({"num_recursions": 3, "kv_strategy": "shared"}, 2.0),
    "mixture_of_depths": ({"routing": "mixture_of_depths", "capacity": 0.5}, 4.4),
}


def small(**fields) -> MoRForCausalLM:
    defaults = {
        "vocab_size": 257,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # large enough that logits differ
        "routing": "expert_choice",
    }
    return MoRForCausalLM(MoRConfig(**{**defaults, **fields}))


@pytest.fixture(scope="module")
def windows() -> PackedDataset:
    return PackedDataset(join(train_tokenizer("byte", [TEXT]), [TEXT]), 64, 63)


@pytest.mark.parametrize("variant", VARIANTS)
def test_wanted_depth_is_reached(variant, windows, seed) -> None:
    fields, wanted = VARIANTS[variant]
    model = small(**fields)
    setting = Calibration(model, windows, batch_size=16, limit=30).for_depth(wanted)
    assert setting.depth == pytest.approx(wanted, abs=0.02)
    assert model.config.thresholds == setting.thresholds
    found = evaluate(model, windows, 16, limit=30)
    assert found.causal is not None
    for name in ("depth", "layers", "nll", "bits_per_byte"):
        assert getattr(setting, name) == pytest.approx(getattr(found.causal, name)), name


@pytest.mark.parametrize("variant", ["sequence", "mixture_of_depths"])
def test_blocks_that_depend_on_each_other(variant, windows, seed) -> None:
    """Depth may follow what is asked for by far more or less than one to one."""
    fields, wanted = VARIANTS[variant]
    for _ in range(10):
        setting = Calibration(small(**fields), windows, batch_size=16, limit=20).for_depth(wanted)
        assert setting.depth == pytest.approx(wanted, abs=0.02)


def test_saved_thresholds_hold_wherever_the_model_runs(windows, tmp_path, seed) -> None:
    model = small(num_recursions=3)
    model.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "config.json").read_text())
    prompt = windows[0]["input_ids"][:20]
    for wanted in (1.3, 2.7):
        setting = Calibration(model, windows, limit=20).for_depth(wanted)
        save_thresholds(tmp_path, setting.thresholds)
        after = json.loads((tmp_path / "config.json").read_text())
        assert after == before | {"thresholds": list(setting.thresholds)}
        loaded = MoRForCausalLM.from_pretrained(tmp_path).eval()
        depth = model(windows[3]["input_ids"][None]).depth
        assert torch.equal(loaded(windows[3]["input_ids"][None]).depth, depth)
        assert depth.float().mean() == pytest.approx(wanted, abs=0.5)
        (cached,) = generate(loaded, [prompt], 20, temperature=0)
        params = SamplingParams(max_new_tokens=20, temperature=0)
        (result,) = Engine(loaded).generate([prompt.tolist()], params, progress=False)
        assert result.prompt + result.tokens == cached.tokens.tolist()
        assert result.depth == cached.depth.tolist()[:-1]
        whole = loaded(cached.tokens[None]).depth[0]
        assert torch.equal(whole, cached.depth)


def test_thresholds_by_hand(windows, seed) -> None:
    """A depth that keeps everybody has none; an explicit one applies there too."""
    model = small(num_recursions=3).eval()
    ids = windows[0]["input_ids"][None, :60]
    assert int(model(ids).depth.min()) == 1
    two_more = SamplingParams(max_new_tokens=2, ignore_eos=True)
    for thresholds, depths in {
        (None, -1e9, -1e9): {3},
        (None, 1e9, None): {1},
        (1e9, None, None): {0},
        (-1e9, -1e9, 1e9): {2},
    }.items():
        model.set_thresholds(thresholds)
        assert set(model(ids).depth.unique().tolist()) == depths
        (result,) = Engine(model).generate(ids.tolist(), two_more, progress=False)
        assert set(result.depth) == depths
    training = model(ids, causal=False).depth
    model.set_thresholds((None, None, None))
    assert torch.equal(model(ids, causal=False).depth, training)


def test_default_is_zero(windows, seed) -> None:
    model = small(num_recursions=3).eval()
    depth = model(windows[0]["input_ids"][None]).depth
    model.set_thresholds((None, 0.0, 0.0))
    assert torch.equal(model(windows[0]["input_ids"][None]).depth, depth)


def test_shares() -> None:
    assert shares_of((1.0, 2 / 3, 1 / 3), 2.0) == pytest.approx([1, 2 / 3, 1 / 3])
    for total in (1.01, 1.5, 2.9):
        shares = shares_of((1.0, 0.5, 0.25), total)
        assert sum(shares) == pytest.approx(total)
        assert shares[2] == pytest.approx(shares[1] ** 2)  # 0.25 is 0.5 squared
    assert shares_of((1.0, 0.5, 1.0), 1.6) == pytest.approx([1, 0.3, 0.3])


def test_threshold_is_a_quantile(seed) -> None:
    logits = torch.randn(1000)
    for share in (0.001, 0.1, 0.5, 1.0):
        kept = logits >= threshold_for(logits, share)
        assert int(kept.sum()) == share * 1000
    assert int((logits >= threshold_for(logits, 1e-9)).sum()) == 1


@pytest.mark.parametrize("routing", ["none", "token_choice", "action", "random", "fixed_depth"])
def test_models_without_thresholds_are_refused(routing, windows) -> None:
    recursions = {"num_recursions": 2, "routing": routing}
    model = small(**recursions, **({"fixed_depth": 1} if routing == "fixed_depth" else {}))
    with pytest.raises(ValueError, match=f"thresholds can be chosen, got '{routing}'"):
        Calibration(model, windows)
    with pytest.raises(ValueError, match=f"thresholds must be None for routing '{routing}'"):
        model.set_thresholds((0.0, 0.0))


def test_wrong_thresholds_are_refused(windows) -> None:
    for wrong in ((0.0, 0.0), (0.0, float("inf"), 0.0), (0.0, float("nan"), 0.0)):
        with pytest.raises(ValueError, match="thresholds must be 3 finite numbers or None"):
            small(num_recursions=3, thresholds=wrong)
    with pytest.raises(ValueError, match="depth must be between 1 and 3, got 3"):
        Calibration(small(num_recursions=3), windows).for_depth(3)
    with pytest.warns(UserWarning, match="no causal rule"):
        model = small(num_recursions=3, causal_rule="none")
    with pytest.raises(ValueError, match="must have a causal rule"):
        Calibration(model, windows)


def test_command(tmp_path, capsys, seed) -> None:
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    small(num_recursions=3).save_pretrained(folder)
    train_tokenizer("byte", [TEXT]).save_pretrained(folder)
    base = ["calibrate", str(folder), "--text", str(text), "--windows", "20", "--depth"]
    report, picture = tmp_path / "report.json", tmp_path / "picture.png"
    files = ["--json", str(report), "--picture", str(picture)]
    assert main([*base, "1.5", "2.5", *files, "--save", "1.5"]) == 0
    as_it_is, low, high = json.loads(report.read_text())["settings"]
    assert as_it_is["wanted"] is None
    assert low["depth"] == pytest.approx(1.5, abs=0.02)
    assert high["depth"] == pytest.approx(2.5, abs=0.02)
    assert low["layers"] == pytest.approx(2 + 2 * low["depth"])
    assert picture.read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert f"{low['bits_per_byte']:.4f}" in out
    assert "now has the thresholds of depth 1.5" in " ".join(out.split())
    config = MoRForCausalLM.from_pretrained(folder).config
    assert list(config.thresholds) == low["thresholds"]

    assert main([*base, "1.5", "--save", "2"]) == 2
    assert "--save must be one of --depth 1.5, got 2" in capsys.readouterr().err
    assert main([*base, "4"]) == 2
    assert "depth must be between 1 and 3, got 4" in capsys.readouterr().err
