"""Documents: what a cache has read, saved to a folder, loaded again, or forked. Continuing is bit-equal in all three.

The folder is a log of sealed blocks (`memory.sealed`). Of every form that keeps all tokens, the blocks that lie behind the rollback horizon are records,
written once; the rest is the tail, a safetensors file that is written anew with every save: the last tokens, first tokens, bounded forms, ids, mask and
notes. A cache that was saved to the folder or loaded from it, and has gone on since, appends; every other is written anew beside what is there. In both cases
the manifest takes its place in one step, so the folder holds the old document or the new one.

Knows caches, facts and what is said of a document; how blocks lie in files is in the room `memory`. A folder is input that may be hostile: nothing in it is
executed, every size and index is checked before it is used, and it is refused unless it belongs to this very model, method and declared context.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from longreach import files
from longreach.core.choice import OfQueries
from longreach.core.segments import Form, Summary
from longreach.hf.cache import place, store_of
from longreach.hf.facts import Entry
from longreach.hf.forward import Forward
from longreach.hf.identity import AGAIN, check, identity
from longreach.hf.placement import device_of
from longreach.memory import sealed, sealing
from longreach.memory.blocks import in_blocks
from longreach.memory.buffer import Buffer
from longreach.memory.contiguous import Contiguous
from longreach.memory.placement import Placement
from longreach.memory.records import Key
from longreach.memory.sealed import Log, Manifest
from longreach.memory.store import Filed, Store

LARGEST = 256 * 2**30
KEY = "longreach"  # what formats 1 and 2, which were single files, said in their metadata
NOTE = "note."  # the caller's notes in the metadata of the tail


@dataclass(frozen=True, eq=False)
class Document:
    """A read document.

    cache  goes to `model.generate(..., past_key_values=...)`; continue from `extension.fork(cache)` to use it more than once.
    ids    [B, T] the tokens that it holds, pads included; None if they were not saved.
    mask   [B, T] 1 where `ids` is a token, 0 at pads: the beginning of the `attention_mask` to continue with; None if nothing is a pad.
    notes  what the caller saved beside it.
    """

    cache: DynamicCache
    ids: torch.Tensor | None
    mask: torch.Tensor | None
    notes: dict[str, str]


def fork(forward: Forward, cache: Any) -> DynamicCache:
    return _placed(forward, _own_store(forward, cache).fork())


def facts(file: Path) -> dict[str, Any]:
    """What a document says about itself: `method` as JSON, `context`, `model`, `library`, `seen`."""
    return _manifest(file).facts


def size(file: Path) -> int:
    """Bytes that a document takes, without its manifest."""
    return _manifest(file).nbytes


def writable(file: Path) -> None:
    """Raises ValueError, with the fix, where a folder that is there already is not for a document to be saved in."""
    sealed.writable(file)


def save(forward: Forward, cache: Any, file: Path, ids: Any, notes: Mapping[str, str], alone: bool = False) -> None:
    """Write a cache that `forward` filled to the folder `file`, which holds all of it afterwards, or what it held before.

    ids    [B, T] or a list: the tokens that the cache has read, to verify and to continue with. After `generate` the cache has not read
           the last new token, so they are `sequence[:, :cache.get_seq_length()]`.
    notes  names and texts to keep beside it.
    alone  raise ValueError where the folder holds something else than this cache has put there, or comes from. No other process can get in between.
    """
    own = _own_store(forward, cache)
    store = own.fork()
    if forward.eviction is not None:
        raise ValueError(
            f"what {forward.facts.chosen.method.name} keeps depends on the turns that came, and cannot be saved as a document; keep the text and read it "
            "again, or use a method that forgets by place, such as StreamingLLM"
        )
    if not any(store.lengths):
        raise ValueError("this cache is empty, so there is nothing to save; let the model read a document first: model(ids, past_key_values=cache)")
    tensors: dict[str, torch.Tensor] = {}
    if ids is not None:
        tensors["ids"] = _checked_ids(ids, store)
    if store.real is not None:
        tensors["mask"] = store.real.contiguous()
    dtypes = {entry.dtype for entry in forward.facts.reading.entries}
    for index, form, buffer in sealing.buffers(store):
        for part, tensor in buffer.entries(sealing.horizon(buffer.placement)).items():
            if tensor.dtype not in dtypes:
                raise ValueError(f"the model was cast to {tensor.dtype} after extend(), which measured it as it was before; remove() and extend() again")
            tensors[f"layers.{index}.{form}.{part}"] = tensor
    state = secrets.token_hex(16)
    places = [{"firsts": p.firsts, "ends": p.ends, "sealed": sealing.horizon(p)} for p in store.placements.values()]
    said = {**identity(forward.facts), "rows": store.rows, "seen": store.seen, "places": places, "block": sealed.BLOCK, "state": state}
    said = json.loads(json.dumps(said))
    metadata = {KEY: "tail", **{f"{NOTE}{name}": text for name, text in notes.items()}}
    with _folder(file) as folder:
        if alone:
            sealing.require_own(folder, own)
        before = _counting(folder)
        same = None if before is None else _same(before.facts, said)
        written = sealing.append(store, folder, before, same, () if before is None else _ahead(before.facts))
        try:
            tail = sealed.tail(folder, lambda part: save_file(tensors, part, metadata))
        except SafetensorError as error:
            raise ValueError(f"{str(file)!r} could not be written ({error}); free some space or name another folder") from error
        sealed.commit(folder, Manifest(written, tail, said))
    own.filed = Filed(state, [*store.lengths])


def load(forward: Forward, file: Path, max_bytes: int) -> Document:
    found = _manifest(file)
    folder = Path(os.path.realpath(file))
    with files.held(folder, shared=True):
        found = sealed.read(folder)
        if found.nbytes > max_bytes:
            raise ValueError(f"{str(file)!r} has {found.nbytes} bytes, more than the limit of {max_bytes}; pass max_bytes={found.nbytes} if you trust it")
        check(forward.facts, found.facts, str(file))
        if found.tail is None:
            raise ValueError(f"{str(file)!r} holds blocks but no document; {AGAIN}")
        log, tail = Log(folder, found.blocks), sealed.verified(folder, found.tail)
        try:
            with safe_open(tail, framework="pt") as opened:
                store, ids = _read(forward, opened, log, found.facts)
                notes = {name.removeprefix(NOTE): text for name, text in (opened.metadata() or {}).items() if name.startswith(NOTE)}
        except (_Contradiction, LookupError, TypeError, AttributeError, OverflowError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{str(file)!r} contradicts itself ({error or type(error).__name__}), so it is damaged or forged; {AGAIN}") from error
    device = device_of(forward.facts.model)
    ids, mask = (None if tensor is None else tensor.long().to(device) for tensor in (ids, store.real))
    return Document(_placed(forward, store), ids, mask, notes)


def _placed(forward: Forward, store: Store) -> DynamicCache:
    return place(DynamicCache(), store, forward.calls)[0]


def _own_store(forward: Forward, cache: Any) -> Store:
    store = store_of(cache)
    if store is None:
        raise ValueError("this cache was not filled by an extended model; read the document with extend() in force: model(ids, past_key_values=cache)")
    if cache.layers[0].calls is not forward.calls:
        raise ValueError("this cache was filled under another extension; call its save() or fork(), or read the document again under this one")
    return store


def _checked_ids(ids: Any, store: Store) -> torch.Tensor:
    found = torch.as_tensor(ids).detach().cpu()
    found = found[None] if found.dim() == 1 else found
    if list(found.shape) != [store.rows, store.seen] or found.is_floating_point():
        raise ValueError(
            f"ids of shape {list(found.shape)} are not the tokens that the cache has read, {store.rows} rows of {store.seen}; "
            "pass ids[:, :cache.get_seq_length()]"
        )
    return found.long().contiguous()


def _counting(folder: Path) -> Manifest | None:
    """What a folder holds now, if it can be read."""
    try:
        return sealed.read(folder)
    except ValueError:
        return None


def _same(before: Mapping[str, Any], said: Mapping[str, Any]) -> str | None:
    """The state of a document that was read with what this one was."""
    changing = {name: said[name] for name in ("library", "seen", "places", "state")}
    return before.get("state") if {**before, **changing} == said else None


def _ahead(before: Mapping[str, Any]) -> list[list[int]]:
    """The entries of every row that are in blocks, of every placement; none where what is said of it makes no sense."""
    try:
        found = [place["sealed"] for place in before["places"]]
        return found if all(isinstance(stops, list) and all(map(_count, stops)) for stops in found) else []
    except (KeyError, TypeError):
        return []


@contextmanager
def _folder(file: Path) -> Iterator[Path]:
    """A folder to write to; what is unfinished or replaced goes, whatever happens inside."""
    made = not os.path.lexists(file)
    folder = files.folder(file, "document")
    try:
        with files.held(folder), files.said(file):
            sealed.writable(folder)
            sealed.recover(folder)
            if made:
                files.sync(folder.parent)
            try:
                yield folder
            except BaseException:
                with suppress(OSError):
                    sealed.recover(folder)
                raise
            sealed.recover(folder)
    except BaseException:
        if made and not os.listdir(folder):
            folder.rmdir()
        raise


# -- reading ----------------------------------------------------------------------------------------------------------------------------


def _manifest(file: Path) -> Manifest:
    if file.is_file():
        raise ValueError(_earlier(file))
    if not os.path.lexists(file / sealed.MANIFEST):
        there = f"{str(file)!r} is a folder, but no document of Longreach" if file.is_dir() else f"there is no document {str(file)!r}"
        raise ValueError(f"{there}; save one first: extension.save(cache, folder, ids), or longreach run --save-document FOLDER")
    return sealed.read(file)


def _earlier(file: Path) -> str:
    """What to do with a file where a folder is expected: it may be a document of an earlier format."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            version = json.loads(metadata[KEY])["format"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError):
        return f"{str(file)!r} is a file and no document of Longreach, which is a folder; pass one that extension.save or --save-document wrote"
    text = ""
    if f"{NOTE}document" in metadata:
        text = f"; its text is in the file: safetensors.safe_open(FILE, 'pt').metadata()[{NOTE + 'document'!r}]"
    return (
        f"{str(file)!r} is a document of format {version!r}, a single file, and this version of Longreach reads folders of format {sealed.FORMAT}; "
        f"read its text again and save it: longreach run --file TEXT --context N --save-document FOLDER, or extension.save(cache, folder, ids){text}"
    )


