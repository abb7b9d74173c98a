"""The README's picture and table: `longreach demo` on more books, with more keys.

    python benchmarks/nano_reach.py --text BOOK ...    # writes results/nano-reach.json, docs/reach.png, the table of README.md and those of docs/nano.md

Stock, SelfExtend (parameters chosen by the dial) and LM-Infinite (n_local = the trained window) read the same texts and are asked for the same
keys. What counts as found, and what is measured, is `longreach.apps.demo`. Without --text the book in the package is read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from common import ROOT, facts, markdown, read_text, write_json, write_section
from rich.progress import Progress, TimeRemainingColumn

import longreach
from longreach.apps import demo
from longreach.drawing import reach
from longreach.running.loading import shipped_book


def percent(share: Any) -> str:
    return "" if share.percent is None else f"{share.percent:.1f} %".replace(".0 %", " %")


def summary(result: dict[str, Any]) -> str:
    """The README's table: far keys and loss, at some lengths."""
    window, curves = result["window"], result["loss"]["methods"]
    lengths, places = [n for n in result["plan"]["lengths"] if n > 1], (1, 8, 16, 64)
    asked = {n: demo.share(result, "stock", n * window, far=True).asked for n in lengths}
    header = ["", *(f"far keys found at {n * window} tokens (of {asked[n]})" for n in lengths), *(f"loss at {n * window}" for n in places)]
    rows = [
        [
            label, *(percent(demo.share(result, name, n * window, far=True)) for n in lengths),
            *(f"{curves[name][n - 1]:.2f}" if n <= len(curves[name]) else "not read" for n in places),
        ]
        for name, label in demo.NAMES.items()
    ]
    return markdown(header, rows)


def reach_table(result: dict[str, Any]) -> str:
    window, names = result["window"], demo.NAMES
    header = ["tokens", *(f"{label}: keys farther than {window} tokens" for label in names.values()), *(f"{label}: all depths" for label in names.values())]
    rows = []
    for n in result["plan"]["lengths"]:
        shares = [demo.share(result, name, n * window, far=True) for name in names] + [demo.share(result, name, n * window) for name in names]
        rows.append([f"{n * window} ({n}x)", *map(percent, shares)])
    far = max(demo.share(result, "stock", n * window, far=True).asked for n in result["plan"]["lengths"])
    each = result["plan"]["depths"] * result["plan"]["keys"]
    return markdown(header, rows) + f"\n\n{each} keys at each length, up to {far} of them farther away than {window} tokens."


def loss_table(result: dict[str, Any]) -> str:
    window, curves = result["window"], result["loss"]["methods"]
    steps = [2**k for k in range(20) if 2**k <= max(map(len, curves.values()))]
    rows = [[demo.NAMES[name], *(f"{curve[n - 1]:.2f}" if n <= len(curve) else "" for n in steps)] for name, curve in curves.items()]
    return markdown(["loss (nats per token) at token", *(f"{n * window}" for n in steps)], rows)


def cost_table(result: dict[str, Any]) -> str:
    rows = [
        [
            demo.NAMES[name], result["methods"][name][str(c["length"])], f"{c['prefill_seconds']:.2f} s", f"{c['decode_ms']:.1f} ms",
            f"{c['store_bytes'] / 2**20:.1f} MiB",
        ]
        for name, c in result["cost"].items()
    ]
    length = next(iter(result["cost"].values()))["length"]
    return markdown([f"at {length} tokens", "method", "prefill", "each new token", "KV cache"], rows)


def page(result: dict[str, Any]) -> str:
    """The tables of docs/nano.md."""
    return "\n\n".join((reach_table(result), loss_table(result), cost_table(result)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", type=Path, nargs="*", help="plain or .xz books, joined; the book in the package if not given")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8], help="in trained windows")
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--keys", type=int, default=10)
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/nano-reach.json")
    parser.add_argument("--png", type=Path, default=ROOT / "docs/reach.png")
    parser.add_argument("--no-docs", action="store_true", help="leave README.md and docs/nano.md alone")
    args = parser.parse_args()
    model, tokenizer = longreach.load(args.model)
    text = "\n\n".join(map(read_text, args.text)) if args.text else shipped_book()
    design = demo.Design(tuple(args.lengths), args.depths, args.keys, texts=args.texts, seed=args.seed)
    with Progress(*Progress.get_default_columns(), TimeRemainingColumn()) as bar:
        task = bar.add_task("reading", total=design.tokens(model.config.max_position_embeddings))
        result = demo.run(model, tokenizer, text, design, lambda tokens, what: bar.update(task, advance=tokens, description=what))
    write_json(args.out, {"facts": facts(torch.device("cpu")), "model": args.model, **result})
    reach.draw(result, demo.NAMES, args.png)
    print(page(result))
    if not args.no_docs:
        write_section(ROOT / "README.md", "reach", summary(result))
        write_section(ROOT / "docs/nano.md", "reach", page(result))


if __name__ == "__main__":
    main()
