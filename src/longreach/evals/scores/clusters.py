"""Shares and paired comparisons of answers that come in clusters: several questions about one document are not independent.

Knows numbers only. With answers that agree inside a document more than between documents, n answers tell as much as n / deff independent ones, where

    deff = 1 + (m - 1) rho        m: answers in a document (their mean number), rho: intra-class correlation    (Kish 1965)

rho is estimated from the variance between documents (the estimator of the analysis of variance). Few documents tell little about it, so that the estimate is
averaged with PRIOR, which weighs as much as PRIOR_DOCUMENTS of them; one document alone has the prior. Then the usual interval and test are made with n / deff.

Where answers count differently, shares and differences are weighted means, and deff is multiplied by n sum(w^2) / (sum w)^2 (Kish, as above).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from longreach.evals.scores import statistics

PRIOR, PRIOR_DOCUMENTS = 0.2, 4
Groups = Sequence[Sequence[float]]  # the scores of every document, or their weights


@dataclass(frozen=True)
class Share:
    """The mean of `n` scores in 0..1 over `documents`, weighted, with Wilson's 95 % interval for n / deff independent ones. `found` is their plain sum."""

    value: float
    found: float
    n: int
    documents: int
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """B - A on the same questions: `only_a` and `only_b` are what one of them has more than the other, weighted, `p` is McNemar's exact test of both / deff."""

    difference: float
    only_a: float
    only_b: float
    n: int
    documents: int
    p: float


def share(groups: Groups, weights: Groups | None = None) -> Share:
    """`weights` of the answers, above 0; None: all count the same. Raises ValueError where there are no answers."""
    scores = [score for group in groups for score in group]
    if not scores:
        raise ValueError("there is no share of no answers")
    counts, n = _scaled(scores, weights), len(scores)
    value = min(1.0, math.fsum(count * score for count, score in zip(counts, scores, strict=True)) / n)
    effective = n / (design_effect(groups) * _unequal(counts))
    low, high = statistics.wilson(value * effective, effective)
    return Share(value, math.fsum(scores), n, len(groups), low, high)


def compare(a: Groups, b: Groups, weights: Groups | None = None) -> Paired:
    """`weights` as in `share`. Raises ValueError where the two are not answers to the same questions."""
    if [len(group) for group in a] != [len(group) for group in b] or not any(a):
        raise ValueError("a paired comparison needs the answers to the same questions twice")
    differences = [[y - x for x, y in zip(one, other)] for one, other in zip(a, b)]
    plain = [d for group in differences for d in group]
    counts = _scaled(plain, weights)
    every = [count * d for count, d in zip(counts, plain, strict=True)]
    effect = design_effect(differences) * _unequal(counts)
    less, more = math.fsum(-d for d in every if d < 0), math.fsum(d for d in every if d > 0)
    return Paired(math.fsum(every) / len(every), less, more, len(every), len(differences), statistics.mcnemar(less, more, effect))


def grouped(values: Sequence[float], documents: Sequence[str]) -> Groups:
    """Values by the document of each, in the order in which documents come first."""
    found: dict[str, list[float]] = {}
    for value, document in zip(values, documents, strict=True):
        found.setdefault(document, []).append(value)
    return [*found.values()]


def _scaled(answers: Sequence[float], weights: Groups | None) -> list[float]:
    """The weights, with a mean of 1."""
    flat = [1.0] * len(answers) if weights is None else [weight for group in weights for weight in group]
    mean = math.fsum(flat) / len(flat)
    return [weight / mean for weight in flat]


def _unequal(counts: Sequence[float]) -> float:
    """How many times fewer answers of the same weight would tell as much."""
    return math.fsum(count * count for count in counts) / len(counts)


def design_effect(groups: Groups) -> float:
    """deff >= 1; 1 where every document has one answer."""
    sizes = [len(group) for group in groups if len(group)]
    return 1 + (sum(sizes) / len(sizes) - 1) * correlation(groups)


def correlation(groups: Groups) -> float:
    """rho in 0..1: (MSB - MSW) / (MSB + (m0 - 1) MSW) from the mean squares between and within documents, averaged with the prior."""
    kept = [group for group in groups if len(group)]
    k, n = len(kept), sum(len(group) for group in kept)
    if k < 2 or n <= k:
        return PRIOR
    grand = math.fsum(score for group in kept for score in group) / n
    means = [math.fsum(group) / len(group) for group in kept]
    between = math.fsum(len(group) * (mean - grand) ** 2 for group, mean in zip(kept, means)) / (k - 1)
    within = math.fsum((score - mean) ** 2 for group, mean in zip(kept, means) for score in group) / (n - k)
    size = (n - sum(len(group) ** 2 for group in kept) / n) / (k - 1)
    whole = between + (size - 1) * within
    estimate = min(1.0, max(0.0, (between - within) / whole)) if whole > 0 else PRIOR  # all alike: nothing to learn it from
    return (PRIOR * PRIOR_DOCUMENTS + estimate * (k - 1)) / (PRIOR_DOCUMENTS + k - 1)
