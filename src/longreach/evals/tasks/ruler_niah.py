"""RULER's eight needle tasks: magic numbers, words or UUIDs in noise, in an essay, or among other needles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random
from typing import Any, ClassVar

from longreach.evals.samples import fitting, words
from longreach.evals.samples.base import Parts, Sample, Settings, generator
from longreach.evals.tasks.ruler import Ruler
from longreach.hf.interfaces import Tokenizer

DRAW: dict[str, Callable[[Random], str]] = {"words": words.two_words, "numbers": words.number, "uuids": words.uuid4}
DEPTHS = [round(100 * i / 39) for i in range(40)]


class Niah(Ruler):
    """`keys` keys with `values` values each; `queries` of the keys are asked for.

    filler  "noise" (one line repeated), "essay" (the text of the user or the shipped book, from its beginning, repeated if it is short),
            "needles" (other needles). A text of the user takes the place of noise too.
    """

    filler: ClassVar[str] = "essay"
    key_type: ClassVar[str] = "words"
    value_type: ClassVar[str] = "numbers"
    keys: ClassVar[int] = 1
    values: ClassVar[int] = 1
    queries: ClassVar[int] = 1
    new_tokens: ClassVar[int] = 128

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        self.check(settings)
        filler = "essay" if self.filler == "noise" and settings.text is not None else self.filler
        text = fitting.haystack_text(settings) if filler == "essay" else ""
        for length in settings.lengths:
            essay = fitting.Passage(text, length) if text else None
            for index in range(settings.samples):
                yield self._sample(tokenizer, settings, filler, text, essay, length, index)

    def _sample(self, tokenizer: Tokenizer, settings: Settings, filler: str, text: str, essay: fitting.Passage | None, length: int, index: int) -> Sample:
        rng = generator(settings, self.name, length, index)
        taken: list[str] = []
        keys = [self._new(rng, self.key_type, taken, text) for _ in range(max(self.keys, self.queries))]
        facts = [(key, self._new(rng, self.value_type, taken, text)) for key in keys for _ in range(self.values)]
        real = tuple(taken)
        asked = rng.sample(keys, self.queries)
        references = tuple(value for wanted in asked for key, value in facts if key == wanted)
        depths = sorted(rng.sample(DEPTHS, len(facts)))
        needles = [self._needle(key, value) for key, value in facts]
        Random(settings.seed).shuffle(needles)  # the same order in every sample, as published
        prefix, query, answer_prefix = self._prompt(asked)

        others: list[str] = []
        more = generator(settings, self.name, length, index, "others")

        def units(n: int) -> list[str]:
            if essay:
                return essay.sentences(n)
            if filler == "noise":
                return [fitting.FILLER] * n
            while len(others) < n:
                others.append(self._needle(*(fitting.fresh(DRAW[kind], more, real) for kind in (self.key_type, self.value_type))))
            return others[:n]

        def build(n: int) -> Sample:
            lines = units(n)
            if filler == "essay":
                at, placed = [int(len(lines) * depth / 100) for depth in depths], needles
            else:  # the first needle gets the last place
                at, placed = sorted(generator(settings, self.name, length, index, "places").sample(range(n), len(needles))), needles[::-1]
            for place, needle in reversed(list(zip(at, placed))):
                lines.insert(place, needle)
            document = (" " if filler == "essay" else "\n").join(lines)
            meta = {"length_target": length, "seed": settings.seed, "index": index, "filler": filler} | _depths(document, references)
            return Sample(f"{self.name}/{length}/{index}", Parts(document, query, prefix, answer_prefix), references, self.new_tokens, meta, chat="prefix")

        if essay:
            return fitting.fill(tokenizer, build, length, 0, essay.size)
        return fitting.fill(tokenizer, build, length, len(needles))

    @staticmethod
    def _new(rng: Random, kind: str, taken: list[str], text: str) -> str:
        taken.append(fitting.fresh(DRAW[kind], rng, taken, text))
        return taken[-1]

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value_type} for {key} is: {value}."

    def _prompt(self, asked: list[str]) -> tuple[str, str, str]:
        names = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        kind = self.value_type
        if self.queries * self.values == 1:
            kind = kind.removesuffix("s")
            announced, asked_for, begun = f"A special magic {kind} is", f"What is the special magic {kind}", f"The special magic {kind}"
        else:
            announced, asked_for, begun = f"Some special magic {kind} are", f"What are all the special magic {kind}", f"The special magic {kind}"
        verb = announced.rsplit(" ", 1)[1]
        return (
            f"{announced} hidden in the text below. Read it with care: at its end you will be asked for the {kind}.\n",
            f"\n{asked_for} for {names} mentioned in the provided text?",
            f" {begun} for {names} mentioned in the provided text {verb}",
        )


def _depths(document: str, references: tuple[str, ...]) -> dict[str, Any]:
    """Places are drawn, so results are grouped by tenths; with several needles there is no one depth."""
    actual = [fitting.depth_of(document, reference) for reference in references]
    return {"depth": round(actual[0], 1), "depth_actual": actual[0]} if len(actual) == 1 else {"depths_actual": actual}


class NiahSingle1(Niah):
    name: ClassVar[str] = "ruler-niah-single-1"
    filler: ClassVar[str] = "noise"


class NiahSingle2(Niah):
    name: ClassVar[str] = "ruler-niah-single-2"


class NiahSingle3(Niah):
    name: ClassVar[str] = "ruler-niah-single-3"
    value_type: ClassVar[str] = "uuids"


class NiahMultikey1(Niah):
    name: ClassVar[str] = "ruler-niah-multikey-1"
    keys: ClassVar[int] = 4


class NiahMultikey2(Niah):
    name: ClassVar[str] = "ruler-niah-multikey-2"
    filler: ClassVar[str] = "needles"


class NiahMultikey3(Niah):
    name: ClassVar[str] = "ruler-niah-multikey-3"
    filler: ClassVar[str] = "needles"
    key_type: ClassVar[str] = "uuids"
    value_type: ClassVar[str] = "uuids"


class NiahMultivalue(Niah):
    name: ClassVar[str] = "ruler-niah-multivalue"
    values: ClassVar[int] = 4


class NiahMultiquery(Niah):
    name: ClassVar[str] = "ruler-niah-multiquery"
    queries: ClassVar[int] = 4
