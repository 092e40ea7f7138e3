"""Beam search in the engine: the beams of transformers, each token computed once."""

import pytest
import torch
from test_engine import STRATEGIES, VOCAB
from test_models import small
from transformers import LogitsProcessorList

from mor_ext.inference import Beam, Engine, SamplingParams, beam_search
from mor_ext.models import MoRForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
EOS = [3, 14, 15, 9, 26, 5, 35]


def prompt_of(length: int) -> list[int]:
    return torch.randperm(VOCAB)[:length].tolist()  # equal tokens at the start could tie


def likely_to_end(routing: str, kv_strategy: str) -> MoRForCausalLM:
    """Ends some of its continuations; the others go on to the limit."""
    model = small(routing, kv_strategy, eos_token_id=EOS, tie_word_embeddings=False)
    model.lm_head.weight.data.mul_(0.3)
    return model


def expected_of(
    model: MoRForCausalLM, prompt: list[int], beams: int, new: int, **options
) -> tuple[list[list[int]], list[float]]:
    ids = torch.tensor([prompt])

    def in_fp64(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Instead of what transformers has rounded to fp32, where beams could tie."""
        return model(ids).logits[:, -1].log_softmax(-1)

    found = model.generate(
        ids,
        logits_processor=LogitsProcessorList([in_fp64]),
        attention_mask=torch.ones_like(ids),
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        max_new_tokens=new,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    rows = [row[len(prompt) :] for row in found.sequences.tolist()]
    ends = [next((i + 1 for i, token in enumerate(row) if token in EOS), new) for row in rows]
    return [row[:end] for row, end in zip(rows, ends, strict=True)], found.sequences_scores.tolist()


def assert_same(
    model: MoRForCausalLM, engine: Engine, prompt: list[int], beams: int, new: int, **options
) -> list[Beam]:
    sequences, scores = expected_of(model, prompt, beams, new, **options)
    other = prompt_of(17)  # searched beside it
    actual, _ = beam_search(engine, [prompt, other], beams, new, **options)
    penalty = options.get("length_penalty", 1.0)
    assert [beam.score(penalty) for beam in actual] == pytest.approx(scores, rel=1e-9)
    assert [beam.tokens for beam in actual] == sequences
    for beam in actual:
        tokens = torch.tensor(prompt + beam.tokens)
        output = model(tokens, lengths=[len(tokens)])
        assert beam.depth == output.depth.tolist()[:-1]
        logprobs = output.logits[len(prompt) - 1 : -1].log_softmax(-1)
        total = logprobs.gather(1, tokens[len(prompt) :, None]).sum().item()
        assert beam.logprob == pytest.approx(total)
        assert beam.stopped == (beam.tokens[-1] in EOS)
    return actual


@pytest.mark.parametrize("beams", [1, 2, 5])
@pytest.mark.parametrize(
    ("routing", "kv_strategy"),
    [("none", "recursion_wise"), *(("expert_choice", kv) for kv in STRATEGIES)],
)
@torch.no_grad()
def test_beams_are_those_of_transformers(routing, kv_strategy, beams, seed):
    model = likely_to_end(routing, kv_strategy)
    engine = Engine(model, max_batch=8, num_blocks=2000)
    for length in (2, 21):
        if beams > 1:  # one is greedy there, which has no scores of sequences
            assert_same(model, engine, prompt_of(length), beams, 8)
        else:
            ((beam,),) = beam_search(engine, [prompt_of(length)], 1, 8)
            assert len(beam.tokens) == 8 or beam.stopped
    assert engine.statistics().blocks_used == 0


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.7, 2.5])
@torch.no_grad()
def test_ends_and_lengths_are_weighed_alike(length_penalty, early_stopping, seed):
    model = likely_to_end("expert_choice", "shared")
    engine = Engine(model, num_blocks=2000)
    options = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    found = []
    for _ in range(4):
        found += assert_same(model, engine, prompt_of(10), 3, 12, **options)
    assert length_penalty > 0 or any(beam.stopped for beam in found)  # long ones win if it is


@torch.no_grad()
def test_beams_compute_each_token_once_and_share_what_they_have_in_common(seed):
    model = likely_to_end("token_choice", "recursion_wise")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    engine = Engine(model, max_batch=4, num_blocks=4000)
    prompt, beams, new = prompt_of(40), 4, 10
    beam_search(engine, [prompt], beams, new)
    statistics = engine.statistics()
    assert statistics.tokens == len(prompt) + beams * (new - 1)
    lanes = sum(len(s.block.layers) * s.num_recursions for s in model.stages)
    # Pages of the prompt but the last once; of each beam, also of those that others have displaced,
    # one that is half the prompt's and one of its own at most.
    assert engine.scheduler.num_kept <= beams * (new - 1)
    assert statistics.blocks_kept <= lanes * (2 + 2 * engine.scheduler.num_kept)


@torch.no_grad()
def test_beams_in_company_and_little_room(seed):
    model = likely_to_end("expert_choice", "recursion_wise")
    lanes = sum(len(s.block.layers) * s.num_recursions for s in model.stages)
    engine = Engine(model, max_batch=3, num_blocks=5 * lanes, token_budget=7)
    params = SamplingParams(max_new_tokens=30, temperature=0, ignore_eos=True)
    others = [engine.submit(prompt_of(20), params) for _ in range(3)]
    assert_same(model, engine, prompt_of(30), 4, 10)
    results = {}
    while engine.busy:
        results |= {result.request: result for result in engine.step()}
    assert sorted(results) == others
    assert all(len(result.tokens) == 30 for result in results.values())
    engine.scheduler.check()


def test_what_cannot_be_searched(seed):
    engine = Engine(small("none", "shared"), num_blocks=400)
    for prompt, beams, new, message in [
        ([1, 2], 0, 4, "beams must be at least 1, got 0"),
        ([], 2, 4, "prompt must have at least one token, got none"),
        ([1] * 60, 2, 10, "prompt must have at most 54 tokens to be continued by 10, got 60"),
        ("text", 2, 4, "prompt must be tokens for an engine without a tokenizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            beam_search(engine, [[1, 2], prompt], beams, new)
    with pytest.raises(ValueError, match="early_stopping must be True, False or 'never', got 'no'"):
        beam_search(engine, [[1, 2]], 2, 4, early_stopping="no")
    with torch.no_grad():
        engine.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits must be numbers, got NaN"):
        beam_search(engine, [[1, 2, 3]], 2, 4)
    assert not engine.busy
