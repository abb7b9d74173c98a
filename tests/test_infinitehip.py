"""InfiniteHiP: the oracles of the specification, who asks when, and that no way of reading, storing or going back changes what is chosen."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import longreach
from families import build, tokens
from longreach import InfiniteHiP, Tiered
from longreach.core.choice import Past, Probes
from longreach.core.encodings import Rotary
from longreach.core.segments import Rank
from longreach.engine import reference
from longreach.methods.infinitehip import Scan, means
from test_matrix import chunked, difference

METHOD = InfiniteHiP(8, 4, 8, (8, 4, 2), (24, 12), (2, 2, 1), 8, (8, 4, 2), 1, 10)
ALONE = InfiniteHiP(8, 4, 8, (8, 4, 2), (24, 12), (1, 1, 1), 1, (1, 1, 1), 1, 10)
ORACLE = [0.1, 0.2, 0.0, 0.9, 0.3, 0.1, 0.4, 0.2]


def scored(values: list[float], size: int, barred: tuple[int, ...] = (), sink: int = 0, kept: int = 2) -> tuple[Scan, Past, list[int]]:
    """An index whose only query of 1 gets these logits from keys of one dim, and what was looked up of them."""
    keys, looked = torch.tensor(values).view(1, 1, 1, -1, 1), []

    def open_(first: torch.Tensor, count: int, passing: bool):
        assert passing and count == size
        return lambda columns: (looked.append(columns.flatten().tolist()), keys.expand(1, 1, 1, -1, 1).gather(3, columns[..., None]))[1]

    candidates = torch.tensor([n not in barred for n in range(len(values) // kept)]).view(1, 1, -1)
    probes = Probes(open_, lambda x, positions: x, 2**62)
    index = Scan(sink, (size, kept), (size, kept), (1, 1), 0, False)
    return index, Past(candidates.new_empty(0), candidates, torch.zeros(1, 1, 1, dtype=torch.bool), probes), looked


def test_the_oracle_of_a_search():
    """Probes (2, 6) -> the right half; (5, 7) -> the right one; (6, 7) -> the left one: key 6, and the chunk counts .4. The .9 at 3 is not seen."""
    index, past, looked = scored(ORACLE, 8)
    score = index.scores(0, torch.ones(1, 1, 1, 1), torch.tensor([[[0]]]), torch.tensor([[8]]), past)
    assert score.item() == pytest.approx(0.4) and looked == [[2, 6], [5, 7], [6, 7], [6, 6]]
    assert InfiniteHiP._searched(ORACLE, ORACLE, 0, 8, 8) == 0.4


def test_equal_halves_go_on_to_the_right_and_a_short_chunk_is_searched_as_far_as_it_goes():
    index, past, looked = scored([1.0] * 16, 8)
    score = index.scores(0, torch.ones(1, 1, 1, 1), torch.tensor([[[0, 8]]]), torch.tensor([[11]]), past)
    assert looked == [[2, 8, 6, 10], [5, 9, 7, 10], [6, 10, 7, 10], [7, 10, 7, 10]] and score.flatten().tolist() == [1.0, 1.0]


def test_the_better_chunks_stay_the_first_of_equal_ones_and_hidden_keys_do_not_answer():
    values = [0.0] * 8 + [1.0] * 8 + [2.0] * 8 + [1.0] * 8
    for barred, want in (((), [16]), (tuple(range(8, 12)), [8]), (tuple(range(4, 12)), [24])):
        index, past, _ = scored(values, 8, barred)
        assert index.stage(0, torch.ones(1, 1, 1, 1), None, past).flatten().tolist() == want


def test_the_sink_is_chosen_and_the_grid_begins_behind_it():
    index, past, looked = scored([9.0] * 4 + [0.0] * 8 + [1.0] * 4, 4, sink=4)
    assert index.stage(0, torch.ones(1, 1, 1, 1), None, past).flatten().tolist() == [12]
    assert min(min(of) for of in looked) == 5  # (4 + 6) // 2: nothing of the first four
    assert index.ids(torch.tensor([[[[12]]]]), past).flatten().tolist() == [0, 1, 6]


def test_queries_are_means_of_a_stride_and_of_what_is_left():
    found = means(torch.arange(7.0).view(1, 7, 1), 3)
    assert found.flatten().tolist() == [1.0, 4.0, 6.0]


def test_the_oracle_of_positions():
    """p = 11, W = 4, sink 2, selected 4 and 5: keys 0, 1, 4, 5 at 4 .. 7; the window 8 .. 11 at 8 .. 11."""
    seen = torch.ones(4, dtype=torch.bool)
    assert Rank(4, "right").among(seen, seen, torch.tensor([11.0])).tolist() == [4, 5, 6, 7]
    torch.manual_seed(0)
    dense = reference.forward(torch.randn(1, 1, 12, 4), torch.randn(1, 1, 12, 4), Rotary(torch.tensor([1.0, 0.1], dtype=torch.float64)), 0.5)
    distance = InfiniteHiP(4, 2, 2, (2,), (), (1,), 1, (1,), 0).truth(dense)[0, 0, 11]
    own = (~distance.isnan()).nonzero()[:, 0].tolist()
    assert own[:2] == [0, 1] and own[-4:] == [8, 9, 10, 11] and len(own) == 8
    assert distance[own].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]


def test_no_distance_is_longer_than_said():
    torch.manual_seed(0)
    for method in (METHOD, ALONE, InfiniteHiP(5, 0, 6, (6, 2), (12,), (3, 1), 6, (12, 2), 0)):
        q, k = torch.randn(1, 2, 90, 4), torch.randn(1, 1, 90, 4)
        dense = reference.forward(q, k, Rotary(torch.tensor([1.0, 0.1], dtype=torch.float64)), 0.5)
        distance = method.truth(dense)
        assert distance.nan_to_num(0).max() <= method.most == method.largest_distance(10**6)
        behind = torch.arange(90)[:, None] - torch.arange(90)
        assert bool(((distance <= behind) | distance.isnan()).all()), "nothing is seen further away than it is"
        assert bool((~distance.isnan()).sum(-1).max() <= method.window + method.sink + method.of(0) + method.chunks[-1] - 1 + method.query_block - 1)


@torch.no_grad()
def test_a_budget_of_everything_is_plain_attention_however_it_is_read():
    model, ids = build("llama"), tokens(2, 80)
    stock = model(ids).logits
    with longreach.extend(model, InfiniteHiP(12, 8, 72, (8, 4), (80,), (2, 1), 8, (8, 2)), trained_window=128):
        for cuts in ([80], [40, *[1] * 40], [13, 1, 20, 1, 1, *[1] * 44]):
            assert difference(chunked(model, ids, cuts), stock) <= 1e-5


@pytest.mark.parametrize("method", [METHOD, ALONE, InfiniteHiP(16, 5, 5, (5,), (), (3,), 4, (6,), 0)], ids=str)
@torch.no_grad()
def test_decoding_equals_the_truth_with_the_same_cuts_and_prompts_may_be_cut_between_blocks(method):
    model, ids = build("llama"), tokens(2, 96)
    with longreach.extend(model, method, backend="reference"):
        truth = chunked(model, ids, [64, *[1] * 32])
        odd = chunked(model, ids, [37, 1, 1, 9, 1, 1, 3, *[1] * 43])
    assert difference(truth, odd) > 1e-3 or method.cut == 1
    with longreach.extend(model, method):
        for cuts in ([64, *[1] * 32], [32, 16, 16, *[1] * 32]):
            assert difference(chunked(model, ids, cuts), truth) <= 1e-5
        assert difference(chunked(model, ids, [37, 1, 1, 9, 1, 1, 3, *[1] * 43]), odd) <= 1e-5


@torch.no_grad()
def test_a_stage_is_asked_by_the_last_query_at_a_multiple_of_its_refresh(monkeypatch):
    model, ids, asked, real = build("llama"), tokens(1, 96), [], Scan.stage

    def stage(self, number, q, before, past):
        if not self.ordinal:
            asked[-1].append((number, int(past.complete.max()) * 2))
        return real(self, number, q, before, past)

    monkeypatch.setattr(Scan, "stage", stage)
    with longreach.extend(model, METHOD):
        cache = DynamicCache()
        asked.append([])
        model(ids[:, :68], past_key_values=cache)
        found = {}
        for i in range(68, 90):
            asked.append([])
            model(ids[:, i : i + 1], past_key_values=cache)
            found[i] = asked[-1]
    layers = model.config.num_hidden_layers - 1
    complete = {i: (i // 8 * 8 - 8 + 1) // 2 * 2 for i in found}  # what the first stage's query has behind its window
    for i, calls in found.items():
        stages = [0, 1, 2] if i % 8 == 0 or i == 68 else [1, 2] if i % 4 == 0 else [2] if i % 2 == 0 else []
        assert calls == [(n, complete[i]) for n in stages] * layers, i


def steps(model, ids: torch.Tensor, cache) -> torch.Tensor:
    return torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ids.shape[1])], 1)


@pytest.mark.parametrize("tiers", [False, True])
@torch.no_grad()
def test_crops_forks_and_documents_change_nothing(tiers, tmp_path):
    """After each the answers of earlier queries are those of the tokens that are left: as if these had been read once."""
    model, ids, others = build("llama"), tokens(1, 120), tokens(1, 120, seed=9)
    memory = Tiered("64KiB", "128KiB", f"{tmp_path}:4MiB", block=8, staging="32KiB") if tiers else None
    with longreach.extend(model, METHOD) as extension:
        want, cache = [], None
        for text in (ids, torch.cat([ids[:, :91], others[:, 91:]], 1), torch.cat([ids[:, :64], others[:, 64:]], 1)):
            cache = DynamicCache()
            model(text[:, :64], past_key_values=cache)
            want.append(steps(model, text[:, 64:], cache))
    with longreach.extend(model, METHOD, memory=memory) as extension:
        cache = DynamicCache()
        model(ids[:, :64], past_key_values=cache)
        early = copy.deepcopy(cache)
        assert difference(steps(model, ids[:, 64:99], cache), want[0][:, :35]) <= 1e-5
        fork = copy.deepcopy(cache)
        assert difference(steps(model, ids[:, 99:], fork), want[0][:, 35:]) <= 1e-5
        cache.crop(91)
        assert difference(steps(model, others[:, 91:], cache), want[1][:, 27:]) <= 1e-5
        assert difference(steps(model, others[:, 64:], early), want[2]) <= 1e-5
        fork = DynamicCache()
        model(ids[:, :64], past_key_values=fork)
        steps(model, ids[:, 64:99], fork)
        extension.save(fork, tmp_path / "saved", ids[:, :99])
        loaded = extension.load(tmp_path / "saved").cache
        assert difference(steps(model, ids[:, 99:], loaded), want[0][:, 35:]) <= 1e-5


@torch.no_grad()
def test_rows_of_any_lengths_decode_as_if_alone_and_change_places():
    """Left-padded, so that their refreshes fall on different steps; then the rows are reordered, and one is dropped."""
    lengths, count = [70, 41, 9, 58], 14
    model, texts = build("llama"), [tokens(1, n + 2 * count, seed=n) for n in lengths]
    with longreach.extend(model, METHOD):
        alone = []
        for text, n in zip(texts, lengths):
            cache = DynamicCache()
            model(text[:, :n], past_key_values=cache)
            alone.append(steps(model, text[:, n:], cache))
        ids, mask = torch.cat([F.pad(text[:, :n], (70 - n, 0)) for text, n in zip(texts, lengths)]), torch.ones(4, 70, dtype=torch.long)
        for row, n in enumerate(lengths):
            mask[row, : 70 - n] = 0
        cache, order = DynamicCache(), torch.tensor([3, 0, 0])
        model(ids, attention_mask=mask, past_key_values=cache)
        for t in range(2 * count):
            if t == count:
                cache.reorder_cache(order)
                mask, texts, lengths, alone = mask[order], [texts[n] for n in order], [lengths[n] for n in order], [alone[n] for n in order]
            mask = F.pad(mask, (0, 1), value=1)
            found = model(torch.cat([text[:, n + t : n + t + 1] for text, n in zip(texts, lengths)]), attention_mask=mask, past_key_values=cache).logits
            for row, one in enumerate(alone):
                assert difference(found[row : row + 1, 0], one[:, t]) <= 1e-5


@torch.no_grad()
def test_over_tiers_nothing_changes_and_little_is_staged(tmp_path):
    """Two forwards that cut a block, a device that does not hold what a stage looks at, and one that does."""
    model, ids = build("llama"), tokens(2, 400)
    cuts = [96, 200, 40, *[1] * 64]
    with longreach.extend(model, METHOD):
        want = chunked(model, ids, cuts)
    for device, staging in (("64KiB", "8KiB"), ("64KiB", "1KiB"), ("64KiB", "1MiB"), ("1MiB", "1MiB")):  # the second: not even the least that is looked up
        memory = Tiered(device, "64KiB", f"{tmp_path}:4MiB", block=16, staging=staging)
        with longreach.extend(model, METHOD, memory=memory) as extension:
            assert difference(chunked(model, ids, cuts), want) <= 1e-5
            report = extension.report()["memory"]
            assert report["tiers"]["device"]["bytes"] <= report["tiers"]["device"]["budget"]


@torch.no_grad()
def test_masks_hide_keys_from_the_search_too():
    model, ids = build("llama"), tokens(1, 100)
    found = []
    for backend in ("reference", "auto"):
        with longreach.extend(model, METHOD, backend=backend):
            cache, out = DynamicCache(), []
            model(ids[:, :72], past_key_values=cache)
            mask = torch.ones(1, 72, dtype=torch.long)
            mask[:, 20:51] = 0
            for t in range(72, 84):
                mask = F.pad(mask, (0, 1), value=1)
                out.append(model(ids[:, t : t + 1], attention_mask=mask, past_key_values=cache).logits)
            for t in range(84, 90):
                out.append(model(ids[:, t : t + 1], past_key_values=cache).logits)
            mask = F.pad(mask, (0, 16), value=1)
            out.append(model(ids[:, 90:], attention_mask=mask, past_key_values=cache).logits)
            found.append(torch.cat(out, 1))
    assert difference(*found) <= 1e-5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"chunks": (256, 30, 8)}, "every entry of chunks must be a multiple of the next"),
        ({"refresh": (32, 16)}, "refresh must have one entry for every stage"),
        ({"refresh": (32, 12, 8)}, "every entry of refresh"),
        ({"kept": (32768,)}, r"kept must have one entry for every stage but the last \(2\)"),
        ({"kept": (32768, 8191)}, "kept must be multiples of the chunks"),
        ({"sink": 3}, "sink must be a multiple of the last chunk"),
        ({"budget": 2049}, "budget must be a multiple of the last chunk"),
        ({"first_budget": 9}, "first_budget must be a multiple"),
        ({"chunks": ()}, "chunks"),
        ({"chunks": 8}, "chunks must be a list"),
        ({"strides": (4, 4, 0)}, "strides"),
        ({"window": 0}, "window"),
    ],
)
def test_what_it_refuses(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        InfiniteHiP(**arguments)


def test_the_recommended_setting_stays_in_the_window():
    assert InfiniteHiP.recommended(8192, 131072) == InfiniteHiP()  # the paper's on Llama 3
    for window in (64, 100, 512, 2048, 4096, 8192, 131072):
        method = InfiniteHiP.recommended(window, 10**6)
        assert method.capacity(window) is None and method.window + method.sink + method.of(0) > window / 2
    assert longreach.from_json(METHOD.to_json()) == METHOD
