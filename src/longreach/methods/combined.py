"""A frequency method and a method of positions on one model: for example YaRN's frequencies under LM-Infinite's mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.core.dense import Dense
from longreach.core.encodings import Frequencies, Rope
from longreach.core.eviction import Eviction
from longreach.core.segments import Layout, LogScale
from longreach.methods.base import FrequencyMethod, Method, require
from longreach.methods.lm_infinite import LMInfinite
from longreach.methods.selfextend import SelfExtend
from longreach.methods.yarn import YaRN


@dataclass(frozen=True)
class Combined(Method):
    """Distances, visibility and query scale of `positions`; frequencies of `encoding`.

        Combined(YaRN(4.0), LMInfinite(n_local=8192))
        Combined(PI(2.0), SelfExtend(group_size=8, window=1024))

    `positions` may use all distances that `encoding` reaches: with a trained window of L, YaRN(4.0) lets them grow to 4 L.
    Frequencies that depend on the length are fixed from the largest distance that `positions` produces. If that lies inside the
    trained window, the frequencies are the model's own.

    encoding   a frequency method: PI, NTK, DynamicNTK, NTKByParts, YaRN, DynamicYaRN, LongRoPE.
    positions  any other method.

    Raises ValueError if they are the wrong way round, or nested.
    """

    encoding: Method = field(metadata={"help": 'frequency method, such as "yarn --factor 4"'})
    positions: Method = field(metadata={"help": 'method of positions, such as "lm-infinite --n-local 512"'})

    name: ClassVar[str] = "combined"
    paper: ClassVar[str] = "those of its parts"
    recalls: ClassVar[str] = "what its method of positions sees"
    rescales: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(
            isinstance(self.encoding, FrequencyMethod),
            f"encoding must be a frequency method such as YaRN(factor=4.0), not {self.encoding}; pass the other method as positions",
        )
        require(
            isinstance(self.positions, Method) and not self.positions.rescales,
            f"positions must be a method without frequencies of its own, such as LMInfinite(n_local=512), not {self.positions}",
        )

    @property
    def sees(self) -> str:
        return self.positions.sees

    @property
    def evidence(self) -> str:  # type: ignore[override]
        return self.positions.evidence

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        return self.positions.bounded

    @property
    def eviction(self) -> Eviction | None:
        return self.positions.eviction

    @property
    def needs_context(self) -> bool:  # type: ignore[override]
        return self.encoding.needs_context

    @property
    def cut(self) -> int | None:
        return self.positions.cut

    def layout(self, layer: int = 0) -> Layout:
        return self.positions.layout(layer)

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return self.positions.distances(i, j)

    def truth(self, dense: Dense) -> torch.Tensor:
        return self.positions.truth(dense)

    def largest_distance(self, tokens: int) -> float:
        return self.positions.largest_distance(tokens)

    def query_scale(self) -> LogScale | None:
        return self.positions.query_scale()

    def frequencies(self, rope: Rope) -> Frequencies:
        return self.encoding.frequencies(rope)

    def capacity(self, window: int) -> int | None:
        reach = self.encoding.capacity(window)
        return None if reach is None else self.positions.capacity(reach)

    @classmethod
    def small(cls, pairs: int) -> Combined:
        return cls(YaRN(2.0), LMInfinite(9, 3))

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> Combined:
        return cls(YaRN(1.0), SelfExtend(4, tokens))
