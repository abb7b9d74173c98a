"""An attention mask is a statement about every column it has: each is honoured as stock does, or refused with the fix."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import longreach
from families import build, tokens
from longreach import LMInfinite, SelfExtend, Stock
from longreach.hf.cache import store_of
from methods_matrix import METHODS, context, refusal

NEVER = 10_000  # an end token that no model makes
CUTTABLE = [method for method in METHODS if method.cut == 1 and method.eviction is None]
# Not BLOOM, whose stock code counts ALiBi's distances anew by each mask; here a token keeps the distance that it was read with.
STOCK = ["llama", "gemma2", "phi", "cohere", "gpt-oss", "llama4-rope", "deepseek-v2", "gptj", "falcon", "mpt"]


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    assert not a.isnan().any() and not b.isnan().any()
    return ((a - b).abs().max() / b.abs().max()).item()


def read(model, ids, mask, sizes, cache=None) -> torch.Tensor:
    """Chunks of these sizes, every one with the same mask -> the last logits."""
    cache, start = DynamicCache() if cache is None else cache, 0
    for size in sizes:
        logits = model(ids[:, start : start + size], attention_mask=mask, past_key_values=cache).logits[:, -1]
        start += size
    return logits


@pytest.mark.parametrize("method", CUTTABLE, ids=str)
@torch.no_grad()
def test_the_whole_mask_with_every_chunk(method):
    """What a mask says beyond the new columns is about tokens that are not there yet."""
    family = "llama-head8" if refusal("llama", method) else "llama"
    model, ids = build(family), tokens(2, 100)
    mask = torch.ones_like(ids)
    mask[0, :80] = 0
    with longreach.extend(model, method, context=context(method, 100)):
        alone = [model(ids[r : r + 1, mask[r].bool()]).logits[:, -1] for r in range(2)]
        cache = DynamicCache()
        chunked = read(model, ids, mask, [25] * 4, cache)
        assert store_of(cache).lengths == [20, 100]
        whole = model(ids, attention_mask=torch.cat([mask, torch.zeros(2, 60).long()], 1)).logits[:, -1]
        for got in (chunked, whole):
            assert max(off(got[r], alone[r][0]) for r in range(2)) <= 1e-5


@pytest.mark.parametrize("family", STOCK)
@pytest.mark.parametrize("kind", ["middle", "first", "scattered", "one row", "prepared"])
@torch.no_grad()
def test_hidden_cached_tokens_as_stock_hides_them(family, kind):
    """With neutral parameters a mask that hides what is in the cache gives stock's logits, and at later chunks too."""
    if (family, kind) == ("llama4-rope", "first"):
        pytest.skip("stock lets the chunks of cached tokens begin elsewhere, by a mask they were not read with; here they stay")
    model, ids = build(family), tokens(2, 52)
    mask = torch.ones(2, 52 + 12, dtype=torch.long)
    if kind == "middle":
        mask[:, 9:21] = 0
    elif kind == "first":
        mask[0, :17], mask[1, :3] = 0, 0
    elif kind == "scattered":
        mask[:, 1:39:3] = 0
    elif kind == "one row":
        mask[1, 5:30] = 0
    else:
        mask[:, 9:21] = 0
    columns = mask.shape[1] if kind == "prepared" else 52
    answers = []
    for extended in (False, True):
        extension = longreach.extend(model, SelfExtend(1, 16), trained_window=64) if extended else None
        cache = model(ids[:, :40], use_cache=True).past_key_values
        answers.append([model(ids[:, a:b], attention_mask=mask[:, : max(columns if kind == "prepared" else b, b)], past_key_values=cache).logits
                        for a, b in ((40, 41), (41, 50), (50, 52))])  # fmt: skip
        if extension:
            extension.remove()
    for ours, stock in zip(answers[1], answers[0], strict=True):
        assert off(ours, stock) <= 1e-4


@pytest.mark.parametrize("method", CUTTABLE, ids=str)
@torch.no_grad()
def test_a_right_padded_prefill_whose_pads_are_masked_later(method):
    """Tokens that are hidden at the end of a row are forgotten: what follows is as if they had never been read."""
    family = "llama-head8" if refusal("llama", method) else "llama"
    model, ids = build(family), tokens(2, 90)
    mask = torch.ones_like(ids)
    mask[0, 50:70] = 0
    with longreach.extend(model, method, context=context(method, 90)):
        alone = [model(ids[r : r + 1, mask[r].bool()]).logits[0] for r in range(2)]
        cache = model(ids[:, :70], use_cache=True).past_key_values  # no mask: the pads are read as tokens
        logits = model(ids[:, 70:80], attention_mask=mask[:, :80], past_key_values=cache).logits
        assert store_of(cache).lengths == [60, 80]
        later = read(model, ids[:, 80:], mask, [1] * 10, cache)
        assert off(logits[0], alone[0][50:60]) <= 1e-5 and off(logits[1], alone[1][70:80]) <= 1e-5
        assert max(off(later[r], alone[r][-1]) for r in range(2)) <= 1e-5


