"""Does attribution find the passage that made an answer? Nano reads passages of the shipped book with a pass key hidden in them, and names it.

    python benchmarks/attribution.py                                  # 100 contexts of 2048 tokens: an hour or two on one core
    python benchmarks/attribution.py --contexts 3 --out try.json      # only to see that it runs

A context counts where nano's answer is the key. Then a second statement with another key is put into the same passage, and nano is asked again: whichever of
the two keys it names now, the passage that states it is to be found, and the other is not. For the first contexts leave-one-out over all parts stands beside
the search. Faithfulness: by how much log p(answer) falls when the parts that were found are taken out of the text, and when as many random ones are.

The file is written after every context, and the same command goes on from it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any

import torch
from common import ROOT, facts, table, write_json

import longreach
from longreach.apps.attribution.attribute import Attribution, Likelihoods, attribute, of_text, without_end
from longreach.apps.attribution.scores import LeaveOneOut, named
from longreach.apps.parts import Part, cut
from longreach.evals.samples import haystack
from longreach.evals.samples.base import Parts, Sample
from longreach.running import generation, prompts
from longreach.running.continuations import Continuations
from longreach.running.conversation import Conversation

WORDING = haystack.PASS_KEY
NEW = 16  # tokens of an answer at most
DRAWS = 3  # random sets of parts for each that was found


def statement(key: str) -> str:
    return WORDING.statement.format(key=key)


def passage(tokenizer: Any, book: str, rng: Random, length: int, keys: list[str]) -> str:
    """A passage of the book that states the keys, each at a depth of its own, so that the question and an answer have room in `length` tokens."""
    start, depths = haystack.sentence_start(book, rng.random()), [rng.random() for _ in keys]

    def build(document: str) -> Sample:
        for key, depth in zip(keys[1:], depths[1:]):
            document = prompts.hide(document, statement(key), depth)
        return Sample("", Parts(document, f"\n\n{WORDING.question}"), (keys[0],), NEW)

    return haystack.passage_with(tokenizer, book, start, statement(keys[0]), depths[0], length, build).parts.document


def rank(found: Attribution, text: str, key: str) -> int | None:
    """The first of the found parts that a piece of the statement lies in, from 1 on."""
    start = text.index(statement(key))
    stop = start + len(statement(key))
    return next((n for n, part in enumerate(found.parts, 1) if part.start < stop and start < part.stop), None)


def by_scorer(found: Attribution, text: str, key: str) -> dict[str, bool]:
    """Whether the first part of each score, among those that were reported, is the right one."""
    start, names = text.index(statement(key)), [scorer.name for scorer in named()]
    best = {name: max((part for part in found.parts if name in part.scores), key=lambda part: part.scores[name], default=None) for name in names}
    return {name: part is not None and part.start < start + len(statement(key)) and start < part.stop for name, part in best.items()}


class Subject:
    """The model, and what it is asked."""

    def __init__(self, extension: Any, tokenizer: Any, words: int) -> None:
        self.extension, self.tokenizer, self.words = extension, tokenizer, words
        self.talk = Conversation(extension.model, tokenizer)

    def answer(self, text: str) -> tuple[str | None, generation.Answer]:
        """-> (the key that it names, its answer)"""
        ids = self.talk.sequence(prompts.about(text, WORDING.question))
        found = generation.answer(self.extension.model, self.tokenizer, ids, NEW, extension=self.extension)
        return haystack.number_in(found.text), found

    def attribute(self, text: str, answer: generation.Answer, key: str) -> tuple[dict[str, Any], Attribution]:
        found = attribute(self.extension, self.tokenizer, text, WORDING.question, answer.text, words=self.words)
        work = found.work
        return {
            "parts": found.count, "rank": rank(found, text, key), "first_of": by_scorer(found, text, key), "scores": [part.score for part in found.parts],
            "evaluations": work.evaluations, "forwards": work.forwards, "tokens_read": work.tokens_read, "tokens_asked": work.tokens_asked,
            "seconds": round(work.seconds, 2),
        }, found  # fmt: skip

    def values(self, text: str, answer: generation.Answer) -> tuple[Likelihoods, list[Part], Continuations]:
        """v over the parts of the text, with exactly the tokens that the model wrote."""
        parts, reader = cut(text, "passage", self.words), Continuations(self.extension)
        places = of_text(self.talk, text, parts, WORDING.question)
        ids = without_end(answer.ids, self.extension, self.tokenizer)
        return Likelihoods(places, ids, reader, lambda done: None, lambda: False), parts, reader

    def exhaustive(self, text: str, answer: generation.Answer, key: str) -> dict[str, Any]:
        """Leave-one-out over all parts."""
        started = time.perf_counter()
        value, parts, reader = self.values(text, answer)
        asked = LeaveOneOut().coalitions(len(parts))
        scores = LeaveOneOut().scores(len(parts), dict(zip(asked, value(asked))).__getitem__)
        best, start = parts[scores.index(max(scores))], text.index(statement(key))
        return {
            "first": best.start < start + len(statement(key)) and start < best.stop, "evaluations": len(asked), "forwards": reader.forwards,
            "tokens_read": reader.tokens, "tokens_asked": value.asked, "seconds": round(time.perf_counter() - started, 2),
        }  # fmt: skip

    def faithfulness(self, text: str, answer: generation.Answer, found: Attribution, rng: Random) -> dict[str, Any]:
        """Drops of log p(answer), nats: without the first part, without all that have a score above 0, and without as many random ones."""
        value, parts, _ = self.values(text, answer)
        whole, at = frozenset(range(len(parts))), {part.start: n for n, part in enumerate(parts)}
        best = [at[part.start] for part in found.parts if part.score > 0]
        sets = {"first": [best[:1]], "found": [best]}
        sets |= {f"random {name}": [rng.sample(range(len(parts)), len(chosen[0])) for _ in range(DRAWS)] for name, chosen in sets.items()}
        asked = [whole, *(whole - {*each} for group in sets.values() for each in group)]
        left = dict(zip(asked, value(asked)))
        return {name: fmean(left[whole] - left[whole - {*each}] for each in group) for name, group in sets.items()} | {"count": len(best)}


def context(subject: Subject, book: str, length: int, seed: int, beside: bool) -> dict[str, Any]:
    """One context: what nano answers, and what is found."""
    rng = Random(seed)
    key, other = (str(number) for number in rng.sample(range(10_000, 100_000), 2))
    text = passage(subject.tokenizer, book, Random(seed), length, [key])
    named_key, answer = subject.answer(text)
    if named_key != key:
        return {"seed": seed, "right": False}
    row, found = subject.attribute(text, answer, key)
    record = {"seed": seed, "right": True, "planted": row, "faithfulness": subject.faithfulness(text, answer, found, rng)}
    if beside:
        record["exhaustive"] = subject.exhaustive(text, answer, key)
    text = passage(subject.tokenizer, book, Random(seed), length, [key, other])
    named_key, answer = subject.answer(text)
    if named_key in (key, other):
        row, found = subject.attribute(text, answer, named_key)
        record["injected"] = row | {"named": "planted" if named_key == key else "injected", "other": rank(found, text, key if named_key == other else other)}
    return record


def summary(contexts: list[dict[str, Any]]) -> dict[str, Any]:
    right = [each for each in contexts if each["right"]]
    injected = [each["injected"] for each in right if "injected" in each]
    beside = [each for each in right if "exhaustive" in each]

    def share(rows: list[dict[str, Any]], within: int) -> str:
        return f"{sum(row['rank'] is not None and row['rank'] <= within for row in rows)}/{len(rows)}"

    planted = [each["planted"] for each in right]
    work = ("evaluations", "forwards", "tokens_read", "tokens_asked", "seconds")
    return {
        "asked": len(contexts), "answered_rightly": len(right), "parts": median(row["parts"] for row in planted) if planted else None,
        "planted_first": share(planted, 1), "planted_among_five": share(planted, 5),
        "planted_first_by_score": {name: sum(row["first_of"][name] for row in planted) for name in (planted[0]["first_of"] if planted else ())},
        "injected_asked": len(injected), "injected_named": sum(row["named"] == "injected" for row in injected), "named_first": share(injected, 1),
        "named_among_five": share(injected, 5), "other_among_five": sum(row["other"] is not None for row in injected),
        "search": {name: fmean(each["planted"][name] for each in beside) for name in work} if beside else None,
        "exhaustive": {name: fmean(each["exhaustive"][name] for each in beside) for name in work} if beside else None,
        "exhaustive_first": f"{sum(each['exhaustive']['first'] for each in beside)}/{len(beside)}",
        "drop": {name: fmean(each["faithfulness"][name] for each in right) for name in (right[0]["faithfulness"] if right else ())},
    }  # fmt: skip


def words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {words(each)}" for name, each in value.items())
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def show(found: dict[str, Any]) -> str:
    return table("attribution on nano", ["", ""], [[name, words(value)] for name, value in found.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--contexts", type=int, default=100, help="that nano answers rightly")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--words", type=int, default=50, help="of a part")
    parser.add_argument("--exhaustive", type=int, default=20, help="contexts with leave-one-out over all parts beside the search")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/attribution.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {"length": options.length, "words": options.words, "exhaustive": options.exhaustive}
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    contexts: list[dict[str, Any]] = before["contexts"] if before.get("settings") == settings else []
    model, tokenizer = longreach.load("nano")
    book = longreach.shipped_book()
    with longreach.extend(model, context=options.length) as extension:
        subject = Subject(extension, tokenizer, options.words)
        while (right := sum(each["right"] for each in contexts)) < options.contexts:
            contexts.append(context(subject, book, options.length, len(contexts), right < options.exhaustive))
            found = {"facts": facts(torch.device("cpu")), "method": extension.method.brief(), "settings": settings}
            write_json(options.out, {**found, "summary": summary(contexts), "contexts": contexts})
            print(f"{len(contexts)} asked, {sum(each['right'] for each in contexts)} answered rightly", file=sys.stderr)
    print(show(summary(contexts)))


if __name__ == "__main__":
    main()
