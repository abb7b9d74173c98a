"""InfiniteBench's retrieval tasks that need no data: the value of a key, and a string of digits.

Definitions: Zhang et al. 2024, arXiv 2402.13718. Generated at any length and depth, where the release has 122k and 90k tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import floor
from random import Random
from typing import ClassVar

from longreach.evals.samples import fitting
from longreach.evals.samples.base import Parts, Sample, Settings, Task, generator
from longreach.evals.scores import scorers
from longreach.evals.tasks.infinitebench import MARKS
from longreach.evals.tasks.needle_threading import stream
from longreach.hf.interfaces import Tokenizer


class _Synthetic(Task):
    group: ClassVar[str] = "infinitebench"
    license: ClassVar[str] = "generated; needs no data"
    source: ClassVar[str] = "arXiv 2402.13718"

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        self.check(settings)
        for length in settings.lengths:
            for index in range(settings.samples):
                for depth in settings.depths:
                    yield self._sample(tokenizer, settings, length, depth, index)

    def _sample(self, tokenizer: Tokenizer, settings: Settings, length: int, depth: float, index: int) -> Sample:
        raise NotImplementedError

    def _id(self, length: int, depth: float, index: int) -> str:
        return f"{self.name}/{length}/{depth:g}/{index}"


class KeyValueRetrieval(_Synthetic):
    """The value of a UUID key in a JSON object. Right if the value is a word of the answer."""

    name: ClassVar[str] = "infinitebench-kv-retrieval"

    def _sample(self, tokenizer: Tokenizer, settings: Settings, length: int, depth: float, index: int) -> Sample:
        haystack = stream(settings, index)

        def build(n: int) -> Sample:
            pairs = haystack.pairs(n)
            at = floor(depth * (n - 1))
            query = f'\n\nKey: "{pairs.keys[at]}"\nThe value of this key is:'
            meta = {"length_target": length, "depth": depth, "depth_actual": round(at / max(1, n - 1), 4), "seed": settings.seed, "index": index, "pairs": n}
            new_tokens = fitting.answer_tokens(tokenizer, f' "{pairs.values[at]}"', 50)
            parts = Parts(pairs.text, query, "Find the value of the key that is named below the JSON object.\n\n")
            return Sample(self._id(length, depth, index), parts, (pairs.values[at],), new_tokens, meta, chat="user_turn")

        return fitting.fill(tokenizer, build, length, 1)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": float(sample.references[0] in scorers.blanked(prediction, MARKS).split())}


class NumberString(_Synthetic):
    """Ten digits in runs of equal ones, among lines of noise or the sentences of the user's text. Right if the first number of the answer is theirs."""

    name: ClassVar[str] = "infinitebench-number-string"

    def _sample(self, tokenizer: Tokenizer, settings: Settings, length: int, depth: float, index: int) -> Sample:
        text = fitting.haystack_text(settings) if settings.text is not None else ""
        passage = fitting.Passage(text, length) if text else None
        digits = fitting.fresh(repeated_digits, generator(settings, self.name, length, depth, index), (), text)
        fact = f"The sequence of digits is {digits}. Remember it. {digits} is the sequence of digits."
        new_tokens = fitting.answer_tokens(tokenizer, f" {digits}", 12)

        def build(n: int) -> Sample:
            lines = passage.sentences(n) if passage else [fitting.FILLER] * n
            document = fitting.insert(lines, [(depth, fact)], " " if text else "\n")
            actual = fitting.depth_of(document, fact)
            meta = {"length_target": length, "depth": depth, "depth_actual": actual, "seed": settings.seed, "index": index}
            prefix = "A sequence of digits is hidden in much irrelevant text. Find it and remember it. You will be asked for it.\n\n"
            parts = Parts(document, "\n\nWhat is the sequence of digits?", prefix, " The sequence of digits is")
            return Sample(self._id(length, depth, index), parts, (digits,), new_tokens, meta, chat="prefix")

        return fitting.fill(tokenizer, build, length, 0, passage.size if passage else None)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": float(scorers.first_int(prediction) == sample.references[0])}


def repeated_digits(rng: Random, count: int = 10) -> str:
    """Digits in runs of one to four equal ones, which are easily miscounted; the first is not a zero."""
    digits = rng.choice("123456789") * rng.randint(1, 4)
    while len(digits) < count:
        digits += rng.choice("0123456789") * rng.randint(1, 4)
    return digits[:count]
