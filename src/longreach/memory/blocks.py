"""Blocks: which tokens go to blocks that nobody writes to any more, where a memory has such. Index arithmetic; knows no tensors and no tiers.

Of a placement that keeps every token, what lies behind the rollback goes to blocks of `unit` tokens when a forward is finished. The row then has one share, of
a base that stands for all of its blocks, and a tail of its own that begins where they end.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from longreach.core.segments import Form, Place, Retention
from longreach.memory import placement as placements
from longreach.memory.bases import Base, Share
from longreach.memory.layer import LayerMemory
from longreach.memory.placement import SLACK, Cut, Placement, Places


@dataclass(frozen=True, eq=False)
class Run(Base):
    """Rows that follow each other and lie alike: the entries of slot 0, 1, ... are all that row rows.start, rows.start + 1, ... has before `stop`. What lies
    before `start` has been in blocks already."""

    rows: range = range(0)
    start: int = 0
    stop: int = 0


def horizon(placement: Placement, end: int) -> int:
    """Where the blocks of a row of `end` entries end."""
    return max(0, end - placements.ROLLBACK) // placement.unit * placement.unit


def coming(placement: Placement) -> int:
    """Blocks of every form that the forward under way will fill, before it does."""
    found = 0
    for row, write in placement.writes.items():
        found += max(0, horizon(placement, write.stop) - min(write.first, placement.places.firsts[row])) // placement.unit
    return found


def cut(placement: Placement) -> Cut | None:
    """What goes to blocks now, and how all rows lie then. None: nothing."""
    places = placement.places
    stops = [first if first % placement.unit else max(first, horizon(placement, end)) for first, end in zip(places.firsts, placement.ends, strict=True)]
    if stops == list(places.firsts):
        return None
    shares, bases = [*placement.shares], []
    for (start, stop), run in itertools.groupby(range(len(stops)), key=lambda row: (places.firsts[row], stops[row])):
        rows = list(run)
        if start < stop:
            bases.append(Run(places.buckets[rows[0]], rows=range(rows[0], rows[-1] + 1), start=start, stop=stop))
            for slot, row in enumerate(rows):
                shares[row] = (Share(bases[-1], slot, 0, stop),)
    return Cut(tuple(bases), shares, Places.of(places.buckets, stops, places.rooms, places.age))


def adopt(placement: Placement, cut: Cut) -> None:
    """The buffers have the blocks. What the forward needed of room is given back."""
    placement.adopt(cut)
    placement.shrink(placements.ROLLBACK + 2 * placement.unit + SLACK)


class Blocked(ABC):
    """Makes memories of layers that keep what lies behind the rollback in blocks of `unit` tokens. A `memory.layer.Memory`."""

    unit: int

    @abstractmethod
    def __call__(self, placements: Mapping[Place, Placement], forms: Mapping[Form, Retention]) -> LayerMemory: ...

    @abstractmethod
    def require(self, placements: Mapping[Place, Placement], layers: Sequence[LayerMemory]) -> None:
        """The forward under way has planned its places, and nothing is written yet: raises ValueError where there is no room for what it will add."""

    @abstractmethod
    def thaw(self, placements: Mapping[Place, Placement], layers: Sequence[LayerMemory], lengths: Mapping[int, int]) -> list[Callable[[], None]]:
        """Rows are about to be cut to so many tokens. What is left of a block that is cut is read -> calls that put it into the tails, once the placements
        have been rewound."""

    @abstractmethod
    def close(self) -> None:
        """Nothing will be kept or read any more."""
