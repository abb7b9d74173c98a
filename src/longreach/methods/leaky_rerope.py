"""Leaky ReRoPE (Su, 2023, github.com/bojone/rerope, kexue.fm/archives/9708): beyond a window, distances grow slower."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.core.segments import Affine, Identity, Layout, LogScale, Segment, Visible
from longreach.methods.base import Method, require_integer, require_number


@dataclass(frozen=True)
class LeakyReRoPE(Method):
    """SelfExtend without rounding: full visibility and fractional far positions, so order is kept at every distance.

        i - j <  window:  d = i - j
        i - j >= window:  d = window + (i - j - window) / factor

    window     tokens kept at their true distance, >= 1; 512 is the official default.
    factor     true distance per unit of far distance, >= 1; 1 is plain attention. 16 is the official default. For a text of N tokens on a
               trained window of L choose it so that window + (N - 1 - window) / factor <= L - 1.
    log_scale  base of the query factor max(1, ln(i + 1) / ln(base)). The official code always applies it, with the trained window as
               base; None turns it off.

    Raises ValueError for parameters out of range.
    """

    window: int = field(default=512, metadata={"help": "tokens kept at their true distance"})
    factor: float = field(default=16.0, metadata={"help": "true distance per unit of far distance"})
    log_scale: int | None = field(default=None, metadata={"help": "base of the query's log scale, usually the trained window"})

    name: ClassVar[str] = "leaky-rerope"
    paper: ClassVar[str] = "github.com/bojone/rerope"
    recalls: ClassVar[str] = "everything, far positions close together"

    def __post_init__(self) -> None:
        require_integer("window", self.window, 1)
        require_number("factor", self.factor, 1)
        if self.log_scale is not None:
            require_integer("log_scale", self.log_scale, 2)

    @classmethod
    def recommended(cls, window: int, context: int) -> LeakyReRoPE:
        """ReRoPE's window and log scale, and the smallest factor, in hundredths, that keeps all distances trained."""
        near = max(1, window // 4)
        needed = (context - 1 - near) / (window - 1 - near) if window - 1 > near else 1.0
        return cls(near, max(1.0, math.ceil(100 * needed) / 100), window)

    def layout(self, layer: int = 0) -> Layout:
        w, s, scale = self.window, self.factor, self.query_scale()
        near = Segment(Identity(), Identity(), Visible(0, w), scale)
        return Layout((near, Segment(Affine(1 / s, w * (s - 1) / s), Affine(1 / s), Visible(w), scale)))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        exact = (i - j).double()
        return torch.where(j <= i, torch.where(i - j < self.window, exact, self.window + (exact - self.window) / self.factor), torch.nan)

    def query_scale(self) -> LogScale | None:
        return None if self.log_scale is None else LogScale(self.log_scale)

    def capacity(self, window: int) -> int | None:
        """Largest N with w + (N - 1 - w) / s <= window - 1."""
        if self.window >= window:
            return window
        return self.window + 1 + math.floor(self.factor * (window - 1 - self.window))

    @classmethod
    def small(cls, pairs: int) -> LeakyReRoPE:
        return cls(8, 4)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> LeakyReRoPE:
        return cls(8, 1)
