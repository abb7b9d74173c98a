"""Buffers and stores: what is kept, what a rollback undoes, how many bytes it takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longreach import DualChunk, LMInfinite, SelfExtend, StreamingLLM
from longreach.core.segments import Identity, Retention, forms
from longreach.memory.buffer import Buffer
from longreach.memory.past import Past
from longreach.memory.placement import ROLLBACK, SLACK, SMALLEST, STEP, Placement, alike, bucket_of
from longreach.memory.store import Store

ONE = slice(0, 1)


def entries(start: int, stop: int, rows: int = 1, first: float = 0.0) -> torch.Tensor:
    """Entry i holds the number i (and `first` more)."""
    return (torch.arange(start, stop).float() + first).view(1, 1, -1, 1).repeat(rows, 2, 1, 3)


class One:
    """A placement and one buffer of it, written to and read from as a layer does."""

    def __init__(self, retention: Retention, rows: int) -> None:
        self.placement = Placement(replace(retention, head=0), rows)
        self.buffer = Buffer(self.placement, retention.head)

    @property
    def ends(self) -> list[int]:
        return self.placement.ends

    def reserve(self, rows: slice, start: int, stop: int, rollback: int = ROLLBACK) -> None:
        self.placement.reserve([(row, start, stop) for row in range(rows.start, rows.stop)], rollback)

    def write(self, rows: slice, start: int, stop: int, first: float = 0.0) -> None:
        self.buffer.write(rows, start, entries(start, stop, rows.stop - rows.start, first))

    def settle(self) -> None:
        self.buffer.release()
        self.placement.commit()
        self.buffer.settle()
        self.placement.finish()

    def append(self, rows: slice, start: int, stop: int, first: float = 0.0) -> None:
        self.reserve(rows, start, stop)
        self.write(rows, start, stop, first)
        self.settle()

    def shows(self, row: int, stop: int) -> bool:
        """Whether all that the query stop - 1 sees is there, and right."""
        tail = self.placement.tail
        start = 0 if tail is None else max(0, stop - tail)
        return torch.equal(self.buffer.view(slice(row, row + 1), start, stop)[0, 0, :, 0], torch.arange(start, stop).float())


@pytest.mark.parametrize("tail", [None, 1, 10, 300])
@pytest.mark.parametrize("chunks", [[1] * 700, [500, 1, 1, 1, 400, 64, 65, 1], [7] * 120, [1000], [3, 900, 2, 900]])
def test_a_view_shows_all_that_its_queries_see(tail, chunks):
    one, end = One(Retention(head=4, tail=tail), 1), 0
    for size in chunks:
        one.reserve(ONE, end, end + size)
        one.write(ONE, end, end + size)
        first = 0 if tail is None else max(0, end - tail + 1)
        assert torch.equal(one.buffer.view(ONE, first, end + size)[0, 1, :, 2], torch.arange(first, end + size).float())
        end += size
        assert one.buffer.pinned(ONE, 0, min(4, end))[0, 0, :, 0].tolist() == list(range(min(4, end)))
        one.settle()
        assert one.shows(0, end)
        if tail is not None:
            assert one.buffer.nbytes <= (tail + ROLLBACK + SLACK + 4) * 2 * 3 * 4


@pytest.mark.parametrize("tail", [None, 10, 300])
@pytest.mark.parametrize("back", [0, 1, 60, ROLLBACK])
def test_rollback_of_the_declared_length_always_works(tail, back):
    one, end = One(Retention(tail=tail), 1), 0
    for size in (900, 1, 1, 30, 64, 1):
        one.append(ONE, end, end + size)
        end += size
    assert one.placement.reaches(0) <= end - back
    one.placement.rewind(0, end - back)
    one.append(ONE, end - back, end - back + 5)
    assert one.shows(0, end - back + 5) and one.ends == [end - back + 5]


def test_rollback_beyond_what_is_kept_raises():
    long = One(Retention(tail=10), 1)
    long.append(ONE, 0, 1000)
    assert 500 < long.placement.reaches(0) <= 1000 - ROLLBACK
    short = One(Retention(tail=10), 1)
    short.append(ONE, 0, 100)
    assert short.placement.reaches(0) == 0  # nothing was dropped yet
    short.placement.rewind(0, 0)
    short.append(ONE, 0, 3)
    assert short.shows(0, 3)


@pytest.mark.parametrize("tail", [None, 10])
@pytest.mark.parametrize("counts", [True, False])
def test_what_a_forward_writes_over_is_there_until_it_counts(tail, counts):
    """A mask that hides the last tokens makes the next ones follow earlier: they take the places of those that are hidden."""
    one = One(Retention(head=2, tail=tail), 1)
    one.append(ONE, 0, 40)
    one.reserve(ONE, 1, 30)
    one.write(ONE, 1, 30, first=100.0)
    assert one.buffer.view(ONE, 1, 30)[0, 0, :, 0].tolist() == [i + 100.0 for i in range(1, 30)]
    if counts:
        one.settle()
        one.placement.rewind(0, 30)
        assert one.buffer.view(ONE, 20, 30)[0, 0, :, 0].tolist() == [i + 100.0 for i in range(20, 30)]
        assert one.buffer.pinned(ONE, 0, 2)[0, 0, :, 0].tolist() == [0.0, 101.0]
    else:
        one.buffer.discard()
        one.placement.finish()
        assert one.shows(0, 40) and one.buffer.pinned(ONE, 0, 2)[0, 0, :, 0].tolist() == [0.0, 1.0]


def test_rows_move_alone():
    one = One(Retention(tail=20), 3)
    one.append(slice(0, 3), 0, 15)
    one.append(slice(1, 2), 15, 600)
    assert one.ends == [15, 600, 15]
    one.append(slice(0, 1), 15, 16)
    one.append(slice(1, 2), 600, 601)
    assert one.shows(0, 16) and one.shows(1, 601) and one.shows(2, 15)


def test_rows_of_about_the_same_length_share_a_bucket():
    assert [bucket_of(n) for n in (0, 1, SMALLEST, SMALLEST + 1, int(SMALLEST * STEP), int(SMALLEST * STEP) + 1)] == [0, 0, 0, 1, 1, 2]
    assert [bucket_of(SMALLEST, before) for before in (0, 1, 2)] == [0, 1, 0]  # one step too long is left where it is
    one = One(Retention(tail=None), 4)
    one.append(slice(0, 4), 0, 100)
    one.append(slice(1, 3), 100, 1000)
    one.append(slice(3, 4), 100, 900)
    places = one.placement.places
    assert places.members == {0: (0,), 4: (1, 2, 3)} and places.slots == (0, 0, 1, 2)
    assert all(one.shows(row, end) for row, end in enumerate(one.ends))
    assert alike([one.placement], range(4)) == [((0, 0),), ((4, 0),), ((4, 0),), ((4, 0),)]
    assert one.buffer.nbytes < 4 * (1000 + SLACK) * 2 * 3 * 4  # the short row has a short place
    one.append(slice(0, 1), 100, 1001)
    assert one.placement.places.even and alike([one.placement], range(4)) == [()] * 4
    assert all(one.shows(row, end) for row, end in enumerate(one.ends))


@pytest.mark.parametrize("rows", [1, 3])
def test_an_interrupted_move_is_undone(rows, monkeypatch):
    """A tail moves to the front of its own memory, row by row, and whoever stops in between finds it again."""
    one = One(Retention(tail=200), rows)
    for row in range(rows):
        one.append(slice(row, row + 1), 0, 380 + row)
    ends, real, calls = [*one.ends], Buffer._to_front, []

    def broken(self, *arguments):
        real(self, *arguments)
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(Buffer, "_to_front", broken)
    for _ in range(2 if rows == 1 else 1):  # twice, on the way to other places; several rows are copied after a failure
        one.placement.reserve([(row, end, end + 30 + len(calls)) for row, end in enumerate(ends)], ROLLBACK)
        with pytest.raises(KeyboardInterrupt):
            one.write(slice(0, 1), ends[0], ends[0] + 30 + len(calls))
        one.buffer.discard()
        one.placement.finish(False)
    monkeypatch.setattr(Buffer, "_to_front", real)
    assert calls
    for row, end in enumerate(ends):
        one.append(slice(row, row + 1), end, end + 40)
        assert one.shows(row, end + 40)


def test_select_reorders_rows():
    one = One(Retention(head=2, tail=30), 3)
    one.append(slice(0, 1), 0, 5)
    one.append(slice(1, 2), 0, 700, first=10.0)
    one.append(slice(2, 3), 0, 17)
    one.placement.select([1, 1, 0])
    one.buffer.select(torch.tensor([1, 1, 0]))
    assert one.ends == [700, 700, 5] and one.buffer.head[:, 0, 0, 0].tolist() == [10, 10, 0]
    for row in (0, 1):
        assert one.buffer.view(slice(row, row + 1), 690, 700)[0, 0, :, 0].tolist() == [i + 10.0 for i in range(690, 700)]
    assert one.shows(2, 5)


def test_forks_read_the_same_memory_until_one_writes():
    one = One(Retention(tail=None), 1)
    one.append(ONE, 0, 50)
    other = One(Retention(tail=None), 1)
    other.placement = one.placement.fork()
    other.buffer = one.buffer.fork(other.placement)
    assert other.buffer.bodies[0] is one.buffer.bodies[0]
    one.append(ONE, 50, 60)
    other.append(ONE, 50, 55)
    assert one.shows(0, 60) and other.shows(0, 55) and (one.ends, other.ends) == ([60], [55])
    other.append(ONE, 55, 56)
    assert one.shows(0, 60) and other.shows(0, 56)


def fill(method, tokens: int, chunk: int, heads: int = 2, width: int = 8) -> Store:
    store = Store([forms(method.layout(0))])
    store.open(1)
    for start in range(0, tokens, chunk):
        new = torch.zeros(1, heads, min(chunk, tokens - start), width)
        store.reserve([Past(start)], [new.shape[2]])
        for buffer in store.layers[0].buffers:
            buffer.write(ONE, start, new)
        store.advance(None, new.shape[2])
    return store


@pytest.mark.parametrize("chunk", [1, 100, 4096])
def test_lm_infinite_bytes_are_constant_and_follow_the_formula(chunk):
    per_entry = 2 * 8 * 4
    bound = per_entry * (2 * (512 + ROLLBACK + SLACK) + 2 * 4)  # values and the near form: head or tail; the global form: head only
    sizes = {fill(LMInfinite(512, 4), tokens, chunk).nbytes for tokens in (4096, 8192)}
    assert len(sizes) == 1 and sizes.pop() == bound


@pytest.mark.parametrize("chunk", [1, 100, 4096])
@pytest.mark.parametrize(("counting", "near", "forms_of_sinks"), [("official", 513, 2), ("chunkable", 512, 1)])
def test_streaming_llm_bytes_are_constant_and_follow_the_formula(chunk, counting, near, forms_of_sinks):
    per_entry = 2 * 8 * 4
    method = StreamingLLM(512, 4, counting=counting)
    sizes = {fill(method, tokens, chunk).nbytes for tokens in (4096, 8192)}
    assert sizes == {per_entry * (2 * (near + ROLLBACK + SLACK) + (1 + forms_of_sinks) * 4)}  # values hold the sinks too


def test_dual_chunk_keeps_no_more_than_plain_attention():
    assert fill(DualChunk(256), 8192, 8192).nbytes == 2 * 8 * 4 * 2 * (8192 + SLACK)


def test_selfextend_keeps_values_the_grouped_form_and_a_near_tail():
    per_entry, tokens = 2 * 8 * 4, 8192
    store = fill(SelfExtend(8, 256), tokens, tokens)
    assert store.nbytes == per_entry * (2 * (tokens + SLACK) + 256 + ROLLBACK + SLACK)
    assert store.layers[0].keys[Identity()].nbytes == per_entry * (256 + ROLLBACK + SLACK)


def test_store_counts_slots_and_tokens_apart():
    store = Store([forms(SelfExtend(2, 4).layout(0))])
    store.open(2)
    store.advance(torch.tensor([[False, True, True], [True, True, True]]), 3)
    store.advance(None, 2)
    assert store.lengths == [4, 5] and store.seen == 5
    store.crop(3)
    assert store.lengths == [1, 2] and store.seen == 2
    store.crop(1)
    assert store.lengths == [0, 1]
    with pytest.raises(ValueError, match="start a new cache"):
        store.open(3)


@pytest.mark.parametrize("long_first", [True, False])
def test_a_bucket_shrinks_only_when_no_row_needs_its_room(long_first):
    """Rows of a forward with a long rollback are written where they are, or from a copy; neither may cut the other off."""
    one, rows = One(Retention(tail=10), 2), (slice(0, 1), slice(1, 2))
    for row, stop in zip(rows, (500, 20), strict=True):
        one.append(row, 0, stop)
    ends = [500, 20]
    for chunk in (300, 1, 1):
        one.placement.reserve([(row, end, end + chunk) for row, end in enumerate(ends)], 300 if chunk > 1 else ROLLBACK)
        for row in (rows if long_first else rows[::-1]):
            one.write(row, ends[row.start], ends[row.start] + chunk)
        one.settle()
        ends = [end + chunk for end in ends]
        for row, stop in enumerate(ends):
            first = one.placement.places.firsts[row]
            assert torch.equal(one.buffer.view(slice(row, row + 1), first, stop)[0, 0, :, 0], torch.arange(first, stop).float())
