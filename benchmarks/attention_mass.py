"""Where the attention of an answer's first token goes: to the key that was asked for, to the other keys, to the first tokens, to the rest.

    python benchmarks/attention_mass.py --model FILE.gguf --dtype bfloat16 --length 8k --method stock
    python benchmarks/attention_mass.py --model FILE.gguf --dtype bfloat16 --length 12k --method selfextend --group-size 16 --window 256

A document of `passkeys` is read once, and each of its questions is asked after it (one of `passkey` has one question). For the last token of a prompt,
whose attention writes the first digit of the answer, `extension.watching` says what every head of every layer pays to each token. A head's mass on a key is
the sum over the tokens of its statement, on the number over those of its digits. Results: results/attention-mass.json, one entry per setting, and a line per
question on the screen.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import ROOT, device_of, facts, markdown, write_json, write_section

import longreach
from longreach.cli import parameters
from longreach.evals import tasks
from longreach.evals.harness.model_engine import ModelEngine, attached
from longreach.evals.samples import budget, haystack
from longreach.evals.samples.base import Sample, Settings
from longreach.evals.tasks.passkeys import WORDING
from longreach.quantities import token_count
from longreach.running import prompts
from longreach.running.reading import stream

FIRST = 4  # tokens that count as the beginning of the text
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


def paid(engine: ModelEngine, ids: list[int]) -> dict[int, torch.Tensor]:
    """layer -> [H, tokens]: the attention of the last token of a prompt on all tokens up to it."""
    assert engine.extension is not None
    cache, held = engine._prefix.resume(ids[:-1])
    if held < len(ids) - 1:
        for _ in stream(engine.extension, torch.tensor(ids[held:-1]), chunk_size=engine.chunk_size, losses=False, cache=cache):
            pass
    with engine.extension.watching(queries=1) as watch:
        engine.extension.model(torch.tensor([ids[-1:]]), past_key_values=cache)
    engine._prefix.keep(cache, ids)
    return {layer: mass[0] for layer, mass in sorted(watch.mass.items())}


def block_of(tokenizer: Any, prompt: budget.Prompt, special: bool, statement: str, key: str = "") -> list[int]:
    """The tokens of a statement, or of the key in it. Some heads read the number, others the blank or the name before it."""
    _, spans = prompts.encode_with_spans(tokenizer, prompt.text, special)
    begin = prompt.text.index(statement)
    if not key:
        return [n for n, (a, b) in enumerate(spans) if a < begin + len(statement) and b > begin]
    places = [at for at in range(begin, begin + len(statement)) if prompt.text.startswith(key, at)]
    return [n for n, (a, b) in enumerate(spans) if any(a < at + len(key) and b > at for at in places)]


def statement_of(sample: Sample) -> str:
    name, key = sample.meta.get("name"), sample.references[0]
    return haystack.PASS_KEY.statement.format(key=key) if name is None else WORDING.statement.format(name=name, key=key)


def measure(args: argparse.Namespace, model: Any, tokenizer: Any, method: Any) -> list[dict[str, Any]]:
    task, length = tasks.task(args.task), token_count(args.length, "--length")
    special = args.chat == "off" or not prompts.has_template(tokenizer)
    rows: list[dict[str, Any]] = []
    samples = list(task.samples(tokenizer, Settings(lengths=(length,), depths=args.depths, samples=args.documents, seed=args.seed)))
    with attached(model, tokenizer, method, length, chunk_size=1024) as engine:
        for sample in samples:
            prompt = budget.encode(tokenizer, sample, args.chat)
            reply = engine.answer(prompt)
            others = [s for s in samples if s.parts.document == sample.parts.document]
            places = {other.meta["depth"]: block_of(tokenizer, prompt, special, statement_of(other)) for other in others}
            tokens = len(prompt.ids)
            digits = block_of(tokenizer, prompt, special, statement_of(sample), sample.references[0])
            here, elsewhere = places[sample.meta["depth"]], [n for depth, found in places.items() if depth != sample.meta["depth"] for n in found]
            mass, kept = [], []  # [layers, heads, 4]; [layers, heads, tokens of the statement]
            for weights in paid(engine, prompt.ids).values():
                parts = [weights[:, here], weights[:, elsewhere], weights[:, :FIRST], weights[:, digits]]
                mass.append(torch.stack([part.sum(-1) for part in parts], -1).tolist())
                kept.append(weights[:, here])
            right = task.score(sample, reply.text)["accuracy"]
            row = {
                "document": sample.meta["index"], "depth": sample.meta["depth"], "distance": tokens - 1 - max(here), "found": bool(right), "answer": reply.text,
                "words": words(tokenizer, prompt, here, torch.cat(kept)),
                "mass": [[[round(x, 5) for x in head] for head in layer] for layer in mass],
            }  # fmt: skip
            rows.append(row)
            print(summary_line(row), flush=True)
    return rows


def words(tokenizer: Any, prompt: budget.Prompt, tokens: list[int], weights: torch.Tensor) -> list[tuple[str, float]]:
    """The tokens of the statement that the eight heads with the most mass on it look at most, and their mean mass. `weights` [heads, tokens]."""
    mean = weights[weights.sum(-1).topk(8).indices].mean(0)
    return [(tokenizer.decode([prompt.ids[tokens[n]]]), round(float(mean[n]), 3)) for n in mean.topk(4).indices.tolist()]


def best_heads(row: dict[str, Any]) -> list[float]:
    """The mean mass of the eight heads that have the most on the key's statement: on it, on the other keys', on the first tokens, on its number."""
    table = torch.tensor(row["mass"]).reshape(-1, 4)
    return [float(x) for x in table[table[:, 0].topk(8).indices].mean(0)]


def summary_line(row: dict[str, Any]) -> str:
    table = torch.tensor(row["mass"])
    own, other, first, digits = best_heads(row)
    number = float(table[..., 3].flatten().topk(8).values.mean())
    return (
        f"depth {row['depth']:.1f}  distance {row['distance']:6d}  {'found' if row['found'] else 'lost '}  "
        f"all heads: key {float(table[..., 0].mean()):.4f} others {float(table[..., 1].mean()):.4f} first {float(table[..., 2].mean()):.3f}  "
        f"best eight heads: key {own:.3f} (number {digits:.3f}) others {other:.3f} first {first:.3f}  best eight on the number {number:.3f}  "
        f"{row['answer'][:24]!r}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--length", default="1k")
    parser.add_argument("--chat", choices=("auto", "off"), default="auto")
    parser.add_argument("--task", choices=("passkeys", "passkey"), default="passkeys", help="passkey: one key in a document, so one reading a question")
    parser.add_argument("--depths", type=float, nargs="+", default=DEPTHS)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/attention-mass.json")
    parser.add_argument("--page", action="store_true", help="write the table of docs/real-models.md from the results only")
    args, rest = parser.parse_known_args()
    if args.page:
        return write_page(args.out)
    method = None if args.method is None else parameters.build(args.method, rest, [])
    model, tokenizer = longreach.load(args.model, dtype=args.dtype)
    with torch.no_grad():
        rows = measure(args, model, tokenizer, method)
    entries = json.loads(args.out.read_text())["settings"] if args.out.exists() else []
    setting = "the dial's" if method is None else method.brief()
    name = {"model": Path(args.model).name, "method": setting, "length": args.length, "chat": args.chat, "task": args.task}
    entries = [entry for entry in entries if {key: entry.get(key) for key in name} != name]
    write_json(args.out, {"settings": [*entries, {**name, "facts": facts(device_of("cpu")), "questions": rows}]})
    if args.out == parser.get_default("out"):
        write_page(args.out)


def write_page(results: Path) -> None:
    """The table of docs/real-models.md: of each question, what its eight heads with the most mass on the key's statement look at."""
    head = ["setting", "tokens", "depth", "distance of the key", "mass on the statement", "on its number", "most on the words", "the answer begins", ""]
    body = []
    for entry in sorted(json.loads(results.read_text())["settings"], key=lambda entry: (entry["task"], entry["length"], entry["method"])):
        for row in entry["questions"]:
            own, _, _, digits = best_heads(row)
            cells = [f"`{entry['method']}`", entry["length"], f"{row['depth']:g}", str(row["distance"]), f"{own:.2f}", f"{digits:.2f}"]
            most = ", ".join(f"`{word.strip() or word}` {mass:.2f}" for word, mass in row["words"][:3])
            body.append([*cells, most, f"`{' '.join(row['answer'].split())[:24]}`", "found" if row["found"] else "lost"])
    write_section(ROOT / "docs/real-models.md", "attention", markdown(head, body))


if __name__ == "__main__":
    main()
