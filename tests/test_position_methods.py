"""StreamingLLM, ReRoPE, Leaky ReRoPE, Dual Chunk Attention, STRING and block self-extend against published matrices and simulations."""

from __future__ import annotations

import math

import pytest
import torch

from longreach import STRING, BlockSelfExtend, DualChunk, LeakyReRoPE, LogisticSelfExtend, ReRoPE, StreamingLLM
from longreach.core.matrices import matrices
from longreach.core.segments import Affine, Chunked, Constant, Grouped, Identity, Retention, forms
from oracles import BLOCK_SELFEXTEND_2_4, DUAL_CHUNK_7_4, STREAMING_3_2


def executed(method, n: int) -> list[list[float | None]]:
    """What the segments show, rows up to the diagonal."""
    found = matrices(method.layout().segments, n).distance.tolist()
    return [[None if math.isnan(d) else d for d in row[: i + 1]] for i, row in enumerate(found)]


def defined(method, n: int) -> torch.Tensor:
    i = torch.arange(n)
    return method.distances(i[:, None], i[None, :])


def parse(text: str) -> list[list[float | None]]:
    rows = [[None if cell == "." else float(cell) for cell in line.split()] for line in text.strip().splitlines()]
    return [row[: i + 1] for i, row in enumerate(rows)] if len(rows) == len(rows[-1]) else rows


@pytest.mark.parametrize(
    ("method", "oracle"),
    [(StreamingLLM(3, 2), STREAMING_3_2), (DualChunk(7, chunk_length=4), DUAL_CHUNK_7_4), (BlockSelfExtend(2, 4), BLOCK_SELFEXTEND_2_4)],
    ids=str,
)
def test_published_matrices(method, oracle):
    assert executed(method, 10) == parse(oracle)


FIGURE = """
6 5 4 3 2 1 0
7 6 5 4 3 2 1 0
8 7 6 5 4 3 2 1 0
9 8 7 6 5 4 3 2 1 0
9 8 7 6 5 4 4 3 2 1 0
9 8 7 6 5 4 5 4 3 2 1 0
"""


@pytest.mark.parametrize(
    ("method", "n", "last"),
    [
        (StreamingLLM(3, 2, counting="chunkable"), 4, "5 2 1 0"),
        (StreamingLLM(3, 2, counting="chunkable"), 5, "5 4 2 1 0"),
        (StreamingLLM(3, 2, counting="chunkable"), 10, "5 4 . . . . . 2 1 0"),
        (StreamingLLM(3, 0), 7, ". . . 3 2 1 0"),
        (ReRoPE(4), 10, "4 4 4 4 4 4 3 2 1 0"),
        (LeakyReRoPE(4, 2), 6, "4.5 4 3 2 1 0"),
        (LeakyReRoPE(4, 2), 10, "6.5 6 5.5 5 4.5 4 3 2 1 0"),
        (DualChunk(10, chunk_length=6), 12, FIGURE),  # the paper's figure
        (DualChunk(5, chunk_length=3), 6, "4 3 2 2 1 0"),  # the official code with chunk size 4 and local window 1
        (DualChunk(5, chunk_length=3), 12, "4 3 2 4 3 2 4 3 2 2 1 0"),
        (STRING(3, 0), 9, "5 4 3 2 1 0 2 1 0"),  # the paper's example
        (STRING(3, 1), 9, "6 5 4 3 2 1 2 1 0"),
        # by hand: groups of 1, 1, 2, 2, 3, 3 tokens, for size 2 is from 0.5 k = ln(8 / 3) = 0.98 on, size 3 from ln(6) = 1.79 and size 4 from ln(16) = 2.77
        (LogisticSelfExtend(4, 0.5, 5), 11, "8 7 6 6 5 5 4 3 2 1 0"),
        (LogisticSelfExtend(4, 0.5, 5), 12, "8 7 6 6 5 5 4 4 3 2 1 0"),
        (BlockSelfExtend(3, 6), 14, "5 5 5 4 4 4 3 3 3 2 2 2 1 0"),  # by hand: border 12, at 4; six tokens a block, three a position
    ],
    ids=str,
)
def test_published_rows(method, n, last):
    rows = parse(last)
    assert executed(method, n)[-len(rows) :] == rows


