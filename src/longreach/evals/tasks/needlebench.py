"""NeedleBench over a text of the user or the shipped book: one needle, eleven needles, and a chain of needles that only together answer.

Definitions: Li et al. 2024, arXiv 2407.11963, version 2 of its scores. Needles, questions and worked examples are our own, in English. Lengths are
counted with the tokenizer of the model and include the answer, where the original counts another tokenizer's tokens and leaves a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from longreach.evals.samples import fitting, words
from longreach.evals.samples.base import Parts, Sample, Settings, Task, generator
from longreach.evals.samples.haystack import sentence_start
from longreach.evals.tasks.ancestral_trace import INSTRUCTIONS, Family, box, boxed_match, new_tokens
from longreach.hf.interfaces import Tokenizer

Needle = tuple[float, str]  # depth and sentence


class NeedleBench(Task):
    """The passage of an index begins at a drawn sentence and is the same at every depth, so that depths are compared on one text."""

    group: ClassVar[str] = "needlebench"
    license: ClassVar[str] = "generated; needs no data but a text"
    source: ClassVar[str] = "arXiv 2407.11963"

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        self.check(settings)
        text = fitting.haystack_text(settings)
        for length in settings.lengths:
            for index in range(settings.samples):
                start = sentence_start(text, generator(settings, "needlebench", length, index).random())
                passage = fitting.Passage(text, length, start)
                for depth in self.depths(settings):
                    yield self.sample(tokenizer, settings, text, passage, length, depth, index)

    def depths(self, settings: Settings) -> tuple[float | None, ...]:
        return settings.depths

    def sample(
        self, tokenizer: Tokenizer, settings: Settings, text: str, passage: fitting.Passage, length: int, depth: float | None, index: int
    ) -> Sample:
        raise NotImplementedError

    def fill(
        self,
        tokenizer: Tokenizer,
        settings: Settings,
        passage: fitting.Passage,
        length: int,
        depth: float | None,
        index: int,
        needles: list[Needle],
        finish: Callable[[str, str, dict[str, Any]], Sample],
    ) -> Sample:
        """As much of the passage as fits around the needles, each on a line of its own. `finish` makes the sample from its id, document and meta."""
        shown = f"{self.name}/{length}/{index}" if depth is None else f"{self.name}/{length}/{depth:g}/{index}"
        facts = [(place, f"\n{sentence}\n") for place, sentence in needles]

        def build(n: int) -> Sample:
            document = fitting.insert(passage.sentences(n), facts, " ")
            actual = [fitting.depth_of(document, sentence) for _, sentence in needles]
            meta: dict[str, Any] = {"length_target": length, "seed": settings.seed, "index": index, "depths_actual": actual}
            if depth is not None:
                meta |= {"depth": depth, "depth_actual": actual[0]}
            return finish(shown, document, meta)

        return fitting.fill(tokenizer, build, length, 0, passage.size)


class SingleRetrieval(NeedleBench):
    """What a village keeps in its tower; right if the two words of the thing stand in the answer, letter by letter."""

    name: ClassVar[str] = "needlebench-single-retrieval"

    def sample(
        self, tokenizer: Tokenizer, settings: Settings, text: str, passage: fitting.Passage, length: int, depth: float | None, index: int
    ) -> Sample:
        assert depth is not None
        ((village, thing),) = villages(settings, (self.name, length, index), 1, text)
        query, begun = f"\n\nWhat does the village of {village} keep in its tower?", f" {lead(village)}"
        answer = fitting.answer_tokens(tokenizer, f" {thing}", 32)

        def finish(id: str, document: str, meta: dict[str, Any]) -> Sample:
            return Sample(id, Parts(document, query, "", begun), (thing,), answer, meta, chat="prefix")

        return self.fill(tokenizer, settings, passage, length, depth, index, [(depth, f"{lead(village)} {thing}.")], finish)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": float(sample.references[0] in prediction)}


class MultiRetrieval(NeedleBench):
    """`needles` of them at even depths from the beginning to the end, in a drawn order; the share that is found."""

    name: ClassVar[str] = "needlebench-multi-retrieval"
    options: ClassVar[dict[str, Any]] = {"needles": 11}

    def depths(self, settings: Settings) -> tuple[float | None, ...]:
        return (None,)

    def sample(
        self, tokenizer: Tokenizer, settings: Settings, text: str, passage: fitting.Passage, length: int, depth: float | None, index: int
    ) -> Sample:
        count = fitting.whole_number(self, settings, "needles", 2)
        found = villages(settings, (self.name, length, index), count, text)
        needles = [(i / (count - 1), f"{lead(village)} {thing}.") for i, (village, thing) in enumerate(found)]
        asked = "、".join(f"What does the village of {village} keep in its tower?" for village, _ in found)  # the comma is the published one
        query = f'\n\n{asked}\nAnswer every question on a line of its own, as in "{lead(found[0][0])} ...".'
        answer = fitting.answer_tokens(tokenizer, "\n" + "\n".join(sentence for _, sentence in needles), 64)

        def finish(id: str, document: str, meta: dict[str, Any]) -> Sample:
            return Sample(id, Parts(document, query), tuple(thing for _, thing in found), answer, meta, chat="user_turn")

        return self.fill(tokenizer, settings, passage, length, depth, index, needles, finish)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": sum(thing in prediction for thing in sample.references) / len(sample.references)}


class MultiReasoning(NeedleBench):
    """`facts` kinship facts in a drawn order, the first at the depth and each further one a tenth of the document later; who is the eldest ancestor?

    max_new_tokens  0 is 1024, but at most a quarter of the length.
    """

    name: ClassVar[str] = "needlebench-multi-reasoning"
    version: ClassVar[str] = "2"
    options: ClassVar[dict[str, Any]] = {"facts": 3, "max_new_tokens": 0}

    def sample(
        self, tokenizer: Tokenizer, settings: Settings, text: str, passage: fitting.Passage, length: int, depth: float | None, index: int
    ) -> Sample:
        assert depth is not None
        count = fitting.whole_number(self, settings, "facts", 2)
        key = (self.name, length, index)
        lineage = Family(generator(settings, *key), passage.text).lineage(count)
        said = list(lineage.facts)
        generator(settings, *key, "order").shuffle(said)
        question, right = lineage.asked("eldest-ancestor")
        answer = new_tokens(self, settings, length)

        def finish(id: str, document: str, meta: dict[str, Any]) -> Sample:
            parts = Parts(document, f"\n\nQuestion: {question}", INSTRUCTIONS)
            return Sample(id, parts, (box(right),), answer, meta | {"facts": count}, chat="user_turn")

        places = [(min(1.0, depth + 0.1 * i), sentence) for i, sentence in enumerate(said)]
        return self.fill(tokenizer, settings, passage, length, depth, index, places, finish)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": boxed_match(prediction, sample.references[0])}


def lead(village: str) -> str:
    return f"In its tower the village of {village} keeps the"


def villages(settings: Settings, key: tuple[Any, ...], count: int, text: str) -> list[tuple[str, str]]:
    """Villages and what they keep, all different and none of it in the text."""
    rng = generator(settings, *key)
    names: list[str] = []
    things: list[str] = []
    for _ in range(count):
        names.append(fitting.fresh(words.place, rng, names, text))
        things.append(fitting.fresh(lambda rng: words.two_words(rng).replace("-", " "), rng, things, text))
    return list(zip(names, things))