def _read(forward: Forward, opened: Any, log: Log, found: dict[str, Any]) -> tuple[Store, torch.Tensor | None]:
    names = set(opened.keys())
    rows, seen, block = found["rows"], found["seen"], found["block"]
    _require(_count(rows) and rows > 0 and _count(seen) and seen > 0 and _count(block) and block > 0, "rows and slots are no counts")
    mask = opened.get_tensor("mask") if "mask" in names else None
    _require(mask is None or (mask.dtype == torch.bool and list(mask.shape) == [rows, seen]), "the mask has another shape")
    ids = opened.get_tensor("ids") if "ids" in names else None
    _require(ids is None or (ids.dtype == torch.int64 and list(ids.shape) == [rows, seen]), "the ids have another shape")
    vocabulary = forward.facts.model.get_input_embeddings().weight.shape[0]
    _require(ids is None or (int(ids.min()) >= 0 and int(ids.max()) < vocabulary), "an id is not in the vocabulary")
    _require(rows <= max((opened.get_slice(name).get_shape()[0] for name in names), default=0), "no tensor has that many rows")
    store = forward.new_store()
    store.restore([seen] * rows if mask is None else mask.sum(1).tolist(), seen, mask)
    places = found["places"]
    _require(isinstance(places, list) and len(places) == len(store.placements), "its places are not those of the method")
    ahead = {id(p): _place(p, where, store.lengths, block) for where, p in zip(places, store.placements.values(), strict=True)}
    used = {"mask", "ids"} & names
    blocks = dict(log.index)
    for index, form, buffer in sealing.buffers(store):
        _require(_complete(blocks, Key(index, 0, form, 0), ahead[id(buffer.placement)], block), f"blocks of layers.{index}.{form} are missing")
    _require(not blocks, "it holds blocks that belong nowhere")
    buffers: dict[tuple[int, str], Buffer] = {}
    kinds: dict[tuple[int, str], tuple[Any, ...]] = {}
    for index, form, buffer in sealing.buffers(store):
        entry = forward.facts.reading.entries[index]
        heads, width, dtype = _kind(entry, sealing.form_of(store, index, form))
        entry = entry._replace(heads=heads, dtype=dtype, device=forward.facts.device_of_layer(index))
        buffers[index, form], kinds[index, form] = buffer, ((heads, block, width), dtype)
        used |= _fill(opened, f"layers.{index}.{form}", buffer, (heads, width), entry, ahead[id(buffer.placement)])
    _require(used == names, "it holds tensors that belong nowhere")
    _require(all((record.shape, record.dtype) == kinds[key.layer, key.form] for key, (_, record) in log.index.items()), "a block has another shape or dtype")
    if store.blocked is not None and (place := store.placements.get(None)) is not None:
        store.blocked.require(store.placements, store.layers, more=sum(ahead[id(place)]) // place.unit)
    for key in log.index:  # in the order of the files, so that each is mapped once
        buffers[key.layer, key.form].receive(key.row, key.first, log.read(key))
    for layer in store.layers:
        if isinstance(layer, Contiguous):
            layer.complete()
    store.filed = Filed(str(found["state"]), [*store.lengths])
    return store, ids


def _kind(entry: Entry, form: Form | None) -> tuple[int, int, torch.dtype]:
    """Heads, width and dtype of what is kept in a form; None: of values."""
    if form is None:
        return entry.heads, entry.value_width, entry.dtype
    if isinstance(form, OfQueries):
        return (entry.queries, entry.key_width, entry.dtype) if form.what == "q" else (entry.queries, 1, torch.float32)
    times = form.index.numbers(entry.queries // entry.heads) if isinstance(form, Summary) else 1
    return entry.heads, entry.key_width * times, entry.dtype


def _place(placement: Placement, where: dict[str, Any], lengths: list[int], block: int) -> list[int]:
    """Restore one placement -> the entries of every row that are in blocks. What it keeps has to be what its tail needs at these lengths."""
    firsts, ends, ahead, tail = where["firsts"], where["ends"], where["sealed"], placement.tail
    _require(all(isinstance(x, list) and len(x) == len(lengths) and all(map(_count, x)) for x in (firsts, ends, ahead)), "there are no places for its rows")
    for first, end, stop, length in zip(firsts, ends, ahead, map(placement.kept.entries, lengths), strict=True):
        _require(end == length and (tail == 0 or first <= (0 if tail is None else max(0, length - tail + 1))), "it keeps other last tokens")
        _require(stop == 0 or (tail is None and stop < end and stop % block == 0), "its blocks are not of tokens that it keeps")
    placement.restore(firsts, ends)
    if placement.unit > 1:
        in_blocks(placement, ahead)
    return list(ahead)


def _complete(blocks: dict[Key, Any], of: Key, ahead: list[int], block: int) -> bool:
    """Take the blocks of one form out of `blocks` -> whether all are there."""
    return all(blocks.pop(of._replace(row=row, first=first), None) is not None for row, stop in enumerate(ahead) for first in range(0, stop, block))


def _fill(opened: Any, name: str, buffer: Buffer, heads_width: tuple[int, int], entry: Entry, ahead: list[int]) -> set[str]:
    """Restore one buffer but for its blocks -> the names of its tensors."""
    placement = buffer.placement
    starts = [max(first, stop) for first, stop in zip(placement.places.firsts, ahead, strict=True)]
    longest = 0 if placement.tail == 0 else max(end - start for start, end in zip(starts, placement.ends, strict=True))
    found = {}
    for part, length in (("head", buffer.first), ("body", longest)):
        if length:
            shape = [len(placement.ends), heads_width[0], length, heads_width[1]]
            _require(list(opened.get_slice(f"{name}.{part}").get_shape()) == shape, f"{name}.{part} has another shape than {shape}")
            found[part] = opened.get_tensor(f"{name}.{part}").to(entry.device, copy=True)
            _require(found[part].dtype == entry.dtype, f"{name}.{part} has another dtype")
    buffer.restore(found.get("head"), found.get("body"), ahead)
    return {f"{name}.{part}" for part in found}


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _Contradiction(what)


class _Contradiction(Exception):
    """What a document says does not hold together."""
