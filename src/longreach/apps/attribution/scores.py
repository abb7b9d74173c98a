"""What a player contributes to a game: the score functions of TracLLM (arXiv 2506.04202).

Players are numbers 0 to n - 1, and a value is a function v of sets of them. Knows arithmetic only: no texts, no models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import ClassVar

Coalition = frozenset[int]
Value = Callable[[Coalition], float]
PERMUTATIONS = 5


class Scorer(ABC):
    """A score function. Which coalitions it asks for depends on n alone, so that they are known beforehand; see `coalitions`.

    weight  of its scores among those of an ensemble.
    """

    name: ClassVar[str]
    weight: ClassVar[float] = 1.0

    @abstractmethod
    def scores(self, n: int, v: Value) -> list[float]:
        """One for each of n players."""

    def coalitions(self, n: int) -> list[Coalition]:
        """Those that it asks for, each once."""
        asked: dict[Coalition, None] = {}

        def note(who: Coalition) -> float:
            asked[who] = None
            return 0.0

        self.scores(n, note)
        return [*asked]


@dataclass(frozen=True)
class Alone(Scorer):
    """Single text contribution: v({i}) - v({})."""

    name: ClassVar[str] = "alone"

    def scores(self, n: int, v: Value) -> list[float]:
        nobody = v(Coalition())
        return [v(Coalition({i})) - nobody for i in range(n)]


@dataclass(frozen=True)
class LeaveOneOut(Scorer):
    """v(U) - v(U without i). Copies of a text hide each other."""

    name: ClassVar[str] = "leave-one-out"
    weight: ClassVar[float] = 2.0  # of the paper: it is zero more often than the others

    def scores(self, n: int, v: Value) -> list[float]:
        everybody = Coalition(range(n))
        return [v(everybody) - v(everybody - {i}) for i in range(n)]


@dataclass(frozen=True)
class Shapley(Scorer):
    """The mean over random orders of what i adds to those before it.

    permutations  orders that are drawn. Each costs n coalitions.
    """

    permutations: int = PERMUTATIONS
    seed: int = 0
    name: ClassVar[str] = "shapley"

    def __post_init__(self) -> None:
        if self.permutations < 1:
            raise ValueError(f"permutations must be at least 1, not {self.permutations}")

    def scores(self, n: int, v: Value) -> list[float]:
        return [sum(each) / len(each) for each in self._marginals(n, v)]

    def _marginals(self, n: int, v: Value) -> list[list[float]]:
        """What each player adds, order by order; in each the sum over the players is v(U) - v({})."""
        found: list[list[float]] = [[] for _ in range(n)]
        rng = Random(self.seed)
        for _ in range(self.permutations):
            order = rng.sample(range(n), n)
            values = [v(before) for before in accumulate(order, lambda before, i: before | {i}, initial=Coalition())]
            for i, before, after in zip(order, values, values[1:]):
                found[i].append(after - before)
        return found


@dataclass(frozen=True)
class DenoisedShapley(Shapley):
    """The mean of the largest marginals: a player among others that say the same adds nothing in most orders.

    share  of the orders that count, at least one.
    """

    share: float = 0.2
    name: ClassVar[str] = "denoised-shapley"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share}")

    def scores(self, n: int, v: Value) -> list[float]:
        count = max(1, int(self.permutations * self.share))
        return [sum(sorted(each, reverse=True)[:count]) / count for each in self._marginals(n, v)]


SCORERS: dict[str, type[Scorer]] = {kind.name: kind for kind in (Alone, LeaveOneOut, Shapley, DenoisedShapley)}
ENSEMBLE = (Alone.name, LeaveOneOut.name, DenoisedShapley.name)  # of the paper


def named(names: tuple[str, ...] = ENSEMBLE, permutations: int = PERMUTATIONS, seed: int = 0) -> tuple[Scorer, ...]:
    """The scorers of these names. Raises ValueError for an unknown one, and for none or one twice."""
    if unknown := [name for name in names if name not in SCORERS]:
        raise ValueError(f"there is no score {unknown[0]!r}; choose among {', '.join(SCORERS)}")
    if not names or len({*names}) < len(names):
        raise ValueError("name at least one score, and each once, such as " + ",".join(ENSEMBLE))
    kinds = [SCORERS[name] for name in names]
    return tuple(kind(permutations, seed) if issubclass(kind, Shapley) else kind() for kind in kinds)
