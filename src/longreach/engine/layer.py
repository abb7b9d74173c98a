"""What is fixed about one attention layer at `extend()`, and what the model hands to it in a forward. Knows a method and its layout; no tensors of tokens."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field

import torch

from longreach.core.choice import OfQueries
from longreach.core.encodings import Alibi, Rotary
from longreach.core.segments import Constant, Form, Layout, PositionMap, Retention, Summary, forms, queries, summaries
from longreach.methods.base import Method

RAW = Constant(0)
QUERY, LSE = OfQueries("q"), OfQueries("lse")


@dataclass(frozen=True, eq=False)
class Layer:
    """Everything that is fixed about one attention layer at `extend()`."""

    index: int
    method: Method
    rotary: Rotary | None  # None: the layer does not rotate
    dense: bool = False  # compute the dense truth instead of segments
    alibi: Alibi | None = None
    written: bool = False  # whoever hands out its memory writes new keys and values there by himself
    layout: Layout = field(init=False)
    forms: dict[PositionMap, Retention] = field(init=False)  # the key forms its store holds
    summaries: dict[Summary, Retention] = field(init=False)  # and what it holds of blocks of keys
    queries: dict[OfQueries, Retention] = field(init=False)  # and of queries
    rest: Rotary | None = field(init=False)  # what turns keys that are kept at position 0: the factor of the rotary is in them already

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", self.method.layout(self.index))
        kept = {RAW: Retention(tail=None)} if self.dense else forms(self.layout)
        if self.rotary is None:  # all forms are the keys as they are, so one is enough
            kept = {RAW: functools.reduce(operator.or_, kept.values())}
        object.__setattr__(self, "forms", {} if self.written else kept)
        object.__setattr__(self, "summaries", {} if self.dense else summaries(self.layout))
        object.__setattr__(self, "rest", None if self.rotary is None else self.rotary.unscaled)
        of_queries = queries(self.layout)
        object.__setattr__(self, "queries", dict.fromkeys(of_queries, Retention(tail=None)) if self.dense else of_queries)

    @property
    def kept(self) -> dict[Form, Retention]:
        """All that its store holds, beside the values."""
        return dict([*self.forms.items(), *self.summaries.items(), *self.queries.items()])

    @property
    def together(self) -> int:
        """Queries that choose together."""
        return 1 if self.layout.choice is None else self.layout.choice.queries

    @property
    def recalls(self) -> bool:
        """Whether a token takes what earlier ones were answered."""
        return self.layout.choice is not None and bool(self.layout.choice.refresh)

    @property
    def joins(self) -> bool:
        """Whether rows of any lengths can be computed together where they read one token each."""
        return not self.dense and self.alibi is None

    def form_of(self, positions: PositionMap) -> PositionMap:
        """The form that holds keys at these positions."""
        return RAW if self.rotary is None else positions


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the model hands to one attention layer, besides q, k, v."""

    scale: float
    softcap: float | None = None
    sink: torch.Tensor | None = None
