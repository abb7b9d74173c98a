"""How many tokens of prompts a forward may read, so that it takes no longer than asked. It is learnt from the seconds that forwards took.

Knows numbers; no clock, models or memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

FIRST = 32  # tokens, while nothing is known
LEAST = 16  # a forward reads so many however long it takes, so that every prompt comes to its end
BAND, STEP = 256, math.sqrt(2)  # depths from 0 to 256 cost about the same, and from there those up to 1.4 times as deep
WEIGHT = 0.5  # of what was measured last


@dataclass
class Pace:
    """seconds  that a forward should take at most.

    A token that is read at depth n, behind n others, costs a share of the model and what attention reads of these n: more with every token for most methods,
    and the same from some depth on for bounded ones. So the cost per token is kept by bands of depth. A band that was not reached yet is taken to cost as
    much more than the last one as it is deeper, which is the most that attention can make of it.
    """

    seconds: float
    decoding: float = 0.0  # seconds of a forward that only decodes
    rates: dict[int, float] = field(default_factory=dict)  # seconds per token, by band

    @property
    def left(self) -> float:
        """Seconds of a forward that are for reading."""
        return max(0.0, self.seconds - self.decoding)

    def rate(self, depth: int) -> float | None:
        """Seconds per token at a depth; None while nothing is known."""
        band = _band(depth)
        if band in self.rates:
            return self.rates[band]
        if below := [known for known in self.rates if known < band]:
            return self.rates[max(below)] * STEP ** (band - max(below))
        return min(((known, rate) for known, rate in self.rates.items()), default=(0, None))[1]

    def tokens(self, depth: int, seconds: float) -> int:
        """How many tokens can be read from a depth on in so many seconds, each at what one costs where they end: they become deeper on the way."""
        if not (rate := self.rate(depth)):
            return FIRST
        return int(seconds / (self.rate(depth + int(seconds / rate)) or rate))

    def learn(self, seconds: float, reads: Sequence[tuple[int, int]], decoded: int) -> None:
        """A forward took so long, with (depth, tokens) of prompts, and so many rows that decode."""
        if not reads:
            self.decoding = seconds if not self.decoding else (1 - WEIGHT) * self.decoding + WEIGHT * seconds
            return
        spent = max(seconds - (self.decoding if decoded else 0.0), 0.1 * seconds)
        expected = sum(tokens * (self.rate(depth) or 1.0) for depth, tokens in reads)
        for depth, _ in reads:
            measured = (self.rate(depth) or 1.0) * spent / expected
            known = self.rates.get(_band(depth))
            self.rates[_band(depth)] = measured if known is None else (1 - WEIGHT) * known + WEIGHT * measured


def _band(depth: int) -> int:
    return 0 if depth < BAND else 1 + int(math.log(depth / BAND, STEP) + 1e-9)
