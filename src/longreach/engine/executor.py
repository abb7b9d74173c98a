"""The executor: one layer of one forward. Store the new keys, rotate, call the kernel per segment, merge exactly.

Knows a batch, a layout and tensors; not where they come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from longreach.core.encodings import exact_device
from longreach.core.merge import NEGATIVE_INFINITY, Merge
from longreach.core.segments import Constant, Piece, PositionMap, Segment, TopK
from longreach.engine import reference, step
from longreach.engine.batch import Batch, Rows
from longreach.engine.layer import RAW, Inputs, Layer
from longreach.kernels.biased import Bias
from longreach.kernels.protocol import KV, Kernel
from longreach.kernels.tiles import Band
from longreach.memory.contiguous import Passing
from longreach.memory.layer import LayerMemory, Shown, joined

QUERIES_AT_ONCE = 4096  # bounds the memory for rotated queries and partial results, and keeps them in the cache


def execute(
    layer: Layer, batch: Batch, memory: LayerMemory | None, kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, inputs: Inputs
) -> torch.Tensor:
    """q [B, H, T, D], k [B, G, T, D], v [B, G, T, E] of the new tokens, un-rotated -> [B, T, H, E] in q's dtype, zero at pads.

    memory  of the layer; None: nothing is stored, and nothing was.
    """
    shape = q.shape[0], q.shape[2], q.shape[1], v.shape[3]
    out: torch.Tensor | None = None
    shown: Shown = Passing() if memory is None else memory
    together = batch.singles if layer.joins else None
    if together is not None:
        assert memory is not None
        out = q.new_zeros(shape)
        out[together.rows.to(out.device), together.columns.to(out.device)] = step.run(layer, batch, together, kernel, q, k, v, memory, inputs)
    for rows in batch.groups if together is None else batch.others:
        new_k = rows.take(k)
        shown.append(rows.rows, rows.start, {positions: _encoded(layer, batch, rows, positions, new_k) for positions in layer.forms}, rows.take(v))
        at_once = rows.count if layer.dense or layer.layout.late is not None else QUERIES_AT_ONCE
        for block in rows.blocks(at_once):
            if layer.dense:
                merged = _dense(layer, block, block.take(q), shown, inputs)
            else:
                merged = _Call(layer, batch, block, kernel, inputs, shown, v.shape[3]).run(block.take(q))
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
    i = torch.arange(rows.start, total, device=q.device)
    scale = layer.method.query_scale()
    out, _ = reference.attention(
        q,
        kv.k,
        kv.v,
        layer.method.distances(i[:, None], torch.arange(total, device=q.device)[None, :]),
        layer.rotary,
        inputs.scale,
        alibi=layer.alibi,
        query_scale=None if scale is None else scale(i),
        softcap=inputs.softcap,
        sink=inputs.sink,
        late=layer.layout.late,
        barred=rows.barred(0, total, q.device),
    )
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

    def run(self, q: torch.Tensor) -> torch.Tensor:
        """q [b, H, t, D] -> [b, H, t, E], fp32 if it is merged from parts."""
        merge = Merge(self.rows.count)
        rotated: dict[Any, torch.Tensor] = {}
        for segment in self.layer.layout.segments:
            self.segment(segment, q, merge, rotated)
        if self.layer.layout.late is not None:
            self.late(self.layer.layout.late, q, merge)
        if merge.out is None:
            merge.add(q.new_zeros((*q.shape[:3], self.width)), q.new_full(q.shape[:3], NEGATIVE_INFINITY))
        if self.inputs.sink is not None:
            merge.sink(self.inputs.sink)
        return merge.result()[0]

    def query(self, segment: Segment, q: torch.Tensor) -> torch.Tensor:
        """The queries at the segment's positions, scaled."""
        start, count = self.rows.start, self.rows.count
        scale = None if segment.query_scale is None else self.batch.scale(segment.query_scale, start, count, q.device)
        return self.batch.turned(q, self.layer.rotary, segment.query_positions, start, count, scale)

    def segment(self, segment: Segment, q: torch.Tensor, merge: Merge, rotated: dict[Any, torch.Tensor]) -> None:
        start = self.rows.start
        key, pinned = (segment.query_positions, segment.query_scale), segment.visible.last_key is not None
        for piece in self.pieces(segment):
            if key not in rotated:
                rotated[key] = self.query(segment, q)
            turned = rotated[key][:, :, piece.first - start : piece.last - start]
            for kv in self.memory.view(self.layer.form_of(segment.key_positions), self.rows.rows, piece.from_key, piece.to_key, pinned):
                band, bias = Band(piece.first - kv.index, piece.low, piece.high), self.bias(segment, piece, kv, q.device)
                if kv.k.shape[0] == turned.shape[0]:
                    out, lse = self.kernel.attend(turned, kv, band, self.inputs.scale, self.inputs.softcap, bias)
                else:
                    out, lse = self.of_one(turned, kv, band, bias)
                merge.add(out, lse + segment.lse_bias if segment.lse_bias else lse, piece.first - start)

    def of_one(self, q: torch.Tensor, kv: KV, band: Band, bias: Bias | None) -> tuple[torch.Tensor, torch.Tensor]:
        """q [b, H, t, D] -> what rows see of a part that all of them share."""
        if q.shape[2] > 1 or bias is not None:
            kv = KV(kv.k.expand(q.shape[0], -1, -1, -1), kv.v.expand(q.shape[0], -1, -1, -1))
            return self.kernel.attend(q, kv, band, self.inputs.scale, self.inputs.softcap, bias)
        return step.folded(self.kernel, q, kv, band.seen_by_first(kv.k.shape[2]), self.inputs)

    def pieces(self, segment: Segment) -> Iterator[Piece]:
        """What the queries see of a segment; keys that the mask of this forward hides cut a piece in two."""
        for piece in segment.visible.pieces(self.rows.start, self.rows.start + self.rows.count):
            if not self.rows.hidden:
                yield piece
            else:
                yield from (replace(piece, from_key=a, to_key=b) for a, b in self.rows.seen(piece.from_key, piece.to_key))

    def bias(self, segment: Segment, piece: Piece, kv: KV, device: torch.device) -> Bias | None:
        """What ALiBi adds to the logits of a part of a piece, from the positions of its queries and keys."""
        if self.layer.alibi is None:
            return None
        exact = exact_device(device)
        rows = segment.query_positions(torch.arange(piece.first, piece.last, device=exact))
        columns = segment.key_positions(torch.arange(kv.index, kv.index + kv.k.shape[2], device=exact))
        return Bias(self.layer.alibi.on(exact), rows, columns, device)

    def late(self, late: TopK, q: torch.Tensor, merge: Merge, rows_at_once: int = 64) -> None:
        """The k best keys of the middle, chosen per query head, attended to with the scores that chose them."""
        start, stop = self.rows.start, self.rows.start + self.rows.count
        queries = self.batch.turned(q, self.layer.rotary, Constant(late.distance), start, self.rows.count)
        first = stop - 1 if late.rows == "last" else start
        for a in range(max(first, late.first_key + late.low + late.k - 1), stop, rows_at_once):
            b = min(stop, a + rows_at_once)
            kv = joined(self.memory.view(RAW, self.rows.rows, late.first_key, b - late.low, False), q.shape[0])
            keys, values, groups = kv.k.float(), kv.v, q.shape[1] // kv.k.shape[1]
            i = torch.arange(a, b, device=q.device)[:, None]
            j = torch.arange(late.first_key, b - late.low, device=q.device)[None, :]
            block = queries[:, :, a - start : b - start].float().unflatten(1, (-1, groups))
            logits = (block @ keys[:, :, None].transpose(-1, -2)).flatten(1, 2) * self.inputs.scale
            if self.inputs.softcap is not None:
                logits = self.inputs.softcap * torch.tanh(logits / self.inputs.softcap)
            if self.layer.alibi is not None:
                logits = logits - (self.layer.alibi.on(q.device) * late.distance).float().view(-1, 1, 1)
            no_candidate = i - j < late.low
            if (barred := self.rows.barred(late.first_key, b - late.low, q.device)) is not None:
                no_candidate = no_candidate | barred
                no_candidate |= (~no_candidate).sum(1, keepdim=True) < late.k
            logits = logits.masked_fill(no_candidate, NEGATIVE_INFINITY)
            best = logits.topk(late.k, dim=-1)
            lse = torch.logsumexp(best.values, -1)
            chosen = values.repeat_interleave(groups, 1).float()[:, :, None].expand(-1, -1, b - a, -1, -1)
            picked = chosen.gather(3, best.indices[..., None].expand(*best.indices.shape, values.shape[3]))
            out = (torch.exp(best.values - lse[..., None]).nan_to_num(0.0)[..., None, :] @ picked)[..., 0, :]
            merge.add(out, lse, a - start)
