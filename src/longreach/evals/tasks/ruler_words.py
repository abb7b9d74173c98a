"""RULER's aggregation tasks: the common words of a numbered list, and the frequent words of a coded text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import ceil
from string import ascii_lowercase
from typing import Any, ClassVar

from longreach.evals.samples import fitting
from longreach.evals.samples.base import Parts, Sample, Settings, generator
from longreach.evals.tasks.ruler import Ruler
from longreach.hf.interfaces import Tokenizer

SHORT = 4096  # below this length the lists repeat their words less, as published


class CommonWords(Ruler):
    """A list in which `common` words come `common_repeats` times and the others `uncommon_repeats` times, after a short worked example.

    0 repeats are the published ones: 30 and 3, below 4096 tokens 6 and 1; in the example 10 and 3, or 3 and 1. The words are those of the
    shipped book with 4 to 10 small letters; a text of the user has no part in this task. The example precedes the task in the same turn.
    """

    name: ClassVar[str] = "ruler-cwe"
    options: ClassVar[dict[str, Any]] = {"common": 10, "common_repeats": 0, "uncommon_repeats": 0}
    new_tokens: ClassVar[int] = 120

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        self.check(settings)
        pool = word_pool()
        for length in settings.lengths:
            for index in range(settings.samples):
                yield self._sample(tokenizer, settings, pool, length, index)

    def _sample(self, tokenizer: Tokenizer, settings: Settings, pool: list[str], length: int, index: int) -> Sample:
        common = fitting.whole_number(self, settings, "common")
        short = length < SHORT
        often = fitting.whole_number(self, settings, "common_repeats", 0) or (6 if short else 30)
        seldom = fitting.whole_number(self, settings, "uncommon_repeats", 0) or (1 if short else 3)
        if often <= seldom:
            raise ValueError(f"{self.name} needs common_repeats greater than uncommon_repeats, not {often} and {seldom}")
        shown = 2 * common if short else 4 * common
        drawn = generator(settings, self.name, length, index).sample(pool, len(pool))
        example, drawn = drawn[:shown], drawn[shown:]
        key = (self.name, length, index)
        announced = "Below is a numbered list of words. Some of them stand in it more often than the others. Remember those that do.\n"
        query = f"\nQuestion: Which {common} words are the most common in the list above?"
        begun = f" Answer: The {common} words that are the most common in the list above are:"
        repeats = (3, 1) if short else (10, 3)
        solved = " ".join(f"{i}. {word}" for i, word in enumerate(example[:common], 1))
        worked = f"{announced}{self._list(settings, example, common, repeats, (*key, 'example'))}{query}{begun} {solved}\n"
        references = tuple(drawn[:common])
        new_tokens = fitting.answer_tokens(tokenizer, " ".join(f"{i}. {word}" for i, word in enumerate(references, 1)), self.new_tokens)

        def build(n: int) -> Sample:
            document = self._list(settings, drawn[:n], common, (often, seldom), (*key, "order"))
            meta = {"length_target": length, "seed": settings.seed, "index": index, "words": n, "repeats": [often, seldom]}
            return Sample(f"{self.name}/{length}/{index}", Parts(document, query, worked + announced, begun), references, new_tokens, meta, chat="prefix")

        return fitting.fill(tokenizer, build, length, common + 1, len(drawn))

    @staticmethod
    def _list(settings: Settings, words: list[str], common: int, repeats: tuple[int, int], key: tuple[Any, ...]) -> str:
        entries = words[:common] * repeats[0] + words[common:] * repeats[1]
        generator(settings, *key).shuffle(entries)
        return " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))


class FrequentWords(Ruler):
    """A text of made-up words whose counts fall with their rank as rank^-alpha. The most frequent "word" is the noise "..."; the next three are asked for.

    The vocabulary has one word per 50 tokens of the length. A text of the user has no part in this task.
    """

    name: ClassVar[str] = "ruler-fwe"
    options: ClassVar[dict[str, Any]] = {"alpha": 2.0}
    new_tokens: ClassVar[int] = 50

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        self.check(settings)
        alpha = self.option(settings, "alpha")
        if not isinstance(alpha, int | float) or not 1.01 <= alpha <= 20:
            raise ValueError(f"{self.name} needs an alpha of 1.01 to 20, not {alpha!r}")
        for length in settings.lengths:
            for index in range(settings.samples):
                yield self._sample(tokenizer, settings, float(alpha), length, index)

    def _sample(self, tokenizer: Tokenizer, settings: Settings, alpha: float, length: int, index: int) -> Sample:
        rng = generator(settings, self.name, length, index)
        vocabulary: dict[str, None] = {}  # in the order of drawing
        while len(vocabulary) < max(5, length // 50):
            vocabulary["".join(rng.choices(ascii_lowercase, k=6))] = None
        words = ["...", *list(vocabulary)[1:]]
        references = tuple(words[1:4])
        shares = [rank**-alpha / zeta(alpha) for rank in range(1, len(words) + 1)]
        prefix = "The text below is written in code. Count how often each coded word stands in it; the dots '...' are no word.\n"
        query = "\nQuestion: Leave out the dots '...'. Which three coded words stand most often in the text above?"
        begun = " Answer: The three coded words that stand most often in the text above are:"
        new_tokens = fitting.answer_tokens(tokenizer, f" {', '.join(references)}", self.new_tokens)

        def build(n: int) -> Sample:
            entries = [word for word, share in zip(words, shares) for _ in range(int(n * share))]
            generator(settings, self.name, length, index, "order").shuffle(entries)
            meta = {"length_target": length, "seed": settings.seed, "index": index, "words": len(entries)}
            return Sample(
                f"{self.name}/{length}/{index}", Parts(" ".join(entries), query, prefix, begun), references, new_tokens, meta, chat="prefix"
            )

        least = ceil(1 / (shares[3] - shares[4]))  # from here on the fourth rank always has more words than the fifth, so that the answer is defined
        return fitting.fill(tokenizer, build, length, least)


def word_pool() -> list[str]:
    """The words of the shipped book with 4 to 10 small letters."""
    from longreach.running.loading import shipped_book

    return sorted(set(re.findall(r"(?<![\w'-])[a-z]{4,10}(?![\w'-])", shipped_book())))


def zeta(s: float, terms: int = 1000) -> float:
    """Riemann's zeta for s > 1: a sum, and what its tail adds by Euler and Maclaurin."""
    return sum(k**-s for k in range(1, terms)) + terms ** (1 - s) / (s - 1) + 0.5 * terms**-s + s / 12 * terms ** (-s - 1)
