"""Shelves: the slots of one kind of blocks in one tier, which of them are taken, and by which block. Knows arenas and blocks; not which block makes room."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection
from dataclasses import dataclass, field

from longreach.memory.arenas import Arena, Kind

GROWS = 64  # slots that a file gets at once


@dataclass(eq=False)
class Entry:
    """Where a block lies: its slot in every tier, or None. `score` is the mass that it had at forward `step`.

    `slots` is the truth, whatever is broken off: a slot stands here only while it holds the block, and from the first on there is always one.
    """

    kind: Kind
    slots: list[int | None]
    score: float = 0.0
    step: int = 0

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


@dataclass(eq=False)
class Shelf:
    """The slots of one kind in one tier. `only`: blocks that no faster tier has, the one that was used longest ago first; `copies`: those that one has."""

    tier: int
    arena: Arena
    only: OrderedDict[Entry, None] = field(default_factory=OrderedDict)
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
        self.only = OrderedDict.fromkeys(entry for entry in lying if entry.tier == self.tier)
        self.copies = OrderedDict.fromkeys(entry for entry in lying if entry.tier < self.tier)
        taken = {entry.slots[self.tier] for entry in lying}
        self.free = [slot for slot in range(self.begun) if slot not in taken]
