"""Continuous batching: jobs come and go at any time, and every forward decodes a token of each that has begun and reads a chunk of those that are reading.

Pure objects, stepped by the caller: no threads, no text, no connections. Model, method, parameters and context are fixed with the extension.

Transformers' own `ContinuousBatchingManager`, which `transformers serve` runs, cannot take our memory: its scheduler asks a `PagedAttentionCache` for free
blocks, its runner writes the block tables and hands that cache to its own attention functions, and its manager refuses a model with another one than "sdpa",
"paged|eager" or flash attention. That cache holds keys after rotary, one form of each, for one kind of positions; a method needs them before, in several forms,
with bounded ones among them. Its blocks also decide admission, prefix sharing and eviction there, so none of these can be used alone. What is not bound to it
are logits processors and generation settings, and these are what `running/sampling.py` uses.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from longreach.hf.extension import Extension
from longreach.quantities import CHUNK_SIZE
from longreach.running.rows import Row, chunk, forward, shareable, tokens
from longreach.running.sampling import Sampler, ends_of
from longreach.serving.jobs import Event, Finish, Job, Stats
from longreach.serving.pace import LEAST, Pace
from longreach.serving.prefixes import Document
from longreach.serving.room import Place, Room, named

AT_ONCE = 64  # jobs that have memory at one time
READERS = 4  # prompts of which a forward reads a chunk: each takes calls of its own in every layer
PREFIXES = 32
PASSES = 8  # jobs that get memory before one that came earlier and waits for more
logger = logging.getLogger("longreach.serving")


class Scheduler:
    """Jobs on their way.

        scheduler.add(Job(ids, 64))
        while scheduler.busy:
            for event in scheduler.step():     # one forward
                ...

    budget      bytes of keys and values of all jobs, prefixes and documents, such as `room.usual_budget`; None: no limit. A job waits until there is room for
                all that it may need. Tiers have budgets of their own.
    at_once     jobs that have memory at one time.
    step_ms     milliseconds that a forward should take at most: chunks of prompts are as long as that allows, at the depth that they are read at.
    chunk_size  tokens of prompts in one forward at most. A method that allows no cut reads a prompt whole.
    prefixes    how many texts are kept when their jobs are over, so that who begins with them reads only what is new; see `prefixes`.
    reserve     share of the new tokens of a job that room is reserved for. Below 1 more jobs are served at a time, and where room becomes short the one that
                came last is moved out to a folder under `moved`, and goes on from there later: it is never read again.
    clock       seconds, for `step_ms`.

    Raises ValueError where a flat forward is not exact on this model (see `Flat`), or where the checkpoint's settings ask for what is not honoured.
    """

    def __init__(
        self,
        extension: Extension,
        *,
        budget: int | None = None,
        at_once: int = AT_ONCE,
        step_ms: float = 500,
        chunk_size: int = CHUNK_SIZE,
        prefixes: int = PREFIXES,
        reserve: float = 1.0,
        moved: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for name, value, least in (("at_once", at_once, 1), ("step_ms", step_ms, 1), ("chunk_size", chunk_size, 1), ("prefixes", prefixes, 0)):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        model: Any = extension.model
        self.extension, self.method, self.at_once, self.chunk_size, self.clock = extension, extension.method, at_once, chunk_size, clock
        self._config = model.generation_config
        self._ends = ends_of(self._config)
        self.room = Room(extension, budget, prefixes, reserve, moved)
        self._pace = Pace(step_ms / 1000)
        self._queue: deque[Place] = deque()
        self._number = 0
        self._changed = False  # whether somebody who waits may have a place now
        self._read = self._decoded = self._cached = self._hits = self._preempted = self._failed = 0

    # -- what is asked ----------------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return bool(self._queue or self.room.places)

    @property
    def documents(self) -> dict[str, int]:
        """Names of the documents that are there, and their tokens."""
        return {name: len(document.ids) for name, document in self.room.prefixes.documents.items()}

    def stats(self) -> Stats:
        return Stats(
            running=len(self.room.places),
            waiting=len(self._queue),
            held=self.room.nbytes,
            budget=self.room.budget,
            read=self._read,
            decoded=self._decoded,
            cached=self._cached,
            hits=self._hits,
            prefixes=sum(prefix.document is None for prefix in self.room.prefixes.kept),
            preempted=self._preempted,
            failed=self._failed,
            documents=tuple(self.documents.items()),
        )

    def add(self, job: Job) -> None:
        """It waits for its turn. Raises ValueError, with the fix, for a job that can never be."""
        if job.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {job.max_new_tokens}")
        if not 0 <= (job.logprobs or 0) <= self.room.vocabulary or not 0 <= job.shared <= len(job.ids):
            raise ValueError(f"logprobs={job.logprobs} and shared={job.shared} do not count tokens that there are; pass smaller numbers")
        ids = [*(self._document(job.document).ids if job.document is not None else ()), *self._checked(job.ids)]
        place = self._wait(job, Row(-1, ids, Sampler(self._config, job.sampling)))
        if job.shared and self.room.flat.forgets:
            shared = len(ids) - len(job.ids) + job.shared
            place.marks.add(shareable(self.method, shared, [len(ids), shared + 1]))

    def hold(self, name: str, ids: Sequence[int], folder: Path | None = None, notes: Mapping[str, str] | None = None) -> Job:
        """Read a document once, for jobs that name it: all of it that can be read whatever follows -> a job, which says how far it is and ends with "held".
        `folder`: it is saved there, with `notes`, and may leave the memory and come back. One of this name is replaced when it is over.

        Raises ValueError for what cannot be, and where the method allows no cut.
        """
        if self.method.cut is None:
            raise ValueError(f"{self.method.brief()} reads a prompt whole, so that no document is read once for several; pass another method")
        document = Document(name, checked := self._checked(ids), folder, notes=notes or {})
        job = Job(ids, 0)
        self._wait(job, Row(-1, checked[: self.method.apart(len(ids) + 1)], None), document)  # a question has one token at least
        return job

    def load(self, name: str, folder: Path) -> Document:
        """A document that `hold` has saved, or `extension.save`. Raises ValueError for what is not of this model, method and context."""
        self._changed = True
        return self.room.load(name, folder)

    def release(self, name: str) -> None:
        """Forget a document; its folder stays. Jobs that have begun go on. Raises ValueError where there is none."""
        self._document(name)
        self.room.prefixes.forget(name)
        self._changed = True

    def cancel(self, job: Job) -> None:
        """It ends, wherever it is: there are no more events of it, and its memory is free. Nothing happens where it has ended."""
        for place in [place for place in (*self._queue, *self.room.places.values()) if place.job is job]:
            if place in self._queue:
                self._queue.remove(place)
            self._leave(place)

    def _wait(self, job: Job, row: Row, document: Document | None = None) -> Place:
        tokens, context = len(row.ids) + job.max_new_tokens, self.extension.context
        if context is not None and tokens > context:
            raise ValueError(
                f"a prompt has {len(row.ids)} tokens, and with {job.max_new_tokens} new ones it exceeds the declared context of {context}; shorten it, or "
                f"extend(model, context={tokens})"
            )
        self._number += 1
        place = Place(job, row, self._number, holds=document)
        self.room.check(place)
        self._queue.append(place)
        self._changed = True
        return place

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if not len(ids):
            raise ValueError("a prompt needs at least one token, such as the tokenizer's bos_token_id")
        if not all(type(token) is int and 0 <= token < self.room.vocabulary for token in ids):
            raise ValueError(f"the prompt has a token that is none of the {self.room.vocabulary} of the model; tokenize it with the model's own tokenizer")
        return [*ids]

    def _document(self, name: str) -> Document:
        if name not in self.room.prefixes.documents:
            raise ValueError(f"there is no document {name!r} (there are {[*self.documents]}); hold() or load() it first")
        return self.room.prefixes.documents[name]

    # -- a forward --------------------------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One forward, for all that have a place, and what it did. A forward that fails is tried for each of its jobs alone; it ends those for which it fails
        again, and no others."""
        events = self._admit()
        for place, problem in self.room.grow():
            self._preempted += 1
            if problem is None:
                self._queue.appendleft(place)
            else:
                events.append(self._ended(place, problem))
        counts = self._counts()
        if not counts:
            return events
        reads = [(row.read, count) for row, count in counts.items() if not row.decodes]
        began = self.clock()
        found, problems = self._forward(counts)
        chosen = tokens(found)
        self._pace.learn(self.clock() - began, reads, len(counts) - len(reads))
        problems |= {row: str(token) for row, token in chosen.items() if isinstance(token, ValueError)}
        for row, count in counts.items():
            place, token = self.room.places[row], chosen.get(row)
            if row in problems:
                events.append(self._ended(place, problems[row]))
                continue
            self._read += count if row.read <= row.prompt else 0
            self._changed |= self.room.passed(place)
            events.append(self._decode(place, token, found[row]) if isinstance(token, int) else self._has_read(place))
        return events

    def _admit(self) -> list[Event]:
        """Give places to those that wait, in their order. Who waits for what another one reads lets those behind it pass. Who waits for room lets a few pass
        that take what is free, and nobody if it was moved out to make room."""
        events: list[Event] = []
        if not self._changed:
            return events
        self._changed = False
        ahead: list[Place] = []  # who waits for room
        for place in [*self._queue]:
            if len(self.room.places) >= self.at_once or len(ahead) > PASSES or any(other.overtaken >= PASSES or other.moved for other in ahead):
                break
            try:
                if place.holds is not None and not place.row.ids:  # a document of less than one cut is read with every question
                    self._queue.remove(place)
                    events.append(self._has_read(place))
                    continue
                moved, outcome = place.moved is not None, self.room.enter(place, drops=not ahead)
            except Exception as problem:
                self._queue.remove(place)
                events.append(self._refused(place, problem))
                continue
            if outcome == "full":
                ahead.append(place)
            if outcome == "in":
                self._queue.remove(place)
                for other in ahead:
                    other.overtaken += 1
                self._cached += 0 if moved else place.cached
                self._hits += bool(place.cached) and not moved
        return events

    def _counts(self) -> dict[Row, int]:
        """Tokens that each row reads. Those that read prompts divide the tokens and seconds that are left: the first has its share for sure, and of the others
        the shortest take what they need. Who read is behind the others next time, so that everybody comes to be first."""
        counts = {row: 1 for row in self.room.places if row.decodes}
        readers = [row for row in self.room.places if not row.decodes][:READERS]
        if not readers:
            return counts
        seconds, left = self._pace.left, max(self.chunk_size, self.method.cut or 1)
        first, share = readers[0], min(left // len(readers), self._pace.tokens(readers[0].read, self._pace.left / len(readers)))
        turn = self._chunk(first, min(left, max(share, LEAST, self.method.cut or 1)))
        due = self._pace.cost(first.read, turn)
        for number, row in enumerate(sorted(readers, key=lambda row: row.end - row.read)):  # the shortest first: what it does not need is for the others
            apart = 0 if row is first or first in counts else 1  # what is kept for the first
            most = self._pace.tokens(row.read, max(0.0, seconds - apart * due) / (len(readers) - number - apart))
            count = self._chunk(row, min(left - apart * turn, most))
            if count := max(count, turn) if row is first else count:
                counts[row] = count
                left -= count
                seconds = max(0.0, seconds - self._pace.cost(row.read, count))
        for row in readers:
            if row in counts:
                self.room.places[row] = self.room.places.pop(row)
        return counts

    def _chunk(self, row: Row, most: int) -> int:
        """How many of `most` tokens of a prompt are read in one forward: up to where others wait for it."""
        mark = min((mark for mark in self.room.places[row].marks if row.read < mark < row.end), default=row.end)
        return chunk(self.method, row.read, row.end, min(most, mark - row.read) if mark < row.end else most)

    def _forward(self, counts: Mapping[Row, int]) -> tuple[dict[Row, torch.Tensor], dict[Row, str]]:
        """-> logits of those that go on, and why the others do not. A forward that fails changes nothing: what failed for several is tried for each alone."""
        try:
            return forward(self.room.flat, counts), {}
        except Exception as problem:
            self._failed += 1
            logger.warning("a forward of %d jobs failed", len(counts), exc_info=True)
            if len(counts) == 1:
                return {}, dict.fromkeys(counts, named(problem))
        found: dict[Row, torch.Tensor] = {}
        problems: dict[Row, str] = {}
        for row, count in counts.items():
            logits, why = self._forward({row: count})
            found, problems = found | logits, problems | why
        return found, problems

    def _decode(self, place: Place, token: int, logits: torch.Tensor) -> Event:
        job, row = place.job, place.row
        row.ids.append(token)
        self._decoded += 1
        scores = None if job.logprobs is None else logits.float().log_softmax(-1)
        logprob = None if scores is None else float(scores[token])
        best = () if scores is None or not job.logprobs else _best(scores, job.logprobs)
        finish: Finish | None = None
        try:
            stops = token in (self._ends if job.ends is None else job.ends) or job.stop(row.new)
        except Exception as problem:  # of whoever asks: it is this job's own
            return self._ended(place, named(problem))
        if stops:
            finish = "stop"
        elif len(row.ids) - row.prompt >= job.max_new_tokens:
            finish = "length"
        if finish is not None:
            self._leave(place)
        return Event(job, row.prompt, place.cached, token, logprob, best, finish)

    def _has_read(self, place: Place) -> Event:
        row, document = place.row, place.holds
        event = Event(place.job, min(row.read, row.prompt), place.cached)
        if document is None or row.read < row.end:
            return event
        try:
            self.room.keep_document(place, document)
        except Exception as problem:  # of a disk
            return self._refused(place, problem)
        self._changed = True
        return replace(event, finish="held")

    def _refused(self, place: Place, problem: Exception) -> Event:
        """Our own ValueErrors, where a job gets its place or is kept, say what would be possible. What else is raised there is a failure."""
        refused = isinstance(problem, ValueError)
        return self._ended(place, str(problem) if refused else named(problem), refused)

    def _ended(self, place: Place, problem: str, refused: bool = False) -> Event:
        self._leave(place, keep=False)
        return Event(place.job, min(place.row.read, place.row.prompt), place.cached, finish="error", problem=problem, refused=refused)

    def _leave(self, place: Place, keep: bool = True) -> None:
        self.room.leave(place, keep)
        self._changed = True


def _best(scores: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    values, which = scores.topk(count)
    return tuple(zip(which.tolist(), values.tolist(), strict=True))
