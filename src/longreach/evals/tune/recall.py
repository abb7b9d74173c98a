"""A quick look at recall: how many of the keys of one document a model finds, under a method, at one length. The work of `longreach check --recall`.

Knows the task of the pass keys and the engine of the evaluations; no files, no options.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longreach.evals import tasks as registry
from longreach.evals.harness import runner
from longreach.evals.harness.items import Item
from longreach.evals.harness.model_engine import attached
from longreach.evals.samples import budget
from longreach.evals.samples.base import Settings
from longreach.evals.scores import clusters
from longreach.evals.tune.study import DEPTHS
from longreach.methods.base import Method
from longreach.planning.profile import Profile

TASK = "passkeys"


@dataclass(frozen=True)
class Look:
    """`found` of `keys` in one document of `length` tokens, with the 95 % interval of the share; `reason`: how the method was chosen; `alone`: why the
    questions were not read together."""

    length: int
    method: Method
    reason: str
    found: int
    keys: int
    low: float
    high: float
    seconds: float
    alone: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        numbers = {"found": self.found, "keys": self.keys, "low": round(self.low, 5), "high": round(self.high, 5), "seconds": round(self.seconds, 2)}
        return {"length": self.length, "method": self.method.to_json(), "reason": self.reason, **numbers, "alone": [*self.alone]}


def questions(tokenizer: Any, length: int, seed: int = 0) -> list[Item]:
    """About one document of `length` tokens (question and answer included) with a key at five depths. Raises ValueError where the keys do not fit into it."""
    return runner.plan({registry.task(TASK): Settings(lengths=(length,), depths=DEPTHS, samples=1, seed=seed)}, tokenizer)


def look(
    model: Any,
    tokenizer: Any,
    method: Method | None,
    length: int,
    items: Sequence[Item],
    *,
    trained_window: int | None = None,
    profile: Profile | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Look:
    """Have the model answer the questions about a document of `length` tokens.

    method    None: the profile's choice, or the dial's.
    progress  gets the questions answered and their number.

    Raises ValueError, before anything is read, where the method or the profile does not reach the length, or the profile is of another model.
    """
    started = time.perf_counter()
    scores: list[float] = []
    with attached(model, tokenizer, method, length, trained_window=trained_window, profile=profile, batch_size=None) as engine:
        extension = engine.extension
        assert extension is not None
        used, reason = extension.method, extension.report()["reason"]
        progress(0, len(items))
        for number, reply in engine.answers(budget.encode(tokenizer, item.sample) for item in items):
            if isinstance(reply, Exception):
                raise reply
            task = items[number].task
            scores.append(task.score(items[number].sample, reply.text)[task.metric])
            if len(scores) < len(items):
                progress(len(scores), len(items))
        alone = tuple(engine.alone)
    share = clusters.share([scores])
    return Look(length, used, reason, round(share.found), share.n, share.low, share.high, time.perf_counter() - started, alone)
