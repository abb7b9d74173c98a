"""Moves: which stretches of slots go where when rows get other places. Index arithmetic; knows no tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from longreach.memory.placement import Places


def moves(old: Places, new: Places, rows: tuple[int, ...], source: list[int] | None, ends: list[int]) -> Iterator[tuple[slice, int, slice, int]]:
    """For stretches of slots that move together and are of one length: (slots now, bucket before, slots before, columns to leave out)."""

    def whence(slot: int) -> tuple[int, int, int, int]:
        row = rows[slot]
        before = row if source is None else source[row]
        if before >= len(old.buckets):  # it has joined since, and is empty
            return -1, 0, 0, 0
        return old.buckets[before], old.slots[before] - slot, new.firsts[row] - old.firsts[before], ends[row] - new.firsts[row]

    for (bucket, ahead, shift, _), stretch in itertools.groupby(range(len(rows)), key=whence):
        if bucket < 0:
            continue
        slots = list(stretch)
        yield slice(slots[0], slots[-1] + 1), bucket, slice(slots[0] + ahead, slots[-1] + 1 + ahead), shift
