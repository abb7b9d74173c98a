"""Groups of tokens that grow along a text by a logistic function, counted from its first token.

Knows integers only: no tensors, no models. Group k = 0, 1, 2, ... has

    size(k) = max(1, floor(C / (1 + (C - 1) exp(-r k))))

tokens, with r = `growth` >= 0 and C = `ceiling` >= 1: one token at first, C - 1 in the end (C itself is never reached). There are at most C - 1
different sizes, so a short table holds all groups, however long the text.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache
from typing import NamedTuple

END = 2**53  # no text has so many tokens, and every integer below is exact in fp64


class Run(NamedTuple):
    """Neighbouring groups of one size: the first of their tokens, the number of the first of them, and the tokens of each."""

    first: int
    group: int
    size: int


def size(growth: float, ceiling: int, group: int) -> int:
    """Tokens of one group. The division rounds up to C where exp(-r k) vanishes beside 1; the true quotient stays below it."""
    return max(1, min(ceiling - 1, math.floor(ceiling / (1 + (ceiling - 1) * math.exp(-growth * group)))))


@lru_cache(maxsize=64)
def runs(growth: float, ceiling: int) -> tuple[Run, ...]:
    """All groups, in order; the last run has no end."""
    found = [Run(0, 0, size(growth, ceiling, 0))]
    while found[-1].size < ceiling - 1:
        first, group, tokens = found[-1]
        larger = bisect_right(range(END), tokens, lo=group, key=lambda k: size(growth, ceiling, k))  # the first group that has more
        first += (larger - group) * tokens
        if first >= END:
            break
        found.append(Run(first, larger, size(growth, ceiling, larger)))
    return tuple(found)


def group_of(growth: float, ceiling: int, index: int) -> int:
    """The number of the group that holds a token."""
    table = runs(growth, ceiling)
    run = table[bisect_right(table, index, key=lambda run: run.first) - 1]
    return run.group + (index - run.first) // run.size


def tokens_before(growth: float, ceiling: int, group: int) -> int:
    """Tokens in the groups 0 .. group - 1, which is the first index of `group`."""
    table = runs(growth, ceiling)
    run = table[bisect_right(table, group, key=lambda run: run.group) - 1]
    return run.first + (group - run.group) * run.size
