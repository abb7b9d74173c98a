"""Turns of a method that evicts: before a turn, tokens leave and those that stay are renumbered; after a forward, its tokens are scored.

Knows a store, layers and logits; not where forwards come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from longreach.core.encodings import Table, exact_device
from longreach.core.eviction import Eviction, Scores
from longreach.core.eviction import begin as begin_turn
from longreach.core.segments import PositionMap
from longreach.engine.batch import Batch
from longreach.engine.layer import RAW, Layer
from longreach.memory.layer import joined
from longreach.memory.past import Past
from longreach.memory.store import Store


def announce(store: Store, turns: tuple[int, ...]) -> None:
    """The next turns of every row are so long. The one under way ends."""
    store.settle()
    store.coming = turns
    known = [scores.cut(length) if scores is not None else Scores() for scores, length in zip(store.scores, store.lengths, strict=True)]
    store.scores = [replace(scores, coming=turns, until=len(scores.values)) for scores in known]


def before(store: Store, layers: Sequence[Layer], eviction: Eviction, counts: Sequence[int]) -> None:
    """Before `counts` new tokens of every row of an open store: where they begin a turn that has no room, tokens leave. If the forward fails, the turn has
    begun, and whoever reads its tokens again goes on with it."""
    for row, count in enumerate(counts):
        if count:
            known = store.scores[row] or Scores(coming=store.coming)
            scores, keep = begin_turn(known.cut(store.lengths[row]), count, eviction)
            if keep is None:
                store.scores[row] = scores
            else:
                retain(store, layers, row, keep, scores)


def retain(store: Store, layers: Sequence[Layer], row: int, keep: torch.Tensor, scores: Scores) -> None:
    """Of the tokens of a row those at `keep` [n], ascending, stay, with the indices 0 .. n - 1. What has to move is read and written again, as the new
    tokens of a forward are: so every memory can do it, nobody else's copy changes, and a failure changes nothing."""
    start, stop, held = int((keep == torch.arange(len(keep))).sum()), len(keep), store.lengths[row]
    past = [Past(start if other == row else length) for other, length in enumerate(store.lengths)]
    store.reserve(past, [stop - start if other == row else 0 for other in range(store.rows)])
    tables: dict[object, Table] = {}
    for layer, memory in zip(layers, store.layers, strict=True) if start < stop else ():
        rows = slice(row, row + 1)
        kv = joined(memory.view(RAW, rows, 0, held, False), 1)
        index = keep[start:].to(kv.k.device)
        k, v = (x.index_select(2, index) for x in (kv.k, kv.v))
        memory.append(rows, start, {positions: _turned(layer, positions, k, start, tables) for positions in layer.forms}, v)
        memory.release()
    store.evict(row, stop, scores)


def _turned(layer: Layer, positions: PositionMap, k: torch.Tensor, start: int, tables: dict[object, Table]) -> torch.Tensor:
    """Raw keys [1, G, n, D] at the positions of the indices from `start` on."""
    if positions == RAW or layer.rest is None:
        return k
    key = id(layer.rotary), positions, k.device
    if key not in tables:
        indices = torch.arange(start, start + k.shape[2], device=exact_device(k.device))
        tables[key] = layer.rest.table(positions(indices)).to(k.device)
    return tables[key].rotate(k)


def after(batch: Batch, ids: torch.Tensor, logits: torch.Tensor, eviction: Eviction) -> list[Scores | None]:
    """The scores of every row once the tokens of a forward count: ids [B, T], logits [B, T, V]."""
    assert batch.store is not None
    found = [*batch.store.scores]
    for group in batch.groups:
        for row in range(group.rows.start, group.rows.stop):
            scores, columns = found[row], group.columns_on(logits.device)
            assert scores is not None
            found[row] = scores.cut(group.start).read(ids[row][columns], logits[row][columns].detach(), eviction)
    return found
