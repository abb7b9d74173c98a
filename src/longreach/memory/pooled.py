"""The tiers of an extension: the pool that all of its layers use, and what is reported of it. Knows layers' sizes; not models or methods."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from longreach.core.segments import Form, Place, Retention, Summary
from longreach.memory import blocks
from longreach.memory.block_buffer import BlockBuffer
from longreach.memory.blocks import Blocked
from longreach.memory.budgets import Tiered, size_text
from longreach.memory.buffer import Buffer
from longreach.memory.layer import LayerMemory
from longreach.memory.placement import Placement
from longreach.memory.shelves import Block
from longreach.memory.stored import Placed
from longreach.memory.tiered import Counted, TieredLayer
from longreach.memory.tiers import Pool
from longreach.quantities import counted


class Tiers(Blocked):
    """The memories of all layers and caches of an extension, over one pool. Raises ValueError where a tier is too small for a block."""

    def __init__(self, spec: Tiered, layers: Sequence[Placed]) -> None:
        if any(isinstance(form, Summary) and kept.place is None for layer in layers for form, kept in layer.forms.items()):
            raise ValueError("an index with blocks of one token keeps as much as all keys, which tiers do not take; pass a larger block (page_size, chunk)")
        self.spec, self.unit = spec, spec.block
        kinds = Counter(kind for layer in layers for kind in layer.kinds(spec.block))
        self._entry = {form: size for layer in layers for form, size in layer.summaries().items()}
        a_token = sum(kind.nbytes * count for kind, count in kinds.items()) / spec.block
        kept = sum(size / form.block for layer in layers for form, size in layer.summaries().items())
        self.pool = Pool(spec, kinds, kept / a_token if kept else 0.0)
        self._living: weakref.WeakSet[Counted] = weakref.WeakSet()

    def __call__(self, placements: Mapping[Place, Placement], forms: Mapping[Form, Retention]) -> LayerMemory:
        if all(kept.place is not None for kept in forms.values()):
            return Counted(placements, forms, self._living)
        return TieredLayer(placements, forms, self.pool, self._living)

    def require(self, placements: Mapping[Place, Placement], layers: Sequence[LayerMemory], times: float = 1.0, more: int = 0) -> None:
        if (place := placements.get(None)) is None:
            return
        self.pool.require(blocks.coming(place) + more)
        if self._entry:
            own = [layer for layer in layers if isinstance(layer, TieredLayer)]
            planned = int(times * sum(self._planned(form, buffer) for layer in own for form, buffer in layer.of_summaries.items()))
            if planned + self._summaries(set(self._living) - set(own), own) > self.pool.summaries:
                gc.collect()  # caches that nobody can reach any more
            self.pool.require_summaries(planned + self._summaries(set(self._living) - set(own), own))

    def has_room(self, blocks: int, summaries: int, layers: Sequence[LayerMemory], without: Collection[LayerMemory] = ()) -> bool:
        own = [layer for layer in layers if isinstance(layer, TieredLayer)]
        staying = set(self._living).difference(without)
        gone = self._blocks(set(self._living) - staying) - self._blocks(staying) if without else set()
        if not self.pool.has_room(blocks, Counter(block.entry.kind for block in gone)):
            return False
        return not self._entry or summaries + self._summaries(staying.difference(own), own) <= self.pool.summaries

    def require_ever(self, blocks: int, summaries: int) -> None:
        self.pool.require_ever(blocks)
        if self._entry and summaries > self.pool.summaries:
            raise ValueError(f"the method's index keeps {size_text(summaries)} of it, and the device's budget has {size_text(self.pool.summaries)} for that")

    @staticmethod
    def _blocks(layers: Iterable[Counted]) -> set[Block]:
        return {block for layer in layers if isinstance(layer, TieredLayer) for buffer in layer.blocked for block in buffer.blocks}

    def _planned(self, form: Summary, buffer: Buffer) -> int:
        """Bytes that the bodies of a buffer will have."""
        places = buffer.placement.places
        return self._entry[form] * sum(len(rows) * places.rooms[bucket] for bucket, rows in places.members.items())

    @staticmethod
    def _summaries(layers: Iterable[Counted], frozen: Iterable[Counted] = ()) -> int:
        """Bytes of what an index keeps in some layers; of those in `frozen`, only of what nobody writes to any more."""
        held: dict[int, int] = {}
        for layer in layers:
            for buffer in layer.of_summaries.values():
                held.update(buffer.held)
        for layer in frozen:
            for buffer in layer.of_summaries.values():
                held.update((id(base.entries), base.entries.nbytes) for base in buffer.bases.values())
        return sum(held.values())

    def thaw(self, placements: Mapping[Place, Placement], layers: Sequence[LayerMemory], lengths: Mapping[int, int]) -> list[Callable[[], None]]:
        place = placements.get(None)
        cut = {} if place is None else {row: length for row, length in lengths.items() if length < place.places.firsts[row]}
        if place is None or not cut:
            return []
        buffers = [buffer for layer in layers if isinstance(layer, TieredLayer) for buffer in layer.blocked]
        halves = [(row, first, length) for row, length in cut.items() if (first := place.begins(row, length)) < length]
        return [*(buffer.trim for buffer in buffers), *(buffer.thaw(*half) for buffer in buffers for half in halves)]

    def report(self) -> dict[str, Any]:
        """Plain data, in bytes: of every tier its budget, and what lies there and was asked of it; what comes on top of the budgets."""
        found, held = self.pool.report(), {}
        for layer in self._living:
            for buffer in layer.buffers:
                held.update(buffer.tail if isinstance(buffer, BlockBuffer) else buffer.held)
        summaries = self._summaries(self._living)
        found["tiers"]["device"]["summaries"] = summaries
        found["apart"] = {"tails": sum(held.values()) - summaries, "staging": found.pop("most_staged")}
        return found

    def close(self) -> None:
        """The extension is removed: the files are gone."""
        self.pool.close()


def said(report: Mapping[str, Any]) -> list[str]:
    """A report in words, a line for each tier and one for what comes on top."""
    lines = []
    for name, tier in report["tiers"].items():
        summaries = f" and {size_text(tier['summaries'])} of what an index keeps" if tier.get("summaries") else ""
        asked = f"; {tier['fetched']} fetched, {tier['evicted']} moved on" if tier["fetched"] or tier["evicted"] else ""
        lines.append(f"{name} {size_text(tier['bytes'])}{summaries} of {size_text(tier['budget'])}, {counted(tier['blocks'], 'block')}{asked}")
    apart = report["apart"]
    rate = "" if report["hit_rate"] is None else f"; {report['hit_rate']:.1%} of what was asked for was on the device, {report['seconds_waited']:.2f} s waited"
    return [*lines, f"apart from the budgets: last tokens and bounded forms {size_text(apart['tails'])}, staging {size_text(apart['staging'])}{rate}"]
