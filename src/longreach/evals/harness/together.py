"""Several samples in one forward: how many there is memory for, and their answers, which are those that each gets alone.

Knows prompts, flat forwards and clocks; not tasks, scores or files.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch

from longreach.evals.harness.engine import Reply, attempt
from longreach.evals.samples.budget import Prompt
from longreach.hf.extension import Extension
from longreach.hf.interfaces import CausalLM, Tokenizer
from longreach.hf.placement import device_of
from longreach.planning import dial
from longreach.planning.memory import MARGIN, Budget, Schedule, gigabytes, kv_bytes, temporary_bytes
from longreach.quantities import CHUNK_SIZE, counted
from longreach.running import generation
from longreach.running.together import AT_ONCE, Pool, Request

SHARE = 0.5  # of the memory that is free: the rest of the machine has a use for it too
LOGITS = 4 + 4 + 2  # bytes of a number among the logits of a request: as they come, in fp32, and a copy


@dataclass(frozen=True)
class Several:
    """At most `size` samples hold memory at one time; 1: they are read one by one. `reason` says why, in words for people."""

    size: int
    reason: str


ONE = Several(1, "as asked")


def several(extension: Extension | None, asked: int | None, longest: int, new: int, chunk_size: int = CHUNK_SIZE) -> Several:
    """How many samples of at most `longest` tokens, `new` of them in the answer, are read together: as asked, else as many as fit, up to AT_ONCE.

    Raises ValueError for fewer than one. Where the model or its settings allow one at a time only, the reason says so, whatever was asked for.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"a batch has at least one sample, not {asked}; pass --batch-size 1 to read them one by one")
    if asked == 1:
        return ONE
    if extension is None:
        return Several(1, "the stock model has no flat forwards")
    try:
        Pool(extension)
    except ValueError as error:
        return Several(1, str(error))
    if asked is not None:
        return Several(asked, "as asked")
    facts = extension.facts
    entry = facts.reading.entries[0]
    budget = dial.budget(facts.base.config, entry.dtype, entry.device)
    if budget is None:
        return Several(1, "the memory that a sample takes is not known on this model or machine; --batch-size N reads N together")
    return _fitting(budget, extension, max(longest, new + 1), new, chunk_size)


def _fitting(budget: Budget, extension: Extension, longest: int, new: int, chunk_size: int) -> Several:
    architecture = budget.architecture
    schedule = Schedule.of(extension.method, longest, new, chunk_size)
    once = MARGIN * temporary_bytes(architecture, extension.method, schedule)
    each = MARGIN * (kv_bytes(architecture, extension.method, schedule, rows=2) / 2 + LOGITS * architecture.vocabulary)
    size = max(1, min(AT_ONCE, int((SHARE * budget.free - once) // each)))
    one, free = gigabytes(round(each)), gigabytes(budget.free)
    return Several(size, f"a sample of {counted(longest, 'token')} takes {one}, and half of the {free} that are free may be used")


@dataclass(eq=False)
class _Asked:
    """A prompt on its way, the seconds that are its share of the forwards so far, and the most samples that one of these had."""

    number: int
    prompt: Prompt
    reused: int
    prefill: float = 0.0
    decode: float = 0.0
    together: int = 1


@dataclass(eq=False)
class Answering:
    """Answers to prompts, read `size` at a time in flat forwards.

    shares  whether a document that prompts next to each other begin with is read once.
    alone   answers a prompt by itself; so are those answered that were in a forward which failed, and `failures` says so.

    The seconds of a forward are divided among its prompts by the tokens that each had in it, so that those of all replies are the seconds that the run took;
    `tokens_per_second` is then a part of what the machine does, not the speed of an answer alone.
    """

    model: CausalLM
    tokenizer: Tokenizer
    extension: Extension
    size: int
    chunk_size: int
    shares: bool
    alone: Callable[[Prompt], Reply]
    peak: Callable[[], int | None]
    failures: list[str] = field(default_factory=list)

    def answers(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Reply | Exception]]:
        """-> (number of the prompt, its reply or what went wrong), as they end. Prompts are taken from the iterable when there is room for them."""
        groups, device = self._groups(prompts), device_of(self.model)
        size, pool, asked = self.size, self._pool(self.size), dict[Request, _Asked]()
        while True:
            while pool.hungry and (group := next(groups, None)) is not None:
                shared = len(_document(group[0][1])) if self.shares and size > 1 and len(group) > 1 else 0
                requests = [self._request(prompt) for _, prompt in group]
                try:
                    shared = pool.add(requests, shared)
                    asked |= {request: _Asked(*each, shared if place else 0) for place, (request, each) in enumerate(zip(requests, group, strict=True))}
                except ValueError:  # one of them cannot be; the others can
                    yield from ((number, attempt(self.alone, prompt)) for number, prompt in group)
            if not pool.busy:
                return
            started, turn = time.perf_counter(), None
            try:
                turn = pool.step()
                synchronise(device)
            except Exception as problem:  # too little memory, above all: whoever was in the forward is asked alone, and fewer are read together from now on
                self.failures.append(f"{counted(len(asked), 'sample')} read one by one, after {type(problem).__name__}: {' '.join(str(problem).split())[:200]}")
            if turn is None:  # only now has the error let go of the memory of the forward
                waiting, asked, size = [*asked.values()], {}, max(1, size // 2)
                pool = self._pool(size)
                yield from ((each.number, attempt(self.alone, each.prompt)) for each in waiting)
                continue
            self._divide(time.perf_counter() - started, turn.reads, asked)
            for request, generated in turn.done.items():
                each = asked.pop(request)
                text = self.tokenizer.decode(generated.ids, skip_special_tokens=True)
                text = text[: generation.stop_at(text, each.prompt.sample.stop)]
                yield each.number, Reply(text, len(generated.ids), generated.finish, each.prefill, each.decode, each.reused, self.peak(), each.together)

    def _groups(self, prompts: Iterable[Prompt]) -> Iterator[list[tuple[int, Prompt]]]:
        """Numbered prompts that follow each other and begin with one document."""
        for _, found in itertools.groupby(enumerate(prompts), key=lambda each: (self.shares and _document(each[1])) or [-1, each[0]]):
            yield [*found]

    def _pool(self, size: int) -> Pool:
        return Pool(self.extension, at_once=size, chunk_size=self.chunk_size, ends=generation.ends_of(self.model, self.tokenizer))

    def _request(self, prompt: Prompt) -> Request:
        return Request(prompt.ids, prompt.sample.max_new_tokens, stop=generation.ends_with(self.tokenizer, prompt.sample.stop))

    def _divide(self, seconds: float, reads: dict[Request, tuple[int, int]], asked: dict[Request, _Asked]) -> None:
        whole = sum(stop - start for start, stop in reads.values())
        for request, (start, stop) in reads.items():
            each = asked[request]
            share = seconds * (stop - start) / whole
            each.together = max(each.together, len(reads))
            if start < len(request.ids):
                each.prefill += share
            else:
                each.decode += share


def _document(prompt: Prompt) -> list[int]:
    return prompt.ids[: prompt.shared]


def synchronise(device: torch.device) -> None:
    """Wait until a card has done what was asked of it, so that the clock knows."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
