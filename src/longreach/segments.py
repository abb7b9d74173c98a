"""Segments: which keys a query sees, and at which positions the encoding is applied to both.

Knows index arithmetic only: no tensors of queries and keys, no models. Indices are true token indices of one sequence
(padding removed), queries `i`, keys `j`, `0 <= j <= i`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


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


PositionMap = Identity | Constant | Grouped | Affine


@dataclass(frozen=True)
class Visible:
    """Key `j` is visible to query `i` iff `low <= i - j < high`, `j < last_key` and `first_query <= i < last_query`.

    `None` means no limit. `low >= 0`, so every segment is causal.
    """

    low: int = 0
    high: int | None = None
    last_key: int | None = None
    first_query: int = 0
    last_query: int | None = None

    def __call__(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        seen = (i - j >= self.low) & (i >= self.first_query)
        if self.high is not None:
            seen = seen & (i - j < self.high)
        if self.last_key is not None:
            seen = seen & (j < self.last_key)
        if self.last_query is not None:
            seen = seen & (i < self.last_query)
        return seen

    @property
    def reach(self) -> int | None:
        """How far back a query of this segment looks among keys that are not pinned at the start; None: to the first key."""
        limits = [limit for limit in (self.high, self.last_query) if limit is not None]
        return min(limits) if limits else None


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
    """

    query_positions: PositionMap
    key_positions: PositionMap
    visible: Visible
    query_scale: LogScale | None = None
    lse_bias: float = 0.0


@dataclass(frozen=True)
class TopK:
    """A late segment: the `k` best-scoring keys among those that no other segment shows, all at one distance.

    Candidates of query `i` are `first_key <= j <= i - low`; scores are taken at `distance`, per query head. `rows="last"`
    applies it to the last query of a forward only (so results depend on how a prompt is cut), `"all"` to every query.
    """

    k: int
    distance: float
    first_key: int
    low: int
    rows: str = "last"


@dataclass(frozen=True)
class Layout:
    """All segments of one kind of layer, in the order in which they are merged, and the late segment if there is one."""

    segments: tuple[Segment, ...]
    late: TopK | None = None

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a layout needs at least one segment")


PLAIN = Segment(Identity(), Identity(), Visible())


@dataclass(frozen=True)
class Retention:
    """Which indices of one key form a future query can still need: the first `head` and the last `tail` (None: all)."""

    head: int = 0
    tail: int | None = 0

    def __or__(self, other: Retention) -> Retention:
        tail = None if self.tail is None or other.tail is None else max(self.tail, other.tail)
        return Retention(max(self.head, other.head), tail)


def retention(visible: Visible) -> Retention:
    if visible.last_key is not None:
        return Retention(head=visible.last_key)
    return Retention(tail=visible.reach)


def forms(layout: Layout) -> dict[PositionMap, Retention]:
    """The distinct key positions of a layout and what must be kept of each: keys exist in as few forms as needed."""
    needed: dict[PositionMap, Retention] = {}
    for segment in layout.segments:
        positions = segment.key_positions
        needed[positions] = needed.get(positions, Retention()) | retention(segment.visible)
    if layout.late is not None:
        raw = Constant(0)
        needed[raw] = needed.get(raw, Retention()) | Retention(tail=None)
    return needed


@dataclass(frozen=True)
class Matrices:
    """Dense description of a layout: distance [Q, K] (NaN where hidden), and which segment shows the pair (-1: none)."""

    distance: torch.Tensor
    segment: torch.Tensor = field(repr=False)


def matrices(segments: tuple[Segment, ...], n: int) -> Matrices:
    """Distances that the segments give to every pair of `n` tokens. Raises if two segments show the same pair."""
    i = torch.arange(n)[:, None]
    j = torch.arange(n)[None, :]
    distance = torch.full((n, n), math.nan, dtype=torch.float64)
    owner = torch.full((n, n), -1)
    for number, segment in enumerate(segments):
        seen = segment.visible(i, j) & (j <= i)
        if bool((seen & (owner >= 0)).any()):
            raise AssertionError(f"segment {number} shows a pair that another segment shows already")
        d = segment.query_positions(i) - segment.key_positions(j)
        distance = torch.where(seen, d, distance)
        owner = torch.where(seen, number, owner)
    return Matrices(distance, owner)
