"""Matrices: the segments of a layout written out for every pair of a few tokens, for pictures and tests. Knows segments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from longreach.core.segments import Rank, Segment


@dataclass(frozen=True)
class Matrices:
    """Dense description of a layout: distance [Q, K] (NaN where hidden, or a place among chosen keys), and which segment shows the pair (-1: none)."""

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
        if not isinstance(segment.key_positions, Rank):  # those depend on what is chosen
            distance = torch.where(seen, segment.query_positions(i) - segment.key_positions(j), distance)
        owner = torch.where(seen, number, owner)
    return Matrices(distance, owner)
