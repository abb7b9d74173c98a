"""A fact hidden in a text and asked back: the pass key.

Knows texts, tokenizers and random numbers; not models or methods. A trial is a function of the random generator it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from longreach.evals.samples.base import Parts, Sample
from longreach.evals.samples.budget import open_ended
from longreach.evals.samples.fitting import needs, room_beside


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


def hide(document: str, sentence: str, depth: float) -> str:
    """The document with the sentence after the end of a sentence (or of a word) nearest before `depth` of its length."""
    at = round(depth * len(document))
    if 0 < at < len(document):
        before = max(document.rfind(end, 0, at) + 1 for end in (". ", "? ", "! ", ".\n"))
        at = before if at - before < 500 else max(document.rfind(" ", 0, at), 0)
    head, tail = document[:at].rstrip(), document[at:].lstrip()
    return " ".join(part for part in (head, sentence, tail) if part)


def trial(tokenizer: Any, text: str, length: int, depth: float, rng: Random, *, wording: Wording = PASS_KEY, digits: int = 5, answer_tokens: int = 16) -> Trial:
    """A passage of `text`, drawn at random, with a key at `depth`, so that prompt and `answer_tokens` are at most `length` tokens.

    Raises ValueError if the text is too short, the length too small, or the tokenizer cannot say where its tokens lie.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("hiding a key needs a fast tokenizer, which this model lacks; convert it with AutoTokenizer.from_pretrained(..., use_fast=True)")
    key = str(rng.randrange(10 ** (digits - 1), 10**digits))
    statement = wording.statement.format(key=key)

    def build(document: str) -> Sample:
        return Sample("pass key", Parts(document, f"\n\n{wording.question}", "", wording.lead), (key,), answer_tokens)

    sample = passage_with(tokenizer, text, sentence_start(text, rng.random()), statement, depth, length, build)
    encoded = tokenizer(sample.parts.text, return_offsets_mapping=True)
    ids, spans = open_ended(tokenizer, encoded["input_ids"]), encoded["offset_mapping"]
    stated = sample.parts.document.rindex(statement) + len(statement)
    return Trial(ids, key, depth, sum(begin >= stated for begin, _ in spans[: len(ids)]))


def passage_with(tokenizer: Any, text: str, start: int, sentence: str, depth: float, length: int, build: Callable[[str], Sample]) -> Sample:
    """The sample of a passage from `start` on with the sentence at `depth`, as long as its prompt and answer have at most `length` tokens.

    Raises ValueError if not even the sentence alone fits, or if the text is too short.
    """
    sample = build(sentence)
    room = room_beside(tokenizer, sample, length)
    while room > 0:
        longer = build(hide(first_tokens(tokenizer, text, start, room), sentence, depth))
        if (over := needs(tokenizer, longer) - length) <= 0:
            return longer
        room -= over  # the tokens at a seam may be one or two more than they were
    return sample


def number_in(answer: str) -> str | None:
    """The first number that an answer writes."""
    found = re.search(r"\d+", answer)
    return found[0] if found else None


def sentence_start(text: str, where: float) -> int:
    """The beginning of a sentence in the first nine tenths of the text."""
    return max(0, text.find(". ", round(0.9 * where * len(text))) + 1)


def first_tokens(tokenizer: Any, text: str, start: int, count: int) -> str:
    """The first `count` tokens of the text from `start` on; a passage that runs out goes on at the beginning."""
    available, size = text[start:] + "\n\n" + text, 5 * count
    while True:
        piece = available[:size].lstrip()
        spans = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(spans) >= count:
            return piece[: spans[count - 1][1]]
        if size >= len(available):
            raise ValueError(f"the text has fewer than {count} tokens; pass a longer text, or ask for shorter lengths")
        size *= 2
