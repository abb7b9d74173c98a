"""Attention of a segment that chooses: ask the index which blocks each query sees, gather their keys and values, one kernel call for all of them.

Knows a segment and tensors; not where keys are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from longreach.core.choice import Choice, Past, Probes
from longreach.core.encodings import Rotary, Table, exact_device
from longreach.core.segments import Rank, Segment
from longreach.engine.batch import Batch
from longreach.engine.layer import QUERY, Inputs, Layer
from longreach.kernels import mass
from longreach.kernels.protocol import KV, Chosen, Kernel
from longreach.memory.layer import Shown
from longreach.memory.recalled import Recalled

AT_ONCE = 2**26  # bytes of gathered keys and values, and of scores in fp32, of one call


def queries_at_once(choice: Choice, rows: int, heads: int, groups: int, numbers: int, visible: int, itemsize: int) -> int:
    """How many queries of each row choose in one go. `numbers`: of a key and a value; `visible`: keys."""
    columns, together = min(visible, choice.keep * choice.block + choice.queries - 1), choice.queries
    gathered = choice.count(heads, groups) * columns * numbers * itemsize
    scored = heads * (visible // choice.block) * 4
    shown = 0 if together == 1 else 16 * columns * choice.count(heads, groups)  # by each query of a group
    return max(1, AT_ONCE // max(1, rows * (gathered + scored + together * shown)) * together)


def nbytes(choice: Choice, heads: int, groups: int, numbers: int, key: int, visible: int, queries: int, itemsize: int) -> int:
    """What `queries` queries of a row hold while they choose, beside what the layer holds anyway; `key`: the width of one."""
    blocks, choices = choice.complete(visible), queries
    columns = choice.count(heads, groups) * min(visible, choice.keep * choice.block + choice.block + choice.lag + choice.queries - 1)
    if choice.queries > 1:  # one choice and one copy for all of a group, but each sees its own part
        choices = -(-queries // choice.queries)
    compared = 0 if choice.index.width else 4 * groups * key * blocks  # keys are compared in fp32
    if choice.index.probes:  # two keys of every chunk, which is no smaller than a block
        compared = min(AT_ONCE, 2 * groups * key * blocks * choices * itemsize)
    return choices * (columns * (numbers * itemsize + 4 * 8)) + queries * (heads * blocks * 3 * 4 + (queries > 1) * columns * 8) + compared


@dataclass(frozen=True, eq=False)
class Source:
    """What R rows may choose from; key 0 is the first key of the segment.

    gather     columns [R, C, T, n] of the keys, counted from key 0 -> their keys and values, as `kernels.protocol.gather` has them.
    compared   [R, G, N, S] the summaries of complete blocks, or the keys; None: there is no complete block.
    keys       of each row at most.
    first      index of the segment's first key.
    barred     [keys] keys that a mask hides; None: none.
    probes     what looks up keys, for an index that probes.
    """

    gather: Callable[[torch.Tensor], KV]
    compared: torch.Tensor | None
    keys: int
    first: int
    barred: torch.Tensor | None = None
    probes: Probes | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """The call of a kernel that queries make who have chosen.

    q         [R C T, H / C, 1, D], or [R C, H / C, T, D] of queries that choose together; kv and work are of as many rows.
    columns   [R, C, S, n] of the keys, counted from the first of the segment; S groups of queries choose apart.
    choosing  [R or 1, S] keys: what is complete of them was chosen from.
    """

    q: torch.Tensor
    kv: KV
    work: Chosen
    columns: torch.Tensor
    choosing: torch.Tensor
    queries: int

    def folded(self, x: torch.Tensor) -> torch.Tensor:
        """x [R, H, T, ...] as q is."""
        return folded(x, self.columns.shape)

    def unfolded(self, x: torch.Tensor) -> torch.Tensor:
        """x as q is -> [R, H, T, ...]."""
        rows, _, choices, _ = self.columns.shape
        return x.unflatten(0, (rows, -1, choices)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def folded(x: torch.Tensor, columns: torch.Size) -> torch.Tensor:
    """x [R, H, T, ...] -> [R C T, H / C, 1, ...] or [R C, H / C, T, ...]: whoever chooses apart, as `columns` [R, C, T or 1, n] are chosen, is a row."""
    return x.unflatten(2, (columns[2], -1)).unflatten(1, (columns[1], -1)).transpose(2, 3).flatten(0, 2)


@dataclass(frozen=True, eq=False)
class Answer:
    """ids [R, C, S, n] of blocks that were chosen, of what was complete of `choosing` [R or 1, S] keys, at most `ahead` of those that a query sees."""

    ids: torch.Tensor | None
    choosing: torch.Tensor
    ahead: int


def choose(choice: Choice, source: Source, q: torch.Tensor, choosing: torch.Tensor, ahead: int) -> Answer:
    """q [R, H, T, D] in the frame of the index, of groups that each choose among what is complete of `choosing` [R or 1, S] keys."""
    past = past_of(choice, source, choosing)
    return Answer(None if past is None else choice.index.choose(q, past), choosing, ahead)


def past_of(choice: Choice, source: Source, choosing: torch.Tensor) -> Past | None:
    """What is to be chosen from; None: there is nothing."""
    complete = (choosing - choice.lag).clamp_min(0) // choice.block
    blocks = choice.complete(source.keys) if source.probes is not None else 0 if source.compared is None else source.compared.shape[2]
    if not blocks:
        return None
    candidates = torch.arange(blocks, device=choosing.device) < complete[..., None]
    if source.barred is not None:
        candidates = candidates & ~source.barred[: blocks * choice.block].unflatten(0, (-1, choice.block)).all(-1)
    compared = candidates.new_empty(0) if source.compared is None else source.compared
    return Past(compared, candidates, (choosing > complete * choice.block)[..., None], source.probes)


def taken(layer: Layer, batch: Batch, memory: Shown, row: int, i: int, segment: Segment, source: Source) -> torch.Tensor | None:
    """ids [1, C, 1, n] that query i of a row, the only one of its forward, takes from what earlier ones were answered, stage by stage; None: there are none."""
    choice, found = segment.choice, None
    assert choice is not None
    recalled = memory.recalled if source.barred is None else Recalled()  # what a mask hides in this forward is hidden from the earlier queries too
    asked = choice.asked(i)
    known = max((n for n, of in enumerate(asked) if recalled.get(row, n, of) is not None), default=-1)
    if known >= 0:
        found = recalled.get(row, known, asked[known])
    if known == len(asked) - 1:
        return found
    device = memory.summaries(QUERY, slice(row, row + 1), i + 1, i).device
    if (past := past_of(choice, source, torch.tensor([[segment.visible.keys_of(asked[0])]], device=device))) is None:
        return None
    for n in range(known + 1, len(asked)):
        q = memory.summaries(QUERY, slice(row, row + 1), asked[n] + 1, asked[n])
        scale = None if segment.query_scale is None else batch.scale(segment.query_scale, asked[n], 1, q.device)
        found = choice.index.stage(n, batch.turned(q, layer.rotary, segment.compared[0], asked[n], 1, scale), found, past)
        recalled.put(row, n, asked[n], found)
    return found


def answers(choice: Choice, each: Sequence[torch.Tensor | None], choosing: torch.Tensor) -> Answer:
    """What `each` row has taken, as one answer; choosing [R, 1]."""
    some = [ids for ids in each if ids is not None]
    if not some:
        return Answer(None, choosing, choice.refresh[0] - 1)
    most = max(ids.shape[3] for ids in some)
    none = some[0].new_full((1, some[0].shape[1], 1, 0), -1)
    padded = [functional.pad(none if ids is None else ids, (0, most - (0 if ids is None else ids.shape[3])), value=-1) for ids in each]
    return Answer(torch.cat(padded), choosing, choice.refresh[0] - 1)


def ask(layer: Layer, segment: Segment, source: Source, q: torch.Tensor, visible: torch.Tensor, answer: Answer) -> Asked:
    """q [R, H, S Q, D], encoded, of S groups that see `visible` [R or 1, S, Q] keys."""
    choice, ranked, alibi = segment.choice, segment.key_positions, layer.alibi
    assert choice is not None
    columns, seen = _columns(choice, source, q.shape[0], visible, answer, isinstance(ranked, Rank))  # [R, C, S, n], [R, C, S, Q, n]
    kv, bias = source.gather(columns), None
    if isinstance(ranked, Rank) or alibi is not None:
        exact = exact_device(q.device)
        at = segment.query_positions((visible + (segment.visible.low - 1 + source.first)).to(exact))[:, None]  # [R or 1, 1, S, Q]
        if isinstance(ranked, Rank):
            first, last = (seen[..., n, :].to(exact) for n in (0, -1))
            places = ranked.among(last, first, at[..., :1])
            if layer.rest is not None:
                kv = KV(_turned(kv.k, layer.rest, places.flatten(0, 2)), kv.v)
        else:
            places = ranked(columns.to(exact) + source.first)
        if alibi is not None:
            behind = (at[..., None] - places.to(exact)[..., None, :])[:, :, None]  # [R, C, 1, S, Q, n]
            slope = alibi.on(exact).view(1, columns.shape[1], -1, 1, 1, 1)
            bias = -(slope * behind).transpose(2, 3).flatten(0, 2).to(q.device, torch.float32)
    return Asked(folded(q, columns.shape), kv, Chosen(seen.flatten(0, 2), bias), columns, answer.choosing, q.shape[2])


def attend(asked: Asked, kernel: Kernel, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [R, H, T, E], lse [R, H, T]."""
    out, lse = kernel.attend(asked.q, asked.kv, asked.work, inputs.scale, inputs.softcap)
    return asked.unfolded(out), asked.unfolded(lse)


