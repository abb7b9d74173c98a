"""The numbers of nano's card: what the embedded model can do inside its window, and how well it knows English.

    python benchmarks/nano_card.py --corpus DIR        # writes results/nano-card.json and the tables of docs/nano.md and of the card in the package

DIR holds `train/` and `validation/` with `*.txt.xz` books. Abilities are asked on the validation books, which nano has not seen. Bits per byte
stand beside an n-gram model of the same number of bytes, trained on the same books with the same tokens, and beside two compressors.
"""

from __future__ import annotations

import argparse
import lzma
import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from common import ROOT, facts, markdown, read_text, write_json, write_section
from ngram import NGram
from rich.console import Console
from tokenizers import Tokenizer

import longreach
from longreach.evals.scores.statistics import wilson

sys.path.insert(0, str(ROOT / "recipes"))
from abilities import KINDS, found, prose_loss, trial
from training_rows import Rows

NGRAM_BYTES = 4  # a stored n-gram with its count in a packed trie: an allowance in favour of the n-gram model


def read(folder: Path) -> list[str]:
    books = [read_text(path) for path in sorted(folder.glob("*.txt.xz"))]
    if not books:
        raise SystemExit(f"no *.txt.xz books in {folder}; pass the folder that holds train/ and validation/ as --corpus")
    return books


def tokens_of(tokenizer: Tokenizer, books: list[str]) -> np.ndarray:
    return np.concatenate([np.asarray(tokenizer.encode(book, add_special_tokens=False).ids, dtype=np.uint16) for book in books])


def questions(model: Any, rows: Rows, books: np.ndarray, window: int, trials: int, seed: int) -> dict[str, Any]:
    result = {}
    for kind in KINDS:
        rng = Random(f"{seed} card {kind}")
        right = sum(found(model, [trial(rows, books, kind, rng, window) for _ in range(trials)]))
        low, high = wilson(right, trials)
        result[kind] = {"found": right, "asked": trials, "interval": [low, high]}
        print(f"{kind:36s} {right}/{trials}", flush=True)
    return result


def by_depth(model: Any, rows: Rows, books: np.ndarray, window: int, trials: int, seed: int) -> list[float]:
    """The standard pass key at ten depths."""
    rng = Random(f"{seed} depth")
    return [sum(found(model, [trial(rows, books, "pass key, standard wording", rng, window, step / 9) for _ in range(trials)])) / trials for step in range(10)]


def english(model: Any, rows: Rows, books: np.ndarray, text_bytes: int, window: int, tokens: int, train: np.ndarray, size: int) -> dict[str, Any]:
    """Bits per byte of unseen books: nano reading windows of its trained length, an n-gram model of the same size."""
    per_token = text_bytes / len(books)
    loss = prose_loss(model, rows, books, window, tokens)
    ngram = NGram(train, 5, rows.vocabulary, most=size // NGRAM_BYTES)
    other = float(ngram.losses(books).mean())
    return {
        "bytes_per_token": per_token,
        "nano": {"nats_per_token": loss, "bits_per_byte": loss / math.log(2) / per_token, "bytes": size, "tokens_read": tokens},
        "ngram": {
            "nats_per_token": other, "bits_per_byte": other / math.log(2) / per_token, "bytes": NGRAM_BYTES * ngram.size, "n_grams": ngram.size,
            "order": 5, "least_count": ngram.least, "tokens_read": len(books),
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=200, help="questions of every kind")
    parser.add_argument("--depth-trials", type=int, default=20, help="pass keys for each of ten depths")
    parser.add_argument("--tokens", type=int, default=200_000, help="unseen tokens for the loss")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/nano-card.json")
    args = parser.parse_args()
    console = Console(stderr=True)
    model, tokenizer = longreach.load("nano")
    window = model.config.max_position_embeddings
    core = tokenizer.backend_tokenizer
    unseen = read(args.corpus / "validation")
    books, train = tokens_of(core, unseen), tokens_of(core, read(args.corpus / "train"))
    rows = Rows(core, books)
    size = sum(p.numel() for p in model.parameters()) * 2  # bf16, as it is shipped
    result: dict[str, Any] = {"facts": facts(torch.device("cpu")), "window": window, "parameters": size // 2}
    result["questions"] = questions(model, rows, books, window, args.trials, args.seed)
    result["pass_key_by_depth"] = by_depth(model, rows, books, window, args.depth_trials, args.seed)
    text = "\n\n".join(unseen).encode()
    with console.status("counting n-grams"):
        result["english"] = english(model, rows, books, len(text), window, args.tokens, train, size)
    result["english"]["xz"] = {"bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text)}
    write_json(args.out, result)
    abilities, language = tables(result)
    write_section(ROOT / "docs/nano.md", "abilities", abilities)
    write_section(ROOT / "docs/nano.md", "english", language)
    write_section(ROOT / "src/longreach/nano/README.md", "abilities", abilities + "\n\n" + language)
    print(abilities, language, sep="\n\n")


def tables(result: dict[str, Any]) -> tuple[str, str]:
    rows = []
    for kind, row in result["questions"].items():
        low, high = row["interval"]
        rows.append([kind, f"{100 * row['found'] / row['asked']:.1f} %", f"{100 * low:.0f} to {100 * high:.0f} %"])
    depths = ", ".join(f"{100 * d:.0f}" for d in result["pass_key_by_depth"])
    asked = next(iter(result["questions"].values()))["asked"]
    abilities = markdown(["question", "answered", "95 % interval"], rows)
    abilities += f"\n\n{asked} questions of a kind. Standard pass key by depth, 0 to 100 % of the text in ten steps: {depths} %."
    e = result["english"]

    def numbers(row: dict[str, float]) -> list[str]:
        return [f"{row['bits_per_byte']:.3f}", f"{row['nats_per_token']:.3f}", f"{row['bytes']:,}"]

    language = markdown(
        ["unseen books", "bits per byte", "nats per token", "bytes"],
        [
            ["nano, windows of its trained length", *numbers(e["nano"])],
            [f"{e['ngram']['order']}-gram model of the same size", *numbers(e["ngram"])],
            ["xz -9", f"{e['xz']['bits_per_byte']:.3f}", "", ""],
        ],
    )
    return abilities, language


if __name__ == "__main__":
    main()
