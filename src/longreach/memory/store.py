"""The store: the memory of every layer of one cache, the length of every row, and the slots that Transformers counts.

Knows placements, lengths, slots and rollback; not positions, models or caches of Transformers.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from longreach.core.eviction import Scores
from longreach.core.segments import Form, Place, Retention
from longreach.memory import blocks
from longreach.memory.blocks import Blocked
from longreach.memory.contiguous import Contiguous
from longreach.memory.layer import LayerMemory, Memory
from longreach.memory.past import Past, past
from longreach.memory.placement import ROLLBACK, Placement, alike
from longreach.memory.slots import Slots


@dataclass
class Filed:
    """A log on disk holds the beginning of every row: the state of the log, as it was read or written, and the tokens of each row that are the same since."""

    state: str
    lengths: list[int]


class Store:
    """All layers of one cache, the length of every row, and the slots (columns, pads included) that Transformers counts."""

    def __init__(self, forms: list[dict[Form, Retention]], joins: bool = False, memory: Memory = Contiguous) -> None:
        self.forms = forms  # of every layer
        self.memory = memory
        self.blocked = memory if isinstance(memory, Blocked) else None
        self.joins = joins  # rows are requests, which come and go: no columns are counted
        self.asked: list[tuple[int, int]] | None = None  # (row, tokens) of a flat forward that is about to begin
        self.placements: dict[Place, Placement] = {}
        self.layers: list[LayerMemory] = []
        self.lengths: list[int] = []
        self.slots = Slots.empty(0)
        self.announced = 0  # tokens that a crop may undo after this forward, where somebody has said so
        self.record_past = False  # Transformers announces that it may crop all that is read from one crop to the next
        self.since_crop = 0  # slots
        self.forked = False  # others may read the same memory
        self.scores: list[Scores | None] = []  # of a method that evicts
        self.coming: tuple[int, ...] = ()  # turns that were announced to a store without rows
        self.offsets: list[int] = []  # per row, what a caller's position ids were ahead of the indices at the first call
        self.changes = 0  # a forward is of the store as it was when it began: it goes on only while this is the same
        self.filed: Filed | None = None
        self._finishing: tuple[list[int], Slots, list[int]] | None = None
        self._back: list[Callable[[], None]] = []  # what puts into tails what is left of blocks that were cut

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
    def nbytes(self) -> int:
        """Bytes allocated for keys and values. What rows share counts once; what other stores read too counts here as well: see `nbytes_of`."""
        return nbytes_of([self])

    # -- a forward ------------------------------------------------------------------------------------------------------------

    def open(self, rows: int, columns: int = 0, announced: int = 0) -> None:
        """Before a forward of `columns` columns. The last `announced` tokens may be cropped after it, as assisted decoding does."""
        self._change()
        if self.seen and self.rows != rows:
            raise ValueError(f"the cache holds {self.rows} rows but the input has {rows}; pass a batch of {self.rows} or start a new cache")
        if self.rows != rows:
            self._begin(rows)
        self.announced = max(announced, self.since_crop + columns if self.record_past else 0)

    def _begin(self, rows: int) -> None:
        self.filed = None
        self.slots = Slots.empty(rows)
        unit = 1 if self.blocked is None else self.blocked.unit
        every = dict.fromkeys(replace(kept, head=0) for forms in self.forms for kept in forms.values())
        self.placements = {kept.place: Placement(kept, rows, self.joins, unit if kept.place is None else 1) for kept in every}
        self.layers = [self.memory(self.placements, forms) for forms in self.forms]
        self.offsets, self.scores, self.lengths = [0] * rows, [None] * rows, [0] * rows  # last: an interrupt before leaves a store without rows

    def prepare(self) -> None:
        """A store that has never held anything says where rows will lie."""
        if not self.layers:
            self._begin(0)

    def past(self, mask: torch.Tensor | None) -> list[Past]:
        """What a mask [B, seen] of the slots so far leaves visible; see `memory.past`."""
        return past(self.slots, self.lengths, self.reaches, mask)

    def reaches(self, row: int) -> int:
        """The smallest length to which a row can be cut."""
        floor = 0 if (scores := self.scores[row]) is None else scores.floor
        return max(floor, *(placement.reaches(row) for placement in self.placements.values()))

    def reserve(self, past: list[Past], counts: list[int]) -> list[object]:
        """Before the layers run: there is room for so many new tokens of every row -> a key for each row, equal where rows that follow each other lie alike.
        Only such rows may be read in one call."""
        new = [(row, p.start, p.start + count) for row, (p, count) in enumerate(zip(past, counts, strict=True)) if count]
        if new:
            self._part()
        for placement in self.placements.values():
            placement.reserve(new, self.rollback)
        if self.blocked is not None:
            self.blocked.require(self.placements, self.layers)
        forgets = [p.start < length for p, length in zip(past, self.lengths, strict=True)]  # such a row is written to a copy, which others need not be
        return list(zip(alike(self.placements.values(), range(self.rows)), forgets, strict=True))

    def advance(self, real: torch.Tensor | None, columns: int, past: list[Past] | None = None, counts: list[int] | None = None) -> None:
        """The forward is finished: its tokens count; `real` [B, T] on the CPU, None if all are. An interrupt is made good at the next use.

        So is a lack of memory: the forward has succeeded, and would be taken for one that changed nothing if it raised.
        """
        starts = self.lengths if past is None else [p.start for p in past]
        self._unfile(starts)
        slots = self.slots.copy()
        if counts is not None:  # of a flat forward
            self._finish([start + count for start, count in zip(starts, counts, strict=True)], slots, [])
            return
        counts = [columns] * self.rows if real is None else real.sum(1).tolist()
        shorter = [row for row, (start, length) in enumerate(zip(starts, self.lengths, strict=True)) if start < length]
        for row in shorter:
            slots.keeping(row, starts[row])
        slots.append(real, columns)
        self.since_crop += columns
        self._finish([start + count for start, count in zip(starts, counts, strict=True)], slots, shorter)

    def evict(self, row: int, stop: int, scores: Scores) -> None:
        """A row has `stop` tokens from now on, which have been written anew where they had to move."""
        slots, gone = self.slots.copy(), self.lengths[row] - stop
        slots.evicted[row] += gone
        lengths, offsets, every = [*self.lengths], [*self.offsets], [*self.scores]
        lengths[row], offsets[row], every[row] = stop, offsets[row] + gone, scores
        self.offsets, self.scores = offsets, every
        self._finish(lengths, slots, [row])

    def _part(self) -> None:
        """Before anything is written: what is long and others read too is frozen, and all rows go on in tails of their own."""
        if self.forked:
            shared = {place for layer in self.layers for place in layer.shared}
            self.freeze(range(self.rows), shared)
            self.forked = bool(shared)

    def freeze(self, rows: Collection[int], which: Collection[Place] | None = None) -> None:
        """What rows hold where it is long, in these places."""
        for place, placement in self.placements.items():
            if (which is None or place in which) and (cut := placement.cut(rows)) is not None:
                for layer in self.layers:
                    layer.freeze(place, cut.bases)
                placement.adopt(cut)

    def _finish(self, lengths: list[int], slots: Slots, shorter: list[int]) -> None:
        self._finishing = lengths, slots, shorter
        with suppress(RuntimeError, MemoryError, ValueError):  # of a disk
            self.settle()

    def _unfile(self, lengths: list[int]) -> None:
        """Of every row no more than so many tokens are those that were filed."""
        if self.filed is not None:
            self.filed.lengths = [min(a, b) for a, b in zip(self.filed.lengths, lengths, strict=True)]

    def _change(self) -> None:
        """Before anything that a forward under way cannot go on after."""
        self.settle()
        self.changes += 1

    def settle(self) -> None:
        """What a finished forward added counts, what one that failed has added is gone."""
        counts = self._finishing is not None
        if self._back:
            self._put_back()
        if self._finishing is None:
            for layer in self.layers:
                layer.discard()
        else:
            lengths, slots, shorter = self._finishing
            for placement in self.placements.values():
                placement.commit()
            if shorter:  # one that read nothing but pads has added nothing that would say so
                self._rewind({row: lengths[row] for row in shorter})
            for layer in self.layers:
                layer.settle()
            self.lengths, self.slots, self._finishing = lengths, slots, None
        for placement in self.placements.values():
            placement.finish(counts)
        if self.blocked is not None and (place := self.placements.get(None)) is not None:
            blocks.seal(place, self.layers)

    def _rewind(self, lengths: Mapping[int, int]) -> None:
        """Rows forget what they hold at this index and later."""
        if self.blocked is not None:
            self._back += self.blocked.thaw(self.placements, self.layers, lengths)
        for placement in self.placements.values():
            for row, length in lengths.items():
                placement.rewind(row, length)
        self._put_back()

    def _put_back(self) -> None:
        while self._back:
            self._back[-1]()
            self._back.pop()

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
        least = [self.reaches(row) for row in range(self.rows)]
        for row, (length, floor) in enumerate(zip(lengths, least, strict=True)):
            if length < floor:
                raise ValueError(
                    f"cannot go back to token {length} of row {row}: of its {self.lengths[row]} tokens the last {self.lengths[row] - floor} can be forgotten "
                    f"(at least {ROLLBACK} behind the farthest one that was read); crop less or start a new cache"
                )
        self._unfile(lengths)
        self._rewind(dict(enumerate(lengths)))
        self.lengths, self.slots = lengths, left
        again = min(length - floor for length, floor in zip(lengths, least, strict=True))
        if warn and any(least) and again < slots and not self.announced:
            warnings.warn(f"{slots} tokens were forgotten; only {again} more can be, until new ones are read", stacklevel=4)

    def fork(self) -> Store:
        """A store of the same content that goes on by itself. Keys and values are shared until one side writes: what it has read then stays frozen for all
        that read it, where every token is kept, and what it reads goes to a tail of its own. Bounded forms are copied then, and what is short.
        A forward that is under way, which may ask for a fork in a hook, goes on undisturbed.
        """
        if self._finishing is not None:
            self.settle()
        other = Store(self.forms, self.joins, self.memory)
        self.forked = other.forked = True
        other.placements = {place: placement.fork() for place, placement in self.placements.items()}
        other.layers = [layer.fork(other.placements) for layer in self.layers]
        other.lengths, other.offsets, other.slots, other.record_past = [*self.lengths], [*self.offsets], self.slots.copy(), self.record_past
        other.scores, other.coming = [*self.scores], self.coming
        other.filed = None if self.filed is None else Filed(self.filed.state, [*self.filed.lengths])
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Store:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError("a Longreach cache cannot be pickled or passed to torch.save; write it with extension.save(cache, file, ids), read it with load(file)")

    def restore(self, lengths: list[int], seen: int, real: torch.Tensor | None) -> None:
        """Become an empty store that has counted this much; the caller restores the placements and fills the buffers of `layers`."""
        self.reset()
        self.open(len(lengths))
        self.lengths, self.slots = lengths, Slots.empty(len(lengths)) if real is None else Slots.of(real)
        self.slots.seen = seen

    def join(self) -> int:
        """One more row, which is empty -> its number."""
        self._change()
        self.filed = None
        self.prepare()
        for placement in self.placements.values():
            placement.join()
        for layer in self.layers:
            layer.join()
        self.lengths.append(0)
        self.offsets.append(0)
        self.scores.append(None)
        self.slots.pads.append([])
        self.slots.evicted.append(0)
        return self.rows - 1

    def rewind(self, row: int, length: int) -> None:
        """Forget what a row holds at index `length` and later, or raise and leave everything as it is."""
        self._change()
        if length < (least := self.reaches(row)):
            raise ValueError(
                f"cannot go back to token {length}: of {self.lengths[row]} tokens the last {self.lengths[row] - least} can be forgotten; crop less, or join() "
                "and read the text again"
            )
        lengths = [*self.lengths[:row], min(self.lengths[row], length), *self.lengths[row + 1 :]]
        self._unfile(lengths)
        self._rewind({row: length})
        self.lengths = lengths

    def select(self, index: torch.Tensor) -> None:
        """Rows become rows `index`; of none, the store is empty again. What a row holds that becomes several is frozen where it is long, and they share it."""
        self._change()
        rows = index.tolist()
        if not rows:
            return self.reset()
        if any(not -self.rows <= row < self.rows for row in rows):
            raise ValueError(f"rows {rows} are not all among the {self.rows} of this cache; pass indices from 0 to {self.rows - 1}")
        if self.blocked is not None:
            self.blocked.require(self.placements, self.layers, len(rows) / self.rows)
        index = index % self.rows
        self._part()
        self.freeze([row for row, times in Counter(index.tolist()).items() if times > 1])
        for placement in self.placements.values():
            placement.select(index.tolist())
        for layer in self.layers:
            layer.select(index)
        self.filed = None
        self.lengths, self.offsets = ([each[row] for row in index.tolist()] for each in (self.lengths, self.offsets))
        self.scores = [self.scores[row] for row in index.tolist()]
        self.slots.select(index.tolist())

    def reset(self) -> None:
        self.changes += 1
        self.filed = None
        self.placements, self.layers, self.lengths, self.slots, self._finishing, self.since_crop = {}, [], [], Slots.empty(0), None, 0
        self.forked, self.scores, self.coming = False, [], ()


def nbytes_of(stores: Iterable[Store]) -> int:
    """Bytes that several stores hold. What forks share counts once."""
    return sum({key: size for store in stores for layer in store.layers for key, size in layer.held.items()}.values())
