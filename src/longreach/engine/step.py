"""One new token for each of several rows of any lengths, in one layer: few calls for all of them, where each would take its own.

Rows of about the same length lie in one bucket, and a bucket is one call per segment; so is a base that rows share. Knows a batch, a layout and tensors; not
where they come from.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from longreach.core.choice import OfQueries
from longreach.core.merge import NEGATIVE_INFINITY, Merge
from longreach.core.segments import PositionMap, Segment, Visible, summary
from longreach.engine import chosen, summaries
from longreach.engine.batch import Batch, Singles
from longreach.engine.layer import LSE, QUERY, Inputs, Layer
from longreach.kernels.protocol import KV, Kernel, Spans, gather
from longreach.kernels.tiles import Band, between, empty
from longreach.memory.bases import BaseShelf
from longreach.memory.layer import LayerMemory
from longreach.memory.slots import Stretch
from longreach.memory.steps import Shelf


def run(
    layer: Layer, batch: Batch, singles: Singles, kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, memory: LayerMemory, inputs: Inputs
) -> torch.Tensor:
    """q [B, H, T, D], k [B, G, T, D], v [B, G, T, E] of the forward -> [n, H, E] of the rows with one token, in q's dtype."""
    call = _Layer(layer, batch, singles, kernel, memory, inputs)
    new = singles.take(k)
    forms: dict[PositionMap | OfQueries, torch.Tensor] = {positions: call.encoded(positions, new) for positions in layer.forms}
    asking, step = singles.take(q), singles.step
    if layer.queries:
        forms[QUERY] = asking
    if layer.recalls:
        memory.recalled.forget(step.rows, step.starts)
    memory.append_step(step, forms, singles.take(v))
    if layer.summaries and LSE not in layer.queries:
        call.summarise()
    out, lse = call.attend(asking, v.shape[3])
    if LSE in layer.queries:
        memory.append_step(step, {LSE: lse.float()}, None)
        call.summarise()
    return out.to(q.dtype)


