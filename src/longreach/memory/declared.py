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
    buffer grows, it is there twice: that is not counted, as other memory of a forward is not."""
    store.settle()
    places = {place: _rows(lying, place, totals, coming, taken) for place, lying in store.placements.items()}
    count = store.rows + len(coming) + len(taken)
    nbytes, summaries = sum({key: size for layer in store.layers for key, size in layer.frozen.items()}.values()), 0
    for layer in layers:
        for kept, size in layer.buffers(shared=True):
            rows, columns = places[kept.place]
            held = size * (kept.head * count + columns + _columns(kept, rows, store.placements[kept.place].unit))
            nbytes += held
            summaries += held if kept.block > 1 else 0
    if (whole := store.placements.get(None)) is None or whole.unit == 1:
        return Need(nbytes, 0, summaries)
    filled = [max(0, blocks.horizon(whole, end) - first) // whole.unit for first, end, _ in places[None][0]]
    return Need(nbytes, sum(filled), summaries)


Row = tuple[int, int, int]  # the first entry of its own, the end, and the bucket that it lies in


def _rows(lying: Placement, place: Place, totals: Mapping[int, int], coming: Sequence[Coming], taken: Collection[int]) -> tuple[list[Row], int]:
    """All rows, and columns that are to be frozen."""
    places, entries, frozen = lying.places, lying.kept.entries, 0
    ends = [max(end, entries(totals.get(row, 0))) for row, end in enumerate(lying.ends)]
    found = [*zip(places.firsts, ends, places.buckets, strict=True)]
    for row in taken:
        first, end, bucket = places.firsts[row], lying.ends[row], places.buckets[row]
        freezes, begin = _adopted(lying, row)
        if freezes:  # where it lies, or as a copy
            frozen += places.rooms[bucket] if len(places.members[bucket]) == 1 else end - first
            found[row] = end, ends[row], 0
        found.append((begin, end, 0))
    for each in coming:
        first = bucket = 0
        if each.source is not None:
            source = each.source.placements[place]
            _, first = _adopted(source, 0)
            bucket = bucket_of((source.ends[0] - first) * source.kept.block)  # where it lies before it goes back to `begin`
            first = 0 if lying.tail is not None else min(first, entries(each.begin)) // lying.unit * lying.unit
        found.append((first, entries(each.total), bucket))
    return found, frozen


def _adopted(lying: Placement, row: int) -> tuple[bool, int]:
    """-> (whether it is frozen when it is adopted, the first entry of its own that whoever adopts it has)."""
    first, end = lying.places.firsts[row], lying.ends[row]
    freezes = lying.tail is None and lying.unit == 1 and end - first >= COPIED
    if lying.tail is None and len(lying.shares[row]) + freezes > CHAIN:
        return freezes, 0
    return freezes, end if freezes else first


def _columns(kept: Retention, rows: Sequence[Row], unit: int) -> int:
    """Columns of the bodies of all rows: each has at most the room of the longest row that may lie in its bucket."""
    if kept.tail == 0:
        return 0
    most = placement.ROLLBACK + 2 * unit + placement.SLACK if unit > 1 else math.inf if kept.tail is None else kept.tail + placement.ROLLBACK + placement.SLACK
    own = [(int(min(end - first, most)), bucket) for first, end, bucket in rows]
    longest = max((entries for entries, _ in own), default=0)
    if not longest:
        return 0
    lies = [max(bucket, bucket_of(entries * kept.block)) for entries, bucket in own]
    edges = [min(longest, math.floor(placement.SMALLEST * placement.STEP**bucket / kept.block) + 1) for bucket in lies]
    return sum(int(min(most, max(edge + placement.SLACK, edge + edge // 8))) for edge in edges)
