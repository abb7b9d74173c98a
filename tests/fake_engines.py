"""Engines without a model: what they answer is known, so that tasks, runner and figures can be checked against it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from longreach.evals.harness.engine import Reply
from longreach.evals.samples.budget import Prompt


def reply(text: str) -> Reply:
    return Reply(text, max(1, len(text.split())), "stop", 0.25, 0.5)


class Oracle:
    """Writes the accepted answers."""

    def answer(self, prompt: Prompt) -> Reply:
        return reply(" " + ", ".join(prompt.sample.references))


class First:
    """Writes the first accepted answer only: enough where any one of them counts."""

    def answer(self, prompt: Prompt) -> Reply:
        return reply(" " + prompt.sample.references[0])


class Empty:
    def answer(self, prompt: Prompt) -> Reply:
        return reply("")


@dataclass
class CopyTail:
    """Knows the last `window` tokens only, and finds a pass key in them."""

    tokenizer: object
    window: int

    def answer(self, prompt: Prompt) -> Reply:
        known = self.tokenizer.decode(prompt.ids[-self.window :])  # type: ignore[attr-defined]
        found = re.search(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", known)
        return reply(f" {found[1]}." if found else " unknown")


@dataclass
class Failing:
    """Another engine that raises what `when` returns for the n-th prompt."""

    inner: object
    when: Callable[[int], BaseException | None]
    calls: int = 0

    def answer(self, prompt: Prompt) -> Reply:
        self.calls += 1
        if (problem := self.when(self.calls)) is not None:
            raise problem
        return self.inner.answer(prompt)  # type: ignore[attr-defined,no-any-return]
