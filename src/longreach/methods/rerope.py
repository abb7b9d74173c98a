"""ReRoPE (Su, 2023, github.com/bojone/rerope, kexue.fm/archives/9708): the true distance up to a window, the window beyond it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.core.segments import Constant, Identity, Layout, LogScale, Segment, Visible
from longreach.methods.base import Method, require_integer


@dataclass(frozen=True)
class ReRoPE(Method):
    """d = min(i - j, window), with full visibility: everything beyond the window is at one distance. Texts of any length.

    window     tokens kept at their true distance, >= 1; 512 is the official default, its published table uses 1024 for a trained window
               of 4096.
    log_scale  base of the query factor max(1, ln(i + 1) / ln(base)). The official code always applies it, with the trained window as
               base; None turns it off.

    Raises ValueError for parameters out of range.
    """

    window: int = field(default=512, metadata={"help": "tokens kept at their true distance"})
    log_scale: int | None = field(default=None, metadata={"help": "base of the query's log scale, usually the trained window"})

    name: ClassVar[str] = "rerope"
    paper: ClassVar[str] = "github.com/bojone/rerope"
    recalls: ClassVar[str] = "everything, but not the order of far tokens"

    def __post_init__(self) -> None:
        require_integer("window", self.window, 1)
        if self.log_scale is not None:
            require_integer("log_scale", self.log_scale, 2)

    @classmethod
    def recommended(cls, window: int, context: int) -> ReRoPE:
        """The published table: a quarter of the trained window. The log scale is on, as always in the official code."""
        return cls(window=max(1, window // 4), log_scale=window)

    def layout(self, layer: int = 0) -> Layout:
        w, scale = self.window, self.query_scale()
        near = Segment(Identity(), Identity(), Visible(0, w), scale)
        return Layout((near, Segment(Constant(w), Constant(0), Visible(w), scale)))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return torch.where(j <= i, (i - j).clamp(max=self.window).double(), torch.nan)

    def query_scale(self) -> LogScale | None:
        return None if self.log_scale is None else LogScale(self.log_scale)

    def capacity(self, window: int) -> int | None:
        """Unlimited if the distance `window` itself is a trained one."""
        return None if self.window < window else window

    @classmethod
    def small(cls, pairs: int) -> ReRoPE:
        return cls(8)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> ReRoPE:
        return cls(tokens)
