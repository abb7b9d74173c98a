"""How sure a mean is: intervals of 95 % for one run, and tests for two runs on the same samples.

`effect`, here and below, is the design effect of values that come in clusters (`clusters.design_effect`), 1 of independent ones: intervals and tests are
those of n / effect values.

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


def mean(values: Sequence[float], effect: float = 1.0) -> Mean:
    if not values:
        raise ValueError("there is no mean of no values")
    total, n = math.fsum(values), len(values)
    average = total / n
    low, high = wilson(round(total) / effect, n / effect) if is_binary(values) else bootstrap(values, effect)
    return Mean(average, n, min(low, average), max(high, average))


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Wilson's interval of a share; of effective numbers, which need not be whole, too."""
    share, z2 = successes / n, Z95**2
    centre, half = share + z2 / (2 * n), Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


def bootstrap(values: Sequence[float], effect: float = 1.0) -> tuple[float, float]:
    """The middle 95 % of the means of 1000 resamples, drawn with a fixed seed, of n / effect values each, rounded down to one at least."""
    drawn = np.random.default_rng(SEED)
    data = np.asarray(values, dtype=np.float64)
    size = max(1, math.floor(len(data) / effect + 1e-9))
    means = [data[drawn.integers(0, len(data), size)].mean() for _ in range(RESAMPLES)]
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


def compare(a: Sequence[float], b: Sequence[float], effect: float = 1.0) -> Comparison:
    """`effect`: that of the differences."""
    if len(a) != len(b) or not a:
        raise ValueError(f"a paired comparison needs the same samples twice, not {len(a)} and {len(b)}")
    differences = [y - x for x, y in zip(a, b)]
    low, high = bootstrap(differences, effect)
    only_a = only_b = p = None
    if is_binary(a) and is_binary(b):
        only_a, only_b = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
        p = mcnemar(only_a, only_b, effect)
    n = len(a)
    return Comparison(n, math.fsum(a) / n, math.fsum(b) / n, math.fsum(differences) / n, low, high, only_a, only_b, p)


def mcnemar(only_a: float, only_b: float, effect: float = 1.0) -> float:
    """The exact two-sided probability of so uneven a split of the samples on which two methods disagree, if both were equally good.

    The test wants whole numbers: of both / effect the smaller one is rounded up and the larger one down, so that rounding makes nobody surer.
    """
    small, large = sorted((only_a / effect, only_b / effect))
    fewer, more = math.ceil(small - 1e-9), math.floor(large + 1e-9)
    n = fewer + more
    term = tail = 1  # n over k, and the sum up to k
    dropped = 0  # low bits of both: hundreds of leading bits are kept, and integers of n bits would make this quadratic
    for k in range(min(fewer, more)):
        term = term * (n - k) // (k + 1)
        tail += term
        if term.bit_length() > 512:
            term, tail, dropped = term >> 256, tail >> 256, dropped + 256
    return float(min(1.0, (tail << (dropped + 1)) / (1 << n)))
