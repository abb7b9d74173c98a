"""The Ancestral Trace Challenge: a chain of kinship facts in any order, and no haystack. Every fact is needed for the answer.

Definitions: Li et al. 2024, arXiv 2407.11963. Facts, names and worked examples are our own, in English only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

from longreach.evals.samples import fitting, words
from longreach.evals.samples.base import Parts, Sample, Settings, Task, generator
from longreach.hf.interfaces import Tokenizer

PUBLISHED_FACTS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
GENERATIONS = {"father": 1, "mother": 1, "dad": 1, "mom": 1} | dict.fromkeys(
    ("grandfather", "grandmother", "paternal grandfather", "paternal grandmother", "maternal grandfather", "maternal grandmother"), 2
)
TEMPLATES = (
    "{elder} is the {term} of {younger}.",
    "The {term} of {younger} is {elder}.",
    "{younger} has {elder} as {term}.",
    "For {younger}, {elder} is the {term}.",
    "To {younger}, {elder} has always been a good {term}.",
    "{younger} often visits {elder}, the {term} of {younger}.",
    "{elder} tells stories to {younger}, as the {term} of {younger}.",
)
INSTRUCTIONS = r"""Three examples of who descends from whom:
1. Ada is the mother of Tom. Who is the eldest ancestor of Tom? It is his mother. \boxed{Ada}
2. Tom is the dad of Eve. The grandmother of Tom is Joan. Who is 3 generations below Joan? Tom is 2 below, Eve 1 more. \boxed{Eve}
3. For Eve, Tom is the father. How many generations is Tom above Eve? \boxed{1}
Notes:
1. Each name is one person. Trust the text below only.
2. Father, mother, dad and mom are 1 generation above, every grandfather and grandmother 2.
3. End with the answer alone in \boxed{}.

