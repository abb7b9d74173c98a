"""Tiered memory: what a layer keeps of every token lies in blocks of a pool, but for the last tokens; all else lies as in contiguous memory.

Of a form that keeps every token, and of its values, the tokens behind the rollback are blocks (`memory.blocks`), which forks share. They are viewed some at a
time: while a part is attended to, the next one is read. Whoever has chosen tokens gets these: their blocks come to the device, each once. Forms that keep the
last tokens only have values of their own, so that reading them fetches nothing. Knows buffers and a pool; not positions, layers or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableSet
from dataclasses import replace
from typing import ClassVar

import torch

from longreach.core.segments import Form, Place, PositionMap, Retention, Summary
from longreach.kernels.protocol import KV, gather
from longreach.kernels.tiles import between
from longreach.memory.bases import Base, BaseShelf
from longreach.memory.block_buffer import BlockBuffer
from longreach.memory.buffer import Buffer
from longreach.memory.contiguous import Contiguous
from longreach.memory.lane import Reading
from longreach.memory.placement import Placement
from longreach.memory.steps import Step
from longreach.memory.tiers import Pool

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
        if start >= (own := keys.begins(rows)):
            return super().gather(positions, rows, start, stop, columns)
        at = columns + start
        tail = gather((_kv(keys, self.whole, rows, own, stop),), own, (at - own).clamp_min(0)) if own < stop else None
        base, slots = keys.base_of(rows)
        row = torch.arange(columns.shape[0], device=at.device)[:, None, None, None].clamp_max(slots.stop - slots.start - 1).expand_as(at)
        number, offset, inside = at.clamp_max(own - 1) // keys.unit, at % keys.unit, at < own
        wanted = torch.zeros(slots.stop - slots.start, -(-own // keys.unit), dtype=torch.bool, device=at.device)
        wanted[row[inside], number[inside]] = True
        found = tail
        for ids, sources, slot in self._sources(keys, base, slots, wanted.nonzero()):
            table = torch.full((2, *wanted.shape), -1, device=at.device)
            table[:, ids[:, 0], ids[:, 1]] = slot
            places = table[:, row, number]
            k, v = (_picked(source, place.clamp_min(0), offset) for source, place in zip(sources, places))
            if found is None:
                found = KV(k, v)
            else:
                mine = (inside & (places[0] >= 0)).flatten(0, 2)[:, None, :, None]
                found = KV(torch.where(mine, k, found.k), torch.where(mine, v, found.v))
        assert found is not None
        return found

    def _sources(
        self, keys: BlockBuffer, base: Base, slots: slice, ids: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Blocks (slot, number) [n, 2] of keys and values, each once -> of all or some of them at a time (ids [m, 2], (keys and values [slots, G, unit, D]),
        slots [2, m] in these): on the device if they fit, else read to be used once."""
        each = ids.tolist()
        found = [[buffer.runs[base][slots][slot][number] for slot, number in each] for buffer in (keys, self.whole)]
        if not each:
            return
        kinds = [blocks[0].entry.kind for blocks in found]
        if self.pool.fits(kinds, len(each)):
            at = torch.tensor(self.pool.on_device([*found[0], *found[1]]), device=ids.device)
            yield ids, (self.pool.arena(kinds[0]), self.pool.arena(kinds[1])), at.unflatten(0, (2, -1))
            return
        size = max(1, int(self.pool.spec.staging) // sum(kind.nbytes for kind in kinds))
        for a in range(0, len(each), size):
            some = [blocks[a : a + size] for blocks in found]
            with torch.inference_mode(False):
                k, v = (torch.empty((len(some[0]), *kind.shape), dtype=kind.dtype, device=kind.device) for kind in kinds)
            self.pool.stage(k, v)
            self.pool.wait(self.pool.read([(some[0], k), (some[1], v)]))
            yield ids[a : a + size], (k, v), torch.arange(len(some[0]), device=ids.device).expand(2, -1)

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


def _picked(blocks: torch.Tensor, slot: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """blocks [S, G, unit, D], of which entries (slot, offset) [R, C, T, n] are wanted, as `kernels.protocol.gather` shapes them."""
    heads, groups = slot.shape[1], blocks.shape[1]
    if heads == 1:
        return blocks.transpose(1, 2)[slot[:, 0], offset[:, 0]].flatten(0, 1).transpose(1, 2)
    group = (torch.arange(heads, device=slot.device) * groups // heads)[:, None, None]
    return blocks[slot, group, offset].flatten(0, 2)[:, None]
