"""What is served: a model under its extension, and how its answers come to be. One object for the whole of a server's life.

Knows the extension, the tokenizer, the worker and what is asked; not HTTP.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from longreach.hf.extension import Extension
from longreach.hf.interfaces import Tokenizer
from longreach.serving import asking, replies
from longreach.serving.asking import About, Prompts, Room
from longreach.serving.documents import Documents
from longreach.serving.jobs import Job
from longreach.serving.limits import Limits
from longreach.serving.metrics import Metrics
from longreach.serving.protocol import ChatRequest, CompletionRequest, Message, Refused, TokenizeRequest
from longreach.serving.scheduler import Scheduler
from longreach.serving.texts import Writer, longest_token, speller
from longreach.serving.worker import Asked, Failed, Piece, TooLong, Worker
from longreach.version import __version__

T = TypeVar("T")
SHORT = 50_000  # characters of a text that becomes tokens within milliseconds


@dataclass(eq=False)
class Tally:
    """What an answer has cost so far."""

    prompt: int
    new: int = 0
    cached: int = 0

    def facts(self) -> dict[str, int]:
        """For the log."""
        return {"prompt_tokens": self.prompt, "cached_tokens": self.cached, "new_tokens": self.new}

    def usage(self) -> replies.Usage:
        details = replies.PromptDetails(cached_tokens=self.cached)
        return replies.Usage(prompt_tokens=self.prompt, completion_tokens=self.new, total_tokens=self.prompt + self.new, prompt_tokens_details=details)


class Service:
    """A model that is asked over HTTP. `name` is what clients call it."""

    def __init__(self, extension: Extension, tokenizer: Tokenizer, name: str, limits: Limits, scheduler: Scheduler, documents: Path | None = None) -> None:
        self.extension, self.tokenizer, self.name, self.limits = extension, tokenizer, name, limits
        self.created = int(time.time())
        self.facts = extension.report()
        self.fingerprint = "fp_" + hashlib.sha256(json.dumps([name, __version__, self.facts["method"], self.facts["dtype"]]).encode()).hexdigest()[:12]
        limit = extension.context or extension.capacity
        self.room = Room(limit, scheduler.room.vocabulary, limits.answer, longest_token(tokenizer))
        self.worker = Worker(scheduler, tokenizer, limits.waiting)
        self.metrics = Metrics(self.worker)
        self.spell = speller(tokenizer)
        # Long texts take seconds to become tokens. Threads of their own do it, for short and for long ones, each with a tokenizer of its own: the worker's is
        # not to be changed meanwhile.
        self._encoders = [(ThreadPoolExecutor(1, f"longreach-{kind}"), copy.deepcopy(tokenizer)) for kind in ("short", "long")]
        self.documents = Documents(documents, self.worker, self._encoded, self.room, limits)

    def start(self) -> None:
        self.worker.start()

    def stop(self) -> None:
        self.worker.stop()
        for thread, _ in self._encoders:
            thread.shutdown(cancel_futures=True)

    async def _encoded(self, characters: int, make: Callable[[Tokenizer], T]) -> T:
        thread, tokenizer = self._encoders[characters > SHORT]
        return await asyncio.get_running_loop().run_in_executor(thread, make, tokenizer)

    # -- what is asked ------------------------------------------------------------------------------------------------------------

    async def completion(self, request: CompletionRequest) -> Prompts:
        texts = [text for text in (request.prompt if isinstance(request.prompt, list) else [request.prompt]) if isinstance(text, str)]
        for text in texts:
            self.room.check(len(text), "prompt")
        return await self._encoded(sum(map(len, texts)), lambda tokenizer: asking.completion(request, tokenizer, self.room))

    async def chat(self, request: ChatRequest) -> Prompts:
        characters, about = await self._about(request.messages, request.document)
        return await self._encoded(characters, lambda tokenizer: asking.chat(request, tokenizer, self.room, about))

    async def tokens(self, request: TokenizeRequest) -> replies.Tokens:
        if request.messages is None:
            characters, about = len(request.prompt or ""), None
        else:
            characters, about = await self._about(request.messages, request.document)
        ids = await self._encoded(characters, lambda tokenizer: asking.tokens(request, tokenizer, about))
        return replies.Tokens(count=len(ids), max_model_len=self.room.context, tokens=ids)

    async def _about(self, messages: list[Message], document: str | None) -> tuple[int, About | None]:
        """-> (characters of a conversation, the document that it is about)."""
        about = None if document is None else await self.documents.about(document)
        return sum(len(message.text) for message in messages) + (0 if about is None else len(about.text)), about

    def model(self) -> replies.Model:
        facts = {name: self.facts[name] for name in replies.ModelFacts.model_fields}
        return replies.Model(id=self.name, created=self.created, max_model_len=self.room.context, longreach=replies.ModelFacts(**facts))

    # -- answers ------------------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def admitted(self, count: int, progress: bool = False) -> AsyncIterator[Asked]:
        """Inside, so many answers are counted, and their time runs; that of a document, which says its `progress`, does not. Whatever ends it, an answer or a
        client that has gone, nothing is computed for them any more."""
        if count > self.limits.waiting:
            raise Refused("n", f"{count} answers at a time are more than the {self.limits.waiting} of this server; ask for fewer", None)
        asked = self.worker.enter(count, progress)
        late = None if progress else asked.loop.call_later(self.limits.seconds, self.worker.end, asked, TooLong())
        try:
            yield asked
        finally:
            if late is not None:
                late.cancel()
            self.worker.cancel(asked)

    @asynccontextmanager
    async def begun(self, asked: Asked, prompts: Prompts) -> AsyncIterator[Tally]:
        """Inside, the answers are on their way."""
        writers = self.worker.writers(asked.count, prompts.stop)
        jobs = [_job(prompts, number, writer) for number, writer in enumerate(writers)]

        def begin(scheduler: Scheduler) -> list[Job]:
            if prompts.document is not None:
                self.documents.held(prompts.document, prompts.ids[0][: prompts.held], scheduler)
            for number, job in enumerate(jobs):
                try:
                    scheduler.add(job)
                except BaseException:
                    for other in jobs[:number]:
                        scheduler.cancel(other)
                    raise
            return jobs

        tally = Tally(sum(map(len, prompts.ids)))
        try:
            try:
                await self.worker.ask(asked, begin, writers)
            except ValueError as error:
                raise Refused(None, str(error), None) from error
            yield tally
        finally:
            self.metrics.prompt.inc(tally.prompt)
            self.metrics.cached.inc(tally.cached)
            self.metrics.new.inc(tally.new)

    async def pieces(self, asked: Asked, tally: Tally, n: int) -> AsyncIterator[Piece]:
        """What comes of them, counted and timed."""
        seen: dict[int, float] = {}
        begun = time.perf_counter()
        try:
            async for piece in self.worker.pieces(asked):
                now = time.perf_counter()
                if piece.index not in seen:
                    self.metrics.first.observe(now - begun)
                    tally.cached += piece.cached if piece.index % n == 0 else 0
                else:
                    self.metrics.between.observe(now - seen[piece.index])
                seen[piece.index] = now
                tally.new += 1
                yield piece
        except Failed as error:  # a document may be read again, whose files have names
            raise type(error)(self.documents.hidden(error)) from error


def _job(prompts: Prompts, number: int, writer: Writer) -> Job:
    prompt = number // prompts.n
    return Job(
        ids=prompts.ids[prompt][prompts.held :],
        max_new_tokens=prompts.new[prompt],
        sampling=prompts.samplings[number],
        logprobs=prompts.logprobs,
        stop=lambda new: writer.push(new[-1]),
        document=prompts.document,
        shared=prompts.shared,
    )
