"""InfiniRetri on a text of a million tokens: pass keys and needle sentences that are kept and answered, beside the model inside one chunk.

    python benchmarks/infiniretri.py --tokens 1m --questions 10                        # nano; results/infiniretri-nano-1024k.json
    python benchmarks/infiniretri.py --model MODEL.gguf --tokens 128k --questions 5 --text BOOK ...

Books follow each other, and begin again if they end. Every question has a text of its own with one fact in it, at depths spread evenly: a pass key (stated
twice), then a needle sentence (stated once). The ceiling is the same model asked in the same way about the same kinds of facts, with nothing but one chunk to
read. What was read is kept beside the result every half minute: the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from common import ROOT, facts, read_text, table, write_json

import longreach
from longreach import quantities
from longreach.apps.infiniretri.prompt import Frame, build
from longreach.apps.infiniretri.reading import InfiniRetri, Read
from longreach.apps.infiniretri.sentences import Sentence, chunks
from longreach.apps.infiniretri.sizes import Sizes
from longreach.evals.samples import haystack, words
from longreach.evals.tasks import passkeys
from longreach.planning.machine import peak_memory, resident_memory
from longreach.running import generation, prompts

NEW_TOKENS = 24
KEPT_EVERY = 30  # seconds
KINDS = ("pass key", "needle")


@dataclass(frozen=True)
class Fact:
    kind: str
    sentence: str
    question: str
    key: str
    lead: str  # the beginning of the answer, which is given to the model

    @classmethod
    def draw(cls, kind: str, number: int, rng: Random) -> Fact:
        if kind == "pass key":
            name, key = passkeys.NAMES[number % len(passkeys.NAMES)], str(rng.randrange(10_000, 100_000))
            sentence = passkeys.WORDING.statement.format(name=name, key=key)
        else:
            name, key = f"{rng.choice(words.NOUNS)} code of {words.two_words(rng)}", words.number(rng)
            sentence = f"The {name} is {key}."
        return cls(kind, sentence, f"What is the {name}?", key, f" The {name} is")

    def frame(self, tokenizer: Any) -> Frame:
        return Frame.of(tokenizer, self.question, lead=self.lead)


@dataclass(frozen=True)
class Text:
    """A text of so many characters, with a fact at a depth, 0 to 1. It is made anew whenever it is read, a paragraph at a time."""

    books: tuple[str, ...]
    length: int
    fact: Fact
    depth: float

    def __iter__(self) -> Iterator[str]:
        done, waiting = 0, True
        while done < self.length:
            for book in self.books:
                for paragraph in book.split("\n\n"):
                    piece = f"{paragraph}\n\n"
                    if waiting and done >= self.depth * self.length:
                        piece, waiting = f"{self.fact.sentence}\n\n{piece}", False
                    yield piece
                    if (done := done + len(piece)) >= self.length and not waiting:
                        return


def ceiling(asking: InfiniRetri, extension: Any, books: tuple[str, ...], sizes: Sizes, samples: int, seed: int, keep: Any) -> list[dict[str, Any]]:
    """Every sample: a chunk of a book with one fact, and the question. `keep` is told of each."""
    rows: list[dict[str, Any]] = keep()
    for number in range(len(rows), samples):
        rng = Random(f"{seed}:ceiling:{number}")
        fact, book = Fact.draw(KINDS[number % 2], number, rng), rng.choice(books)
        passage = haystack.first_tokens(asking.tokenizer, book, haystack.sentence_start(book, rng.random()), sizes.chunk - 64)
        text = prompts.hide(passage, fact.sentence, rng.random())
        frame, (chunk, _) = fact.frame(asking.tokenizer), next(iter(chunks(asking.tokenizer, [text], 2 * sizes.chunk, sizes.sentence)))
        ids = build(asking.tokenizer, frame, chunk).ids
        answer = generation.answer(extension.model, asking.tokenizer, ids, NEW_TOKENS, extension=extension).text
        rows.append({"kind": fact.kind, "key": fact.key, "prompt_tokens": len(ids), "answer": answer, "right": haystack.number_in(answer) == fact.key})
        keep(rows)
        print(f"ceiling {number + 1} of {samples}: {sum(row['right'] for row in rows)} right", flush=True)
    return rows


class State:
    """What was measured so far, beside the result, under a hash of the settings."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        self.file, self.hash = file, hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        found = json.loads(file.read_text()) if file.exists() else {}
        fresh = {"settings": self.hash, "seconds": 0.0, "peak": 0, "resident": [], "answers": [], "read": None}
        self.held: dict[str, Any] = found if found.get("settings") == self.hash else fresh

    def keep(self, **more: Any) -> None:
        self.held |= {**more, "peak": max(self.held["peak"], peak_memory())}
        write_json(self.file, self.held)

    def read(self) -> Read | None:
        if (found := self.held["read"]) is None:
            return None
        memories = tuple(tuple(Sentence(text, start) for start, text in memory) for memory in found["memories"])
        return Read(memories, found["chunks"], found["tokens"], found["stop"])

    def keep_read(self, read: Read, seconds: float) -> None:
        memories = [[(sentence.start, sentence.text) for sentence in memory] for memory in read.memories]
        plain = {"memories": memories, "chunks": read.chunks, "tokens": read.tokens, "stop": read.stop}
        resident = [*self.held["resident"], [read.tokens, resident_memory()]]
        self.keep(read=plain, seconds=self.held["seconds"] + seconds, resident=resident)


