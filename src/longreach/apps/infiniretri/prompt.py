"""The prompt that some sentences make with a question, and which of its tokens are whose. Knows tokenizers and texts; not models.

Tokens are found by their spans, so nothing is searched for in a prompt, whatever the template, the tokenizer or the text is like.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from longreach.apps.infiniretri.sentences import Sentence
from longreach.hf.interfaces import Tokenizer
from longreach.running import prompts


@dataclass(frozen=True)
class Frame:
    """What stands around the sentences.

    asked    where the question begins and ends in `behind`.
    special  whether the tokenizer's special tokens come before it; a chat template writes its own.
    """

    before: str
    behind: str
    asked: tuple[int, int]
    special: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer, question: str, system: str | None = None, lead: str = "") -> Frame:
        """Of a question behind a text, in the chat template if there is one. `lead`: the beginning of the answer, which is given to the model.

        Raises ValueError for a question without words, and for a system message without a template.
        """
        prompts.require_text(question, what="the question")
        question = question.strip()
        if not question:
            raise ValueError("the question is empty, and what a text is read for decides what is kept of it; pass one")
        if system is not None and not prompts.has_template(tokenizer):
            raise ValueError("this model has no chat template, so there is no place for a system message; put its words into the question")
        before, behind, _ = prompts.around(tokenizer, question, system)
        return cls.around(before, behind + lead, question, not prompts.has_template(tokenizer))

    @classmethod
    def around(cls, before: str, behind: str, question: str, special: bool) -> Frame:
        """The question is where `behind` has it first; where a template has changed it, all of `behind` is."""
        at, question = behind.find(question.strip()), question.strip()
        begins = len(behind) - len(behind.lstrip())
        return cls(before, behind, (at, at + len(question)) if question and at >= 0 else (begins, max(begins + 1, len(behind))), special)


@dataclass(frozen=True, eq=False)
class Prompt:
    """The ids of the whole, and the sentences in it.

    context   its tokens of sentences, which follow each other; `owners`: the number of the sentence that each of them belongs to.
    question  those of the question. The rows that count are from its first token on.
    """

    ids: list[int]
    sentences: tuple[Sentence, ...]
    context: slice
    owners: list[int]
    question: slice


def build(tokenizer: Tokenizer, frame: Frame, sentences: Sequence[Sentence]) -> Prompt:
    """Sentences in their order; a space stands where one ends without white space that its successor in the text does not follow."""
    parts, stops = [frame.before], []
    at = len(frame.before)
    for number, sentence in enumerate(sentences):
        text = sentence.text.lstrip() if number == 0 else sentence.text
        if number == len(sentences) - 1:
            text = text.rstrip()
        elif sentences[number + 1].start != sentence.stop and not text[-1:].isspace():
            text += " "
        parts.append(text)
        at += len(text)
        stops.append(at)
    ids, spans = prompts.encode_with_spans(tokenizer, "".join([*parts, frame.behind]), frame.special)
    ends = (stop if start < stop else 0 for start, stop in spans)  # a token without characters is of the sentence before it
    places = list(itertools.accumulate(ends, max))  # where a token ends says whose it is: a space belongs to the word behind it
    first, last = _first(places, len(frame.before)), _first(places, at)
    asked = slice(_first(places, at + frame.asked[0]), max(1, _before(spans, at + frame.asked[1])))
    owners = [min(bisect_right(stops, place - 1), len(stops) - 1) for place in places[first:last]]
    return Prompt(ids, tuple(sentences), slice(first, last), owners, asked)


def _first(places: list[int], at: int) -> int:
    """The first token that ends behind a place."""
    return next((n for n, place in enumerate(places) if place > at), len(places))


def _before(spans: list[prompts.Span], at: int) -> int:
    """Behind the last token that begins before a place."""
    return next((n + 1 for n in range(len(spans) - 1, -1, -1) if spans[n][0] < min(at, spans[n][1])), len(spans))
