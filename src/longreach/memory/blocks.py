"""Blocks: which tokens go to blocks that nobody writes to any more, where a memory has such. Index arithmetic; knows no tensors and no tiers.

Of a placement that keeps every token, what lies behind the rollback goes to blocks of `unit` tokens when a forward is finished. The row then has one share, of
a base that stands for all of its blocks, and a tail of its own that begins where they end.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from longreach.core.segments import Form, Place, Retention
from longreach.memory import placement as placements
from longreach.memory.bases import Base, Share, Shares
from longreach.memory.layer import LayerMemory
from longreach.memory.placement import Cut, Placement, Places


@dataclass(frozen=True, eq=False)
class Run(Base):
    """Rows that follow each other and lie alike: the entries of slot 0, 1, ... are all that row rows.start, rows.start + 1, ... has before `stop`. What lies
    before `start` has been in blocks already."""

    rows: range = range(0)
    start: int = 0
    stop: int = 0


def sealed(entries: int, unit: int) -> int:
    """The blocks of a row that has so many entries."""
    return max(0, entries - placements.ROLLBACK) // unit


def horizon(placement: Placement, end: int) -> int:
    """Where the blocks of a row of `end` entries end."""
    return sealed(end, placement.unit) * placement.unit


def coming(placement: Placement) -> int:
    """Blocks of every form that the forward under way will fill, before it does."""
    found = 0
    for row, write in placement.writes.items():
        found += max(0, horizon(placement, write.stop) - min(write.first, placement.places.firsts[row])) // placement.unit
    return found


def seal(placement: Placement, layers: Sequence[LayerMemory]) -> None:
    """What lies behind the rollback goes to blocks, and what the forward needed of room is given back."""
    if (cut := _cut(placement)) is not None:
        for layer in layers:
            layer.freeze(placement.kept.place, cut.bases)
        placement.adopt(cut)
        placement.shrink(placements.ROLLBACK + 2 * placement.unit + placements.SLACK)


def _cut(placement: Placement) -> Cut | None:
    """How all rows lie then. None: as they do."""
    places = placement.places
    stops = [first if first % placement.unit else max(first, horizon(placement, end)) for first, end in zip(places.firsts, placement.ends, strict=True)]
    if stops == list(places.firsts):
        return None
    bases, shares = _runs(placement, places.firsts, stops)
    return Cut(bases, shares, Places.of(places.buckets, stops, places.rooms, places.age))


def _runs(placement: Placement, starts: Sequence[int], stops: Sequence[int]) -> tuple[tuple[Run, ...], list[Shares]]:
    shares, bases = [*placement.shares], []
    for (start, stop), run in itertools.groupby(range(len(stops)), key=lambda row: (starts[row], stops[row])):
        rows = list(run)
        if start < stop:
            bases.append(Run(placement.places.buckets[rows[0]], rows=range(rows[0], rows[-1] + 1), start=start, stop=stop))
            for slot, row in enumerate(rows):
                shares[row] = (Share(bases[-1], slot, 0, stop),)
    return tuple(bases), shares


def in_blocks(placement: Placement, stops: Sequence[int]) -> None:
    """A placement is restored; of its rows, what lies before `stops` is in blocks, which the buffers receive next."""
    placement.restore(stops, placement.ends)
    _, shares = _runs(placement, [0] * len(stops), stops)
    placement.share(shares)


class Blocked(ABC):
    """Makes memories of layers that keep what lies behind the rollback in blocks of `unit` tokens. A `memory.layer.Memory`."""

    unit: int

    @abstractmethod
    def __call__(self, placements: Mapping[Place, Placement], forms: Mapping[Form, Retention]) -> LayerMemory: ...

    @abstractmethod
    def require(self, placements: Mapping[Place, Placement], layers: Sequence[LayerMemory], times: float = 1.0, more: int = 0) -> None:
        """The forward under way has planned its places, and nothing is written yet; or there are about to be so many times the rows, or `more` blocks of every
        buffer. Raises ValueError where there is no room for what is added."""

    @abstractmethod
    def has_room(self, blocks: int, summaries: int, layers: Sequence[LayerMemory], without: Collection[LayerMemory] = ()) -> bool:
        """Whether there is room for so many blocks more of every buffer, and for bytes of what an index keeps in these layers, what it keeps now among them;
        or whether there would be, `without` what other layers alone hold."""

    @abstractmethod
    def require_ever(self, blocks: int, summaries: int) -> None:
        """Raises ValueError where there would be no room for so many blocks of every buffer, and bytes of what an index keeps, if nothing else were there."""

    @abstractmethod
    def thaw(self, placements: Mapping[Place, Placement], layers: Sequence[LayerMemory], lengths: Mapping[int, int]) -> list[Callable[[], None]]:
        """Rows are about to be cut to so many tokens. What is left of a block that is cut is read -> calls that put it into the tails, and let go of the blocks
        behind it, once the placements have been rewound."""

    @abstractmethod
    def close(self) -> None:
        """Nothing will be kept or read any more."""


def allocated(unit: int, forwards: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Entries of a row that are in blocks after these forwards, (start, tokens), and columns of the body that holds the others."""
    first, size, most = 0, 0, placements.ROLLBACK + 2 * unit + placements.SLACK
    for start, new in forwards:
        stop = start + new
        size = placements.room(size, stop - first, None)
        horizon = sealed(stop, unit) * unit
        if horizon > first:
            first = horizon
            size = most if size > most >= stop - first else size
    return first, size