@pytest.mark.parametrize("method", [SelfExtend(1, 16), Stock()], ids=str)
def test_right_padded_prefill_then_generate_is_that_of_stock(method):
    model, ids = build("llama", eos_token_id=None), tokens(2, 30)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=NEVER)
    mask = torch.ones_like(ids)
    mask[0, 11:25] = 0
    made = []
    for extended in (False, True):
        extension = longreach.extend(model, method, trained_window=64) if extended else None
        with torch.no_grad():
            cache = model(ids[:, :25], use_cache=True).past_key_values
        made.append(model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=12, do_sample=False))
        if extension:
            extension.remove()
    assert torch.equal(*made)


@torch.no_grad()
def test_hidden_tokens_may_be_shown_again():
    model, ids = build("llama"), tokens(1, 60)
    hidden = torch.ones_like(ids)
    hidden[0, 10:30] = 0
    with longreach.extend(model, SelfExtend(3, 8)):
        plain = model(ids).logits[:, -1]
        cache = model(ids[:, :58], use_cache=True).past_key_values
        other = model(ids[:, 58:59], attention_mask=hidden[:, :59], past_key_values=cache).logits
        cache.crop(-1)
        model(ids[:, 58:59], attention_mask=torch.ones(1, 59), past_key_values=cache)
        assert off(model(ids[:, 59:], attention_mask=torch.ones(1, 60), past_key_values=cache).logits[:, -1], plain) <= 1e-5
        assert off(other[:, -1], model(ids[:, :59]).logits[:, -1]) > 1e-3


def refused(model, ids, mask, cache, sentence: str) -> None:
    """Nothing has happened to the cache, and the sentence says what to do."""
    store = store_of(cache)
    before = [*store.lengths], store.seen
    with pytest.raises(ValueError, match=sentence):
        model(ids, attention_mask=mask, past_key_values=cache)
    assert ([*store.lengths], store.seen) == before


@torch.no_grad()
def test_what_arithmetic_forbids_is_refused():
    model, ids = build("llama"), tokens(2, 300)
    padded = torch.ones_like(ids)
    padded[0, :100] = 0
    with longreach.extend(model, LMInfinite(9, 3)) as extension:
        cache = model(ids[:, :250], attention_mask=padded[:, :250], use_cache=True).past_key_values
        one = ids[:, 250:251]
        refused(model, one, torch.ones(2, 251), cache, "shows slot 0 of row 0, whose token was a pad .* keep the zeros")
        late = padded[:, :251].clone()
        late[1, 50:250] = 0
        refused(model, one, late, cache, "hides the last 200 tokens of row 1, .* pass the mask with the call that reads them")
        refused(model, one, padded[:, 249:251], cache, "does not cover 2 rows of 250 tokens seen and 1 new ones")
        refused(model, one, padded[:1, :251], cache, "does not cover")
        refused(model, one, padded[:, :251] * 3, cache, "1 where a token is seen")
        refused(model, one, (1 - padded[:, :251]) * torch.finfo(torch.float32).min, cache, "1 where a token is seen")
        refused(model, one, padded[:, :251].float() * float("nan"), cache, "1 where a token is seen")
        whole = model(ids[:, 250:], attention_mask=padded, past_key_values=extension.fork(cache)).logits
        again = model(ids[:, 250:], attention_mask=padded, past_key_values=cache).logits
        assert torch.equal(whole, again)


@torch.no_grad()
def test_pads_take_no_memory_that_grows_with_the_stream():
    model = build("llama")
    with longreach.extend(model, LMInfinite(9, 3)):
        cache, mask = DynamicCache(), torch.tensor([[0, 1], [1, 1]])
        model(tokens(2, 2), attention_mask=mask, past_key_values=cache)
        for _ in range(20):
            mask = torch.cat([mask, torch.ones(2, 50).long()], 1)
            model(tokens(2, 50), attention_mask=mask, past_key_values=cache)
        assert store_of(cache).slots.pads == [[(0, 1)], []]
        assert torch.equal(store_of(cache).real.long(), mask)
