"""SelfExtend (Jin et al., ICML 2024, arXiv 2401.01325): near keys at their true distance, far keys at a grouped one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from longreach.core.segments import Grouped, Identity, Layout, LogScale, Segment, Visible
from longreach.methods.base import Method, require, require_integer


@dataclass(frozen=True)
class SelfExtend(Method):
    """Bi-level attention with full visibility.

        i - j <  window:  d = i - j
        i - j >= window:  d = floor(i / group_size) - floor(j / group_size) + window - floor(window / group_size)

    The window is `window` tokens wide including the query itself. The shift is added to the query only, so the two zones never
    overlap. For a model trained on L tokens the largest usable length is group_size * (L - window + floor(window / group_size)).

    group_size   tokens that share one far position, >= 1; 1 is plain attention. The paper uses 2 to 64.
    window       tokens kept at their true distance, >= 1. The paper uses L/8 to L/4 and more.
    shift        "floor" is the paper's; "true_division" is what part of the official code computes (window - window / group_size),
                 which differs when group_size does not divide window.
    above        group only queries at index >= `above` (pass the trained window): shorter texts stay exactly as the model
                 computes them. The paper groups as soon as a text is longer than `window` (None).
    log_scale    base L of the query factor max(1, ln(i + 1) / ln(L)), an option of the official code; None is off.

    Raises ValueError for parameters out of range.
    """

    group_size: int = field(metadata={"help": "tokens that share one far position"})
    window: int = field(metadata={"help": "tokens kept at their true distance"})
    shift: Literal["floor", "true_division"] = field(default="floor", metadata={"help": "floor (paper) or true_division (part of the official code)"})
    above: int | None = field(default=None, metadata={"help": "group only queries from this index on"})
    log_scale: int | None = field(default=None, metadata={"help": "base of the query's log scale, usually the trained window"})

    name: ClassVar[str] = "selfextend"
    paper: ClassVar[str] = "arXiv 2401.01325"
    recalls: ClassVar[str] = "everything, the order of far tokens only coarsely"

    def __post_init__(self) -> None:
        require_integer("group_size", self.group_size, 1)
        require_integer("window", self.window, 1)
        require(self.shift in ("floor", "true_division"), f"shift must be 'floor' or 'true_division', not {self.shift!r}")
        if self.above is not None:
            require_integer("above", self.above, 0)
        if self.log_scale is not None:
            require_integer("log_scale", self.log_scale, 2)

    @property
    def offset(self) -> float:
        inner = self.window // self.group_size if self.shift == "floor" else self.window / self.group_size
        return self.window - inner

    def layout(self, layer: int = 0) -> Layout:
        g, w, scale = self.group_size, self.window, self.query_scale()
        near = Segment(Identity(), Identity(), Visible(0, w), scale)
        first = self.above or 0
        far = Segment(Grouped(g, self.offset), Grouped(g), Visible(w, first_query=first), scale)
        if first <= w:
            return Layout((near, far))
        early = Segment(Identity(), Identity(), Visible(w, last_query=first), scale)
        return Layout((near, far, early))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        exact = (i - j).double()
        grouped = (i // self.group_size - j // self.group_size).double() + self.offset
        near = (i - j < self.window) | (i < (self.above or 0))
        return torch.where(j <= i, torch.where(near, exact, grouped), torch.nan)

    def query_scale(self) -> LogScale | None:
        return None if self.log_scale is None else LogScale(self.log_scale)

    def largest_distance(self, tokens: int) -> float:
        """The last query that `above` leaves ungrouped may look back further than the last of all."""
        return max(super().largest_distance(tokens), min(tokens, self.above or 0) - 1)

    def capacity(self, window: int) -> int | None:
        """Largest N with floor((N - 1) / g) + offset <= window - 1, and the neighbour window inside the trained one."""
        if self.window > window or (self.above or 0) > window:
            return 0
        return max(self.group_size * (math.floor(window - 1 - self.offset) + 1), self.above or 0, min(self.window, window))

    @classmethod
    def small(cls, pairs: int) -> SelfExtend:
        return cls(3, 8)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> SelfExtend:
        return cls(4, tokens)
