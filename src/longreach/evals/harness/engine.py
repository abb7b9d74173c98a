"""What answers a prompt: the small interface that the runner needs. `model_engine.py` has the real one; tests plug in others.

Knows prompts and answers; no models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from longreach.evals.samples.budget import Prompt


@dataclass(frozen=True)
class Reply:
    """One answer. `reused` are prompt tokens that were in the cache already, from a question about the same document.

    together  the most samples that were in one forward with this one. Its seconds are its share of theirs.
    """

    text: str
    tokens: int
    finish: str  # "stop" or "length"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    reused: int = 0
    peak_memory: int | None = None
    together: int = 1

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding: the first new token belongs to the prefill."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 and self.decode_seconds > 0 else None


class Engine(Protocol):
    """Answers a prompt with at most `prompt.sample.max_new_tokens` tokens, greedily, up to the first of `prompt.sample.stop`."""

    def answer(self, prompt: Prompt) -> Reply: ...


@runtime_checkable
class Many(Protocol):
    """An engine that may read several prompts together."""

    def answers(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Reply | Exception]]:
        """-> (number of the prompt, its reply or what went wrong), as they end. Prompts are taken from the iterable when they are begun."""


def answers(engine: Engine, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Reply | Exception]]:
    """As the engine does it: several together, or one after the other."""
    return engine.answers(prompts) if isinstance(engine, Many) else one_by_one(engine, prompts)


def asked_all(engine: Engine, prompts: Sequence[Prompt]) -> list[Reply]:
    """The replies in the order of the prompts. Raises what went wrong with one."""
    found = dict(answers(engine, prompts))
    for reply in found.values():
        if isinstance(reply, Exception):
            raise reply
    return [reply for _, reply in sorted(found.items()) if isinstance(reply, Reply)]


def one_by_one(engine: Engine, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Reply | Exception]]:
    for number, prompt in enumerate(prompts):
        yield number, attempt(engine.answer, prompt)


def attempt(answer: Callable[[Prompt], Reply], prompt: Prompt) -> Reply | Exception:
    """One bad sample, or too little memory for the longest ones, must not cost a run."""
    try:
        return answer(prompt)
    except Exception as problem:
        return problem
