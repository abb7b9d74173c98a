"""Whether a method that retrieves shows the pass key to the token that writes its next piece, layer by layer: is the model or the index to blame?

    python benchmarks/retrieval.py --length 4k --method infllm --n-local 256 --n-init 16 --block-size 16 --exc-block-size 64
    python benchmarks/retrieval.py --length 4k --method infllm --n-local 256 --n-init 16 --block-size 16 --topk 999

The right key is fed token by token after the prompt, so that every piece is asked for once, whatever was said before it. A layer shows the key if a whole
mention of it gets attention, by `extension.watching`. Keys that lie in the window are left out. `--out` writes every piece as JSON.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from common import device_of, facts, markdown, write_json
from transformers import DynamicCache

import longreach
from longreach.cli import parameters
from longreach.evals import tasks
from longreach.evals.samples.base import Sample, Settings
from longreach.methods.base import Method
from longreach.quantities import token_count
from longreach.running.prompts import encode_with_spans
from longreach.running.reading import stream

DEPTHS = (0.0, 0.25, 0.5, 0.75)


def mentions(text: str, key: str, spans: list[tuple[int, int]]) -> list[list[int]]:
    """The tokens of every place where the prompt has the key."""
    places = [at for at in range(len(text)) if text.startswith(key, at)]
    return [[n for n, (a, b) in enumerate(spans) if a < at + len(key) and b > at] for at in places]


def asked(extension: Any, ids: torch.Tensor, cache: Any, wanted: int, places: list[list[int]]) -> dict[str, Any]:
    """One forward -> whether its last token is followed by the wanted one, and which layers show it the key."""
    with extension.watching(queries=1) as watch:
        logits = extension.model(ids[None], past_key_values=cache).logits
    paid = [mass[0].sum(0) for _, mass in sorted(watch.mass.items())]
    return {"right": int(logits[0, -1].argmax()) == wanted, "shown": [any(bool((mass[place] > 0).all()) for place in places) for mass in paid]}


def measure(extension: Any, tokenizer: Any, sample: Sample, near: int) -> list[dict[str, Any]]:
    """Every piece of a key; none where it lies less than `near` tokens before the end of the prompt."""
    ids, spans = encode_with_spans(tokenizer, sample.parts.text)
    places = mentions(sample.parts.text, sample.references[0], spans)
    if max(map(max, places)) > len(ids) - near:
        return []
    pieces = tokenizer(" " + sample.references[0], add_special_tokens=False)["input_ids"]
    text, cache, early = torch.tensor(ids), DynamicCache(), extension.method.apart(len(ids))
    if early:
        cache = list(stream(extension, text[:early], losses=False, cache=cache))[-1].cache
    found = [asked(extension, text[early:], cache, pieces[0], places)]
    return found + [asked(extension, torch.tensor([before]), cache, wanted, places) for before, wanted in itertools.pairwise(pieces)]


def shares(rows: list[dict[str, Any]]) -> list[str]:
    """Of some pieces: how many, those that are right, and for every layer those to which it shows the key."""
    layers = list(zip(*(row["shown"] for row in rows)))
    return [str(len(rows)), str(sum(row["right"] for row in rows)), *(f"{sum(layer) / len(rows):.2f}" for layer in layers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--length", default="4k")
    parser.add_argument("--dtype")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--book", action="store_true", help="hide keys in Moby-Dick, not in filler that repeats one sentence")
    parser.add_argument("--method", default="infllm")
    parser.add_argument("--out", type=Path)
    args, rest = parser.parse_known_args()
    method: Method = parameters.build(args.method, rest, [])
    model, tokenizer = longreach.load(args.model, dtype=args.dtype)
    text = longreach.shipped_book() if args.book else None
    settings = Settings(lengths=(token_count(args.length, "--length"),), depths=DEPTHS, samples=args.samples, seed=args.seed, text=text)
    with torch.no_grad(), longreach.extend(model, method) as extension:
        near = getattr(method, "n_local", 0) or getattr(method, "window", 0)
        found = [rows for sample in tasks.task("passkey").samples(tokenizer, settings) if (rows := measure(extension, tokenizer, sample, near))]
    pieces = [row for rows in found for row in rows]
    table = [["all", *shares(pieces)]]
    for name, shown in (("shown by all layers", True), ("not shown by all", False)):
        if some := [row for row in pieces if all(row["shown"]) == shown]:
            table.append([name, *shares(some)])
    print(f"{method.brief()} at {args.length}: {sum(all(row['right'] for row in rows) for rows in found)} of {len(found)} far keys written whole")
    print(markdown(["pieces of keys", "", "right", *(f"layer {n}" for n in range(len(pieces[0]["shown"])))], table))
    if args.out is not None:
        write_json(args.out, {"method": method.to_json(), "length": args.length, "facts": facts(device_of("cpu")), "keys": found})


if __name__ == "__main__":
    main()
