"""Who is in a forward: which rows hold which new tokens, and the rotation tables that all layers share.

Knows lengths and indices; not queries, keys or models.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from longreach.core.encodings import Rotary, Table, exact_device
from longreach.core.segments import Constant, PositionMap, Retention
from longreach.memory.past import Past
from longreach.memory.slots import Stretch
from longreach.memory.steps import Step
from longreach.memory.store import Store


@dataclass(frozen=True)
class Rows:
    """Rows of the batch that move together: their new tokens have the indices start .. start + count."""

    rows: slice
    columns: slice | torch.Tensor  # where the new tokens lie among the columns of this forward
    start: int
    count: int
    hidden: tuple[Stretch, ...] = ()  # indices before `start` that no new token may see
    flat: bool = False  # whether the columns of all rows follow each other in one row of the tensors

    @property
    def at(self) -> slice:
        """Of the tensors."""
        return slice(0, 1) if self.flat else self.rows

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, T, D] -> the real tokens of these rows."""
        if self.whole(x.shape[0], x.shape[2]):
            return x
        return x[self.at, :, self.columns_on(x.device)]

    def whole(self, rows: int, columns: int) -> bool:
        """Whether these are all tokens of a forward of this size."""
        return self.at == slice(0, rows) and isinstance(self.columns, slice) and self.columns == slice(0, columns)

    def columns_on(self, device: torch.device) -> slice | torch.Tensor:
        """The columns, to index a tensor of a layer that may lie on another device than the tokens."""
        return self.columns if isinstance(self.columns, slice) else self.columns.to(device)

    def blocks(self, size: int, multiple: int = 1) -> Iterator[Rows]:
        """The same rows in stretches of at most `size` tokens, or of `multiple`, which end at multiples of it."""
        b, step = 0, max(multiple, size // multiple * multiple)
        while b < self.count:
            a, b = b, min(self.count, b + step - (self.start + b) % multiple)
            columns = self.columns[a:b] if isinstance(self.columns, torch.Tensor) else slice(self.columns.start + a, self.columns.start + b)
            yield Rows(self.rows, columns, self.start + a, b - a, self.hidden, self.flat)

    def barred(self, from_key: int, to_key: int, device: torch.device) -> torch.Tensor | None:
        """[to_key - from_key] which keys are hidden; None: none."""
        if not self.hidden:
            return None
        barred = torch.zeros(to_key, dtype=torch.bool, device=device)
        for a, b in self.hidden:
            barred[a:b] = True
        return barred[from_key:]

    def seen(self, from_key: int, to_key: int) -> Iterator[Stretch]:
        """The stretches of from_key .. to_key that are not hidden."""
        for a, b in self.hidden:
            if from_key < min(a, to_key):
                yield from_key, min(a, to_key)
            from_key = max(from_key, b)
        if from_key < to_key:
            yield from_key, to_key


@dataclass(frozen=True, eq=False)
class Singles:
    """Rows that have one new token each, at indices of their own: they are computed together where the layer allows it."""

    step: Step
    rows: torch.Tensor  # [n] of the batch
    columns: torch.Tensor  # [n] where the token lies among the columns of this forward
    stretch: tuple[int, int] | None = None  # the columns, where they follow each other in the only row of the tensors
    made: dict[Any, Any] = field(default_factory=dict)  # what all layers share

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, H, T, D] -> [n, H, D]."""
        if self.stretch is not None:
            return x[0, :, self.stretch[0] : self.stretch[1]].transpose(0, 1)
        return x[self.rows.to(x.device), :, self.columns.to(x.device)]

    def put(self, x: torch.Tensor, found: torch.Tensor) -> None:
        """found [n, H, E] to where their tokens are in x [B, T, H, E]."""
        if self.stretch is not None:
            x[0, self.stretch[0] : self.stretch[1]] = found
        else:
            x[self.rows.to(x.device), self.columns.to(x.device)] = found

    def completing(self, forms: tuple[Retention, ...]) -> list[tuple[int, int]]:
        """(row, index of its token) of those whose token completes a block of one of these forms."""
        if forms not in self.made:
            pairs = zip(self.step.rows, self.step.starts)
            self.made[forms] = [(row, start) for row, start in pairs if any(kept.entries(start) < kept.entries(start + 1) for kept in forms)]
        return self.made[forms]

    def index(self, members: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Some of them, to index a tensor of any layer with."""
        key = members, device
        if key not in self.made:
            self.made[key] = torch.tensor(members, device=device)
        return self.made[key]


