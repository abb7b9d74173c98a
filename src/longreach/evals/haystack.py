"""A fact hidden in a text and asked back: the pass key.

Knows texts, tokenizers and random numbers; not models or methods. A trial is a function of the random generator it is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any


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
    ending = "\n\n" + wording.question + wording.lead
    start = sentence_start(text, rng.random())
    document = passage_with(tokenizer, text, start, statement, depth, length - answer_tokens, lambda document: document + ending)
    if document is None:
        raise ValueError(f"a key, its question and an answer do not fit into {length} tokens; choose a greater length")
    encoded = tokenizer(document + ending, return_offsets_mapping=True)
    ids, spans = open_ended(tokenizer, encoded["input_ids"]), encoded["offset_mapping"]
    stated = document.rindex(statement) + len(statement)
    return Trial(ids, key, depth, sum(begin >= stated for begin, _ in spans[: len(ids)]))


def passage_with(tokenizer: Any, text: str, start: int, sentence: str, depth: float, most: int, prompt: Callable[[str], str]) -> str | None:
    """A passage from `start` on with the sentence at `depth`, as long as its prompt has at most `most` tokens; None if not even the sentence fits."""
    room = most - token_count(tokenizer, prompt(sentence))
    while room > 0:
        document = hide(first_tokens(tokenizer, text, start, room), sentence, depth)
        over = token_count(tokenizer, prompt(document)) - most
        if over <= 0:
            return document
        room -= over
    return None


def depth_of(document: str, sentence: str) -> float:
    """Where a sentence stands in a document: 0 at its beginning, 1 at its end."""
    return document.index(sentence) / max(1, len(document) - len(sentence))


def token_count(tokenizer: Any, text: str) -> int:
    """Tokens of a prompt, with the special tokens that open it."""
    return len(open_ended(tokenizer, tokenizer(text)["input_ids"]))


def most_that_fit(tokens: Callable[[int], int], room: int) -> int:
    """The largest n with tokens(n) <= room, where `tokens` grows about evenly with n; -1 if not even none fits."""
    low, used = 0, tokens(0)
    if used > room:
        return -1
    slope = max((tokens(64) - used) / 64, 1e-3)
    high: int | None = None  # the smallest n known not to fit
    steps = 0
    while high is None or high - low > 1:
        n = low + max(1, int((room - used) / slope))
        if high is not None:
            n = min(n, high - 1) if steps % 3 else (low + high) // 2  # a step that creeps is followed by one that halves
        steps += 1
        if (needed := tokens(n)) <= room:
            low, used = n, needed
        else:
            high = n
    return low


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


def open_ended(tokenizer: Any, ids: list[int]) -> list[int]:
    """Some tokenizers end every text, but the model is to go on."""
    ends = {token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None} - {tokenizer.bos_token_id}
    return list(ids[:-1] if ids and ids[-1] in ends else ids)
