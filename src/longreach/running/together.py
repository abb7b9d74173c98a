"""Many prompts, generated for together: every forward decodes a token of each request that has begun and reads a chunk of those that are still reading.

Knows an extension's flat forwards and logits processors; not text, files or clocks. Waiting requests take the places of those that are done, and a document
that several prompts begin with is read once and forked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from longreach.hf.extension import Extension
from longreach.methods.base import Method
from longreach.quantities import CHUNK_SIZE
from longreach.running.generation import GREEDY, Sampling

AT_ONCE = 16
OTHERS: dict[str, tuple[Any, ...]] = {  # settings of a checkpoint that would change a token, and what they are where they do nothing
    "no_repeat_ngram_size": (None, 0), "encoder_no_repeat_ngram_size": (None, 0), "bad_words_ids": (None,), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,), "suppress_tokens": (None, []), "begin_suppress_tokens": (None, []), "sequence_bias": (None,), "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0), "guidance_scale": (None, 1, 1.0), "min_length": (None, 0), "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,), "watermarking_config": (None,), "encoder_repetition_penalty": (None, 1.0),
}  # fmt: skip


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
class _Row:
    """What one row of the flat forwards reads: `end` tokens of a prompt and then its answer, or no more than the document (`asks` is False)."""

    name: int
    request: Request
    end: int
    asks: bool
    generator: torch.Generator
    read: int = 0
    new: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Group:
    """Waiting requests whose first `shared` ids are the same, and the row that holds these."""

    requests: deque[Request]
    shared: int
    document: _Row | None = None


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
        own = config.eos_token_id
        self.ends = set(ends) if ends is not None else set() if own is None else {own} if isinstance(own, int) else set(own)
        self.at_once, self.chunk_size, self.context = at_once, chunk_size, extension.context
        self.method = extension.method
        self._draws, self._processors = sampling.temperature is not None, _processors(config, sampling)
        self._flat = extension.flat()
        self._queue: deque[_Group] = deque()
        self._rows: list[_Row] = []

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
        if len(requests) > 1 and self.at_once > 1 and self.method.cut is not None:
            shared = min(self.method.apart(shared + self.method.cut), *(self.method.apart(len(request.ids)) for request in requests))
        else:
            shared = 0
        if shared:
            self._queue.append(_Group(deque(requests), shared))
        else:
            self._queue.extend(_Group(deque([request]), 0) for request in requests)
        return shared

    def step(self) -> Turn:
        """One forward, for all that have a place. If it fails the pool is of no use any more."""
        self._admit()
        new: dict[int, list[int]] = {}
        reads: dict[Request, tuple[int, int]] = {}
        budget = max(self.chunk_size, self.method.cut or 1)
        for row in self._rows:
            ids, at = (row.new[-1:], 0) if row.new else (row.request.ids, row.read)
            count = 1 if row.new else _next(self.method, row.read, row.end, budget)
            budget -= 0 if row.new else count
            if count > 0:
                new[row.name] = ids[at : at + count]
                reads[row.request] = row.read, row.read + count
                row.read += count
        logits = self._flat.read(new)
        done = {}
        for row in [row for row in self._rows if row.name in new and row.asks and row.read == row.end + len(row.new)]:
            row.new.append(self._token(row, logits[row.name]))
            stopped = row.new[-1] in self.ends or row.request.stop(row.new)
            if stopped or len(row.new) >= row.request.max_new_tokens:
                done[row.request] = Generated(row.new, "stop" if stopped else "length")
                self._flat.leave(row.name)
                self._rows.remove(row)
        return Turn(reads, done)

    def _admit(self) -> None:
        """Give places to those that wait, in their order."""
        while self._queue:
            group, full = self._queue[0], len(self._rows) >= self.at_once
            document = group.document
            if document is not None and document.read < group.shared:
                return
            if document is not None and len(group.requests) == 1:  # the last goes on where the document lies
                self._rows.remove(document)
                self._begin(document.name, group.requests.popleft(), group.shared)
            elif full:
                return
            elif document is not None:
                self._begin(self._flat.fork(document.name), group.requests.popleft(), group.shared)
            elif group.shared:
                group.document = self._begin(self._flat.join(), group.requests[0], 0, group.shared)
            else:
                self._begin(self._flat.join(), group.requests.popleft(), 0)
            if not group.requests:
                self._queue.popleft()

    def _begin(self, name: int, request: Request, read: int, end: int | None = None) -> _Row:
        generator = torch.Generator().manual_seed(request.seed % 2**63)
        self._rows.append(_Row(name, request, len(request.ids) if end is None else end, end is None, generator, read))
        return self._rows[-1]

    def _token(self, row: _Row, logits: torch.Tensor) -> int:
        scores = logits.float()[None]
        if self._processors:
            scores = self._processors(torch.tensor([row.request.ids + row.new], device=scores.device), scores)
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=row.generator) if self._draws else scores.argmax(-1))


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


def _next(method: Method, read: int, prompt: int, budget: int) -> int:
    """How many more tokens of a prompt to read, of which `budget` are to be read at most, where the method allows to cut it there."""
    if budget < (method.cut or 1):
        return 0
    if method.cut is None or prompt - read <= budget:
        return prompt - read
    last = min((read + budget) // method.cut * method.cut, method.apart(prompt))
    return last - read if last > read else prompt - read


def _processors(config: Any, sampling: Sampling) -> Any:
    """What stock `generate` does to logits under the checkpoint's own settings with ours over them. Raises ValueError for those that are not honoured here."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    for name, idle in OTHERS.items():
        if (value := getattr(config, name, None)) not in idle:
            raise ValueError(
                f"the checkpoint's generation settings have {name}={value}, which is not honoured here; set model.generation_config.{name} = None, or use "
                "model.generate for each prompt"
            )
    found = LogitsProcessorList()
    if config.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if sampling.temperature is not None:
        if sampling.temperature != 1.0:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if config.top_k:
            found.append(TopKLogitsWarper(config.top_k))
        if sampling.top_p is not None and sampling.top_p < 1.0:
            found.append(TopPLogitsWarper(sampling.top_p))
        if config.min_p is not None:
            found.append(MinPLogitsWarper(config.min_p))
    return found
