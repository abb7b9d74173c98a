"""A row of one store becomes a row of another one: what was loaded goes on among others, and what is among others is saved alone.

Knows stores and placements; not models or files.
"""

from __future__ import annotations

import torch

from longreach.memory.store import Store

CHAIN = 4  # bases that a row reads one after the other: each costs every token that follows a call in every layer


def adopt(store: Store, other: Store, its: int) -> int:
    """One more row of `store`, which holds what row `its` of `other` does -> its number. Where it is long it is frozen, and both read it, unless it lies in
    many parts; blocks of tiers are common to both as well; all else is copied. If it fails there is no such row."""
    other.settle()
    other.freeze([its])
    row = store.join()
    try:
        for place, placement in store.placements.items():
            source = other.placements[place]
            whole = len(source.shares[its]) > CHAIN
            placement.occupy(row, () if whole else source.shares[its], (source if whole else source.places).firsts[its], source.ends[its])
        for layer, own in zip(store.layers, other.layers, strict=True):
            layer.adopt(row, own, its)
    except BaseException:
        store.select(torch.arange(row))
        raise
    store.lengths[row], store.offsets[row], store.scores[row] = other.lengths[its], other.offsets[its], other.scores[its]
    if not store.joins:  # it is alone, and its columns are counted
        store.slots.seen = other.lengths[its]
    return row
