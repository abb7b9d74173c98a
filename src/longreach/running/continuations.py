"""How likely one continuation is behind each of many prompts. Beginnings that prompts share are read once, and many prompts go together.

Knows flat forwards, where a method allows cuts, and ids; not text, or what the prompts are for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import torch

from longreach.hf.extension import Extension
from longreach.hf.flat import Flat
from longreach.hf.placement import device_of
from longreach.quantities import CHUNK_SIZE
from longreach.running.prefix import common
from longreach.running.reading import require_finite, stream
from longreach.running.rows import chunk, shareable
from longreach.running.together import AT_ONCE

LEAST = -1000.0  # nats of a token that a model rules out, so that differences stay numbers
HELD = 2**15  # tokens of their own that prompts may hold while they wait for a forward of several
Done = Callable[[int], None]


class Stopped(Exception):
    """Whoever asked does not wait any longer."""


@dataclass(eq=False)
class _Branch:
    """Prompts that begin alike, in order, and what was read of them: `start` tokens by the request `source` (None: nothing), which is theirs where they are the
    last of those that go on from it."""

    prompts: list[list[int]]
    source: int | None
    start: int
    last: bool


@dataclass(eq=False)
class _Row:
    """A request that reads on to `end`: what its prompts have in common, or all of its one prompt but the end that is read with the continuation."""

    name: int
    prompts: list[list[int]]
    read: int
    end: int
    start: int = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.read

    @property
    def left(self) -> int:
        return self.end - self.read


class Continuations:
    """log p(continuation | prompt), under an extension.

    at_once     prompts that hold memory of their own at one time, besides the beginnings that they share; 1: one after the other, without flat forwards.
    chunk_size  tokens of one forward. A method that allows no cut reads a prompt whole.
    forwards    of the model, so far.
    tokens      read, so far.
    alone       why prompts are read one after the other, where the model or the method does not allow flat forwards.
    """

    def __init__(self, extension: Extension, *, at_once: int = AT_ONCE, chunk_size: int = CHUNK_SIZE) -> None:
        for name, value in (("at_once", at_once), ("chunk_size", chunk_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        self.extension, self.at_once, self.chunk_size = extension, at_once, chunk_size
        self.method = extension.method
        self.forwards = self.tokens = 0
        self.alone: str | None = None
        self._requests: Flat | _Caches = _Caches(extension)
        if at_once > 1:
            try:
                self._requests = extension.flat()
            except ValueError as error:
                self.alone, self.at_once = str(error), 1

    def log_probabilities(
        self,
        prompts: Sequence[Sequence[int]],
        continuation: Sequence[int],
        *,
        done: Done = lambda count: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[float]:
        """Nats, one sum over the tokens of the continuation for each prompt.

        done     gets the number of prompts that have been read.
        stopped  asked before each forward; once it is true `Stopped` is raised, and this object is of no use any more.

        Raises ValueError for an empty continuation, an empty prompt and one that does not fit, and where the model gives NaN.
        """
        answer = [*continuation]
        if not answer:
            raise ValueError("the continuation has no tokens; pass a text that the tokenizer makes tokens of")
        asked = [tuple(prompt) for prompt in prompts]
        limit = self.extension.context
        for prompt in asked:
            if not prompt:
                raise ValueError("a prompt has no tokens; pass one with at least one token, such as the tokenizer's bos_token_id")
            if limit is not None and len(prompt) + len(answer) > limit:
                raise ValueError(
                    f"a prompt of {len(prompt)} tokens and its continuation of {len(answer)} exceed the declared context of {limit}; shorten them, or "
                    f"extend(model, context={len(prompt) + len(answer)})"
                )
        order = [[*ids] for ids in sorted({*asked})]
        read = self._together if self.method.eviction is None else self._in_turns
        found: dict[tuple[int, ...], float] = {}
        for ids, total in read(order, answer, stopped):
            found[tuple(ids)] = total
            done(len(found))
        return [found[ids] for ids in asked]

    # -- together -----------------------------------------------------------------------------------------------------------------

    def _together(self, order: list[list[int]], answer: list[int], stopped: Callable[[], bool]) -> Iterator[tuple[list[int], float]]:
        """Depth first, so that few beginnings are held at a time; several rows at once where one does not fill a forward."""
        pending, reading, waiting = [_Branch(order, None, 0, True)] if order else [], list[_Row](), list[_Row]()

        def settle(row: _Row) -> None:
            if row.left:
                reading.append(row)
            elif len(row.prompts) == 1:
                waiting.append(row)
            else:
                pending.extend(_below(row))

        while pending or reading or waiting:
            while pending and len(reading) + len(waiting) < self.at_once and sum(row.left for row in reading) < self.chunk_size:
                settle(self._begin(pending.pop()))
            if stopped():
                raise Stopped
            if reading:
                rows = reading[:]
                reading.clear()
                self._read(rows)
                for row in rows:
                    settle(row)
            full = len(waiting) >= self.at_once or sum(row.end - row.start for row in waiting) >= HELD
            if waiting and (full or not (reading or pending)):
                yield from self._finish(waiting, answer, stopped)
                waiting.clear()

    def _begin(self, branch: _Branch) -> _Row:
        prompts = branch.prompts
        if branch.source is None or not (branch.last or branch.start):
            name = self._requests.join()
        else:
            name = branch.source if branch.last else self._requests.fork(branch.source)
        if len(prompts) == 1:
            end = self.method.apart(len(prompts[0]))
        else:
            end = shareable(self.method, common(prompts[0], prompts[-1]), [len(ids) for ids in prompts])
        return _Row(name, prompts, branch.start, max(branch.start, end))

    def _read(self, rows: list[_Row]) -> None:
        budget, new = max(self.chunk_size, self.method.cut or 1), dict[int, list[int]]()
        counts = dict[_Row, int]()
        for row in rows:
            if count := chunk(self.method, row.read, row.end, budget):
                new[row.name] = row.prompts[0][row.read : row.read + count]
                counts[row] = count
                budget -= count
        self._requests.read(new, logits="none")
        self._count(1 if isinstance(self._requests, Flat) else len(new), sum(map(len, new.values())))
        for row, count in counts.items():
            row.read += count

    def _finish(self, rows: list[_Row], answer: list[int], stopped: Callable[[], bool]) -> Iterator[tuple[list[int], float]]:
        """The end of each prompt and the continuation: as many rows in a forward as have room in it."""
        tail = 1 if self.method.cut != 1 else len(answer)
        while rows:
            some = [rows.pop()]
            size = len(some[0].prompts[0]) - some[0].end + tail
            while rows and (size := size + len(rows[-1].prompts[0]) - rows[-1].end + tail) <= self.chunk_size:
                some.append(rows.pop())
            steps = {row: self._steps(row.prompts[0][row.end :], answer) for row in some}
            logits: dict[_Row, list[torch.Tensor]] = {row: [] for row in some}
            for n in range(len(steps[some[0]])):
                if stopped():
                    raise Stopped
                new = {row.name: steps[row][n] for row in some}
                found = self._requests.read(new, logits="all" if self.method.cut == 1 else "last")
                self._count(1 if isinstance(self._requests, Flat) else len(new), sum(map(len, new.values())))
                for row in some:
                    logits[row].append(found[row.name].view(-1, found[row.name].shape[-1])[-len(answer) :])
            for row in some:
                self._requests.leave(row.name)
                yield row.prompts[0], total(torch.cat(logits[row]), answer)

    def _steps(self, end: list[int], answer: list[int]) -> list[list[int]]:
        """What is read of a prompt's end and the continuation, forward by forward. Where a cut changes the result, a token of an answer is read by itself."""
        return [end + answer[:-1]] if self.method.cut == 1 else [end, *([token] for token in answer[:-1])]

    def _count(self, forwards: int, tokens: int) -> None:
        self.forwards += forwards
        self.tokens += tokens

    # -- in turns ------------------------------------------------------------------------------------------------------------------

    def _in_turns(self, order: list[list[int]], answer: list[int], stopped: Callable[[], bool]) -> Iterator[tuple[list[int], float]]:
        """Under a method that evicts, what is kept depends on the turns, so that nothing is shared: a prompt is a turn, its last token and the answer one."""
        for ids in order:
            cache, losses = _empty(), list[torch.Tensor]()
            for part, wanted in ((ids[:-1], False), ([*ids[-1:], *answer], True)):
                if stopped():
                    raise Stopped
                for read in stream(self.extension, torch.tensor(part, dtype=torch.long), chunk_size=self.chunk_size, losses=wanted, cache=cache):
                    self._count(1, 0)
                    if read.losses is not None:
                        losses.append(read.losses)
            self._count(0, len(ids) + len(answer))
            yield ids, -float(torch.cat(losses)[1:].double().sum())


