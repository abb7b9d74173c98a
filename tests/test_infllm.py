"""InfLLM: which keys a query sees at which distance, the oracles of the specification, and every pair in one segment only."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

import longreach
from families import build, tokens
from longreach import InfLLM
from longreach.core.encodings import Rotary
from longreach.core.matrices import matrices
from longreach.engine import chosen
from longreach.engine.batch import Batch
from longreach.engine.executor import execute
from longreach.engine.layer import Inputs, Layer
from longreach.engine.watch import Watch
from longreach.kernels import kernel_for
from longreach.memory.store import Store
from test_matrix import chunked, difference

CPU = torch.device("cpu")
SPEC = InfLLM(4, 2, 2, 1, repr_topk=1, exc_block_size=2)  # n_init=2, n_local=4, block=2, exc=2


@torch.no_grad()
def seen_by(model: Any, cache: Any, extension: Any, ids: torch.Tensor) -> set[int]:
    """Keys that get attention from the last of some new tokens, in the first layer."""
    with extension.watching(layers=[0], queries=1) as watch:
        model(ids, past_key_values=cache, use_cache=True)
    return {j for j, mass in enumerate(watch.mass[0][0].sum(0).tolist()) if mass > 0}


@torch.no_grad()
def test_the_index_oracle():
    """A prompt of 12, then single tokens: what is local, first, not complete yet; of what is left one block of those that there are."""
    model, ids = build("llama"), tokens(1, 16)
    with longreach.extend(model, SPEC) as extension:
        cache = DynamicCache()
        model(ids[:, :12], past_key_values=cache, use_cache=True)
        for query, local, waiting, blocks in (
            (12, {9, 10, 11, 12}, {8}, [{2, 3}, {4, 5}, {6, 7}]),
            (13, {10, 11, 12, 13}, {8, 9}, [{2, 3}, {4, 5}, {6, 7}]),
            (14, {11, 12, 13, 14}, {10}, [{2, 3}, {4, 5}, {6, 7}, {8, 9}]),
            (15, {12, 13, 14, 15}, {10, 11}, [{2, 3}, {4, 5}, {6, 7}, {8, 9}]),
        ):
            seen = seen_by(model, cache, extension, ids[:, query : query + 1])
            assert seen - local - waiting - {0, 1} in blocks and len(seen) == 4 + 2 + 2 + len(waiting), query


@pytest.mark.parametrize("method", [SPEC, InfLLM(5, 3, 4, 1, repr_topk=2, exc_block_size=6)], ids=str)
@torch.no_grad()
def test_every_pair_is_in_one_segment(method):
    """Queries of a prompt too: the published code shows keys near the edge of the window twice to them (to query 4 key 1, to query 6 key 3, ...)."""
    model, n, calls, real = build("llama"), 24, [], chosen.ask
    owner = matrices(method.layout().segments, n).segment  # raises where two segments show one pair; the last is the one that chooses
    assert bool((owner >= 0).equal(torch.ones(n, n).tril().bool()))
    with (
        longreach.extend(model, method),
        mock.patch.object(chosen, "ask", lambda *a: calls.append((real(*a), a[4])) or calls[-1][0]),
    ):
        model(tokens(1, n), use_cache=False)
    calls = calls[: len(calls) // model.config.num_hidden_layers]
    queries = []
    for asked, visible in calls:  # of some groups of queries that choose together
        for group, t in itertools.product(*map(range, visible.shape[1:])):
            i = int(visible[0, group, t]) + method.n_local + method.n_init - 1
            columns = (asked.columns[0, 0, group] + method.n_init)[asked.work.seen[group, t]].tolist()
            assert len(set(columns)) == len(columns) and all(owner[i, j] == 2 for j in columns), i
            first = max(i // method.exc_block_size * method.exc_block_size, method.n_local + method.n_init)
            full = max(0, first - method.n_local - method.n_init) // method.block_size
            waiting = set(range(method.n_init + full * method.block_size, i - method.n_local + 1))
            assert waiting <= set(columns) and len(columns) == len(waiting) + method.block_size * min(1, full), i
            queries.append(i)
    assert queries == list(range(method.n_local + method.n_init, n))


def test_the_numeric_oracle():
    """One frequency of 1, scale 1/sqrt(2), n_local 2: near logits .4885 and 0, far ones .3821 .5950 .9771 -.3821."""
    k = torch.tensor([[1, 0], [0, 1], [1, 1], [-1, 0], [0.5, 0.5], [0, -1]]).view(1, 1, 6, 2)
    v, q = torch.arange(6.0).view(1, 1, 6, 1), torch.zeros(1, 1, 6, 2)
    q[0, 0, 5, 0] = 1
    rotary = Rotary(torch.ones(1, dtype=torch.float64))
    for method in (InfLLM(2, 0, 1, 9, repr_topk=1, exc_block_size=1), InfLLM(2, 1, 2, 9, repr_topk=2, exc_block_size=6)):
        layer, watch = Layer(0, method, rotary), Watch(queries=1)
        store = Store([layer.kept])
        store.open(1, 6)
        batch = Batch.of(1, 6, None, CPU, store)
        out = execute(layer, batch, store.layers[0], kernel_for(CPU, torch.float32), q, k, v, Inputs(1 / math.sqrt(2)), watch)
        assert out[0, 5, 0, 0].item() == pytest.approx(2.237763, abs=1e-5)
        assert watch.mass[0][0, 0, 4:].tolist() == pytest.approx([0.176258, 0.108139], abs=1e-5)
        assert watch.mass[0][0, 0, 2].log().item() + 2.224337 == pytest.approx(0.9771, abs=1e-4)


@torch.no_grad()
def test_decoding_equals_the_truth_with_the_same_cuts_and_prompts_may_be_cut_between_execution_blocks():
    model, ids, method = build("llama"), tokens(2, 90), InfLLM.small(8)
    with longreach.extend(model, method, backend="reference"):
        truth = chunked(model, ids, [48, 7, *[1] * 35])
    with longreach.extend(model, method):
        whole = chunked(model, ids, [48, 7, *[1] * 35])
        assert difference(whole, truth) <= 1e-5
        assert difference(chunked(model, ids, [8, 32, 8, 7, *[1] * 35]), truth) <= 1e-5
        assert difference(model(ids, use_cache=False).logits, truth) > 1e-3  # who decodes chooses alone


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi", "deepseek-v3"])
@pytest.mark.parametrize("heads", ["layer", "head"])
@torch.no_grad()
def test_the_best_representative_answers_for_a_block(family, heads):
    """Each token comes once: equal tokens have equal keys in the first layer, un-rotated, and which of two equal blocks is chosen nobody says."""
    model = build(family)
    ids = torch.stack([torch.randperm(95, generator=torch.Generator().manual_seed(seed))[:75] + 1 for seed in (5, 6)])
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    for method in (
        InfLLM(9, 3, 4, 2, repr_topk=3, exc_block_size=8, heads=heads, relevance="max"),
        InfLLM(7, 0, 3, 3, repr_topk=2, exc_block_size=1, heads=heads, relevance="max"),
    ):
        with longreach.extend(model, method, backend="reference"):
            truth = model(ids[:1], use_cache=False).logits
            decoded = chunked(model, ids[:1], [48, *[1] * 27])
            alone = model(ids[1:, 11:], use_cache=False).logits
        with longreach.extend(model, method):
            assert difference(model(ids[:1], use_cache=False).logits, truth) <= 1e-5
            assert difference(chunked(model, ids[:1], [8, 32, 8, *[1] * 27]), decoded) <= 1e-5
            both = model(ids, attention_mask=mask, use_cache=False).logits
            assert difference(both[:1], truth) <= 1e-5 and difference(both[1:, 11:], alone) <= 1e-5
        with longreach.extend(model, dataclasses.replace(method, relevance="mean")):
            assert difference(model(ids[:1], use_cache=False).logits, truth) > 1e-3


def test_summaries_of_all_representatives_are_as_wide_as_they_are():
    index = InfLLM(9, 3, 4, 2, repr_topk=3, relevance="max").layout().choice.index
    assert (index.width, index.numbers(2), InfLLM(9).layout().choice.index.numbers(2)) == (3, 6, 2)


@torch.no_grad()
def test_a_budget_of_everything_sees_everything():
    """Beyond the window at its last distance, with all blocks chosen or none to choose from."""
    model, ids = build("llama"), tokens(1, 75)
    with longreach.extend(model, longreach.LMInfinite(16, 75, distance_limit=15)):  # min(i - j, 15), all keys
        want = model(ids, use_cache=False).logits
    for method in (InfLLM(16, 3, 4, 99, exc_block_size=8), InfLLM(16, 0, 80), InfLLM(16, 75, 4, 1)):
        with longreach.extend(model, method):
            assert difference(model(ids, use_cache=False).logits, want) <= 1e-5


def test_presets_and_recommendations():
    assert (InfLLM(4096).blocks, InfLLM(4096, preset="repository").blocks, InfLLM(4096, topk=96).blocks) == (32, 16, 96)
    found = InfLLM.recommended(8192, 100_000)
    assert found == InfLLM(4096, repr_topk=4) and found.blocks == 32  # the tables' setting for Llama 3
    assert InfLLM.recommended(512, 4096) == InfLLM(256, 16, 16, exc_block_size=64) and InfLLM.recommended(512, 4096).blocks == 16
    assert InfLLM.recommended(131072, 10**6).block_size == 128
    assert InfLLM(512).capacity(512) is None and InfLLM(513).capacity(512) == 0 and InfLLM(512).cut == 512 and not InfLLM.bounded
    assert InfLLM(4).distances(torch.tensor([[9]]), torch.arange(11)[None])[0].tolist()[4:10] == [3, 3, 3, 2, 1, 0]


def test_what_cannot_be_is_refused():
    for wrong, says in (
        (dict(n_local=0), "n_local"), (dict(n_init=-1), "n_init"), (dict(block_size=3), "lower repr_topk"), (dict(topk=0), "topk"),
        (dict(exc_block_size=0), "exc_block_size"),
        (dict(preset="official"), "'paper' or 'repository'"),
        (dict(heads="group"), "'layer' or 'head'"), (dict(relevance="sum"), "'mean' or 'max'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            InfLLM(**{"n_local": 16, **wrong})
