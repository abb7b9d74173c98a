"""How sure a mean is: intervals of 95 % for one run, and tests for two runs on the same samples.

Knows numbers only. SciPy's intervals and tests differ from these in their last digits, and it would be a large dependency of every run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054
RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True)
class Mean:
    """A mean of `n` values with the ends of its 95 % interval: Wilson's where every value is 0 or 1, else a bootstrap."""

    value: float
    n: int
    low: float
    high: float


def is_binary(values: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in values)


def mean(values: Sequence[float]) -> Mean:
    if not values:
        raise ValueError("there is no mean of no values")
    average = math.fsum(values) / len(values)
    low, high = wilson(round(math.fsum(values)), len(values)) if is_binary(values) else bootstrap(values)
    return Mean(average, len(values), min(low, average), max(high, average))


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Wilson's interval of a share; of effective numbers, which need not be whole, too."""
    share, z2 = successes / n, Z95**2
    centre, half = share + z2 / (2 * n), Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the means of 1000 resamples, drawn with a fixed seed."""
    drawn = np.random.default_rng(SEED)
    data = np.asarray(values, dtype=np.float64)
    means = [data[drawn.integers(0, len(data), len(data))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """The same samples under A and B. `difference` is B - A, with the 95 % interval of a paired bootstrap.

    only_a, only_b  samples that only one of them got right, and `p` of McNemar's exact test on them; None where scores are not 0 or 1.
    """

    n: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    only_a: int | None
    only_b: int | None
    p: float | None


def compare(a: Sequence[float], b: Sequence[float]) -> Comparison:
    if len(a) != len(b) or not a:
        raise ValueError(f"a paired comparison needs the same samples twice, not {len(a)} and {len(b)}")
    differences = [y - x for x, y in zip(a, b)]
    low, high = bootstrap(differences)
    only_a = only_b = p = None
    if is_binary(a) and is_binary(b):
        only_a, only_b = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
        p = mcnemar(only_a, only_b)
    n = len(a)
    return Comparison(n, math.fsum(a) / n, math.fsum(b) / n, math.fsum(differences) / n, low, high, only_a, only_b, p)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided probability of so uneven a split of the samples on which two methods disagree, if both were equally good."""
    n = only_a + only_b
    term = tail = 1  # n over k, and the sum up to k
    dropped = 0  # low bits of both: hundreds of leading bits are kept, and integers of n bits would make this quadratic
    for k in range(min(only_a, only_b)):
        term = term * (n - k) // (k + 1)
        tail += term
        if term.bit_length() > 512:
            term, tail, dropped = term >> 256, tail >> 256, dropped + 256
    return float(min(1.0, (tail << (dropped + 1)) / (1 << n)))
