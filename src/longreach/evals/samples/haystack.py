"""A fact hidden in a text and asked back: the pass key.

Knows texts, tokenizers and random numbers; not models or methods. A trial is a function of the random generator it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from longreach.evals.samples.base import Parts, Sample
from longreach.evals.samples.fitting import needs, room_beside
from longreach.hf.interfaces import Tokenizer
from longreach.running.prompts import encode_with_spans, hide, shrink


@dataclass(frozen=True)
class Wording:
    """How a key is stated and asked for; `{key}` stands for the number.

    lead  the beginning of the answer, which is given to the model as in the published prompts; "" leaves it to the model.
    """

    statement: str = "The pass key is {key}. Remember it. {key} is the pass key."
    question: str = "What is the pass key?"
    lead: str = " The pass key is"


PASS_KEY = Wording()


@dataclass(frozen=True)
class Trial:
    """A prompt with a key in it.

    ids       the prompt, with the special tokens that the tokenizer puts before a text.
    depth     where the key was put: 0 is the beginning of the text, 1 its end.
    distance  tokens between the end of the statement and the end of the prompt.
    """

    ids: list[int]
    key: str
    depth: float
    distance: int


def trial(
    tokenizer: Tokenizer, text: str, length: int, depth: float, rng: Random, *, wording: Wording = PASS_KEY, digits: int = 5, answer_tokens: int = 16
) -> Trial:
    """A passage of `text`, drawn at random, with a key at `depth`, so that prompt and `answer_tokens` are at most `length` tokens.

    Raises ValueError if the text is too short, the length too small, or the tokenizer cannot say where its tokens lie.
    """
    key = str(rng.randrange(10 ** (digits - 1), 10**digits))
    statement = wording.statement.format(key=key)

    def build(document: str) -> Sample:
        return Sample("pass key", Parts(document, f"\n\n{wording.question}", "", wording.lead), (key,), answer_tokens)

    sample = passage_with(tokenizer, text, sentence_start(text, rng.random()), statement, depth, length, build)
    ids, spans = encode_with_spans(tokenizer, sample.parts.text)
    stated = sample.parts.document.rindex(statement) + len(statement)
    return Trial(ids, key, depth, sum(begin >= stated for begin, _ in spans))


def passage_with(tokenizer: Tokenizer, text: str, start: int, sentence: str, depth: float, length: int, build: Callable[[str], Sample]) -> Sample:
    """The sample of a passage from `start` on with the sentence at `depth`, as long as its prompt and answer have at most `length` tokens.

    Raises ValueError if not even the sentence alone fits, or if the text is too short.
    """
    shortest = build(sentence)

    def make(room: int) -> tuple[Sample, int]:
        longer = build(hide(first_tokens(tokenizer, text, start, room), sentence, depth))
        return longer, needs(tokenizer, longer) - length

    return shrink(room_beside(tokenizer, shortest, length), make) or shortest


def number_in(answer: str) -> str | None:
    """The first number that an answer writes."""
    found = re.search(r"\d+", answer)
    return found[0] if found else None


def sentence_start(text: str, where: float) -> int:
    """The beginning of a sentence in the first nine tenths of the text."""
    return max(0, text.find(". ", round(0.9 * where * len(text))) + 1)


def first_tokens(tokenizer: Tokenizer, text: str, start: int, count: int) -> str:
    """The first `count` tokens of the text from `start` on; a passage that runs out goes on at the beginning."""
    available, size = text[start:] + "\n\n" + text, 5 * count
    while True:
        piece = available[:size].lstrip()
        _, spans = encode_with_spans(tokenizer, piece, special=False)
        if len(spans) >= count:
            return piece[: spans[count - 1][1]]
        if size >= len(available):
            raise ValueError(f"the text has fewer than {count} tokens; pass a longer text, or ask for shorter lengths")
        size *= 2
