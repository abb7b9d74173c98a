"""The policy "mass": blocks are told what their queries paid, exactly, and no result depends on who makes room."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

import longreach
from families import build
from histories import constants
from longreach import Combined, InfiniteHiP, InfLLM, LMInfinite, LongHeads, Quest, YaRN
from longreach.engine import reference
from longreach.hf.cache import store_of
from longreach.kernels import mass
from longreach.running.loading import shipped_book
from methods_matrix import context
from test_tiers import BLOCK, budgets, checked

LENGTH, DECAY = 75, 0.25
METHODS = [
    Quest(12, 4, 1), Quest(12, 4, 0, "all"), InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=8), InfLLM(9, 3, 4, 2, exc_block_size=1, heads="head"),
    LongHeads(12, 10, 3, 3), InfiniteHiP.small(8), Combined(YaRN(2.0), LMInfinite(9, 3, distance_limit=14, top_k=2, top_k_from_layer=0)),
]  # fmt: skip
CUTS = [0, 24, 48, 64, *range(65, LENGTH + 1)]  # multiples of every cut, then token by token


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with constants(3, 4):
        yield


def once_each(rows: int) -> torch.Tensor:
    """[rows, LENGTH] a key for every token, so that no two blocks are equal."""
    return torch.stack([torch.randperm(90, generator=torch.Generator().manual_seed(seed))[:LENGTH] + 3 for seed in range(rows)])


def cuts_of(method: Any) -> list[int]:
    return [0, 64, *range(65, LENGTH + 1)] if method.cut is None else CUTS


def read(model: Any, ids: torch.Tensor, cuts: list[int]) -> Iterator[tuple[int, int, DynamicCache]]:
    cache = DynamicCache()
    for a, b in pairwise(cuts):
        model(ids[:, a:b], past_key_values=cache)
        yield a, b, cache


def by_the_truth(model: Any, method: Any, ids: torch.Tensor) -> dict[tuple[int, int, int], float]:
    """(layer, row, block) -> its score after the last forward: the probabilities of the dense truth, for the keys of the segment that chooses."""
    layers: list[torch.Tensor] = []
    real = reference.softmax

    def softmax(inputs: Any, distance: torch.Tensor, v: torch.Tensor, sink: Any = None) -> Any:
        out, lse = real(inputs, distance, v, sink)
        logits = inputs.logits(distance.nan_to_num(0.0)).masked_fill(distance.isnan() | ~inputs.seen, -torch.inf)
        layers.append(torch.exp(logits - lse[..., None]).nan_to_num(0.0))
        return out, lse

    scores: dict[tuple[int, int, int], float] = {}
    with longreach.extend(model, method, context=context(method, LENGTH), backend="reference") as extension, mock.patch.object(reference, "softmax", softmax):
        layers.clear()
        for a, b, _ in read(model, ids, cuts_of(method)):
            blocks = max(0, a - 3) // BLOCK  # a rollback of 3 tokens
            step: dict[tuple[int, int, int], float] = {}
            for number, (layer, paid) in enumerate(zip(extension.layers, layers, strict=True)):
                segment = layer.method.layout(number).segments[-1]
                first, choosing = (0, False) if segment.choice is None else segment.choice.of(a, b)
                if not choosing:
                    continue
                i, j = torch.arange(a, b)[:, None], torch.arange(b)
                each = paid.masked_fill(~(segment.visible(i, j) & (i >= first)), 0.0).sum((1, 2))  # [B, N]
                step |= {(number, row, n): float(own[n * BLOCK : (n + 1) * BLOCK].sum()) for row, own in enumerate(each) for n in range(blocks)}
            layers.clear()
            if any(step.values()):
                scores = {key: DECAY * scores.get(key, 0.0) + more for key, more in step.items()} | {
                    key: DECAY * score for key, score in scores.items() if key not in step
                }
    return scores


@pytest.mark.parametrize(("family", "method"), [*(("llama", method) for method in METHODS), ("gpt-oss", METHODS[1]), ("gemma2", METHODS[2])], ids=str)
@torch.no_grad()
def test_scores_are_those_of_the_truth(family, method, tmp_path):
    """Of the blocks of keys and of those of values, of both rows, in every layer that chooses: prompt in chunks, and decoded tokens."""
    model, ids = build(family), once_each(2)
    want = by_the_truth(model, method, ids)
    memory = budgets(tmp_path, 150, 6, 900, policy="mass", decay=DECAY)
    with longreach.extend(model, method, context=context(method, LENGTH), memory=memory) as extension:
        *_, cache = (store for _, _, store in read(model, ids, cuts_of(method)))
        pool, found = extension.forward.memory.pool, {}
        for layer, row, number in want:
            memory = store_of(cache).layers[layer]
            segment = extension.layers[layer].layout.segments[-1]
            blocks = [buffer.run(row)[number].entry for buffer in (memory.keys[extension.layers[layer].form_of(segment.kept)], memory.whole)]
            assert pool.score(blocks[0]) == pool.score(blocks[1])
            found[layer, row, number] = pool.score(blocks[0])
    assert len(want) > 20 and sum(score > 0.01 for score in want.values()) > 10
    assert found == pytest.approx(want, abs=1e-4)


def everything(model: Any, extension: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits of chunks, decoded tokens, a fork, a crop into a block, and of requests that decode together, which the tiers fetch one by one."""
    found = []
    *_, cache = (store for _, _, store in read(model, ids, cuts_of(extension.method)))
    twin = extension.fork(cache)
    cache.crop(max(61, *map(store_of(cache).reaches, range(len(ids)))))
    start = cache.get_seq_length()
    for each, a in ((cache, start), (twin, 0), (cache, start + 1)):
        found.append(model(ids[:, a : a + 1], past_key_values=each).logits)
    del cache, twin, each
    flat = extension.flat()
    texts = {flat.join(): text for text in ids}
    flat.read({row: text[: 64 - 8 * n] for n, (row, text) in enumerate(texts.items())}, "none")
    found += [logits for step in range(6) for logits in flat.read({row: text[step : step + 1] for row, text in texts.items()}).values()]
    return found


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_results_do_not_depend_on_the_policy(method, tmp_path):
    """Not in one bit, whatever lies on the device; and only the policy that asks for it is told."""
    model, ids, found, asked = build("llama"), once_each(2), [], []
    device = {LongHeads: 120, InfLLM: 76}.get(type(method), 60)  # half of it is for what an index keeps
    for policy in ("lru", "mass"):
        with longreach.extend(model, method, context=context(method, LENGTH), memory=budgets(tmp_path, device, 6, 900, policy=policy)) as extension:
            with mock.patch.object(mass, "paid", wraps=mass.paid) as paid:
                found.append(everything(model, extension, ids))
            asked.append(paid.call_count)
            assert checked(extension)["tiers"]["device"]["evicted"]
            assert (extension.forward.memory.pool.step > 0) == (policy == "mass")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    of_index = asked[0]  # InfLLM's summaries are made of masses
    assert asked[1] > of_index and bool(of_index) == isinstance(method, InfLLM)


