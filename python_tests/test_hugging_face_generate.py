"""generate() of Hugging Face: what it decodes is what forward passes without a cache say."""

import pytest
import torch
from test_hugging_face import every_routing, every_strategy, small
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, pipeline

from mor_ext.inference import PagedKV
from mor_ext.models import MoRForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 5  # tokens


def prompts() -> tuple[Tensor, Tensor]:
    """Ids ``[3, 9]``, padded on the left with random ones, and their mask."""
    mask = torch.tensor([[0] * (9 - length) + [1] * length for length in (5, 9, 2)])
    return torch.randint(50, (3, 9)), mask


def generated(model: MoRForCausalLM, ids: Tensor, mask: Tensor | None = None, **fields):
    if mask is None:
        mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **fields)


@torch.no_grad()
def likeliest(model: MoRForCausalLM, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[batch, NEW]``: what a pass without a cache says where the last NEW tokens of ids are."""
    if mask is not None:
        mask = torch.cat([mask, torch.ones(len(ids), NEW, dtype=torch.long)], dim=1)
    return model(ids, attention_mask=mask).logits.argmax(-1)[:, -NEW - 1 : -1]


@every_strategy
@every_routing
def test_greedy_takes_the_likeliest_tokens(routing, kv_strategy, seed):
    model = small(routing, kv_strategy).double()
    ids, mask = prompts()
    for use_cache in (True, False):
        result = generated(model, ids, mask, do_sample=False, use_cache=use_cache)
        assert torch.equal(result[:, :-NEW], ids)
        assert torch.equal(result[:, -NEW:], likeliest(model, result, mask))


@every_strategy
@every_routing
def test_beams_and_samples_need_no_cache_to_be_the_same(routing, kv_strategy, seed):
    model = small(routing, kv_strategy).double()
    ids, mask = prompts()
    for fields in (
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 20},
    ):
        results = []
        for use_cache in (True, False):
            torch.manual_seed(seed)
            results.append(generated(model, ids, mask, use_cache=use_cache, **fields))
        assert results[0].shape == (6, 9 + NEW)
        assert torch.equal(*results)


def test_beams_find_a_likelier_sequence_than_greedy(seed):
    """Every beam there is: the likeliest pair of tokens, by trying all."""
    model = small("expert_choice", vocab_size=6).double()
    ids = torch.randint(6, (1, 5))
    beams = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, num_beams=6, do_sample=False
    )
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    with torch.no_grad():
        logits = model(torch.cat([ids.expand(36, 5), pairs], dim=1)).logits.log_softmax(-1)
    scores = logits[:, 4:6].gather(2, pairs.unsqueeze(2)).sum(dim=(1, 2))
    assert torch.equal(beams[0, 5:], pairs[scores.argmax()])


def test_samples_repeat_with_a_seed(seed):
    model = small("expert_choice")
    ids, mask = prompts()
    results = []
    for s in (seed, seed, seed + 1):
        torch.manual_seed(s)
        results.append(generated(model, ids, mask, do_sample=True))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@every_routing
def test_logits_and_scores_can_be_returned(routing, seed):
    model = small(routing).double()
    ids, mask = prompts()
    output = generated(
        model,
        ids,
        mask,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
    )
    full_mask = torch.cat([mask, torch.ones(3, NEW, dtype=torch.long)], dim=1)
    logits = model(output.sequences, attention_mask=full_mask).logits
    torch.testing.assert_close(torch.stack(output.logits, dim=1), logits[:, 8:-1].float())
    assert len(output.scores) == NEW
    assert isinstance(output.cache, PagedKV)
    assert output.cache.get_seq_length() == 9 + NEW - 1


def test_a_returned_cache_goes_on(seed):
    model = small("expert_choice").double()
    ids = torch.randint(50, (2, 6))
    first = generated(model, ids, do_sample=False, return_dict_in_generate=True)
    mask = torch.ones_like(first.sequences)
    going_on = generated(model, first.sequences, mask, do_sample=False, cache=first.cache)
    again = generated(model, first.sequences, mask, do_sample=False)
    assert torch.equal(going_on, again)


@every_strategy
@every_routing
def test_positions_go_on_from_the_cache(routing, kv_strategy, seed):
    """A padded prefill, a chunk and single tokens give the logits of one pass."""
    model = small(routing, kv_strategy).double()
    ids, mask = prompts()
    ids = torch.cat([ids, torch.randint(50, (3, 6))], dim=1)
    mask = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], dim=1)
    full, cache, logits, start = model(ids, attention_mask=mask), None, [], 0
    for end in (9, 12, 13, 14, 15):
        chunk = model(ids[:, start:end], attention_mask=mask[:, :end], cache=cache, use_cache=True)
        cache, start = chunk.cache, end
        logits.append(chunk.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), full.logits)


@every_strategy
def test_sequences_of_a_cache_can_change_places(kv_strategy, seed):
    """Beams go on from each other's past; here sequences of different lengths do too."""
    model = small("token_choice", kv_strategy).double()
    ids, mask = prompts()
    order = torch.tensor([1, 0, 1])
    new = torch.randint(50, (3, 2))
    cache = model(ids, attention_mask=mask, use_cache=True).cache
    cache.reorder_cache(order)
    full_ids = torch.cat([ids[order], new], dim=1)
    full_mask = torch.cat([mask[order], torch.ones_like(new)], dim=1)
    logits = model(new, attention_mask=full_mask, cache=cache).logits
    full = model(full_ids, attention_mask=full_mask).logits
    torch.testing.assert_close(logits, full[:, -2:])


def test_the_last_logits_alone_are_the_last(seed):
    model = small("expert_choice").double()
    ids, mask = prompts()
    logits = model(ids, attention_mask=mask).logits
    for kept in (1, 4):
        few = model(ids, attention_mask=mask, logits_to_keep=kept).logits
        torch.testing.assert_close(few, logits[:, -kept:])


def test_sequences_end_at_the_end_token(seed):
    """One that has ended is padded, and takes no part in what the others become."""
    model = small("token_choice").double()
    ids, mask = prompts()
    free = generated(model, ids, mask, do_sample=False)
    end = free[0, 10].item()  # the second token of the first sequence
    result = generated(model, ids, mask, do_sample=False, eos_token_id=end, pad_token_id=0)
    for row, whole in zip(result, free, strict=True):
        new = whole[9:].tolist()
        length = new.index(end) + 1 if end in new else NEW
        expected = new[:length] + [0] * (len(row) - 9 - length)
        assert row[9:].tolist() == expected


def test_generation_that_does_not_fit_is_an_error(seed):
    model = small("expert_choice")
    with pytest.raises(ValueError, match="lengths must be at most 64, got 65"):
        model.generate(torch.randint(50, (1, 60)), max_new_tokens=10, do_sample=False)


def test_a_model_without_a_causal_rule_cannot_generate(seed):
    with pytest.warns(UserWarning, match="it cannot generate"):
        model = small("expert_choice", causal_rule="none")
    with pytest.raises(ValueError, match="causal must be False for a model without a causal rule"):
        generated(model, torch.randint(50, (1, 5)))


def test_a_text_pipeline_continues_batches_of_text(seed):
    vocab = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz .")}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=".", padding_side="left")
    model = small("expert_choice", vocab_size=28)
    write = pipeline("text-generation", model=model, tokenizer=fast)
    texts = ["to be or", "a"]
    pad = vocab["."]  # decoding leaves it out
    fields = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [pad]}
    results = write(texts, batch_size=2, **fields)
    for text, (result,) in zip(texts, results, strict=True):
        ids = torch.tensor([[vocab[letter] for letter in result["generated_text"]]])
        assert result["generated_text"].startswith(text) and ids.shape == (1, len(text) + NEW)
        logits = model(ids).logits[:, -NEW - 1 : -1]
        logits[..., pad] = -torch.inf
        assert torch.equal(ids[:, -NEW:], logits.argmax(-1))


def test_generation_can_start_from_embeddings(seed):
    model = small("expert_choice").double()
    ids, mask = prompts()
    expected = generated(model, ids, mask, do_sample=False)[:, 9:]
    embeds = model.embed_tokens(ids)
    fields = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    assert torch.equal(model.generate(inputs_embeds=embeds, **fields), expected)


def test_positions_cannot_be_given(seed):
    """They follow from the mask."""
    ids = torch.randint(50, (1, 5))
    with pytest.raises(TypeError, match="unexpected keyword argument 'position_ids'"):
        generated(small("none"), ids, position_ids=torch.arange(5)[None])
