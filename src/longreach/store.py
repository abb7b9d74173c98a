"""The store: keys and values of real tokens, each key form only as long as a later query can need it.

A form is "keys encoded at one position map". A row of the batch is its own sequence: its tokens lie at their true indices, pads
are never stored. Knows buffers, lengths and rollback; not positions, models or caches of Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch

from longreach.backends.tiles import between
from longreach.segments import PositionMap, Retention

ROLLBACK = 128  # tokens a crop may always undo (assisted decoding)
SLACK = 64  # tokens a bounded buffer takes before it moves its tail to the front


def room(old: int, needed: int, most: int | None) -> int:
    """Entries of a body that had `old` and needs `needed`: it grows by an eighth, and never beyond `most`."""
    if needed <= old:
        return old
    size = max(needed + SLACK, old + old // 8)
    return size if most is None else min(size, most)


@dataclass(frozen=True)
class Run:
    """Consecutive entries [B, H, n, D] of one form; entry 0 has index `start`."""

    data: torch.Tensor
    start: int

    @property
    def stop(self) -> int:
        return self.start + self.data.shape[2]

    def slice(self, start: int, stop: int) -> torch.Tensor:
        assert self.start <= start <= stop <= self.stop, f"indices {start}..{stop} are not in {self.start}..{self.stop}"
        return between(self.data, start - self.start, stop - self.start)


def part(x: torch.Tensor, rows: slice, start: int, stop: int) -> torch.Tensor:
    """x[rows, :, start:stop], in as few operations as it takes: a decoding step asks for it in every layer."""
    return between(x if rows == slice(0, x.shape[0]) else x[rows], start, stop)


class Buffer:
    """One form of keys, or the values, of all rows: the first `head` indices and the last `tail` (None: all).

    The body is contiguous. If bounded it holds `tail + ROLLBACK + SLACK` entries at most: when it is full, its tail moves to the
    front, once in SLACK tokens. If not, it grows by an eighth of its size: a token then costs eight copied entries, little beside the
    whole length that attention reads for it.
    """

    def __init__(self, retention: Retention, rows: int) -> None:
        self.retention = retention
        self.head: torch.Tensor | None = None  # [B, H, head, D]
        self.body: torch.Tensor | None = None  # [B, H, capacity, D]
        self.starts = [0] * rows  # index of the first entry of the body
        self.ends = [0] * rows  # number of tokens of the row
        self.sharers: WeakSet[Buffer] = WeakSet()  # the forks that read the same memory, this one among them; empty: nobody else

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.head, self.body) if t is not None)

    def pinned(self, rows: slice, stop: int) -> Run:
        """The first indices, up to `stop`."""
        assert self.head is not None
        return Run(self.head[rows, :, : min(stop, self.retention.head)], 0)

    def extend(self, rows: slice, start: int, new: torch.Tensor) -> Run:
        """Store `new` [B, H, T, D] at indices start..start+T; -> a run with all entries that its own queries can see."""
        self.rewind(rows, start)
        self._own()
        if self.retention.head > start:
            self._pin(rows, start, new)
        stop = start + new.shape[2]
        tail = self.retention.tail
        if tail is None:
            body = self._room(rows, start - self.starts[rows.start] + new.shape[2], new, None)
            first = self.starts[rows.start]
            part(body, rows, start - first, stop - first).copy_(new)
            self._set(rows, first, stop)
            return Run(part(body, rows, 0, stop - first), first)
        if tail == 0:
            self._set(rows, stop, stop)
            return Run(new, start)
        return self._extend_bounded(rows, start, new, tail)

    def _extend_bounded(self, rows: slice, start: int, new: torch.Tensor, tail: int) -> Run:
        keep, first, stop = tail + ROLLBACK, self.starts[rows.start], start + new.shape[2]
        if stop - first <= keep + SLACK:
            body = self._room(rows, stop - first, new, keep + SLACK)
            part(body, rows, start - first, stop - first).copy_(new)
            self._set(rows, first, stop)
            return Run(part(body, rows, 0, stop - first), first)
        if new.shape[2] <= SLACK:
            assert self.body is not None
            kept = max(first, start - keep)  # move the tail to the front, then append
            self.body[rows, :, : start - kept] = self.body[rows, :, kept - first : start - first].clone()
            self._set(rows, kept, start)
            return self._extend_bounded(rows, start, new, tail)
        seen = max(first, start - max(tail, keep - new.shape[2]))  # a long chunk: attend to a copy, keep its end
        run = new if seen == start or self.body is None else torch.cat([self.body[rows, :, seen - first : start - first], new], dim=2)
        kept = max(seen, stop - keep)
        body = self._room(rows, stop - kept, new, keep + SLACK)
        body[rows, :, : stop - kept] = run[:, :, kept - seen :]
        self._set(rows, kept, stop)
        return Run(run, seen)

    def rewind(self, rows: slice, stop: int) -> None:
        """Forget what is at index `stop` and later."""
        for row in range(rows.start, rows.stop):
            if self.ends[row] <= stop:
                continue
            tail = self.retention.tail
            if tail and self.starts[row] > max(0, stop - tail + 1):
                raise ValueError(f"cannot go back to token {stop}: this store keeps what a rollback of {ROLLBACK} tokens needs; crop less or start a new cache")
            self.ends[row] = stop
            self.starts[row] = min(self.starts[row], stop)

    def select(self, index: torch.Tensor) -> None:
        """Rows become rows `index` (beam search, expansion, selection)."""
        rows = index.tolist()
        self._leave()
        if self.head is not None:
            self.head = self.head.index_select(0, index.to(self.head.device))
        if self.body is not None:
            self.body = self.body.index_select(0, index.to(self.body.device))
        self.starts, self.ends = [self.starts[r] for r in rows], [self.ends[r] for r in rows]

    def fork(self) -> Buffer:
        """The same entries for another to go on from. The memory is shared until one of them writes: it then takes a copy of its own."""
        other = Buffer(self.retention, len(self.starts))
        other.head, other.body, other.starts, other.ends = self.head, self.body, [*self.starts], [*self.ends]
        self.sharers.update((self, other))
        other.sharers = self.sharers
        return other

    def entries(self) -> dict[str, torch.Tensor]:
        """What is kept, on the CPU and without room to grow; zeros where a row keeps nothing, whatever lay there before."""
        found = {}
        if self.head is not None:
            found["head"] = _blank(self.head, [0] * len(self.ends), self.ends)
        if self.body is not None and (length := max(b - a for a, b in zip(self.starts, self.ends, strict=True))):
            found["body"] = _blank(self.body[:, :, :length], self.starts, self.ends)
        return found

    def restore(self, head: torch.Tensor | None, body: torch.Tensor | None, starts: list[int], ends: list[int]) -> None:
        """The inverse of `entries`: takes over a head, and a body into memory with room for what comes."""
        self._leave()
        self.head, self.body, self.starts, self.ends = head, None, starts, ends
        if body is not None:
            tail = self.retention.tail
            room = self._room(slice(0, len(starts)), body.shape[2], body, None if tail is None else tail + ROLLBACK + SLACK)
            room[:, :, : body.shape[2]] = body

    def _own(self) -> None:
        """Before a write: memory that no fork reads."""
        if len(self.sharers) > 1:
            self.head = None if self.head is None else self.head.clone()
            self.body = None if self.body is None else self.body.clone()
            self._leave()

    def _leave(self) -> None:
        self.sharers.discard(self)
        self.sharers = WeakSet()

    def _set(self, rows: slice, start: int, stop: int) -> None:
        for row in range(rows.start, rows.stop):
            self.starts[row], self.ends[row] = start, stop

    def _pin(self, rows: slice, start: int, new: torch.Tensor) -> None:
        if self.head is None:
            self.head = new.new_zeros((len(self.starts), new.shape[1], self.retention.head, new.shape[3]))
        stop = min(self.retention.head, start + new.shape[2])
        self.head[rows, :, start:stop] = new[:, :, : stop - start]

    def _room(self, rows: slice, needed: int, like: torch.Tensor, most: int | None) -> torch.Tensor:
        """A body of at least `needed` entries per row."""
        old = 0 if self.body is None else self.body.shape[2]
        if self.body is None or needed > old:
            size = room(old, needed, most)
            grown = like.new_empty((len(self.starts), like.shape[1], size, like.shape[3]))
            if self.body is not None:
                grown[:, :, :old] = self.body
            self.body = grown
        return self.body


def _blank(kept: torch.Tensor, starts: list[int], ends: list[int]) -> torch.Tensor:
    kept = kept.detach().to("cpu", copy=True).contiguous()
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        kept[row, :, end - start :] = 0
    return kept


@dataclass
class LayerStore:
    """The values and every key form of one layer."""

    retentions: dict[PositionMap, Retention]
    rows: int
    keys: dict[PositionMap, Buffer] = field(init=False)
    values: Buffer = field(init=False)

    def __post_init__(self) -> None:
        self.keys = {positions: Buffer(kept, self.rows) for positions, kept in self.retentions.items()}
        everything = Retention()
        for kept in self.retentions.values():
            everything = everything | kept
        self.values = Buffer(everything, self.rows)

    @property
    def buffers(self) -> list[Buffer]:
        return [self.values, *self.keys.values()]

    def fork(self) -> LayerStore:
        other = LayerStore(self.retentions, self.rows)
        other.values = self.values.fork()
        other.keys = {positions: buffer.fork() for positions, buffer in self.keys.items()}
        return other


class Store:
    """All layers of one cache, the length of every row, and the slots (columns, pads included) that Transformers counts."""

    def __init__(self, retentions: list[dict[PositionMap, Retention]], owner: Any) -> None:
        self.owner = owner
        self.retentions = retentions
        self.layers: list[LayerStore] = []
        self.lengths: list[int] = []
        self.seen = 0
        self._real: torch.Tensor | None = None  # [B, seen] which slots hold real tokens; None while all do

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(buffer.nbytes for layer in self.layers for buffer in layer.buffers)

    def open(self, rows: int) -> None:
        if self.lengths and self.rows != rows:
            raise ValueError(f"the cache holds {self.rows} rows but the input has {rows}; pass a batch of {self.rows} or start a new cache")
        if not self.lengths:
            self.lengths = [0] * rows
            self.layers = [LayerStore(retention, rows) for retention in self.retentions]

    def advance(self, real: torch.Tensor | None, columns: int) -> None:
        """Count the tokens of a finished forward; `real` [B, T] on the CPU, None if all are."""
        if real is not None and self._real is None:
            self._real = torch.ones(self.rows, self.seen, dtype=torch.bool)
        if self._real is not None:
            self._real = torch.cat([self._real, torch.ones(self.rows, columns, dtype=torch.bool) if real is None else real], dim=1)
        counts = [columns] * self.rows if real is None else real.sum(1).tolist()
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self.seen += columns

    def crop(self, slots: int) -> None:
        """Forget the last `slots` columns."""
        slots = min(slots, self.seen)
        if not slots:
            return
        lengths = [length - slots for length in self.lengths]
        if self._real is not None:
            lost = self._real[:, self.seen - slots :].sum(1).tolist()
            lengths = [length - int(gone) for length, gone in zip(self.lengths, lost, strict=True)]
        for layer in self.layers:
            for buffer in layer.buffers:
                for row, length in enumerate(lengths):
                    buffer.rewind(slice(row, row + 1), length)
        self.lengths, self.seen = lengths, self.seen - slots
        if self._real is not None:
            self._real = self._real[:, : self.seen]

    def fork(self) -> Store:
        """A store of the same content that goes on by itself. Keys and values are shared until one side writes; see `Buffer.fork`."""
        other = Store(self.retentions, self.owner)
        other.layers = [layer.fork() for layer in self.layers]
        other.lengths, other.seen, other._real = [*self.lengths], self.seen, self._real
        return other

    @property
    def real(self) -> torch.Tensor | None:
        """[B, seen] which slots hold real tokens; None while all do."""
        return self._real

    def restore(self, lengths: list[int], seen: int, real: torch.Tensor | None) -> None:
        """Become an empty store that has counted this much; the caller fills the buffers of `layers`."""
        self.reset()
        self.open(len(lengths))
        self.lengths, self.seen, self._real = lengths, seen, real

    def select(self, index: torch.Tensor) -> None:
        for layer in self.layers:
            for buffer in layer.buffers:
                buffer.select(index)
        self.lengths = [self.lengths[row] for row in index.tolist()]
        if self._real is not None:
            self._real = self._real[index.cpu()]

    def reset(self) -> None:
        self.layers, self.lengths, self.seen, self._real = [], [], 0, None
