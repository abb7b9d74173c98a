"""What will be held, before it is: of a row that is read in a schedule of forwards, to the entry; of the rows of a store, at most, until each has read so much.

Index arithmetic and sizes beside `placement` and `blocks`, whose rules these are; makes no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from longreach.core.segments import Place, Retention
from longreach.memory import blocks, placement
from longreach.memory.adopting import CHAIN
from longreach.memory.bases import COPIED
from longreach.memory.placement import Placement, bucket_of, room
from longreach.memory.store import Store
from longreach.memory.stored import Stored


def allocated(kept: Retention, forwards: Iterator[tuple[int, int]], chunked: int, step: int, prompt: int, stored: int) -> int:
    """Entries that are allocated for a row after it has read `chunked` tokens in forwards of `step`, those up to `prompt` in one, and one at a time up to
    `stored`; `forwards` are these as (start, tokens)."""
    if kept.tail == 0:
        return kept.head
    return kept.head + (_growing(kept, chunked, step, prompt, stored) if kept.tail is None else _bounded(kept.tail, forwards))


def _growing(kept: Retention, chunked: int, step: int, prompt: int, stored: int) -> int:
    """Only the forwards at which a bucket grows are looked at."""
    size = 0
    while size < kept.entries(chunked):
        size = room(size, kept.entries(min(-(-(kept.first + (size + 1) * kept.block) // step) * step, chunked)), None)
    size = room(size, kept.entries(prompt), None)
    while size < kept.entries(stored):
        size = room(size, size + 1, None)
    return size


def _bounded(tail: int, forwards: Iterator[tuple[int, int]]) -> int:
    keep = tail + placement.ROLLBACK
    most, size, first = keep + placement.SLACK, 0, 0
    for start, new in forwards:
        if size == most:
            break
        stop = start + new
        if stop - first > most:
            first = max(first, stop - keep)
        size = room(size, stop - first, most)
    return size


@dataclass(frozen=True)
class Coming:
    """A row that is to join and to read until it has `total` tokens; it goes on from the first `begin` tokens of the only row of a store (None: from none)."""

    total: int
    source: Store | None = None
    begin: int = 0


@dataclass(frozen=True)
class Need:
    """What rows take at most.

    nbytes     keys, values and what an index keeps, but for what lies in the blocks of tiers.
    blocks     that are still to come, of every buffer that has such.
    summaries  bytes of `nbytes` that an index keeps.
    """

    nbytes: int
    blocks: int = 0
    summaries: int = 0


def need(store: Store, layers: Sequence[Stored], totals: Mapping[int, int], coming: Sequence[Coming] = (), taken: Collection[int] = ()) -> Need:
    """At any time until the rows of a store have read `totals` tokens each, and those that are coming too, by sizes of its layers. Of the stores that these go
    on from nothing counts: they are there already. What rows hold that are `taken` counts for the stores that they go to, too (`adopting.adopt`). While a
    buffer grows, it is there twice: that is not counted, as other memory of a forward is not.

    It holds whatever the order: each that is coming joins once and goes back to its `begin` before it reads, each that is taken is so once, at any length, and
    rows read in any forwards and leave, before, between and after. Not where a row is cropped else, comes or is taken beside these, or reads more."""
    store.settle()
    rows = {place: _rows(lying, place, totals, coming, taken) for place, lying in store.placements.items()}
    columns = {place: _columns(lying, rows[place]) for place, lying in store.placements.items()}
    count = store.rows + len(coming) + len(taken)
    nbytes, summaries = sum({key: size for layer in store.layers for key, size in layer.frozen.items()}.values()), 0
    for layer in layers:
        for kept, size in layer.buffers(shared=True):
            held = size * (kept.head * count + columns[kept.place])
            nbytes += held
            summaries += held if kept.block > 1 else 0
    if (whole := store.placements.get(None)) is None or whole.unit == 1:
        return Need(nbytes, 0, summaries)
    ends = [(row.first, row.end) for row in rows[None]]
    filled = [max(0, blocks.horizon(whole, end) - first) // whole.unit for first, end in ends]
    return Need(nbytes, sum(filled), summaries)


@dataclass(frozen=True)
class Row:
    """What a row has of its own in one form, in entries.

    first, end  of it, when it has read all that it is to read.
    most        that it holds at once.
    now         that it holds before it reads on, in `bucket`.
    back        that it goes on with, where it goes back first.
    parts       what a store takes that this row goes to (`adopting.adopt`), beside what it holds here: None: it goes to none, 0: nothing, for both read it,
                or all of it, which lies in too many parts.
    """

    first: int
    end: int
    most: int
    now: int
    back: int
    bucket: int
    parts: int | None = None


def _rows(lying: Placement, place: Place, totals: Mapping[int, int], coming: Sequence[Coming], taken: Collection[int]) -> list[Row]:
    places, entries, found = lying.places, lying.kept.entries, []
    for row, (first, now, bucket) in enumerate(zip(places.firsts, lying.ends, places.buckets, strict=True)):
        end = max(now, entries(totals.get(row, 0)))
        parts = None
        if row in taken:
            parts = end if _in_parts(lying, row, end - first) else 0
        found.append(Row(first, end, end - first, now - first, now - first, bucket, parts))
    for each in coming:
        first, begin, end, now = 0, entries(each.begin), entries(each.total), 0
        if each.source is not None:
            source = each.source.placements[place]
            first, last = source.places.firsts[0], source.ends[0]
            if _in_parts(source, 0, last - first):
                first = 0
            elif _freezes(source, last - first):
                first = last
            now = last - first
            first = 0 if lying.tail is not None else min(first, begin) // lying.unit * lying.unit
        found.append(Row(first, end, max(end - first, now), now, min(now, begin - first), bucket_of(now * lying.kept.block)))
    return found


def _freezes(lying: Placement, entries: int) -> bool:
    """Whether so many that a row has of its own are frozen when it is adopted."""
    return lying.tail is None and lying.unit == 1 and entries >= COPIED


def _in_parts(lying: Placement, row: int, entries: int) -> bool:
    """Whether a row that has so many of its own would lie in too many parts when it is adopted."""
    return lying.tail is None and len(lying.shares[row]) + _freezes(lying, entries) > CHAIN


def _columns(lying: Placement, rows: Sequence[Row]) -> int:
    """Columns of the bodies of all rows and of what is frozen of them: a body has at most the room of the longest row that may lie in its bucket, or that it
    has already, or that a row brings along which goes back and moves to a smaller bucket (`Placement._make_room`)."""
    kept, unit, block = lying.kept, lying.unit, lying.kept.block
    if kept.tail == 0:
        return 0
    most = placement.ROLLBACK + 2 * unit + placement.SLACK if unit > 1 else math.inf if kept.tail is None else kept.tail + placement.ROLLBACK + placement.SLACK
    longest = int(min(most, max((max(row.most, row.parts or 0) for row in rows), default=0)))
    if not longest and not any(lying.places.rooms.values()):
        return 0
    moves = sorted((row.bucket, low) for row in rows if (low := bucket_of(row.back * block, row.bucket)) < row.bucket)

    def upper(bucket: int) -> int:
        return math.floor(placement.SMALLEST * placement.STEP**bucket / block) + 1

    def least(entries: int) -> int:
        return bucket_of(int(min(entries, most)) * block)

    def columns(entries: int, bucket: int = 0) -> int:
        bucket = max(bucket, least(entries))
        for high, low in moves:
            bucket = high if low <= bucket < high else bucket
        edge = min(longest, upper(bucket))
        return int(max([min(most, max(edge + placement.SLACK, edge + edge // 8)), *(size for own, size in lying.places.rooms.items() if own <= bucket)]))

    def both(row: Row) -> int:
        """A row and what it leaves behind when it is taken, at whatever length that is: a short one is copied, of a long one what follows is its own."""
        found = 0
        for bucket in range(least(row.now), least(row.most) + 1):
            shortest = max(row.now, upper(bucket - 1) - 1) if bucket else row.now
            left = (row.most - shortest, 0) if _freezes(lying, shortest) else (row.most, row.bucket)
            found = max(found, columns(min(row.most, upper(bucket)), row.bucket) + columns(*left))
        return found + (columns(row.parts) if row.parts else 0)

    return sum(columns(row.most, row.bucket) if row.parts is None else both(row) for row in rows)
