"""One new token for each of several rows of any lengths, in one layer: few calls for all of them, where each would take its own.

Rows of about the same length lie in one bucket, and a bucket is one call per segment. Knows a batch, a layout and tensors; not where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longreach.core.merge import NEGATIVE_INFINITY, Merge
from longreach.core.segments import PositionMap, Segment, Visible, summary
from longreach.engine import chosen
from longreach.engine.batch import Batch, Singles
from longreach.engine.layer import Inputs, Layer
from longreach.kernels.protocol import KV, Kernel, Spans
from longreach.kernels.tiles import between
from longreach.memory.layer import LayerMemory


def run(
    layer: Layer, batch: Batch, singles: Singles, kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, memory: LayerMemory, inputs: Inputs
) -> torch.Tensor:
    """q [B, H, T, D], k [B, G, T, D], v [B, G, T, E] of the forward -> [n, H, E] of the rows with one token, in q's dtype."""
    call = _Call(layer, batch, singles, kernel, memory, inputs)
    new = singles.take(k)
    memory.append_step(singles.step, {positions: call.encoded(positions, new) for positions in layer.forms}, singles.take(v))
    for row, start in zip(singles.step.rows, singles.step.starts) if layer.summaries else ():
        chosen.summarise(layer, memory, slice(row, row + 1), start, start + 1)
    return call.attend(singles.take(q), v.shape[3]).to(q.dtype)


