"""A text cut into sentences, paragraphs or passages of so many words. The parts follow each other and cover the text exactly: joined they are the text.

Knows strings only. The white space behind a part belongs to it, so that a part can be left out of the text without a scar. What a word is, and where a sentence
ends, is said here for all who work on texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

Unit = Literal["sentence", "paragraph", "passage"]
UNITS: tuple[Unit, ...] = get_args(Unit)
WORDS = 100  # of a passage

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # scripts that put no spaces between words: each character counts as one
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]{{1,24}}")  # of a text without spaces (long numbers, data), 24 characters count as one
_BLANK_LINE = re.compile(r"\n[^\S\n]*+\n\s*+")
# behind a full stop, a question or exclamation mark, and what closes. Or behind a mark that needs no space.
_END = re.compile(
    r"(?<![.!?\u2026])[.!?\u2026]++[\"'\u2019\u201d\u00bb)\]]*+\s++|(?<![\u3002\uff01\uff1f])[\u3002\uff01\uff1f]++[\"\u201d\u300d\u300f\uff09]*+\s*+"
    r"|\n[^\S\n]*+\n\s*+"
)
_TITLE = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|Fig|vs|cf|e\.g|i\.e)|\b[A-Z])\.\s+$")  # "Mr. ", and initials: "J. S. Bach"


@dataclass(frozen=True, slots=True)
class Part:
    """text[start:stop] is `text`; offsets count characters of the whole."""

    start: int
    stop: int
    text: str


def unit_of(name: str) -> Unit:
    """The unit of that name. Raises ValueError for another."""
    for unit in UNITS:
        if name == unit:
            return unit
    raise ValueError(f"a text is cut by {', '.join(UNITS[:-1])} or {UNITS[-1]}, not by {name!r}")


def cut(text: str, by: Unit = "passage", words: int = WORDS) -> list[Part]:
    """The parts of a text; [] of an empty one.

    by     "sentence", "paragraph" (up to a blank line) or "passage".
    words  the length of a passage.

    Raises ValueError for another unit, and for passages without words.
    """
    by = unit_of(by)
    if words < 1:
        raise ValueError(f"a passage has at least 1 word, not {words}")
    ends = {"sentence": sentence_ends, "paragraph": _paragraphs, "passage": lambda text: word_starts(text)[words::words]}[by](text)
    return at(text, ends)


def sentence_ends(text: str) -> Iterator[int]:
    """Where the next sentence or paragraph begins, behind white space; not behind titles and initials, nor before a small letter of any alphabet."""
    for end in _END.finditer(text):
        goes_on = end[0][0] in ".!?\u2026" and text[end.end() : end.end() + 1].islower() and not _BLANK_LINE.search(end[0])
        if not goes_on and not _TITLE.search(text, max(0, end.start() - 8), end.end()):
            yield end.end()


def word_starts(text: str) -> list[int]:
    """Where its words begin."""
    return [word.start() for word in _WORD.finditer(text)]


def at(text: str, ends: Iterable[int]) -> list[Part]:
    """The text cut at these places, in any order. A part that would be white space alone joins the one before it, at the beginning the one behind."""
    places = sorted({0, *ends, len(text)})
    blank = [text[start:stop].isspace() for start, stop in pairwise(places)]
    kept = [place for place, empty in zip(places[1:-1], blank[1:]) if not empty]  # not where a blank piece begins
    if blank and blank[0]:
        kept = kept[1:]
    return [Part(start, stop, text[start:stop]) for start, stop in pairwise([0, *kept, len(text)])] if text else []


def _paragraphs(text: str) -> Iterable[int]:
    return (blank.end() for blank in _BLANK_LINE.finditer(text))