@torch.no_grad()
def test_requests_that_decode_together_pay_as_those_that_decode_alone(tmp_path):
    model, texts, found = build("gpt-oss"), once_each(2), []
    method = InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=8)
    for together in (False, True):
        with longreach.extend(model, method, memory=budgets(tmp_path, 150, 6, 900, policy="mass", decay=1.0)) as extension:
            flat = extension.flat()
            rows = {flat.join(): text for text in texts}
            flat.read({row: text[: 72 - 8 * n] for n, (row, text) in enumerate(rows.items())}, "none")
            for step in range(2):
                each = {row: text[step : step + 1] for row, text in rows.items()}
                for some in [each] if together else [{row: token} for row, token in each.items()]:
                    flat.read(some, "none")
            pool = extension.forward.memory.pool
            found.append([pool.score(entry) for entry in pool._entries])
    assert found[1] == pytest.approx(found[0], abs=1e-5) and max(found[0]) > 0.1


@torch.no_grad()
def test_a_fork_pays_to_the_blocks_that_it_shares(tmp_path):
    model, ids = build("llama"), once_each(1)
    with longreach.extend(model, Quest(12, 4, 0, "all"), trained_window=128, memory=budgets(tmp_path, 150, policy="mass", decay=1.0)) as extension:
        *_, cache = (store for _, _, store in read(model, ids, [0, 64]))
        pool = extension.forward.memory.pool
        before, twin = sum(pool.score(entry) for entry in pool._entries), extension.fork(cache)
        after = []
        for each in (cache, twin):
            model(ids[:, 64:65], past_key_values=each)
            after.append(sum(pool.score(entry) for entry in pool._entries))
        assert after[0] > before and after[1] - after[0] == pytest.approx(after[0] - before, abs=1e-5)


@torch.no_grad()
def test_nano_answers_the_same_and_keeps_what_is_attended_to(tmp_path):
    """A text of eight windows, of whose blocks the device holds a quarter."""
    model, tokenizer = longreach.load("nano")
    ids, method = tokenizer(shipped_book()[:20000], return_tensors="pt").input_ids[:, :2048], InfLLM(128, 16, 32, 4, repr_topk=2, exc_block_size=64)
    logits, kept = [], {}
    for policy in ("lru", "mass"):
        memory = longreach.Tiered("1MiB", "1MiB", f"{tmp_path}:64MiB", block=32, policy=policy, staging="1MiB")
        with constants(128, 64), longreach.extend(model, method, memory=memory) as extension:
            cache = DynamicCache()
            for a in range(0, 2048, 512):
                model(ids[:, a : a + 512], past_key_values=cache)
            logits.append([model(ids[:, a : a + 1], past_key_values=cache).logits for a in range(8)])
            pool = extension.forward.memory.pool
            kept[policy] = sorted(((pool.score(entry), entry.tier) for entry in pool._entries), reverse=True)
    assert all(torch.equal(*each) for each in zip(*logits, strict=True))
    assert all(not score for score, _ in kept["lru"])
    on_device = [score for score, tier in kept["mass"] if tier == 0]
    assert max(score for score, tier in kept["mass"] if tier) < max(on_device) and len(on_device) > 20
