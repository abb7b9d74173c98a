"""Dual Chunk Attention (An et al., ICML 2024, arXiv 2402.17463): positions inside chunks, three ways to look across their borders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from longreach.core.segments import Chunked, Constant, Layout, Segment, Visible
from longreach.methods.base import Method, require, require_integer


@dataclass(frozen=True)
class DualChunk(Method):
    """Full visibility, no untrained distance, texts of any length. With chunks of s tokens, a key is at j mod s and a query at

        same chunk:      i mod s                                                (intra-chunk)
        chunk before:    s + i mod s,  at most s + W - 1                        (successive-chunk)
        older chunks:    s + W - 1                                              (inter-chunk)

    True distances from 0 to W are exact for every query; how far beyond W they are exact depends on the query's place in its chunk. The
    distance does not always grow with the true one: a far token can be placed nearer than a close one, but never nearer than W.

    pretraining_length  the trained window L; the paper's c. Distances stay below it.
    preset              "paper": s = 3 L / 4, W = L - s, so that all of L is used. "repository": s = 5 L / 8, W = L / 8 + 1, distances up to
                        3 L / 4 (the official code's chunk size of 3 L / 4 less a local window of L / 8).
    chunk_length        s, >= 1; replaces the preset's.
    local_window        W, 1 to s; replaces the preset's.

    Raises ValueError for parameters out of range.
    """

    pretraining_length: int = field(metadata={"help": "the trained window"})
    preset: Literal["paper", "repository"] = field(default="paper", metadata={"help": "where the two lengths below come from"})
    chunk_length: int | None = field(default=None, metadata={"help": "tokens of a chunk; the preset's if not given"})
    local_window: int | None = field(default=None, metadata={"help": "tokens that are always at their true distance; the preset's if not given"})

    name: ClassVar[str] = "dual-chunk"
    paper: ClassVar[str] = "arXiv 2402.17463"
    recalls: ClassVar[str] = "everything, but not the order of far chunks"

    def __post_init__(self) -> None:
        require_integer("pretraining_length", self.pretraining_length, 2)
        require(self.preset in ("paper", "repository"), f"preset must be 'paper' or 'repository', not {self.preset!r}")
        if self.chunk_length is not None:
            require_integer("chunk_length", self.chunk_length, 1)
        if self.local_window is not None:
            require_integer("local_window", self.local_window, 1)
        require(
            self.chunk < self.pretraining_length,
            f"chunk_length must be below pretraining_length ({self.pretraining_length}), not {self.chunk}, to leave room for the local window; "
            f"pass at most {self.pretraining_length - 1}",
        )
        require(
            self.near <= self.chunk,
            f"a local window of {self.near} reaches beyond the chunk before one of {self.chunk} tokens, so it could not stay exact; "
            f"pass local_window {self.chunk} or less, or chunk_length {(self.pretraining_length + 1) // 2} or more",
        )
        require(
            self.furthest < self.pretraining_length,
            f"chunks of {self.chunk} and a local window of {self.near} make distances up to {self.furthest}, which a pretraining_length of "
            f"{self.pretraining_length} does not train; pass local_window {self.pretraining_length - self.chunk} or less",
        )

    @classmethod
    def recommended(cls, window: int, context: int) -> DualChunk:
        """The paper's preset."""
        return cls(pretraining_length=window)

    @property
    def chunk(self) -> int:
        """s."""
        if self.chunk_length is not None:
            return self.chunk_length
        three_quarters = 3 * self.pretraining_length // 4
        return three_quarters if self.preset == "paper" else three_quarters - self.pretraining_length // 8

    @property
    def near(self) -> int:
        """W."""
        if self.local_window is not None:
            return self.local_window
        return self.pretraining_length - self.chunk if self.preset == "paper" else self.pretraining_length // 8 + 1

    @property
    def furthest(self) -> int:
        """The largest distance, s + W - 1."""
        return self.chunk + self.near - 1

    def layout(self, layer: int = 0) -> Layout:
        s, keys = self.chunk, Chunked(self.chunk)
        intra = Segment(Chunked(s), keys, Visible(0, 1, chunk=s))
        successive = Segment(Chunked(s, shift=s, ceiling=self.furthest), keys, Visible(1, 2, chunk=s))
        inter = Segment(Constant(self.furthest), keys, Visible(2, chunk=s))
        return Layout((intra, successive, inter))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        s, last = self.chunk, self.furthest
        place, chunks_back = i - i // s * s, i // s - j // s
        successive = torch.where(place < self.near, place + s, last)
        query = torch.where(chunks_back == 0, place, torch.where(chunks_back == 1, successive, last))
        return torch.where(j <= i, (query - (j - j // s * s)).double(), torch.nan)

    def capacity(self, window: int) -> int | None:
        """Unlimited if the largest distance is a trained one; if not, distances are true ones up to the trained window."""
        return None if self.furthest < window else window

    @classmethod
    def small(cls, pairs: int) -> DualChunk:
        return cls(24)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> DualChunk:
        return cls(tokens + 4)
