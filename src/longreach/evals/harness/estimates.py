"""How long a run will take, before it starts and while it goes on, from what its answers cost.

Knows items, engines, costs and a clock; no models, files or terminals.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import sqrt

from longreach.evals.harness.costs import EVEN, PLAIN, Load, Sight, Speed, Work, fit
from longreach.evals.harness.engine import Engine, Reply, asked_all
from longreach.evals.harness.items import Item, ordered
from longreach.evals.samples import budget
from longreach.evals.samples.budget import ChatMode
from longreach.hf.interfaces import Tokenizer
from longreach.quantities import counted

PROBE = 1024  # tokens of the longest probe at least, where there are as many
SHARE = 4  # it has a quarter of the longest prompt; the others a half and a quarter of that
PROBE_SECONDS = 30.0  # a probe that would take longer is made shorter, but no shorter than the first
CHEAP_SECONDS = 0.25  # a probe that takes no longer is read three times
PROBE_ANSWER = 8
REMEMBERED = 32  # answers that the time left is told by: the speed of now, not of an hour ago


@dataclass(frozen=True)
class Estimate:
    """What a run will cost at most: answers may be shorter than allowed. Seconds are None where nothing was measured.

    read_tokens  those that are really read: a document that several questions share counts once, where the engine shares it.
    """

    samples: int
    prompt_tokens: int
    read_tokens: int
    answer_tokens: int
    longest: int
    seconds: float | None


def loads(items: Sequence[Item], work: Work, limit: int | None = None) -> Iterator[Load]:
    """Of every item, asked in this order. `limit`: tokens of prompt and answer, beyond which a prompt is cut."""
    held: tuple[str, int] | None = None
    for item in items:
        new = item.sample.max_new_tokens
        tokens = item.tokens if limit is None else min(item.tokens, max(1, limit - new))
        shared = 0 if tokens < item.tokens else item.shared
        yield work.load(tokens, shared, new, held=shared > 0 and held == (item.document, shared))
        held = (item.document, shared) if work.returns(tokens, shared, new) else None


def estimate(items: Sequence[Item], work: Work = PLAIN, speed: Speed | None = None) -> Estimate:
    """Count the tokens, and say how long they take where the speed was measured."""
    total = sum(loads(ordered(items), work), Load())
    answers = sum(item.sample.max_new_tokens for item in items)
    return Estimate(
        len(items), sum(item.tokens for item in items), total.tokens, answers, max(item.needs for item in items), speed.seconds(total) if speed else None
    )


def measure(items: Sequence[Item], engine: Engine, tokenizer: Tokenizer, work: Work = PLAIN, chat: ChatMode = "auto", together: int = 1) -> Speed:
    """From beginnings of the longest prompt with its question at their end, each asked twice: the second answer finds its document read.

    together  how many samples the engine reads in one forward: so often each is asked then.

    Raises ValueError if the engine's answers take no time.
    """
    prompt = budget.encode(tokenizer, max(items, key=lambda item: item.tokens).sample, chat)
    sample = replace(prompt.sample, max_new_tokens=PROBE_ANSWER, stop=())
    longest = min(len(prompt.ids), max(PROBE, len(prompt.ids) // SHARE))
    sights: list[Sight] = []

    def probe(length: int, skip: int = 0) -> float:
        """`skip` leaves out tokens of the beginning, which makes another document."""
        question = max(1, min(len(prompt.ids) - prompt.shared if prompt.shared else 1, length // 2))
        ids = prompt.ids[skip : skip + length - question] + prompt.ids[-question:]
        shared = max(0, len(ids) - question)
        held = work.back != 0 and shared > 0  # else every one of them would be read
        asked = [replace(prompt, sample=sample, ids=ids, shared=shared)] * (max(2, min(together, len(items))) if held else 1)
        replies = asked_all(engine, asked)
        sights.extend(sight(len(ids), reply) for reply in replies)
        return replies[0].prefill_seconds

    length = max(1, longest // 4)
    seconds = probe(length)
    longest = max(length, min(longest, int(length * sqrt(PROBE_SECONDS / seconds)))) if seconds > 0 else longest
    for size in dict.fromkeys((length, max(1, longest // 2), longest)):
        for skip in range(int(size == length), 3 if probe_is_cheap(seconds, size / length) else 1):
            probe(size, min(skip, len(prompt.ids) - size))
    found = fit(work, sights)
    if found is None:
        raise ValueError("the engine's answers take no time, so there is nothing to estimate from; pass --no-measure")
    return found


def probe_is_cheap(seconds: float, times: float) -> bool:
    """Whether `times` as many tokens take little time even where the cost is that of their pairs."""
    return seconds * times**2 <= CHEAP_SECONDS


def sight(tokens: int, reply: Reply) -> Sight:
    return Sight(tokens, reply.reused, reply.tokens, reply.prefill_seconds, reply.decode_seconds)


@dataclass(frozen=True)
class Step:
    """Where a run is, before a sample and at the end; `seconds_left` by the cost of what was done and of what is to do, None before the first.
    `tokens` were done so far; `what` is read next."""

    done: int
    total: int
    tokens: int
    errors: int
    seconds_left: float | None
    what: str


class Clock:
    """The time left: what is to be done costs so many times what was done, which took so long.

    Speeds come from the answers so far. Before there are any, and where the engine tells no times, the counted work alone is compared.
    """

    def __init__(self, total: int, waiting: Sequence[Item], work: Work = PLAIN, limit: int | None = None, now: Callable[[], float] = time.perf_counter) -> None:
        """`waiting` are the items that are to be answered, in their order, of `total` with those that are known already."""
        self.total, self.done, self.tokens_done, self.work, self.now = total, total - len(waiting), 0, work, now
        self.before, self.after = Load(), Load()
        self._loads = dict(zip((item.key for item in waiting), loads(waiting, work, limit), strict=True))
        for load in self._loads.values():
            self.after += load
        self._whole = self.after
        self._sights: dict[bool, deque[Sight]] = {held: deque(maxlen=REMEMBERED) for held in (False, True)}
        self.started = now()

    def read(self, item: Item, reply: Reply | None, tokens: int) -> None:
        """An item was answered (or failed: None) with a prompt of so many tokens."""
        self.done, self.tokens_done = self.done + 1, self.tokens_done + item.needs
        self.before += self._loads.pop(item.key)
        if reply is not None:
            self._sights[reply.reused > 0].append(sight(tokens, reply))

    def step(self, following: Item | None, errors: int) -> Step:
        what = "done"
        if following is not None:
            what = f"reading sample {self.done + 1} of {self.total} ({following.task.name}, {counted(following.tokens, 'token')})"
        return Step(self.done, self.total, self.tokens_done, errors, self._left(), what)

    def _left(self) -> float | None:
        if not self.before.answers:
            return None
        if not self._loads:
            return 0.0
        speed = fit(self.work, [*self._sights[False], *self._sights[True]]) or EVEN
        whole, done = speed.seconds(self._whole), speed.seconds(self.before)
        return (self.now() - self.started) * max(0.0, whole / done - 1) if done else None