@dataclass
class _Call:
    layer: Layer
    batch: Batch
    singles: Singles
    kernel: Kernel
    memory: LayerMemory
    inputs: Inputs

    @property
    def starts(self) -> tuple[int, ...]:
        return self.singles.step.starts

    def turned(self, x: torch.Tensor, positions: PositionMap, scale: torch.Tensor | None = None) -> torch.Tensor:
        """x [n, H, D] at the positions of the tokens, times `scale` [n]."""
        return self.batch.turned(x.transpose(0, 1), self.layer.rotary, positions, self.starts, len(self.starts), scale).transpose(0, 1)

    def encoded(self, positions: PositionMap, new: torch.Tensor) -> torch.Tensor:
        kept = self.layer.forms[positions]
        if self.layer.rotary is None or (kept.tail == 0 and min(self.starts) >= kept.head):  # only first tokens are ever seen in this form
            return new
        return self.turned(new, positions)

    def attend(self, q: torch.Tensor, width: int) -> torch.Tensor:
        """q [n, H, D] -> [n, H, E]."""
        merge = Merge(1)
        rotated: dict[object, torch.Tensor] = {}
        for segment in self.layer.layout.segments:
            if segment.choice is not None:
                part = self.chosen(segment, *(self.query(positions, segment, q, rotated) for positions in (segment.query_positions, segment.compared[0])))
            else:
                part = self.segment(segment, self.query(segment.query_positions, segment, q, rotated))
            if part is not None:
                out, lse = part
                merge.add(out, lse + segment.lse_bias if segment.lse_bias else lse)
        if merge.out is None:
            merge.add(q.new_zeros((*q.shape[:2], 1, width)), torch.full((*q.shape[:2], 1), NEGATIVE_INFINITY, device=q.device))
        if self.inputs.sink is not None:
            merge.sink(self.inputs.sink)
        return merge.result()[0][:, :, 0]

    def query(self, positions: PositionMap, segment: Segment, q: torch.Tensor, rotated: dict[object, torch.Tensor]) -> torch.Tensor:
        """q [n, H, D] -> [n, H, 1, D] at some positions, scaled as the segment says; kept in `rotated` for other segments."""
        if (key := (positions, segment.query_scale)) not in rotated:
            scale = None if segment.query_scale is None else self.batch.scale(segment.query_scale, self.starts, len(self.starts), q.device)
            rotated[key] = self.turned(q, positions, scale)[:, :, None]
        return rotated[key]

    def segment(self, segment: Segment, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """q [n, H, 1, D] -> what the rows see of a segment; None: nothing."""
        positions, visible = self.layer.form_of(segment.key_positions), segment.visible
        every = tuple(range(len(self.starts)))
        calls: list[tuple[tuple[int, ...], torch.Tensor | None, KV, Spans]]
        if visible.last_key is not None:
            calls = [(every, None, self.memory.first_tokens(positions, self.singles.step), self.spans(visible, every, (0,) * len(every)))]
        else:
            calls = [
                (shelf.members, shelf.index(q.device)[0], kv, self.spans(visible, shelf.members, shelf.firsts))
                for shelf, kv in self.memory.shelves(positions, self.singles.step)
            ]
        calls = [call for call in calls if call[3].reach != (0, 0)]
        if not calls:
            return None
        if len(calls) == 1 and calls[0][0] == every:
            return self.call(q, calls[0][2], calls[0][3])
        whole: tuple[torch.Tensor, torch.Tensor] | None = None
        for _, index, kv, spans in calls:
            out, lse = self.call(q[index], kv, spans)
            if whole is None:
                shape = len(every), *out.shape[1:]
                whole = out.new_zeros(shape), torch.full(shape[:3], NEGATIVE_INFINITY, device=out.device)
            whole[0][index], whole[1][index] = out, lse
        return whole

    def chosen(self, segment: Segment, q: torch.Tensor, asking: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same of a segment whose keys an index chooses; `asking`: the queries in its frame. The only query of each row chooses."""
        visible, choice, starts, form = segment.visible, segment.choice, self.starts, self.layer.form_of
        assert choice is not None
        whole: tuple[torch.Tensor, torch.Tensor] | None = None
        compared_at = self.memory.shelves(form(segment.compared[1]), self.singles.step)  # the same shelves: both keep every token
        for (shelf, kv), (_, other) in zip(self.memory.shelves(form(segment.kept), self.singles.step), compared_at):
            seen = [visible.keys_of(starts[n]) for n in shelf.members]
            if not (keys := max(seen)):
                continue
            kv = KV(*(between(x, visible.first_key, visible.first_key + keys) for x in (kv.k, kv.v)))
            compared: torch.Tensor | None = between(other.k, visible.first_key, visible.first_key + keys)
            if (kept := summary(segment)) is not None:
                blocks = keys // choice.block
                compared = self.memory.shelf_of_summaries(kept, self.singles.step, shelf, blocks) if blocks else None
            index, source = shelf.index(q.device)[0], chosen.Source(kv.gather, compared, keys, visible.first_key)
            part = chosen.attend(self.layer, segment, source, self.kernel, self.inputs, q[index], asking[index], self.counts(seen, q.device))
            if shelf.members == tuple(range(len(starts))):
                return part
            if whole is None:
                shape = len(starts), *part[0].shape[1:]
                whole = part[0].new_zeros(shape), torch.full(shape[:3], NEGATIVE_INFINITY, device=q.device)
            whole[0][index], whole[1][index] = part
        return whole

    def counts(self, seen: list[int], device: torch.device) -> torch.Tensor:
        """[n, 1], made once for all layers."""
        made, key = self.singles.made, (tuple(seen), device)
        if key not in made:
            made[key] = torch.tensor(seen, device=device)[:, None]
        return made[key]

    def call(self, q: torch.Tensor, kv: KV, spans: Spans) -> tuple[torch.Tensor, torch.Tensor]:
        return self.kernel.attend(q, kv, spans, self.inputs.scale, self.inputs.softcap)

    def spans(self, visible: Visible, members: tuple[int, ...], firsts: tuple[int, ...]) -> Spans:
        """The columns that rows see, of buffers that begin with the entries `firsts`."""
        made, key = self.singles.made, (visible, members, firsts)
        if key not in made:
            seen = [next(visible.pieces(start, start + 1), None) for start in (self.starts[n] for n in members)]
            pairs = [(0, 0) if piece is None else (piece.from_key - first, piece.to_key - first) for piece, first in zip(seen, firsts)]
            made[key] = Spans(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
        return made[key]
