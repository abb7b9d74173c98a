"""STRING (An et al., ICLR 2025, arXiv 2410.18745): far keys shifted onto the well-trained smaller distances."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.core.segments import Affine, Identity, Layout, Segment, Visible
from longreach.methods.base import Method, require, require_integer


@dataclass(frozen=True)
class STRING(Method):
    """Shifted rotary positions, for better use of the trained window rather than for a longer one. Full visibility.

        i - j <  shift:  d = i - j
        i - j >= shift:  d = i - j - shift + local_window

    The largest distances of a window are rare in training. The shift overwrites them with smaller, better trained ones; distances from
    local_window to shift - 1 occur twice.

    shift         true distance from which keys are shifted, >= 1. The paper uses L / 3 of the trained window L; L / 7 to L / 2 work there.
    local_window  distance at which the shifted keys begin, so that nearer distances occur once; 0 to shift. The paper uses 128 and
                  advises at least 32; equal to `shift` it is plain attention.

    Raises ValueError for parameters out of range.
    """

    shift: int = field(metadata={"help": "true distance from which keys are shifted"})
    local_window: int = field(default=128, metadata={"help": "distance at which the shifted keys begin"})

    name: ClassVar[str] = "string"
    paper: ClassVar[str] = "arXiv 2410.18745"
    recalls: ClassVar[str] = "everything, up to slightly more than the trained window"

    def __post_init__(self) -> None:
        require_integer("shift", self.shift, 1)
        require_integer("local_window", self.local_window, 0)
        require(
            self.local_window <= self.shift,
            f"local_window ({self.local_window}) must not exceed shift ({self.shift}), or distances would grow; pass local_window {self.shift} or less",
        )

    @classmethod
    def recommended(cls, window: int, context: int) -> STRING:
        """A third of the trained window and the paper's 128; half of the shift where that is too much for a small window."""
        shift = max(1, window // 3)
        return cls(shift, min(cls.local_window, shift // 2))

    def layout(self, layer: int = 0) -> Layout:
        near = Segment(Identity(), Identity(), Visible(0, self.shift))
        return Layout((near, Segment(Affine(1, self.local_window - self.shift), Identity(), Visible(self.shift))))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        exact = (i - j).double()
        return torch.where(j <= i, torch.where(i - j < self.shift, exact, exact - self.shift + self.local_window), torch.nan)

    def capacity(self, window: int) -> int | None:
        """Largest N with N - 1 - shift + local_window <= window - 1."""
        return window if self.shift > window else window + self.shift - self.local_window

    @classmethod
    def small(cls, pairs: int) -> STRING:
        return cls(20, 5)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> STRING:
        return cls(8, 8)
