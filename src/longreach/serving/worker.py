"""One thread that owns the model: it steps the scheduler, and hands what comes to asyncio.

Everything that touches the model or the scheduler happens in this thread, one thing at a time. Knows threads, asyncio and the scheduler's jobs and events;
not HTTP, texts of prompts or files.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from longreach.hf.interfaces import Tokenizer
from longreach.serving.jobs import Event, Job
from longreach.serving.scheduler import Scheduler
from longreach.serving.texts import Writer

T = TypeVar("T")
Stop = Callable[[Sequence[int]], bool]
logger = logging.getLogger("longreach.serving")


class Busy(Exception):
    """As many requests as may wait are waiting."""


class Stopping(Exception):
    """The server is about to end and takes no new work."""


class Failed(Exception):
    """A forward failed, and the answer with it."""


class TooLong(Exception):
    """An answer takes longer than it may."""


class Gone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Piece:
    """What one token has added to one of the answers. `index`: which of those that were asked for together. `token` is None where it ends the answer and is
    no part of it."""

    index: int
    text: str
    token: int | None
    logprob: float | None
    best: tuple[tuple[int, float], ...]
    cached: int
    finish: Literal["stop", "length"] | None


@dataclass(eq=False)
class Asked:
    """Jobs that were asked for together, and what has come of them. The queue is bounded by the new tokens that they may have."""

    jobs: list[Job]
    writers: list[Writer]
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    taken: asyncio.Future[None] = field(init=False)  # by the scheduler, or refused with a ValueError

    def __post_init__(self) -> None:
        self.taken = self.loop.create_future()


@dataclass(eq=False)
class _Task(Generic[T]):
    """Work that is done in parts between the steps of the scheduler."""

    parts: Iterator[Any]
    done: Future[T]


class Worker:
    """The thread. `most`: answers that may be on their way at a time, those that wait included."""

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer, most: int) -> None:
        self.scheduler, self.tokenizer, self.most = scheduler, tokenizer, most
        self.stats = scheduler.stats()
        self._answers: dict[Job, tuple[Asked, int]] = {}  # job -> whose it is
        self._tasks: deque[_Task[Any]] = deque()
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._taken = 0  # answers that are on their way, as asyncio counts them
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="longreach-model", daemon=True)

    # -- asyncio's side -----------------------------------------------------------------------------------------------------------

    @property
    def on_their_way(self) -> int:
        return self._taken

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after what it is doing; what is still open fails."""
        self._ending = True
        self._tell(lambda: None)
        self._thread.join()

    def ask(self, jobs: Callable[[Sequence[Stop]], list[Job]], stops: Sequence[tuple[str, ...]]) -> Asked:
        """Hand jobs to the scheduler. `jobs` makes them of what says, after each token, whether a stop string ends them; `stops` are the strings of each.

        Raises Busy where too many are on their way, and Stopping at the end. `cancel` must follow, whatever happens.
        """
        if self._ending:
            raise Stopping
        if self._taken + len(stops) > self.most:
            raise Busy
        writers = [Writer(self.tokenizer, stop) for stop in stops]
        made = jobs([_stopper(writer) for writer in writers])
        asked = Asked(made, writers, asyncio.get_running_loop())
        self._taken += len(made)
        self._tell(lambda: self._add(asked))
        return asked

    async def pieces(self, asked: Asked) -> AsyncIterator[Piece]:
        """What comes of them, until all have ended. Raises what was put among the pieces: ValueError for jobs that the scheduler refuses, Failed where a
        forward fails, and what others put there to end it."""
        left = len(asked.jobs)
        while left:
            piece = await asked.pieces.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish is not None
            yield piece

    def cancel(self, asked: Asked) -> None:
        """Nobody waits for these any more. Those that have ended stay ended."""
        self._taken -= len(asked.jobs)
        self._tell(lambda: self._drop(asked))

    async def do(self, parts: Iterator[Any], result: Callable[[], T]) -> T:
        """Work on the model that is done in parts, between the steps of the scheduler -> its result. Cancelled between two parts."""
        if self._ending:
            raise Stopping
        task = _Task(parts, Future[T]())

        def finished() -> Iterator[Any]:
            yield from parts
            task.done.set_result(result())

        task.parts = finished()
        self._tell(lambda: self._tasks.append(task))
        return await asyncio.wrap_future(task.done)

    # -- the thread's side --------------------------------------------------------------------------------------------------------

    def _tell(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._commands or self._tasks or self.scheduler.busy or self._ending):
                    self._changed.wait()
                commands = [*self._commands]
                self._commands.clear()
            for command in commands:
                command()
            if self._ending:
                break
            if self.scheduler.busy:
                self._step()
            if self._tasks:
                self._part()
            self.stats = self.scheduler.stats()
        self._fail(list(self._answers), Stopping())
        for task in self._tasks:
            if task.done.set_running_or_notify_cancel():
                task.done.set_exception(Stopping())

    def _add(self, asked: Asked) -> None:
        problem = None
        for index, job in enumerate(asked.jobs):
            try:
                self.scheduler.add(job)
                self._answers[job] = asked, index
            except Exception as error:
                self._drop(asked)
                problem = error
                break
        self._call(asked.loop, _settle, asked.taken, problem)

    def _drop(self, asked: Asked) -> None:
        for job in asked.jobs:
            if self._answers.pop(job, None) is not None:
                self.scheduler.cancel(job)

    def _step(self) -> None:
        try:
            events = self.scheduler.step()
        except Exception as error:  # what only some jobs suffer comes as their events
            logger.exception("the scheduler failed")
            for job in self._fail(list(self._answers), Failed(f"{type(error).__name__}: {error}")):
                self.scheduler.cancel(job)
            return
        found: list[tuple[Asked, Piece | Exception]] = []
        for event in events:
            if event.job not in self._answers:
                continue
            asked, index = self._answers[event.job]
            if event.finish is not None:
                del self._answers[event.job]
            if event.finish == "error":
                found.append((asked, Failed(event.problem)))
            elif event.token is not None:
                found.append((asked, _piece(asked, index, event)))
        self._send(found)

    def _part(self) -> None:
        task = self._tasks[0]
        if task.done.cancelled():
            self._tasks.popleft()
            return
        try:
            next(task.parts)
        except StopIteration:
            self._tasks.popleft()
        except Exception as error:
            self._tasks.popleft()
            with suppress(Exception):
                task.done.set_exception(error)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> list[Job]:
        """All that were asked for together with one of these end with an error -> their jobs that had not ended."""
        asked = {id(found): found for job in jobs if (found := self._answers[job][0])}.values()
        self._send([(one, error) for one in asked])
        return [job for one in asked for job in one.jobs if self._answers.pop(job, None) is not None]

    def _send(self, found: Sequence[tuple[Asked, Piece | Exception]]) -> None:
        """One call into asyncio for all that a step has brought."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Asked, Piece | Exception]]] = {}
        for asked, piece in found:
            by_loop.setdefault(asked.loop, []).append((asked, piece))
        for loop, pieces in by_loop.items():
            self._call(loop, _deliver, pieces)

    @staticmethod
    def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *given: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed, and nobody waits
            loop.call_soon_threadsafe(function, *given)


def _deliver(pieces: Sequence[tuple[Asked, Piece | Exception]]) -> None:
    for asked, piece in pieces:
        asked.pieces.put_nowait(piece)


def _settle(taken: asyncio.Future[None], problem: Exception | None) -> None:
    if taken.done():  # cancelled: nobody waits
        return
    if problem is None:
        taken.set_result(None)
    else:
        taken.set_exception(problem)


def _stopper(writer: Writer) -> Stop:
    return lambda new: writer.push(new[-1])


def _piece(asked: Asked, index: int, event: Event) -> Piece:
    writer = asked.writers[index]
    ends = event.finish == "stop" and not writer.stopped  # by a token of the model's own, which is no text
    finish = None if event.finish == "error" else event.finish
    return Piece(index, writer.take(finish is not None), None if ends else event.token, event.logprob, event.best, event.cached, finish)
