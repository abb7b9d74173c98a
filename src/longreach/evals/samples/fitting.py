"""How much filler fits into a prompt, and where a fact stands in it.

Knows texts, samples, tokenizers and what a user chose for a task; not models. Everything is counted with the tokenizer of the model that is evaluated.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from itertools import accumulate
from random import Random

from longreach.evals.samples.base import Sample, Settings, Task
from longreach.evals.samples.budget import token_count
from longreach.hf.interfaces import Tokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LONGEST_TOKEN = 16  # characters that a token has on average at most, with much to spare: enough text is taken for this
_SENTENCE = re.compile(r"""\s*(?:.{1,600}?(?:[.!?]+["'\u201d\u2019)\]]*(?= |$)|[\u3002\uff01\uff1f]+|$)|.{1,600}(?= )|.{1,600})""")  # also Chinese full stops


def whole_number(task: Task, settings: Settings, name: str, least: int = 1) -> int:
    value = task.option(settings, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{task.name} needs a whole number of at least {least} for {name}, not {value!r}")
    return value


def one_of(task: Task, settings: Settings, name: str, known: Sequence[str]) -> str:
    value = task.option(settings, name)
    if value not in known:
        raise ValueError(f"{task.name} has no {name} {value!r}; choose one of {', '.join(known)}")
    return str(value)


def haystack_text(settings: Settings) -> str:
    """The user's text or the shipped book, with single spaces."""
    from longreach.running.loading import shipped_book

    text = " ".join((shipped_book() if settings.text is None else settings.text).split())
    if not text:
        raise ValueError("the text to hide facts in is empty; pass one with words, or none for the shipped book")
    return text


class Passage:
    """More than `length` tokens of a text with single spaces, from `start` on; at its end the text begins anew.

    It can be taken in any number of pieces, which are words. What has no spaces (Chinese, long numbers) is cut every 24 characters, so that
    the steps are small in any text.
    """

    def __init__(self, text: str, length: int, start: int = 0) -> None:
        size = LONGEST_TOKEN * length
        cut = text[start : start + size]
        if len(cut) < size:
            cut = " ".join([cut, *[text] * (size // len(text) + 1)])[:size]
        self.text = cut = cut.strip()
        self._pieces = [found.end() for found in re.finditer(r" ?[^ ]{1,24}", cut)]
        spans = [found.span() for found in _SENTENCE.finditer(cut)]
        self._ends = [end for _, end in spans]
        self._sentences = [cut[begin:end].strip() for begin, end in spans]

    @property
    def size(self) -> int:
        """In pieces."""
        return len(self._pieces)

    def sentences(self, pieces: int | None = None) -> list[str]:
        """The sentences of so many pieces, the last one perhaps unfinished; None: all of them. What goes on without an end is cut within 600 characters."""
        if pieces is None:
            return list(self._sentences)
        if not pieces:
            return []
        end = self._pieces[min(pieces, len(self._pieces)) - 1]
        whole = bisect_right(self._ends, end)
        rest = self.text[self._ends[whole - 1] if whole else 0 : end].strip()
        return [*self._sentences[:whole], *([rest] if rest else [])]


def insert(units: Sequence[str], facts: Sequence[tuple[float, str]], separator: str) -> str:
    """The units joined, each fact on the border of two units that is nearest to its depth: 0 is the beginning of the text, 1 its end."""
    borders = [0, *accumulate(len(unit) + len(separator) for unit in units)]
    found: list[list[str]] = [[] for _ in borders]
    for depth, fact in sorted(facts, key=lambda item: item[0]):
        wanted = depth * borders[-1]
        right = min(bisect_left(borders, wanted), len(borders) - 1)
        nearest = right - 1 if right and wanted - borders[right - 1] < borders[right] - wanted else right
        found[nearest].append(fact)
    merged = [*found[0]]
    for unit, here in zip(units, found[1:]):
        merged += [unit, *here]
    return separator.join(merged)


def depth_of(document: str, fact: str) -> float:
    """Where a fact first stands in a document: 0 is its beginning, 1 its end."""
    return round(document.index(fact) / max(1, len(document) - len(fact)), 4)


def fresh(draw: Callable[[Random], str], rng: Random, taken: Collection[str], text: str = "", tries: int = 1000) -> str:
    """A drawn string that is neither taken nor in the text."""
    for _ in range(tries):
        if (found := draw(rng)) not in taken and found not in text:
            return found
    raise ValueError(f"the text holds almost every word that a needle could have, such as {found!r}; pass another text")


def answer_tokens(tokenizer: Tokenizer, answer: str, least: int) -> int:
    """Room for an answer: what the benchmark gives, or more where this tokenizer writes the right answer with more."""
    return max(least, len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + 8)


def needs(tokenizer: Tokenizer, sample: Sample) -> int:
    """Tokens of prompt and answer."""
    return token_count(tokenizer, sample) + sample.max_new_tokens


def room_beside(tokenizer: Tokenizer, shortest: Sample, length: int) -> int:
    """Tokens that are left of the length beside the shortest sample of a task. Raises ValueError if it does not fit."""
    if (least := needs(tokenizer, shortest)) > length:
        raise ValueError(f"{shortest.id}: the shortest prompt of this task and its answer have {least} tokens; choose a length of at least {least}")
    return length - least


def fill(tokenizer: Tokenizer, build: Callable[[int], Sample], length: int, least: int = 0, most: int | None = None) -> Sample:
    """One of the samples build(least), build(least + 1), ...: the prompt and the answer are at most `length` tokens, and few are left.

    Few is less than one unit has, or a 2000th of the length. The size grows about evenly with n, so that a secant gets there in a few steps;
    every third step halves, for where it does not. Raises ValueError if the smallest does not fit, or if there are only `most` units and they
    leave room for more.
    """

    low, best = least, build(least)
    room = at_least = room_beside(tokenizer, best, length)
    high, over = None if most is None else most + 1, 0  # the smallest n known not to fit, and by how much; 0 if there is no such n
    unit, steps = 0.0, 0  # tokens of a unit, unknown at first
    while room >= max(unit, length / 2000) and (high is None or high - low > 1):
        if not unit:
            n = low + 16
        elif over:
            assert high is not None
            n = (low + high) // 2 if steps % 3 == 2 else low + int((high - low) * room / (room + over))
        else:
            n = low + int(room / unit)
        n = max(n, low + 1)
        if high is not None:
            n = min(n, high - 1)
        steps += 1
        sample = build(n)
        left = length - needs(tokenizer, sample)
        unit = max((at_least - left) / (n - least), 0.25)
        if left >= 0:
            low, room, best = n, left, sample
        else:
            high, over = n, -left
    if low == most and room > 2 * unit:
        raise ValueError(f"{best.id}: there are no more than {most} different units for it, and {room} of {length} tokens are left; choose a shorter length")
    return best
