"""Rows of a batch share a call only where everything a kernel reads agrees for them, where their buffers begin too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import longreach
from families import build, tokens
from longreach import Stock
from longreach.hf.cache import store_of
from methods_matrix import METHODS, context, refusal

# rows, each as the portions in which it is read; all end at one length, twice
PORTIONS = {
    "two": [(300, 10), (250, 60)],
    "nothing": [(310, 0), (250, 60)],
    "three": [(300, 10, 1, 40), (250, 60, 40, 1), (60, 250, 20, 21)],
    "equal neighbours": [(300, 10, 5), (300, 10, 5), (250, 60, 5), (250, 60, 5)],
}
METHODS_HERE = [m for m in METHODS if m.cut == 1 and m.eviction is None]


def padded(texts: list[torch.Tensor], right: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(text) for text in texts)
    side = lambda n: (0, n) if right else (n, 0)  # noqa: E731
    return (
        torch.stack([F.pad(text, side(width - len(text))) for text in texts]),
        torch.stack([F.pad(torch.ones_like(text), side(width - len(text))) for text in texts]),
    )


@pytest.mark.parametrize("method", METHODS_HERE, ids=str)
@pytest.mark.parametrize("portions", PORTIONS)
@torch.no_grad()
def test_rows_of_one_length_read_in_different_portions(method, portions):
    family = "llama-head8" if refusal("llama", method) else "llama"
    model, portions = build(family), PORTIONS[portions]
    texts = [tokens(1, 420, seed=row)[0] for row in range(len(portions))]
    with longreach.extend(model, method, context=context(method, 420)) as extension:
        places, mask, cache = [0] * len(texts), torch.zeros(len(texts), 0, dtype=torch.long), None
        for number, counts in enumerate(zip(*portions, strict=True)):
            ids, new = padded([text[p : p + n] for text, p, n in zip(texts, places, counts, strict=True)], right=number % 2 == 1)
            mask, places = torch.cat([mask, new], 1), [p + n for p, n in zip(places, counts, strict=True)]
            cache = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).past_key_values
        assert len(set(store_of(cache).lengths)) == 1
        cache = extension.fork(cache)
        for _ in range(3):
            ids = torch.stack([text[p : p + 1] for text, p in zip(texts, places, strict=True)])
            places, mask = [p + 1 for p in places], F.pad(mask, (0, 1), value=1)
            logits = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
        for row, text in enumerate(texts):
            alone = model(text[None, : places[row]], use_cache=False).logits[0, -1]
            assert ((logits[row] - alone).abs().max() / alone.abs().max()).item() <= 1e-5


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "llama4-rope", "mistral-sliding"])
@torch.no_grad()
def test_layers_that_stay_as_trained(family):
    """Sliding and chunked layers keep a bounded tail of their own."""
    model, texts = build(family), [tokens(1, 320, seed=row)[0] for row in range(2)]
    with longreach.extend(model, Stock()):
        ids, mask = padded([texts[0][:300], texts[1][:250]], right=False)
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        ids, new = padded([texts[0][300:310], texts[1][250:310]], right=False)
        mask = torch.cat([mask, new], 1)
        model(ids, attention_mask=mask, past_key_values=cache)
        logits = model(torch.stack([t[310:] for t in texts]), attention_mask=F.pad(mask, (0, 10), value=1), past_key_values=cache).logits
        for row, text in enumerate(texts):
            alone = model(text[None], use_cache=False).logits[0, 310:]
            assert ((logits[row] - alone).abs().max() / alone.abs().max()).item() <= 1e-5


@torch.no_grad()
def test_neighbours_of_one_kind_share_a_call():
    """So that a batch of equal rows stays one call, whatever its other rows do."""
    model, ids = build("llama"), tokens(4, 30)
    mask = torch.ones_like(ids)
    mask[3, :7] = 0
    extension = longreach.extend(model, Stock())
    calls = []
    extension.facts.base.layers[0].self_attn.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs["attention_mask"].groups), with_kwargs=True)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    model(ids[:, :1], attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=cache)
    assert [[(g.rows.start, g.rows.stop, g.start) for g in groups] for groups in calls] == [[(0, 3, 0), (3, 4, 0)], [(0, 3, 30), (3, 4, 23)]]
