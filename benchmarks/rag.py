"""Long context alone, retrieval alone, and both, at equal tokens ("Retrieval meets long context", arXiv 2310.03025), on offline tasks.

    python benchmarks/rag.py                                     # nano: documents of 8 windows, 4 tasks; a quarter of an hour on one core
    python benchmarks/rag.py --tasks niah --samples 2 --out /tmp/rag.json      # small, to see that it runs
    python benchmarks/rag.py --model FOLDER --length 16k --window 2k --chunk-words 120 --page ""

Every sample is a document with a question. For each budget of tokens (prompt and answer) the model reads either the document, cut in its middle to the budget
(long context alone), or as many retrieved chunks as fit, in the two orders of the papers. The prompts have the same form and are counted by the model's
tokenizer. At a budget of one window this is retrieval alone, with plain attention; beyond it the dial's method reads the prompt, so it is both. A run that was
cut goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, facts, markdown, read_text, write_json, write_section

import longreach
from longreach.apps.rag import Rag, RagConfig
from longreach.evals.samples.base import Sample, Settings
from longreach.evals.scores.statistics import mean
from longreach.evals.tasks import tasks
from longreach.quantities import token_count
from longreach.running.prompts import encode_with_spans, keep_tokens, shrink

TASKS = ("niah", "passkeys", "ruler-niah-multikey-1", "ruler-niah-multivalue")
WAYS = {"cut": "the document, cut", "rank": "retrieved, best last", "position": "retrieved, in order"}


def configured(sample: Sample, way: str, budget: int, chunk_words: int | None, retriever: str) -> RagConfig:
    order = "position" if way == "position" else "rank"
    room = budget - sample.max_new_tokens
    return RagConfig(None, chunk_words, order, 0, room, sample.max_new_tokens, retriever, instruction=sample.parts.prefix.strip())  # type: ignore[arg-type]


def cut(model: Any, tokenizer: Any, sample: Sample, budget: int) -> str:
    """The document without its middle, so that its prompt has at most the budget, and few tokens less."""
    _, spans = encode_with_spans(tokenizer, sample.parts.document, special=False)
    room = budget - sample.max_new_tokens

    def make(keep: int) -> tuple[str, int]:
        shorter = keep_tokens(sample.parts.document, spans, keep, "middle")
        rag = Rag(model, tokenizer, shorter, configured(sample, "cut", 2**30, None, "bm25"))
        tokens = len(rag.prompts(1).ids(rag.state(question(sample), 1), question(sample), sample.parts.answer_prefix.strip()))
        return shorter, tokens - room

    return shrink(min(room, len(spans)), make) or ""


def question(sample: Sample) -> str:
    return sample.parts.query.strip()


def measure(model: Any, tokenizer: Any, task: Any, samples: list[Sample], way: str, budget: int, args: argparse.Namespace) -> dict[str, Any]:
    """One cell: the mean score, and the tokens of the prompts."""
    scores, tokens, used, started = [], [], [], time.perf_counter()
    with longreach.extend(model, context=budget) as extension:
        for sample in samples:
            document = cut(model, tokenizer, sample, budget) if way == "cut" else sample.parts.document
            config = configured(sample, way, budget, None if way == "cut" else args.chunk_words, args.retriever)
            found = Rag(model, tokenizer, document, config, extension=extension).ask(question(sample), lead=sample.parts.answer_prefix.strip())
            scores.append(task.score(sample, found.answer)[task.metric])
            tokens.append(found.tokens)
            used.append(found.top_k)
        method = extension.method.brief()
    found_mean = mean(scores)
    return {
        "task": task.name, "way": way, "budget": budget, "score": found_mean.value, "low": found_mean.low, "high": found_mean.high, "n": len(scores),
        "tokens": sum(tokens) / len(tokens), "chunks": sum(used) / len(used), "method": method, "seconds": round(time.perf_counter() - started, 1),
    }  # fmt: skip


def table(rows: list[dict[str, Any]], task: str, budgets: list[int], window: int) -> str:
    cells = {(row["way"], row["budget"]): row for row in rows if row["task"] == task}

    def cell(way: str, budget: int) -> str:
        row = cells.get((way, budget))
        return "" if row is None else f"{100 * row['score']:.0f} % ({100 * row['low']:.0f} to {100 * row['high']:.0f}), {row['tokens']:.0f}"

    n = next((row["n"] for row in cells.values()), 0)
    body = [[f"{budget} ({budget / window:g}x)", *(cell(way, budget) for way in WAYS)] for budget in budgets]
    return f"### {task}, {n} questions\n\n{markdown(['budget', *WAYS.values()], body)}"


def doubled(window: int, length: int) -> list[int]:
    """The budgets: from one window on, up to the whole document."""
    found = [window]
    while found[-1] < length:
        found.append(min(length, 2 * found[-1]))
    return found


def page(found: dict[str, Any]) -> str:
    rows, window = found["rows"], found["asked"]["window"]
    return "\n\n".join(table(rows, name, doubled(window, found["asked"]["length"]), window) for name in dict.fromkeys(row["task"] for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK")
    parser.add_argument("--length", default="4k", help="tokens of a document with its question and answer")
    parser.add_argument("--window", default="512", help="the smallest budget; doubled up to the length")
    parser.add_argument("--chunk-words", type=int, default=40)
    parser.add_argument("--retriever", default="bm25")
    parser.add_argument("--samples", type=int, default=5, help="documents with questions at five depths; of tasks without depths five times as many")
    parser.add_argument("--text", type=Path, help="the book that facts are hidden in; the shipped one if not given")
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/rag.json")
    parser.add_argument("--page", default=str(ROOT / "docs/rag.md"), help='where the tables go; "" for nowhere')
    args = parser.parse_args()
    torch.manual_seed(0)
    length, window = token_count(args.length, "--length"), token_count(args.window, "--window")
    model, tokenizer = longreach.load(args.model, dtype=args.dtype)
    text = longreach.shipped_book() if args.text is None else read_text(args.text)
    asked = {"model": args.model, "length": length, "window": window, "chunk_words": args.chunk_words, "retriever": args.retriever, "samples": args.samples}
    found: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"asked": asked, "rows": []}
    if found["asked"] != asked:
        raise SystemExit(f"{args.out} holds a run of {found['asked']}; name another file with --out")
    found = {"facts": facts(torch.device("cpu")), **{name: found[name] for name in ("asked", "rows")}}
    done = {(row["task"], row["way"], row["budget"]) for row in found["rows"]}
    for name in args.tasks:
        task = tasks()[name]
        depths = name in ("niah", "passkeys")
        settings = Settings(lengths=(length,), depths=(0.1, 0.3, 0.5, 0.7, 0.9), samples=args.samples * (1 if depths else 5), text=text)
        samples = list(task.samples(tokenizer, settings))
        for budget in doubled(window, length):
            for way in WAYS:
                if (name, way, budget) in done:
                    continue
                row = measure(model, tokenizer, task, samples, way, budget, args)
                found["rows"].append(row)
                write_json(args.out, found)
                print(f"{name:<24} {way:<9} {budget:>6}  {100 * row['score']:5.1f} %  {row['tokens']:7.0f} tokens  {row['seconds']:.0f} s", flush=True)
    print(page(found))
    if args.page:
        write_section(Path(args.page), "equal-tokens", page(found))


if __name__ == "__main__":
    main()
