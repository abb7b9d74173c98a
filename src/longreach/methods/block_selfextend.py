"""Block self-extend (llama.cpp's `--grp-attn-n`, pull request 4815): finished blocks are squeezed, the running one is exact."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.core.segments import Chunked, Grouped, Identity, Layout, Segment, Visible
from longreach.methods.base import Method, require, require_integer


@dataclass(frozen=True)
class BlockSelfExtend(Method):
    """SelfExtend in blocks: the exact window grows from one block border to the next, and is then grouped as a whole. Full visibility.

    With B = window * floor(i / window), the border before the query:

        j >= B:  d = i - j
        j <  B:  d = (i - B) + B / group_size - floor(j / group_size)

    Just after a border even the previous token is grouped, whereas SelfExtend keeps `window` tokens exact for every query. The official
    code moves a border only between batches, so its exact zone depends on how a prompt is cut. Here the distances are those of a text
    that the official code reads token by token, and do not depend on the cut.

    group_size  tokens that share one position in finished blocks, >= 1; 1 is plain attention (the official `--grp-attn-n`).
    window      tokens of a block, a multiple of group_size; 512 is the official default (`--grp-attn-w`).

    Raises ValueError for parameters out of range.
    """

    group_size: int = field(metadata={"help": "tokens that share one position in finished blocks"})
    window: int = field(default=512, metadata={"help": "tokens of a block, a multiple of group_size"})

    name: ClassVar[str] = "block-selfextend"
    paper: ClassVar[str] = "llama.cpp, pull request 4815"
    recalls: ClassVar[str] = "everything, order only coarsely before the current block"

    def __post_init__(self) -> None:
        require_integer("group_size", self.group_size, 1)
        require_integer("window", self.window, 1)
        require(
            self.window % self.group_size == 0,
            f"window ({self.window}) must be a multiple of group_size ({self.group_size}); "
            f"pass window {max(1, round(self.window / self.group_size)) * self.group_size}",
        )

    @classmethod
    def recommended(cls, window: int, context: int) -> BlockSelfExtend:
        """Blocks of about a quarter of the trained window, and the smallest group size whose capacity holds the text."""
        for group in range(1, window // 2 + 1):
            method = cls(group, max(1, round(window / 4 / group)) * group)
            if (method.capacity(window) or 0) >= context:
                return method
        raise ValueError(f"no group size of {cls.name} reaches {context} tokens on a trained window of {window}; declare fewer tokens")

    def layout(self, layer: int = 0) -> Layout:
        w, g = self.window, self.group_size
        running = Segment(Identity(), Identity(), Visible(0, 1, chunk=w))
        finished = Segment(Chunked(w, stride=w // g), Grouped(g), Visible(1, chunk=w))
        return Layout((running, finished))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        border = i - i % self.window
        squeezed = (i - border) + border // self.group_size - j // self.group_size
        return torch.where(j <= i, torch.where(j >= border, i - j, squeezed).double(), torch.nan)

    def largest_distance(self, tokens: int) -> float:
        """Distances to the first token shrink at a border, so the end of the last finished block may have a larger one than the last query."""
        finished, rest = divmod(max(0, tokens - 1), self.window)
        step = self.window // self.group_size
        return max(finished * step + rest, (finished - 1) * step + self.window - 1 if finished else 0)

    def capacity(self, window: int) -> int | None:
        """The first index i with floor(i / w) w / g + i mod w = window: a text that ends before it has only trained distances."""
        step = self.window // self.group_size
        finished = max(0, -(-(window - self.window + 1) // step))  # the first block whose end would reach an untrained distance
        return finished * self.window + window - finished * step

    @classmethod
    def small(cls, pairs: int) -> BlockSelfExtend:
        return cls(3, 12)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> BlockSelfExtend:
        return cls(1, 8)
