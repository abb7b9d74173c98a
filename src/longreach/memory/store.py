"""The store: keys and values of real tokens, each key form only as long as a later query can need it.

A form is "keys encoded at one position map". A row of the batch is its own sequence: its tokens lie at their true indices, pads
are never stored. Knows buffers, lengths and rollback; not positions, models or caches of Transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch

from longreach.core.segments import PositionMap, Retention
from longreach.kernels.tiles import between
from longreach.memory.slots import Slots, Stretch, runs

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


@dataclass(frozen=True)
class Past:
    """What a forward may see of the tokens of a row: its new tokens get the indices from `start` on, and of those before it `hidden` are not seen."""

    start: int
    hidden: tuple[Stretch, ...] = ()


class Store:
    """All layers of one cache, the length of every row, and the slots (columns, pads included) that Transformers counts.

    owner  whoever may continue it; compared, and asked by the cache whether it expects its store. The store itself asks it nothing.
    """

    def __init__(self, retentions: list[dict[PositionMap, Retention]], owner: Any) -> None:
        self.owner = owner
        self.retentions = retentions
        self.layers: list[LayerStore] = []
        self.lengths: list[int] = []
        self.slots = Slots.empty(0)
        self.announced = 0  # tokens that a crop may undo after this forward, where somebody has said so
        self.record_past = False  # Transformers announces that it may crop all that is read from one crop to the next
        self.since_crop = 0  # slots
        self.offsets: list[int] = []  # per row, what a caller's position ids were ahead of the indices at the first call
        self.changes = 0  # a forward is of the store as it was when it began: it goes on only while this is the same
        self._finishing: tuple[list[int], Slots, list[int]] | None = None

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def seen(self) -> int:
        return self.slots.seen if self._finishing is None else self._finishing[1].seen

    @property
    def real(self) -> torch.Tensor | None:
        """[B, seen] which slots hold real tokens; None while all do."""
        return self.slots.real

    @property
    def rollback(self) -> int:
        """Tokens that a crop may undo after the forward under way."""
        return max(ROLLBACK, self.announced)

    @property
    def buffers(self) -> Iterator[Buffer]:
        return (buffer for layer in self.layers for buffer in layer.buffers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(buffer.nbytes for buffer in self.buffers)

    # -- a forward ------------------------------------------------------------------------------------------------------------

    def open(self, rows: int, columns: int = 0, announced: int = 0) -> None:
        """Before a forward of `columns` columns. The last `announced` tokens may be cropped after it, as assisted decoding does."""
        self._change()
        if self.seen and self.rows != rows:
            raise ValueError(f"the cache holds {self.rows} rows but the input has {rows}; pass a batch of {self.rows} or start a new cache")
        if self.rows != rows:
            self.lengths, self.offsets = [0] * rows, [0] * rows
            self.slots = Slots.empty(rows)
            self.layers = [LayerStore(retention, rows) for retention in self.retentions]
        self.announced = max(announced, self.since_crop + columns if self.record_past else 0)

    def past(self, mask: torch.Tensor | None) -> list[Past]:
        """What a mask [B, seen] of the slots so far leaves visible; None: all tokens.

        A token that is hidden keeps its index. A new one follows the last token that is visible: what lies behind that is forgotten when the
        forward is finished. Raises ValueError where a slot is shown that holds no token, or where too much would have to be forgotten.
        """
        real = self.slots.real
        if mask is None or not self.seen or bool(mask.all() if real is None else torch.equal(mask.cpu(), real)):
            return [Past(length) for length in self.lengths]
        mask = mask.cpu()
        if real is not None and bool((shown := mask & ~real).any()):
            row, slot = shown.nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask shows slot {slot} of row {row}, whose token was a pad when it was read, so nothing is stored of it; "
                "keep the zeros of earlier calls, or read the text again with a new cache"
            )
        return [self._past(row, mask[row] if real is None else mask[row][real[row]]) for row in range(self.rows)]

    def _past(self, row: int, visible: torch.Tensor) -> Past:
        """visible [tokens of the row]."""
        hidden = runs(~visible)
        start = hidden.pop()[0] if hidden and hidden[-1][1] == len(visible) else len(visible)
        if start < (least := max(buffer.reaches(row) for buffer in self.buffers)):
            raise ValueError(
                f"attention_mask hides the last {len(visible) - start} tokens of row {row}, and of the tokens before them too little is kept to go on from "
                f"there (this method can go back to token {least}); pass the mask with the call that reads them, or read the text again"
            )
        return Past(start, tuple(hidden))

    def places(self) -> list[Any]:
        """Per row, where its buffers begin: rows may be read in one call only where these are equal."""
        if self.rows < 2 or all(buffer.even for buffer in self.buffers):
            return [None] * self.rows
        return [tuple(buffer.starts[row] for buffer in self.buffers if not buffer.even) for row in range(self.rows)]

    def advance(self, real: torch.Tensor | None, columns: int, past: list[Past] | None = None) -> None:
        """The forward is finished: its tokens count; `real` [B, T] on the CPU, None if all are. An interrupt is made good at the next use.

        So is a lack of memory: the forward has succeeded, and would be taken for one that changed nothing if it raised.
        """
        starts = self.lengths if past is None else [p.start for p in past]
        counts = [columns] * self.rows if real is None else real.sum(1).tolist()
        slots = self.slots.copy()
        shorter = [row for row, (start, length) in enumerate(zip(starts, self.lengths, strict=True)) if start < length]
        for row in shorter:
            slots.keeping(row, starts[row])
        slots.append(real, columns)
        self.since_crop += columns
        self._finishing = [start + count for start, count in zip(starts, counts, strict=True)], slots, shorter
        with suppress(RuntimeError, MemoryError):
            self.settle()

    def _change(self) -> None:
        """Before anything that a forward under way cannot go on after."""
        self.settle()
        self.changes += 1

    def settle(self) -> None:
        """What a finished forward added counts, what one that failed has added is gone."""
        if self._finishing is None:
            for buffer in self.buffers:
                buffer.discard()
            return
        lengths, slots, shorter = self._finishing
        for buffer in self.buffers:
            buffer.commit()
            for row in shorter:  # one that read nothing but pads has added nothing that would say so
                buffer.rewind(row, lengths[row])
        self.lengths, self.slots, self._finishing = lengths, slots, None

    # -- between forwards -----------------------------------------------------------------------------------------------------

    def crop(self, slots: int, warn: bool = True) -> None:
        """Forget the last `slots` columns, or raise and leave everything as it is. `warn` if the same could not be done again."""
        self._change()
        self.since_crop = 0
        slots = min(slots, self.seen)
        if not slots:
            return
        left = self.slots.without(slots)
        lengths = [left.tokens(row) for row in range(self.rows)]
        least = [max(buffer.reaches(row) for buffer in self.buffers) for row in range(self.rows)]
        for row, (length, floor) in enumerate(zip(lengths, least, strict=True)):
            if length < floor:
                raise ValueError(
                    f"cannot go back to token {length} of row {row}: of its {self.lengths[row]} tokens the last {self.lengths[row] - floor} can be forgotten "
                    f"(at least {ROLLBACK} behind the farthest one that was read); crop less or start a new cache"
                )
        for buffer in self.buffers:
            for row, length in enumerate(lengths):
                buffer.rewind(row, length)
        self.lengths, self.slots = lengths, left
        again = min(length - floor for length, floor in zip(lengths, least, strict=True))
        if warn and any(least) and again < slots and not self.announced:
            warnings.warn(f"{slots} tokens were forgotten; only {again} more can be, until new ones are read", stacklevel=4)

    def fork(self) -> Store:
        """A store of the same content that goes on by itself. Keys and values are shared until one side writes; see `Buffer.fork`.

        A forward that is under way, which may ask for a fork in a hook, goes on undisturbed.
        """
        if self._finishing is not None:
            self.settle()
        other = Store(self.retentions, self.owner)
        other.layers = [layer.fork() for layer in self.layers]
        other.lengths, other.offsets, other.slots, other.record_past = [*self.lengths], [*self.offsets], self.slots.copy(), self.record_past
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Store:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError("a Longreach cache cannot be pickled or passed to torch.save; write it with extension.save(cache, file, ids), read it with load(file)")

    def restore(self, lengths: list[int], seen: int, real: torch.Tensor | None) -> None:
        """Become an empty store that has counted this much; the caller fills the buffers of `layers`."""
        self.reset()
        self.open(len(lengths))
        self.lengths, self.slots = lengths, Slots.empty(len(lengths)) if real is None else Slots.of(real)
        self.slots.seen = seen

    def select(self, index: torch.Tensor) -> None:
        """Rows become rows `index`; of none, the store is empty again."""
        self._change()
        rows = index.tolist()
        if not rows:
            return self.reset()
        if any(not -self.rows <= row < self.rows for row in rows):
            raise ValueError(f"rows {rows} are not all among the {self.rows} of this cache; pass indices from 0 to {self.rows - 1}")
        index = index % self.rows
        for buffer in self.buffers:
            buffer.select(index)
        self.lengths, self.offsets = ([each[row] for row in index.tolist()] for each in (self.lengths, self.offsets))
        self.slots.select(index.tolist())

    def reset(self) -> None:
        self.changes += 1
        self.layers, self.lengths, self.slots, self._finishing, self.since_crop = [], [], Slots.empty(0), None, 0
