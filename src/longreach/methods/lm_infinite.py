"""LM-Infinite (Han et al., NAACL 2024, arXiv 2308.16137): the last n_local keys and the first n_global, distance capped."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from longreach.core.choice import Choice, Index, Past
from longreach.core.dense import Dense
from longreach.core.segments import Constant, Identity, Layout, Segment, Visible
from longreach.kernels.products import products
from longreach.methods.base import Method, hidden_to_nan, require, require_integer


@dataclass(frozen=True)
class Best(Index):
    """The `k` keys with the largest logits, for queries that have so many to choose from."""

    k: int

    def choose(self, q: torch.Tensor, past: Past) -> torch.Tensor:
        logits = products(q.float(), past.compared.float())
        enough = past.candidates.sum(-1) >= self.k
        if past.compared.shape[2] < self.k:
            return enough.new_full((*q.shape[:3], 1), -1, dtype=torch.long)
        ids = logits.masked_fill(~past.candidates[:, None], -torch.inf).topk(self.k).indices
        return ids.masked_fill(~enough[:, None, :, None], -1)


@dataclass(frozen=True)
class LMInfinite(Method):
    """The Λ-shaped mask with a distance ceiling; constant memory, texts of any length.

        visible:   i - j < n_local   or   j < n_global
        distance:  min(i - j, distance_limit)

    n_local         tokens seen at their true distance, >= 1; the paper uses the trained window.
    n_global        first tokens that always stay visible; the paper finds that 10 to 100 work equally well and that 0 breaks the model.
    distance_limit  the ceiling; None is n_local, which is also what the official conversion calls force.
    distance        "min" is the paper's; "constant" puts every global key beyond n_local at exactly distance_limit, as the official
                    code does. They differ only when distance_limit > n_local.
    top_k           also attend to the `top_k` best hidden keys of the middle (an option of the paper, 5 there); 0 is off. It keeps
                    every key, so memory is no longer bounded.
    top_k_distance  the one distance at which they are seen; None is half of distance_limit.
    top_k_rows      "last": only the last query of each forward, as in the official code; "all": every query.
    top_k_from_layer  first layer (from 0) that does so; the official code uses 4.

    Raises ValueError for parameters out of range.
    """

    n_local: int = field(metadata={"help": "tokens seen at their true distance"})
    n_global: int = field(default=10, metadata={"help": "first tokens that stay visible"})
    distance_limit: int | None = field(default=None, metadata={"help": "distance ceiling; n_local if not given"})
    distance: Literal["min", "constant"] = field(default="min", metadata={"help": "min (paper) or constant (official code)"})
    top_k: int = field(default=0, metadata={"help": "hidden middle keys to re-attend to; 0 is off"})
    top_k_distance: int | None = field(default=None, metadata={"help": "distance of those keys; half of distance_limit if not given"})
    top_k_rows: Literal["last", "all"] = field(default="last", metadata={"help": "last (official) or all queries"})
    top_k_from_layer: int = field(default=4, metadata={"help": "first layer that re-attends"})

    name: ClassVar[str] = "lm-infinite"
    paper: ClassVar[str] = "arXiv 2308.16137"
    recalls: ClassVar[str] = "the last n_local tokens and the first few"

    @property
    def sees(self) -> str:
        if not self.top_k:
            return self.recalls
        who = "each query" if self.top_k_rows == "all" else "the last query of a forward"
        return f"{self.recalls}, and the {self.top_k} others that {who} fits best in layers from {self.top_k_from_layer} on"

    def __post_init__(self) -> None:
        require_integer("n_local", self.n_local, 1)
        require_integer("n_global", self.n_global, 0)
        require_integer("top_k", self.top_k, 0)
        require_integer("top_k_from_layer", self.top_k_from_layer, 0)
        require(self.distance in ("min", "constant"), f"distance must be 'min' or 'constant', not {self.distance!r}")
        require(self.top_k_rows in ("last", "all"), f"top_k_rows must be 'last' or 'all', not {self.top_k_rows!r}")
        if self.distance_limit is not None:
            require_integer("distance_limit", self.distance_limit, 1)
        if self.top_k_distance is not None:
            require_integer("top_k_distance", self.top_k_distance, 0)
        require(
            self.distance == "min" or self.limit >= self.n_local,
            f"distance='constant' needs distance_limit >= n_local ({self.n_local}), not {self.limit}; raise it or use distance='min'",
        )

    @classmethod
    def recommended(cls, window: int, context: int) -> LMInfinite:
        """The whole trained window, as in the paper."""
        return cls(n_local=window)

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        return self.top_k == 0

    @property
    def limit(self) -> int:
        return self.n_local if self.distance_limit is None else self.distance_limit

    def layout(self, layer: int = 0) -> Layout:
        n, limit = self.n_local, self.limit
        segments = [Segment(Identity(), Identity(), Visible(0, min(n, limit)))]
        if limit < n:
            segments.append(Segment(Constant(limit), Constant(0), Visible(limit, n)))
        if self.n_global:
            capped_from = n if self.distance == "constant" else max(n, limit)
            if capped_from > n:
                segments.append(Segment(Identity(), Identity(), Visible(n, capped_from, last_key=self.n_global)))
            # distance `limit` between two constants: turning the few keys back costs less than turning every query forward
            segments.append(Segment(Constant(0), Constant(-limit), Visible(capped_from, last_key=self.n_global)))
        if self.chooses(layer):
            n_candidates = Visible(low=n, first_key=self.n_global, first_query=n + self.n_global + self.top_k - 1)
            choice = Choice(Best(self.top_k), self.top_k, who="every" if self.top_k_rows == "all" else "last")
            segments.append(Segment(Constant(self.middle), Constant(0), n_candidates, choice=choice))
        return Layout(tuple(segments))

    def chooses(self, layer: int) -> bool:
        return self.top_k > 0 and layer >= self.top_k_from_layer

    @property
    def middle(self) -> int:
        """The distance of the keys that are chosen."""
        return self.limit // 2 if self.top_k_distance is None else self.top_k_distance

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        near = self._mask(i, j)
        if not self.top_k:
            return near
        candidate = (j >= self.n_global) & (i - j >= self.n_local) & (i - self.n_local - self.n_global + 1 >= self.top_k)
        return torch.where(candidate, float(self.middle), near)

    def _mask(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        visible = (j <= i) & ((i - j < self.n_local) | (j < self.n_global))
        capped = (i - j).clamp(max=self.limit)
        if self.distance == "constant":
            capped = torch.where(i - j < self.n_local, i - j, self.limit)
        return hidden_to_nan(capped, visible)

    def truth(self, dense: Dense) -> torch.Tensor:
        i, j = dense.i, dense.j
        near = self._mask(i, j)
        if not self.chooses(dense.layer):
            return near
        candidate = dense.seen & (j >= self.n_global) & (i - j >= self.n_local)
        candidate &= candidate.sum(-1, keepdim=True) >= self.top_k
        if self.top_k_rows == "last":
            candidate &= i == i[-1]
        logits = dense.logits(torch.full_like(near, self.middle)).masked_fill(~candidate, -torch.inf)
        best = logits.topk(min(self.top_k, logits.shape[-1]), dim=-1).indices
        chosen = candidate & torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True)
        return torch.where(chosen, float(self.middle), near)

    def capacity(self, window: int) -> int | None:
        """Unlimited if no distance exceeds the trained ones: n_local - 1 when near, the limit for the first tokens."""
        fits = min(self.n_local - 1, self.limit) < window and self.limit <= window and (not self.top_k or self.middle <= window)
        return None if fits else 0

    @property
    def cut(self) -> int | None:
        return None if self.top_k and self.top_k_rows == "last" else 1

    @classmethod
    def small(cls, pairs: int) -> LMInfinite:
        return cls(9, 3)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> LMInfinite:
        return cls(tokens, 3)
