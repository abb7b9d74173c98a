"""Documents: what a cache has read, saved to one safetensors file, loaded again, or forked. Continuing is bit-equal in all three.

Knows caches, facts and the format of the file; how tensors are kept is in the room `memory`. A file is input that may be hostile:
nothing in it is executed, every size and index is checked before it is used, and it is refused unless it belongs to this very model,
method and declared context.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from longreach import files
from longreach.core.encodings import Rotary
from longreach.hf.cache import place, store_of
from longreach.hf.facts import Entry, Facts
from longreach.hf.fingerprint import fingerprint
from longreach.hf.forward import Forward
from longreach.hf.placement import device_of
from longreach.memory.buffer import Buffer
from longreach.memory.placement import Placement
from longreach.memory.store import Store
from longreach.version import __version__

FORMAT = 2
LARGEST_FILE = 256 * 2**30
KEY = "longreach"  # our facts in the metadata of the file; notes of the caller stand beside it under "note."
NOTE = "note."
AGAIN = "read the document again and save it"


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


def save(forward: Forward, cache: Any, file: Path, ids: Any, notes: Mapping[str, str]) -> None:
    """Write a cache that `forward` filled to `file`, which exists afterwards as a whole or as it was before.

    ids    [B, T] or a list: the tokens that the cache has read, to verify and to continue with. After `generate` the cache has not read
           the last new token, so they are `sequence[:, :cache.get_seq_length()]`.
    notes  names and texts to keep beside it.
    """
    store = _own_store(forward, cache).fork()
    if not any(store.lengths):
        raise ValueError("this cache is empty, so there is nothing to save; let the model read a document first: model(ids, past_key_values=cache)")
    tensors: dict[str, torch.Tensor] = {}
    if ids is not None:
        tensors["ids"] = _checked_ids(ids, store)
    if store.real is not None:
        tensors["mask"] = store.real.contiguous()
    places = [{"firsts": placement.firsts, "ends": placement.ends} for placement in store.placements.values()]
    dtypes = {entry.dtype for entry in forward.facts.reading.entries}
    for _, name, buffer in _buffers(store):
        for part, tensor in buffer.entries().items():
            if tensor.dtype not in dtypes:
                raise ValueError(f"the model was cast to {tensor.dtype} after extend(), which measured it as it was before; remove() and extend() again")
            tensors[f"{name}.{part}"] = tensor
    facts = {**_identity(forward.facts), "rows": store.rows, "seen": store.seen, "places": places}
    metadata = {KEY: json.dumps(facts, allow_nan=False), **{f"{NOTE}{name}": text for name, text in notes.items()}}
    try:
        files.write_by(file, lambda part: save_file(tensors, part, metadata), "document")
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} could not be written ({error}); free some space or name another file") from error


def facts(file: Path, max_bytes: int = LARGEST_FILE) -> dict[str, Any]:
    """What a file says about itself: `method` as JSON, `context`, `model`, `library`, `seen`."""
    with _opened(file, max_bytes) as opened:
        return _facts(file, opened)


def load(forward: Forward, file: Path, max_bytes: int) -> Document:
    with _opened(file, max_bytes) as opened:
        found = _facts(file, opened)
        _check_identity(forward, found, str(file))
        try:
            store, ids = _read(forward, opened, found)
        except (_Damaged, LookupError, TypeError, AttributeError, OverflowError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{str(file)!r} contradicts itself ({error or type(error).__name__}), so it is damaged or forged; {AGAIN}") from error
        notes = {name.removeprefix(NOTE): text for name, text in opened.metadata().items() if name.startswith(NOTE)}
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


def _buffers(store: Store) -> Iterator[tuple[int, str, Buffer]]:
    """-> layer, name, buffer."""
    for index, layer in enumerate(store.layers):
        for number, buffer in enumerate((layer.whole, *layer.tails.values())):
            yield index, f"layers.{index}.values.{number}", buffer
        for number, buffer in enumerate(layer.keys.values()):
            yield index, f"layers.{index}.keys.{number}", buffer


# -- identity -----------------------------------------------------------------------------------------------------------------------


def _identity(facts: Facts) -> dict[str, Any]:
    """Everything that has to be the same where the document is used again, as plain JSON."""
    rotaries: dict[int, tuple[int, Rotary]] = {}
    layers = []
    for layer, entry in zip(facts.layers, facts.reading.entries, strict=True):
        number = None if layer.rotary is None else rotaries.setdefault(id(layer.rotary), (len(rotaries), layer.rotary))[0]
        forms = [[repr(positions), kept.head, kept.tail] for positions, kept in layer.forms.items()]
        layers.append({"heads": entry.heads, "widths": [entry.key_width, entry.value_width], "rotary": number, "forms": forms})
    found = {
        "format": FORMAT,
        "library": __version__,
        "method": facts.chosen.method.to_json(),
        "context": facts.chosen.context,
        "model": {"architecture": type(facts.model).__name__, "layers": layers, "weights": fingerprint(facts.base)},
        "dtype": sorted({str(entry.dtype).removeprefix("torch.") for entry in facts.reading.entries}),
        "rotaries": [[r.scaling, r.pairing, r.start, r.sign, r.inverse_frequencies.tolist()] for _, r in rotaries.values()],
    }
    return dict(json.loads(json.dumps(found)))


def _check_identity(forward: Forward, found: dict[str, Any], file: str) -> None:
    from longreach.methods import from_json

    own = _identity(forward.facts)
    shape = lambda model: (model["architecture"], [(layer["heads"], layer["widths"]) for layer in model["layers"]])  # noqa: E731
    try:
        same_shape = shape(found["model"]) == shape(own["model"])
        forms = [[layer[name] for name in ("rotary", "forms")] for layer in found["model"]["layers"]]
        method, context = from_json(found["method"]), found["context"]
        described = f"{found['model']['architecture']} of {len(found['model']['layers'])} layers"
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file!r} does not say what it was read with ({error}); {AGAIN} with this version of Longreach") from error
    attach = f"longreach.extend(model, longreach.from_json({json.dumps(found['method'])}), context={context})"
    if not same_shape:
        mine = f"{own['model']['architecture']} of {len(own['model']['layers'])} layers"
        raise ValueError(f"{file!r} was read with another model ({described}; this is {mine}, or their keys differ in shape); load that one, or {AGAIN}")
    if found.get("dtype") != own["dtype"]:
        raise ValueError(f"{file!r} was read in {found.get('dtype')} and this model computes in {own['dtype']}; load it with that dtype, or {AGAIN}")
    if found["method"] != own["method"]:
        raise ValueError(f"{file!r} was read with {method}, not with {forward.facts.chosen.method}; attach that: {attach}")
    if context != own["context"]:
        raise ValueError(f"{file!r} was read for a context of {context} tokens, not of {own['context']}; attach it so: {attach}")
    if forms != [[layer[name] for name in ("rotary", "forms")] for layer in own["model"]["layers"]]:
        raise ValueError(f"{file!r} keeps keys in other forms than this extension (version {found.get('library')}, or backend='reference'); {AGAIN}")
    if not _same_rotaries(found.get("rotaries"), own["rotaries"]):
        raise ValueError(f"the keys in {file!r} are rotated by other frequencies than this extension's; pass the trained_window it was read with, or {AGAIN}")
    if found["model"].get("weights") != own["model"]["weights"]:
        raise ValueError(f"{file!r} was read with other weights (or adapters) of the same architecture; load the checkpoint it was read with, or {AGAIN}")


def _same_rotaries(found: Any, own: list[Any]) -> bool:
    """Frequencies may differ by rounding between devices."""
    try:
        return len(found) == len(own) and all(
            a[1:4] == b[1:4] and len(a[4]) == len(b[4]) and all(abs(x - y) <= 1e-5 * abs(y) for x, y in zip([a[0], *a[4]], [b[0], *b[4]], strict=True))
            for a, b in zip(found, own, strict=True)
        )
    except (TypeError, IndexError, KeyError):
        return False


# -- reading --------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(file: Path, max_bytes: int) -> Iterator[Any]:
    if not file.is_file():
        raise ValueError(f"there is no document {str(file)!r}; save one first: extension.save(cache, file, ids), or longreach run --save-document FILE")
    if (size := file.stat().st_size) > max_bytes:
        raise ValueError(f"{str(file)!r} has {size} bytes, more than the limit of {max_bytes}; pass max_bytes={size} if you trust it")
    try:
        opened = safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{str(file)!r} is no whole safetensors file ({error}); copy it again, or {AGAIN}") from error
    with opened as inside:
        yield inside


def _facts(file: Path, opened: Any) -> dict[str, Any]:
    try:
        found = json.loads((opened.metadata() or {})[KEY])
        version = found["format"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{str(file)!r} is a safetensors file but no document of Longreach; pass one that extension.save or --save-document wrote") from None
    if version != FORMAT:
        raise ValueError(f"{str(file)!r} has format {version!r} and this version of Longreach reads {FORMAT}; install the version that wrote it, or {AGAIN}")
    return dict(found)


def _read(forward: Forward, opened: Any, found: dict[str, Any]) -> tuple[Store, torch.Tensor | None]:
    names = set(opened.keys())
    rows, seen = found["rows"], found["seen"]
    _require(_count(rows) and rows > 0 and _count(seen) and seen > 0, "rows and slots are no counts")
    mask = opened.get_tensor("mask") if "mask" in names else None
    _require(mask is None or (mask.dtype == torch.bool and list(mask.shape) == [rows, seen]), "the mask has another shape")
    ids = opened.get_tensor("ids") if "ids" in names else None
    _require(ids is None or (ids.dtype == torch.int64 and list(ids.shape) == [rows, seen]), "the ids have another shape")
    vocabulary = forward.facts.model.get_input_embeddings().weight.shape[0]
    _require(ids is None or (int(ids.min()) >= 0 and int(ids.max()) < vocabulary), "an id is not in the vocabulary")
    _require(rows <= max(opened.get_slice(name).get_shape()[0] for name in names), "no tensor has that many rows")
    store = forward.new_store()
    store.restore([seen] * rows if mask is None else mask.sum(1).tolist(), seen, mask)
    places = found["places"]
    _require(isinstance(places, list) and len(places) == len(store.placements), "its places are not those of the method")
    for where, placement in zip(places, store.placements.values(), strict=True):
        _place(placement, where, store.lengths)
    used = {"mask", "ids"} & names
    for index, name, buffer in _buffers(store):
        entry = forward.facts.reading.entries[index]._replace(device=forward.facts.device_of_layer(index))
        width = entry.value_width if ".values." in name else entry.key_width
        used |= _fill(opened, name, buffer, (entry.heads, width), entry)
    _require(used == names, "it holds tensors that belong nowhere")
    return store, ids


def _place(placement: Placement, where: dict[str, Any], lengths: list[int]) -> None:
    """Restore one placement. What it keeps has to be what its tail needs at these lengths."""
    firsts, ends, tail = where["firsts"], where["ends"], placement.tail
    _require(all(isinstance(x, list) and len(x) == len(lengths) and all(map(_count, x)) for x in (firsts, ends)), "there are no places for its rows")
    for first, end, length in zip(firsts, ends, lengths, strict=True):
        _require(end == length and (tail == 0 or first <= (0 if tail is None else max(0, length - tail + 1))), "it keeps other last tokens")
    placement.restore(firsts, ends)


def _fill(opened: Any, name: str, buffer: Buffer, heads_width: tuple[int, int], entry: Entry) -> set[str]:
    """Restore one buffer -> the names of its tensors."""
    placement = buffer.placement
    longest = 0 if placement.tail == 0 else max(end - first for first, end in zip(placement.places.firsts, placement.ends, strict=True))
    found = {}
    for part, length in (("head", buffer.first), ("body", longest)):
        if length:
            shape = [len(placement.ends), heads_width[0], length, heads_width[1]]
            _require(list(opened.get_slice(f"{name}.{part}").get_shape()) == shape, f"{name}.{part} has another shape than {shape}")
            found[part] = opened.get_tensor(f"{name}.{part}").to(entry.device, copy=True)
            _require(found[part].dtype == entry.dtype, f"{name}.{part} has another dtype")
    buffer.restore(found.get("head"), found.get("body"))
    return {f"{name}.{part}" for part in found}


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _Damaged(what)


class _Damaged(Exception):
    """What a file says does not hold together."""
