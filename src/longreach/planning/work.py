"""A layout -> how much it attends to: pairs of queries and keys, keys that one token reads, what the last token still sees.

Counts what the executor executes, from the same segments. Closed forms; knows index arithmetic only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from longreach.configs import Attention, Decoder, methods_of
from longreach.core.choice import Choice
from longreach.core.segments import Layout, Piece
from longreach.methods.base import Method

Recall = Literal["everything", "what is retrieved", "recent only", "fluent only", "untrained"]


@dataclass(frozen=True)
class Counts:
    """What one head of one layer does for a stretch of queries."""

    pairs: int  # query and key, attended to
    scored: int  # query and what it is compared with to choose, in widths of a key
    calls: int  # attention calls
    chosen: int = 0  # of the pairs, those whose key was chosen, and is gathered
    massed: int = 0  # of the pairs, those whose probability is formed once more when a block is complete

    def __add__(self, other: Counts) -> Counts:
        pairs, scored, calls = self.pairs + other.pairs, self.scored + other.scored, self.calls + other.calls
        return Counts(pairs, scored, calls, self.chosen + other.chosen, self.massed + other.massed)


@lru_cache(maxsize=512)
def layouts(architecture: Decoder, method: Method) -> dict[tuple[Attention, Layout], int]:
    """The distinct layers and how many there are of each. Remembered: a row asks a dozen times. Not to be changed by the caller."""
    methods = methods_of([layer.trained for layer in architecture.layers], method)
    return Counter((layer, own.layout(index)) for index, (layer, own) in enumerate(zip(architecture.layers, methods)))


def count(layout: Layout, start: int, stop: int) -> Counts:
    """The queries start .. stop in one forward."""
    total = Counts(0, 0, 0)
    for segment in layout.segments:
        visible, choosing = segment.visible, False
        if segment.choice is not None:
            first, choosing = segment.choice.of(start, stop)
            visible = replace(visible, first_query=max(first, visible.first_query))
        for piece in visible.pieces(start, stop):
            if choosing and segment.choice is not None and segment.choice.refresh and stop - start == 1:
                total += taken(segment.choice, segment.visible.keys_of(segment.choice.asked(start)[0]), visible.keys_of(start))
            elif choosing and segment.choice is not None and (segment.choice.queries > 1 or segment.choice.refresh):
                for a, b in segment.choice.together(piece.first, piece.last):
                    total += together(segment.choice, visible.keys_of(a), visible.keys_of(b - 1))
            elif choosing and segment.choice is not None:
                total += chosen(segment.choice, visible.keys_of(piece.first), visible.keys_of(piece.last - 1))
            else:
                total += Counts(pairs_of(piece), 0, 1)
    if layout.choice is not None and layout.choice.index.mass:  # queries that choose together go through all segments before the next ones do
        bands = [replace(segment.visible, high=high) for segment, high in layout.paying(layout.choice.index.mass)]
        massed = sum(pairs_of(piece) for band in bands for piece in band.pieces(start, stop))
        groups = (stop - 1) // layout.choice.queries - start // layout.choice.queries + 1
        total = replace(total, massed=massed, calls=groups * len(layout.segments))
    return total


def chosen(choice: Choice, first: int, last: int) -> Counts:
    """Queries that see first, first + 1, ... last keys, and choose among them."""
    block, lag = choice.block, choice.lag
    least = max(1, lag) + (choice.keep - 1) * block  # who sees fewer than a block more sees all
    pairs = ramp(last) - ramp(first - 1) - block * (sum_of_quotients(last + 1 - least, block) - sum_of_quotients(first - least, block))
    blocks = sum_of_quotients(last + 1 - lag, block) - sum_of_quotients(first - lag, block)
    return Counts(pairs, blocks * max(1, choice.index.width), 1, pairs)


def together(choice: Choice, first: int, last: int) -> Counts:
    """The same of queries that choose together, as the first of them does, among what is complete for it."""
    pairs = ramp(last) - ramp(first - 1) - (last - first + 1) * (first - choice.shown(first))
    return Counts(pairs, sum(choice.index.compared(choice.complete(first), last - first + 1)), 1, pairs)


def taken(choice: Choice, asked: int, keys: int) -> Counts:
    """The same of one query that sees `keys` keys and takes what was answered to an earlier one, which saw `asked`: its share of every stage."""
    pairs = choice.shown(keys, asked)
    stages = choice.index.compared(choice.complete(asked), 1)
    return Counts(pairs, sum(of // every for of, every in zip(stages, choice.refresh)), 1, pairs)


def sum_of_quotients(x: int, block: int) -> int:
    """Sum of floor(n / block) over 0 <= n < x."""
    return block * ramp(x // block - 1) + x // block * (x % block) if x > 0 else 0


def ramp(x: int) -> int:
    """1 + 2 + ... + x, 0 below."""
    return x * (x + 1) // 2 if x > 0 else 0


def pairs_of(piece: Piece) -> int:
    """Sum over its queries of the keys max(from_key, i - high + 1) <= j <= min(to_key - 1, i - low)."""
    return keys_up_to(piece, piece.low) - (0 if piece.high is None else keys_up_to(piece, piece.high))


def keys_up_to(piece: Piece, behind: int) -> int:
    """Sum over its queries of the keys from_key <= j < to_key with j <= i - behind."""
    width = piece.to_key - piece.from_key
    a, b = piece.first - behind - piece.from_key + 1, piece.last - behind - piece.from_key  # keys of the first and the last query
    if a > width:
        return (b - a + 1) * width
    full = max(0, b - width)  # queries that see all of the piece
    return ramp(b - full) - ramp(a - 1) + full * width


def spans(layout: Layout, index: int) -> Iterator[tuple[int, int]]:
    """The ranges of keys that query `index` sees."""
    for piece in (piece for segment in layout.segments for piece in segment.visible.pieces(index, index + 1)):
        first = piece.from_key if piece.high is None else max(piece.from_key, index - piece.high + 1)
        last = min(piece.to_key, index - piece.low + 1)
        if first < last:
            yield first, last


def recall(architecture: Decoder, method: Method, window: int, tokens: int, new_tokens: int) -> tuple[Recall, str]:
    """What the last of `tokens` tokens can draw on, of which `new_tokens` are the answer; and the same in words."""
    capacity = method.capacity(window)
    if capacity is not None and tokens > capacity:
        return "untrained", f"nothing is certain: distances beyond {capacity} tokens were never trained"
    full = [layout for layer, layout in layouts(architecture, method) if layer.reach is None] or [layout for _, layout in layouts(architecture, method)]
    seen = [joined(sorted(spans(layout, tokens - 1))) for layout in full]
    if any(layout.choice is not None for layout in full):
        return "what is retrieved", method.known
    if any(ranges == [(0, tokens)] for ranges in seen):
        return "everything", method.sees
    if method.eviction is not None:
        return "recent only", method.sees
    last = min(first for ranges in seen for first, stop in ranges if stop == tokens)
    first = max((stop for ranges in seen for begin, stop in ranges if begin == 0 and stop < tokens), default=0)
    what = f"the last {tokens - last}" + (f" and the first {first}" if first else "") + " tokens"
    if last >= tokens - new_tokens:
        return "fluent only", f"{what}: at the end of the answer no more of the prompt's end is visible"
    return "recent only", what


def joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges with neighbours merged."""
    merged: list[tuple[int, int]] = []
    for first, stop in ranges:
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((first, stop))
    return merged
