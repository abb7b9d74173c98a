"""Contiguous memory: the keys and values of one layer, each row's tokens side by side in a buffer of its own.

A form is "keys encoded at one position map", or the summaries of blocks of such keys. Values are kept once, as long as any form. Where there are several
rows, they are kept once more for every shorter tail: keys and values of a form then lie alike for rows of any lengths, and one call reads them. Of a form
that keeps every token, forks read the tokens that they have in common from one frozen base, and what each has read since from a tail of its own. Knows
buffers; not positions, layers or models.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import ClassVar

import torch

from longreach.core.choice import Lookup, OfQueries
from longreach.core.segments import Form, Place, PositionMap, Retention, Summary
from longreach.kernels.entries import picked_of
from longreach.kernels.protocol import KV, gather
from longreach.kernels.tiles import between
from longreach.memory.bases import Base, BaseShelf
from longreach.memory.buffer import Buffer
from longreach.memory.layer import LayerMemory, Weigh
from longreach.memory.placement import Placement
from longreach.memory.recalled import Recalled
from longreach.memory.steps import Shelf, Step

EVERY = 2**62


def values_kept(forms: Mapping[PositionMap, Retention], shared: bool) -> list[Retention]:
    """What is kept of the values: as long as any form of keys; where several rows may be read in one call, once more for every shorter tail."""
    longest = functools.reduce(operator.or_, forms.values())
    shorter = dict.fromkeys(kept.tail for kept in forms.values() if kept.tail not in (0, longest.tail)) if shared else ()
    return [longest, *(Retention(tail=tail) for tail in shorter)]


class Contiguous:
    """The memory of one layer. Implements `memory.layer.LayerMemory`."""

    at_hand: ClassVar[bool] = True
    apart: ClassVar[bool] = False  # whether forms that keep fewer tokens are always read with values of their own

    def __init__(self, placements: Mapping[Place, Placement], forms: Mapping[Form, Retention]) -> None:
        self.placements, self.forms = placements, dict(forms)
        self.keys: dict[Form, Buffer] = {form: self._buffer(placements[kept.place], kept.head) for form, kept in forms.items()}
        self.of_keys: dict[PositionMap, Retention] = {form: kept for form, kept in forms.items() if not isinstance(form, Summary | OfQueries)}
        (longest,) = values_kept(self.of_keys, shared=False)
        self.whole = self._buffer(placements[longest.tail], longest.head)  # the values
        self.recalled = Recalled()
        self.tails = self._tails() if self.apart or self.whole.placement.shared else {}  # values once more, for the forms that keep fewer than `whole`

    @property
    def weigh(self) -> Weigh | None:
        return None

    def _buffer(self, placement: Placement, first: int = 0) -> Buffer:
        return Buffer(placement, first)

    def _another(self, placements: Mapping[Place, Placement]) -> Contiguous:
        return Contiguous(placements, self.forms)

    def _tails(self) -> dict[Place, Buffer]:
        return {kept.tail: self._buffer(self.placements[kept.tail]) for kept in values_kept(self.of_keys, shared=True)[1:]}

    @property
    def buffers(self) -> list[Buffer]:
        return [self.whole, *self.tails.values(), *self.keys.values()]

    @property
    def held(self) -> dict[int, int]:
        return {key: size for buffer in self.buffers for key, size in buffer.held.items()}

    @property
    def frozen(self) -> dict[int, int]:
        return {id(base.entries): base.entries.nbytes for buffer in self.buffers for base in buffer.bases.values()}

    @property
    def shared(self) -> set[Place]:
        return {buffer.placement.kept.place for buffer in self.buffers if buffer.shared}

    def settle(self) -> None:
        for buffer in self.buffers:
            buffer.settle()

    def discard(self) -> None:
        for buffer in self.buffers:
            buffer.discard()

    def join(self) -> None:
        for buffer in self.buffers:
            buffer.join()

    def freeze(self, place: Place, bases: Collection[Base]) -> None:
        for buffer in self.buffers:
            if buffer.placement.kept.place == place:
                buffer.freeze(bases)

    def adopt(self, row: int, other: LayerMemory, its: int) -> None:
        assert isinstance(other, Contiguous)
        for form, buffer in self.keys.items():
            buffer.adopt(row, other.keys[form], its)
        self.whole.adopt(row, other.whole, its)
        for tail, buffer in self.tails.items():
            buffer.adopt(row, other.tails.get(tail, other.whole), its)

    def append(self, rows: slice, start: int, keys: Mapping[PositionMap, torch.Tensor], values: torch.Tensor) -> None:
        for positions, new in keys.items():
            self.keys[positions].write(rows, start, new)
        self.whole.write(rows, start, values)
        for buffer in self.tails.values():
            buffer.write(rows, start, values, shown=self.apart)

    def view(self, positions: PositionMap, rows: slice, start: int, stop: int, pinned: bool) -> Iterable[KV]:
        if pinned:
            return (KV(self.keys[positions].pinned(rows, start, stop), self.whole.pinned(rows, start, stop), start),)
        keys, values = self.keys[positions].parts(rows, start, stop), self.whole.parts(rows, start, stop)
        if len(keys) == len(values) == 1:
            return (_together(keys[0][1], values[0][1], start),)
        cuts = [*sorted({first for first, _ in (*keys, *values)}), stop]  # a tail of keys may lie in one part where the values lie in two
        return [_together(_of(keys, a, b), _of(values, a, b), a) for a, b in itertools.pairwise(cuts)]

    def gather(self, positions: PositionMap, rows: slice, start: int, stop: int, columns: torch.Tensor) -> KV:
        return gather(tuple(self.view(positions, rows, start, stop, False)), start, columns)

    def keys_of(self, positions: PositionMap, rows: slice, start: int, stop: int) -> torch.Tensor:
        return self.keys[positions].view(rows, start, stop)

    def lookup(self, positions: PositionMap, rows: slice, start: int, stop: int, first: torch.Tensor, size: int, passing: bool) -> Lookup:
        return lookup([(a - start, x) for a, x in self.keys[positions].parts(rows, start, stop)], rows.stop - rows.start)

    def at_once(self, positions: PositionMap, rows: slice) -> int:
        return EVERY

    def append_step(self, step: Step, keys: Mapping[PositionMap | OfQueries, torch.Tensor], values: torch.Tensor | None) -> None:
        for positions, new in keys.items():
            self.keys[positions].write_step(step, new)
        if values is not None:
            for buffer in (self.whole, *self.tails.values()):
                buffer.write_step(step, values)

    def shelves(self, positions: PositionMap, step: Step) -> Iterator[tuple[Shelf, KV]]:
        keys = self.keys[positions]
        values = self.tails.get(keys.placement.tail, self.whole)
        for shelf in step.shelves(keys.placement):
            yield shelf, KV(keys.shelf(shelf), values.shelf(shelf))

    def bases(self, positions: PositionMap, step: Step) -> Iterator[tuple[BaseShelf, KV]]:
        keys = self.keys[positions]
        for shelf in step.bases(keys.placement):
            yield shelf, KV(keys.base(shelf), self.whole.base(shelf))

    def first_tokens(self, positions: PositionMap, step: Step) -> KV:
        keys, rows = self.keys[positions], slice(step.rows[0], step.rows[-1] + 1)
        found = [buffer.pinned(rows, 0, keys.first) for buffer in (keys, self.whole)]
        if len(step.rows) < rows.stop - rows.start:
            members = torch.tensor(step.rows, device=found[0].device) - rows.start
            found = [x.index_select(0, members) for x in found]
        return KV(found[0], found[1])

    def append_summaries(self, rows: slice, start: int, new: Mapping[Summary | OfQueries, torch.Tensor]) -> None:
        for form, made in new.items():
            self.keys[form].write(rows, self.forms[form].entries(start), made)

    def summaries(self, form: Summary | OfQueries, rows: slice, stop: int, start: int = 0) -> torch.Tensor:
        buffer = self.keys[form]
        if buffer.places is not buffer.placement.places:  # rows may lie alike since room was made for what is written later in this forward
            buffer.arrange()
        return buffer.view(rows, start, stop)

    def shelf_of_summaries(self, form: Summary, step: Step, shelf: Shelf, stop: int) -> torch.Tensor:
        rows, buffer = [step.rows[n] for n in shelf.members], self.keys[form]
        buffer.arrange()  # the same, or a row has joined
        buckets, slots, firsts = ([of[row] for row in rows] for of in (buffer.places.buckets, buffer.places.slots, buffer.places.firsts))
        if buckets.count(buckets[0]) == len(rows) and not any(firsts) and slots == list(range(slots[0], slots[0] + len(rows))):
            return buffer.bodies[buckets[0]][slots[0] : slots[0] + len(rows), :, :stop]
        each = {n: buffer.view(slice(row, row + 1), 0, end)[0] for n, row in enumerate(rows) if (end := min(stop, buffer.placement.kept_by(row)))}
        like = next(iter(each.values()))
        found = like.new_zeros((len(rows), like.shape[0], stop, like.shape[2]))
        for n, own in each.items():
            found[n, :, : own.shape[1]] = own
        return found

    def release(self) -> None:
        for buffer in self.buffers:
            buffer.release()

    def select(self, index: torch.Tensor) -> None:
        had = bool(self.tails)
        if not self.apart and not self.whole.placement.shared:
            self.tails = {}
        for buffer in self.buffers:
            buffer.select(index)
        self.recalled.select(index.tolist())
        if self.whole.placement.shared and not had:
            self.tails = self._tails()
            self._take_over()

    def complete(self) -> None:
        """What a document holds was restored; values that are kept apart for one row alone are not in it."""
        if not self.whole.placement.shared:
            self._take_over()

    def _take_over(self) -> None:
        for buffer in self.tails.values():
            buffer.take_over(self.whole)

    def fork(self, placements: Mapping[Place, Placement]) -> Contiguous:
        other = self._another(placements)
        other.keys = {form: buffer.fork(placements[buffer.placement.kept.place]) for form, buffer in self.keys.items()}
        other.whole = self.whole.fork(placements[self.whole.placement.tail])
        other.tails = {tail: buffer.fork(placements[tail]) for tail, buffer in self.tails.items()}
        other.recalled = self.recalled.fork()
        return other


def lookup(parts: Sequence[tuple[int, torch.Tensor]], rows: int) -> Lookup:
    """Of keys [R or 1, G, C, D] in parts that follow each other, with the column of the first of each."""
    x = parts[0][1]
    row, head = torch.arange(rows, device=x.device)[:, None, None, None], torch.arange(x.shape[1], device=x.device)[:, None, None]
    return lambda columns: picked_of(parts, row, head, columns)


def _of(parts: Sequence[tuple[int, torch.Tensor]], start: int, stop: int) -> torch.Tensor:
    """Entries start .. stop, which one of the parts holds."""
    first, entries = next(part for part in reversed(parts) if part[0] <= start)
    return between(entries, start - first, stop - first)


def _together(k: torch.Tensor, v: torch.Tensor, index: int) -> KV:
    """Where rows share one of the two only, it is seen once for each of them."""
    return KV(k, v, index).of_rows(max(k.shape[0], v.shape[0]))


class Passing:
    """The keys and values of a forward that nobody stores: those of the rows at hand, from index 0 on. Implements `memory.layer.Shown`."""

    @property
    def weigh(self) -> Weigh | None:
        return None

    def append(self, rows: slice, start: int, keys: Mapping[PositionMap, torch.Tensor], values: torch.Tensor) -> None:
        self._rows, self._keys, self._values = rows, keys, values
        self._beside: dict[Summary | OfQueries, torch.Tensor] = {}
        self.recalled = Recalled()

    def view(self, positions: PositionMap, rows: slice, start: int, stop: int, pinned: bool) -> Sequence[KV]:
        assert rows == self._rows
        return (KV(between(self._keys[positions], start, stop), between(self._values, start, stop), start),)

    def gather(self, positions: PositionMap, rows: slice, start: int, stop: int, columns: torch.Tensor) -> KV:
        return gather(self.view(positions, rows, start, stop, False), start, columns)

    def keys_of(self, positions: PositionMap, rows: slice, start: int, stop: int) -> torch.Tensor:
        return between(self._keys[positions], start, stop)

    def lookup(self, positions: PositionMap, rows: slice, start: int, stop: int, first: torch.Tensor, size: int, passing: bool) -> Lookup:
        return lookup([(0, self.keys_of(positions, rows, start, stop))], rows.stop - rows.start)

    def at_once(self, positions: PositionMap, rows: slice) -> int:
        return EVERY

    def append_summaries(self, rows: slice, start: int, new: Mapping[Summary | OfQueries, torch.Tensor]) -> None:
        for form, made in new.items():
            self._beside[form] = torch.cat([self._beside[form], made], 2) if form in self._beside else made

    def summaries(self, form: Summary | OfQueries, rows: slice, stop: int, start: int = 0) -> torch.Tensor:
        return between(self._beside[form], start, stop)

    def release(self) -> None:
        del self._keys, self._values
