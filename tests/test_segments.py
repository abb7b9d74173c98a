"""Index arithmetic: segments against the papers' definitions, the published oracles, capacity by brute force."""

from __future__ import annotations

import math

import pytest
import torch

from longreach import LMInfinite, SelfExtend, Stock, from_json
from longreach.core.matrices import matrices
from longreach.core.segments import Chunked, Grouped, Identity, Layout, Piece, Rank, Retention, Segment, Visible, forms
from longreach.methods import registry
from methods_matrix import METHODS
from oracles import LM_INFINITE_4_2, SELFEXTEND_2_4, SELFEXTEND_3_4

N = 61


def rows(method: object, n: int) -> list[list[float | None]]:
    distance = matrices(method.layout(9).segments, n).distance  # type: ignore[attr-defined]
    return [[None if math.isnan(d) else round(d, 3) for d in row[: i + 1]] for i, row in enumerate(distance.tolist())]


PLACED = [m for m in METHODS if not any(isinstance(segment.key_positions, Rank) for segment in m.layout(9).segments)]  # others depend on what is chosen


@pytest.mark.parametrize("method", PLACED, ids=str)
def test_segments_give_the_distances_of_the_definition_and_show_each_pair_once(method):
    """`matrices` raises when two segments show one pair. In a layer that chooses, if any does: there all that may be chosen counts."""
    got = matrices(method.layout(9).segments, N).distance
    i = torch.arange(N)
    want = method.distances(i[:, None], i[None, :])
    torch.testing.assert_close(got, want, equal_nan=True, rtol=0, atol=1e-12)  # a fractional position is a rounded one


@pytest.mark.parametrize("method", PLACED, ids=str)
def test_segments_give_the_same_distances_far_along(method):
    """Around index 10^9, for near keys and the first ones."""
    i = torch.arange(10**9, 10**9 + N)[:, None]
    j = torch.cat([torch.arange(30), torch.arange(10**9 - 100, 10**9 + N)])[None, :]
    got = torch.full((N, j.shape[1]), math.nan, dtype=torch.float64)
    for segment in method.layout(9).segments:
        seen = segment.visible(i, j)
        assert got[seen].isnan().all()
        got = torch.where(seen, segment.query_positions(i) - segment.key_positions(j), got)
    torch.testing.assert_close(got, method.distances(i, j), equal_nan=True, rtol=1e-12, atol=1e-6)


@pytest.mark.parametrize("method", PLACED, ids=str)
def test_no_query_sees_the_future_and_every_query_sees_itself_at_distance_zero(method):
    distance = matrices(method.layout(0).segments, N).distance
    assert bool(distance.triu(1).isnan().sum() == N * N) or bool(distance[torch.ones(N, N).triu(1).bool()].isnan().all())
    assert distance.diagonal().eq(0).all()


def test_overlapping_segments_are_found():
    with pytest.raises(AssertionError, match="another segment"):
        matrices((Segment(Identity(), Identity(), Visible(0, 4)), Segment(Grouped(2), Grouped(2), Visible(3))), 8)


def parse(oracle: str) -> list[list[float | None]]:
    return [[None if cell == "." else float(cell) for cell in line.split()] for line in oracle.strip().splitlines()]


@pytest.mark.parametrize(
    ("method", "oracle"),
    [
        (SelfExtend(2, 4), SELFEXTEND_2_4),
        (SelfExtend(3, 4), SELFEXTEND_3_4),
        (LMInfinite(4, 2, distance_limit=4), LM_INFINITE_4_2),
        (LMInfinite(4, 2), LM_INFINITE_4_2),
    ],
    ids=str,
)
def test_oracles(method, oracle):
    assert rows(method, 10) == [row[: i + 1] for i, row in enumerate(parse(oracle))]


def test_oracle_rows_of_variants():
    assert rows(SelfExtend(3, 4, shift="true_division"), 10)[9] == [5.667, 5.667, 5.667, 4.667, 4.667, 4.667, 3, 2, 1, 0]
    last = rows(SelfExtend(3, 5), 12)[9:]
    assert last == parse("7 7 7 6 6 4 3 2 1 0\n7 7 7 6 6 6 4 3 2 1 0\n7 7 7 6 6 6 5 4 3 2 1 0")
    paper = [row[:2] for row in rows(LMInfinite(4, 2, distance_limit=7), 10)[4:]]
    assert paper == [[4, 3], [5, 4], [6, 5], [7, 6], [7, 7], [7, 7]]
    official = [row[:2] for row in rows(LMInfinite(4, 2, distance_limit=7, distance="constant"), 10)[4:]]
    assert official == [[7, 3], [7, 7], [7, 7], [7, 7], [7, 7], [7, 7]]


def largest(method: SelfExtend, n: int) -> float:
    i, j = torch.tensor([n - 1]), torch.arange(n)
    return method.distances(i, j).nan_to_num(0).max().item()


