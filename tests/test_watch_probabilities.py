"""What each query pays to every token: the dense probabilities, whatever the method, the family and the way of reading."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

import longreach
from dense_probabilities import probabilities
from families import build, each_once, tokens
from longreach import LMInfinite, LongHeads, Quest, SelfExtend, Stock
from longreach.kernels import mass
from methods_matrix import METHODS, context, refusal

LENGTH, FIRST = 75, 61


def dense(model: Any, method: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """[B, T, N] of every layer: the probabilities of the truth, heads added up."""
    return [each.sum(1) for each in probabilities(model, method, ids)]


def off(found: torch.Tensor, want: torch.Tensor) -> float:
    assert found.shape == want.shape
    return (found - want).abs().max().item()


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_they_are_those_of_the_truth(method):
    model = build("llama-head8" if refusal("llama", method) else "llama")
    ids = each_once(2, LENGTH)
    want = dense(model, method, ids)
    with longreach.extend(model, method, context=context(method, LENGTH)) as extension:
        with extension.watching_probabilities(FIRST) as watch:
            model(ids, use_cache=False)
        assert sorted(watch.paid) == list(range(len(want)))
        assert all(off(watch.paid[n], layer[:, FIRST:]) <= 1e-4 for n, layer in enumerate(want))


@pytest.mark.parametrize("family", ["llama", "llama-mha", "qwen3", "gemma2", "gpt-oss", "phi3", "olmo2", "mistral", "gpt-neox", "stablelm"])
@torch.no_grad()
def test_they_are_those_of_the_stock_model(family):
    """Transformers' own attentions, which only its eager mode forms."""
    model, ids = build(family, attn_implementation="eager"), tokens(2, LENGTH)
    eager = model(ids, use_cache=False, output_attentions=True).attentions
    with longreach.extend(model, Stock()) as extension, extension.watching_probabilities(FIRST) as watch:
        model(ids, use_cache=False)
    assert all(off(watch.paid[n], layer[..., :LENGTH].float().sum(1)[:, FIRST:]) <= 1e-4 for n, layer in enumerate(eager))


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "bloom", "gptj", "deepseek-v3"])
@pytest.mark.parametrize("method", [SelfExtend(3, 8), Quest(12, 4, 0, "all")], ids=str)
@torch.no_grad()
def test_soft_caps_sinks_and_biases_count(family, method):
    model, ids = build(family), tokens(2, LENGTH)
    want = dense(model, method, ids)
    with longreach.extend(model, method) as extension, extension.watching_probabilities(FIRST) as watch:
        model(ids, use_cache=False)
    assert all(off(watch.paid[n], layer[:, FIRST:]) <= 1e-4 for n, layer in enumerate(want))


@pytest.mark.parametrize("method", [Stock(), SelfExtend(3, 8), LMInfinite(9, 3), Quest(12, 4, 0, "all"), LongHeads(16, 19, 4, together=2)], ids=str)
@torch.no_grad()
def test_rows_count_from_their_own_query_and_forwards_add_up(method):
    """A padded batch whose rows have other lengths, in one forward, in chunks and with decoded tokens; what is watched changes nothing."""
    model, ids = build("llama"), each_once(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, LENGTH - 11 :] = 0
    with longreach.extend(model, method) as extension:
        with extension.watching_probabilities(FIRST, [1]) as long:
            logits = model(ids[:1], use_cache=False).logits
        with extension.watching_probabilities(50, [1]) as short:
            model(ids[1:, : LENGTH - 11], use_cache=False)
        with extension.watching_probabilities([FIRST, 50], [1]) as watch:
            assert off(model(ids, attention_mask=mask, use_cache=False).logits[:1], logits) <= 1e-4
        assert list(watch.paid) == [1]
        assert off(watch.paid[1][:1, : LENGTH - FIRST], long.paid[1]) <= 1e-4 and off(watch.paid[1][1:, : 14, : LENGTH - 11], short.paid[1]) <= 1e-4
        assert not watch.paid[1][1, 14:].any() and not watch.paid[1][1, :, LENGTH - 11 :].any()
        if method.cut != 1:
            return
        cache = DynamicCache()
        with extension.watching_probabilities((FIRST,), [1]) as parts:
            for a, b in ((0, 40), (40, 65), (65, 66), *((t, t + 1) for t in range(66, LENGTH))):
                model(ids[:1, a:b], past_key_values=cache, use_cache=True)
        assert off(parts.paid[1], long.paid[1]) <= 1e-4


