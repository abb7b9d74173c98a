"""Buffers: one form of keys, or the values, of all rows, kept only as long as a later query can need them.

A form is "keys encoded at one position map". A row is its own sequence: its tokens lie at their true indices, pads are never stored.
Knows tensors, indices and rollback; not positions, layers or models.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakSet

import torch

from longreach.core.segments import Retention
from longreach.kernels.tiles import between

ROLLBACK = 128  # tokens a crop may always undo (assisted decoding)
SLACK = 64  # tokens a bounded buffer takes before it moves its tail to the front


def room(old: int, needed: int, most: int | None) -> int:
    """Entries of a body that had `old` and needs `needed` <= `most`: it grows by an eighth, and never beyond `most`."""
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


@dataclass(eq=False)
class _Added:
    """What the forward under way adds to some rows of a buffer. It counts when the forward is finished: see `Buffer.commit`."""

    rows: slice
    start: int  # index of the first new token
    stop: int
    first: int  # index of the first entry that is needed once it counts
    new: torch.Tensor | None = None  # the last new entries, up to `stop`; None: they are in the body already
    old: torch.Tensor | None = None  # entries [first, ...) of the body that move to its front


class Buffer:
    """One form of keys, or the values, of all rows: the first `head` indices and the last `tail` (None: all).

    The body is contiguous. If bounded it holds `tail + ROLLBACK + SLACK` entries: when it is full, its tail moves to the front, once in
    SLACK tokens. If not, it grows by an eighth of its size: a token then costs eight copied entries, little beside the whole length that
    attention reads for it.

    A forward adds in two steps. `extend` hands out the run that the new queries read, and writes only where nothing is stored; where there is
    no such place, the run is a copy. `commit` makes it count, and only then is anything forgotten. A forward that fails in any layer
    therefore leaves every buffer as it was: `discard`.
    """

    def __init__(self, retention: Retention, rows: int) -> None:
        self.retention = retention
        self.head: torch.Tensor | None = None  # [B, H, head, D]
        self.body: torch.Tensor | None = None  # [B, H, capacity, D]
        self.starts = [0] * rows  # index of the first entry of the body
        self.ends = [0] * rows  # number of tokens of the row
        self.sharers: WeakSet[Buffer] = WeakSet()  # the forks that read the same memory, this one among them; empty: nobody else
        self._added: list[_Added] = []
        self._head_before: torch.Tensor | None = None  # of a forward that writes over first tokens

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.head, self.body) if t is not None)

    @property
    def even(self) -> bool:
        """Whether all rows begin at the same index, or nothing but first tokens is kept."""
        return self.retention.tail == 0 or self.starts.count(self.starts[0]) == len(self.starts)

    def pinned(self, rows: slice, stop: int) -> Run:
        """The first indices, up to `stop`."""
        assert self.head is not None
        return Run(self.head[rows, :, : min(stop, self.retention.head)], 0)

    # -- a forward ------------------------------------------------------------------------------------------------------------

    def extend(self, rows: slice, start: int, new: torch.Tensor, rollback: int = ROLLBACK) -> Run:
        """`new` [B, H, T, D] goes to indices start .. start + T -> a run with all entries that its own queries can see.

        `start` may lie before the end of these rows: what they hold from there on is forgotten when the forward is finished.
        rollback  tokens that a crop may undo afterwards.
        """
        if self.body is not None and self.body.dtype != new.dtype:
            raise ValueError(
                f"this cache was read in {self.body.dtype} and the model now computes in {new.dtype}; pass a new DynamicCache() and the whole text, and "
                "extend() again after a cast"
            )
        self._own()
        if self.retention.head > start:
            self._pin(rows, start, new)
        first, stop, tail = self.starts[rows.start], start + new.shape[2], self.retention.tail
        if tail == 0:
            self._added.append(_Added(rows, stop, stop, stop))
            return Run(new, start)
        most = None if tail is None else tail + rollback + SLACK
        if start == max(self.ends[rows]) and (most is None or stop - first <= most):
            body = self._room(stop - first, new, most)
            part(body, rows, start - first, stop - first).copy_(new)
            self._added.append(_Added(rows, start, stop, first))
            return Run(part(body, rows, 0, stop - first), first)
        seen = first if tail is None else max(first, start - tail)
        run = new if seen == start or self.body is None else torch.cat([self.body[rows, :, seen - first : start - first], new], dim=2)
        kept = first if tail is None else max(first, stop - tail - rollback)
        self._added.append(_Added(rows, start, stop, kept, new[:, :, max(0, kept - start) :].clone()))
        return Run(run, seen)

    def commit(self) -> None:
        """What the forward added counts from now on. May be called again where it was interrupted."""
        while self._added:
            self._count(self._added[0])
            del self._added[0]
        self._head_before = None

    def discard(self) -> None:
        """The forward failed: as if it had never begun."""
        self._added.clear()
        if self._head_before is not None:
            self.head, self._head_before = self._head_before, None

    def _count(self, added: _Added) -> None:
        rows, first, new = added.rows, self.starts[added.rows.start], added.new
        if new is not None:
            self._own()  # it may have been forked since `extend`
            length, tail = added.stop - added.first, self.retention.tail
            if added.old is None and self.body is not None and first < added.first < added.start:
                added.old = self.body[rows, :, added.first - first : added.start - first].clone()  # so that an interrupted move can be made again
            body = self._room(length, new, None if tail is None else max(length, tail + ROLLBACK + SLACK))
            if added.old is not None:
                body[rows, :, : added.old.shape[2]] = added.old
            body[rows, :, length - new.shape[2] : length] = new
        for row in range(rows.start, rows.stop):
            self.starts[row], self.ends[row] = added.first, added.stop

    # -- between forwards -----------------------------------------------------------------------------------------------------

    def reaches(self, row: int) -> int:
        """The smallest length to which a row can be cut."""
        tail, first = self.retention.tail, self.starts[row]
        return first + tail - 1 if tail and first else 0

    def rewind(self, row: int, stop: int) -> None:
        """Forget what a row holds at index `stop` and later; not before `reaches`."""
        self.ends[row] = min(self.ends[row], stop)
        self.starts[row] = min(self.starts[row], stop)

    def select(self, index: torch.Tensor) -> None:
        """Rows become rows `index` (beam search, expansion, selection)."""
        rows = index.tolist()
        with torch.inference_mode(False):
            head, body = (None if x is None else x.index_select(0, index.to(x.device)) for x in (self.head, self.body))
        self._leave()
        self.head, self.body = head, body
        self.starts, self.ends = [self.starts[r] for r in rows], [self.ends[r] for r in rows]

    def fork(self) -> Buffer:
        """The same entries for another to go on from, without those of a forward under way. The memory is shared until one of them writes: it then
        takes a copy of its own."""
        other = Buffer(self.retention, len(self.starts))
        other.head = self.head if self._head_before is None else self._head_before
        other.body, other.starts, other.ends = self.body, [*self.starts], [*self.ends]
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
            tail, length = self.retention.tail, body.shape[2]
            self._room(length, body, None if tail is None else max(length, tail + ROLLBACK + SLACK))[:, :, :length] = body

    # -- memory: never a tensor of inference mode, which nobody could write to outside it ------------------------------------------

    def _own(self) -> None:
        """Before a write: memory that no fork reads."""
        if len(self.sharers) > 1:
            with torch.inference_mode(False):
                self.head = None if self.head is None else self.head.clone()
                self.body = None if self.body is None else self.body.clone()
            self._leave()

    def _leave(self) -> None:
        self.sharers.discard(self)
        self.sharers = WeakSet()

    def _pin(self, rows: slice, start: int, new: torch.Tensor) -> None:
        with torch.inference_mode(False):
            if self.head is None:
                self.head = new.new_zeros((len(self.starts), new.shape[1], self.retention.head, new.shape[3]))
            elif self._head_before is None and start < max(self.ends[rows]):
                self.head, self._head_before = self.head.clone(), self.head
        stop = min(self.retention.head, start + new.shape[2])
        self.head[rows, :, start:stop] = new[:, :, : stop - start]

    def _held(self) -> int:
        """The most entries that a row has in the body, those of the forward under way too."""
        stored = (stop - start for start, stop in zip(self.starts, self.ends, strict=True))
        return max(*stored, *(added.stop - added.first for added in self._added if added.new is None), 0)

    def _room(self, needed: int, like: torch.Tensor, most: int | None) -> torch.Tensor:
        """A body of at least `needed` entries per row. One that a long rollback has made larger than `most` shrinks again."""
        old = 0 if self.body is None else self.body.shape[2]
        size = room(old, needed, most)
        if most is not None and size > most >= max(needed, self._held()):
            size = most
        if self.body is None or size != old:
            with torch.inference_mode(False):
                grown = like.new_empty((len(self.starts), like.shape[1], size, like.shape[3]))
            if self.body is not None:
                kept = min(old, size)
                grown[:, :, :kept] = self.body[:, :, :kept]
            self.body = grown
        return self.body


def _blank(kept: torch.Tensor, starts: list[int], ends: list[int]) -> torch.Tensor:
    kept = kept.detach().to("cpu", copy=True).contiguous()
    for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
        kept[row, :, end - start :] = 0
    return kept
