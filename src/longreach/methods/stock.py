"""Plain attention on the Longreach engine: every earlier key at its true distance. What a model does by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.methods.base import Method, hidden_to_nan, require_integer
from longreach.segments import PLAIN, Identity, Layout, Segment, Visible


@dataclass(frozen=True)
class Stock(Method):
    """d = i - j for all j <= i. Fits texts up to the trained window; chosen by the dial when the declared context fits.

    sliding_window  see the last `sliding_window` tokens only, self included; None sees all. Layers that a model was trained with a
                    sliding window on keep theirs under every method.
    """

    sliding_window: int | None = field(default=None, metadata={"help": "see the last tokens only"})

    name: ClassVar[str] = "stock"
    paper: ClassVar[str] = "RoPE, arXiv 2104.09864"
    recalls: ClassVar[str] = "everything, inside the trained window"

    def layout(self, layer: int = 0) -> Layout:
        return Layout((PLAIN if self.sliding_window is None else Segment(Identity(), Identity(), Visible(0, self.sliding_window)),))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        near = j <= i if self.sliding_window is None else (j <= i) & (i - j < self.sliding_window)
        return hidden_to_nan(i - j, near)

    @classmethod
    def suggest(cls, window: int, context: int) -> Method | None:
        return cls()

    def __post_init__(self) -> None:
        if self.sliding_window is not None:
            require_integer("sliding_window", self.sliding_window, 1)
