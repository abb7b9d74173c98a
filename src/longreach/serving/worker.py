"""One thread that owns the model: it steps the scheduler, and hands what comes to asyncio.

Everything that touches the model or the scheduler happens in this thread, one thing at a time. Knows threads, asyncio and the scheduler's jobs and events;
not HTTP, texts of prompts or files.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from longreach.hf.interfaces import Tokenizer
from longreach.serving.jobs import Event, Job
from longreach.serving.scheduler import Scheduler
from longreach.serving.texts import Writer

T = TypeVar("T")
logger = logging.getLogger("longreach.serving")


class Busy(Exception):
    """As many requests as may wait are waiting."""


class Stopping(Exception):
    """The server is about to end and takes no new work."""


class Failed(Exception):
    """A forward failed, and the answer with it."""


class Unfit(Failed):
    """The scheduler found when its turn came that the answer cannot be, as where documents leave no room for it. The sentence has the fix."""


class TooLong(Exception):
    """An answer takes longer than it may."""


class Gone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Piece:
    """What one forward has done for one of the answers. `index`: which of those that were asked for together. `token` is None where only the prompt was read
    (`read` tokens of it so far), and where it ends the answer and is no part of it."""

    index: int
    read: int
    cached: int
    text: str = ""
    token: int | None = None
    logprob: float | None = None
    best: tuple[tuple[int, float], ...] = ()
    finish: Literal["stop", "length", "held"] | None = None


@dataclass(eq=False)
class Asked:
    """What is asked for together, from when it is counted, and what has come of it. The queue is bounded by the new tokens that they may have.

    count      of answers.
    progress   whether pieces without a token are wanted too.
    begin      hands jobs to the scheduler, in the thread -> those jobs. What it raises is the answer.
    writers    of each job.
    """

    count: int
    progress: bool
    loop: asyncio.AbstractEventLoop
    begin: Callable[[Scheduler], Sequence[Job]] | None = None
    writers: list[Writer] = field(default_factory=list)
    jobs: Sequence[Job] = ()
    pieces: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    left: bool = False  # nobody waits for it any more
    taken: asyncio.Future[None] = field(init=False)  # by the scheduler, or what `begin` has raised, or why it has ended before

    def __post_init__(self) -> None:
        self.since = self.loop.time()
        self.taken = self.loop.create_future()


class Worker:
    """The thread. `most`: answers that may be on their way at a time, those that wait included."""

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer, most: int) -> None:
        self.scheduler, self.tokenizer, self.most = scheduler, tokenizer, most
        self.stats = scheduler.stats()
        self._answers: dict[Job, tuple[Asked, int]] = {}  # job -> whose it is
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._taken = 0  # answers that are on their way, as asyncio counts them
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="longreach-model", daemon=True)

    # -- asyncio's side -----------------------------------------------------------------------------------------------------------

    @property
    def on_their_way(self) -> int:
        return self._taken

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after what it is doing; what is still open fails."""
        self._ending = True
        self._tell(lambda: None)
        self._thread.join()

    def writers(self, count: int, stop: tuple[str, ...] = ()) -> list[Writer]:
        return [Writer(self.tokenizer, stop) for _ in range(count)]

    def enter(self, count: int, progress: bool = False) -> Asked:
        """Count so many answers as on their way; see `Asked`. Raises Busy where too many are, and Stopping at the end. `cancel` must follow, whatever
        happens."""
        if self._ending:
            raise Stopping
        if self._taken + count > self.most:
            raise Busy
        self._taken += count
        return Asked(count, progress, asyncio.get_running_loop())

    async def prepared(self, asked: Asked, work: Coroutine[Any, Any, T]) -> T:
        """What is to be done before it can begin -> its result. Raises why it has ended meanwhile."""
        doing = asyncio.ensure_future(work)
        try:
            await asyncio.wait((doing, asked.taken), return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                await asked.taken
            return await doing
        finally:
            doing.cancel()

    async def ask(self, asked: Asked, begin: Callable[[Scheduler], Sequence[Job]], writers: list[Writer]) -> None:
        """Have its jobs begun, one for each writer. Returns when the scheduler has taken them."""
        asked.begin, asked.writers = begin, writers
        if not asked.left:
            self._tell(lambda: self._add(asked))
        await asked.taken

    async def pieces(self, asked: Asked) -> AsyncIterator[Piece]:
        """What comes of them, until all have ended; then nobody waits for them. Raises Failed where a forward fails, and why others have ended it (`end`)."""
        left = asked.count
        try:
            while left:
                piece = await asked.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece.finish is not None
                yield piece
        finally:
            self.cancel(asked)

    def cancel(self, asked: Asked) -> None:
        """Nobody waits for these any more. Those that have ended stay ended, and a second call does nothing."""
        if asked.left:
            return
        asked.left = True
        self._taken -= asked.count
        self._tell(lambda: self._drop(asked))

    def end(self, asked: Asked, why: Exception) -> None:
        """The same, and whoever waits for it to begin, or for its next piece, gets `why`."""
        self.cancel(asked)
        _settle(asked.taken, why)
        while not asked.pieces.empty():
            asked.pieces.get_nowait()
        asked.pieces.put_nowait(why)

    async def do(self, work: Callable[[Scheduler], T]) -> T:
        """Something short, done between two steps of the scheduler -> what it returns, or raises."""
        if self._ending:
            raise Stopping
        done: Future[T] = Future()

        def command() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(work(self.scheduler))
                except Exception as error:
                    done.set_exception(error)

        self._tell(command)
        return await asyncio.wrap_future(done)

    # -- the thread's side --------------------------------------------------------------------------------------------------------

    def _tell(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._commands or self.scheduler.busy or self._ending):
                    self._changed.wait()
                commands = [*self._commands]
                self._commands.clear()
            for command in commands:
                try:
                    command()
                except Exception:  # a thread that dies would leave everybody waiting
                    logger.exception("the scheduler failed")
            if self._ending:
                break
            if self.scheduler.busy:
                self._step()
            else:
                self.stats = self.scheduler.stats()
        self._fail(list(self._answers), Stopping())

    def _add(self, asked: Asked) -> None:
        if asked.left or asked.begin is None:
            return
        try:
            asked.jobs = asked.begin(self.scheduler)
        except Exception as error:
            self._call(asked.loop, _settle, asked.taken, error)
            return
        self._answers |= {job: (asked, index) for index, job in enumerate(asked.jobs)}
        self._call(asked.loop, _settle, asked.taken, None)

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
            self.stats = self.scheduler.stats()
            return
        found: list[tuple[Asked, Piece | Exception]] = []
        for event in events:
            if event.job not in self._answers:
                continue
            asked, index = self._answers[event.job]
            if event.finish is not None:
                del self._answers[event.job]
            if event.finish == "error":
                found.append((asked, (Unfit if event.refused else Failed)(event.problem or "")))
            elif event.token is not None or event.finish is not None or asked.progress:
                found.append((asked, _piece(asked, index, event)))
        self.stats = self.scheduler.stats()  # who gets an answer finds it counted
        self._send(found)

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


def _piece(asked: Asked, index: int, event: Event) -> Piece:
    writer = asked.writers[index]
    finish = None if event.finish == "error" else event.finish
    if event.token is None:
        return Piece(index, event.read, event.cached, finish=finish)
    ends = finish == "stop" and not writer.stopped  # by a token of the model's own, which is no text
    text = writer.take(finish is not None)
    return Piece(index, event.read, event.cached, text, None if ends else event.token, event.logprob, event.best, finish)
