"""What a document was read with, and whether that is what an extension has: the same model, method and declared context, dtype, forms and frequencies.

Knows facts and plain JSON, which may be hostile; no caches, files or formats.
"""

from __future__ import annotations

import json
from typing import Any

from longreach.core.encodings import Rotary
from longreach.hf.facts import Facts
from longreach.hf.fingerprint import fingerprint
from longreach.version import __version__

AGAIN = "read the document again and save it"


def identity(facts: Facts) -> dict[str, Any]:
    """Everything that has to be the same where the document is used again, as plain JSON."""
    rotaries: dict[int, tuple[int, Rotary]] = {}
    layers = []
    for layer, entry in zip(facts.layers, facts.reading.entries, strict=True):
        number = None if layer.rotary is None else rotaries.setdefault(id(layer.rotary), (len(rotaries), layer.rotary))[0]
        forms = [[repr(form), kept.head, kept.tail, kept.block, kept.first] for form, kept in layer.kept.items()]
        layers.append({"heads": entry.heads, "widths": [entry.key_width, entry.value_width], "rotary": number, "forms": forms})
    found = {
        "library": __version__,
        "method": facts.chosen.method.to_json(),
        "context": facts.chosen.context,
        "model": {"architecture": type(facts.model).__name__, "layers": layers, "weights": fingerprint(facts.base)},
        "dtype": sorted({str(entry.dtype).removeprefix("torch.") for entry in facts.reading.entries}),
        "rotaries": [[r.scaling, r.pairing, r.start, r.sign, r.inverse_frequencies.tolist()] for _, r in rotaries.values()],
    }
    return dict(json.loads(json.dumps(found)))


def check(facts: Facts, found: dict[str, Any], file: str) -> None:
    """Raises ValueError, with what to do, unless `found`, the identity that `file` says, is that of these facts."""
    from longreach.methods import from_json

    own = identity(facts)
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
        raise ValueError(f"{file!r} was read with {method}, not with {facts.chosen.method}; attach that: {attach}")
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
