"""The published cost models, as formulas in explicit units: bytes, FLOP, seconds. GB is 1e9 bytes, GiB 2**30.

Peak performance of a transformer that serves long contexts (arXiv 2405.08944): concurrency is bound by memory size, prefill by FLOP/s,
decoding by memory bandwidth, the switch to another user by the host link. SpeContext's memory model (arXiv 2512.00722): how many layers'
keys and values have to leave the card at which length. All assume the hardware's peak, so they are bounds, not predictions: timing.py predicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

GB, GIB = 10**9, 2**30
AttentionCost = Literal["causal", "figures", "none"]


@dataclass(frozen=True)
class Term:
    """One quantity of a cost model: its formula with the numbers in it, and its value."""

    name: str
    value: float
    unit: str
    formula: str


# -- peak performance ---------------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(layers: int, kv_heads: int, head_dim: int, itemsize: float) -> float:
    """2 L n_kv D b."""
    return 2 * layers * kv_heads * head_dim * itemsize


def concurrency(memory: float, weights: float, kv: float) -> int:
    """floor((M - P b) / K): users whose keys and values fit beside the weights."""
    return max(0, math.floor((memory - weights) / kv))


def prefill_flop(parameters: float, tokens: int, layers: int, width: int, attention: AttentionCost = "causal") -> float:
    """2 P T + A.

    "causal"   A = 2 L T^2 (n_heads D): multiply and add, scores and values, half of all pairs.
    "figures"  A = L T^2 d, half of that: what the paper's own figures fit.
    "none"     no attention at all.
    """
    pairs = {"causal": 2.0, "figures": 1.0, "none": 0.0}[attention]
    return 2 * parameters * tokens + pairs * layers * tokens**2 * width


def incremental_flop(parameters: float, tokens: int, before: int, layers: int, width: int) -> float:
    """[2 P q + 4 L (n_heads D) q (T + q / 2)]: q more tokens after T, causal."""
    return 2 * parameters * tokens + 4 * layers * width * tokens * (before + tokens / 2)


def decode_seconds(weights: float, kv: float, tokens: int, bandwidth: float) -> float:
    """n (P b + sum K) / B: every token reads the weights once and the keys and values of all users of the batch."""
    return tokens * (weights + kv) / bandwidth


def switch_seconds(kv_out: float, kv_in: float, link: float) -> float:
    """(K_out + K_in) / B_link: one user leaves for host memory, another comes back."""
    return (kv_out + kv_in) / link


def critical_tokens(flops: float, bandwidth: float, itemsize: float) -> float:
    """F / B * b / 2: with more tokens than this per read of the weights, compute binds; with fewer, bandwidth."""
    return flops / bandwidth * itemsize / 2


def distinct_experts(experts: int, per_token: int, tokens: int) -> float:
    """E (1 - (1 - k/E)^n): experts of a layer that n tokens are expected to meet, if they choose independently."""
    return experts * (1 - (1 - per_token / experts) ** tokens)


def kv_heads_per_device(kv_heads: int, devices: int) -> int:
    """ceil(n_kv / N): beyond n_kv devices, heads are kept twice."""
    return -(-kv_heads // devices)


def all_reduce_seconds(tokens: int, width: int, itemsize: float, devices: int, link: float, layers: int, latency: float = 0.0) -> float:
    """Two all-reduces per layer, each 2 (N - 1) / N * tokens * d * b over the link."""
    return 0.0 if devices == 1 else 2 * layers * (2 * (devices - 1) / devices * tokens * width * itemsize / link + latency)


def turns_per_second(busy: float, idle: float, residents: int) -> float:
    """min(1 / t_busy, c / (t_busy + t_idle)): turns of c users who read for t_idle between two of them."""
    return min(1 / busy, residents / (busy + idle))


def break_even_bandwidth(nbytes: float, prefill: float, decode: float) -> float | None:
    """Bytes per second above which fetching stored keys and values beats reading the text again; None if decoding alone takes longer."""
    return nbytes / (prefill - decode) if prefill > decode else None


# -- SpeContext's memory model ------------------------------------------------------------------------------------------------------

RUNTIME = 1.3  # weights and 30 % for buffers of the runtime


@dataclass(frozen=True)
class SpeContext:
    """Memory of a model whose layers' keys and values may lie on the host but for a budget of `budget` tokens each.

    All sizes in bytes; `entry` is that of one token's keys and values in one layer (4 H D in half precision); `repeats` the query heads per
    key head, for whose copies the model reserves room; `draft` the weights of the retrieval head (0: none).
    The printed algorithm lacks the factor 4 before the budget term; the equation of the split needs it, and so it is here.
    """

    weights: float
    layers: int
    entry: float
    repeats: float
    memory: float
    budget: int = 2048
    draft: float = 0.0
    requests: int = 1

    def split(self, tokens: int, on_host: int) -> float:
        """1.3 (M_O + M_D) + R [(L_gpu + 1 + a) S + L_cpu B] e."""
        resident = self.layers - on_host + 1 + self.repeats
        return RUNTIME * (self.weights + self.draft) + self.requests * self.entry * (resident * tokens + on_host * self.budget)

    def threshold(self, on_host: int) -> int:
        """The largest length at which it fits with that many layers on the host; 0 if none does."""
        room = self.memory - self.split(0, on_host)
        return max(0, math.floor(room / (self.requests * self.entry * (self.layers - on_host + 1 + self.repeats))))

    def thresholds(self) -> list[int]:
        return [self.threshold(i) for i in range(self.layers + 1)]

    def layers_on_host(self, tokens: int) -> int | None:
        """How many layers have to leave for `tokens` to fit; None if all of them are not enough."""
        return next((i for i in range(self.layers + 1) if tokens <= self.threshold(i)), None)
