"""The plan of one forward: which rows hold which new tokens, and the rotation tables that all layers share.

Knows lengths and indices; not queries, keys or models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from longreach.encodings import Rotary, Table, exact_device
from longreach.segments import Constant, PositionMap
from longreach.store import Store


@dataclass(frozen=True)
class Rows:
    """Rows of the batch that move together: their new tokens have the indices start .. start + count."""

    rows: slice
    columns: slice | torch.Tensor  # where the new tokens lie among the columns of this forward
    start: int
    count: int

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, T, D] -> the real tokens of these rows."""
        if self.whole(x.shape[0], x.shape[2]):
            return x
        return x[self.rows, :, self.columns_on(x.device)]

    def whole(self, rows: int, columns: int) -> bool:
        """Whether these are all tokens of a forward of this size."""
        return self.rows == slice(0, rows) and isinstance(self.columns, slice) and self.columns == slice(0, columns)

    def columns_on(self, device: torch.device) -> slice | torch.Tensor:
        """The columns, to index a tensor of a layer that may lie on another device than the tokens."""
        return self.columns if isinstance(self.columns, slice) else self.columns.to(device)

    def blocks(self, size: int) -> Iterator[Rows]:
        """The same rows in stretches of at most `size` tokens."""
        for a in range(0, self.count, size):
            b = min(self.count, a + size)
            columns = self.columns[a:b] if isinstance(self.columns, torch.Tensor) else slice(self.columns.start + a, self.columns.start + b)
            yield Rows(self.rows, columns, self.start + a, b - a)


@dataclass(eq=False)
class Plan:
    """What the planner decides once per forward and every layer reads. It travels as the model's `attention_mask`."""

    groups: list[Rows]
    real: torch.Tensor | None  # [B, T] on the CPU, None if every column is a real token
    columns: int
    store: Store | None = None
    _tables: dict[tuple[Any, ...], Table] = field(default_factory=dict)  # by id of the rotary, which its tables keep alive
    _scales: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    def table(self, rotary: Rotary, positions: PositionMap, start: int, count: int, device: torch.device) -> Table | None:
        """The rotation of `count` tokens from index `start`, shared by all layers on a device; None where it is the identity."""
        if positions == Constant(0) and rotary.scaling == 1.0:
            return None
        key = (id(rotary), positions, start, count, device)
        if key not in self._tables:
            index = torch.arange(start, start + count, device=exact_device(device))
            self._tables[key] = rotary.table(positions(index)).to(device)
        return self._tables[key]

    def scale(self, of: Callable[[torch.Tensor], torch.Tensor], start: int, count: int, device: torch.device) -> torch.Tensor:
        """[T] fp32: the factor on the queries of `count` tokens from index `start`, shared by all layers on a device."""
        key = (of, start, count, device)
        if key not in self._scales:
            index = torch.arange(start, start + count, device=exact_device(device))
            self._scales[key] = of(index).float().to(device)
        return self._scales[key]

    def positions(self, rows: int, device: torch.device) -> torch.Tensor:
        """[B, T] the index of every new token in its row, zero at pads."""
        found = torch.zeros(rows, self.columns, dtype=torch.long, device=device)
        for group in self.groups:
            found[group.rows, group.columns] = torch.arange(group.start, group.start + group.count, device=device)
        return found

    # What Transformers may ask of a mask on its way to the layers.
    ndim: ClassVar[int] = 0

    def contiguous(self) -> Plan:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Plan:
        return self


def plan(rows: int, columns: int, mask: torch.Tensor | None, device: torch.device, store: Store | None) -> Plan:
    """mask [B, >= columns] bool or None. A token's index is its row's stored length plus its rank among the real new tokens."""
    if store is not None:
        store.open(rows)
    lengths = store.lengths if store is not None else [0] * rows
    real = None
    if mask is not None:
        if mask.shape[0] != rows or mask.shape[1] < columns:
            raise ValueError(
                f"attention_mask of shape {list(mask.shape)} does not cover {rows} rows of {columns} new tokens; pass one column per token seen so far"
            )
        new = mask[:, mask.shape[1] - columns :].bool().cpu()
        real = None if bool(new.all()) else new
    if real is None and len(set(lengths)) == 1:
        groups = [Rows(slice(0, rows), slice(0, columns), lengths[0], columns)]
    else:
        groups = []
        for row in range(rows):
            where = torch.arange(columns) if real is None else real[row].nonzero()[:, 0]
            if where.numel():
                groups.append(Rows(slice(row, row + 1), _as_slice(where, device), lengths[row], where.numel()))
    return Plan(groups, real, columns, store)


def _as_slice(where: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    first, last = int(where[0]), int(where[-1])
    return slice(first, last + 1) if last - first + 1 == where.numel() else where.to(device)
