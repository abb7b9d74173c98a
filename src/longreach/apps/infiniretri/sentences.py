"""A text of any length as sentences, each with its place in it. They follow each other and are the whole text, in however many pieces it comes.

Knows texts and the spans of tokens; not questions or models.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from longreach.apps.parts import sentence_ends
from longreach.hf.interfaces import Tokenizer
from longreach.running.prompts import encode_with_spans, require_text

SHORTEST = 10  # characters: "3. " does not stand alone
LONGEST = 1000  # of them; without an end, a sentence is cut at a space, or here
BLOCK = 2**13  # characters that are tokenised at once, and that a text is held of at least


@dataclass(frozen=True)
class Sentence:
    """Of a text, `text[start:stop]`, the white space that follows it included."""

    text: str
    start: int

    @property
    def stop(self) -> int:
        return self.start + len(self.text)


def sentences(texts: Iterable[str], start: int = 0) -> Iterator[Sentence]:
    """The sentences of a text that comes in pieces, from the character `start` on: up to a full stop, an empty line, or LONGEST characters.

    Raises ValueError for what is no text.
    """
    pieces, held, at, begun, ended = _behind(texts, start), "", 0, start, False  # `held` begins at the character `begun` of the text
    while True:
        if not ended and len(held) - at <= LONGEST:
            more, ended = _more(pieces, begun + len(held))
            held, at, begun = held[at:] + more, 0, begun + at
            continue
        if at == len(held):
            return
        stop = at + _end(held[at : at + LONGEST])
        yield Sentence(held[at:stop], begun + at)
        at = stop


def _behind(texts: Iterable[str], start: int) -> Iterator[str]:
    """The pieces without the first characters."""
    for piece in texts:
        yield piece[start:] if start else piece
        start = max(0, start - len(piece))


def _more(pieces: Iterator[str], at: int) -> tuple[str, bool]:
    """At least BLOCK characters more -> them, and whether there are no others."""
    parts, size, ended = [], 0, False
    while size < BLOCK and not ended:
        if (piece := next(pieces, None)) is None:
            ended = True
        else:
            require_text(piece, at + size)
            parts.append(piece)
            size += len(piece)
    return "".join(parts), ended


def _end(text: str) -> int:
    """Where the sentence ends that these characters begin with. There are fewer than LONGEST only at the end of the whole."""
    found = next((end for end in sentence_ends(text) if end >= SHORTEST), None)
    if found is not None or len(text) < LONGEST:
        return found or len(text)
    return _space(text) or LONGEST


def _space(text: str) -> int:
    """Behind its last white space; 0: there is none."""
    return max(map(text.rfind, (" ", "\n", "\t"))) + 1


def measured(tokenizer: Tokenizer, found: Iterable[Sentence], most: int) -> Iterator[tuple[Sentence, int]]:
    """Sentences with the number of their tokens; one of more than `most` is cut. Some are tokenised together, and a token counts where it ends."""
    for block in _blocks(found):
        text, first = "".join(sentence.text for sentence in block), block[0].start
        ends = [stop for _, stop in encode_with_spans(tokenizer, text, special=False)[1]]
        begun = 0
        for sentence in block:
            stop = bisect_right(ends, sentence.stop - first)
            yield from _cut(sentence, [end + first for end in ends[begun:stop]], most)
            begun = stop


def _blocks(found: Iterable[Sentence]) -> Iterator[list[Sentence]]:
    block: list[Sentence] = []
    for sentence in found:
        block.append(sentence)
        if sentence.stop - block[0].start >= BLOCK:
            yield block
            block = []
    if block:
        yield block


def _cut(sentence: Sentence, ends: list[int], most: int) -> Iterator[tuple[Sentence, int]]:
    """`ends`: where its tokens end in the whole text. A single character is not cut, however many tokens it has."""
    while len(ends) > most and len(sentence.text) > 1:
        last = ends[most - 1]
        if ends[most] == last:  # the next character would be cut among its tokens
            last = ends[max(0, bisect_left(ends, last) - 1)]
        stop = max(last - sentence.start, 1)
        stop = min(_space(sentence.text[:stop]) or stop, len(sentence.text) - 1)
        own = bisect_right(ends, sentence.start + stop)
        yield Sentence(sentence.text[:stop], sentence.start), own
        sentence, ends = Sentence(sentence.text[stop:], sentence.start + stop), ends[own:]
    yield sentence, len(ends)


def chunks(tokenizer: Tokenizer, texts: Iterable[str], most: int, longest: int, start: int = 0) -> Iterator[tuple[list[Sentence], int]]:
    """Sentences of at most `longest` tokens, as many together as have about `most` -> they, and the number of their tokens."""
    chunk: list[Sentence] = []
    size = 0
    for sentence, count in measured(tokenizer, sentences(texts, start), longest):
        if chunk and size + count > most:
            yield chunk, size
            chunk, size = [], 0
        chunk.append(sentence)
        size += count
    if chunk:
        yield chunk, size
