"""How a time budget is divided: how many candidates read how many documents, and what is left for losses and for the ceiling.

Knows seconds and counts; no candidates, models or clocks. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MOST_DOCUMENTS = 16
FINALISTS = 3  # whose loss is measured, beside that of the dial's rule
CEILING_SHARE = 0.2  # of the budget, at most


@dataclass(frozen=True)
class Cost:
    """Seconds, with what is around it: of one document with all its questions, of a loss, and of the parts of the ceiling, the most telling first."""

    document: float
    loss: float
    ceiling: tuple[float, ...]


@dataclass(frozen=True)
class Rung:
    """So many candidates have read so many documents, those of the rungs before included."""

    candidates: int
    documents: int


@dataclass(frozen=True)
class Plan:
    """`losses` readings at most, `ceiling` parts, and about how long all of it takes."""

    rungs: tuple[Rung, ...]
    losses: int
    ceiling: int
    seconds: float

    @property
    def readings(self) -> int:
        return _documents(self.rungs) + self.losses + self.ceiling


NOTHING_NEW = Plan((), 0, 0, 0.0)  # what is known is more than the budget buys


def divide(candidates: int, budget: float, cost: Cost, most: int = MOST_DOCUMENTS) -> Plan:
    """The ladder that fits with the most of: candidates of the first rung x square root of the documents of the last one.

    Every rung keeps the better half, at least two, and doubles their documents, at most `most`. A ladder of one document each is taken only where there is no
    time for a second; and the ceiling is left out only where there is no time for it beside two candidates.

    Raises ValueError, with the budget that is needed, where there is no time for two.
    """
    for parts in dict.fromkeys((_affordable(cost.ceiling, CEILING_SHARE * budget), 0)):
        spent = sum(cost.ceiling[:parts])
        fitting = [rungs for rungs in _ladders(candidates, most) if spent + _seconds(rungs, cost) <= budget]
        if fitting:
            best = max(fitting, key=lambda rungs: (min(2, len(rungs)), rungs[0].candidates * rungs[-1].documents ** 0.5, rungs[0].candidates))
            return Plan(best, _losses(best), parts, spent + _seconds(best, cost))
    needed = _seconds(_ladder(min(candidates, 2), 1), cost)
    raise ValueError(
        f"two candidates with one document of about {math.ceil(cost.document)} s each and their losses need about {math.ceil(needed)} s, "
        f"more than the budget of {math.floor(budget)} s; pass --budget {_rounded(needed)} or more (what was measured is kept), or a shorter --context"
    )


def two_documents(cost: Cost, spent: float) -> str:
    """The budget, as one types it, with which two candidates read two documents each, whatever the ceiling takes, and after what is spent already."""
    return _rounded(max(_seconds(_ladder(2, 2), cost), spent + 2 * cost.document + 2 * cost.loss) / (1 - CEILING_SHARE))


def _ladder(first: int, documents: int) -> tuple[Rung, ...]:
    """Rungs of 1, 2, 4, ... documents."""
    rungs = [Rung(first, 1)]
    while rungs[-1].documents < documents:
        rungs.append(Rung(half(rungs[-1].candidates), min(documents, 2 * rungs[-1].documents)))
    return tuple(rungs)


def _ladders(candidates: int, most: int) -> Iterator[tuple[Rung, ...]]:
    for first in range(min(2, candidates), candidates + 1):
        documents = 1
        while documents <= most:
            yield _ladder(first, documents)
            documents *= 2


def half(candidates: int) -> int:
    """How many a rung keeps."""
    return max(min(2, candidates), math.ceil(candidates / 2))


def _documents(rungs: Sequence[Rung]) -> int:
    before = [0, *(rung.documents for rung in rungs)]
    return sum(rung.candidates * (rung.documents - earlier) for rung, earlier in zip(rungs, before))


def _losses(rungs: Sequence[Rung]) -> int:
    return min(FINALISTS, rungs[-1].candidates) + 1


def _seconds(rungs: Sequence[Rung], cost: Cost) -> float:
    return _documents(rungs) * cost.document + _losses(rungs) * cost.loss


def _affordable(costs: Sequence[float], seconds: float) -> int:
    """How many of the first fit."""
    total = 0.0
    for count, cost in enumerate(costs):
        total += cost
        if total > seconds:
            return count
    return len(costs)


def _rounded(seconds: float) -> str:
    """As one types a budget, with a tenth to spare."""
    needed = 1.1 * seconds
    return f"{math.ceil(needed)}s" if needed < 90 else f"{math.ceil(needed / 60)}m"
