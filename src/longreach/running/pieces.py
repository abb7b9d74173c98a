"""The token ids of a text that comes in pieces and need not be in memory: those of the whole text.

Windows of the text are tokenised one after the other. Each shares its end with the beginning of the next. In the middle of what they share, far from where
either was cut, both have to give the same tokens at the same places; there they meet. A tokenizer decides by what stands near (words, runs of spaces or of
digits), so what follows such a place is what follows it in the whole text. Where two windows do not agree, they are tokenised as one.

Knows tokenizers and texts; not files, models or chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from longreach.hf.interfaces import Tokenizer
from longreach.running.prompts import Span, encode_with_spans

WINDOW = 2**18  # characters
SHARED = 2**12  # of them, with the next window
ALIKE = 16  # tokens that agree where two windows meet
LARGEST = 2**26  # characters that are tokenised at once where windows do not agree


def token_ids(tokenizer: Tokenizer, texts: Iterable[str], special: bool = True) -> Iterator[int]:
    """The ids of a text that comes in pieces of any lengths, such as an open file, which gives its lines.

        longreach.stream(extension, longreach.token_ids(tokenizer, open("book.txt", encoding="utf-8")), resume="book")

    special  with the tokens that the tokenizer puts before every text; what it puts after one is left out.

    They are those of the whole text: windows of 262144 characters are tokenised, which share 4096 with the next one and meet where both agree. Raises
    ValueError for a tokenizer that cannot say where its tokens lie (a slow one), and for a text whose tokens differ wherever it is cut.
    """
    pieces, size = iter(texts), WINDOW
    text, ended = _filled("", pieces, size)
    ids, spans = encode_with_spans(tokenizer, text, special)
    begun = 0  # tokens of this window that have been given
    while not ended:
        cut = max(0, len(text) - SHARED)
        following, ended = _filled(text[cut:], pieces, size)
        others = encode_with_spans(tokenizer, following, special=False)
        if (met := _meeting(ids, [(a - cut, b - cut) for a, b in spans], *others)) is not None:
            yield from ids[begun : met[0]]
            (ids, spans), begun, text, special, size = others, met[1], following, False, WINDOW
            continue
        text += following[len(text) - cut :]
        size = len(text)
        before, (ids, spans) = ids[:begun], encode_with_spans(tokenizer, text, special)
        if len(text) > LARGEST or ids[:begun] != before:
            raise ValueError(
                "the tokenizer of this model makes other tokens of this text wherever it is cut, so it cannot be read in pieces; read it whole: "
                "stream(extension, tokenizer(text)['input_ids']), or longreach run without --resume"
            )
    yield from ids[begun:]


def _filled(text: str, pieces: Iterator[str], size: int) -> tuple[str, bool]:
    """The text with more behind it, up to about so many characters -> it, and whether there is no more."""
    parts, length = [text], len(text)
    while length < size:
        if (piece := next(pieces, None)) is None:
            return "".join(parts), True
        parts.append(piece)
        length += len(piece)
    return "".join(parts), False


def _meeting(ids: list[int], spans: list[Span], others: list[int], places: list[Span]) -> tuple[int, int] | None:
    """Two lists of tokens, and their spans in the second window. -> from which token of the first on one of the second goes on, near the middle of what they
    share; None: nowhere do enough of them agree."""
    first = next((n for n, (a, _) in enumerate(spans) if a >= 0), len(ids))
    own, end = list(zip(ids[first:], spans[first:])), spans[-1][1] if spans else 0
    theirs = list(zip(others, places))
    at = {token: n for n, token in enumerate(theirs[: 2 * len(own)])}  # the last one, of several that look the same
    half = ALIKE // 2
    middle = next((n for n, (_, (a, _)) in enumerate(own) if a >= end // 2), 0)
    for n in sorted(range(half, len(own) - half + 1), key=lambda n: abs(n - middle)):
        found = at.get(own[n]) if n < len(own) else None
        if found is not None and found >= half and own[n - half : n + half] == theirs[found - half : found + half]:
            return first + n, found
    return None
