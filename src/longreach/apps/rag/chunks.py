"""Documents, and the chunks they are cut into: exact covers, with offsets.

Knows texts only; not tokenizers, models or what a chunk is retrieved for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from longreach.apps.parts import sentence_ends, word_starts
from longreach.quantities import counted
from longreach.running.prompts import half_pair

MOST_CHUNKS = 2**20
MOST_WORDS = 2**20


@dataclass(frozen=True)
class Document:
    """A text, and what it is called in a prompt; "" for a text without a name."""

    name: str
    text: str


@dataclass(frozen=True)
class Chunk:
    """A piece of a document: `documents[document].text[start:stop] == text`. `index` counts the chunks of all documents."""

    index: int
    document: int
    start: int
    stop: int
    text: str


def is_text(value: object) -> bool:
    """Whether it is a string that a tokenizer takes."""
    return isinstance(value, str) and half_pair(value) is None


def documents_of(given: str | Sequence[str] | Mapping[str, str]) -> tuple[Document, ...]:
    """One text, several, or texts by name. Raises ValueError where there is nothing to read in one of them."""
    if isinstance(given, str):
        found = [Document("", given)]
    elif isinstance(given, Mapping):
        found = [Document(name, text) for name, text in given.items()]
    elif isinstance(given, Iterable):
        found = [Document("", text) for text in given]
    else:
        raise ValueError(f"the documents must be a text, a list of texts, or texts by name, not {type(given).__name__}")
    if not found:
        raise ValueError("there are no documents; pass a text, a list of texts, or texts by name")
    for number, document in enumerate(found, 1):
        if not is_text(document.text) or not is_text(document.name):
            raise ValueError(f"document {number} is not text; pass strings of Unicode characters")
        if not document.text.strip():
            raise ValueError(f"document {document.name or number!r} is empty; leave it out, or pass its text")
    return tuple(found)


def split(documents: Sequence[Document], words: int | None) -> tuple[Chunk, ...]:
    """The chunks of all documents, in their order: at most `words` words each, with the white space behind them. Joined, the chunks of a document are its text.

    A chunk ends with a sentence where one ends in its second half, so that few facts are cut in two; the papers count words only.
    `words` None: every document is one chunk. Raises ValueError for more than MOST_CHUNKS.
    """
    found: list[Chunk] = []
    for number, document in enumerate(documents):
        start = 0
        for stop in _stops(document.text, words):
            found.append(Chunk(len(found), number, start, stop, document.text[start:stop]))
            start = stop
            if len(found) > MOST_CHUNKS:
                raise ValueError(f"the documents have more than {counted(MOST_CHUNKS, 'chunk')} of {words} words; pass a larger chunk_words (--chunk-words)")
    return tuple(found)


def _stops(text: str, words: int | None) -> Iterator[int]:
    """Where the chunks of a text end; the last one with the text."""
    if words is not None:
        starts = word_starts(text)
        ends = [bisect_left(starts, end) for end in sentence_ends(text)]  # the word that a sentence begins with
        first = 0
        while len(starts) - first > words:
            last = first + words  # the word that does not fit
            end = ends[place - 1] if (place := bisect_right(ends, last)) else 0
            first = end if end >= last - words // 2 and end > first else last
            yield starts[first]
    yield len(text)


def passages(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Chunks in their given order, those that follow each other in a document together: read as one, nothing stands between them."""
    found: list[list[Chunk]] = []
    for chunk in chunks:
        if found and (last := found[-1][-1]).document == chunk.document and last.stop == chunk.start:
            found[-1].append(chunk)
        else:
            found.append([chunk])
    return found
