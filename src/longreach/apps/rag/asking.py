"""DRAG and IterDRAG (arXiv 2410.04343) as state machines: which call follows which, what is retrieved, and when the answer has to come.

DRAG        one call.
IterDRAG    every call begins with one of Self-Ask's control words, in the order that Self-Ask has:

                asking   -> Follow up: q            retrieve k more for q, go to answering
                         -> So the final answer is: end
                answering -> Intermediate answer: a  go to asking

            After `rounds` sub-questions, or where the budget leaves no more, only the final answer may follow.

The budget is the paper's effective context length: the input tokens of all calls together. It is never exceeded: a call is made only if the final answer could
still be asked for after it. Knows prompts only by their number of tokens, and not what retrieves or answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from longreach.apps.rag.prompts import FINAL, FOLLOW_UP, INTERMEDIATE, State, Step, Used

Ended = Literal["one call", "by itself", "rounds", "budget", "no question"]  # why an answer came when it came


class Reader(Protocol):
    """What the machines need of a model and a prompt."""

    def count(self, state: State) -> int:
        """Tokens of the prompt."""

    def ask(self, state: State, beginnings: Sequence[str]) -> tuple[str, str]:
        """-> (which of the beginnings the new text has, what follows it); without beginnings ("", the new text)."""


@dataclass(frozen=True)
class Room:
    """prompt  tokens that one prompt may have, total those of all calls; None: any number."""

    prompt: int | None
    total: int | None

    def fits(self, tokens: int, after: int = 0) -> bool:
        """Whether there is room for a prompt, and for `after` tokens of prompts that follow it."""
        return (self.prompt is None or tokens <= self.prompt) and (self.total is None or tokens + after <= self.total)

    def without(self, tokens: int) -> Room:
        return self if self.total is None else replace(self, total=self.total - tokens)


@dataclass(frozen=True)
class Outcome:
    """calls: the tokens of each prompt; state: what was known in the end."""

    answer: str
    state: State
    calls: tuple[int, ...]
    ended: Ended


def drag(reader: Reader, state: State) -> Outcome:
    """One call with what was retrieved for the question."""
    return Outcome(reader.ask(state, ())[1], state, (reader.count(state),), "one call")


def iterdrag(
    reader: Reader, state: State, search: Callable[[str, State], Sequence[Used]], room: Room, rounds: int, longest: int
) -> Outcome:
    """search   a sub-question and what is known -> more chunks for it, best first, none of those that are known.
    longest  tokens of an intermediate answer, at most.

    `state` has to fit into the room. As many of the chunks of a sub-question are read as the budget allows.
    """
    calls: list[int] = []

    def call(now: State, *beginnings: str) -> tuple[str, str]:
        nonlocal room
        tokens = reader.count(now)
        assert room.fits(tokens)
        calls.append(tokens)
        room = room.without(tokens)
        return reader.ask(now, beginnings)

    def affordable(now: State) -> bool:
        """Whether the intermediate answer can be asked for, and afterwards the final one: with it, or as if the sub-question had not been."""
        tokens = reader.count(now)
        return room.fits(tokens, max(tokens + longest, reader.count(state)))

    def asking(question: str) -> State | None:
        """What is known with a sub-question and as many chunks for it as can be afforded."""
        more = tuple(search(question, state))
        states = [replace(state, used=state.used + more[:n], open=question) for n in range(len(more) + 1)]
        n = most(len(more), lambda n: affordable(states[n]))
        return None if n is None else states[n]

    ended: Ended = "rounds"
    while len(state.steps) < rounds:
        tokens = reader.count(state)
        if not room.fits(tokens, tokens):
            ended = "budget"
            break
        word, text = call(state, FOLLOW_UP, FINAL)
        if word == FINAL:
            return Outcome(text, state, tuple(calls), "by itself")
        if not text:
            ended = "no question"
            break
        if (asked := asking(text)) is None:
            ended = "budget"
            break
        _, answer = call(asked, INTERMEDIATE)
        closed = State(asked.used, (*state.steps, Step(text, answer)))
        if not room.fits(reader.count(closed)):
            ended = "budget"
            break
        state = closed
    return Outcome(call(state, FINAL)[1], state, tuple(calls), ended)


def most(n: int, fits: Callable[[int], bool]) -> int | None:
    """The largest of 0 .. n that fits; None if not even 0 does. If one fits, so do those below it: it is found by doubling and then by halves, so that nothing
    is tried that is far larger than what fits."""
    low, high, step = -1, n + 1, 1  # low fits, high does not
    while high - low > 1:
        tried = min(low + step, (low + high) // 2 if high <= n else n)
        if fits(tried):
            low, step = tried, 2 * step
        else:
            high = tried
    return None if low < 0 else low
