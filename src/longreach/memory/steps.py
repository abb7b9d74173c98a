"""Steps: one new token for each of several rows of any lengths, and where what they read lies. Made once for all layers of a forward; knows placements."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from longreach.memory.bases import BaseShelf, base_shelves
from longreach.memory.placement import Placement, Places


@dataclass(frozen=True, eq=False)
class Shelf:
    """Some of the rows of a `Step`, in the order of their slots, which follow each other in one bucket.

    members  numbers of the rows among those of the step.
    columns  where their new tokens lie.
    firsts   index of the entry at column 0 of each.
    """

    bucket: int
    slots: slice
    members: tuple[int, ...]
    columns: tuple[int, ...]
    firsts: tuple[int, ...]
    _index: dict[torch.device, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def index(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """-> (members, slots counted from the first, columns), to index tensors of any layer with."""
        if device not in self._index:
            members, columns = (torch.tensor(x, device=device) for x in (self.members, self.columns))
            self._index[device] = members, torch.arange(len(self.members), device=device), columns
        return self._index[device]


@dataclass(frozen=True, eq=False)
class Step:
    """One new token for each of some rows, which may be of any lengths: `starts` are the indices of the tokens. Made once for all layers of a forward."""

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    _shelves: dict[int, list[Shelf]] = field(default_factory=dict)
    _bases: dict[int, list[BaseShelf]] = field(default_factory=dict)

    @functools.cached_property
    def all(self) -> tuple[int, ...]:
        """The numbers of the rows."""
        return tuple(range(len(self.rows)))

    def shelves(self, placement: Placement) -> list[Shelf]:
        """Where the rows lie, but for what they share."""
        if id(placement) not in self._shelves:
            self._shelves[id(placement)] = list(self._found(placement.places))
        return self._shelves[id(placement)]

    def bases(self, placement: Placement) -> list[BaseShelf]:
        """Where what they share lies."""
        if id(placement) not in self._bases:
            self._bases[id(placement)] = base_shelves(placement.shares[row] for row in self.rows) if placement.bases else []
        return self._bases[id(placement)]

    def _found(self, places: Places) -> Iterator[Shelf]:
        order = sorted(range(len(self.rows)), key=lambda n: (places.buckets[self.rows[n]], places.slots[self.rows[n]]))
        for _, stretch in itertools.groupby(enumerate(order), key=lambda each: (places.buckets[row := self.rows[each[1]]], places.slots[row] - each[0])):
            members = tuple(n for _, n in stretch)
            rows = [self.rows[n] for n in members]
            firsts = tuple(places.firsts[row] for row in rows)
            slot = places.slots[rows[0]]
            columns = tuple(self.starts[n] - first for n, first in zip(members, firsts))
            yield Shelf(places.buckets[rows[0]], slice(slot, slot + len(rows)), members, columns, firsts)
