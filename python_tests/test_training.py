"""Training on bytes: data, schedule, and that a model learns more than byte pairs."""

import math
from pathlib import Path

import pytest
import torch

from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.models.config import CHOICES
from mor_ext.training import (
    Recipe,
    Text,
    bigram_nll,
    evaluate,
    keep_freed_memory,
    read_text,
    routing_shares,
    stdlib_text,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SHAKESPEARE = Path(__file__).parents[2] / "shared/data/tinyshakespeare/input.txt"


def shallow(**fields) -> MoRForCausalLM:
    return MoRForCausalLM(
        MoRConfig(
            **{
                "hidden_size": 96,
                "intermediate_size": 264,
                "num_attention_heads": 3,
                "num_key_value_heads": 1,
                "initializer_range": 0.1,
                "num_recursions": 3,
                "routing": "expert_choice",
                **fields,
            }
        )
    )


def learns_more_than_byte_pairs(data: bytes) -> None:
    text = Text.split(data)
    windows = text.windows(128, count=64)
    torch.manual_seed(0)
    model = shallow()
    losses = list(train(model, text, Recipe(120, 16, 128, learning_rate=6e-3)))
    result = evaluate(model, windows)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert result.nll < bigram_nll(text, windows)
    assert 1 < result.depth < 3
    assert result.agreement > 0.5


def test_mor_learns_more_of_source_code_than_byte_pairs():
    learns_more_than_byte_pairs(stdlib_text(2_000_000))


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="no Tiny Shakespeare beside the repository")
def test_mor_learns_more_of_shakespeare_than_byte_pairs():
    learns_more_than_byte_pairs(SHAKESPEARE.read_bytes())


@pytest.mark.parametrize("routing", CHOICES["routing"])
@pytest.mark.parametrize("kv_strategy", CHOICES["kv_strategy"])
def test_every_variant_learns_one_batch(routing, kv_strategy):
    text = Text.split(b"the quick brown fox jumps over the lazy dog " * 4)
    torch.manual_seed(0)
    special = {"mixture_of_depths": {"num_recursions": 1}, "fixed_depth": {"fixed_depth": 2}}
    model = shallow(
        hidden_size=48,
        num_attention_heads=3,
        routing=routing,
        kv_strategy=kv_strategy,
        **special.get(routing, {}),
    )
    losses = list(train(model, text, Recipe(50, 2, 40, learning_rate=1e-2)))
    assert losses[0] > 5 and losses[-1] < 1


def test_training_repeats_with_the_seed():
    text = Text.split(bytes(range(256)) * 8)

    def run(seed: int) -> list[float]:
        torch.manual_seed(0)
        return list(train(shallow(), text, Recipe(3, 2, 32, seed=seed)))

    assert run(1) == run(1) != run(2)


def test_learning_rate_warms_up_and_decays():
    recipe = Recipe(steps=101, learning_rate=1.0, warmup=0.1, final=0.1)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 91)))
    assert 0.1 < rates[100] < 0.11


def test_the_split_and_its_windows():
    text = Text.split(bytes(range(100)), held_out=0.3)
    assert text.train.tolist() == list(range(70))
    assert text.windows(8, count=2).tolist() == [list(range(70, 78)), list(range(78, 86))]
    assert text.windows(8, count=9).shape == (3, 8)  # as many as there are
    batch = text.batch(50, 8, torch.Generator().manual_seed(0))
    assert (batch.diff(dim=1) == 1).all() and batch.max() <= 69
    assert len(set(batch[:, 0].tolist())) > 20


def test_bigram_table_by_hand():
    """Of "abab": a -> b twice, b -> a once; 256 pairs of each first byte have 1 added."""
    text = Text(torch.tensor(list(b"abab"), dtype=torch.uint8), torch.tensor([]))
    windows = torch.tensor([list(b"abb")])
    expected = -(math.log(3 / 258) + math.log(1 / 257)) / 2
    assert bigram_nll(text, windows, smoothing=1.0) == pytest.approx(expected)


def test_text_of_the_standard_library():
    data = stdlib_text(300_000)
    assert len(data) == 300_000
    assert data == stdlib_text(300_000)
    assert data.count(b"import ") > 20


def test_text_that_is_too_short(tmp_path):
    (tmp_path / "short.txt").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"short.txt must have at least 10 bytes, got 3"):
        read_text(tmp_path / "short.txt", least=10)


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_routing_shares(routing):
    model, ids = shallow(routing=routing), torch.randint(256, (2, 64))
    shares = routing_shares(lambda: model(ids, labels=ids).loss.backward())
    assert all(share > 0 for share in shares.values()) and sum(shares.values()) < 0.9


def test_keeping_freed_memory_is_harmless():
    keep_freed_memory()
    assert torch.ones(1 << 20).sum() == 1 << 20
