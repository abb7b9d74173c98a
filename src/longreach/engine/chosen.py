"""Attention of a segment that chooses: ask the index which blocks each query sees, gather their keys and values, one kernel call for all of them.

Knows a segment and tensors; not where keys are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from longreach.core.choice import Choice, Past
from longreach.core.encodings import Rotary, Table, exact_device
from longreach.core.segments import Rank, Segment
from longreach.engine.layer import Inputs, Layer
from longreach.kernels.protocol import KV, Chosen, Kernel

AT_ONCE = 2**26  # bytes of gathered keys and values, and of scores in fp32, of one call


def queries_at_once(choice: Choice, rows: int, heads: int, groups: int, numbers: int, visible: int, itemsize: int) -> int:
    """How many queries of each row choose in one go. `numbers`: of a key and a value; `visible`: keys."""
    gathered = choice.count(heads, groups) * min(visible, choice.keep * choice.block) * numbers * itemsize
    scored = heads * (visible // choice.block) * 4
    return max(1, AT_ONCE // max(1, rows * (gathered + scored)))


def nbytes(choice: Choice, heads: int, groups: int, numbers: int, key: int, visible: int, queries: int, itemsize: int) -> int:
    """What `queries` queries of a row hold while they choose, beside what the layer holds anyway; `key`: the width of one."""
    blocks, choices = choice.complete(visible), queries
    columns = choice.count(heads, groups) * min(visible, choice.keep * choice.block + choice.block + choice.lag + choice.queries - 1)
    if choice.queries > 1:  # one choice and one copy for all of them, but each sees its own part
        choices, queries = 1, min(queries, choice.queries)
    compared = 0 if choice.index.width else 4 * groups * key * blocks  # keys are compared in fp32
    return choices * (columns * (numbers * itemsize + 4 * 8)) + queries * (heads * blocks * 3 * 4 + (queries > 1) * columns * 8) + compared


@dataclass(frozen=True, eq=False)
class Source:
    """What R rows may choose from; key 0 is the first key of the segment.

    gather     columns [R, C, T, n] of the keys, counted from key 0 -> their keys and values, as `kernels.protocol.gather` has them.
    compared   [R, G, N, S] the summaries of complete blocks, or the keys; None: there is no complete block.
    keys       of each row at most.
    first      index of the segment's first key.
    barred     [keys] keys that a mask hides; None: none.
    """

    gather: Callable[[torch.Tensor], KV]
    compared: torch.Tensor | None
    keys: int
    first: int
    barred: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Asked:
    """The call of a kernel that queries make who have chosen.

    q        [R C T, H / C, 1, D], or [R C, H / C, T, D] of queries that choose together; kv and work are of as many rows.
    columns  [R, C, T or 1, n] of the keys, counted from the first of the segment.
    """

    q: torch.Tensor
    kv: KV
    work: Chosen
    columns: torch.Tensor
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


def ask(layer: Layer, segment: Segment, source: Source, q: torch.Tensor, asking: torch.Tensor, visible: torch.Tensor) -> Asked:
    """q [R, H, T, D], encoded, that see `visible` [R or 1, T] keys; `asking`: the same in the frame of the index."""
    choice, ranked, alibi = segment.choice, segment.key_positions, layer.alibi
    assert choice is not None
    columns, seen = _columns(choice, source, asking, visible, isinstance(ranked, Rank))
    kv = source.gather(columns)
    if isinstance(ranked, Rank):
        places = ranked.among(seen[:, :, -1:] if choice.queries > 1 else seen).expand(*columns.shape).flatten(0, 2)
        if layer.rest is not None:
            kv = KV(_turned(kv.k, layer.rest, places), kv.v)
    bias = None
    if alibi is not None:
        exact = exact_device(q.device)
        i = (visible + (segment.visible.low - 1 + source.first)).to(exact)
        at = ranked.among(seen).to(exact) if isinstance(ranked, Rank) else ranked(columns.to(exact) + source.first)
        behind = segment.query_positions(i)[:, None, :, None] - at
        slope = alibi.on(exact).view(1, columns.shape[1], -1, 1, 1)
        bias = folded(-(slope * behind[:, :, None]).flatten(1, 2), columns.shape).to(q.device, torch.float32)
    shown = folded(seen.expand(*columns.shape[:2], *seen.shape[2:]), columns.shape)[:, 0]
    return Asked(folded(q, columns.shape), kv, Chosen(shown, bias), columns, q.shape[2])


def complete(segment: Segment, first: int, stop: int, device: torch.device) -> torch.Tensor:
    """[T, or 1 of queries that choose together] of the segment's keys, how many lie in blocks that are complete for the queries first .. stop."""
    choice, visible = segment.choice, segment.visible
    assert choice is not None
    of = range(first, first + 1 if choice.queries > 1 else stop)
    return torch.tensor([choice.complete(visible.keys_of(i)) * choice.block for i in of], device=device)


def attend(asked: Asked, kernel: Kernel, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [R, H, T, E], lse [R, H, T]."""
    out, lse = kernel.attend(asked.q, asked.kv, asked.work, inputs.scale, inputs.softcap)
    return asked.unfolded(out), asked.unfolded(lse)


def _turned(k: torch.Tensor, rotary: Rotary, positions: torch.Tensor) -> torch.Tensor:
    """k [R, G, n, D] at positions [R, n], the same for all heads."""
    exact = positions.to(exact_device(k.device))
    least = exact.min()
    table = rotary.table(torch.arange(int(exact.max() - least) + 1, device=exact.device) + least).to(k.device)
    number = (exact - least).to(k.device)
    turned = Table(table.cos[number].flatten(0, 1), table.sin[number].flatten(0, 1), rotary).rotate(k.transpose(0, 1).flatten(1, 2))
    return turned.unflatten(1, positions.shape).transpose(0, 1)


def _columns(choice: Choice, source: Source, q: torch.Tensor, visible: torch.Tensor, in_order: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys the queries see: columns [R, C, T or 1, n] that can be read, and whether each query sees them [R or 1, C, T, n]. `visible` [R or 1, T] keys
    are to choose from; what is complete for the first of those that choose together is."""
    block, rows = choice.block, q.shape[0]
    choosing = visible[:, :1] if choice.queries > 1 else visible
    complete = (choosing - choice.lag).clamp_min(0) // block
    parts = []
    if source.compared is not None:
        number = torch.arange(source.compared.shape[2], device=q.device)
        candidates = number < complete[..., None]
        if source.barred is not None:
            hidden = source.barred[: len(number) * block].unflatten(0, (-1, block)).all(-1)
            candidates = candidates & ~hidden
        ids = choice.index.choose(q, Past(source.compared, candidates, (choosing > complete * block)[..., None]))
        if in_order:
            ids = ids.sort(-1).values
        token = (ids[..., None] * block + torch.arange(block, device=q.device)).flatten(-2)
        parts.append(token.masked_fill_((ids < 0).repeat_interleave(block, -1), source.keys))
    if latest := block - 1 + choice.lag + visible.shape[1] - choosing.shape[1]:
        last = complete[:, None, :, None] * block + torch.arange(latest, device=q.device)
        parts.append(last.expand(rows, parts[0].shape[1] if parts else 1, -1, -1))
    columns = torch.cat(parts, -1) if parts else visible.new_empty(rows, 1, choosing.shape[1], 0)
    seen = columns < visible[:, None, :, None]
    columns = columns.clamp_max(max(0, source.keys - 1))
    if source.barred is not None:
        seen = seen & ~source.barred[columns]
    return columns, seen


def stretches(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    for a in range(first, last, size):
        yield a, min(last, a + size)
