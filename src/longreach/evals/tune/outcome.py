"""A tune from its proposal to its profile: search, decide, and everything that was found as plain data.

Knows the bench, the schedule, the decision and profiles; not options, terminals or pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach import files
from longreach.evals.harness import environment
from longreach.evals.harness.environment import now
from longreach.evals.harness.results import differences
from longreach.evals.harness.runner import Progress
from longreach.evals.scores import clusters
from longreach.evals.tune import decision, halving
from longreach.evals.tune.bench import Answers, of_tasks, recall
from longreach.evals.tune.candidates import DIAL
from longreach.evals.tune.decision import Decision
from longreach.evals.tune.halving import Entry, Search
from longreach.evals.tune.plan import Cost, Plan, divide
from longreach.evals.tune.study import Inside, ModelBench
from longreach.planning.profile import LONGEST, Profile, Tuned, default_path

MOST_SAID = 400  # characters of what is different in an entry, which anybody may have written


@dataclass(frozen=True)
class Outcome:
    """What a tune found. `bench` says what was asked of which model, and has the ceiling."""

    bench: ModelBench
    search: Search
    decision: Decision
    budget: float
    price: float

    def to_json(self) -> dict[str, Any]:
        """All of it, small enough for a profile: summaries, not answers, which are in the work folder."""
        bench, asked = self.bench, self.bench.asked
        versions = environment.describe(bench.model.device)
        return {
            "model": bench.place.model,
            "fingerprint": bench.fingerprint,
            "trained_window": bench.window.tokens,
            "context": asked.context,
            **asked_of(bench, self.price),
            "versions": {name: versions[name] for name in ("longreach", "torch", "transformers", "commit")},
            "date": now(),
            "budget": self.budget,
            "spent": round(self.search.spent, 1),
            "plan": plan_row(self.search.plan),
            "ceiling": [ceiling_row(name, inside) for name, inside in bench.inside.items()],
            "candidates": [row(entry, entry is self.decision.chosen) for entry in self.search.entries],
            "left_out": [dataclasses.asdict(each) for each in bench.proposal.left_out],
            "chosen": None if self.decision.chosen is None else self.decision.chosen.candidate.label,
            "dial": next((entry.candidate.method.to_json() for entry in self.search.entries if entry.candidate.label == DIAL), None),
            "dial_beaten": self.decision.beaten,
            "sentences": [*self.decision.sentences, *halving.tried(self.search.entries)],
            "notes": list(bench.notes),
            "work": str(bench.place.path),
        }

    def entry(self) -> Tuned:
        """Of a profile. Raises ValueError where nothing was chosen."""
        if self.decision.chosen is None:
            raise ValueError("nothing was measured that could be chosen; pass a larger --budget")
        first, *rest = self.decision.sentences
        compared = () if self.decision.chosen.candidate.label == DIAL else rest  # of other lengths, which the entry serves too, it says nothing
        reason = "; ".join([first, *(sentence for sentence in compared if sentence.startswith(DIAL))])
        printable = "".join(c if c.isprintable() else " " for c in reason)
        return Tuned(self.bench.asked.context, self.decision.chosen.candidate.method, printable[:LONGEST], self.to_json())


def tune(
    bench: ModelBench,
    budget: float,
    price: float = decision.PRICE,
    *,
    said: Callable[[Plan, Cost], None] = lambda plan, cost: None,
    progress: Progress = lambda step: None,
) -> Outcome:
    """Measure and choose. `budget` in seconds, `price` in nats per token. Raises ValueError, with the budget that is needed, where it is too small."""
    found = halving.search(bench.proposal.candidates, bench, budget, said=said, progress=progress)
    return Outcome(bench, found, decision.decide(found.entries, price, ceiling_share(bench)), budget, price)


def listing(bench: ModelBench, budget: float) -> dict[str, Any]:
    """The candidates in the order of trying, and what a budget is expected to buy, measuring no more than short beginnings of the document."""
    proposal, seconds = bench.proposal, bench.estimate()
    found: dict[str, Any] = {
        "context": bench.asked.context,
        "trained_window": bench.window.tokens,
        "candidates": [
            {"label": c.label, "method": c.method.to_json(), "options": c.method.options(), "why": c.why, "control": c.control} for c in proposal.candidates
        ],
        "left_out": [dataclasses.asdict(each) for each in proposal.left_out],
        "document_seconds": None if seconds is None else round(seconds, 2),
        "budget": budget,
        "plan": None,
        "remark": None,
        "notes": list(bench.notes),
    }
    if seconds is not None:
        try:
            plan = divide(len(proposal.candidates), budget, Cost(seconds, seconds, tuple(part.weight * seconds for part in bench.parts)))
            found["plan"] = plan_row(plan)
        except ValueError as error:
            found["remark"] = str(error)
    return found


def plan_row(plan: Plan) -> dict[str, Any]:
    rungs = [[rung.candidates, rung.documents] for rung in plan.rungs]
    return {"rungs": rungs, "losses": plan.losses, "ceiling": plan.ceiling, "seconds": round(plan.seconds, 1)}


def ceiling_share(bench: ModelBench) -> clusters.Share | None:
    """Recall of plain attention at the whole window, asked as the candidates are: the first part of the ceiling."""
    first = bench.inside.get(bench.parts[0].name) if bench.parts else None
    return None if first is None or first.answers is None else recall([first.answers])


def ceiling_row(name: str, inside: Inside) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name, "length": inside.length, "chat": inside.chat}
    if inside.answers is not None:
        found |= share_row([inside.answers])
    if inside.loss is not None:
        found |= {"loss": round(inside.loss.nats, 5), "loss_low": round(inside.loss.low, 5), "loss_high": round(inside.loss.high, 5)}
    return found


def row(entry: Entry, chosen: bool) -> dict[str, Any]:
    candidate, loss = entry.candidate, entry.loss
    found = {
        "label": candidate.label, "method": candidate.method.to_json(), "why": candidate.why, "control": candidate.control, "chosen": chosen,
        "reason": entry.reason, "seconds": None if entry.seconds is None else round(entry.seconds, 2),
    }  # fmt: skip
    found |= share_row(entry.answers) if entry.answers else dict.fromkeys(("found", "of", "documents", "recall", "low", "high"))
    nats = (None, None, None) if loss is None else (loss.nats, loss.low, loss.high)
    return found | {name: None if n is None else round(n, 5) for name, n in zip(("loss", "loss_low", "loss_high"), nats)}


def share_row(answers: Sequence[Answers]) -> dict[str, Any]:
    """`by_task` only where several were asked."""
    share = recall(answers)
    found: dict[str, Any] = {
        "found": round(share.found, 4), "of": share.n, "documents": share.documents,
        "recall": round(share.value, 5), "low": round(share.low, 5), "high": round(share.high, 5),
    }  # fmt: skip
    by_task = {name: {"found": round(each.found, 4), "of": each.n, "recall": round(each.value, 5)} for name, each in of_tasks(answers).items()}
    return found | ({"by_task": by_task} if by_task else {})


def profile_file(bench: ModelBench, out: Path | None) -> Path:
    return default_path(bench.fingerprint) if out is None else out


def before(bench: ModelBench, out: Path | None, price: float = decision.PRICE) -> tuple[Profile, str | None]:
    """-> (the profile that the new entry goes into, what people should know of it). Raises ValueError where the file of --out holds something else, or the
    one in the cache could not be written.

    In the user's cache such a file is of no use to anybody, so that it is replaced, which is said.
    """
    path = profile_file(bench, out)
    empty = Profile(bench.place.model, bench.fingerprint, bench.window.tokens)
    if out is None and path.parent.is_dir():  # else it is made
        try:
            files.place(path, "profile")
        except ValueError as error:
            raise ValueError(f"{error} with --out") from error
    if not path.exists():
        return empty, None
    try:
        there = Profile.read(path)
        if there.fingerprint != bench.fingerprint:
            fix = "" if out is None else "; name another file with --out"
            raise ValueError(f"{str(path)!r} is the profile of other weights ({there.model}){fix}")
    except ValueError as error:
        if out is not None:
            raise
        return empty, f"{error}; it will be replaced"
    if there.window != bench.window.tokens:
        return empty, f"{path} holds entries for a trained window of {there.window}, which will be replaced by one for {bench.window.tokens}"
    entry = next((known for known in there.entries if known.context == bench.asked.context), None)
    return there, None if entry is None else replaced(entry, asked_of(bench, price), path)


def asked_of(bench: ModelBench, price: float) -> dict[str, Any]:
    """What was asked, as the evidence of an entry has it. The same weights and context may be tuned for other things."""
    settings = bench.place.settings
    named = {"tasks": [task.name for task in bench.asked.tasks], "text": settings["text"], "seed": bench.asked.seed, "chat": bench.asked.chat}
    return {**named, "dtype": settings["dtype"], "device": settings["device"], "price": price}


def replaced(entry: Tuned, asked: Mapping[str, Any], path: Path) -> str:
    """Which entry gives way to a new one, and what it rests on: one sentence."""
    when = f" of {entry.date}" if entry.date else ""
    others = differences({name: entry.evidence.get(name) for name in asked}, asked)[:MOST_SAID]
    how = f", tuned with other settings ({others})" if others else f", for {', '.join(asked['tasks'])}"
    return f"{path} has an entry for {entry.context} tokens{when}{how}: {entry.reason.split('; ')[0]}. A new choice replaces it; --out FILE keeps both"


def keep(outcome: Outcome, out: Path | None) -> Path:
    """Add the choice to the profile -> its file."""
    profile = before(outcome.bench, out)[0].with_entry(outcome.entry())
    if out is None:
        return profile.keep()
    profile.write(out)
    return out


def summary(outcome: Outcome) -> Iterator[str]:
    """What is said at the end."""
    yield from outcome.decision.sentences
    yield from halving.tried(outcome.search.entries)
    yield from outcome.bench.notes
