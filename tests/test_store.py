"""Buffers and stores: what is kept, what a rollback undoes, how many bytes it takes."""

from __future__ import annotations

import pytest
import torch

from longreach import DualChunk, LMInfinite, SelfExtend, StreamingLLM
from longreach.core.segments import Identity, Retention, forms
from longreach.memory.buffer import ROLLBACK, SLACK, Buffer
from longreach.memory.store import Store

ONE = slice(0, 1)


def entries(start: int, stop: int, rows: int = 1) -> torch.Tensor:
    """Entry i holds the number i."""
    return torch.arange(start, stop).float().view(1, 1, -1, 1).repeat(rows, 2, 1, 3)


def append(buffer: Buffer, rows: slice, start: int, stop: int) -> None:
    buffer.extend(rows, start, entries(start, stop, rows.stop - rows.start))
    buffer.commit()


def holds(run) -> bool:
    return torch.equal(run.data[0, 0, :, 0], torch.arange(run.start, run.stop).float())


@pytest.mark.parametrize("tail", [None, 1, 10, 300])
@pytest.mark.parametrize("chunks", [[1] * 700, [500, 1, 1, 1, 400, 64, 65, 1], [7] * 120, [1000], [3, 900, 2, 900]])
def test_a_run_holds_all_that_its_queries_see(tail, chunks):
    buffer, end = Buffer(Retention(head=4, tail=tail), 1), 0
    for size in chunks:
        run = buffer.extend(ONE, end, entries(end, end + size))
        assert holds(run) and run.stop == end + size
        assert run.start <= (0 if tail is None else max(0, end - tail + 1))
        end += size
        assert buffer.pinned(ONE, end).data[0, 0, :, 0].tolist() == list(range(min(4, end)))
        buffer.commit()
        if tail is not None:
            assert buffer.body.shape[2] <= tail + ROLLBACK + SLACK


@pytest.mark.parametrize("tail", [None, 10, 300])
@pytest.mark.parametrize("back", [0, 1, 60, ROLLBACK])
def test_rollback_of_the_declared_length_always_works(tail, back):
    buffer = Buffer(Retention(tail=tail), 1)
    end = 0
    for size in (900, 1, 1, 30, 64, 1):
        append(buffer, ONE, end, end + size)
        end += size
    assert buffer.reaches(0) <= end - back
    buffer.rewind(0, end - back)
    run = buffer.extend(ONE, end - back, entries(end - back, end - back + 5))
    assert holds(run) and run.start <= (0 if tail is None else max(0, end - back - tail + 1))


def test_rollback_beyond_what_is_kept_raises():
    buffer = Buffer(Retention(tail=10), 1)
    append(buffer, ONE, 0, 1000)
    assert 500 < buffer.reaches(0) <= 1000 - ROLLBACK
    short = Buffer(Retention(tail=10), 1)
    append(short, ONE, 0, 100)
    assert short.reaches(0) == 0  # nothing was dropped yet
    short.rewind(0, 0)
    assert holds(short.extend(ONE, 0, entries(0, 3)))


def test_rows_move_alone():
    buffer = Buffer(Retention(tail=20), 3)
    append(buffer, slice(0, 3), 0, 15)
    append(buffer, slice(1, 2), 15, 600)
    assert buffer.ends == [15, 600, 15]
    assert holds(buffer.extend(slice(0, 1), 15, entries(15, 16)))
    assert holds(buffer.extend(slice(1, 2), 600, entries(600, 601)))


def test_select_reorders_rows():
    buffer = Buffer(Retention(head=2), 2)
    buffer.extend(slice(0, 1), 0, entries(0, 5))
    buffer.extend(slice(1, 2), 0, entries(10, 17))
    buffer.commit()
    buffer.select(torch.tensor([1, 1, 0]))
    assert buffer.ends == [7, 7, 5] and buffer.head[:, 0, 0, 0].tolist() == [10, 10, 0]


def fill(method, tokens: int, chunk: int, heads: int = 2, width: int = 8) -> Store:
    store = Store([forms(method.layout(0))])
    store.open(1)
    for start in range(0, tokens, chunk):
        new = torch.zeros(1, heads, min(chunk, tokens - start), width)
        for buffer in store.layers[0].buffers:
            buffer.extend(ONE, start, new)
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
    assert store.layers[0].keys[Identity()].body.shape[2] == 256 + ROLLBACK + SLACK


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
def test_a_body_shrinks_only_when_no_row_needs_its_room(long_first):
    """Rows of a forward with a long rollback are written where they are, or from a copy; neither may cut the other off."""
    buffer, rows = Buffer(Retention(tail=10), 2), (slice(0, 1), slice(1, 2))
    for row, stop in zip(rows, (500, 20), strict=True):
        append(buffer, row, 0, stop)
    ends = [500, 20]
    for chunk in (300, 1, 1):
        for row in (rows if long_first else rows[::-1]):
            end = ends[row.start]
            assert holds(buffer.extend(row, end, entries(end, end + chunk), rollback=300 if chunk > 1 else ROLLBACK))
        buffer.commit()
        ends = [end + chunk for end in ends]
        for row in rows:
            stop = ends[row.start]
            kept = buffer.body[row.start, 0, : stop - buffer.starts[row.start], 0]
            assert torch.equal(kept, torch.arange(buffer.starts[row.start], stop).float())