@dataclass(eq=False)
class Batch:
    """What is decided once per forward and every layer reads. It travels as the model's `attention_mask`."""

    groups: list[Rows]
    real: torch.Tensor | None  # [B, T] on the CPU, None if every column is a real token
    columns: int
    singles: Singles | None = None  # rows among those of the groups that may be computed together instead
    store: Store | None = None
    past: list[Past] | None = None  # per row, what it may see of the store
    changes: int = 0  # of the store, when this was formed
    counts: list[int] | None = None  # of a flat batch: new tokens of every row of the store
    _tables: dict[tuple[Any, ...], Table] = field(default_factory=dict)  # by id of the rotary, which its tables keep alive
    _scales: dict[tuple[Any, ...], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: int, columns: int, mask: torch.Tensor | None, device: torch.device, store: Store | None) -> Batch:
        """`columns` new columns for `rows` rows, on top of an open `store` or of nothing.

        mask  [B, M] of zeros and ones or None, one column per slot of the store and one per new column; columns beyond them speak of tokens that are not
              there yet. A new token's index follows that of the last token of its row that the mask leaves visible.

        Raises ValueError if the mask is not of this kind or shows what is not stored.
        """
        seen = 0 if store is None else store.seen
        if mask is not None:
            mask = _checked(mask, rows, seen, columns)
        past = [Past(0)] * rows if store is None else store.past(None if mask is None else mask[:, :seen])
        real = None if mask is None else mask[:, seen : seen + columns].cpu()
        if real is None or bool(real.all()):
            real, where = None, [()] * rows
            new: list[slice | torch.Tensor] = [slice(0, columns)] * rows
        else:
            found = [row.nonzero()[:, 0] for row in real]
            where, new = [tuple(row.tolist()) for row in found], [_as_slice(row, device) for row in found]
        counts = [columns] * rows if real is None else [len(row) for row in where]
        # what a call reads must agree for all of its rows, the places of their buffers too
        keys = list(zip(where, past, [None] * rows if store is None else store.reserve(past, counts), strict=True))
        groups = []
        for _, same in itertools.groupby(range(rows), key=keys.__getitem__):
            members = list(same)
            row = members[0]
            if counts[row]:
                groups.append(Rows(slice(row, members[-1] + 1), new[row], past[row].start, counts[row], past[row].hidden))
        return cls(groups, real, columns, _singles(groups, store, device), store, past, 0 if store is None else store.changes)

    @classmethod
    def flat(cls, new: Sequence[tuple[int, int]], device: torch.device, store: Store) -> Batch:
        """New tokens (row, count) of some rows of an open store, in the order in which they follow each other in one row of columns."""
        counts = [0] * store.rows
        for row, count in new:
            counts[row] = count
        past = [Past(length) for length in store.lengths]
        store.reserve(past, counts)
        groups, column = [], 0
        for row, count in new:
            groups.append(Rows(slice(row, row + 1), slice(column, column + count), past[row].start, count, flat=True))
            column += count
        return cls(groups, None, column, _singles(groups, store, device), store, past, store.changes, counts)

    @functools.cached_property
    def others(self) -> list[Rows]:
        """The groups without the single tokens."""
        return self.groups if self.singles is None else [rows for rows in self.groups if rows.rows.start not in self.singles.step.rows]

    @property
    def rollback(self) -> int:
        """Tokens that a crop may undo after this forward."""
        return 0 if self.store is None else self.store.rollback

    def require_unchanged(self) -> None:
        """Raise where somebody has cropped, reordered or written to the cache of a forward that is under way."""
        if self.store is not None and self.store.changes != self.changes:
            raise ValueError(
                "the cache was cropped, reordered or read into while a forward was writing to it; wait until the forward has returned, or use a copy of your "
                "own: extension.fork(cache)"
            )

    def table(self, rotary: Rotary, positions: PositionMap, start: int | tuple[int, ...], count: int, device: torch.device) -> Table | None:
        """The rotation of `count` tokens from index `start`, or of those at the indices `start`, shared by all layers on a device; None where it is the
        identity."""
        if positions == Constant(0) and rotary.scaling == 1.0:
            return None
        key = (id(rotary), positions, start, count, device)
        if key not in self._tables:
            self._tables[key] = rotary.table(positions(_indices(start, count, device))).to(device)
        return self._tables[key]

    def scale(self, of: Callable[[torch.Tensor], torch.Tensor], start: int | tuple[int, ...], count: int, device: torch.device) -> torch.Tensor:
        """[T] fp32: the factor on the queries of `count` tokens from index `start`, shared by all layers on a device."""
        key = (of, start, count, device)
        if key not in self._scales:
            self._scales[key] = of(_indices(start, count, device)).float().to(device)
        return self._scales[key]

    def turned(
        self, x: torch.Tensor, rotary: Rotary | None, positions: PositionMap, start: int | tuple[int, ...], count: int, scale: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [..., T, D] of `count` tokens from index `start`, or of those at the indices `start`, rotated to their positions and times `scale` [T]."""
        table = None if rotary is None else self.table(rotary, positions, start, count, x.device)
        if table is not None:
            return table.rotate(x, scale)
        return x if scale is None else (x.float() * scale[:, None]).to(x.dtype)

    def positions(self, rows: int, device: torch.device) -> torch.Tensor:
        """[B, T] the index of every new token in its row, zero at pads."""
        found = torch.zeros(rows, self.columns, dtype=torch.long, device=device)
        for group in self.groups:
            found[group.at, group.columns] = torch.arange(group.start, group.start + group.count, device=device)
        return found

    # What Transformers may ask of a mask on its way to the layers.
    ndim: ClassVar[int] = 0

    def contiguous(self) -> Batch:
        return self

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        return self


def _singles(groups: list[Rows], store: Store | None, device: torch.device) -> Singles | None:
    """The rows that read one token after all that they hold, if that are several groups."""
    if store is None or len(groups) < 2:
        return None
    found = [g for g in groups if g.count == 1 and not g.hidden and all(store.lengths[row] == g.start for row in range(g.rows.start, g.rows.stop))]
    if len(found) < 2:
        return None
    each = sorted(((row, g) for g in found for row in range(g.rows.start, g.rows.stop)), key=lambda pair: pair[0])
    columns = [g.columns.start if isinstance(g.columns, slice) else int(g.columns[0]) for _, g in each]
    step = Step(tuple(row for row, _ in each), tuple(g.start for _, g in each))
    at = (0,) * len(each) if found[0].flat else step.rows
    stretch = (columns[0], columns[-1] + 1) if found[0].flat and columns == [*range(columns[0], columns[0] + len(columns))] else None
    return Singles(step, torch.tensor(at, device=device), torch.tensor(columns, device=device), stretch)


def _checked(mask: torch.Tensor, rows: int, seen: int, columns: int) -> torch.Tensor:
    if mask.shape[0] != rows or mask.shape[1] < seen + columns:
        raise ValueError(
            f"attention_mask of shape {list(mask.shape)} does not cover {rows} rows of {seen} tokens seen and {columns} new ones; pass one column per token, "
            "those in the cache included. If the new ones begin with what the cache holds, as generate passes them with drafts (prompt_lookup_num_tokens, "
            "assistant_model), pass an empty cache or leave the drafts out"
        )
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError("attention_mask must be 1 where a token is seen and 0 where it is not; other values (packed or additive masks) cannot be honoured")
    return mask.bool()


def _indices(start: int | tuple[int, ...], count: int, device: torch.device) -> torch.Tensor:
    if isinstance(start, tuple):
        return torch.tensor(start, device=exact_device(device))
    return torch.arange(start, start + count, device=exact_device(device))


def _as_slice(where: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    if not where.numel():
        return slice(0, 0)
    first, last = int(where[0]), int(where[-1])
    return slice(first, last + 1) if last - first + 1 == where.numel() else where.to(device)