def read_all(asking: InfiniRetri, extension: Any, text: Text, frame: Frame, sizes: Sizes, state: State) -> Read:
    before, started = state.read(), time.perf_counter()
    read = before
    for read in asking.steps(extension, text, [frame], sizes, before):
        if time.perf_counter() - started >= KEPT_EVERY:
            state.keep_read(read, time.perf_counter() - started)
            started = time.perf_counter()
            held = "held" if any(text.fact.key in sentence.text for sentence in read.memories[0]) else "not held"
            print(f"{read.tokens} tokens, {100 * read.stop // text.length} %, {state.held['seconds']:.0f} s, the key is {held}", flush=True)
    assert read is not None
    state.keep_read(read, time.perf_counter() - started)
    return read


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dtype")
    parser.add_argument("--text", type=Path, nargs="*", help="plain or .xz books; the book in the package if not given")
    parser.add_argument("--tokens", type=quantities.token_count, default=quantities.token_count("1m"))
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--chunk-tokens", type=quantities.token_count)
    parser.add_argument("--memory-tokens", type=quantities.token_count)
    parser.add_argument("--layer", default="auto", help="a number; last; or auto: the one that a calibration finds")
    parser.add_argument("--ceiling", type=int, default=40, help="questions about one chunk")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    name = Path(args.model).stem.lower()
    out = args.out or ROOT / f"benchmarks/results/infiniretri-{name}-{args.tokens // 1024}k.json"
    books = tuple(map(read_text, args.text)) if args.text else (longreach.shipped_book(),)
    model, tokenizer = longreach.load(args.model, dtype=args.dtype)
    sample = books[0][:200_000]
    characters = round(args.tokens * len(sample) / len(prompts.encode(tokenizer, sample, special=False)))
    rng = Random(args.seed)
    hidden = tuple(Fact.draw(KINDS[number % 2], number // 2, rng) for number in range(args.questions))
    frames = [fact.frame(tokenizer) for fact in hidden]
    with longreach.extend(model, longreach.Stock()) as extension:
        asking = InfiniRetri(extension, tokenizer, args.chunk_tokens, args.memory_tokens, layer=int(args.layer) if args.layer.isdigit() else args.layer)
        needed = None
        if args.layer == "auto":
            found = asking.calibrate()
            asking, needed = replace(asking, layer=found.layer), dict(found.needed)
            print(f"layer {found.layer}: {found.needed[found.layer]:.0f} tokens of a chunk are enough on average", flush=True)
        sizes, layer = asking.sizes(extension, frames, NEW_TOKENS), asking.tapped(extension)
        settings = {
            "model": name, "dtype": str(model.dtype), "tokens": args.tokens, "questions": args.questions, "chunk_tokens": sizes.chunk,
            "memory_tokens": sizes.memory, "layer": layer, "seed": args.seed, "books": [hashlib.sha256(book.encode()).hexdigest()[:16] for book in books],
        }  # fmt: skip
        state = State(out.with_suffix(".state.json"), settings)

        def keep(rows: list[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
            if rows is not None:
                state.keep(ceiling=rows)
            return list(state.held.get("ceiling", []))

        inside = ceiling(asking, extension, books, sizes, args.ceiling, args.seed, keep)
        for number in range(len(state.held["answers"]), len(hidden)):
            fact, frame = hidden[number], frames[number]
            text = Text(books, characters, fact, (number + 0.5) / len(hidden))
            read = read_all(asking, extension, text, frame, sizes, state)
            started = time.perf_counter()
            answer, sentences = asking.answer(extension, frame, read.memories[0], sizes, NEW_TOKENS)
            kept = [sentence.start for sentence in sentences if fact.key in sentence.text]
            row = {
                "kind": fact.kind, "question": fact.question, "key": fact.key, "depth": text.depth, "answer": answer.text,
                "right": haystack.number_in(answer.text) == fact.key, "kept": bool(kept), "places": kept, "sentences": len(sentences), "order": asking.order,
                "chunks": read.chunks, "text_tokens": read.tokens, "characters": read.stop, "answer_seconds": time.perf_counter() - started,
            }  # fmt: skip
            state.keep(answers=[*state.held["answers"], row], read=None)
            print(f"question {number + 1} of {len(hidden)}: {'kept' if kept else 'lost'}, {'right' if row['right'] else 'wrong'}", flush=True)
    result = {
        "facts": facts(torch.device("cpu")), **settings, "needed": needed, "prompt_limit": sizes.limit, "reading_seconds": state.held["seconds"],
        "peak_memory_bytes": state.held["peak"], "resident_bytes": state.held["resident"], "answers": state.held["answers"], "ceiling": inside,
    }  # fmt: skip
    write_json(out, result)
    state.file.unlink()
    print(report(result))


def report(result: dict[str, Any]) -> str:
    rows = []
    for kind in KINDS:
        asked, inside = ([row for row in result[part] if row["kind"] == kind] for part in ("answers", "ceiling"))
        counts = [f"{sum(row[what] for row in asked)} of {len(asked)}" for what in ("kept", "right")]
        rows.append([kind, *counts, f"{sum(row['right'] for row in inside)} of {len(inside)}"])
    mebibytes = [bytes_ / 2**20 for _, bytes_ in result["resident_bytes"]]
    return "\n".join((
        table(f"{result['model']}, {result['answers'][0]['text_tokens']} tokens", ["", "kept", "answered", "answered inside one chunk"], rows),
        f"{result['answers'][0]['chunks']} chunks of at most {result['chunk_tokens']} tokens, {result['memory_tokens']} remembered, layer {result['layer']}: "
        f"{result['reading_seconds']:.0f} s of reading for {len(result['answers'])} texts",
        f"peak memory {result['peak_memory_bytes'] / 2**20:.0f} MiB; while reading {min(mebibytes):.0f} to {max(mebibytes):.0f} MiB",
    ))  # fmt: skip


if __name__ == "__main__":
    main()
