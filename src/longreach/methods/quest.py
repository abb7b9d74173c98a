"""Quest (Tang et al., ICML 2024, arXiv 2406.10774): each head reads the pages of keys that may hold its largest logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from longreach.core.choice import Choice, Index, Past
from longreach.core.dense import Dense
from longreach.core.segments import PLAIN, Identity, Layout, Segment, Visible
from longreach.kernels.products import products
from longreach.methods.base import Method, hidden_to_nan, require, require_integer

FEWEST = 3  # pages


@dataclass(frozen=True)
class Bounds(Index):
    """The largest and the smallest of every dim of the keys of a page: an upper bound of their logits."""

    pages: int

    width: ClassVar[int] = 2

    def summarise(self, k: torch.Tensor) -> torch.Tensor:
        return torch.cat([k.amax(-2), k.amin(-2)], -1)

    def choose(self, q: torch.Tensor, past: Past) -> torch.Tensor:
        pages = past.compared.shape[2]
        bounds = products(torch.cat([q.clamp_min(0), q.clamp_max(0)], -1), past.compared)  # max(q a, q b) = q+ a + q- b for a >= b
        best = bounds.masked_fill(~past.candidates[:, None], -torch.inf).topk(min(self.pages, pages))
        ids = best.indices.masked_fill(best.values.isneginf(), -1)
        if pages >= self.pages:  # a page that is not complete takes the place of the last
            ids[..., -1:].masked_fill_(past.open[:, None], -1)
        return ids


@dataclass(frozen=True)
class Quest(Method):
    """Every key is kept at its true distance; a decoded token attends to few pages of them, which every head chooses for itself.

        bound of page P for query q:  sum over dims d of  max(q_d max_P k_d, q_d min_P k_d),  k as rotated
        seen:                         the max(3, budget / page_size) pages with the largest bounds, the last one among them if it is not full

    What is kept is as much as without it; what is read of it for a token is budget keys and two numbers per dim and page. Alone it keeps true
    distances, so beyond the trained window it stands in Combined(YaRN(...), Quest(...)).

    budget       keys that a head reads, a multiple of page_size.
    page_size    keys of a page; the paper uses 16.
    dense_layers  first layers that read every key; the paper uses 2.
    queries      "decoded": only the token of a forward of one, so prompts (and drafts) are read densely, as in the paper; "all": every token.

    Raises ValueError for parameters out of range.
    """

    budget: int = field(default=1024, metadata={"help": "keys that a head reads for a token"})
    page_size: int = field(default=16, metadata={"help": "keys of a page"})
    dense_layers: int = field(default=2, metadata={"help": "first layers that read every key"})
    queries: Literal["decoded", "all"] = field(default="decoded", metadata={"help": "decoded tokens (paper) or all queries"})

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "arXiv 2406.10774"
    recalls: ClassVar[str] = "everything; a decoded token reads the pages that its heads choose"
    evidence: ClassVar[str] = "on nano at 8 windows Combined(YaRN(8.0), Quest(budget=256)) found 25 of 25 pass keys, as YaRN(8.0) did"

    def __post_init__(self) -> None:
        require_integer("page_size", self.page_size, 1)
        require_integer("budget", self.budget, self.page_size)
        require_integer("dense_layers", self.dense_layers, 0)
        require(self.budget % self.page_size == 0, f"budget must be a multiple of page_size ({self.page_size}), not {self.budget}; round it")
        require(self.queries in ("decoded", "all"), f"queries must be 'decoded' or 'all', not {self.queries!r}")

    @classmethod
    def recommended(cls, window: int, context: int) -> Quest:
        """The same at every length, which has to be trained: see Combined."""
        return cls()

    @property
    def pages(self) -> int:
        return max(FEWEST, self.budget // self.page_size)

    def layout(self, layer: int = 0) -> Layout:
        if layer < self.dense_layers:
            return Layout((PLAIN,))
        choice = Choice(Bounds(self.pages), self.pages, self.page_size, who="every" if self.queries == "all" else "single")
        return Layout((Segment(Identity(), Identity(), Visible(), choice=choice),))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return hidden_to_nan(i - j, j <= i)

    def truth(self, dense: Dense) -> torch.Tensor:
        i, j, size = dense.i, dense.j, self.page_size
        every = self.distances(i, j)
        if dense.layer < self.dense_layers or (self.queries == "decoded" and len(i) > 1):
            return every
        q, k = dense.turned(dense.q, i[:, 0]), dense.turned(dense.k, j[0])
        full, seen = j.shape[1] // size, every.isnan().logical_not() & dense.seen
        keys = k[:, :, : full * size].unflatten(2, (full, size))
        low, high = (q[:, :, :, None] * extreme[:, :, None] for extreme in (keys.amin(3), keys.amax(3)))
        whole = (torch.arange(full, device=i.device) + 1) * size <= i + 1  # [T, pages]
        whole = whole & seen[..., : full * size].unflatten(-1, (full, size)).any(-1)
        bound = torch.maximum(low, high).sum(-1).masked_fill(~whole, -torch.inf)
        place = bound.argsort(-1, descending=True).argsort(-1)  # 0 for the best
        chosen = whole & (place < self.pages - ((i + 1) % size > 0).long())
        shown = torch.nn.functional.pad(chosen.repeat_interleave(size, -1), (0, j.shape[1] - full * size))
        return every.masked_fill(~(shown | (j // size * size + size > i + 1)), torch.nan)

    @property
    def cut(self) -> int | None:
        return 1 if self.queries == "all" else 2

    @classmethod
    def small(cls, pairs: int) -> Quest:
        return cls(12, 4, 1, "all")

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> Quest:
        return cls(-(-tokens // 16) * 16, dense_layers=0, queries="all")
