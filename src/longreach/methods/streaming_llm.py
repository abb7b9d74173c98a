"""StreamingLLM (Xiao et al., ICLR 2024, arXiv 2309.17453): attention sinks and the recent tokens, at their places in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from longreach.core.segments import Affine, Constant, Identity, Layout, Segment, Visible
from longreach.methods.base import Method, hidden_to_nan, require, require_integer


@dataclass(frozen=True)
class StreamingLLM(Method):
    """A cache of the first n_sink and the last n_recent tokens; positions are places in the cache. Constant memory, texts of any length.

    With C = n_sink + n_recent, the tokens that the cache holds when a new one arrives:

        visible:   i - j <= n_recent   or   j < n_sink
        distance:  i - j for the recent ones, min(i, C) - j for the sinks

    A distance never exceeds C, and it is i - j for all while the cache is not full (i <= C). Unlike in LM-Infinite, the sinks keep
    different distances. What is neither a sink nor recent is gone.

    n_recent   recent tokens that the cache holds, >= 1. The official chat demo uses 2000; the paper fills the trained window.
    n_sink     first tokens that it holds, >= 0; the paper uses 4.
    counting   "official": a token attends to the cache and to itself before the oldest recent token leaves, so n_recent + 1 recent tokens
               are visible, the query included. "chunkable": n_recent are visible, the query included, and a sink is at C - j from the
               first query that does not see it as recent (as in InfLLM's baseline). Here, both can be read in chunks.

    Raises ValueError for parameters out of range.
    """

    n_recent: int = field(metadata={"help": "recent tokens that the cache holds"})
    n_sink: int = field(default=4, metadata={"help": "first tokens that the cache holds"})
    counting: Literal["official", "chunkable"] = field(
        default="official", metadata={"help": "official (n_recent and self are visible) or chunkable (n_recent with self)"}
    )

    name: ClassVar[str] = "streaming-llm"
    paper: ClassVar[str] = "arXiv 2309.17453"
    recalls: ClassVar[str] = "the last n_recent tokens and the first few"
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_integer("n_recent", self.n_recent, 1)
        require_integer("n_sink", self.n_sink, 0)
        require(self.counting in ("official", "chunkable"), f"counting must be 'official' or 'chunkable', not {self.counting!r}")

    @classmethod
    def recommended(cls, window: int, context: int) -> StreamingLLM:
        """The paper's sinks; the cache fills the trained window."""
        sinks = cls.n_sink
        return cls(n_recent=max(1, window - sinks), n_sink=sinks)

    @property
    def cache(self) -> int:
        return self.n_sink + self.n_recent

    def layout(self, layer: int = 0) -> Layout:
        official, size = self.counting == "official", self.cache
        near = self.n_recent + 1 if official else self.n_recent
        recent = Segment(Identity(), Identity(), Visible(0, near))
        if not self.n_sink:
            return Layout((recent,))
        full = size if official else 0  # the first query for which the cache is full
        # distance C - j: turning the few keys back costs less than turning every query to C
        sinks = Segment(Constant(0), Affine(1, -size), Visible(near, last_key=self.n_sink, first_query=full))
        if not official:
            return Layout((recent, sinks))
        filling = Segment(Identity(), Identity(), Visible(near, last_key=self.n_sink, last_query=full))
        return Layout((recent, sinks, filling))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        if self.counting == "chunkable":
            recent = i - j < self.n_recent
            return hidden_to_nan(torch.where(recent, i - j, self.cache - j), (j <= i) & (recent | (j < self.n_sink)))
        place = i.clamp(max=self.cache)  # of the query; its keys are the sinks and those that entered just before it
        key_place = torch.where(j < self.n_sink, j, place - (i - j))
        return hidden_to_nan(place - key_place, (j <= i) & ((j < self.n_sink) | (key_place >= self.n_sink)))

    def capacity(self, window: int) -> int | None:
        """Unlimited if C <= window, which the paper allows itself (4 + 4092 on a window of 4096); else until a distance is not trained."""
        if self.cache <= window:
            return None
        return window if self.counting == "official" or not self.n_sink else min(window, self.n_recent)

    @classmethod
    def small(cls, pairs: int) -> StreamingLLM:
        return cls(9, 3)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> StreamingLLM:
        return cls(tokens - 4, 3)
