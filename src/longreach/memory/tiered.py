"""Tiered memory: what a layer keeps of every token lies in blocks of a pool, but for the last tokens; all else lies as in contiguous memory.

Of a form that keeps every token, and of its values, the tokens behind the rollback are blocks (`memory.blocks`), which forks share. They are viewed some at a
time: while a part is attended to, the next one is read. Whoever has chosen tokens gets these: their blocks come to the device, each once. Forms that keep the
last tokens only have values of their own, so that reading them fetches nothing. Knows buffers and a pool; not positions, layers or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableSet, Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from longreach.core.choice import Lookup
from longreach.core.segments import Form, Place, PositionMap, Retention, Summary
from longreach.kernels.entries import picked, picked_of
from longreach.kernels.protocol import KV, as_rows, places_of
from longreach.kernels.tiles import between
from longreach.memory.bases import Base, BaseShelf
from longreach.memory.block_buffer import BlockBuffer
from longreach.memory.buffer import Buffer
from longreach.memory.contiguous import Contiguous
from longreach.memory.lane import Reading
from longreach.memory.layer import Weigh
from longreach.memory.placement import Placement
from longreach.memory.steps import Step
from longreach.memory.tiers import Pool

Source = tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]
AT_ONCE = 4  # parts that exist together while a layer is viewed: those attended to and just before, one that has been read, one being read


class Counted(Contiguous):
    """One whose forms are all bounded, so that it has no blocks. `living`: all that there are of an extension, this one from now on."""

    def __init__(self, placements: Mapping[Place, Placement], forms: Mapping[Form, Retention], living: MutableSet[Counted]) -> None:
        self.living = living
        super().__init__(placements, forms)
        living.add(self)

    def _another(self, placements: Mapping[Place, Placement]) -> Counted:
        return Counted(placements, self.forms, self.living)

    @property
    def of_summaries(self) -> dict[Summary, Buffer]:
        return {form: buffer for form, buffer in self.keys.items() if isinstance(form, Summary)}


class TieredLayer(Counted):
    """The memory of one layer that keeps every token of some form. Implements `memory.layer.LayerMemory`."""

    at_hand: ClassVar[bool] = False
    apart: ClassVar[bool] = True
    whole: BlockBuffer

    def __init__(self, placements: Mapping[Place, Placement], forms: Mapping[Form, Retention], pool: Pool, living: MutableSet[Counted]) -> None:
        self.pool = pool
        super().__init__(placements, forms, living)

    def _buffer(self, placement: Placement, first: int = 0) -> Buffer:
        return BlockBuffer(placement, first, self.pool) if placement.kept.place is None else Buffer(placement, first)

    def _another(self, placements: Mapping[Place, Placement]) -> TieredLayer:
        return TieredLayer(placements, self.forms, self.pool, self.living)

    @property
    def blocked(self) -> list[BlockBuffer]:
        return [buffer for buffer in self.buffers if isinstance(buffer, BlockBuffer)]

    def view(self, positions: PositionMap, rows: slice, start: int, stop: int, pinned: bool) -> Iterable[KV]:
        keys = self.keys[positions]
        if pinned:
            return super().view(positions, rows, start, stop, pinned)
        if not isinstance(keys, BlockBuffer):
            return (_kv(keys, self.tails[keys.placement.kept.place], rows, start, stop),)
        own = keys.begins(rows)
        return (_kv(keys, self.whole, rows, start, stop),) if start >= own else self._parts(keys, rows, start, stop, own)

    def _parts(self, keys: BlockBuffer, rows: slice, start: int, stop: int, own: int) -> Iterator[KV]:
        base, slots = keys.base_of(rows)
        yield from self._stream(keys, base, slots, start, min(stop, own))
        if own < stop:
            yield _kv(keys, self.whole, rows, own, stop)

    def _stream(self, keys: BlockBuffer, base: Base, slots: slice, start: int, stop: int) -> Iterator[KV]:
        """Entries start .. stop of slots of a base, some blocks at a time: the next ones are read while whoever asked is busy with these."""
        buffers, unit = (keys, self.whole), keys.unit
        size = sum(buffer.runs[base][slots.start][0].nbytes for buffer in buffers) * (slots.stop - slots.start)
        step = max(1, int(self.pool.spec.staging) // (AT_ONCE * size)) * unit

        def begin(first: int) -> tuple[Reading, list[torch.Tensor]]:
            rooms = [buffer.room(base, slots, first, min(first + step, stop)) for buffer in buffers]
            return self.pool.read([pair for pairs, _ in rooms for pair in pairs]), [found for _, found in rooms]

        ahead: tuple[Reading, list[torch.Tensor]] | None = begin(first := start // unit * unit)
        found: list[torch.Tensor] = []
        try:
            while ahead is not None:
                last, (reading, found) = found, ahead  # whoever asked still holds the last part when the next but one is begun
                self.pool.wait(reading)
                a, b, first = max(start, first), min(first + step, stop), first + step
                k, v = (between(x, a - (first - step), b - (first - step)) for x in found)
                ahead = begin(first) if first < stop else None
                del last
                yield KV(k, v, a)
        finally:
            if ahead is not None:
                ahead[0].end()

    def gather(self, positions: PositionMap, rows: slice, start: int, stop: int, columns: torch.Tensor) -> KV:
        keys = self.keys[positions]
        assert isinstance(keys, BlockBuffer)
        if start >= keys.begins(rows):
            return super().gather(positions, rows, start, stop, columns)
        k, v = self._picked((keys, self.whole), rows, start, stop, places_of(columns, keys.heads_of(rows)))
        return KV(as_rows(k, columns), as_rows(v, columns))

    @property
    def weigh(self) -> Weigh | None:
        return self._weigh if self.pool.weighs else None

    def _weigh(self, positions: PositionMap, rows: slice, start: int, columns: torch.Tensor, paid: torch.Tensor) -> None:
        """columns and paid [R, C, T, n]: the blocks of the keys and those of the values get the same."""
        keys = self.keys[positions]
        assert isinstance(keys, BlockBuffer)
        if start >= (own := keys.begins(rows)):
            return
        base, slots = keys.base_of(rows)
        at, count = columns + start, -(-own // keys.unit)
        slot = torch.arange(len(columns), device=at.device).clamp_max(slots.stop - slots.start - 1)[:, None, None, None]
        mass = paid.new_zeros(slots.stop - slots.start, count)
        mass.view(-1).scatter_add_(0, (slot * count + at.clamp_max(own - 1) // keys.unit).flatten(), paid.where(at < own, 0.0).flatten())
        (ids, found), runs = (mass.nonzero(), mass[mass != 0].tolist()), [buffer.runs[base][slots] for buffer in (keys, self.whole)]
        for (slot, number), more in zip(ids.tolist(), found):
            self.pool.touch([run[slot][number] for run in runs], more)

    def at_once(self, positions: PositionMap, rows: slice) -> int:
        keys = self.keys[positions]
        assert isinstance(keys, BlockBuffer)
        blocks = [run[0].nbytes for row in range(rows.start, rows.stop) if (run := keys.run(row))]
        return max(1, int(self.pool.spec.staging) // (2 * sum(blocks))) * keys.unit if blocks else super().at_once(positions, rows)

    def lookup(self, positions: PositionMap, rows: slice, start: int, stop: int, first: torch.Tensor, size: int, passing: bool) -> Lookup:
        keys = self.keys[positions]
        assert isinstance(keys, BlockBuffer)
        if start >= (own := keys.begins(rows)):
            return super().lookup(positions, rows, start, stop, first, size, passing)
        base, slots = keys.base_of(rows)
        head = torch.arange(keys.heads_of(rows), device=first.device)[:, None, None]
        row = torch.arange(rows.stop - rows.start, device=first.device)[:, None, None, None]
        wanted = torch.zeros(slots.stop - slots.start, -(-own // keys.unit), dtype=torch.bool, device=first.device)
        begins, ends = ((first + at).clamp_max(own - start - 1) + start for at in (0, size - 1))
        for number in range((size - 1) // keys.unit + 2):
            wanted[row[:, :, 0].clamp_max(len(wanted) - 1), (begins // keys.unit + number).minimum(ends // keys.unit)] = True
        ids, sources = wanted.nonzero(), None
        kind = keys.runs[base][slots][0][0].entry.kind
        if (not passing and self.pool.fits([kind], len(ids))) or kind.nbytes * len(ids) <= int(self.pool.spec.staging):
            sources = list(self._sources((keys,), base, slots, ids, not passing))  # read once for all that is looked up
        return lambda columns: self._picked((keys,), rows, start, stop, (row, head, columns), sources)[0]

    def _picked(
        self, buffers: tuple[BlockBuffer, ...], rows: slice, start: int, stop: int, places: Sequence[torch.Tensor], sources: Iterable[Source] | None = None
    ) -> list[torch.Tensor]:
        """Entries of some buffers that have the same blocks, by row, head and column; the last ones are in none. `sources` have the blocks that are wanted."""
        (row, head, column), unit, own, found = places, buffers[0].unit, buffers[0].begins(rows), []
        if own < stop:
            tails = [[(a - start, x) for a, x in buffer.parts(rows, own, stop)] for buffer in buffers]
            found = [picked_of(tail, row, head, column.clamp_min(own - start)) for tail in tails]
        base, slots = buffers[0].base_of(rows)
        at, row = column + start, row.clamp_max(slots.stop - slots.start - 1)
        number, offset, inside = at.clamp_max(own - 1) // unit, at % unit, at < own
        wanted = torch.zeros(slots.stop - slots.start, -(-own // unit), dtype=torch.bool, device=at.device)
        if sources is None:
            of, its, among = torch.broadcast_tensors(row, number, inside)
            wanted[of[among], its[among]] = True
            sources = self._sources(buffers, base, slots, wanted.nonzero())
        for ids, some, slot in sources:
            table = torch.full((len(buffers), *wanted.shape), -1, device=at.device)
            table[:, ids[:, 0], ids[:, 1]] = slot
            in_these = table[:, row, number]
            these = [picked(source, place.clamp_min(0), head, offset) for source, place in zip(some, in_these)]
            mine = (inside & (in_these[0] >= 0))[..., None]
            found = [torch.where(mine, x, before) for x, before in zip(these, found)] if found else these
        return found

    def _sources(self, buffers: tuple[BlockBuffer, ...], base: Base, slots: slice, ids: torch.Tensor, stay: bool = True) -> Iterator[Source]:
        """Blocks (slot, number) [n, 2] of some buffers, each once -> of all or some of them at a time (ids [m, 2], of each buffer [slots, G, unit, D], slots
        [buffers, m] in these): on the device if they are to stay and fit, else read to be used once."""
        each = ids.tolist()
        found = [[buffer.runs[base][slots][slot][number] for slot, number in each] for buffer in buffers]
        if not each:
            return
        kinds = [blocks[0].entry.kind for blocks in found]
        if stay and self.pool.fits(kinds, len(each)):
            at = torch.tensor(self.pool.on_device([block for blocks in found for block in blocks]), device=ids.device)
            yield ids, [self.pool.arena(kind) for kind in kinds], at.unflatten(0, (len(buffers), -1))
            return
        size = max(1, int(self.pool.spec.staging) // sum(kind.nbytes for kind in kinds))
        for a in range(0, len(each), size):
            some = [blocks[a : a + size] for blocks in found]
            with torch.inference_mode(False):
                staged = [torch.empty((len(some[0]), *kind.shape), dtype=kind.dtype, device=kind.device) for kind in kinds]
            self.pool.stage(*staged)
            self.pool.wait(self.pool.read(list(zip(some, staged))))
            yield ids[a : a + size], staged, torch.arange(len(some[0]), device=ids.device).expand(len(buffers), -1)

    def bases(self, positions: PositionMap, step: Step) -> Iterator[tuple[BaseShelf, KV]]:
        keys = self.keys[positions]
        if isinstance(keys, BlockBuffer):
            for shelf in step.bases(keys.placement):
                for kv in self._stream(keys, shelf.base, shelf.slots, 0, max(shelf.stops)):
                    stops = tuple(min(stop, kv.index + kv.k.shape[2]) for stop in shelf.stops)
                    yield replace(shelf, firsts=(kv.index,) * len(stops), stops=stops), kv


def _kv(keys: Buffer, values: Buffer, rows: slice, start: int, stop: int) -> KV:
    """What lies in one part."""
    ((_, k),), ((_, v),) = keys.parts(rows, start, stop), values.parts(rows, start, stop)
    return KV(k, v, start)
