"""Segments: which keys a query sees, and at which positions the encoding is applied to both.

Knows index arithmetic only: no queries, keys or models. What depends on their content is an `Index`, which a `Choice` names. Indices are true token
indices of one sequence (padding removed), queries `i`, keys `j`, `0 <= j <= i`.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from longreach.core import growing_groups
from longreach.core.choice import Choice, Index, OfQueries


@dataclass(frozen=True)
class Identity:
    """Position = index."""

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        return index.double()


@dataclass(frozen=True)
class Constant:
    """One position for every index. `Constant(0)` leaves a key un-rotated."""

    value: float

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        return torch.full_like(index, self.value, dtype=torch.float64)


@dataclass(frozen=True)
class Grouped:
    """floor(index / size) + shift."""

    size: int
    shift: float = 0

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        return (index // self.size).double() + self.shift


@dataclass(frozen=True)
class Affine:
    """index * scale + shift, fractional positions allowed."""

    scale: float
    shift: float = 0

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        return index.double() * self.scale + self.shift


@dataclass(frozen=True)
class Chunked:
    """Place in the chunk plus `stride` for every chunk before it: min(index mod size + stride * floor(index / size) + shift, ceiling)."""

    size: int
    stride: int = 0
    shift: int = 0
    ceiling: int | None = None

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        position = index % self.size + self.stride * (index // self.size) + self.shift
        return (position if self.ceiling is None else position.clamp(max=self.ceiling)).double()


@dataclass(frozen=True)
class GrowingGroups:
    """The number of the group that holds `index - delay`, plus `shift`; `growing_groups` says how the groups grow. Indices before `delay` count as it does."""

    growth: float
    ceiling: int
    delay: int = 0
    shift: int = 0

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        first, group, size = torch.tensor(growing_groups.runs(self.growth, self.ceiling), device=index.device).unbind(1)
        index = (index - self.delay).clamp_min(0).contiguous()
        run = torch.searchsorted(first.contiguous(), index, right=True) - 1
        return (group[run] + (index - first[run]) // size[run] + self.shift).double()


@dataclass(frozen=True)
class Rank:
    """Place among the keys that a query has chosen, in their order: the first one at position `at`, or aligned to the right, the last one `at` behind the
    query (the first of those that choose together). It depends on the query, so keys are kept un-rotated and turned when they have been chosen."""

    at: int = 0
    align: Literal["left", "right"] = "left"

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        raise ValueError("a place among the chosen keys is no function of the index; ask the method for its truth")

    def among(self, seen: torch.Tensor, first: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """seen [..., n] of columns in their order -> their positions [..., n]; those of columns that are not seen mean nothing. Of queries that choose together
        the last sees all that any does; `first` [..., n] is what the first one sees, which is at the position `query` [..., 1]."""
        place = seen.long().cumsum(-1) - 1
        if self.align == "left":
            return self.at + place
        return place + (query.long() - self.at + 1 - first.long().sum(-1, keepdim=True))


PositionMap = Identity | Constant | Grouped | Affine | Chunked | GrowingGroups | Rank


@dataclass(frozen=True)
class Piece:
    """A contiguous part of a segment: queries [first, last) against keys [from_key, to_key); of these, `i` sees `j` iff low <= i - j < high."""

    first: int
    last: int
    from_key: int
    to_key: int
    low: int = 0
    high: int | None = None


@dataclass(frozen=True)
class Visible:
    """A band, in tokens or in chunks of `chunk` tokens. Key `j` is visible to query `i` iff `j <= i`,
    `low <= floor(i / chunk) - floor(j / chunk) < high`, `first_key <= j < last_key` and `first_query <= i < last_query`. `None` means no limit.
    """

    low: int = 0
    high: int | None = None
    last_key: int | None = None
    first_query: int = 0
    last_query: int | None = None
    chunk: int = 1
    first_key: int = 0

    def __call__(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        behind = i // self.chunk - j // self.chunk
        seen = (j <= i) & (behind >= self.low) & (i >= self.first_query) & (j >= self.first_key)
        if self.high is not None:
            seen = seen & (behind < self.high)
        if self.last_key is not None:
            seen = seen & (j < self.last_key)
        if self.last_query is not None:
            seen = seen & (i < self.last_query)
        return seen

    def keys_of(self, i: int) -> int:
        """How many keys query `i` sees from `first_key` on, of a band without any other limit than `low` and `first_query`."""
        return max(0, i - self.low + 1 - self.first_key) if i >= self.first_query else 0

    @property
    def reach(self) -> int | None:
        """How far back a query of this segment looks among keys that are not pinned at the start; None: to the first key."""
        limits = [limit for limit in (None if self.high is None else self.high * self.chunk, self.last_query) if limit is not None]
        return min(limits) if limits else None

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """What the queries start .. stop see, as few contiguous parts as the band allows: one if it is in tokens, one per chunk if in chunks."""
        first = max(start, self.first_query, self.low * self.chunk + self.first_key // self.chunk * self.chunk)  # earlier queries see nothing
        last = stop if self.last_query is None else min(stop, self.last_query)
        if first >= last:
            return
        if self.chunk == 1:
            from_key = 0 if self.high is None else max(0, first - self.high + 1)
            parts = [Piece(first, last, from_key, last - self.low, self.low, self.high)]
        else:
            parts = [self._of_chunk(number, first, last) for number in range(first // self.chunk, (last - 1) // self.chunk + 1)]
        for part in parts:
            to_key = part.to_key if self.last_key is None else min(part.to_key, self.last_key)
            from_key = max(part.from_key, self.first_key)
            if from_key < to_key:
                yield part if part.from_key == from_key and part.to_key == to_key else replace(part, from_key=from_key, to_key=to_key)

    def _of_chunk(self, number: int, first: int, last: int) -> Piece:
        """The queries of one chunk see whole chunks before it, and of their own what causality leaves."""
        first, last = max(first, number * self.chunk), min(last, (number + 1) * self.chunk)
        from_key = 0 if self.high is None else max(0, number - self.high + 1) * self.chunk
        return Piece(first, last, from_key, min(last, (number - self.low + 1) * self.chunk))


@dataclass(frozen=True)
class LogScale:
    """Query factor max(1, ln(i + 1) / ln(base)): keeps the attention entropy as the number of keys grows."""

    base: int

    def __call__(self, index: torch.Tensor) -> torch.Tensor:
        return (torch.log(index.double() + 1) / math.log(self.base)).clamp_min(1.0)


@dataclass(frozen=True)
class Segment:
    """One answer to "is `j` visible to `i`, and how far away is it?": distance = query_positions(i) - key_positions(j).

    The segments of one query see disjoint keys; their attentions merge exactly by log-sum-exp.
    `query_scale` multiplies the query (1 or a function of its index); `lse_bias` is added to the segment's logits.
    `choice`: of the visible keys, only the chosen ones are seen. They are counted in blocks from `visible.first_key` on.
    """

    query_positions: PositionMap
    key_positions: PositionMap
    visible: Visible
    query_scale: LogScale | None = None
    lse_bias: float = 0.0
    choice: Choice | None = None

    def __post_init__(self) -> None:
        band = self.visible
        if self.choice is not None and (band.high is not None or band.last_key is not None or band.chunk != 1 or band.last_query is not None):
            raise ValueError("a segment chooses among all keys from first_key on; leave out high, last_key, last_query and chunk, or the choice")
        if isinstance(self.key_positions, Rank) and (self.choice is None or self.choice.index.frame == "segment" or self.choice.who == "single"):
            raise ValueError("keys have a place only where they are chosen: give the segment a choice by every or the last query, and an index of raw keys")

    @property
    def kept(self) -> PositionMap:
        """The form in which its keys are kept."""
        return Constant(0) if isinstance(self.key_positions, Rank) else self.key_positions

    @property
    def compared(self) -> tuple[PositionMap, PositionMap]:
        """Positions of queries and of keys at which an index compares them."""
        raw = self.choice is not None and self.choice.index.frame != "segment"
        return (Constant(0), Constant(0)) if raw else (self.query_positions, self.key_positions)


@dataclass(frozen=True)
class Layout:
    """All segments of one kind of layer, in the order in which they are merged. At most one of them chooses, the last: what its queries pay to a
    key is known when it is merged. `beside`: forms of keys that no segment reads; an eviction makes the others of them anew."""

    segments: tuple[Segment, ...]
    beside: tuple[PositionMap, ...] = ()

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a layout needs at least one segment")
        if any(segment.choice is not None for segment in self.segments[:-1]):
            raise ValueError("only the last segment of a layout may choose; move it there, or choose among the keys of two in one index")
        for segment in self.segments:
            if segment.choice is not None and (mass := segment.choice.index.mass):
                bands = [paying.visible for paying, _ in self.paying(mass)]
                plain = all(band == Visible(band.low, band.high) for band in bands)
                if not plain or segment.compared[1] != Constant(0) or segment.visible.low + segment.choice.lag < mass:
                    raise ValueError("masses are counted of raw keys, in bands of tokens without any other limit, before a block of them can be chosen")

    def paying(self, mass: int) -> Iterator[tuple[Segment, int | None]]:
        """The segments in which queries less than `mass` tokens ahead pay to a key, and where that ends."""
        for segment in self.segments:
            if segment.choice is None and segment.visible.low < mass:
                yield segment, mass if segment.visible.high is None else min(mass, segment.visible.high)

    @property
    def choice(self) -> Choice | None:
        """That of the segment that chooses."""
        return next((segment.choice for segment in self.segments if segment.choice is not None), None)


PLAIN = Segment(Identity(), Identity(), Visible())


Place = int | tuple[int, int] | None  # the tail that is kept; of summaries, block and first token


@dataclass(frozen=True)
class Retention:
    """Which indices of one key form a future query can still need: the first `head` and the last `tail` (None: all).

    Of summaries an entry is a complete block of `block` tokens, counted from token `first`.
    """

    head: int = 0
    tail: int | None = 0
    block: int = 1
    first: int = 0

    def __or__(self, other: Retention) -> Retention:
        tail = None if self.tail is None or other.tail is None else max(self.tail, other.tail)
        return replace(self, head=max(self.head, other.head), tail=tail)

    @property
    def place(self) -> Place:
        """Forms that keep the same tokens lie alike."""
        return self.tail if (self.block, self.first) == (1, 0) else (self.block, self.first)

    def entries(self, length: int) -> int:
        """How many entries `length` tokens have."""
        return max(0, length - self.first) // self.block


def retention(visible: Visible) -> Retention:
    if visible.last_key is not None:
        return Retention(head=visible.last_key)
    return Retention(tail=visible.reach)


@dataclass(frozen=True)
class Summary:
    """The form of what an index keeps of every complete block of the keys at `positions`, made `wait` tokens after the last of them."""

    index: Index
    positions: PositionMap
    block: int
    first: int
    wait: int = 0


Form = PositionMap | Summary | OfQueries


def summary(segment: Segment) -> Summary | None:
    """What is kept for a segment to choose by; None where it does not choose, or compares the keys themselves."""
    if segment.choice is None or not segment.choice.index.width:
        return None
    index = segment.choice.index
    return Summary(index, segment.compared[1], segment.choice.block, segment.visible.first_key, max(0, index.mass - 1))


def forms(layout: Layout) -> dict[PositionMap, Retention]:
    """The distinct key positions of a layout and what must be kept of each: keys exist in as few forms as needed."""
    needed: dict[PositionMap, Retention] = {}
    for segment in layout.segments:
        for positions in dict.fromkeys([segment.kept, *(segment.compared[1:] if segment.choice is not None else ())]):
            needed[positions] = needed.get(positions, Retention()) | retention(segment.visible)
    for positions in layout.beside:
        needed[positions] = functools.reduce(operator.or_, needed.values())
    return needed


def summaries(layout: Layout) -> dict[Summary, Retention]:
    """What is kept of blocks beside the keys."""
    found = [kept for segment in layout.segments if (kept := summary(segment)) is not None]
    return {kept: Retention(tail=None, block=kept.block, first=kept.first + kept.wait) for kept in found}


def queries(layout: Layout) -> dict[OfQueries, Retention]:
    """What is kept of queries until the blocks of their tokens, and of those whom they pay to, are complete, or as long as others take their answers."""
    found: dict[OfQueries, Retention] = {}
    if layout.choice is not None and layout.choice.refresh:
        found[OfQueries("q")] = Retention(tail=layout.choice.refresh[0])
    for kept in summaries(layout):
        if kept.index.mass or "q" in kept.index.needs:
            found[OfQueries("q")] = Retention(tail=kept.wait + kept.block)
        if kept.index.mass:
            found[OfQueries("lse")] = found[OfQueries("q")]
    return found
