"""Buffers whose entries are blocks of a pool but for the last ones, which lie in bodies as those of other buffers do. Knows blocks; not layers or positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from longreach.memory.arenas import Kind
from longreach.memory.bases import Base
from longreach.memory.blocks import Run
from longreach.memory.buffer import Buffer
from longreach.memory.placement import Placement
from longreach.memory.shelves import Block
from longreach.memory.tiers import Pool


class BlockBuffer(Buffer):
    """Of every row, blocks before its own tail: `runs` are those of all slots of a base."""

    def __init__(self, placement: Placement, first: int, pool: Pool) -> None:
        super().__init__(placement, first)
        self.pool = pool
        self.runs: dict[Base, tuple[tuple[Block, ...], ...]] = {}

    @property
    def held(self) -> dict[int, int]:
        return {**self.tail, **{id(block): block.nbytes for block in self.blocks}}

    @property
    def tail(self) -> dict[int, int]:
        """The bytes of what is not in blocks, by id."""
        return super().held

    @property
    def blocks(self) -> set[Block]:
        return {block for run in self.runs.values() for slot in run for block in slot}

    @property
    def unit(self) -> int:
        return self.placement.unit

    def run(self, row: int) -> tuple[Block, ...]:
        """The blocks of a row; of the last one, less may count."""
        own = self.placement.shares[row]
        return self.runs[own[0].base][own[0].slot] if own else ()

    def kind(self, like: torch.Tensor) -> Kind:
        kind = Kind((like.shape[-3], self.unit, like.shape[-1]), like.dtype, like.device)
        if kind not in self.pool.kinds:
            raise ValueError(
                f"the model was moved or cast after extend(), so its blocks are no longer of the kind that was planned ({kind.dtype} on {kind.device}); "
                "call remove() and extend() again"
            )
        return kind

    def write(self, rows: slice, start: int, new: torch.Tensor, shown: bool = True) -> None:
        self.kind(new)
        first = self.placement.writes[rows.start].first
        if first < start:
            self._own()
            self._arrange(new)
            if first < self.places.firsts[rows.start]:  # the row goes back into a block: what is left of it begins the tail
                start, new = first, torch.cat([self.view(rows, first, start), new], dim=2)
        super().write(rows, start, new, shown)

    def freeze(self, bases: Iterable[Base]) -> None:
        """The entries of runs become blocks."""
        self._drop()  # what an interrupt has left
        self.arrange()
        for base in bases:
            assert isinstance(base, Run)
            found = []
            for row in base.rows:
                body, slot = self.bodies[self.places.buckets[row]], self.places.slots[row]
                own = body[slot].narrow(1, base.start - self.places.firsts[row], base.stop - base.start)
                kind = self.kind(own)
                found.append((*self.run(row)[: base.start // self.unit], *(self.pool.put(kind, new) for new in own.split(self.unit, 1))))
            self.runs[base] = tuple(found)

    def receive(self, row: int, start: int, entries: torch.Tensor) -> None:
        (share,) = self.placement.shares[row]
        assert isinstance(share.base, Run)
        run = list(self.runs.get(share.base, ((),) * len(share.base.rows)))
        if start != len(run[share.slot]) * self.unit:
            raise LookupError("its blocks are not in order")
        made = entries.to(next(iter(self.bodies.values())).device)
        run[share.slot] = (*run[share.slot], *(self.pool.put(self.kind(made), new) for new in made.split(self.unit, 1)))
        self.runs[share.base] = tuple(run)

    def _adopt_bases(self, row: int, other: Buffer) -> None:
        assert isinstance(other, BlockBuffer)
        for share in self.placement.shares[row]:
            theirs = other.runs[share.base]  # each has of the slots of a base what its own rows see
            self.runs[share.base] = tuple(max(pair, key=len) for pair in zip(self.runs.get(share.base, theirs), theirs, strict=True))
        self._drop()

    def thaw(self, row: int, start: int, stop: int) -> Callable[[], None]:
        """Read entries start .. stop of a block that is about to be cut -> what puts them into the tail when the placement has been rewound."""
        kept = self.view(slice(row, row + 1), start, stop)[0]

        def put() -> None:
            self._own()
            self._arrange(kept[None])
            self.bodies[self.places.buckets[row]][self.places.slots[row], :, : stop - start] = kept

        return put

    def settle(self) -> None:
        super().settle()
        if len(self.runs) > len(self.placement.bases):
            self._drop()

    def parts(self, rows: slice, start: int, stop: int) -> Sequence[tuple[int, torch.Tensor]]:
        own = self.begins(rows)
        if start >= own:
            return super().parts(rows, start, stop)
        first, last = start // self.unit * self.unit, min(stop, own)
        pairs, found = self.room(*self.base_of(rows), first, last)
        self.pool.wait(self.pool.read(pairs))
        parts = [(start, found[:, :, start - first : last - first])]
        return parts if stop <= own else [*parts, *super().parts(rows, own, stop)]

    def base_of(self, rows: slice) -> tuple[Base, slice]:
        """Of consecutive rows that lie alike, some of whose entries are in blocks: the base, and their slots in it, one where all have the same."""
        (share,), (last,) = self.placement.shares[rows.start], self.placement.shares[rows.stop - 1]
        return share.base, slice(share.slot, last.slot + 1)

    def heads_of(self, rows: slice) -> int:
        """Of consecutive rows some of whose entries are in blocks."""
        return self.run(rows.start)[0].entry.kind.shape[0]

    def room(self, base: Base, slots: slice, start: int, stop: int) -> tuple[list[tuple[Sequence[Block], torch.Tensor]], torch.Tensor]:
        """For entries start .. stop of slots of a base, `start` at the beginning of a block: the blocks of each slot with what to read them into
        [blocks, G, unit, D], and all of this as [slots, G, entries, D]."""
        rows = [run[start // self.unit : -(-stop // self.unit)] for run in self.runs[base][slots]]
        longest = max(map(len, rows))
        rows = [(*row, *run[-1:] * (longest - len(row))) for row, run in zip(rows, self.runs[base][slots])]  # a row that was cut sees nothing of these
        heads, unit, width = (kind := rows[0][0].entry.kind).shape
        with torch.inference_mode(False):
            found = torch.empty((len(rows), heads, len(rows[0]) * unit, width), dtype=kind.dtype, device=kind.device)
        self.pool.stage(found)
        return list(zip(rows, found.unflatten(2, (-1, unit)).transpose(1, 2))), found

    def _another(self, placement: Placement) -> Buffer:
        other = BlockBuffer(placement, self.first, self.pool)
        other.runs = dict(self.runs)
        return other

    def trim(self) -> None:
        """Blocks that no row sees any more are let go of."""
        self._drop()

    def _drop(self) -> None:
        super()._drop()
        stops: dict[Base, dict[int, int]] = {}
        for (share,) in filter(None, self.placement.shares):
            slots = stops.setdefault(share.base, {})
            slots[share.slot] = max(share.stop, slots.get(share.slot, 0))
        of = {base: [-(-slots.get(slot, 0) // self.unit) for slot in range(len(self.runs[base]))] for base, slots in stops.items() if base in self.runs}
        self.runs = {base: tuple(run[:count] for run, count in zip(self.runs[base], counts)) for base, counts in of.items()}
