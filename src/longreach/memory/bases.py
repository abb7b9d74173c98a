"""Bases: entries that are frozen, so that forks read them together. What a row holds are its shares of bases, one after the other, and a tail of its own.

Index arithmetic, done once for all layers that keep the same tokens. Knows no tensors, positions or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from longreach.memory.slots import Stretch

COPIED = 512  # a fork of fewer entries takes a copy: another part would cost every token that follows more than that


@dataclass(frozen=True, eq=False)
class Base:
    """Entries that nobody writes to any more: all rows of a bucket where they lay, or a copy of those of one `slot`, which have `columns`."""

    bucket: int
    slot: int | None = None
    columns: int = 0


@dataclass(frozen=True)
class Share:
    """Of a row: its entries start .. stop are those at columns 0 .. of a slot of a base."""

    base: Base
    slot: int
    start: int
    stop: int


Shares = tuple[Share, ...]  # of a row, in the order of their entries; the row's own tail follows


def cut_off(shares: Shares, stop: int) -> Shares:
    """What is left of them before entry `stop`. Nothing is copied: less is seen."""
    return tuple(replace(share, stop=min(share.stop, stop)) for share in shares if share.start < stop)


def sides(shares: Sequence[Shares]) -> list[object]:
    """A key for each row: neighbours that have the same one read their bases in one call, for they lie side by side there, or are the same entries."""
    read: dict[Base, list[int]] = {}
    for share in (share for own in shares for share in own):
        read.setdefault(share.base, []).append(share.slot)
    alone = {base for base, slots in read.items() if len(set(slots)) == len(slots)}
    return [
        tuple((id(share.base), share.slot - row if share.base in alone else share.slot, share.start, share.stop) for share in own)
        for row, own in enumerate(shares)
    ]


@dataclass(frozen=True, eq=False)
class BaseShelf:
    """Rows of a `Step` that read slots of a base which follow each other, or all of them the only one.

    members  numbers of the rows among those of the step.
    firsts   index of the entry at column 0 of each; what it reads ends with the entry before `stops`.
    """

    base: Base
    slots: slice
    members: tuple[int, ...]
    firsts: tuple[int, ...]
    stops: tuple[int, ...]

    @property
    def same(self) -> bool:
        """Whether all of them read the same entries."""
        return self.slots.stop - self.slots.start == 1

    def columns(self, seen: Stretch, number: int) -> Stretch:
        """Where the entries lie that a row sees, of those that it reads here; of none, (0, 0)."""
        start, stop = max(seen[0], self.firsts[number]), min(seen[1], self.stops[number])
        return (start - self.firsts[number], stop - self.firsts[number]) if start < stop else (0, 0)


def base_shelves(shares: Iterable[Shares]) -> list[BaseShelf]:
    """`shares` of the rows of a step, in their order -> calls that read each base once."""
    readers: dict[Base, dict[int, list[tuple[int, Share]]]] = {}
    for number, own in enumerate(shares):
        for share in own:
            readers.setdefault(share.base, {}).setdefault(share.slot, []).append((number, share))
    return [_shelf(base, run) for base, slots in readers.items() for run in _runs(slots)]


def _runs(slots: Mapping[int, list[tuple[int, Share]]]) -> Iterator[list[tuple[int, Share]]]:
    """A slot that several rows read is alone, others that follow each other are together."""
    run: list[tuple[int, Share]] = []
    for slot in sorted(slots):
        if run and (len(slots[slot]) > 1 or slot > run[-1][1].slot + 1):
            yield run
            run = []
        run = run + slots[slot]
        if len(slots[slot]) > 1:
            yield run
            run = []
    if run:
        yield run


def _shelf(base: Base, readers: Sequence[tuple[int, Share]]) -> BaseShelf:
    slots = [share.slot for _, share in readers]
    numbers, firsts, stops = zip(*((number, share.start, share.stop) for number, share in readers))
    return BaseShelf(base, slice(min(slots), max(slots) + 1), numbers, firsts, stops)
