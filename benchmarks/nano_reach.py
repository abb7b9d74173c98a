"""What each method buys on nano: pass keys found by length and depth, and the loss along a long text.

    python benchmarks/nano_reach.py [--model nano] [--text BOOK ...] [--lengths 1 2 4 8] [--out benchmarks/results/nano-reach.json] [--png docs/reach.png]

Stock, SelfExtend (parameters chosen by the dial) and LM-Infinite (n_local = the trained window) read the same texts. A key counts
as found if greedy decoding gives the whole answer; a key inside the last window of tokens is counted apart from one beyond it.
Knows the public API only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from common import facts, read_text, write_json

import longreach
from longreach.loading import shipped_book

NAMES = ("stock", "selfextend", "lm-infinite")


@contextmanager
def applied(name: str, model: Any, context: int, window: int) -> Iterator[str]:
    """The method of that name on the model; yields its description."""
    if name == "stock" or (name == "selfextend" and context <= window):
        yield "stock"
        return
    if name == "selfextend":
        with longreach.extend(model, context=context) as extension:
            yield str(extension.method)
    else:
        with longreach.extend(model, longreach.LMInfinite(window, 4)) as extension:
            yield str(extension.method)


def wordings(held_out: bool, key: str) -> tuple[str, str, str]:
    if held_out:
        return f" Please note: the magic number is {key}; you will be asked for it.", "\n\nCan you tell me the magic number?", f" The magic number is {key}."
    return f" The pass key is {key}. Remember it. {key} is the pass key.", "\n\nWhat is the pass key?", f" The pass key is {key}."


def trial(tokenizer: Any, text: list[int], length: int, depth: float, rng: Random, held_out: bool) -> tuple[list[int], int, int]:
    """-> ids of exactly `length` tokens with the answer at their end, tokens of the answer, distance from the key to the question's end."""
    encode = lambda s: tokenizer.encode(s, add_special_tokens=False)  # noqa: E731
    statement, question, answer = (encode(part) for part in wordings(held_out, str(rng.randrange(10000, 100000))))
    room = length - 1 - len(statement) - len(question) - len(answer)
    start = rng.randrange(0, len(text) - room)
    at = round(depth * room)
    ids = [tokenizer.bos_token_id, *text[start : start + at], *statement, *text[start + at : start + room], *question, *answer]
    return ids, len(answer), length - len(answer) - (1 + at + len(statement))


@torch.no_grad()
def retrieval(model: Any, tokenizer: Any, text: list[int], length: int, args: argparse.Namespace, held_out: bool) -> dict[str, Any]:
    """Found or not for every method, depth and trial of one length."""
    window = model.config.max_position_embeddings
    rows: dict[str, Any] = {}
    for name in NAMES:
        rng = Random(args.seed * 1000 + length)
        found: list[list[bool]] = []
        distances: list[list[int]] = []
        with applied(name, model, length, window) as description:
            for step in range(args.depths):
                batch = [trial(tokenizer, text, length, step / max(1, args.depths - 1), rng, held_out) for _ in range(args.trials)]
                right: list[bool] = []
                for first in range(0, len(batch), args.batch):
                    part = batch[first : first + args.batch]
                    size = part[0][1]
                    ids = torch.tensor([ids for ids, _, _ in part])
                    guess = model(ids, use_cache=False, logits_to_keep=size + 1).logits[:, :-1].argmax(-1)
                    right += guess.eq(ids[:, -size:]).all(-1).tolist()
                found.append(right)
                distances.append([d for _, _, d in batch])
        far = [ok for oks, ds in zip(found, distances) for ok, d in zip(oks, ds) if d > window]
        near = [ok for oks, ds in zip(found, distances) for ok, d in zip(oks, ds) if d <= window]
        rows[name] = {
            "method": description, "by_depth": [sum(r) / len(r) for r in found], "trials_per_depth": args.trials,
            "all": share(far + near), "beyond_window": share(far), "within_window": share(near), "keys_beyond_window": len(far),
        }  # fmt: skip
    return rows


def share(hits: list[bool]) -> float | None:
    return sum(hits) / len(hits) if hits else None


