"""How many tokens of prompts a forward may read, so that it takes no longer than asked. It is learnt from the seconds that forwards took.

Knows numbers; no clock, models or memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

FIRST = 32  # tokens, while nothing is known
LEAST = 16  # a forward reads so many however long it takes, so that every prompt comes to its end
BAND, STEP = 256, math.sqrt(2)  # one thing is known of depths from 0 to 256, and from there of those up to 1.4 times as deep
WEIGHT = 0.5  # of what was measured last


@dataclass(frozen=True)
class Known:
    """What a token costs at a depth, in seconds."""

    depth: float
    rate: float


@dataclass
class Pace:
    """seconds  that a forward should take at most.

    A token that is read at depth n, behind n others, costs a share of the model and what attention reads of these n: a line a + b n for most methods, and the
    same from some depth on for bounded ones. So the cost per token is kept by bands of depth, each with the depth that it was measured at. Between two of them
    it lies on the line through both, and so it does behind the deepest, which is where the next chunk of the longest prompt is read. While there is no second
    one far enough from it, a token is taken to cost as much more as it is deeper, which is the most that attention can make of it.
    """

    seconds: float
    decoding: float = 0.0  # seconds of a forward that only decodes
    known: dict[int, Known] = field(default_factory=dict)  # by band

    @property
    def left(self) -> float:
        """Seconds of a forward that are for reading."""
        return max(0.0, self.seconds - self.decoding)

    def rate(self, depth: float) -> float | None:
        """Seconds per token at a depth; None while nothing is known."""
        points = sorted(self.known.values(), key=lambda known: known.depth)
        below = [known for known in points if known.depth <= depth]
        if not points or not below:
            return points[0].rate if points else None
        last = below[-1]
        if len(below) < len(points):
            after = points[len(below)]
            return last.rate + (after.rate - last.rate) * (depth - last.depth) / (after.depth - last.depth)
        most = last.rate / max(last.depth, BAND)
        apart = [known for known in below if known.depth * STEP <= last.depth]  # what lies nearer says more of noise than of a slope
        slope = (last.rate - apart[-1].rate) / (last.depth - apart[-1].depth) if apart else most
        return last.rate + min(most, max(0.0, slope)) * (depth - last.depth)

    def cost(self, depth: int, tokens: int) -> float:
        """Seconds for so many tokens from a depth on; 0 while nothing is known."""
        return tokens * (self.rate(depth + tokens / 2) or 0.0)

    def tokens(self, depth: int, seconds: float) -> int:
        """How many tokens can be read from a depth on in so many seconds, each at what one costs where they end: they become deeper on the way."""
        if not (rate := self.rate(depth)):
            return FIRST
        return int(seconds / (self.rate(depth + seconds / rate) or rate))

    def learn(self, seconds: float, reads: Sequence[tuple[int, int]], decoded: int) -> None:
        """A forward took so long, with (depth, tokens) of prompts, and so many rows that decode."""
        if not reads:
            self.decoding = seconds if not self.decoding else (1 - WEIGHT) * self.decoding + WEIGHT * seconds
            return
        spent = max(seconds - (self.decoding if decoded else 0.0), 0.1 * seconds)
        middles = [(depth + tokens / 2, tokens) for depth, tokens in reads]
        rates = [self.rate(middle) or 1.0 for middle, _ in middles]
        times = spent / sum(tokens * rate for (_, tokens), rate in zip(middles, rates))
        for (middle, _), rate in zip(middles, rates):
            before = self.known.get(_band(middle), Known(middle, times * rate))
            self.known[_band(middle)] = Known(_mean(before.depth, middle), _mean(before.rate, times * rate))


def _mean(before: float, now: float) -> float:
    return (1 - WEIGHT) * before + WEIGHT * now


def _band(depth: float) -> int:
    return 0 if depth < BAND else 1 + int(math.log(depth / BAND, STEP) + 1e-9)
