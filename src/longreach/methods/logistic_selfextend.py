"""SELF (Dang et al., 2025, arXiv 2505.17296): SelfExtend whose groups grow along the text by a logistic function."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.core import growing_groups
from longreach.core.segments import GrowingGroups, Identity, Layout, LogScale, Segment, Visible
from longreach.methods.base import Method, require, require_integer, require_number

MOST = 4096  # the table of groups has an entry for every size
RATES = tuple(float(f"{digits}e{power}") for power in range(-10, 0) for digits in range(10, 100))  # two digits, from 1e-9 to 9.9


@dataclass(frozen=True)
class LogisticSelfExtend(Method):
    """SELF: bi-level attention like SelfExtend, with groups that grow. Full visibility.

    Tokens are grouped by their index, from the first on. Group k = 0, 1, 2, ... has

        s(k) = max(1, floor(C / (1 + (C - 1) exp(-r k))))        r = growth, C = largest_group

    tokens: one at first, C - 1 at most, since C is never reached. With P(j) the number of the group that holds token j:

        i - j <  window:  d = i - j
        i - j >= window:  d = window + P(i - window) - P(j)

    The two zones join without a gap: the token just inside the border is at window - 1, and the one on it (j = i - window) at exactly
    window. Farther back, d grows by one from group to group, so it never falls below window. The beginning of a text keeps its order
    best, where groups are small. The official code gives a token the group of the one before it, and the first token the number -1.

    window         tokens kept at their true distance, >= 1. `recommended` takes an eighth of the trained window.
    growth         how fast groups grow, the r of the formula, >= 0; 0 is plain attention. 0.02 is the official default.
    largest_group  what the group size grows to, the C of the formula, 1 to 4096; up to 2 is plain attention. 33 is the official default.
    log_scale      base L of the query factor max(1, ln(i + 1) / ln(L)), an option of the official code; None is off.

    Raises ValueError for parameters out of range.
    """

    window: int = field(metadata={"help": "tokens kept at their true distance"})
    growth: float = field(default=0.02, metadata={"help": "how fast groups grow; 0 is plain attention"})
    largest_group: int = field(default=33, metadata={"help": "what the group size grows to"})
    log_scale: int | None = field(default=None, metadata={"help": "base of the query's log scale, usually the trained window"})

    name: ClassVar[str] = "logistic-selfextend"
    paper: ClassVar[str] = "SELF, arXiv 2505.17296"
    recalls: ClassVar[str] = "everything, the order of far tokens coarsely, at the beginning least so"

    def __post_init__(self) -> None:
        require_integer("window", self.window, 1)
        require_number("growth", self.growth, 0)
        require_integer("largest_group", self.largest_group, 1)
        require(self.largest_group <= MOST, f"largest_group must be at most {MOST}, not {self.largest_group}; pass largest-group {MOST} or less")
        if self.log_scale is not None:
            require_integer("log_scale", self.log_scale, 2)

    @classmethod
    def recommended(cls, window: int, context: int) -> LogisticSelfExtend:
        """SelfExtend's window and log scale, and the slowest growth, in two digits, that keeps every distance within two thirds of the trained window.

        The largest group is the official one, or twice the mean that the text needs where that is more: growth is never so fast that all groups are equal.
        """
        near, scale = max(1, window // 8), max(2, window)
        if context <= window:
            return cls(near, 0.0, log_scale=scale)
        room, last = window * 2 // 3 - near, context - 1 - near  # groups 0 .. room may lie before the neighbours, and have to hold the tokens 0 .. last
        if room > 0:
            largest = min(MOST, max(cls(near).largest_group, 2 * math.ceil((last + 1) / (room + 1)) + 1))
            at = bisect_left(RATES, -room, key=lambda rate: -growing_groups.group_of(rate, largest, last))
            if at < len(RATES):
                return cls(near, RATES[at], largest, scale)
        raise ValueError(f"no group size of {cls.name} reaches {context} tokens on a trained window of {window}; declare fewer tokens")

    def layout(self, layer: int = 0) -> Layout:
        w, r, c, scale = self.window, self.growth, self.largest_group, self.query_scale()
        near = Segment(Identity(), Identity(), Visible(0, w), scale)
        return Layout((near, Segment(GrowingGroups(r, c, delay=w, shift=w), GrowingGroups(r, c), Visible(w), scale)))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        exact = (i - j).double()
        grouped = self.window + self._group(i - self.window) - self._group(j)
        return torch.where(j <= i, torch.where(i - j < self.window, exact, grouped), torch.nan)

    def _group(self, index: torch.Tensor) -> torch.Tensor:
        """P, group by group: sizes are summed until they stop growing."""
        r, c, index = self.growth, self.largest_group, index.clamp_min(0).contiguous()
        if r == 0 or c <= 2:
            return index.double()
        growing = 2 * math.log(c - 1) / r + 2  # from then on s(k) = C - 1, or the index is passed before
        k = torch.arange(int(min(growing, index.max().item() + 1)), dtype=torch.float64, device=index.device)
        size = torch.floor(c / (1 + (c - 1) * torch.exp(-r * k))).clamp(1, c - 1).long()
        ends = size.cumsum(0)
        beyond = len(k) + (index - ends[-1]) // (c - 1)
        return torch.where(index < ends[-1], torch.searchsorted(ends, index, right=True), beyond).double()

    def query_scale(self) -> LogScale | None:
        return None if self.log_scale is None else LogScale(self.log_scale)

    def capacity(self, window: int) -> int | None:
        """Largest N with w + P(N - 1 - w) <= window - 1: the groups 0 .. window - 1 - w may lie before the neighbours."""
        if self.window >= window:
            return window
        return self.window + growing_groups.tokens_before(self.growth, self.largest_group, window - self.window)

    @classmethod
    def small(cls, pairs: int) -> LogisticSelfExtend:
        return cls(8, growth=0.3, largest_group=6)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> LogisticSelfExtend:
        return cls(8, largest_group=1)