@torch.no_grad()
def test_only_the_rows_that_count_are_computed():
    model, ids = build("llama"), tokens(1, LENGTH)
    spy = mock.patch.object(mass, "of_each", wraps=mass.of_each)
    with longreach.extend(model, Stock()) as extension, extension.watching_probabilities(FIRST, [1]), spy as tap:
        model(ids, use_cache=False)
    assert [call.args[0].shape[2] for call in tap.call_args_list] == [LENGTH - FIRST]


@torch.no_grad()
def test_forks_and_flat_forwards_are_watched():
    model, text = build("llama"), tokens(1, 700)[0]
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        with extension.watching_probabilities(690) as want:
            model(text[None], use_cache=False)
        flat = extension.flat()
        one = flat.join()
        flat.read({one: text[:600]}, "none")
        two = flat.fork(one)
        with extension.watching_probabilities((700, 690)) as watch:
            flat.read({one: text[:3], two: text[600:]})
        assert off(watch.paid[1][1], want.paid[1][0]) <= 1e-5 and not watch.paid[1][0].any()


def test_what_cannot_be_watched_is_refused():
    with longreach.extend(build("llama"), SelfExtend(3, 8)) as extension:
        for wrong in (-1, True, [], [3, -1], ["a"]):
            with pytest.raises(ValueError, match="first is the index of a query"), extension.watching_probabilities(wrong):
                pass
        with extension.watching_probabilities([3]), pytest.raises(ValueError, match=r"each of 1 rows.*one for every row"):
            extension.model(tokens(2, 8), use_cache=False)
        with pytest.raises(ValueError, match="not all among the"), extension.watching_probabilities(0, [9]):
            pass


def test_the_forwards_of_other_threads_are_not_watched_and_do_not_end():
    model, ids = build("llama"), tokens(1, 20)
    with longreach.extend(model, Stock()) as extension, torch.no_grad():
        want = model(ids).logits
        with ThreadPoolExecutor(1) as other, extension.watching_probabilities(0, [0], ends=True) as watch:
            assert torch.equal(other.submit(lambda: model(ids).logits).result(), want) and not watch.paid
            model(ids)
        assert [*watch.paid] == [0] and watch.paid[0].shape[-1] == 20


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj", "bloom"])
@torch.no_grad()
def test_a_forward_ends_where_it_is_told_to(family):
    """The same probabilities, no later layer; nothing is stored, and the next forward is what it was."""
    model, ids = build(family), tokens(2, LENGTH)
    with longreach.extend(model, Stock()) as extension:
        before, cache = model(ids).logits, DynamicCache()
        model(ids[:, :20], past_key_values=cache)
        with extension.watching_probabilities(FIRST) as whole:
            model(ids)
        for last in (0, 1):
            tried = []
            with extension.watching_probabilities(FIRST, [last], ends=True) as watch:
                tried.append(model(ids))
            assert not tried and list(watch.paid) == [last] and torch.equal(watch.paid[last], whole.paid[last])
            with extension.watching_probabilities(30, {0, last}, ends=True):
                tried.append(model(ids[:, 20:], past_key_values=cache))
            assert not tried and cache.get_seq_length() == 20
        assert torch.equal(model(ids).logits, before)
        assert (model(ids[:, 20:], past_key_values=cache).logits - before[:, 20:]).abs().max() <= 1e-4
