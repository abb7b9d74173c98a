"""Many prompts, generated for together: every forward decodes a token of each request that has begun and reads a chunk of those that are still reading.

Knows rows of flat forwards; not text, files or clocks. Waiting requests take the places of those that are done, and a document that several prompts begin with
is read once and forked. Requests that come at any time, with settings of their own and a budget of memory, are for serving/scheduler.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from longreach.hf.extension import Extension
from longreach.quantities import CHUNK_SIZE
from longreach.running.rows import Row, chunk, forward, shareable, tokens
from longreach.running.sampling import GREEDY, Sampler, Sampling, ends_of

AT_ONCE = 16


@dataclass(frozen=True)
class Generated:
    """ids are the new tokens. `finish`: "stop" at one of the model's end tokens, which is among them, or where the request says so, or "length"."""

    ids: list[int]
    finish: Literal["stop", "length"]


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt, and how its answer ends. `stop` gets all new tokens after each of them. `seed`: of what is drawn for it."""

    ids: list[int]
    max_new_tokens: int
    seed: int = 0
    stop: Callable[[list[int]], bool] = lambda new: False


@dataclass(frozen=True)
class Turn:
    """What one forward did: (from, to) the tokens that were read for a request, those of a document for the first that asks about it; and the answers that
    have ended."""

    reads: dict[Request, tuple[int, int]]
    done: dict[Request, Generated]


@dataclass(eq=False)
class _Group:
    """Waiting requests whose first `shared` ids are the same, and the row that holds these."""

    requests: deque[Request]
    shared: int
    document: Row | None = None


class Pool:
    """Requests on their way, at most `at_once` of them in memory.

        pool.add([Request(ids, 64)])
        while pool.busy:
            turn = pool.step()     # one forward

    chunk_size  prompt tokens of one forward, of all requests together. A method that allows no cut reads a prompt whole.
    ends        tokens that end an answer; None: those of the model's generation settings.

    Raises ValueError where a flat forward is not exact on this model (see `Flat`), or where the checkpoint's settings ask for what is not honoured.
    """

    def __init__(
        self, extension: Extension, *, at_once: int = AT_ONCE, chunk_size: int = CHUNK_SIZE, sampling: Sampling = GREEDY, ends: Collection[int] | None = None
    ) -> None:
        for name, value in (("at_once", at_once), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        model: Any = extension.model
        config = model.generation_config
        self.ends = ends_of(config) if ends is None else frozenset(ends)
        self.at_once, self.chunk_size, self.context = at_once, chunk_size, extension.context
        self.method, self._config, self._sampling = extension.method, config, sampling
        Sampler(config, sampling)  # before anything is read, settings that are not honoured are refused
        self._flat = extension.flat()
        self._queue: deque[_Group] = deque()
        self._rows: dict[Row, Request] = {}

    @property
    def busy(self) -> bool:
        return bool(self._rows or self._queue)

    @property
    def hungry(self) -> bool:
        """Whether no request waits for a place."""
        return not self._queue

    @property
    def held(self) -> int:
        """Requests, and documents, that hold memory."""
        return len(self._rows)

    def add(self, requests: Sequence[Request], shared: int = 0) -> int:
        """They wait for their turn. `shared`: so many of their first ids are the same -> how many of these are read once for all, which is 0 where the method
        allows no cut. Raises ValueError for an empty prompt or one that does not fit the declared context."""
        for request in requests:
            count, new = len(request.ids), request.max_new_tokens
            if not 0 <= shared < count:
                raise ValueError(f"a prompt needs at least one token of its own behind the {shared} shared ones, such as the tokenizer's bos_token_id")
            if new < 1:
                raise ValueError(f"max_new_tokens must be at least 1, not {new}")
            if self.context is not None and count + new > self.context:
                raise ValueError(
                    f"a prompt has {count} tokens, and with {new} new ones it exceeds the declared context of {self.context}; shorten it, or "
                    f"extend(model, context={count + new})"
                )
        several = len(requests) > 1 and self.at_once > 1
        shared = shareable(self.method, shared, [len(request.ids) for request in requests]) if several else 0
        if shared:
            self._queue.append(_Group(deque(requests), shared))
        else:
            self._queue.extend(_Group(deque([request]), 0) for request in requests)
        return shared

    def step(self) -> Turn:
        """One forward, for all that have a place. If it fails the pool is of no use any more."""
        self._admit()
        counts: dict[Row, int] = {}
        budget = max(self.chunk_size, self.method.cut or 1)
        for row in self._rows:
            if row.decodes:
                counts[row] = len(row.ids) - row.read
            elif count := chunk(self.method, row.read, row.end, budget):
                counts[row] = count
                budget -= count
        counts = {row: count for row, count in counts.items() if count}
        reads = {self._rows[row]: (row.read, row.read + count) for row, count in counts.items()}
        done = {}
        for row, token in tokens(forward(self._flat, counts)).items():
            if isinstance(token, ValueError):
                raise token
            row.ids.append(token)
            request, new = self._rows[row], row.new
            stopped = token in self.ends or request.stop(new)
            if stopped or len(new) >= request.max_new_tokens:
                done[request] = Generated(new, "stop" if stopped else "length")
                self._flat.leave(row.name)
                del self._rows[row]
        return Turn(reads, done)

    def _admit(self) -> None:
        """Give places to those that wait, in their order."""
        while self._queue:
            group, full = self._queue[0], len(self._rows) >= self.at_once
            document = group.document
            if document is not None and document.read < group.shared:
                return
            if document is not None and len(group.requests) == 1:  # the last goes on where the document lies
                del self._rows[document]
                self._begin(document.name, group.requests.popleft(), group.shared)
            elif full:
                return
            elif document is not None:
                self._begin(self._flat.fork(document.name), group.requests.popleft(), group.shared)
            elif group.shared:
                group.document = Row(self._flat.join(), group.requests[0].ids[: group.shared], None)
                self._rows[group.document] = group.requests[0]
            else:
                self._begin(self._flat.join(), group.requests.popleft(), 0)
            if not group.requests:
                self._queue.popleft()

    def _begin(self, name: int, request: Request, read: int) -> None:
        sampler = Sampler(self._config, replace(self._sampling, seed=request.seed))
        self._rows[Row(name, [*request.ids], sampler, read)] = request


def generate(
    extension: Extension,
    prompts: Sequence[Sequence[int] | torch.Tensor],
    max_new_tokens: int = 128,
    *,
    sampling: Sampling = GREEDY,
    at_once: int = AT_ONCE,
    chunk_size: int = CHUNK_SIZE,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Generated]:
    """New tokens for every prompt, the same as for each of them alone, in flat batches.

    prompts     token ids, one list each; `tokenizer(text)["input_ids"]`.
    sampling    greedy, or with a temperature; a prompt draws from a generator of its own, seeded by `sampling.seed` and its place in the list.
    at_once     requests that hold memory at one time.
    chunk_size  prompt tokens of one forward, of all requests together. A method that allows no cut reads a prompt whole.
    progress    gets the number of prompts that are done.

    Raises ValueError for an empty prompt or one that does not fit the declared context, and where a flat forward is not exact on this model (see `Flat`).
    """
    requests = [Request(torch.as_tensor(prompt).reshape(-1).tolist(), max_new_tokens, sampling.seed + n) for n, prompt in enumerate(prompts)]
    pool = Pool(extension, at_once=at_once, chunk_size=chunk_size, sampling=sampling)
    for number, request in enumerate(requests):
        try:
            pool.add([request])
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None
    found: dict[Request, Generated] = {}
    while pool.busy:
        for request, generated in pool.step().done.items():
            found[request] = generated
            progress(len(found))
    return [found[request] for request in requests]
