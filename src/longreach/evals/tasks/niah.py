"""A needle in a haystack (Kamradt, 2023): one sentence in a long text, asked back. A fact drawn at random, or the classic sentence.

The walk to the beginning of a sentence is done in characters and not in tokens, and the place where the needle really is, is recorded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar

from longreach.evals.samples import fitting, haystack
from longreach.evals.samples.base import Parts, Sample, Settings, Task, generator
from longreach.hf.interfaces import Tokenizer

NOUNS = "access vault courier harbour library archive ferry garden mill observatory signal tower".split()
CITIES = "Lisbon Oslo Cairo Quito Nairobi Kyoto Hanoi Tampere Dakar Riga Lima Perth Turin Sofia Accra Bergen".split()
LEAD, REST = "The best thing to do in San Francisco is", "eat a sandwich and sit in Dolores Park on a sunny day."
NEEDLE = f"{LEAD} {REST}"
KEY_PHRASES = ("eat a sandwich", "dolores park", "sunny day")


class _Needle(Task):
    """What both have in common: the haystack of a length and index is the same for every depth, so that depths are compared on one text."""

    license: ClassVar[str] = "generated; needs no data but a text"
    source: ClassVar[str] = "github.com/gkamradt/LLMTest_NeedleInAHaystack"
    answer_tokens: ClassVar[int]

    def needle(self, settings: Settings, length: int, depth: float, index: int) -> tuple[str, str, str, tuple[str, ...]]:
        """-> (needle, question, beginning of the answer, references)."""
        raise NotImplementedError

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        self.check(settings)
        from longreach.running.loading import shipped_book

        text = settings.text if settings.text is not None else shipped_book()
        for length in settings.lengths:
            for index in range(settings.samples):
                start = haystack.sentence_start(text, generator(settings, "niah", length, index).random())
                for depth in settings.depths:
                    yield self._sample(tokenizer, settings, text, start, length, depth, index)

    def _sample(self, tokenizer: Tokenizer, settings: Settings, text: str, start: int, length: int, depth: float, index: int) -> Sample:
        needle, question, lead, references = self.needle(settings, length, depth, index)
        if needle in text:
            raise ValueError(f"the text says already: {needle!r}; pass another text")

        def build(document: str) -> Sample:
            actual = fitting.depth_of(document, needle)
            meta = {"length_target": length, "depth": depth, "depth_actual": actual, "seed": settings.seed, "index": index}
            parts = Parts(document, f"\n\n{question}", "", lead)
            return Sample(f"{self.name}/{length}/{depth:g}/{index}", parts, references, self.answer_tokens, meta, chat="prefix")

        return haystack.passage_with(tokenizer, text, start, needle, depth, length, build)


class NeedleInAHaystack(_Needle):
    """A fact that no model can have memorised: "The <noun> code of <city> is <7 digits>." Found if the first number of the answer is the code."""

    name: ClassVar[str] = "niah"
    answer_tokens: ClassVar[int] = 16

    def needle(self, settings: Settings, length: int, depth: float, index: int) -> tuple[str, str, str, tuple[str, ...]]:
        rng = generator(settings, self.name, length, depth, index)
        what = f"{rng.choice(NOUNS)} code of {rng.choice(CITIES)}"
        code = str(rng.randrange(10**6, 10**7))
        return f"The {what} is {code}.", f"What is the {what}?", f" The {what} is", (code,)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": float(haystack.number_in(prediction) == sample.references[0])}


class ClassicNeedle(_Needle):
    """The sentence of the original test. `keywords` is the share of its three phrases in the answer, `rouge1_recall`
    that of the words which the beginning of the answer does not give."""

    name: ClassVar[str] = "niah-classic"
    metric: ClassVar[str] = "keywords"
    answer_tokens: ClassVar[int] = 64

    def needle(self, settings: Settings, length: int, depth: float, index: int) -> tuple[str, str, str, tuple[str, ...]]:
        return NEEDLE, "What is the best thing to do in San Francisco?", f" {LEAD}", (NEEDLE,)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        written = " ".join(prediction.lower().split())
        wanted, found = (Counter(re.findall(r"\w+", text.lower())) for text in (REST, prediction))
        return {
            "keywords": sum(phrase in written for phrase in KEY_PHRASES) / len(KEY_PHRASES),
            "rouge1_recall": (wanted & found).total() / wanted.total(),
        }
