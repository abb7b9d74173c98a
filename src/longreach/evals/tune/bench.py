"""What is measured of candidates, and who measures it: the words between the schedule (halving.py) and a model (study.py).

Knows numbers and names; no models, files or clocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from longreach.evals.scores import clusters
from longreach.evals.scores.clusters import Share
from longreach.evals.tune.candidates import Candidate


class Refused(ValueError):
    """This model cannot have the candidate's method, or its answers failed; the sentence says why. Another candidate takes its place."""


@dataclass(frozen=True)
class Answers:
    """To the questions about one document: a score in 0..1 for each. `seconds` of all of it, `reading` of the document alone. `tasks`: whose every question
    is; () where there is one task."""

    scores: tuple[float, ...]
    seconds: float
    reading: float
    tasks: tuple[str, ...] = ()

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the scores, so that every task counts the same, however many questions it asks."""
        asked = Counter(self.tasks)
        return tuple(1 / asked[task] for task in self.tasks) if self.tasks else (1.0,) * len(self.scores)


def recall(answers: Sequence[Answers]) -> Share:
    """The mean over tasks of their shares, over documents."""
    return clusters.share([each.scores for each in answers], [each.weights for each in answers])


def of_tasks(answers: Sequence[Answers]) -> dict[str, Share]:
    """The share of every task by itself, where there are several."""
    names = dict.fromkeys(task for each in answers for task in each.tasks)
    if len(names) < 2:
        return {}
    return {name: clusters.share([[s for s, task in zip(each.scores, each.tasks) if task == name] for each in answers]) for name in names}


@dataclass(frozen=True)
class Loss:
    """Nats per token over the part of one passage that is scored, its 95 % interval over blocks of tokens, and the mean of every block."""

    nats: float
    low: float
    high: float
    blocks: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Part:
    """A part of the ceiling: plain attention inside the window. `weight`: its length as a share of the context."""

    name: str
    weight: float


class Bench(Protocol):
    """Where measurements come from. `known...` are those of earlier calls. The others raise Refused where a candidate cannot be measured at all."""

    @property
    def parts(self) -> Sequence[Part]: ...
    def has(self, document: int) -> bool: ...  # whether there is such a document; False ends them
    def known(self, candidate: Candidate, document: int) -> Answers | None: ...
    def read(self, candidate: Candidate, document: int) -> Answers: ...
    def known_loss(self, candidate: Candidate) -> Loss | None: ...
    def loss(self, candidate: Candidate) -> Loss: ...
    def known_part(self, part: Part) -> float | None: ...  # the seconds it took
    def ceiling(self, part: Part) -> float: ...
