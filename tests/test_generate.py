"""Stock `generate` on an extended model: every decoding mode equals what full forwards give."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import longreach
from families import build, tokens
from longreach import BlockSelfExtend, DualChunk, LMInfinite, LogisticSelfExtend, SelfExtend, StreamingLLM
from longreach.hf.cache import store_of


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert not a.isnan().any()
    assert ((a - b).abs().max() / b.abs().max()).item() <= 1e-5


METHODS = [
    SelfExtend(3, 8),
    LMInfinite(9, 3),
    LMInfinite(9, 3, top_k=2, top_k_from_layer=0, top_k_rows="all"),
    SelfExtend(3, 8, above=20),
    StreamingLLM(9, 3),
    DualChunk(16),
    BlockSelfExtend(3, 12),
    LogisticSelfExtend(8, growth=0.3, largest_group=6),
]
NEW = 25
NEVER = 10_000  # an end token that no model makes; older releases want one


@pytest.fixture(scope="module")
def model():
    model = build("llama", eos_token_id=None)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=NEVER)
    return model


@torch.no_grad()
def greedy_by_full_forwards(model, ids: torch.Tensor, new: int = NEW) -> torch.Tensor:
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_greedy(model, method):
    ids = tokens(2, 40)
    with longreach.extend(model, method):
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), greedy_by_full_forwards(model, ids))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_chunked_prefill(model, method, chunk):
    ids = tokens(2, 40)
    with longreach.extend(model, method):
        whole = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=chunk), whole)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_left_padded_batch_equals_single_rows(model, method):
    ids = tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[0, :17], mask[2, :39] = 0, 0
    with longreach.extend(model, method):
        batch = model.generate(ids * mask, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        for row in range(3):
            real = ids[row : row + 1, int((1 - mask[row]).sum()) :]
            assert torch.equal(batch[row, -NEW:], model.generate(real, max_new_tokens=NEW, do_sample=False)[0, -NEW:])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_sampling_is_that_of_full_forwards(model, method):
    """The cached run and a run without cache draw the same tokens from the same seed."""
    ids = tokens(1, 40)
    with longreach.extend(model, method):
        torch.manual_seed(5)
        cached = model.generate(ids, max_new_tokens=NEW, do_sample=True, temperature=0.7, top_k=20)
        torch.manual_seed(5)
        assert torch.equal(cached, model.generate(ids, max_new_tokens=NEW, do_sample=True, temperature=0.7, top_k=20, use_cache=False))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_beam_search(model, method):
    ids = tokens(2, 40)
    with longreach.extend(model, method):
        cached = model.generate(ids, max_new_tokens=NEW, num_beams=3, do_sample=False)
        assert torch.equal(cached, model.generate(ids, max_new_tokens=NEW, num_beams=3, do_sample=False, use_cache=False))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_prompt_lookup_decoding(model, method):
    ids = tokens(1, 12).repeat(1, 4)
    with longreach.extend(model, method):
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=5), greedy_by_full_forwards(model, ids))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("assistant_extended", [False, True])
def test_assisted_decoding(model, method, assistant_extended):
    """Two extended models in one process do not meet; a poor assistant forces rollbacks."""
    assistant = build("llama", num_hidden_layers=1, eos_token_id=None)
    assistant.generation_config = GenerationConfig(pad_token_id=0)
    ids = tokens(1, 40)
    with longreach.extend(model, method):
        want = greedy_by_full_forwards(model, ids)
        extension = longreach.extend(assistant, SelfExtend(2, 16)) if assistant_extended else None
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, assistant_model=assistant), want)
        if extension is not None:
            extension.remove()


@pytest.mark.parametrize("family", ["mistral-sliding", "gemma3", "gpt-oss"])
def test_sliding_models_decode_exactly(family):
    """`generate` hands these models a cache that drops keys; ours takes its place."""
    model = build(family, eos_token_id=None)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=NEVER)
    ids = tokens(2, 60)
    with longreach.extend(model, SelfExtend(3, 8)):
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False), greedy_by_full_forwards(model, ids))
        looked_up = model.generate(ids[:1], max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=4)
        assert torch.equal(looked_up[:, : 60 + NEW], greedy_by_full_forwards(model, ids[:1]))  # older releases give one token more, stock too


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_turns_on_one_cache(model, method):
    """A conversation: each turn appends to the cache of the one before."""
    ids = tokens(1, 30)
    with longreach.extend(model, method):
        cache, text = DynamicCache(), ids
        for turn in range(3):
            text = torch.cat([text, tokens(1, 9, seed=turn)], 1)
            answer = model.generate(text, past_key_values=cache, max_new_tokens=6, do_sample=False)
            assert torch.equal(answer, greedy_by_full_forwards(model, text, 6))
            assert store_of(cache).seen == answer.shape[1] - 1
            text = answer


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_crop_within_the_rollback_leaves_no_trace(model, method):
    ids = tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[1, 3:8] = 0  # the second row's text begins with three tokens, then pads of a turn
    with longreach.extend(model, method):
        cache = model(ids[:, :60], attention_mask=mask[:, :60], use_cache=True).past_key_values
        model(tokens(2, 30, seed=9), attention_mask=mask, past_key_values=cache)
        cache.crop(-30)
        after = model(ids[:, 60:], attention_mask=mask, past_key_values=cache).logits
        fresh = model(ids[:, :60], attention_mask=mask[:, :60], use_cache=True).past_key_values
        want = model(ids[:, 60:], attention_mask=mask, past_key_values=fresh).logits
        assert_close(after, want)


@torch.no_grad()
def test_a_forward_that_raises_leaves_the_cache_usable(model):
    ids = tokens(1, 30)
    with longreach.extend(model, SelfExtend(3, 8)):
        cache = model(ids[:, :20], use_cache=True).past_key_values
        layer = model.model.layers[1].mlp
        hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            model(ids[:, 20:25], past_key_values=cache)
        hook.remove()
        after = model(ids[:, 20:], past_key_values=cache).logits
        assert_close(after, model(ids, use_cache=False).logits[:, 20:])


@torch.no_grad()
def test_batch_selection_and_expansion(model):
    ids = tokens(3, 40)
    with longreach.extend(model, LMInfinite(9, 3)):
        cache = model(ids[:, :30], use_cache=True).past_key_values
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        order = [2, 2, 0, 0]
        out = model(ids[order, 30:], past_key_values=cache).logits
        assert_close(out, model(ids[order], use_cache=False).logits[:, 30:])
        cache.reset()
        again = model(ids[:1, :30], past_key_values=cache).logits
        assert_close(again, model(ids[:1, :30], use_cache=False).logits)


@torch.no_grad()
def test_right_padding_and_rows_of_pads_only(model):
    ids = tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with longreach.extend(model, SelfExtend(3, 8)):
        out = model(ids, attention_mask=mask, use_cache=True)
        single = model(ids[1:, :12], use_cache=False).logits
        assert_close(out.logits[1:, :12], single)
        mask = torch.cat([mask, torch.tensor([[1], [1]])], 1)
        step = model(ids[:, :1], attention_mask=mask, past_key_values=out.past_key_values).logits
        want = model(torch.cat([ids[1:, :12], ids[1:, :1]], 1), use_cache=False).logits[:, -1:]
        assert_close(step[1:], want)
        mask = torch.cat([mask, torch.tensor([[0], [1]])], 1)
        step = model(ids[:, :1], attention_mask=mask, past_key_values=out.past_key_values).logits
        assert not step.isnan().any() and store_of(out.past_key_values).lengths == [31, 14]


def test_embeddings_in_place_of_ids(model):
    ids = tokens(1, 40)
    with longreach.extend(model, SelfExtend(3, 8)), torch.no_grad():
        a = model(ids).logits
        b = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert_close(a, b)
