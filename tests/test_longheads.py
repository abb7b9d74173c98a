"""LongHeads: which keys each head reads at which places, the oracle of the specification, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import longreach
from families import build, tokens
from longreach import LongHeads
from longreach.core.choice import Past
from longreach.core.encodings import Rotary
from longreach.engine import reference
from longreach.methods.longheads import Pooled
from test_matrix import chunked, difference


def scored(values: list[float], queries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summaries of one dim that queries of 1 score so."""
    return torch.ones(1, 1, queries, 1), torch.tensor(values).view(1, 1, -1, 1)


@pytest.mark.parametrize(("own", "want"), [(4, [0, 2, 3]), (5, [0, 2, 4]), (6, [0, 2, 5])])
def test_the_index_oracle(own, want):
    """w = 2, K = 4: the first and the latest complete chunk, and the best of the others (scores .1 .9 .3 .5 .2 of chunks 1 to 5)."""
    q, compared = scored([0.0, 0.1, 0.9, 0.3, 0.5, 0.2], 1)
    candidates = (torch.arange(6) < own).view(1, 1, 6)
    ids = Pooled(3).choose(q, Past(compared, candidates, torch.ones(1, 1, 1, dtype=torch.bool)))
    assert sorted(ids.flatten().tolist()) == want


def test_hidden_chunks_are_not_chosen_and_the_chunk_before_them_is_the_latest():
    q, compared = scored([9.0, 0.1, 0.9, 0.3, 0.5, 0.2], 1)
    candidates = torch.tensor([False, True, True, True, True, False]).view(1, 1, 6)
    ids = Pooled(3).choose(q, Past(compared, candidates, torch.ones(1, 1, 1, dtype=torch.bool)))
    assert sorted(ids.flatten().tolist()) == [2, 3, 4]


def test_a_representation_is_that_of_the_paper():
    """Of one head, by loops."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    out = torch.stack([sum(w * x for w, x in zip(torch.softmax(k @ row / 2, 0), v)) for row in q]).mean(0)
    want = sum(w * x for w, x in zip(torch.softmax(k @ out / 2, 0), k))
    found = Pooled(3).summarise(*(x.view(1, 1, 1, 3, 4) for x in (k,)), q=q.view(1, 1, 1, 3, 4), v=v.view(1, 1, 1, 3, 4), scale=0.5)
    assert torch.allclose(found.flatten(), want, atol=1e-6)


def test_chosen_keys_follow_each_other():
    """w = 2, A = 8, B = 8. Token 9 reads chunks 0, 2 and 3 and itself: keys 0 1 4 5 6 7 8 9 at 0 .. 7, the query at 7."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 1, 12, 4) for _ in range(3))
    dense = reference.forward(q, k, Rotary(torch.tensor([1.0, 0.1], dtype=torch.float64)), 0.5)
    dense.__dict__["v"] = v.double()
    distance = LongHeads(8, 8, 2).truth(dense)[0, 0]
    for t in range(8):
        assert distance[t, : t + 1].tolist() == list(range(t, -1, -1)) and bool(distance[t, t + 1 :].isnan().all())
    for t in range(8, 12):
        seen = (~distance[t].isnan()).nonzero()[:, 0].tolist()
        own, last = t // 2, len(seen) - 1
        chunks = {j // 2 for j in seen}
        assert {0, own - 1, own} <= chunks and len(chunks) == 4 and last == 6 + t % 2 and seen[-1] == t
        assert distance[t][seen].tolist() == list(range(last, -1, -1))


@torch.no_grad()
def test_cuts_and_decoding_do_not_matter_where_queries_choose_alone():
    model, ids = build("llama"), tokens(2, 90)
    with longreach.extend(model, LongHeads(12, 10, 3)) as extension:
        whole = model(ids, use_cache=False).logits
        assert difference(chunked(model, ids, [7, 5, 31, 1, 1, 14, *[1] * 31]), whole) <= 1e-5
        assert extension.method.cut == 1
    with longreach.extend(model, LongHeads(18, 18, 6, together=3), backend="reference"):
        truth = chunked(model, ids, [60, *[1] * 30])
    with longreach.extend(model, LongHeads(18, 18, 6, together=3)):
        assert difference(chunked(model, ids, [3, 9, 48, *[1] * 30]), truth) <= 1e-5


@torch.no_grad()
def test_a_short_prompt_is_answered_beyond_the_dense_queries():
    """The published code ends in an error there."""
    model, ids = build("llama"), tokens(1, 40)
    with longreach.extend(model, LongHeads(12, 10, 3)):
        want, cache = model(ids, use_cache=False).logits, DynamicCache()
        found = [model(ids[:, :4], past_key_values=cache).logits] + [model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(4, 40)]
        assert difference(torch.cat(found, 1), want) <= 1e-5


@torch.no_grad()
def test_padded_rows_are_as_if_alone():
    model, short, long = build("llama"), tokens(1, 31, seed=3), tokens(1, 50, seed=4)
    ids, mask = torch.cat([F.pad(short, (19, 0)), long]), torch.ones(2, 50, dtype=torch.long)
    mask[0, :19] = 0
    with longreach.extend(model, LongHeads(12, 10, 3)):
        found = model(ids, attention_mask=mask, use_cache=False).logits
        assert difference(found[:1, 19:], model(short, use_cache=False).logits) <= 1e-5
        assert difference(found[1:], model(long, use_cache=False).logits) <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"attended": 10, "chunk": 4}, "multiple of chunk"),
        ({"attended": 8, "chunk": 4}, "at least 3"),
        ({"attended": 12, "chunk": 4, "begin": 7}, "begin must be at least attended - chunk"),
        ({"attended": 12, "chunk": 4, "together": 3}, "multiple of together"),
        ({"attended": 12, "chunk": 0}, "chunk"),
    ],
)
def test_what_it_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        LongHeads(**arguments)


def test_the_recommended_setting_is_half_of_the_window_in_eight_chunks():
    assert LongHeads.recommended(4096, 65536) == LongHeads(2048, chunk=256)  # what the authors say works on Llama 2
    assert LongHeads.recommended(512, 4096) == LongHeads(256, chunk=32)
    for window in (8, 48, 100, 8192, 131072):
        method = LongHeads.recommended(window, 10**6)
        assert method.capacity(window) is None and math.isclose(method.attended, window / 2, rel_tol=0.15)
