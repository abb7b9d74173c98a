"""Eviction: a cache of a fixed number of tokens, of which some leave before a turn comes. Those that stay are renumbered: an index is a place in the cache.

Knows the scores of tokens; not keys, layers or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch

ALONE = 32  # tokens that come one by one, and are a turn where nobody has announced one: tokens are evicted once for all of them


class Eviction(ABC):
    """Which tokens stay. A frozen dataclass in the file of its method; pure functions of scores.

    most   tokens that a cache holds.
    turn   tokens of a turn at most, where a text is read that is no turn by itself.
    """

    @property
    @abstractmethod
    def most(self) -> int: ...

    @property
    def turn(self) -> int:
        return max(1, self.most // 4)

    @abstractmethod
    def before(self, tokens: int, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Before a turn of `tokens` tokens, of scores [n] of the tokens that are held -> (which of them stay, ascending, at most `most - tokens`; their
        scores in this turn). Raises ValueError where a turn is too long."""

    @abstractmethod
    def after(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Scores [m] fp32 of the new tokens ids[1:], logits [m, V] being those of the token before each: ids [m + 1]."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What is known of the tokens that a row holds.

    values    [n] fp32 on the CPU.
    last      [k] the tokens of the last forward, the last few of them, and `logits` [k, V], which predict what follows each: some may be cropped.
    first     where the turn under way began, and `until` where it ends.
    told      whether somebody has announced it.
    coming    the turns after it that somebody has announced.
    floor     tokens that no crop reaches: they stayed when others left.
    """

    values: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    last: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    first: int = 0
    until: int = 0
    told: bool = False
    coming: tuple[int, ...] = ()
    floor: int = 0

    def cut(self, length: int) -> Scores:
        """Of the first `length` tokens: those behind them were cropped."""
        if length == len(self.values):
            return self
        until, gone = self.until if self.first <= length else length, len(self.values) - length
        last, logits = (None if x is None or len(x) <= gone else x[: len(x) - gone] for x in (self.last, self.logits))
        return replace(self, values=self.values[:length], last=last, logits=logits, first=min(self.first, length), until=until)

    def goes_on(self, tokens: int) -> bool:
        """Whether so many new tokens are of the turn under way."""
        return len(self.values) + tokens <= self.until and (self.told or tokens == 1)

    def read(self, ids: torch.Tensor, logits: torch.Tensor, eviction: Eviction) -> Scores:
        """After new tokens ids [m] with their logits [m, V]. The first token of a turn gets the maximum of the others, for its own turn does not predict it; a
        token that is alone so far, what it has by what came before, or nothing where that was cropped.

        Raises ValueError where the model gives NaN.
        """
        if self.last is None or self.logits is None:
            new = torch.cat([torch.zeros(1), eviction.after(ids, logits[:-1])])
        else:
            new = eviction.after(torch.cat([self.last[-1:], ids]), torch.cat([self.logits[-1:], logits[:-1]]))
        if bool(new.isnan().any()):  # infinity is a token that the model rules out
            raise ValueError(
                "the model gives NaN for a token, so there is no score to keep it by; load it in another dtype (float32, or bfloat16 where float16 overflows), "
                "or check its weights"
            )
        values = torch.cat([self.values, new])
        if self.first + 1 < len(values):
            values[self.first] = values[self.first + 1 :].max()
        return replace(self, values=values, last=ids[-ALONE:].clone(), logits=logits[-ALONE:].clone())


def begin(scores: Scores, tokens: int, eviction: Eviction) -> tuple[Scores, torch.Tensor | None]:
    """Before `tokens` new tokens -> (the scores to go on with, which tokens stay; None: all)."""
    if scores.goes_on(tokens):
        return scores, None
    told, room = bool(scores.coming), eviction.most - len(scores.values)
    alone = min(ALONE, eviction.turn, room if room > 0 else eviction.most)  # nothing has to leave while there is room
    length = max(tokens, scores.coming[0]) if told else alone if tokens == 1 else tokens
    keep, values = eviction.before(length, scores.values)
    left = len(keep) < len(scores.values)
    floor, first = len(keep) if left else scores.floor, len(keep)
    return replace(scores, values=values, first=first, until=first + length, told=told, coming=scores.coming[1:], floor=floor), keep if left else None