@torch.no_grad()
def losses(model: Any, tokenizer: Any, text: list[int], length: int, args: argparse.Namespace) -> dict[str, Any]:
    """Mean loss in bins of a window along `args.texts` passages of `length` tokens."""
    window = model.config.max_position_embeddings
    rows: dict[str, Any] = {}
    for name in NAMES:
        rng = Random(args.seed)
        total = torch.zeros(length - 1, dtype=torch.float64)
        with applied(name, model, length, window) as description:
            for _ in range(args.texts):
                start = rng.randrange(0, len(text) - length)
                ids = torch.tensor([[tokenizer.bos_token_id, *text[start : start + length - 1]]])
                logits = model(ids, use_cache=False).logits[0, :-1].float()
                total += F.cross_entropy(logits, ids[0, 1:], reduction="none").double()
        mean = total / args.texts
        bins = [mean[max(0, a - 1) : a + window - 1] for a in range(0, length, window)]
        rows[name] = {"method": description, "by_window": [b.mean().item() for b in bins]}
    return rows


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    window = result["window"]
    colours = {"stock": "#9a9a9a", "selfextend": "#1b6ca8", "lm-infinite": "#d9822b"}
    labels = {"stock": "stock", "selfextend": "SelfExtend", "lm-infinite": "LM-Infinite"}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.9), constrained_layout=True)
    for name in NAMES:
        curve = result["loss"][name]["by_window"]
        left.plot([window * (i + 1) for i in range(len(curve))], curve, color=colours[name], label=labels[name], lw=2.2, marker="o", ms=3.5)
    left.axvline(window, color="black", ls=":", lw=1)
    left.annotate("trained window", (window, left.get_ylim()[1]), xytext=(6, -4), textcoords="offset points", va="top", fontsize=9)
    left.set(xscale="log", xlabel="position in the text (tokens)", ylabel="loss (nats per token)", title="Loss along a book")
    left.legend(frameon=False, loc="center right")
    lengths = [int(n) for n in result["retrieval"]]
    wide = 0.26
    for k, name in enumerate(NAMES):
        found = [100 * result["retrieval"][str(n)][name]["all"] for n in lengths]
        bars = right.bar([i + (k - 1) * wide for i in range(len(lengths))], found, wide, color=colours[name], label=labels[name])
        right.bar_label(bars, labels=[f"{f:.0f}" for f in found], fontsize=8, padding=1)
    right.set_xticks(range(len(lengths)), [f"{n} tokens\n({n // window}x window)" for n in lengths])
    right.set(ylabel="pass keys found (%)", title="A pass key hidden anywhere in a book", ylim=(0, 112))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (left,):
        ticks = [window * 2**i for i in range(int(math.log2(max(1, result["loss_length"] // window))) + 1)]
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", type=Path, nargs="*", help="plain or .xz books; the excerpt in the package if not given")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 2, 4, 8], help="in trained windows")
    parser.add_argument("--loss-length", type=int, default=16, help="in trained windows")
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nano-reach.json"))
    parser.add_argument("--png", type=Path, default=Path("docs/reach.png"))
    args = parser.parse_args()
    model, tokenizer = longreach.load(args.model)
    window = model.config.max_position_embeddings
    text = tokenizer.encode("\n\n".join(read_text(p) for p in args.text) if args.text else shipped_book(), add_special_tokens=False)
    result: dict[str, Any] = {"facts": facts(torch.device("cpu")), "model": args.model, "window": window, "retrieval": {}, "held_out_wording": {}}
    for multiple in args.lengths:
        length = multiple * window
        result["retrieval"][str(length)] = retrieval(model, tokenizer, text, length, args, held_out=False)
        show(length, "pass key", result["retrieval"][str(length)])
        result["held_out_wording"][str(length)] = retrieval(model, tokenizer, text, length, args, held_out=True)
        show(length, "wording never trained", result["held_out_wording"][str(length)])
    result["loss_length"] = args.loss_length * window
    result["loss"] = losses(model, tokenizer, text, result["loss_length"], args)
    for name in NAMES:
        print(f"{name:12s} loss by window: {' '.join(f'{x:.2f}' for x in result['loss'][name]['by_window'])}")
    write_json(args.out, result)
    draw(result, args.png)
    print(f"wrote {args.out} and {args.png}")


def show(length: int, what: str, rows: dict[str, Any]) -> None:
    for name, row in rows.items():
        percent = lambda x: "  - " if x is None else f"{100 * x:3.0f}%"  # noqa: E731
        print(
            f"{length:6d} tokens  {what:22s} {name:12s} all {percent(row['all'])}  beyond the window {percent(row['beyond_window'])}  "
            f"within {percent(row['within_window'])}  {row['method']}", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