"""
QUESTIONS = ("eldest-ancestor", "nth-ancestor", "nth-descendant", "distance")


@dataclass(frozen=True)
class Lineage:
    """names from the eldest to the youngest; facts[i] joins names[i] and names[i + 1]."""

    names: tuple[str, ...]
    facts: tuple[str, ...]
    generations: int

    def asked(self, kind: str) -> tuple[str, str]:
        """-> (question, answer)."""
        eldest, youngest = self.names[0], self.names[-1]
        return {
            "eldest-ancestor": (f"Who is the eldest ancestor of {youngest}?", eldest),
            "nth-ancestor": (f"Who is {self.generations} generations above {youngest}?", eldest),
            "nth-descendant": (f"Who is {self.generations} generations below {eldest}?", youngest),
            "distance": (f"How many generations is {eldest} above {youngest}?", str(self.generations)),
        }[kind]


class Family:
    """A chain of people drawn from one generator: a lineage of few facts is the younger end of one of many, in the same words."""

    def __init__(self, rng: Random, text: str = "") -> None:
        self._names = list(words.FULL_NAMES)
        rng.shuffle(self._names)
        risky = {name for name in words.LAST_NAMES if name in text}  # few, so that few full names need a search
        self._names = [name for name in self._names if not (name.split()[1] in risky and name in text)]
        self._rng = rng
        self._terms: list[tuple[str, str]] = []

    @property
    def most(self) -> int:
        return len(self._names) - 1

    def lineage(self, facts: int) -> Lineage:
        while len(self._terms) < facts:
            self._terms.append((self._rng.choice(TEMPLATES), self._rng.choice(tuple(GENERATIONS))))
        names = self._names[facts::-1]
        terms = self._terms[:facts][::-1]
        said = (template.format(elder=elder, younger=younger, term=term) for elder, younger, (template, term) in zip(names, names[1:], terms))
        return Lineage(tuple(names), tuple(said), sum(GENERATIONS[term] for _, term in terms))


class AncestralTrace(Task):
    """Four questions per index: the eldest ancestor, the n-th ancestor, the n-th descendant, the distance, all about the two ends of the chain.

    facts           counts of facts, such as [2, 8, 32]; empty: for every length as many as fit, and the published counts where no lengths are given.
                    With counts the lengths are not used, and a prompt is as long as it is.
    max_new_tokens  0 is 1024, but at most a quarter of the length.
    """

    name: ClassVar[str] = "ancestral-trace"
    version: ClassVar[str] = "2"
    license: ClassVar[str] = "generated; needs no data"
    source: ClassVar[str] = "arXiv 2407.11963"
    options: ClassVar[dict[str, Any]] = {"facts": (), "max_new_tokens": 0}

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        self.check(settings)
        counts = self._counts(settings)
        for size in counts or settings.lengths:
            for index in range(settings.samples):
                for kind in QUESTIONS:
                    if counts:
                        sample = self._build(settings, ("facts", size), kind, index, size, new_tokens(self, settings, None), None)
                        needed = fitting.needs(tokenizer, sample)
                        yield self._build(settings, ("facts", size), kind, index, size, sample.max_new_tokens, needed)
                    else:
                        yield self._filled(tokenizer, settings, size, kind, index)

    def _counts(self, settings: Settings) -> tuple[int, ...]:
        """Facts of the prompts; none if the lengths decide."""
        given = self.option(settings, "facts")
        counts = tuple(given) if isinstance(given, list | tuple) else (given,)
        most = len(words.FULL_NAMES) - 1
        if wrong := [n for n in counts if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= most]:
            raise ValueError(f"{self.name} needs whole numbers of 1 to {most} for facts, not {wrong[0]!r}")
        return counts or (() if settings.lengths else PUBLISHED_FACTS)

    def _filled(self, tokenizer: Tokenizer, settings: Settings, length: int, kind: str, index: int) -> Sample:
        family = Family(generator(settings, self.name, length, kind, index))
        answer = new_tokens(self, settings, length)
        return fitting.fill(tokenizer, lambda n: self._build(settings, (length,), kind, index, n, answer, length, family), length, 2, family.most)

    def _build(
        self, settings: Settings, key: tuple[Any, ...], kind: str, index: int, facts: int, answer: int, length: int | None, family: Family | None = None
    ) -> Sample:
        family = family or Family(generator(settings, self.name, *key, kind, index))
        lineage = family.lineage(facts)
        said = list(lineage.facts)
        generator(settings, self.name, *key, kind, index, "order").shuffle(said)
        question, right = lineage.asked(kind)
        meta = {"length_target": length, "facts": facts, "question": kind, "seed": settings.seed, "index": index}
        parts = Parts(" ".join(said), f"\n\nQuestion: {question}", INSTRUCTIONS)
        return Sample("/".join(map(str, (self.name, *key, kind, index))), parts, (box(right),), answer, meta, chat="user_turn")

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": boxed_match(prediction, sample.references[0])}


def new_tokens(task: Task, settings: Settings, length: int | None) -> int:
    """The tokens that a chain of thought and its box may take."""
    chosen = fitting.whole_number(task, settings, "max_new_tokens", 0)
    return chosen or (1024 if length is None else max(1, min(1024, length // 4)))


def box(answer: str) -> str:
    """The accepted answer in the form that is asked for."""
    return f"\\boxed{{{answer}}}"


def boxed_match(prediction: str, reference: str) -> float:
    """1 if the last box of the answer holds the reference, case by case of its letters; without a box an answer is wrong."""
    found = last_box(prediction)
    return float(bool(found) and clean(found or "") == last_box(reference))


def last_box(text: str) -> str | None:
    """What stands in the box that is opened last, without one more pair of braces around it. None if it is never closed."""
    start = text.rfind("\\boxed")
    if not text.startswith("\\boxed{", start):
        return None
    depth, start = 0, start + len("\\boxed")
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            inside = text[start + 1 : start + brace.start()]
            twice = re.fullmatch(r"\{(.*)\}\n?", inside)
            return twice[1] if twice else inside
    return None


def clean(answer: str) -> str:
    """Without what writers of LaTeX put around a name: \\text{}, further boxes, backslashes, straight quotes, a ~ for a blank, double white space."""
    for command in ("text", "boxed"):
        answer = re.sub(rf"\\{command}\{{([^}}]+)\}}", r"\1", answer)
    answer = re.sub(r"\\[\[\]]?", "", answer)
    return re.sub("[\"']", "", " ".join(answer.split())).replace("~", " ").strip()
