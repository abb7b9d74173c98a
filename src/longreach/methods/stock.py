"""Plain attention on the Longreach engine: every earlier key at its true distance. What a model does by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.core.segments import PLAIN, Identity, Layout, Segment, Visible
from longreach.methods.base import Method, hidden_to_nan, require, require_integer


@dataclass(frozen=True)
class Stock(Method):
    """d = i - j for all j <= i: plain attention, for texts up to the trained window. The dial chooses it if the declared context fits.

    sliding_window   see only the last `sliding_window` tokens, the query included; None sees all. Layers that were trained with a
                     sliding window keep it under every method, if the model has other layers too.
    attention_chunk  see only tokens of the same chunk of `attention_chunk` tokens, the query included; None sees all. Layers that were
                     trained with chunks keep them. Not together with `sliding_window`.
    """

    sliding_window: int | None = field(default=None, metadata={"help": "see the last tokens only"})
    attention_chunk: int | None = field(default=None, metadata={"help": "see the tokens of the same chunk of this size only"})

    name: ClassVar[str] = "stock"
    paper: ClassVar[str] = "RoPE, arXiv 2104.09864"
    recalls: ClassVar[str] = "everything, inside the trained window"

    @classmethod
    def recommended(cls, window: int, context: int) -> Stock:
        """Nothing to choose."""
        return cls()

    def layout(self, layer: int = 0) -> Layout:
        if self.attention_chunk is not None:
            return Layout((Segment(Identity(), Identity(), Visible(0, 1, chunk=self.attention_chunk)),))
        return Layout((PLAIN if self.sliding_window is None else Segment(Identity(), Identity(), Visible(0, self.sliding_window)),))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        near = j <= i
        if self.sliding_window is not None:
            near = near & (i - j < self.sliding_window)
        if self.attention_chunk is not None:
            near = near & (i // self.attention_chunk == j // self.attention_chunk)
        return hidden_to_nan(i - j, near)

    def largest_distance(self, tokens: int) -> float:
        return min([tokens, *(limit for limit in (self.sliding_window, self.attention_chunk) if limit is not None)]) - 1

    def __post_init__(self) -> None:
        for name in ("sliding_window", "attention_chunk"):
            if (value := getattr(self, name)) is not None:
                require_integer(name, value, 1)
        require(
            self.sliding_window is None or self.attention_chunk is None,
            "attention has either a sliding window or chunks; pass sliding_window or attention_chunk, not both",
        )

    @classmethod
    def small(cls, pairs: int) -> Stock:
        return cls()

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> Stock:
        return cls()
