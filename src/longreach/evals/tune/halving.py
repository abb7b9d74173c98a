"""Successive halving within a time budget: every candidate of a rung answers the same documents, the better half goes on to more of them.

Knows candidates, answers and a clock; not models, files or terminals: a `Bench` asks. What was measured in an earlier call costs the seconds that it took then,
so that the same budget comes to the same end again without work, and a larger one goes on from there. In the end all that is known counts, also where a
budget alone would have bought less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from longreach.evals.harness.estimates import Step
from longreach.evals.harness.runner import Progress
from longreach.evals.scores.clusters import Share
from longreach.evals.tune.bench import Answers, Bench, Loss, Part, Refused, recall
from longreach.evals.tune.candidates import DIAL, Candidate
from longreach.evals.tune.plan import FINALISTS, MOST_DOCUMENTS, NOTHING_NEW, Cost, Plan, divide
from longreach.quantities import counted

NO_TIME = "the budget ended before its turn"
CONTROL_DOCUMENTS = 4  # that plain attention reads before the best read more: fewer tell nothing about it
Found = TypeVar("Found", Answers, Loss)


@dataclass
class Entry:
    """A candidate and what is known of it. `reason`: why it was not tried or cannot be."""

    candidate: Candidate
    answers: list[Answers] = field(default_factory=list)  # to the documents 0, 1, ...
    loss: Loss | None = None
    reason: str | None = None
    rung: int = 0

    @property
    def groups(self) -> list[tuple[float, ...]]:
        return [answers.scores for answers in self.answers]

    @property
    def share(self) -> Share:
        return recall(self.answers)

    @property
    def seconds(self) -> float | None:
        return sum(a.seconds for a in self.answers) / len(self.answers) if self.answers else None


@dataclass(frozen=True)
class Search:
    """What came out: every candidate in the order of trying, the parts of the ceiling that were measured, the plan, and the seconds spent on it in all."""

    entries: tuple[Entry, ...]
    parts: tuple[Part, ...]
    plan: Plan
    spent: float

    @property
    def tried(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.answers]


@dataclass
class Meter:
    """The budget: seconds of earlier calls that are used again, and those that pass now."""

    budget: float
    clock: Callable[[], float]
    carried: float = 0.0

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def spent(self) -> float:
        return self.carried + self.clock() - self.started

    def allows(self, seconds: float) -> bool:
        return self.spent + seconds <= self.budget


def search(
    candidates: Sequence[Candidate],
    bench: Bench,
    budget: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    said: Callable[[Plan, Cost], None] = lambda plan, cost: None,
    progress: Progress = lambda step: None,
    most: int | None = None,
) -> Search:
    """Time the first document, divide the budget, measure the ceiling, halve the candidates, and measure the loss of the last.

    budget  seconds, those of earlier calls included.
    said    gets the plan before it is carried out.
    most    documents of a candidate; MOST_DOCUMENTS if not given.

    Exceeds the budget by at most one reading. Raises ValueError, with the budget that is needed, where two candidates are more than it allows, and two are not
    known yet either.
    """
    run = _Run([Entry(candidate) for candidate in candidates], bench, Meter(budget, clock), progress, MOST_DOCUMENTS if most is None else most)
    first = next((entry for entry in run.entries if run.read(entry, 0, sure=True)), None)
    if first is None:
        raise ValueError(f"no candidate can be measured on this model; the first one: {run.entries[0].reason}")
    timed = first.answers[0]
    run.cost = Cost(timed.seconds, timed.seconds, tuple(part.weight * timed.seconds for part in bench.parts))
    try:
        run.plan = plan = divide(sum(entry.reason is None for entry in run.entries), budget, run.cost, run.most)
    except ValueError:
        run.take_up()
        if sum(not entry.candidate.control for entry in run.ranked()) < 2:
            raise
        run.plan = plan = NOTHING_NEW
    said(plan, run.cost)
    if plan is not NOTHING_NEW:
        run.carry_out(plan)
        run.take_up()
    for entry in run.entries:
        if not entry.answers and entry.reason is None:
            entry.reason = NO_TIME
    run.report("done", end=True)
    return Search(tuple(run.entries), tuple(run.parts), plan, run.meter.spent)


class _Run:
    """One search: what is done so far, and whether there is time for more."""

    def __init__(self, entries: list[Entry], bench: Bench, meter: Meter, progress: Progress, most: int) -> None:
        self.entries, self.bench, self.meter, self.progress, self.most = entries, bench, meter, progress, most
        self.cost, self.plan = Cost(0.0, 0.0, ()), None  # type: tuple[Cost, Plan | None]
        self.parts: list[Part] = []
        self.finalists: list[Entry] = []
        self.done = 0

    def report(self, what: str, end: bool = False) -> None:
        if self.plan is None:
            return self.progress(Step(self.done, max(1, self.done), 0, self.failed, None, what))
        total = self.done if end else max(self.plan.readings, self.done + 1)
        left = 0.0 if end else max(0.0, min(self.meter.budget - self.meter.spent, self.plan.seconds * (total - self.done) / total))
        self.progress(Step(self.done, total, 0, self.failed, left, what))

    @property
    def failed(self) -> int:
        return sum(entry.reason not in (None, NO_TIME) for entry in self.entries)

    def read(self, entry: Entry, document: int, sure: bool = False) -> bool:
        """Have a candidate answer the next document, if it has not, and there are such a document and time -> whether it has now. `sure`: time is not asked."""
        if document < len(entry.answers):
            return True
        if not self.there_is(document):
            return False
        found = self._obtain(
            entry, self.bench.known(entry.candidate, document), lambda: self.bench.read(entry.candidate, document),
            f"{entry.candidate.label} reads document {document + 1}", None if sure else (entry.seconds or self.cost.document) + self.reserve,
        )  # fmt: skip
        if found is None:
            return False
        entry.answers.append(found)
        return True

    def carry_out(self, plan: Plan) -> None:
        self.try_first(2)  # before the ceiling: without two there is nothing to choose between
        self.measure_ceiling(plan.ceiling)
        self.halve()
        self.measure_losses()
        self.spend_the_rest()

    def take_up(self) -> None:
        """What earlier calls have measured beyond that: to leave it out would be to decide on less than is known."""
        for entry in self.entries:
            if entry.reason is None:
                while len(entry.answers) < self.most and (known := self.bench.known(entry.candidate, len(entry.answers))) is not None:
                    self.meter.carried += known.seconds
                    entry.answers.append(known)
                if entry.loss is None and (loss := self.bench.known_loss(entry.candidate)) is not None:
                    self.meter.carried += loss.seconds
                    entry.loss = loss
        for part in self.bench.parts:
            if part not in self.parts and (seconds := self.bench.known_part(part)) is not None:
                self.meter.carried += seconds
                self.parts.append(part)

    def there_is(self, document: int) -> bool:
        """Whether there is a document that may be read."""
        return document < self.most and self.bench.has(document)

    def _obtain(self, entry: Entry, known: Found | None, measure: Callable[[], Found], what: str, seconds: float | None) -> Found | None:
        """What is known, or measured now where there is time for so many seconds (None: it is not asked for); None where it is neither."""
        if known is not None:
            self.meter.carried += known.seconds
        else:
            if entry.reason is not None or not (seconds is None or self.meter.allows(seconds)):
                return None
            self.report(what)
            try:
                known = measure()
            except Refused as refused:
                entry.reason = str(refused)
                return None
        self.done += 1
        return known

    @property
    def reserve(self) -> float:
        """Kept for the losses, without which nothing can be chosen: by what those took that are known, else by the documents of those that were read."""
        if self.plan is None:
            return 0.0
        known = [entry.loss.seconds for entry in self.entries if entry.loss is not None]
        like = known or [entry.seconds for entry in self.entries if entry.seconds is not None]
        return max(0, self.plan.losses - len(known)) * sum(like) / len(like)

    def measure_loss(self, entry: Entry) -> bool:
        """-> whether it is known now."""
        if entry.loss is None:
            what = f"{entry.candidate.label} reads a passage for its loss"
            entry.loss = self._obtain(entry, self.bench.known_loss(entry.candidate), lambda: self.bench.loss(entry.candidate), what, self.cost.loss)
        return entry.loss is not None

    def measure_ceiling(self, parts: int) -> None:
        for part, cost in zip(self.bench.parts[:parts], self.cost.ceiling):
            known = self.bench.known_part(part)
            if known is not None:
                self.meter.carried += known
            elif self.meter.allows(cost + self.reserve):
                self.report(f"the ceiling: {part.name}")
                self.bench.ceiling(part)
            else:
                return
            self.done += 1
            self.parts.append(part)

    def halve(self) -> None:
        assert self.plan is not None
        first, *rest = self.plan.rungs
        self.try_first(first.candidates)
        self.finalists = self.ranked()
        for number, rung in enumerate(rest, 1):
            if rung.documents > CONTROL_DOCUMENTS:
                self.read_controls(CONTROL_DOCUMENTS)
            going_on = self.ranked(self.finalists)[: rung.candidates]
            if not going_on:
                return
            done = len(going_on[0].answers)
            if number == 1 and (dial := self.dial()) is not None and dial.answers:
                self.read(dial, 1)  # one document tells nothing about what the choice is compared with
            if not self.read_all(going_on, range(done, rung.documents)):
                self.finalists = self.ranked(going_on)  # time has ended in this rung: what it has read counts
                return
            for entry in going_on:
                entry.rung = number
            self.finalists = self.ranked(going_on)

    def try_first(self, count: int) -> None:
        """Have so many candidates answer the first document."""
        for entry in self.entries:
            if sum(bool(e.answers) for e in self.entries) >= count:
                return
            self.read(entry, 0)

    def read_controls(self, documents: int) -> None:
        """Have the controls that were tried read so many documents, so that they tell something."""
        for entry in self.entries:
            if entry.candidate.control and entry.answers:
                self.read_all([entry], range(len(entry.answers), documents))

    def read_all(self, entries: Sequence[Entry], documents: range) -> bool:
        """One document after the other, so that the candidates can be compared whenever time ends -> whether it has not."""
        for document in documents:
            for entry in entries:
                if entry.reason is None and not self.read(entry, document) and entry.reason is None:
                    return False
        return True

    def ranked(self, entries: Sequence[Entry] | None = None) -> list[Entry]:
        """Those that can be chosen or compared, the best first: by recall over the documents that all of them have read, loss, order."""
        able = [entry for entry in (self.entries if entries is None else entries) if entry.answers and entry.reason is None]
        common = min((len(entry.answers) for entry in able), default=0)
        place = {id(entry): n for n, entry in enumerate(self.entries)}

        def key(entry: Entry) -> tuple[float, float, int]:
            return -recall(entry.answers[:common]).value, float("inf") if entry.loss is None else entry.loss.nats, place[id(entry)]

        return sorted(able, key=key)

    def dial(self) -> Entry | None:
        return next((entry for entry in self.entries if entry.candidate.label == DIAL), None)

    def measure_losses(self) -> None:
        """Of the best, then of the dial's rule, which it is compared with, then of the other finalists. A control cannot be chosen and needs none."""
        best = [entry for entry in self.ranked(self.finalists) if not entry.candidate.control][:FINALISTS]
        dial = self.dial()
        for entry in [*best[:1], *([dial] if dial is not None else []), *best[1:]]:
            self.measure_loss(entry)

    def spend_the_rest(self) -> None:
        """The loss of the others that found most; what the best has read, read by what it is compared with, plain attention first a few documents of it; and
        more documents for those between which the choice lies."""
        for entry in self.ranked():
            if not entry.candidate.control and entry.loss is None and self.worth(entry) and not self.measure_loss(entry):
                break
        most = max((len(entry.answers) for entry in self.finalists), default=0)
        self.read_controls(min(most, CONTROL_DOCUMENTS))
        if (dial := self.dial()) is not None and dial.answers:
            self.read_all([dial], range(len(dial.answers), most))
        self.read_controls(most)
        self.read_on(most)

    def read_on(self, documents: int) -> None:
        """The two best and the dial's rule read one more document and another, while there is time for all of them to read it."""
        rivals = self.ranked([entry for entry in self.finalists if not entry.candidate.control and entry.loss is not None])[:2]
        if (dial := self.dial()) is not None and dial.loss is not None and dial not in rivals:
            rivals.append(dial)
        going_on = [entry for entry in rivals if entry.reason is None and len(entry.answers) == documents]
        while len(going_on) > 1 and self.there_is(documents):
            new = [entry for entry in going_on if self.bench.known(entry.candidate, documents) is None]
            if new and not self.meter.allows(sum(entry.seconds or 0.0 for entry in new)):
                return
            if not self.read_all(going_on, range(documents, documents + 1)):
                return
            documents += 1

    def worth(self, entry: Entry) -> bool:
        """Whether it found as much as the best whose loss is known: it may be the better choice at its price."""
        known = [other.share.value for other in self.entries if other.loss is not None and other.answers]
        return not known or entry.share.value >= max(known)


def tried(entries: Sequence[Entry]) -> Iterator[str]:
    """What was not tried and why, in words."""
    waiting = [entry.candidate.label for entry in entries if entry.reason == NO_TIME]
    if waiting:
        yield f"{counted(len(waiting), 'candidate')} not tried for lack of time: {', '.join(waiting)}"
    for entry in entries:
        if entry.reason not in (None, NO_TIME):
            yield f"{entry.candidate.label} cannot be used here: {entry.reason}"