# -- simulations of the official procedures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_recent", "n_sink"), [(3, 2), (1, 0), (1, 1), (5, 0), (7, 4), (20, 3), (60, 2)])
def test_streaming_llm_is_its_cache(n_recent, n_sink):
    """One token at a time: it stands behind the cached ones, attends to them and itself, then the cache gives up what it cannot hold."""
    n, cache = 45, []
    want = torch.full((n, n), math.nan, dtype=torch.float64)
    for i in range(n):
        cache.append(i)
        for place, j in enumerate(cache):
            want[i, j] = len(cache) - 1 - place
        if len(cache) > n_sink + n_recent:
            cache = cache[:n_sink] + cache[-n_recent:]
    torch.testing.assert_close(defined(StreamingLLM(n_recent, n_sink), n), want, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(("group", "window"), [(1, 4), (2, 4), (2, 2), (3, 6), (4, 8), (5, 20), (4, 64)])
def test_block_selfextend_is_the_editing_of_positions(group, window):
    """llama.cpp edits the positions of its cells before a token is decoded; distances are differences of what stands there then."""
    n, positions, past, grouped = 70, [], 0, 0
    want = torch.full((n, n), math.nan, dtype=torch.float64)
    for i in range(n):
        while past >= grouped + window:
            blocks = group * grouped // window
            gained = window // group * (group - 1)
            back = window // group - blocks * gained - window
            moved = [p + blocks * gained if grouped <= p < past else p for p in positions]
            first = grouped + blocks * gained
            moved = [p // group if first <= p < first + window else p for p in moved]
            positions = [p + back if first + window <= p < past + blocks * gained else p for p in moved]
            past, grouped = past - gained, grouped + window // group
        positions.append(past)
        for j, position in enumerate(positions):
            want[i, j] = past - position
        past += 1
    torch.testing.assert_close(defined(BlockSelfExtend(group, window), n), want, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("length", [2, 3, 8, 24, 40, 41])
def test_dual_chunk_repository_preset_is_the_official_parameterisation(length):
    size, local = 3 * length // 4, length // 8
    chunk, n = size - local, 3 * length
    method = DualChunk(length, preset="repository")
    for i in range(n):
        row = method.distances(torch.tensor([i]), torch.arange(n))[: n + 1]
        for j in range(i + 1):
            back = i // chunk - j // chunk
            query = [i % chunk, min(i % chunk + chunk, size)][back] if back < 2 else min(2 * chunk - 1, size)
            assert row[j] == query - j % chunk


def test_dual_chunk_presets():
    paper, repository = DualChunk(4096), DualChunk(4096, preset="repository")
    assert (paper.chunk, paper.near, paper.furthest) == (3072, 1024, 4095)
    assert (repository.chunk, repository.near, repository.furthest) == (2560, 513, 3072)
    assert DualChunk(32768, chunk_length=24576).near == 8192
    assert DualChunk(4096, chunk_length=2560, local_window=513).layout() == repository.layout()


@pytest.mark.parametrize("method", [DualChunk(24), DualChunk(24, preset="repository"), DualChunk(7, chunk_length=4), DualChunk(8, chunk_length=4)], ids=str)
def test_dual_chunk_keeps_the_local_window_and_never_goes_below_it_beyond(method):
    n = 90
    i = torch.arange(n)
    true, d = (i[:, None] - i[None, :]).double(), defined(method, n)
    near = (true >= 0) & (true <= method.near)
    assert torch.equal(d[near], true[near])
    assert d[true > method.near].min() >= method.near and d.nan_to_num(0).max() == method.furthest


# -- capacity ---------------------------------------------------------------------------------------------------------------------


def methods_of(window: int) -> list:
    some = range(1, window + 4)
    return [
        *(StreamingLLM(a, b, counting=c) for a in some for b in (0, 1, 4) for c in ("official", "chunkable")),
        *(ReRoPE(w) for w in some),
        *(LeakyReRoPE(w, s) for w in some for s in (1, 2, 2.5, 3, 16)),
        *(DualChunk(window + more, preset=p) for more in (0, 5) for p in ("paper", "repository")),
        *(DualChunk(window + 2, chunk_length=s, local_window=1) for s in (1, 2, window)),
        *(STRING(s, w) for s in some for w in range(0, s + 1)),
        *(BlockSelfExtend(g, g * k) for g in (1, 2, 3, 5) for k in (1, 2, 3, 4)),
    ]


@pytest.mark.parametrize("window", [4, 7, 12])
def test_capacity_is_exact(window):
    """The largest N of which every distance is below the trained window, by brute force; StreamingLLM may reach the window itself."""
    n = 400
    i = torch.arange(n)
    for method in methods_of(window):
        per_query = method.distances(i[:, None], i[None, :]).nan_to_num(0).max(dim=1).values
        beyond = (per_query > window - 1).nonzero().flatten().tolist()
        capacity = method.capacity(window)
        if isinstance(method, StreamingLLM) and method.cache <= window:
            assert capacity is None and per_query.max() <= window
        else:
            assert capacity == (beyond[0] if beyond else None), method


# -- what is kept -----------------------------------------------------------------------------------------------------------------


def test_keys_exist_in_as_few_forms_as_needed():
    everything = Retention(tail=None)
    assert forms(DualChunk(64).layout()) == {Chunked(48): everything}
    assert forms(STRING(64, 16).layout()) == {Identity(): everything}
    assert forms(ReRoPE(64).layout()) == {Identity(): Retention(tail=64), Constant(0): everything}
    assert forms(LeakyReRoPE(64, 4).layout()) == {Identity(): Retention(tail=64), Affine(0.25): everything}
    assert forms(BlockSelfExtend(4, 64).layout()) == {Identity(): Retention(tail=64), Grouped(4): everything}
    assert forms(StreamingLLM(64, 4).layout()) == {Identity(): Retention(head=4, tail=65), Affine(1, -68): Retention(head=4)}
    assert forms(StreamingLLM(64, 4, counting="chunkable").layout()) == {Identity(): Retention(tail=64), Affine(1, -68): Retention(head=4)}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: StreamingLLM(0), "at least 1"),
        (lambda: StreamingLLM(4, -1), "at least 0"),
        (lambda: StreamingLLM(4, counting="other"), "'official' or 'chunkable'"),
        (lambda: ReRoPE(0), "at least 1"),
        (lambda: ReRoPE(4, log_scale=1), "at least 2"),
        (lambda: LeakyReRoPE(0), "at least 1"),
        (lambda: LeakyReRoPE(4, 0.5), "factor must be a number of at least 1 and at most"),
        (lambda: LeakyReRoPE(4, math.nan), "at least 1"),
        (lambda: LeakyReRoPE(4, math.inf), "at least 1"),
        (lambda: LeakyReRoPE(4, log_scale=1), "at least 2"),
        (lambda: DualChunk(1), "at least 2"),
        (lambda: DualChunk(8, preset="vllm"), "'paper' or 'repository'"),
        (lambda: DualChunk(8, chunk_length=8), "at most 7"),
        (lambda: DualChunk(8, chunk_length=0), "at least 1"),
        (lambda: DualChunk(8, local_window=0), "at least 1"),
        (lambda: DualChunk(8, chunk_length=6, local_window=3), "pass local_window 2 or less"),
        (lambda: DualChunk(9, chunk_length=3), "pass local_window 3 or less, or chunk_length 5 or more"),
        (lambda: STRING(0), "at least 1"),
        (lambda: STRING(64), "pass local_window 64 or less"),
        (lambda: STRING(64, -1), "at least 0"),
        (lambda: BlockSelfExtend(0), "at least 1"),
        (lambda: BlockSelfExtend(3, 8), "pass window 9"),
        (lambda: BlockSelfExtend(3, 1), "pass window 3"),
        (lambda: BlockSelfExtend(3, 0), "at least 1"),
    ],
)
def test_bad_parameters_are_refused_with_the_fix(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
