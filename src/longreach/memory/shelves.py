"""Shelves: the slots of one kind of blocks in one tier, which of them are taken, by which block, and which one makes room first. Knows arenas and blocks; not
what is done with them."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field

from longreach.memory.arenas import Arena, Kind

GROWS = 64  # slots that a file gets at once


@dataclass(eq=False)
class Entry:
    """Where a block lies: its slot in every tier, or None. `score` is the mass that it had at forward `step`, and `rank` orders blocks as their scores do.

    `slots` is the truth, whatever is broken off: a slot stands here only while it holds the block, and from the first on there is always one.
    """

    kind: Kind
    slots: list[int | None]
    score: float = 0.0
    step: int = 0
    rank: float = -math.inf

    @property
    def tier(self) -> int:
        """The fastest that has it."""
        return next(tier for tier, slot in enumerate(self.slots) if slot is not None)


class Block:
    """A block, for as long as this is held."""

    __slots__ = ("_gone", "entry")

    def __init__(self, entry: Entry, gone: deque[Entry]) -> None:
        self.entry, self._gone = entry, gone

    def __del__(self) -> None:
        if hasattr(self, "_gone"):  # else an interrupt came before there was a block
            self._gone.append(self.entry)  # whichever thread lets go of it; the pool looks at this when it needs room

    @property
    def nbytes(self) -> int:
        return self.entry.kind.nbytes


class ByUse(OrderedDict[Entry, int | None]):
    """Blocks, the one that was used longest ago first."""

    def first(self, chosen: Collection[Entry]) -> Entry | None:
        """Which makes room of those that are not chosen; None: all are."""
        return next((entry for entry in self if entry not in chosen), None)

    def ranked(self, entry: Entry) -> None:
        """One of them has another rank."""


class ByMass(ByUse):
    """The same, but the one with the least rank makes room; of equal ones, that which was used longest ago.

    A heap of (rank, number of its use, block), where what a block says no more is skipped. Should an interrupt lose one, the order of use is left.
    """

    def __init__(self) -> None:
        super().__init__()
        self._uses = itertools.count()
        self._heap: list[tuple[float, int, Entry]] = []
        self._chosen: Collection[Entry] = ()
        self._passed: list[tuple[float, int, Entry]] = []  # of those that are `_chosen`, those that were met in the heap

    def __setitem__(self, entry: Entry, value: int | None) -> None:
        super().__setitem__(entry, next(self._uses))
        self.ranked(entry)

    def move_to_end(self, key: Entry, last: bool = True) -> None:
        super().move_to_end(key, last)
        self[key] = None

    def ranked(self, entry: Entry) -> None:
        heapq.heappush(self._heap, (entry.rank, self[entry] or 0, entry))
        if len(self._heap) > 64 + 4 * len(self):
            self._heap, self._passed = [(each.rank, number or 0, each) for each, number in self.items()], []
            heapq.heapify(self._heap)

    def first(self, chosen: Collection[Entry]) -> Entry | None:
        if chosen is not self._chosen:
            for item in self._passed:
                heapq.heappush(self._heap, item)
            self._passed, self._chosen = [], chosen
        while self._heap:
            rank, number, entry = self._heap[0]
            if entry.rank == rank and self.get(entry) == number:
                if entry not in chosen:
                    return entry
                self._passed.append(self._heap[0])
            heapq.heappop(self._heap)
        return super().first(chosen)


@dataclass(eq=False)
class Shelf:
    """The slots of one kind in one tier. `only`: blocks that no faster tier has, in the order in which they make room; `copies`: those that one has."""

    tier: int
    arena: Arena
    only: ByUse
    copies: OrderedDict[Entry, None] = field(default_factory=OrderedDict)
    free: list[int] = field(default_factory=list)
    begun: int = 0  # slots that were ever used

    @property
    def used(self) -> int:
        return len(self.only) + len(self.copies)

    def take(self) -> int | None:
        """A slot that nothing lies in."""
        if self.free:
            return self.free.pop()
        if self.begun == self.arena.capacity:
            return None
        try:
            self.arena.grow(min(self.arena.capacity, -(-(self.begun + 1) // GROWS) * GROWS))
        except ValueError:
            if not self.copies:
                raise
            return None
        self.begun += 1
        return self.begun - 1

    def mend(self, entries: Collection[Entry]) -> None:
        """Something was broken off: what lies here is what these entries say, which are all of this kind, and every other slot is free. The order stays."""
        known = [entry for entry in (*self.only, *self.copies) if entry in entries]
        lying = [entry for entry in dict.fromkeys([*known, *entries]) if entry.slots[self.tier] is not None]
        self.only = type(self.only)()
        self.only.update((entry, None) for entry in lying if entry.tier == self.tier)
        self.copies = OrderedDict.fromkeys(entry for entry in lying if entry.tier < self.tier)
        taken = {entry.slots[self.tier] for entry in lying}
        self.free = [slot for slot in range(self.begun) if slot not in taken]
