"""The computation allocation model (arXiv 2410.04343): what a budget of input tokens buys, spent on chunks, demonstrations and sub-questions.

For a configuration theta = (k, m, n): k chunks, m demonstrations, n generations towards the answer (1 is DRAG, and IterDRAG with r rounds has r + 1),

    link^-1(P(theta)) = (a + b * i)^T log(theta + 0.01) + c,    i = (i_doc, i_shot, 0)

by ordinary least squares over six numbers: a [3], b [2], c. P is the score, standardised for each task (minus its mean, over its standard deviation). i says
what a task gains from the first chunk and from the first demonstration: i_doc = P(1,0,1) - P(0,0,1), i_shot = P(0,1,1) - P(0,0,1). The paper states neither
the base of its logarithm nor whether i is of raw or of standardised scores: here the natural one, and both (`standard`). Knows numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from longreach.apps.rag.records import Run

EPSILON = 0.01
FIRST, ONE_CHUNK, ONE_SHOT = (0, 0, 1), (1, 0, 1), (0, 1, 1)  # the configurations that i is made of


class Link(Protocol):
    """From the linear predictor to a standardised score, and back."""

    def __call__(self, x: float) -> float: ...

    def inverse(self, p: float) -> float: ...


@dataclass(frozen=True)
class Sigmoid:
    """low + height / (1 + exp(-slope (x + shift))), by default as the paper fitted it. A score outside of its range counts as one `edge` of it inside."""

    low: float = -2.18
    height: float = 3.30
    slope: float = 1.81
    shift: float = 0.46
    edge: float = 0.02

    @classmethod
    def around(cls, scores: Sequence[float]) -> Sigmoid:
        """With the paper's slope and shift, and a range that holds all of these scores: other models are not as near to their best as the paper's."""
        low, high = min(scores), max(scores)
        margin = cls.edge * (high - low) / (1 - 2 * cls.edge)
        return cls(low - margin, high - low + 2 * margin)

    def __call__(self, x: float) -> float:
        z = self.slope * (x + self.shift)
        return self.low + self.height * (1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z)))

    def inverse(self, p: float) -> float:
        share = min(1 - self.edge, max(self.edge, (p - self.low) / self.height))
        return math.log(share / (1 - share)) / self.slope - self.shift


PAPER = Sigmoid()


@dataclass(frozen=True)
class Linear:
    """No link, as in an ablation of the paper."""

    def __call__(self, x: float) -> float:
        return x

    def inverse(self, p: float) -> float:
        return p


@dataclass(frozen=True)
class Facts:
    """Of a task: mean and standard deviation of its scores, and what it gains from the first chunk and from the first demonstration."""

    mean: float
    deviation: float
    i_doc: float
    i_shot: float


@dataclass(frozen=True)
class AllocationModel:
    """r2 and mse: of the standardised scores that it was fitted on, all of them (the paper leaves out peaks and valleys)."""

    a: tuple[float, float, float]
    b: tuple[float, float]
    c: float
    link: Link
    tasks: dict[str, Facts]
    r2: float = math.nan
    mse: float = math.nan

    @classmethod
    def fit(cls, runs: Sequence[Run], link: Link | None = PAPER, standard: bool = True) -> AllocationModel:
        """link      that of the paper, another one, or None for a sigmoid around the scores.
        standard  whether i is the difference of standardised scores, or of raw ones.

        Raises ValueError where a task lacks one of the three runs that i is made of, or where all its runs have one score.
        """
        if not runs:
            raise ValueError("there are no runs to fit; record some first")
        tasks = {task: _facts(task, [run for run in runs if run.task == task], standard) for task in sorted({run.task for run in runs})}
        scores = [(run.score - tasks[run.task].mean) / tasks[run.task].deviation for run in runs]
        link = link or Sigmoid.around(scores)
        rows = np.array([_row(run.theta, tasks[run.task]) for run in runs])
        # one task alone has one i, and then a and b cannot be told apart: the smallest of the equal solutions is taken, and predictions do not depend on it
        found = np.linalg.lstsq(rows, np.array([link.inverse(score) for score in scores]), rcond=None)[0].tolist()
        errors = [score - link(float(row @ found)) for score, row in zip(scores, rows)]
        mse, variance = float(np.mean(np.square(errors))), float(np.var(scores))
        return cls((found[0], found[1], found[2]), (found[3], found[4]), found[5], link, tasks, 1 - mse / variance, mse)

    def linear(self, theta: tuple[int, int, int], facts: Facts) -> float:
        return float(_row(theta, facts) @ np.array([*self.a, *self.b, self.c]))

    def predict(self, task: str, theta: tuple[int, int, int]) -> float:
        """The score of a task, not standardised."""
        facts = self._of(task)
        return facts.mean + facts.deviation * self.link(self.linear(theta, facts))

    def best(self, task: str, candidates: Sequence[Run], budget: int) -> Run:
        """Of those whose largest context fits into the budget, the one of the highest predicted score; of equals the cheapest."""
        fitting = affordable(candidates, budget)
        return min(fitting, key=lambda run: (-self.predict(task, run.theta), run.tokens, run.theta))

    def _of(self, task: str) -> Facts:
        if task not in self.tasks:
            raise ValueError(f"no run of the task {task!r} was fitted; choose one of {', '.join(self.tasks)}")
        return self.tasks[task]


def found_best(runs: Sequence[Run], budget: int) -> Run:
    """P*(budget): of the runs whose largest context fits, the one that scored best; of equals the cheapest."""
    return min(affordable(runs, budget), key=lambda run: (-run.score, run.tokens, run.theta))


def affordable(runs: Sequence[Run], budget: int) -> list[Run]:
    found = [run for run in runs if run.tokens <= budget]
    if not found:
        least = min((run.tokens for run in runs), default=0)
        raise ValueError(f"no recorded run fits into a budget of {budget} tokens, and the cheapest has {least}; pass a larger budget (--budget)")
    return found


def _facts(task: str, runs: Sequence[Run], standard: bool) -> Facts:
    scores = {run.theta: run.score for run in runs}
    if missing := [theta for theta in (FIRST, ONE_CHUNK, ONE_SHOT) if theta not in scores]:
        raise ValueError(f"the runs of {task!r} lack {', '.join(f'(k, m, n) = {theta}' for theta in missing)}, from which its gains are told; record them too")
    deviation = float(np.std([run.score for run in runs]))
    if deviation == 0:
        raise ValueError(f"all runs of {task!r} have the score {runs[0].score:g}, so there is nothing to predict; record others, or leave the task out")
    unit = deviation if standard else 1.0
    first, chunk, shot = (scores[theta] for theta in (FIRST, ONE_CHUNK, ONE_SHOT))
    return Facts(float(np.mean([run.score for run in runs])), deviation, (chunk - first) / unit, (shot - first) / unit)


def _row(theta: tuple[int, int, int], facts: Facts) -> np.ndarray:
    """[6]: what a [3], b [2] and c are multiplied by."""
    k, m, n = (math.log(value + EPSILON) for value in theta)
    return np.array([k, m, n, facts.i_doc * k, facts.i_shot * m, 1.0])
