"""Who is in one forward of an engine with paged memory: which tokens are whose, and on which pages. Made once for all layers.

Knows lengths, block tables and slots as vLLM's metadata has them, as plain tensors; no keys, methods or models.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from longreach.core.encodings import Rotary, Table, exact_device
from longreach.core.segments import PositionMap
from longreach.engine.batch import Batch, Rows, Singles
from longreach.memory.steps import Step

Stretch = tuple[int, int]  # a request, and the first of its pages


@dataclass(eq=False)
class Requests:
    """One forward. A request is a row; its new tokens are the last of its `length` ones.

    starts  true index of the first new token of each request; counts: how many it has, which may be none.
    table   [R, n] the pages of each request, in their order; of pages that it does not have yet, any number.
    slots   [T] where the new tokens go: page * size + place.
    size    tokens of a page.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    table: torch.Tensor
    slots: torch.Tensor
    size: int
    batch: Batch
    made: dict[Any, Any] = field(default_factory=dict)  # what all layers share

    @classmethod
    def of(cls, ends: Sequence[int], lengths: Sequence[int], table: torch.Tensor, slots: torch.Tensor, size: int) -> Requests:
        """ends: where the new tokens of each request end in the flat batch; lengths: of each request, its new tokens included."""
        counts = tuple(b - a for a, b in itertools.pairwise((0, *ends)))
        starts = tuple(length - count for length, count in zip(lengths, counts))
        total = ends[-1] if ends else 0
        groups = [Rows(slice(r, r + 1), slice(end - n, end), start, n, flat=True) for r, (end, n, start) in enumerate(zip(ends, counts, starts)) if n]
        batch = Batch(groups, None, total, _singles(groups, table.device))
        return cls(starts, counts, table, slots[:total], size, batch)

    @property
    def tokens(self) -> int:
        return self.batch.columns

    def length(self, row: int) -> int:
        return self.starts[row] + self.counts[row]

    def indices(self, device: torch.device) -> torch.Tensor:
        """[T] the true index of every new token."""
        if "indices" not in self.made:
            found = [torch.arange(start, start + n) for start, n in zip(self.starts, self.counts) if n]
            self.made["indices"] = torch.cat(found).to(exact_device(device))
        return self.made["indices"]

    def places(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[T * heads] each: where keys and values of the new tokens go, head by head, in a pool of [pages, heads, keys and values, places]."""
        key = "places", heads
        if key not in self.made:
            slots = self.slots.long()[:, None]
            keys = (((slots // self.size * heads + torch.arange(heads, device=slots.device)) * 2) * self.size + slots % self.size).flatten()
            self.made[key] = keys, keys + self.size
        return self.made[key]

    def pages(self, stretches: tuple[Stretch, ...], count: int) -> torch.Tensor:
        """[m * count] the pages of some requests, `count` of each from its first one on; behind its last page, that one again."""
        key = "pages", stretches, count
        if key not in self.made:
            rows = torch.tensor([row for row, _ in stretches], device=self.table.device)[:, None]
            last = torch.tensor([max(0, self.length(row) - 1) // self.size for row, _ in stretches], device=self.table.device)[:, None]
            first = torch.tensor([first for _, first in stretches], device=self.table.device)[:, None]
            column = torch.minimum(first + torch.arange(count, device=self.table.device), last)
            self.made[key] = self.table[rows, column].flatten().long()
        return self.made[key]

    def rows(self, stretches: tuple[Stretch, ...], count: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[heads * m * count] each: where keys and values of these pages lie, head by head, in a pool of [pages, heads, keys and values]."""
        key = "rows", stretches, count, heads
        if key not in self.made:
            keys = (self.pages(stretches, count) * heads + torch.arange(heads, device=self.table.device)[:, None]).flatten() * 2
            self.made[key] = keys, keys + 1
        return self.made[key]

    def behind(self, stretches: tuple[Stretch, ...], count: int) -> torch.Tensor:
        """Which tokens of `pages(stretches, count)` are behind the last one of their request."""
        key = "behind", stretches, count
        if key not in self.made:
            columns = count * self.size
            lengths = [min(columns, max(0, self.length(row) - first * self.size)) for row, first in stretches]
            found = [torch.arange(each * columns + length, (each + 1) * columns) for each, length in enumerate(lengths)]
            self.made[key] = torch.cat(found).to(self.table.device)
        return self.made[key]

    def turn(self, rotary: Rotary, stored: PositionMap, wanted: PositionMap, stretches: tuple[Stretch, ...], count: int, device: torch.device) -> Table:
        """The rotation that is due from the positions that keys are `stored` at to those that are `wanted`, for the tokens of `pages(stretches, count)`."""
        key = id(rotary), stored, wanted, stretches, count, device
        if key not in self.made:
            reach = torch.arange(count * self.size, device=exact_device(device))
            index = torch.cat([reach + first * self.size for _, first in stretches])
            self.made[key] = rotary.table(wanted(index) - stored(index)).to(device)
        return self.made[key]

    def table_of_new(self, rotary: Rotary, positions: PositionMap, device: torch.device) -> Table:
        """The rotation of the new tokens to some positions."""
        key = id(rotary), positions, device
        if key not in self.made:
            self.made[key] = rotary.table(positions(self.indices(device))).to(device)
        return self.made[key]


def _singles(groups: list[Rows], device: torch.device) -> Singles | None:
    """The requests that decode one token, if that are several: they are computed together."""
    found = [rows for rows in groups if rows.count == 1]
    if len(found) < 2:
        return None
    columns = [rows.columns.start for rows in found if isinstance(rows.columns, slice)]
    step = Step(tuple(rows.rows.start for rows in found), tuple(rows.start for rows in found))
    stretch = (columns[0], columns[-1] + 1) if columns == [*range(columns[0], columns[0] + len(columns))] else None
    return Singles(step, torch.zeros(len(found), dtype=torch.long, device=device), torch.tensor(columns, device=device), stretch)
