"""Which keys an index chooses, as it is recorded: those of the truth, whatever the method and the way of reading; and nothing else changes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

import longreach
from families import build, tokens
from longreach import Combined, InfLLM, LMInfinite, LongHeads, Quest, SelfExtend, YaRN
from longreach.engine import reference
from longreach.hf.retrieval import retrieved, stretches
from methods_matrix import METHODS, context, refusal

LENGTH, PROMPT = 75, 64
CHOOSING = [method for method in METHODS if any(method.layout(layer).choice for layer in (0, 1))]


def read(model: Any, ids: torch.Tensor, cut: int, mask: torch.Tensor | None = None) -> None:
    """A prompt in two forwards, then token by token."""
    cache, count = DynamicCache(), ids.shape[1]
    at = [0, PROMPT - cut, PROMPT, *range(PROMPT + 1, count + 1)] if cut else [0, PROMPT, *range(PROMPT + 1, count + 1)]
    for a, b in pairwise(at):
        model(ids[:, a:b], attention_mask=None if mask is None else mask[:, :b], past_key_values=cache, use_cache=True)


def seen_by_the_truth(model: Any, method: Any, ids: torch.Tensor, cut: int, first: int) -> dict[int, list[torch.Tensor]]:
    """layer -> [B, H or 1, T, N] of every forward: which keys the truth shows to its queries from `first` on that choose."""
    found: dict[int, list[torch.Tensor]] = {}
    real = reference.softmax

    def softmax(inputs: Any, distance: torch.Tensor, v: torch.Tensor, sink: Any = None) -> Any:
        choice, i = method.layout(inputs.layer).choice, inputs.i[:, 0]
        taking, choosing = (int(i[0]), True) if choice is None else choice.of(int(i[0]), int(i[-1]) + 1)
        shown = (~distance.isnan() & inputs.seen).expand(len(ids), inputs.q.shape[1], -1, -1)
        if choosing:
            found.setdefault(inputs.layer, []).append(shown[:, :, (i >= max(first, taking))])
        return real(inputs, distance, v, sink)

    with mock.patch.object(reference, "softmax", softmax), longreach.extend(model, method, context=context(method, LENGTH), backend="reference"):
        found.clear()
        read(model, ids, cut)
    return found


def cut_of(method: Any) -> int:
    """Tokens of the last forward of a prompt; 0: it is one forward."""
    return 0 if method.cut is None else PROMPT - method.apart(PROMPT)


@pytest.mark.parametrize("first", [0, PROMPT - 1, PROMPT + 3])
@pytest.mark.parametrize("method", CHOOSING, ids=str)
@torch.no_grad()
def test_what_is_recorded_is_what_the_truth_shows(method, first):
    """Every count, of every key and layer. What is chosen and what is shown anyway are never the same key for the same query."""
    family = "llama-head8" if refusal("llama", method) else "llama"
    model = build(family)
    ids = torch.stack([torch.randperm(90, generator=torch.Generator().manual_seed(seed))[:LENGTH] + 3 for seed in range(2)])  # a key for every token: no ties
    want = seen_by_the_truth(model, method, ids, cut_of(method), first)
    with longreach.extend(model, method, context=context(method, LENGTH)) as extension:
        with extension.watching_choices(first) as choices:
            read(model, ids, cut_of(method))
        entries = extension.facts.reading.entries
    for layer, shown in want.items():
        choice, heads = method.layout(layer).choice, entries[layer].queries
        apart = 1 if choice is None else choice.count(heads, entries[layer].heads)
        total = torch.zeros(2, LENGTH)
        for each in shown:
            total[:, : each.shape[3]] += each.sum((1, 2))
        queries = sum(each.shape[2] for each in shown)
        assert choices.asked[layer].tolist() == [[queries]] * 2 if queries else layer not in choices.asked
        found = torch.zeros(2, LENGTH)
        for counts, times in ((choices.chosen, heads // apart), (choices.always, heads)):
            if layer in counts:
                found[:, : counts[layer].shape[1]] += counts[layer] * times
        assert torch.equal(found, total), layer
        if queries:
            assert choices.always[layer].shape == choices.chosen.get(layer, choices.always[layer]).shape == (2, LENGTH)
        if choice is None:
            assert layer not in choices.chosen
        elif layer in choices.chosen:  # what no block is complete of was no choice of the index
            visible = next(segment.visible for segment in method.layout(layer).segments if segment.choice)
            complete = visible.first_key + choice.complete(visible.keys_of(LENGTH - 1)) * choice.block
            assert not choices.chosen[layer][:, complete:].any()
            assert not choices.chosen[layer][:, visible.first_key : visible.first_key + getattr(method, "sink", 0)].any()


@pytest.mark.parametrize("method", [InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=8), Quest(12, 4, 1, "all"), LongHeads(12, 10, 3)], ids=str)
@torch.no_grad()
def test_watching_changes_nothing_and_asks_once(method):
    """The logits are the same to the bit, a padded row is recorded as it is alone, and an index is not asked more often."""
    model, ids = build("llama"), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    with longreach.extend(model, method) as extension:
        plain = model(ids, attention_mask=mask, use_cache=False).logits
        index = next(layer.layout.choice for layer in extension.layers if layer.layout.choice).index
        with mock.patch.object(type(index), "choose", autospec=True, side_effect=type(index).choose) as chooses:
            model(ids, attention_mask=mask, use_cache=False)
            times = chooses.call_count
            with extension.watching_choices() as choices:
                assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, plain)
            assert chooses.call_count == 2 * times
        with extension.watching_choices() as alone:
            model(ids[1:, 11:], use_cache=False)
        for whole, single in ((choices.chosen, alone.chosen), (choices.always, alone.always), (choices.asked, alone.asked)):
            for layer, counts in single.items():
                assert torch.equal(whole[layer][1:, : counts.shape[1]], counts) and not whole[layer][1, counts.shape[1] :].any()


@torch.no_grad()
def test_tiers_fetch_no_more_for_being_watched(tmp_path):
    model, ids = build("llama"), tokens(1, 700)
    method = Quest(64, 16, 0)

    def fetched(watch: bool) -> Any:
        with longreach.extend(model, Combined(YaRN(16.0), method), memory=longreach.Tiered(device="128KiB", host="64MiB")) as extension:
            cache = DynamicCache()
            model(ids, past_key_values=cache, use_cache=True)
            for t in range(4):
                if watch:
                    with extension.watching_choices():
                        model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
                else:
                    model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            return {name: tier["fetched"] for name, tier in extension.report()["memory"]["tiers"].items()}

    assert fetched(True) == fetched(False) and fetched(True)["device"] > 0


@torch.no_grad()
def test_what_is_read_together_is_counted_without_the_looks_at_the_model():
    model, ids = build("llama"), tokens(1, LENGTH)
    with longreach.extend(model, InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=8)) as extension:
        with extension.watching_choices() as choices:
            flat = extension.flat()  # the first one compares forwards
            flat.read({flat.join(): ids[0]})
        with extension.watching_choices() as plain:
            model(ids, use_cache=False)
        with extension.watching() as watch:
            extension.forward.flat_checked = False
            extension.flat()
    for found, want in ((choices.asked, plain.asked), (choices.always, plain.always), (choices.chosen, plain.chosen)):
        assert found.keys() == want.keys() and all(torch.equal(found[layer], want[layer]) for layer in want)
    assert not watch.mass


@torch.no_grad()
def test_the_data_has_shares():
    """A decoded token of four heads: a stretch is as often chosen as its share says."""
    model, ids = build("llama"), tokens(1, LENGTH)
    method = Quest(12, 4, 1)
    with longreach.extend(model, method) as extension:
        cache = DynamicCache()
        model(ids[:, :PROMPT], past_key_values=cache, use_cache=True)
        with extension.watching_choices() as choices:
            for t in range(PROMPT, PROMPT + 3):
                model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        found = retrieved(extension.facts, choices, PROMPT + 3)
        heads = extension.facts.reading.entries[1].queries
    first, second = found["layers"][:2]
    assert (found["tokens"], found["queries"], found["method"]["method"]) == (PROMPT + 3, 3, "quest")
    assert (first["chooses"], first["chosen"], first["block"]) == (False, [], None)
    assert first["always"] == [[0, PROMPT + 1, 1.0], [PROMPT + 1, PROMPT + 2, 2 / 3], [PROMPT + 2, PROMPT + 3, 1 / 3]]
    assert (second["chooses"], second["queries"], second["apart"], second["block"], second["keep"]) == (True, 3, heads, 4, 3)
    assert sum((stop - start) * share for start, stop, share in second["chosen"]) == pytest.approx(4 * 2)  # two full pages beside that which is open
    assert all(start % 4 == 0 and stop % 4 == 0 for start, stop, _ in second["chosen"])


def test_neighbours_with_the_same_share_are_one_stretch():
    counts = torch.tensor([[0, 0, 2, 2, 4, 0, 1]], dtype=torch.int32)
    assert stretches(counts, 0, 7, 4) == [[2, 4, 0.5], [4, 5, 1.0], [6, 7, 0.25]]
    assert stretches(counts, 0, 5, 4) == [[2, 4, 0.5], [4, 5, 1.0]]
    assert stretches(None, 0, 7, 4) == stretches(counts, 1, 7, 4) == stretches(counts, 0, 7, 0) == []


def test_who_chooses_nothing_is_refused():
    model = build("llama")
    fix = r"chooses no keys.*--method infllm --n-local"
    for method in (SelfExtend(3, 8), LMInfinite(9, 3, top_k=2, top_k_from_layer=2)):
        with longreach.extend(model, method) as extension, pytest.raises(ValueError, match=fix), extension.watching_choices():
            pass
    for first in (1.5, -1, True, "4"):
        with longreach.extend(model, Quest(12, 4, 1)) as extension, pytest.raises(ValueError, match="pass a whole number"), extension.watching_choices(first):
            pass
    again = pytest.raises(ValueError, match="watched already")
    with longreach.extend(model, Quest(12, 4, 1)) as extension, extension.watching_choices(), again, extension.watching():
        pass
