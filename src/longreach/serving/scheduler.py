"""Continuous batching: jobs come and go at any time, and every forward decodes a token of each that has begun and reads a chunk of those that are reading.

Pure objects, stepped by the caller: no threads, no text, no connections. What a model, a method and its parameters are is fixed with the extension.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from longreach.hf.extension import Extension
from longreach.quantities import CHUNK_SIZE
from longreach.running.rows import Row, chunk, forward, tokens
from longreach.running.sampling import Sampler, ends_of
from longreach.serving.jobs import Event, Finish, Job, Stats

AT_ONCE = 64


@dataclass(eq=False)
class _Place:
    """A job that has memory."""

    job: Job
    row: Row
    cached: int = 0


class Scheduler:
    """Jobs on their way.

        scheduler.add(Job(ids, 64))
        while scheduler.busy:
            for event in scheduler.step():     # one forward
                ...

    at_once  jobs that have memory at one time.
    budget   bytes of keys and values; None: no limit.
    step_ms  milliseconds that a forward should take at most.
    clock    seconds, for `step_ms`.

    Raises ValueError where a flat forward is not exact on this model (see `Flat`), or where the checkpoint's settings ask for what is not honoured.
    """

    def __init__(
        self,
        extension: Extension,
        *,
        budget: int | None = None,
        at_once: int = AT_ONCE,
        step_ms: float = 500,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        model: Any = extension.model
        self.extension, self.method, self.budget, self.at_once = extension, extension.method, budget, at_once
        self._config = model.generation_config
        self._ends = ends_of(self._config)
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._flat = extension.flat()
        self._queue: deque[Job] = deque()
        self._places: dict[Row, _Place] = {}
        self._read = self._decoded = self._failed = 0

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._places)

    def stats(self) -> Stats:
        return Stats(len(self._places), len(self._queue), self._flat.nbytes, self.budget, read=self._read, decoded=self._decoded, failed=self._failed)

    def add(self, job: Job) -> None:
        """It waits for its turn. Raises ValueError, with the fix, for a job that can never be."""
        count, new, context = len(job.ids), job.max_new_tokens, self.extension.context
        if not count:
            raise ValueError("a prompt needs at least one token, such as the tokenizer's bos_token_id")
        if not all(0 <= token < self._vocabulary for token in job.ids):
            raise ValueError(f"the prompt has a token that is not among the {self._vocabulary} of the model; tokenize it with the model's own tokenizer")
        if new < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {new}")
        if context is not None and count + new > context:
            raise ValueError(
                f"a prompt has {count} tokens, and with {new} new ones it exceeds the declared context of {context}; shorten it, or "
                f"extend(model, context={count + new})"
            )
        Sampler(self._config, job.sampling)
        self._queue.append(job)

    def cancel(self, job: Job) -> None:
        """It ends, wherever it is: there are no more events of it, and its memory is free. Nothing happens where it has ended."""
        if job in self._queue:
            self._queue.remove(job)
        for place in [place for place in self._places.values() if place.job is job]:
            self._leave(place)

    def step(self) -> list[Event]:
        """One forward, for all that have a place, and what it did. A forward that fails ends the jobs that were in it, and no others."""
        self._admit()
        counts: dict[Row, int] = {}
        left = max(CHUNK_SIZE, self.method.cut or 1)
        for row in self._places:
            if row.decodes:
                counts[row] = 1
            elif count := chunk(self.method, row.read, row.end, left):
                counts[row] = count
                left -= count
        if not counts:
            return []
        found, problems = self._forward(counts)
        chosen = tokens(found)
        problems |= {row: str(token) for row, token in chosen.items() if isinstance(token, ValueError)}
        events = [self._ended(self._places[row], problem) for row, problem in problems.items()]
        for row, count in counts.items():
            if row in problems:
                continue
            self._read += 0 if row.new else count
            token = chosen.get(row)
            events.append(self._said(self._places[row], None if isinstance(token, ValueError) else token, found.get(row)))
        return events

    def _forward(self, counts: Mapping[Row, int]) -> tuple[dict[Row, torch.Tensor], dict[Row, str]]:
        """-> logits of those that go on, and why the others do not. A forward that fails changes nothing: what failed for several is tried for each alone."""
        try:
            return forward(self._flat, counts), {}
        except Exception as problem:
            self._failed += 1
            if len(counts) == 1:
                return {}, dict.fromkeys(counts, f"{type(problem).__name__}: {problem}")
        found: dict[Row, torch.Tensor] = {}
        problems: dict[Row, str] = {}
        for row, count in counts.items():
            logits, why = self._forward({row: count})
            found, problems = found | logits, problems | why
        return found, problems

    def _said(self, place: _Place, token: int | None, logits: torch.Tensor | None) -> Event:
        job, row = place.job, place.row
        read = min(row.read, row.prompt)
        if token is None or logits is None:
            return Event(job, read, place.cached)
        row.ids.append(token)
        self._decoded += 1
        scores = None if job.logprobs is None else logits.float().log_softmax(-1)
        logprob = None if scores is None else float(scores[token])
        best = () if scores is None or not job.logprobs else _best(scores, job.logprobs)
        finish: Finish | None = None
        if token in (self._ends if job.ends is None else job.ends) or job.stop(row.new):
            finish = "stop"
        elif len(row.ids) - row.prompt >= job.max_new_tokens:
            finish = "length"
        if finish is not None:
            self._leave(place)
        return Event(job, read, place.cached, token, logprob, best, finish)

    def _ended(self, place: _Place, problem: str) -> Event:
        self._leave(place)
        return Event(place.job, min(place.row.read, place.row.prompt), place.cached, finish="error", problem=problem)

    def _leave(self, place: _Place) -> None:
        self._flat.leave(place.row.name)
        del self._places[place.row]

    def _admit(self) -> None:
        while self._queue and len(self._places) < self.at_once:
            job = self._queue.popleft()
            row = Row(self._flat.join(), [*job.ids], Sampler(self._config, job.sampling))
            self._places[row] = _Place(job, row)


def _best(scores: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    values, which = scores.topk(count)
    return tuple(zip(which.tolist(), values.tolist(), strict=True))
