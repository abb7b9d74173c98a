"""An n-gram model of a given size, to put a loss into perspective. Knows arrays of token ids below 2048; no text, no network.

Interpolated absolute discounting over the n-grams that are kept:

    p_n(w | h) = [kept] (c(h w) - D) / c(h) + rest(h) * p_{n-1}(w | h'),      p_0 = 1 / V

c counts occurrences in the whole text, h' is h without its first token, and rest(h) is what the kept n-grams leave of one. Rare
n-grams are left out until the kept ones fit the given number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BITS = 11  # a token id of a vocabulary of at most 2048; five of them fit into 64 bits


@dataclass
class Order:
    """The kept n-grams of one order, sorted, with what the formula needs of them and of their contexts."""

    grams: np.ndarray  # uint64
    counts: np.ndarray
    contexts: np.ndarray  # uint64, sorted
    totals: np.ndarray  # c(h)
    rest: np.ndarray  # rest(h)


def pack(tokens: np.ndarray, n: int) -> np.ndarray:
    """[T - n + 1] all n-grams as integers, the last token in the lowest bits."""
    packed = np.zeros(len(tokens) - n + 1, dtype=np.uint64)
    for k in range(n):
        packed = (packed << np.uint64(BITS)) | tokens[k : len(tokens) - n + 1 + k].astype(np.uint64)
    return packed


class NGram:
    def __init__(self, tokens: np.ndarray, largest: int, vocabulary: int, most: int, discount: float = 0.75) -> None:
        """most  n-grams to keep, of all orders together."""
        assert vocabulary <= 1 << BITS and largest * BITS <= 64
        self.vocabulary, self.discount = vocabulary, discount
        counted = [np.unique(pack(tokens, n), return_counts=True) for n in range(1, largest + 1)]
        least = next(k for k in range(1, 10**6) if sum(int((c >= (k if n else 1)).sum()) for n, (_, c) in enumerate(counted)) <= most)
        self.least = least
        self.orders = [self._order(g, c, least if n else 1) for n, (g, c) in enumerate(counted)]

    def _order(self, grams: np.ndarray, counts: np.ndarray, least: int) -> Order:
        all_contexts, first = np.unique(grams >> np.uint64(BITS), return_index=True)
        all_totals = np.add.reduceat(counts, first)
        grams, counts = grams[counts >= least], counts[counts >= least]
        contexts, first = np.unique(grams >> np.uint64(BITS), return_index=True)
        totals = all_totals[np.searchsorted(all_contexts, contexts)]
        kept = np.add.reduceat(counts - self.discount, first) if len(first) else counts
        return Order(grams, counts, contexts, totals, 1 - kept / totals)

    @property
    def size(self) -> int:
        return sum(len(order.grams) for order in self.orders)

    def losses(self, tokens: np.ndarray) -> np.ndarray:
        """Nats for every token; the first ones use the contexts that they have."""
        p = np.full(len(tokens), 1.0 / self.vocabulary)
        for n, order in enumerate(self.orders, start=1):
            if len(tokens) < n or not len(order.grams):
                continue
            grams = pack(tokens, n)
            here = p[n - 1 :]
            at, seen = _find(order.contexts, grams >> np.uint64(BITS))
            total, rest = order.totals[at], order.rest[at]
            at, known = _find(order.grams, grams)
            mixed = np.where(known, order.counts[at] - self.discount, 0.0) / total + rest * here
            p[n - 1 :] = np.where(seen, mixed, here)
        return -np.log(p)


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return at, table[at] == keys
