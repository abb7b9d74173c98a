"""Sealing: which entries of a store are blocks of a log, and how a log goes on with a store that it holds the beginning of.

Knows stores, their buffers and logs; not models, methods or what else a document says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from longreach.core.segments import Form
from longreach.memory import sealed
from longreach.memory.buffer import Buffer
from longreach.memory.contiguous import Contiguous
from longreach.memory.placement import ROLLBACK, Placement
from longreach.memory.records import Key, Record
from longreach.memory.sealed import Blocks, Log, Manifest
from longreach.memory.store import Filed, Store


def buffers(store: Store) -> Iterator[tuple[int, str, Buffer]]:
    """-> layer, the name of the form in it, buffer. Raises ValueError for a memory that has none."""
    for index, layer in enumerate(store.layers):
        if not isinstance(layer, Contiguous):
            raise ValueError(f"{type(layer).__name__} cannot be saved to a document or loaded from one; leave out memory=")
        for number, buffer in enumerate((layer.whole, *(layer.tails.values() if layer.whole.placement.shared else ()))):
            yield index, f"values.{number}", buffer
        for number, buffer in enumerate(layer.keys.values()):
            yield index, f"keys.{number}", buffer


def form_of(store: Store, index: int, name: str) -> Form | None:
    """The form that has a name in `buffers`; None: values."""
    layer = store.layers[index]
    assert isinstance(layer, Contiguous)
    return None if name.startswith("values.") else list(layer.keys)[int(name.removeprefix("keys."))]


def horizon(placement: Placement) -> list[int]:
    """Entries of every row that are sealed: whole blocks that no crop is expected to reach. Bounded forms move, and are small."""
    return [0 if placement.tail is not None else max(0, end - ROLLBACK) // sealed.BLOCK * sealed.BLOCK for end in placement.ends]


def require_own(folder: Path, store: Store) -> None:
    """Raises ValueError where a folder, which nobody else writes to meanwhile, holds something else than this store has put there, or comes from."""
    state = None if store.filed is None else store.filed.state
    if os.path.lexists(folder / sealed.MANIFEST) and sealed.read(folder).facts.get("state") != state:
        raise ValueError(
            f"{str(folder)!r} holds something else than this reading has put there, so another one keeps a text in it too; nothing was written over: let one "
            "end before the other begins, or name a folder for each"
        )


def append(store: Store, folder: Path, manifest: Manifest | None, state: str | None, ahead: Sequence[Sequence[int]] = ()) -> tuple[Blocks, ...]:
    """Write the blocks of a store that the log in a folder does not hold yet -> the log, which nothing names so far. Raises OSError.

    manifest  what counts in the folder; None: nothing that can be read.
    state     of the log there, if it is of the same model and method; None: it is not, so everything is written anew.
    ahead     `horizon` of every placement as the log there has it, if that is known: where all of it still counts, nothing is made of what was written before.

    The store knows by the state of a log that it was saved there or comes from there, and how many tokens are the same since. Ids alone would not do: the
    same text read in other chunks is rounded otherwise. A crop takes blocks from the end of the log; what is left of the one that it cuts is in the tail.
    """
    counted = () if manifest is None else manifest.blocks
    filed = store.filed if store.filed is not None and store.filed.state == state else None
    if filed is not None and _all_counts(store, filed, ahead) and _intact(folder, counted):
        wanted, beginning, have = dict(_blocks(store, ahead)), counted, set[Key]()
    else:
        wanted = dict(_blocks(store))
        beginning, have = ((), set()) if filed is None else _held(store, folder, counted, wanted)
    with sealed.Writer(folder, beginning, counted) as log:
        for key, buffer in wanted.items():
            if key not in have:
                log.append(key, buffer.view(slice(key.row, key.row + 1), key.first, key.first + sealed.BLOCK)[0])
        return log.finish()


def _blocks(store: Store, ahead: Sequence[Sequence[int]] = ()) -> Iterator[tuple[Key, Buffer]]:
    """All that are to be sealed behind `ahead`, those of the same tokens together, so that what a crop cuts off is at the end of the log."""
    horizons = {id(placement): horizon(placement) for placement in store.placements.values()}
    starts = dict(zip(horizons, ahead or [[0] * store.rows] * len(horizons), strict=True))
    for first in range(min(map(min, starts.values())), max(map(max, horizons.values())), sealed.BLOCK):
        for layer, form, buffer in buffers(store):
            for row, (start, stop) in enumerate(zip(starts[id(buffer.placement)], horizons[id(buffer.placement)], strict=True)):
                if start <= first < stop:
                    yield Key(layer, row, form, first), buffer


def _all_counts(store: Store, filed: Filed, ahead: Sequence[Sequence[int]]) -> bool:
    """Whether what lies in the log up to `ahead` are tokens that the store still has, and would seal today."""
    placements = store.placements.values()
    if not store.rows or len(ahead) != len(placements) or any(len(stops) != store.rows for stops in ahead):
        return False
    for placement, stops in zip(placements, ahead, strict=True):
        same = map(placement.kept.entries, filed.lengths)
        if any(stop > min(length, sealing) for stop, length, sealing in zip(stops, same, horizon(placement), strict=True)):
            return False
    return True


def _intact(folder: Path, counted: tuple[Blocks, ...]) -> bool:
    try:
        Log(folder, counted, indexed=False)
    except ValueError:
        return False
    return True


def _held(store: Store, folder: Path, counted: tuple[Blocks, ...], wanted: Mapping[Key, Buffer]) -> tuple[tuple[Blocks, ...], set[Key]]:
    """-> the beginning of the log that the store goes on from, and its blocks."""
    try:
        log = Log(folder, counted)
    except ValueError:  # damaged: the store has everything, and writes it anew
        return (), set()
    lengths = [0] * store.rows if store.filed is None else store.filed.lengths

    def kept(record: Record) -> bool:
        buffer = wanted.get(record.key)
        return buffer is not None and record.last <= buffer.placement.kept.entries(lengths[record.key.row])

    beginning = log.beginning(kept)
    ends = {file.number: file.bytes for file in beginning}
    return beginning, {key for key, (file, record) in log.index.items() if record.stop <= ends.get(file.number, 0)}