def weigh(asked: Asked, segment: Segment, lse: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """lse [R, H, T] of all segments -> what the queries have paid to the columns, all heads that share a choice together: [R, C, S, n] fp32."""
    if inputs.sink is not None:
        lse = torch.logaddexp(lse, inputs.sink.float().view(1, -1, 1))
    paid = mass.paid(asked.q, asked.kv.k, asked.folded(lse - segment.lse_bias), asked.work, inputs.scale, inputs.softcap)
    return paid.sum(1).unflatten(0, asked.columns.shape[:3])


def probes(layer: Layer, memory: Shown, rows: slice, segment: Segment, first: int, stop: int) -> Probes:
    """Of the keys first .. stop of rows."""
    form = layer.form_of(segment.compared[1])

    def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return x if layer.rest is None else layer.rest.table(positions.to(exact_device(x.device))).to(x.device).rotate(x)

    return Probes(functools.partial(memory.lookup, form, rows, first, stop), turned, memory.at_once(form, rows))


def _turned(k: torch.Tensor, rotary: Rotary, positions: torch.Tensor) -> torch.Tensor:
    """k [R, G, n, D] at positions [R, n], the same for all heads."""
    exact = positions.to(exact_device(k.device))
    least = exact.min()
    table = rotary.table(torch.arange(int(exact.max() - least) + 1, device=exact.device) + least).to(k.device)
    number = (exact - least).to(k.device)
    turned = Table(table.cos[number].flatten(0, 1), table.sin[number].flatten(0, 1), rotary).rotate(k.transpose(0, 1).flatten(1, 2))
    return turned.unflatten(1, positions.shape).transpose(0, 1)


def _columns(
    choice: Choice, source: Source, rows: int, visible: torch.Tensor, answer: Answer, in_order: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys the queries see: columns [R, C, S, n] that can be read, and whether each query of a group sees them [R, C, S, Q, n]."""
    block, parts, complete = choice.block, [], (answer.choosing - choice.lag).clamp_min(0) // choice.block
    if (ids := answer.ids) is not None:
        if in_order:
            ids = ids.sort(-1).values
        token = (ids[..., None] * block + torch.arange(block, device=ids.device)).flatten(-2)
        parts.append(token.masked_fill_((ids < 0).repeat_interleave(block, -1), source.keys))
    if latest := min(block - 1 + choice.lag + answer.ahead, max(1, source.keys)):  # a block may be larger than the text
        last = complete[:, None, :, None] * block + torch.arange(latest, device=complete.device)
        parts.append(last.expand(rows, parts[0].shape[1] if parts else 1, -1, -1))
    columns = torch.cat(parts, -1) if parts else complete.new_empty(rows, 1, complete.shape[1], 0)
    seen = columns[..., None, :] < visible[:, None, :, :, None]
    columns = columns.clamp_max(max(0, source.keys - 1))
    if source.barred is not None:
        seen = seen & ~source.barred[columns][..., None, :]
    return columns, seen


def groups(choice: Choice, first: int, last: int, at_once: int) -> Iterator[tuple[int, int, int]]:
    """The queries first .. last of a forward, those that choose in one go at a time: (first, last, how many of them choose together)."""
    if choice.queries == 1:
        yield from ((a, min(last, a + at_once), 1) for a in range(first, last, at_once))
        return
    a, b, size = first, first, 0
    for c, d in choice.together(first, last):
        if a < c and (d - c != size or d - a > at_once):
            yield a, b, size
            a = c
        b, size = d, d - c
    if a < b:
        yield a, b, size