class _Caches:
    """Requests as of flat forwards, read one after the other with a cache each: for models and methods that have no flat forwards."""

    def __init__(self, extension: Extension) -> None:
        self._extension = extension
        self._model: Any = extension.model
        self._caches: dict[int, Any] = {}
        self._last = 0

    def join(self) -> int:
        return self._named(_empty())

    def fork(self, request: int) -> int:
        return self._named(self._extension.fork(self._caches[request]))

    def leave(self, request: int) -> None:
        del self._caches[request]

    @torch.no_grad()
    def read(self, new: Mapping[int, list[int]], logits: Literal["last", "all", "none"] = "last") -> dict[int, torch.Tensor]:
        found = {}
        for request, ids in new.items():
            given = torch.tensor([ids], device=device_of(self._model))
            how = {"past_key_values": self._caches[request], "use_cache": True, "logits_to_keep": len(ids) if logits == "all" else 1}
            found[request] = self._model(input_ids=given, **how).logits[0][-how["logits_to_keep"] :]
        return found

    def _named(self, cache: Any) -> int:
        self._last += 1
        self._caches[self._last] = cache
        return self._last


def _below(row: _Row) -> list[_Branch]:
    """Those that go on from what a row has read: prompts with the same next token after all that they have in common. The last of the list begins first."""
    same = common(row.prompts[0], row.prompts[-1])
    groups = [[*found] for _, found in groupby(row.prompts, key=lambda ids: ids[same : same + 1])]
    return [_Branch(group, row.name, row.end, n == 0) for n, group in enumerate(groups)]


def total(logits: torch.Tensor, answer: list[int]) -> float:
    """log p of the tokens of an answer, logits [T, V] before each."""
    wanted = torch.tensor(answer, device=logits.device)
    found = logits.float().log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
    require_finite(found.masked_fill(found.isneginf(), 0.0))
    return float(found.clamp(min=LEAST).double().sum())


def _empty() -> Any:
    from transformers import DynamicCache

    return DynamicCache()
