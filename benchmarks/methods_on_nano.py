"""Every method on nano, from one to sixteen times its window: the loss along a text, and the pass keys found.

    python benchmarks/methods_on_nano.py      # results/methods-on-nano.json, docs/methods-reach.png and the tables of docs/results.md
    python benchmarks/methods_on_nano.py --methods selfextend rerope --lengths 512 1024 --keys 1 --no-docs

The parameters follow a rule and no search: `longreach.planning.dial.recommended`, which is the dial's choice for SelfExtend and for every other method the
setting that its authors recommend for the length. A method that reaches less than the length is read beyond its reach, and the result says so;
one without a recommended setting is left out, with the reason. All methods read the same texts and are asked for the same keys.

A cell, one method at one length, is kept as a line of results/methods-on-nano.jsonl as soon as it is measured. A run that was cut goes on from
there; lines that were measured with other weights, texts or settings are not used.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from common import ROOT, facts, one_thread, read_text, write_json, write_section
from methods_figure import draw
from methods_result import tables
from rich.progress import Progress, TimeRemainingColumn

import longreach
from longreach import configs
from longreach.apps import demo
from longreach.evals.samples import haystack
from longreach.methods import registry
from longreach.methods.base import Method
from longreach.planning import dial
from longreach.running import generation
from longreach.running.loading import shipped_book

PAGE = ROOT / "docs/results.md"
RULE = "longreach.planning.dial.recommended: the dial's choice for SelfExtend, for the others what their authors recommend for the declared context"


@dataclass(frozen=True)
class Plan:
    """lengths in tokens; keys for every depth, by length; texts that the loss is averaged over."""

    lengths: tuple[int, ...]
    keys: tuple[int, ...]
    depths: int
    texts: int
    seed: int

    def keys_at(self, length: int) -> int:
        return self.keys[self.lengths.index(length)]


@dataclass(frozen=True)
class Subject:
    """What is measured on. `mark` names weights and text, so that results of others are not taken for these."""

    model: Any
    tokenizer: Any
    text: str
    window: configs.Window
    mark: str

    @classmethod
    def of(cls, model: Any, tokenizer: Any, text: str) -> Subject:
        digest = hashlib.sha256(text.encode())
        for name, value in model.state_dict().items():
            digest.update(name.encode() + value.float().cpu().numpy().tobytes())
        return cls(model, tokenizer, text, configs.trained_window(model.config), digest.hexdigest()[:16])


def usual_keys(length: int, window: int) -> int:
    """Fewer where a key costs more: the whole run is to stay below 40 minutes on one core."""
    windows = length / window
    return 8 if windows <= 2 else 6 if windows <= 8 else 3


# -- one cell ---------------------------------------------------------------------------------------------------------------------


def identity(subject: Subject, plan: Plan, method: Method, length: int) -> dict[str, Any]:
    """All that a cell depends on."""
    return {
        "mark": subject.mark, "setting": method.to_json(), "length": length, "keys": plan.keys_at(length), "depths": plan.depths, "texts": plan.texts,
        "seed": plan.seed,
    }  # fmt: skip


def measure(subject: Subject, plan: Plan, method: Method, length: int, progress: Callable[[float], None]) -> dict[str, Any]:
    started = time.perf_counter()
    reach = method.capacity(subject.window.tokens)
    beyond = reach is not None and reach < length
    with warnings.catch_warnings():
        if beyond:  # an extension warns of it, and the result says it
            warnings.simplefilter("ignore", UserWarning)
        with longreach.extend(subject.model, method, context=None if beyond else length) as extension:
            trials = list(keys(subject, plan, extension, length, progress))
            loss = losses(subject, plan, extension, length, progress)
    found = {key: [trial.pop(key) for trial in trials] for key in ("prefill_seconds", "decode_ms", "store_bytes")}
    return {
        "identity": identity(subject, plan, method, length), "method": method.name, "class": type(method).__name__, "length": length,
        "parameters": method.brief(), "reach": reach, "beyond_reach": beyond, "frequencies": method.rescales, "bounded": method.bounded, "trials": trials,
        "loss": loss, "prefill_seconds": median(found["prefill_seconds"]), "decode_ms": median(found["decode_ms"]),
        "store_bytes": max(found["store_bytes"]), "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def keys(subject: Subject, plan: Plan, extension: longreach.Extension, length: int, progress: Callable[[float], None]) -> Iterator[dict[str, Any]]:
    """Found means: the first number that greedy decoding writes is the key. The same keys for every method."""
    room, rng = demo.answer_tokens(subject.tokenizer), Random(plan.seed * 1_000_003 + length)
    for step in range(plan.depths):
        for _ in range(plan.keys_at(length)):
            asked = haystack.trial(subject.tokenizer, subject.text, length, step / max(1, plan.depths - 1), rng, answer_tokens=room)
            answer = generation.answer(subject.model, subject.tokenizer, asked.ids, room, extension=extension)
            yield {
                "depth": asked.depth, "distance": asked.distance, "key": asked.key, "answer": answer.text.strip(),
                "found": haystack.number_in(answer.text) == asked.key, "prefill_seconds": answer.prefill_seconds,
                "decode_ms": 1000 * answer.decode_seconds / max(1, answer.tokens - 1), "store_bytes": answer.store_bytes,
            }  # fmt: skip
            progress(weight(length))


def losses(subject: Subject, plan: Plan, extension: longreach.Extension, length: int, progress: Callable[[float], None]) -> list[float]:
    """Mean loss in every window of the texts; a text begins at the same place whatever the length."""
    rng, window = Random(plan.seed), subject.window.tokens
    bins = torch.zeros(length // window, dtype=torch.float64)
    for _ in range(plan.texts):
        ids = demo.passage(subject.tokenizer, subject.text, length, rng)
        read = [chunk.losses for chunk in longreach.stream(extension, ids, chunk_size=window) if chunk.losses is not None]
        bins += torch.cat(read).double().nan_to_num(0.0).view(-1, window).sum(1)
        progress(weight(length))
    counts = torch.full_like(bins, window)
    counts[0] -= 1  # nothing precedes the first token
    return (bins / counts / plan.texts).tolist()


def weight(length: int) -> float:
    """What reading a text costs, for the time left: a start, work per token, work per pair."""
    return 400 + length + length**2 / 8192


# -- all cells --------------------------------------------------------------------------------------------------------------------


def settings(names: list[str], plan: Plan, window: configs.Window) -> tuple[list[tuple[Method, str, int]], dict[str, str]]:
    """(method, the name it was asked for, length), short lengths first; and what is left out, with the reason."""
    wanted, left_out = [], {}
    for length in plan.lengths:
        for name in names:
            if name in left_out:
                continue
            try:
                wanted.append((dial.recommended(registry()[name], window, length), name, length))
            except ValueError as error:
                left_out[name] = str(error)
    return wanted, left_out


def kept(path: Path) -> list[dict[str, Any]]:
    """The cells of former runs; a line that was cut while it was written is not one."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def run(subject: Subject, names: list[str], plan: Plan, path: Path) -> dict[str, Any]:
    wanted, left_out = settings(names, plan, subject.window)
    former = {json.dumps([cell["asked"], cell["identity"]], sort_keys=True): cell for cell in kept(path)}
    key = lambda name, method, length: json.dumps([name, identity(subject, plan, method, length)], sort_keys=True)  # noqa: E731
    cost = lambda length: (plan.depths * plan.keys_at(length) + plan.texts) * weight(length)  # noqa: E731
    missing = [(method, name, length) for method, name, length in wanted if key(name, method, length) not in former]
    if len(missing) < len(wanted):
        print(f"{len(wanted) - len(missing)} of {len(wanted)} cells are taken from {path.name}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    with Progress(*Progress.get_default_columns(), TimeRemainingColumn()) as bar, path.open("a", encoding="utf-8") as lines:
        task = bar.add_task("reading", total=sum(cost(length) for _, _, length in missing))
        if path.stat().st_size and not path.read_text(encoding="utf-8").endswith("\n"):
            lines.write("\n")  # behind a line that was cut
        for method, name, length in missing:
            bar.update(task, description=f"{name}, {length} tokens")
            cell = {"asked": name, **measure(subject, plan, method, length, lambda done: bar.update(task, advance=done))}
            former[key(name, method, length)] = cell
            lines.write(json.dumps(cell, allow_nan=False) + "\n")
            lines.flush()
    cells = [former[key(name, method, length)] for method, name, length in wanted]
    return {"window": subject.window.tokens, "mark": subject.mark, "rule": RULE, "plan": asdict(plan), "left_out": left_out, "cells": cells}


# -- the command ------------------------------------------------------------------------------------------------------------------


def page_has_a_section() -> bool:
    text = PAGE.read_text(encoding="utf-8")
    if "<!-- begin methods -->" in text and "<!-- end methods -->" in text:
        return True
    print("docs/results.md needs the lines <!-- begin methods --> and <!-- end methods -->; the tables are printed only", file=sys.stderr)
    return False


def options(window: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(registry()), choices=list(registry()), metavar="NAME", help="all if not given")
    parser.add_argument("--lengths", type=int, nargs="+", default=[n * window for n in (1, 2, 4, 8, 16)], help="in tokens, whole trained windows")
    parser.add_argument("--keys", type=int, nargs="+", help="for every depth: one number, or one for each length; 8 to 3, fewer at long lengths, if not given")
    parser.add_argument("--depths", type=int, default=5, help="evenly from the beginning to the end of the text")
    parser.add_argument("--texts", type=int, default=2, help="that the loss is averaged over")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--text", type=Path, nargs="*", help="plain or .xz books, joined; the book in the package if not given")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/methods-on-nano.json", help="its cells are kept beside it, in .jsonl")
    parser.add_argument("--png", type=Path, default=ROOT / "docs/methods-reach.png")
    parser.add_argument("--no-docs", action="store_true", help="leave docs/results.md alone")
    args = parser.parse_args()
    args.lengths = sorted(set(args.lengths))
    if wrong := [n for n in args.lengths if n < window or n % window]:
        near = max(1, round(wrong[0] / window)) * window
        parser.error(f"--lengths must be multiples of the trained window of {window}, not {wrong[0]}; pass for example {near}")
    args.keys = args.keys or [usual_keys(n, window) for n in args.lengths]
    args.keys = args.keys * len(args.lengths) if len(args.keys) == 1 else args.keys
    if len(args.keys) != len(args.lengths) or min(*args.keys, args.depths, args.texts) < 1:
        parser.error(f"--keys takes one number of at least 1, or one for each of the {len(args.lengths)} lengths; --depths and --texts at least 1")
    return args


def main() -> None:
    model, tokenizer = longreach.load("nano")
    args = options(configs.trained_window(model.config).tokens)
    to_page = not args.no_docs and page_has_a_section()
    text = "\n\n".join(map(read_text, args.text)) if args.text else shipped_book()
    plan = Plan(tuple(args.lengths), tuple(args.keys), args.depths, args.texts, args.seed)
    with one_thread():
        found = facts(torch.device("cpu"))
        result = run(Subject.of(model, tokenizer, text), args.methods, plan, args.out.with_suffix(".jsonl"))
    write_json(args.out, {"facts": found, "model": "nano", **result})
    draw(result, args.png)
    section = tables(result)
    print(section)
    if to_page:
        write_section(PAGE, "methods", section)


if __name__ == "__main__":
    main()
