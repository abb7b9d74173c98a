"""What the log scale buys: SelfExtend at the dial's parameters, with and without it, keys far away and the loss at the end of the text.

    python benchmarks/log_scale.py --text BOOK ...    # results/log-scale.json and the table of docs/nano.md

A query beyond the trained window sees more keys than any query of the training, and the softmax spreads over all of them. The log scale, an
option of SelfExtend's official code, multiplies the query at index i by max(1, ln(i + 1) / ln(L)). Same texts and keys on both sides.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import ROOT, facts, markdown, one_thread, read_text, write_json, write_section
from methods_on_nano import Plan, Subject, measure
from methods_result import share
from rich.progress import Progress

import longreach
from longreach.methods.selfextend import SelfExtend
from longreach.planning import dial
from longreach.running.loading import shipped_book


def table(result: dict[str, Any]) -> str:
    window, rows = result["window"], []
    for length in result["plan"]["lengths"]:
        plain, scaled = (next(c for c in result["cells"] if c["length"] == length and c["log_scale"] == on) for on in (False, True))
        far = [share(cell, window, far=True) for cell in (plain, scaled)]
        rows.append([f"{length} ({length // window}x)", plain["parameters"], *map(str, far), *(f"{cell['loss'][-1]:.2f}" for cell in (plain, scaled))])
    names = ["far keys without the log scale", "with it", "loss in the last window without", "with it"]
    return markdown(["tokens", "parameters", *names], rows) + "\n\nFar means farther than the trained window; in brackets the 95 % interval."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", type=Path, nargs="*", help="plain or .xz books, joined; the book in the package if not given")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 8, 16], help="in trained windows")
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--keys", type=int, default=4, help="for every depth; half of it from 16 windows on")
    parser.add_argument("--texts", type=int, default=4, help="that the loss is averaged over")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/log-scale.json")
    parser.add_argument("--no-docs", action="store_true", help="leave docs/nano.md alone")
    args = parser.parse_args()
    model, tokenizer = longreach.load(args.model)
    subject = Subject.of(model, tokenizer, "\n\n".join(map(read_text, args.text)) if args.text else shipped_book())
    window = subject.window.tokens
    lengths = tuple(n * window for n in args.lengths)
    plan = Plan(lengths, tuple(args.keys if n < 16 else max(1, args.keys // 2) for n in args.lengths), args.depths, args.texts, args.seed)
    cells = []
    with one_thread(), Progress() as bar:
        task = bar.add_task("SelfExtend", total=2 * len(lengths))
        for length in lengths:
            scaled = dial.choose(subject.window, length).method
            if not isinstance(scaled, SelfExtend):
                raise SystemExit(f"{length} tokens fit the trained window of {window}; pass longer --lengths")
            for method in (replace(scaled, log_scale=None), scaled):
                cells.append({**measure(subject, plan, method, length, lambda weight: None), "log_scale": method.log_scale is not None})
                bar.advance(task)
    result = {"facts": facts(torch.device("cpu")), "model": args.model, "window": window, "plan": vars(plan), "cells": cells}
    write_json(args.out, result)
    print(table(result))
    if not args.no_docs:
        write_section(ROOT / "docs/nano.md", "log-scale", table(result))


if __name__ == "__main__":
    main()
