"""How much attention every token gets: the column sums of the dense probabilities, whatever the method, the family and the way of reading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import longreach
from dense_probabilities import probabilities
from families import build, tokens
from longreach import DualChunk, LMInfinite, Quest, SelfExtend
from methods_matrix import METHODS, context, refusal

LENGTH = 75


def dense(model: Any, method: Any, ids: torch.Tensor, last: int) -> list[torch.Tensor]:
    """[B, H, N] of every layer: the sums over the last queries of the probabilities of the truth."""
    return [each[:, :, -last:].sum(2) for each in probabilities(model, method, ids)]


def off(found: torch.Tensor, want: torch.Tensor) -> float:
    return (found - want).abs().max().item()


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_the_mass_is_that_of_the_truth(method):
    family = "llama-head8" if refusal("llama", method) else "llama"
    model = build(family)
    ids = torch.stack([torch.randperm(90, generator=torch.Generator().manual_seed(seed))[:LENGTH] + 3 for seed in range(2)])  # a key for every token: no ties
    for last in (LENGTH, 1):
        want = dense(model, method, ids, last)
        with longreach.extend(model, method, context=context(method, LENGTH)) as extension:
            with extension.watching(queries=last) as watch:
                model(ids, use_cache=False)
            assert sorted(watch.mass) == list(range(len(want)))
            assert all(off(watch.mass[n], layer) <= 1e-4 for n, layer in enumerate(want))


@pytest.mark.parametrize("method", [SelfExtend(3, 8), LMInfinite(9, 3), DualChunk(24), Quest(12, 4, 0, "all")], ids=str)
@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "bloom", "gptj", "deepseek-v3"])
@torch.no_grad()
def test_soft_caps_sinks_and_biases_count(family, method):
    model, ids = build(family), tokens(2, LENGTH)
    want = dense(model, method, ids, LENGTH)
    with longreach.extend(model, method) as extension:
        with extension.watching() as watch:
            model(ids, use_cache=False)
        assert all(off(watch.mass[n], layer) <= 1e-4 for n, layer in enumerate(want))
        if family != "gpt-oss":
            torch.testing.assert_close(watch.mass[0].sum(-1), torch.full(watch.mass[0].shape[:2], float(LENGTH)))


@pytest.mark.parametrize("method", [SelfExtend(3, 8), LMInfinite(9, 3), Quest(12, 4, 0, "all")], ids=str)
@torch.no_grad()
def test_forwards_add_up_and_rows_are_counted_by_their_own_tokens(method):
    """Chunks and decoded tokens of a padded batch; what is watched changes nothing."""
    model, ids = build("llama"), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    with longreach.extend(model, method) as extension:
        with extension.watching(layers=[1]) as alone:
            model(ids[1:, 11:], use_cache=False)
        with extension.watching() as whole:
            logits = model(ids, use_cache=False).logits
        assert torch.equal(logits, model(ids, use_cache=False).logits) and list(alone.mass) == [1]
        cache = DynamicCache()
        with extension.watching(layers=[0, 1]) as watch:
            for a, b in ((0, 40), (40, 41), (41, 60), *((t, t + 1) for t in range(60, LENGTH))):
                model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True)
        assert off(watch.mass[1][:1], whole.mass[1][:1]) <= 1e-4
        assert off(watch.mass[1][1:, :, : LENGTH - 11], alone.mass[1]) <= 1e-4 and not watch.mass[1][1, :, LENGTH - 11 :].any()


@torch.no_grad()
def test_forks_and_flat_forwards_are_watched():
    model, text = build("llama"), tokens(1, 700)[0]
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        with extension.watching(queries=1) as want:
            model(text[None], use_cache=False)
        flat = extension.flat()
        one = flat.join()
        flat.read({one: text[:600]}, "none")
        two = flat.fork(one)
        flat.read({one: text[:3]}, "none")
        with extension.watching(queries=1) as watch:
            flat.read({two: text[600:]})
        assert off(watch.mass[1][1], want.mass[1][0]) <= 1e-5


def test_what_cannot_be_watched_is_refused():
    model = build("llama")
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        for wrong, says in ((dict(layers=[9]), "not all among the"), (dict(queries=0), "at least one query counts")):
            with pytest.raises(ValueError, match=says), extension.watching(**wrong):
                pass
        with extension.watching(), pytest.raises(ValueError, match="watched already"), extension.watching():
            pass
    with longreach.extend(model, SelfExtend(3, 8), backend="reference") as extension, pytest.raises(ValueError, match="neither"), extension.watching():
        pass
