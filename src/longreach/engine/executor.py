"""The executor: one layer of one forward. Store the new keys, rotate, call the kernel per segment, merge exactly.

Knows a batch, a layout and tensors; not where they come from.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from longreach.core.encodings import Alibi, exact_device
from longreach.core.merge import NEGATIVE_INFINITY, Merge
from longreach.core.segments import Piece, PositionMap, Segment, Visible, summary
from longreach.engine import chosen, reference, step, summaries
from longreach.engine.batch import Batch, Rows
from longreach.engine.layer import LSE, QUERY, RAW, Inputs, Layer
from longreach.engine.watch import Choices, Probabilities, Watch, Watcher
from longreach.kernels.biased import Bias
from longreach.kernels.protocol import KV, Kernel
from longreach.kernels.tiles import Band
from longreach.memory.contiguous import Passing
from longreach.memory.layer import LayerMemory, Shown, joined

QUERIES_AT_ONCE = 4096  # bounds the memory for rotated queries and partial results, and keeps them in the cache


def execute(
    layer: Layer, batch: Batch, memory: LayerMemory | None, kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: Inputs,
    watch: Watcher | None = None,
) -> torch.Tensor:
    """q [B, H, T, D], k [B, G, T, D], v [B, G, T, E] of the new tokens, un-rotated -> [B, T, H, E] in q's dtype, zero at pads.

    memory  of the layer; None: nothing is stored, and nothing was.
    watch   what is to be told how much attention every token gets, or which are chosen; rows are then computed one after the other.
    """
    shape = q.shape[0], q.shape[2], q.shape[1], v.shape[3]
    out: torch.Tensor | None = None
    shown: Shown = Passing() if memory is None else memory
    watch = watch if watch is not None and watch.wants(layer.index) else None
    together = batch.singles if layer.joins and watch is None else None
    if together is not None:
        assert memory is not None
        out = q.new_empty(shape) if batch.real is None else q.new_zeros(shape)
        together.put(out, step.run(layer, batch, together, kernel, q, k, v, memory, inputs))
    for rows in batch.groups if together is None else batch.others:
        new_k = rows.take(k)
        shown.append(rows.rows, rows.start, {positions: _encoded(layer, batch, rows, positions, new_k) for positions in layer.forms}, rows.take(v))
        if QUERY in layer.queries:
            shown.append_summaries(rows.rows, rows.start, {QUERY: rows.take(q)})
        if layer.recalls:
            shown.recalled.forget(range(rows.rows.start, rows.rows.stop), [rows.start] * (rows.rows.stop - rows.rows.start))
        if layer.summaries and LSE not in layer.queries:
            summaries.summarise(layer, batch, shown, rows.rows, rows.start, rows.start + rows.count, inputs)
        at_once = rows.count if layer.dense else 1 if LSE in layer.queries else QUERIES_AT_ONCE
        for block in rows.blocks(at_once, 1 if layer.dense else layer.together):
            if layer.dense:
                merged = _dense(layer, block, block.take(q), shown, inputs)
            else:
                whole = rows.start, rows.start + rows.count
                merged = _Call(layer, batch, block, kernel, inputs, shown, v.shape[3], v.shape[1], whole, watch).run(block.take(q))
            merged = merged.transpose(1, 2).to(q.dtype)
            if block.whole(q.shape[0], q.shape[2]):
                shown.release()
                return merged.contiguous()
            if out is None:
                out = q.new_empty(shape) if batch.real is None else q.new_zeros(shape)
            out[block.at, block.columns_on(out.device)] = merged
    shown.release()
    return q.new_zeros(shape) if out is None else out


def _encoded(layer: Layer, batch: Batch, rows: Rows, positions: PositionMap, new: torch.Tensor) -> torch.Tensor:
    """The new keys at `positions`. The dense truth keeps them as they are."""
    kept, count = layer.forms[positions], rows.count
    if kept.tail == 0:  # only first tokens are ever seen in this form
        count = min(count, max(0, kept.head - rows.start))
        new = new[:, :, :count]
    return new if layer.dense or not count else batch.turned(new, layer.rotary, positions, rows.start, count)


def _dense(layer: Layer, rows: Rows, q: torch.Tensor, memory: Shown, inputs: Inputs) -> torch.Tensor:
    total = rows.start + rows.count
    kv = joined(memory.view(RAW, rows.rows, 0, total, False), q.shape[0])
    scale = layer.method.query_scale()
    factor = None if scale is None else scale(torch.arange(rows.start, total, device=q.device))
    barred = rows.barred(0, total, q.device)
    dense = reference.forward(
        q, kv.k, layer.rotary, inputs.scale, layer=layer.index, alibi=layer.alibi, query_scale=factor, softcap=inputs.softcap, barred=barred
    )
    if layer.queries:
        earlier = [memory.summaries(of, rows.rows, rows.start).double() for of in (QUERY, LSE) if of in layer.queries] if rows.start else []
        dense = replace(dense, sink=inputs.sink, earlier=tuple(earlier), v=kv.v.double().repeat_interleave(dense.groups, dim=1))
    out, lse = reference.softmax(dense, layer.method.truth(dense), kv.v, inputs.sink)
    if LSE in layer.queries:
        memory.append_summaries(rows.rows, rows.start, {LSE: summaries.paying(rows, lse)})
    return out


@dataclass
class _Call:
    """One layer, one group of rows."""

    layer: Layer
    batch: Batch
    rows: Rows
    kernel: Kernel
    inputs: Inputs
    memory: Shown
    width: int  # of a value
    groups: int  # heads of keys
    forward: tuple[int, int]  # the queries of the whole forward, of which these are some
    watch: Watcher | None = None

    def run(self, q: torch.Tensor) -> torch.Tensor:
        """q [b, H, t, D] -> [b, H, t, E], fp32 if it is merged from parts."""
        merge = Merge(self.rows.count)
        rotated: dict[Any, torch.Tensor] = {}
        for segment in self.layer.layout.segments:
            self.segment(segment, q, merge, rotated)
        if merge.out is None:
            merge.add(q.new_zeros((*q.shape[:3], self.width)), q.new_full(q.shape[:3], NEGATIVE_INFINITY))
        if self.inputs.sink is not None:
            merge.sink(self.inputs.sink)
        out, lse = merge.result()
        if isinstance(self.watch, Choices):
            self.shown(self.watch, q.device)
        elif self.watch is not None:
            self.watched(self.watch, q, lse, rotated)
        if LSE in self.layer.queries:
            rows, start = self.rows.rows, self.rows.start
            self.memory.append_summaries(rows, start, {LSE: summaries.paying(self.rows, lse)})
            summaries.summarise(self.layer, self.batch, self.memory, rows, start, start + self.rows.count, self.inputs)
        return out

    def query(self, positions: PositionMap, segment: Segment, q: torch.Tensor, rotated: dict[Any, torch.Tensor]) -> torch.Tensor:
        """The queries at some positions, scaled as the segment says; kept in `rotated` for other segments."""
        start, count, key = self.rows.start, self.rows.count, (positions, segment.query_scale)
        if key not in rotated:
            scale = None if segment.query_scale is None else self.batch.scale(segment.query_scale, start, count, q.device)
            rotated[key] = self.batch.turned(q, self.layer.rotary, positions, start, count, scale)
        return rotated[key]

    def segment(self, segment: Segment, q: torch.Tensor, merge: Merge, rotated: dict[Any, torch.Tensor]) -> None:
        start = self.rows.start
        visible, choosing = (segment.visible, False) if segment.choice is None else self.visible(segment)
        if choosing:
            for a, asked, first in self.chosen(segment, visible, q, rotated):
                if isinstance(self.watch, Choices):
                    assert segment.choice is not None
                    self.watch.choose(self.layer.index, self.rows.rows, segment.choice, asked, a, first)
                out, lse = chosen.attend(asked, self.kernel, self.inputs)
                merge.add(out, lse + segment.lse_bias if segment.lse_bias else lse, a - start)
                if (weigh := self.memory.weigh) is not None and merge.lse is not None:
                    paid = chosen.weigh(asked, segment, merge.lse[:, :, a - start : a - start + asked.queries], self.inputs)
                    weigh(self.layer.form_of(segment.kept), self.rows.rows, first, asked.columns, paid)
            return
        for piece in self.pieces(visible):
            turned = self.query(segment.query_positions, segment, q, rotated)[:, :, piece.first - start : piece.last - start]
            for kv in self.view(segment, piece):
                band = Band(piece.first - kv.index, piece.low, piece.high)
                bias = None if self.layer.alibi is None else self.bias(self.layer.alibi, segment, piece, kv, q.device)
                if kv.rows == turned.shape[0]:
                    out, lse = self.kernel.attend(turned, kv, band, self.inputs.scale, self.inputs.softcap, bias)
                else:
                    out, lse = self.of_one(turned, kv, band, bias)
                merge.add(out, lse + segment.lse_bias if segment.lse_bias else lse, piece.first - start)

    def visible(self, segment: Segment) -> tuple[Visible, bool]:
        """What these queries may see of a segment, and whether they choose among it."""
        if segment.choice is None:
            return segment.visible, False
        first, choosing = segment.choice.of(*self.forward)
        return replace(segment.visible, first_query=max(first, segment.visible.first_query)), choosing

    def view(self, segment: Segment, piece: Piece) -> Iterable[KV]:
        """The parts in which the keys of a piece lie."""
        return self.memory.view(self.layer.form_of(segment.kept), self.rows.rows, piece.from_key, piece.to_key, segment.visible.last_key is not None)

    def watched(self, watch: Watch | Probabilities, q: torch.Tensor, lse: torch.Tensor, rotated: dict[Any, torch.Tensor]) -> None:
        """A second pass, with the log-sum-exp [b, H, t] that is known now: what is paid to every key."""
        start, index, rows = self.rows.start, self.layer.index, self.rows.rows
        least = watch.least(rows, *self.forward)
        if start + self.rows.count <= least:
            return
        for segment in self.layer.layout.segments:
            visible, choosing = self.visible(segment)
            counts, share = least // self.layer.together * self.layer.together if choosing else least, lse - segment.lse_bias
            visible = replace(visible, first_query=max(counts, visible.first_query))
            if choosing:
                share[:, :, : max(0, least - start)] = float("inf")  # who chooses together with those that count
                for a, asked, first in self.chosen(segment, visible, q, rotated):
                    watch.add_chosen(index, rows, a, asked, first, share[:, :, a - start : a - start + asked.queries], self.inputs)
                continue
            for piece in self.pieces(visible):
                stretch = slice(piece.first - start, piece.last - start)
                turned = self.query(segment.query_positions, segment, q, rotated)[:, :, stretch]
                for kv in self.view(segment, piece):
                    band = Band(piece.first - kv.index, piece.low, piece.high)
                    bias = None if self.layer.alibi is None else self.bias(self.layer.alibi, segment, piece, kv, q.device)
                    watch.add(index, rows, piece.first, turned, kv, share[:, :, stretch], band, self.inputs, bias)

    def shown(self, choices: Choices, device: torch.device) -> None:
        """What these queries see without a choice, if some of them choose, or if nobody does in this layer."""
        stop, choice = self.rows.start + self.rows.count, self.layer.layout.choice
        taking, choosing = (self.rows.start, True) if choice is None else choice.of(*self.forward)
        first = max(self.rows.start, taking, choices.first)
        if not choosing or first >= stop:
            return
        choices.ask(self.layer.index, self.rows.rows, stop - first, stop, device)
        for segment in self.layer.layout.segments:
            if segment.choice is None:
                for piece in self.pieces(replace(segment.visible, first_query=max(first, segment.visible.first_query))):
                    choices.show(self.layer.index, self.rows.rows, piece, device)

    def of_one(self, q: torch.Tensor, kv: KV, band: Band, bias: Bias | None) -> tuple[torch.Tensor, torch.Tensor]:
        """q [b, H, t, D] -> what rows see of a part that all of them share."""
        if q.shape[2] > 1 or bias is not None:
            return self.kernel.attend(q, kv.of_rows(q.shape[0]), band, self.inputs.scale, self.inputs.softcap, bias)
        return step.folded(self.kernel, q, kv, band.seen_by_first(kv.k.shape[2]), self.inputs)

    def source(self, segment: Segment, from_key: int, to_key: int, blocks: int, rows: slice, device: torch.device) -> chosen.Source:
        """What queries choose from for whom the first `blocks` of these keys are complete."""
        kept_at, compared_at = (self.layer.form_of(positions) for positions in (segment.kept, segment.compared[1]))
        gather = functools.partial(self.memory.gather, kept_at, rows, from_key, to_key)
        compared, probes = None, None
        if segment.choice is not None and segment.choice.index.probes:
            probes = chosen.probes(self.layer, self.memory, rows, segment, from_key, to_key)
        elif (kept := summary(segment)) is not None:
            compared = self.memory.summaries(kept, rows, blocks) if blocks else None
        else:
            compared = self.memory.keys_of(compared_at, rows, from_key, from_key + blocks) if blocks else None
        return chosen.Source(gather, compared, to_key - from_key, from_key, self.rows.barred(from_key, to_key, device), probes)

    def chosen(self, segment: Segment, visible: Visible, q: torch.Tensor, rotated: dict[Any, torch.Tensor]) -> Iterator[tuple[int, chosen.Asked, int]]:
        """What the queries choose of a segment, some of them at a time: (the first of them, the call, index of the segment's first key)."""
        start, choice = self.rows.start, segment.choice
        assert choice is not None
        for piece in visible.pieces(start, start + self.rows.count):
            turned, numbers = self.query(segment.query_positions, segment, q, rotated), q.shape[3] + self.width
            source, each = functools.partial(self.source, segment, piece.from_key, device=q.device), (q.shape[0], q.shape[1], self.groups, numbers)
            if choice.refresh and self.forward[1] - self.forward[0] == 1:
                rows, to_key, blocks = self.rows.rows, piece.to_key, choice.complete(visible.keys_of(start))
                each_own = [source(to_key=to_key, blocks=blocks, rows=slice(row, row + 1)) for row in range(rows.start, rows.stop)]
                found = [chosen.taken(self.layer, self.batch, self.memory, rows.start + n, start, segment, own) for n, own in enumerate(each_own)]
                seen, choosing = (torch.full((len(found), 1), segment.visible.keys_of(i), device=q.device) for i in (start, choice.asked(start)[0]))
                answer = chosen.answers(choice, found, choosing)
                yield start, chosen.ask(self.layer, segment, source(to_key=to_key, blocks=blocks, rows=rows), turned, seen[..., None], answer), piece.from_key
                continue
            asking = self.query(segment.compared[0], segment, q, rotated)
            keys = piece.to_key - piece.from_key
            whole = source(to_key=piece.to_key, blocks=choice.complete(keys), rows=self.rows.rows) if choice.queries == 1 else None
            for a, b, size in chosen.groups(choice, piece.first, piece.last, chosen.queries_at_once(choice, *each, keys, q.element_size())):
                seen = torch.arange(visible.keys_of(a), visible.keys_of(b), device=q.device).view(1, -1, size)
                queries, askers = (x[:, :, a - start : b - start] for x in (turned, asking))
                own = whole or source(to_key=b - visible.low, blocks=choice.complete(visible.keys_of(b - size)), rows=self.rows.rows)
                answer = chosen.choose(choice, own, askers, seen[..., 0], size - 1)
                yield a, chosen.ask(self.layer, segment, own, queries, seen, answer), piece.from_key

    def pieces(self, visible: Visible) -> Iterator[Piece]:
        """What the queries see of a segment; keys that the mask of this forward hides cut a piece in two."""
        for piece in visible.pieces(self.rows.start, self.rows.start + self.rows.count):
            if not self.rows.hidden:
                yield piece
            else:
                yield from (replace(piece, from_key=a, to_key=b) for a, b in self.rows.seen(piece.from_key, piece.to_key))

    def bias(self, alibi: Alibi, segment: Segment, piece: Piece, kv: KV, device: torch.device) -> Bias:
        """What ALiBi adds to the logits of a part of a piece, from the positions of its queries and keys."""
        exact = exact_device(device)
        rows = segment.query_positions(torch.arange(piece.first, piece.last, device=exact))
        columns = segment.key_positions(torch.arange(kv.index, kv.index + kv.k.shape[2], device=exact))
        return Bias(alibi.on(exact), rows, columns, device)