Part = tuple[torch.Tensor, torch.Tensor]  # out and lse


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a kernel for the rows `members` of a step. `together`: the columns that all of them see of one row; else `work` says what each sees."""

    members: tuple[int, ...]
    kv: KV
    work: Spans
    together: Stretch | None = None


@dataclass
class _Layer:
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

    def summarise(self) -> None:
        for row, start in self.singles.completing(tuple(self.layer.summaries.values())):
            summaries.summarise(self.layer, self.batch, self.memory, slice(row, row + 1), start, start + 1, self.inputs)

    def attend(self, q: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """q [n, H, D] -> out [n, H, E], lse [n, H, 1]."""
        merge = Merge(1)
        rotated: dict[object, torch.Tensor] = {}
        for segment in self.layer.layout.segments:
            if segment.choice is not None:
                asking, turned = (self.query(positions, segment, q, rotated) for positions in (segment.compared[0], segment.query_positions))
                parts = self.choose(segment, turned, asking, merge.lse)
            else:
                parts = self.segment(segment, self.query(segment.query_positions, segment, q, rotated))
            for out, lse in parts:
                merge.add(out, lse + segment.lse_bias if segment.lse_bias else lse)
        if merge.out is None:
            merge.add(q.new_zeros((*q.shape[:2], 1, width)), torch.full((*q.shape[:2], 1), NEGATIVE_INFINITY, device=q.device))
        if self.inputs.sink is not None:
            merge.sink(self.inputs.sink)
        out, lse = merge.result()
        return out[:, :, 0], lse

    def query(self, positions: PositionMap, segment: Segment, q: torch.Tensor, rotated: dict[object, torch.Tensor]) -> torch.Tensor:
        """q [n, H, D] -> [n, H, 1, D] at some positions, scaled as the segment says; kept in `rotated` for other segments."""
        if (key := (positions, segment.query_scale)) not in rotated:
            scale = None if segment.query_scale is None else self.batch.scale(segment.query_scale, self.starts, len(self.starts), q.device)
            rotated[key] = self.turned(q, positions, scale)[:, :, None]
        return rotated[key]

    def segment(self, segment: Segment, q: torch.Tensor) -> Iterator[Part]:
        """q [n, H, 1, D] -> what the rows see of a segment, in parts that merge: of the bases that they share with others, and of their own."""
        positions, visible, step = self.layer.form_of(segment.kept), segment.visible, self.singles.step
        every = self.singles.step.all
        if visible.last_key is not None:
            calls = [Call(every, self.memory.first_tokens(positions, step), self.spans(visible, every, (0,) * len(every)))]
        else:
            for base, kv in self.memory.bases(positions, step):
                for call in self.of_base(visible, base, kv):
                    yield self.spread(q, [call])
            calls = [Call(shelf.members, kv, self.spans(visible, shelf.members, shelf.firsts)) for shelf, kv in self.memory.shelves(positions, step)]
        if calls := [call for call in calls if call.work.reach != (0, 0)]:
            yield self.spread(q, calls)

    def spread(self, q: torch.Tensor, calls: list[Call]) -> Part:
        """What calls for some of the rows each give."""
        if len(calls) == 1 and calls[0].members == self.singles.step.all:
            return self.call(q, calls[0])
        return self.whole([(call.members, self.call(q[self.singles.index(call.members, q.device)], call)) for call in calls])

    def whole(self, parts: list[tuple[tuple[int, ...], Part]]) -> Part:
        """What some of the rows each see, beside nothing for all others."""
        (members, (out, lse)), count = parts[0], len(self.starts)
        if len(parts) == 1 and members == tuple(range(count)):
            return out, lse
        every = out.new_zeros((count, *out.shape[1:])), torch.full((count, *lse.shape[1:]), NEGATIVE_INFINITY, device=out.device)
        for members, (out, lse) in parts:
            index = self.singles.index(members, out.device)
            every[0][index], every[1][index] = out, lse
        return every

    def choose(self, segment: Segment, q: torch.Tensor, asking: torch.Tensor, others: torch.Tensor | None) -> Iterator[Part]:
        """The same of a segment whose keys an index chooses; `asking`: the queries in its frame. The only query of each row chooses.

        others  [n, H, 1] the log-sum-exp of the segments before it, which are all others; None: there is none.
        """
        visible, starts, choice = segment.visible, self.starts, segment.choice
        assert choice is not None
        parts: list[tuple[tuple[int, ...], Part]] = []
        for members, source in self.sources(segment):
            index, seen = self.singles.index(members, q.device), self.counts(tuple(visible.keys_of(starts[n]) for n in members), q.device)
            if choice.refresh:
                choosing = self.counts(tuple(visible.keys_of(choice.asked(starts[n])[0]) for n in members), q.device)
                answer = chosen.answers(choice, [self.taken(segment, n) for n in members], choosing)
            else:
                answer = chosen.choose(choice, source, asking[index], seen, 0)
            asked = chosen.ask(self.layer, segment, source, q[index], seen[..., None], answer)
            out, lse = chosen.attend(asked, self.kernel, self.inputs)
            if (weigh := self.memory.weigh) is not None:
                of_all = lse + segment.lse_bias if others is None else torch.logaddexp(others[index], lse + segment.lse_bias)
                row = self.singles.step.rows[members[0]]
                paid = chosen.weigh(asked, segment, of_all, self.inputs)
                weigh(self.layer.form_of(segment.kept), slice(row, row + len(members)), visible.first_key, asked.columns, paid)
            parts.append((members, (out, lse)))
        if parts:
            yield self.whole(parts)

    def taken(self, segment: Segment, number: int) -> torch.Tensor | None:
        """What a row, by its number, takes from the answers that its earlier queries got."""
        first, i, row = segment.visible.first_key, self.starts[number], self.singles.step.rows[number]
        keys = segment.visible.keys_of(i)
        probes = chosen.probes(self.layer, self.memory, slice(row, row + 1), segment, first, first + keys)
        gather = functools.partial(self.memory.gather, self.layer.form_of(segment.kept), slice(row, row + 1), first, first + keys)
        return chosen.taken(self.layer, self.batch, self.memory, row, i, segment, chosen.Source(gather, None, keys, first, probes=probes))

    def sources(self, segment: Segment) -> Iterator[tuple[tuple[int, ...], chosen.Source]]:
        """Rows, by their numbers, that choose in one go, and from what. Forks do where they share all that is not their own, and compare summaries."""
        memory, step, visible, kept = self.memory, self.singles.step, segment.visible, summary(segment)
        choice, first, forms = segment.choice, segment.visible.first_key, [self.layer.form_of(positions) for positions in (segment.kept, segment.compared[1])]
        assert choice is not None
        compared: torch.Tensor | None
        for (shelf, kv), (_, other) in zip(*(memory.shelves(form, step) for form in forms)):  # the same shelves: both forms keep every token
            shared, compares = any(shelf.firsts), kept is None and not choice.index.probes
            parts = None if shared and (compares or not memory.at_hand) else self.parts(forms[0], shelf, kv)
            for members in [(n,) for n in shelf.members] if parts is None else [shelf.members]:
                if not (keys := max(visible.keys_of(self.starts[n]) for n in members)):
                    continue
                row, blocks = slice(step.rows[members[0]], step.rows[members[0]] + 1), choice.complete(keys)
                source = functools.partial(memory.gather, forms[0], row, first, first + keys) if parts is None else functools.partial(gather, parts, first)
                if choice.index.probes:
                    compared = None
                elif kept is None:
                    compared = memory.keys_of(forms[1], row, first, first + keys) if parts is None else between(other.k, first, first + keys)
                elif not blocks:
                    compared = None
                else:
                    compared = memory.summaries(kept, row, blocks) if parts is None else memory.shelf_of_summaries(kept, step, shelf, blocks)
                yield members, chosen.Source(source, compared, keys, first)

    def parts(self, form: PositionMap, shelf: Shelf, kv: KV) -> tuple[KV, ...] | None:
        """What the rows of a shelf hold: the bases that all of them read, and a tail for each. None where they do not all read the same."""
        members, found = set(shelf.members), []
        for base, entries in self.memory.bases(form, self.singles.step) if any(shelf.firsts) else ():
            if reading := [(n, ends) for n, *ends in zip(base.members, base.firsts, base.stops) if n in members]:
                start, stop = reading[0][1]
                if len(reading) < len(members) or not base.same or any(ends != [start, stop] for _, ends in reading):
                    return None
                found.append(KV(between(entries.k, 0, stop - start), between(entries.v, 0, stop - start), start))
        if shelf.firsts.count(shelf.firsts[0]) < len(members):
            return None
        return (*sorted(found, key=lambda part: part.index), KV(kv.k, kv.v, shelf.firsts[0]))

    def counts(self, seen: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """[n, 1], made once for all layers."""
        made, key = self.singles.made, ("seen", seen, device)
        if key not in made:
            made[key] = torch.tensor(seen, device=device)[:, None]
        return made[key]

    def call(self, q: torch.Tensor, call: Call) -> Part:
        if call.together is not None:
            return folded(self.kernel, q, call.kv, call.together, self.inputs)
        return self.kernel.attend(q, call.kv.of_rows(len(call.members)), call.work, self.inputs.scale, self.inputs.softcap)

    def spans(self, visible: Visible, members: tuple[int, ...], firsts: tuple[int, ...]) -> Spans:
        """The columns that rows see, of buffers that begin with the entries `firsts`."""
        made, key = self.singles.made, (visible, members, firsts)
        if key not in made:
            seen = self.seen(visible, members)
            pairs = [(max(0, a - first), max(0, b - first)) for (a, b), first in zip(seen, firsts)]
            made[key] = Spans(tuple(a for a, _ in pairs), tuple(b for _, b in pairs))
        return made[key]

    def seen(self, visible: Visible, members: tuple[int, ...]) -> list[Stretch]:
        """The entries that rows see."""
        pieces = [next(visible.pieces(start, start + 1), None) for start in (self.starts[n] for n in members)]
        return [(0, 0) if piece is None else (piece.from_key, piece.to_key) for piece in pieces]

    def of_base(self, visible: Visible, base: BaseShelf, kv: KV) -> list[Call]:
        """Rows that read the same entries are rows of queries of one call, which reads them once; what only some of them see is masked for the others."""
        made, key = self.singles.made, (visible, base)
        if key not in made:
            pairs = [(n, base.columns(seen, number)) for number, (n, seen) in enumerate(zip(base.members, self.seen(visible, base.members)))]
            made[key] = _shared(pairs, base.same)
        return [Call(members, kv, work, together) for members, work, together in made[key]]


def _shared(pairs: list[tuple[int, Stretch]], same: bool) -> list[tuple[tuple[int, ...], Spans, Stretch | None]]:
    """What rows see of a base, (number, columns), as (numbers, columns of each, columns that one call reads for all of them)."""
    if not any(a < b for _, (a, b) in pairs):
        return []
    if same:
        pairs = [pair for pair in pairs if pair[1][0] < pair[1][1]]
    members, starts, stops = tuple(n for n, _ in pairs), tuple(a for _, (a, _) in pairs), tuple(b for _, (_, b) in pairs)
    first, last = max(starts), min(stops)
    if not same or first >= last:
        return [(members, Spans(starts, stops), None)]
    before, behind = Spans(starts, (first,) * len(members)), Spans((last,) * len(members), stops)
    return [(members, before, (first, last)), *((members, spans, None) for spans in (before, behind) if spans.reach != (0, 0))]


def folded(kernel: Kernel, q: torch.Tensor, kv: KV, seen: Stretch, inputs: Inputs) -> Part:
    """q [n, H, 1, D] of rows that all see the same columns of one row -> out [n, H, 1, E], lse [n, H, 1]. Each key is read once."""
    start, stop = seen
    if start >= stop:
        return empty(q, kv.v)
    kv = KV(between(kv.k, start, stop), between(kv.v, start, stop))
    out, lse = kernel.attend(q.transpose(0, 2), kv, Band(stop - start), inputs.scale, inputs.softcap)
    return out.transpose(0, 2), lse.transpose(0, 2)