def test_selfextend_capacity_is_exact():
    """The largest N whose largest distance stays below L, against brute force."""
    for window in range(2, 24):
        for near in range(1, window):
            for group in range(1, 6):
                method = SelfExtend(group, near)
                capacity = method.capacity(window)
                assert capacity == group * (window - near + near // group)
                assert max(largest(method, n) for n in range(max(1, capacity - group), capacity + 1)) <= window - 1
                assert largest(method, capacity + 1) == window


def test_capacity_with_a_fractional_shift():
    for near in range(1, 12):
        for group in range(1, 20):
            method = SelfExtend(group, near, shift="true_division")
            capacity = method.capacity(12)
            assert capacity >= near
            assert largest(method, capacity) <= 11 and (largest(method, capacity + 1) > 11 or capacity + 1 <= near)


@pytest.mark.parametrize(
    ("window", "near", "group", "capacity"),
    [(4096, 1024, 5, 16380), (4096, 1024, 6, 19452), (4096, 1024, 8, 25600), (8192, 1024, 6, 44028), (8192, 1024, 32, 230400), (2048, 512, 12, 18936)],
)
def test_published_capacities(window, near, group, capacity):
    assert SelfExtend(group, near).capacity(window) == capacity


def test_lm_infinite_capacity_is_unlimited_only_within_trained_distances():
    assert LMInfinite(64).capacity(64) is None
    assert LMInfinite(32, distance_limit=64).capacity(64) is None
    assert LMInfinite(65).capacity(64) == 0
    assert LMInfinite(32, distance_limit=65).capacity(64) == 0
    assert LMInfinite(32, top_k=5, top_k_distance=65).capacity(64) == 0
    assert LMInfinite(32, top_k=5, top_k_distance=32).capacity(64) is None


def test_forms_keep_only_what_a_later_query_needs():
    assert forms(SelfExtend(8, 64).layout()) == {Grouped(8): Retention(tail=None), Identity(): Retention(tail=64)}
    kept = forms(LMInfinite(64, 4).layout())
    assert sorted(r.tail for r in kept.values()) == [0, 64]
    assert max(r.head for r in kept.values()) == 4
    assert any(r.tail is None for r in forms(LMInfinite(64, 4, top_k=2).layout(9)).values())


VISIBLE = [
    Visible(),
    Visible(0, 7),
    Visible(5, 9),
    Visible(4, last_key=3),
    Visible(3, last_key=6, first_query=11),
    Visible(0, 9, last_query=13),
    Visible(0, 1, chunk=6),
    Visible(1, 2, chunk=6),
    Visible(2, chunk=6),
    Visible(1, chunk=5, first_query=8, last_query=17),
    Visible(1, 3, chunk=4, last_key=9),
]


@pytest.mark.parametrize("visible", VISIBLE, ids=str)
@pytest.mark.parametrize(("start", "stop"), [(0, 31), (0, 1), (5, 6), (6, 7), (11, 12), (7, 23), (12, 18), (3, 4)])
def test_pieces_are_the_visible_pairs_each_once(visible, start, stop):
    i, j = torch.arange(stop)[:, None], torch.arange(stop)[None, :]
    shown = torch.zeros(stop, stop, dtype=torch.int)
    for piece in visible.pieces(start, stop):
        assert start <= piece.first < piece.last <= stop and 0 <= piece.from_key < piece.to_key <= stop
        behind = i - j
        band = (behind >= piece.low) & (behind < (piece.high or stop + 1))
        shown += band & (i >= piece.first) & (i < piece.last) & (j >= piece.from_key) & (j < piece.to_key)
    assert torch.equal(shown, (visible(i, j) & (i >= start)).int())


def test_a_decoded_token_takes_one_piece_per_segment():
    assert list(Visible(0, 1, chunk=6).pieces(20, 21)) == [Piece(20, 21, 18, 21)]
    assert list(Visible(1, 2, chunk=6).pieces(20, 21)) == [Piece(20, 21, 12, 18)]
    assert list(Visible(2, chunk=6).pieces(20, 21)) == [Piece(20, 21, 0, 12)]
    assert list(Visible(2, chunk=6).pieces(5, 12)) == []


def test_chunked_positions():
    index = torch.arange(12)
    assert Chunked(5)(index).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    assert Chunked(5, shift=5, ceiling=7)(index).tolist() == [5, 6, 7, 7, 7, 5, 6, 7, 7, 7, 5, 6]
    assert Chunked(4, stride=2)(index).tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_largest_distance_is_that_of_every_query_so_far(method):
    i = torch.arange(N)
    per_query = method.distances(i[:, None], i[None, :]).nan_to_num(0).max(dim=1).values
    so_far = per_query.cummax(dim=0).values
    assert [method.largest_distance(n) for n in range(1, N + 1)] == pytest.approx(so_far.tolist())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_json_round_trip(method):
    assert from_json(method.to_json()) == method


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"method": "nope"}, "choose one of"),
        ({"method": "selfextend", "groups": 3}, "its parameters are"),
        ({"method": "selfextend", "group_size": 0, "window": 4}, "at least 1"),
    ],
)
def test_from_json_refuses(data, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_json(data)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SelfExtend(0, 4),
        lambda: SelfExtend(2, 0),
        lambda: SelfExtend(2.5, 4),
        lambda: SelfExtend(True, 4),
        lambda: SelfExtend(2, 4, shift="round"),
        lambda: SelfExtend(2, 4, log_scale=1),
        lambda: LMInfinite(0),
        lambda: LMInfinite(4, -1),
        lambda: LMInfinite(4, distance="max"),
        lambda: LMInfinite(4, distance_limit=0),
        lambda: LMInfinite(8, distance_limit=4, distance="constant"),
        lambda: LMInfinite(4, top_k_rows="some"),
        lambda: Stock(0),
        lambda: Stock(attention_chunk=0),
        lambda: Stock(sliding_window=4, attention_chunk=4),
        lambda: Layout(()),
    ],
)
def test_bad_parameters_are_refused(make):
    with pytest.raises(ValueError):
        make()


def test_registry_finds_every_method_file():
    assert {"selfextend", "lm-infinite", "stock"} <= set(registry())
    assert all(name == method.name and method.__doc__ for name, method in registry().items())
