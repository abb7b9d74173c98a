"""What a kernel is: attention of queries to keys, returned with its log-sum-exp.

A kernel knows tensors of one device; it does not know positions, methods, memories or models.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from longreach.core.merge import NEGATIVE_INFINITY
from longreach.kernels.biased import Bias
from longreach.kernels.entries import picked_of
from longreach.kernels.tiles import Band


@dataclass(frozen=True, eq=False)
class KV:
    """What a kernel reads: keys [R, G, C, D] and values [R, G, C, E] of rows, of any strides; a key and its value have the same column.

    index  true index of the first key, where a memory hands it out.
    """

    k: torch.Tensor
    v: torch.Tensor
    index: int = 0

    @property
    def rows(self) -> int:
        return self.k.shape[0]

    def of_rows(self, rows: int) -> KV:
        """The same for so many rows: what one row has, all of them see."""
        if self.k.shape[0] == self.v.shape[0] == rows:
            return self
        return KV(self.k.expand(rows, -1, -1, -1), self.v.expand(rows, -1, -1, -1), self.index)


def gather(parts: Sequence[KV], first: int, columns: torch.Tensor) -> KV:
    """Of parts that follow each other, one of which may be of one row that all share: the keys and values at columns [R, C, T, n], counted from the index
    `first`; C = G or a multiple of it: those of each row, head and query as rows of one head [R C T, 1, n, D]. C = 1: of all heads the same, [R T, G, n, D]."""
    places = places_of(columns, parts[0].k.shape[1])
    k, v = (picked_of([(part.index - first, x) for part, x in zip(parts, each)], *places) for each in zip(*((part.k, part.v) for part in parts)))
    return KV(as_rows(k, columns), as_rows(v, columns))


def places_of(columns: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """columns [R, C, T, n] -> rows, heads of keys and columns that broadcast to [R, C, T, n], or where C = 1 to [R, T, G, n]."""
    rows, heads = columns.shape[:2]
    row = torch.arange(rows, device=columns.device)[:, None, None, None]
    if heads == 1:
        return row, torch.arange(groups, device=columns.device)[:, None], columns[:, 0, :, None]
    return row, (torch.arange(heads, device=columns.device) * groups // heads)[:, None, None], columns


def as_rows(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """What was picked at `places_of` columns, as a kernel reads it."""
    return x.flatten(0, 1) if columns.shape[1] == 1 else x.flatten(0, 2)[:, None]


@dataclass(frozen=True, eq=False)
class Spans:
    """Rows of any lengths with one query each: row r sees the columns starts[r] .. stops[r], which may be none."""

    starts: tuple[int, ...]
    stops: tuple[int, ...]
    _made: dict[object, torch.Tensor] = field(default_factory=dict)  # by device and dtype, for all layers of a forward

    @functools.cached_property
    def reach(self) -> tuple[int, int]:
        """The columns that any row sees."""
        seen = [(a, b) for a, b in zip(self.starts, self.stops) if a < b]
        return (min(a for a, _ in seen), max(b for _, b in seen)) if seen else (0, 0)

    @functools.cached_property
    def even(self) -> bool:
        """Whether all rows see the same columns."""
        return self.starts.count(self.starts[0]) == self.stops.count(self.stops[0]) == len(self.starts)

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """[R, 1, 1, C] over `reach`: 0 where a row sees a column, else -inf; a row that sees none is not masked at all, see `empty`."""
        key = dtype, device
        if key not in self._made:
            first, last = self.reach
            column = torch.arange(first, last, device=device)[None, :]
            start, stop = (torch.tensor(x, device=device)[:, None] for x in (self.starts, self.stops))
            hidden = ((column < start) | (column >= stop)) & (start < stop)
            self._made[key] = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, NEGATIVE_INFINITY)[:, None, None]
        return self._made[key]

    def ends(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """[R] each, int32: starts and stops."""
        key = "ends", device
        if key not in self._made:
            self._made[key] = torch.tensor((self.starts, self.stops), dtype=torch.int32, device=device)
        starts, stops = self._made[key]
        return starts, stops

    def empty(self, device: torch.device) -> torch.Tensor | None:
        """[R] which rows see nothing; None: none of them."""
        if not any(self._nothing):
            return None
        if device not in self._made:
            self._made[device] = torch.tensor(self._nothing, device=device)
        return self._made[device]

    @functools.cached_property
    def _nothing(self) -> list[bool]:
        return [a >= b for a, b in zip(self.starts, self.stops)]


@dataclass(frozen=True, eq=False)
class Chosen:
    """Queries that see the columns where `seen` [R, T, C] is true. `bias` [R, H, T, C] fp32 is added to the logits."""

    seen: torch.Tensor
    bias: torch.Tensor | None = None

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """[R, 1 or H, T, C] additive; a query that sees nothing is not masked at all, see `empty`."""
        hidden = (~self.seen & self.seen.any(-1, keepdim=True))[:, None]
        if self.bias is not None:
            return self.bias.masked_fill(hidden, NEGATIVE_INFINITY)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, NEGATIVE_INFINITY)

    @property
    def empty(self) -> torch.Tensor:
        """[R, 1, T] which queries see nothing."""
        return ~self.seen.any(-1)[:, None]


class Kernel(Protocol):
    name: str

    def attend(
        self, q: torch.Tensor, kv: KV, work: Band | Spans | Chosen, scale: float, softcap: float | None = None, bias: Bias | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [R, H, T, D] -> out [R, H, T, E], lse [R, H, T] fp32, natural logarithm.

        work  a band, the same for all rows; a stretch of columns for the one query of each row; or any columns for each query.

        G divides H; groups are not expanded by the caller. A row that sees no key has out = 0 and lse = -inf.
        A bias comes without a soft-cap, and with a band only.
        """
        ...
