"""A bench without a model: recall and loss of every candidate are known, and time passes only when something is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from longreach.evals.tune.bench import Answers, Loss, Part, Refused
from longreach.evals.tune.candidates import Candidate

KEYS = 8


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeBench:
    """`recall(candidate)` is the chance of every key, the same keys for all: whoever has the higher chance finds what the other finds, and more."""

    clock: Clock
    recall: Callable[[Candidate], float]
    nats: Callable[[Candidate], float] = lambda candidate: 3.5
    seconds: Callable[[Candidate], float] = lambda candidate: 10.0
    refuses: tuple[str, ...] = ()
    parts: tuple[Part, ...] = (Part("recall at 1x of the window, raw", 0.5), Part("loss inside the window", 0.5))
    done: dict[tuple[str, object], object] = field(default_factory=dict)
    asked: list[tuple[str, object]] = field(default_factory=list)  # in the order of asking, in this life
    documents: int = 1000
    losses: Callable[[Candidate], float] | None = None  # seconds of a loss

    def has(self, document: int) -> bool:
        return document < self.documents

    def known(self, candidate: Candidate, document: int) -> Answers | None:
        return self.done.get((candidate.label, document))  # type: ignore[return-value]

    def read(self, candidate: Candidate, document: int) -> Answers:
        if candidate.label in self.refuses:
            raise Refused("it cannot be attached to this model")
        drawn = Random(document)
        scores = tuple(float(drawn.random() < self.recall(candidate)) for _ in range(KEYS))
        return self._keep(candidate.label, document, Answers(scores, self.seconds(candidate), 0.8 * self.seconds(candidate)), self.seconds(candidate))

    def known_loss(self, candidate: Candidate) -> Loss | None:
        return self.done.get((candidate.label, "loss"))  # type: ignore[return-value]

    def loss(self, candidate: Candidate) -> Loss:
        nats, seconds = self.nats(candidate), self.losses(candidate) if self.losses else 0.8 * self.seconds(candidate)
        return self._keep(candidate.label, "loss", Loss(nats, nats - 0.1, nats + 0.1, (nats,), seconds), seconds)

    def known_part(self, part: Part) -> float | None:
        return self.done.get((part.name, "ceiling"))  # type: ignore[return-value]

    def ceiling(self, part: Part) -> float:
        return self._keep(part.name, "ceiling", 10 * part.weight, 10 * part.weight)

    def _keep(self, name: str, what: object, result: object, seconds: float):  # type: ignore[no-untyped-def]
        self.clock.now += seconds
        self.asked.append((name, what))
        self.done[name, what] = result
        return result

    def again(self) -> FakeBench:
        """What another process finds: all that was measured, and a clock of its own."""
        return FakeBench(Clock(), self.recall, self.nats, self.seconds, self.refuses, self.parts, dict(self.done), losses=self.losses)
