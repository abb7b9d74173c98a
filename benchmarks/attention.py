"""Attention of one layer: Longreach against stock, prefill and decode, timed in the same run behind an exactness gate.

    python benchmarks/attention.py [--case all|selfextend-prefill|...] [--dtype fp32,bf16] [--repeats R] [--device cpu|cuda] [--out FILE] [--quick]

Ours is the whole path that a model's layer takes: plan, rotation tables, rotation of queries and keys, storing, every segment, the
merge and the model's output layout. The baselines are
  sdpa          F.scaled_dot_product_attention(is_causal=True) on rotated, contiguous q, k, v: no rotary, no cache;
  sdpa+rotary   the same after stock rotary in the model's dtype;
  preallocated  decode: write one key into a cache that is large enough, then SDPA over it, with native GQA or expanded heads
                (whichever is faster here), no rotary;
  dynamic       decode: Transformers' DynamicCache (concatenation) and its sdpa attention function, no rotary.

A case whose gate fails prints what differs and no ratio, and the exit code is 1. Knows the core of Longreach and, for the last baseline
only, Transformers.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import DTYPES, ROOT, Ratio, Timing, alternate, device_of, facts, one_thread, read_bandwidth, seconds_of, table, write_json

from longreach.core.encodings import Rotary
from longreach.engine import reference
from longreach.engine.batch import Batch
from longreach.engine.executor import execute
from longreach.engine.layer import Inputs, Layer
from longreach.kernels import kernel_for
from longreach.kernels.protocol import Kernel
from longreach.memory.placement import ROLLBACK, SLACK
from longreach.memory.store import Store
from longreach.methods.base import Method
from longreach.methods.lm_infinite import LMInfinite
from longreach.methods.selfextend import SelfExtend

FP32_LIMIT = 1e-5  # largest difference to the dense truth in fp32
ERROR_RATIO = 1.5  # in half precision: our error to the fp64 truth over stock's
GATE_ROWS = 6  # sampled query rows at full length


@dataclass(frozen=True)
class Shape:
    """Heads of one layer."""

    heads: int
    kv_heads: int
    width: int

    @property
    def scale(self) -> float:
        return self.width**-0.5


@dataclass(frozen=True)
class Case:
    """One measurement. `small` is the same method with its windows shrunk to the gate's length."""

    name: str
    kind: str  # prefill or decode
    method: Method
    small: Method
    shape: Shape
    tokens: int
    small_tokens: int
    targets: tuple[tuple[str, float], ...] = ()  # (baseline, largest ratio ours / baseline)


def cases(quick: bool) -> dict[str, Case]:
    """The cases by name; `quick` shrinks lengths and windows by eight and has no targets."""
    cut = 8 if quick else 1
    square, grouped = Shape(8, 8, 64), Shape(32, 8, 128)
    selfextend, infinite = SelfExtend(8, 1024 // cut), LMInfinite(4096 // cut, 10)
    small_selfextend, small_infinite = SelfExtend(8, 96), LMInfinite(160, 10)
    found = [
        Case("selfextend-prefill", "prefill", selfextend, small_selfextend, square, 16384 // cut, 717, (("sdpa", 1.10),)),
        Case("selfextend-decode", "decode", selfextend, small_selfextend, grouped, 32768 // cut, 717, (("preallocated", 1.10), ("dynamic", 0.8))),
        Case("lm-infinite-prefill", "prefill", infinite, small_infinite, square, 32768 // cut, 717, (("sdpa", 1 / 3.5),)),
        Case("lm-infinite-decode", "decode", infinite, small_infinite, grouped, 32768 // cut, 717),
    ]
    if quick:
        found = [Case(c.name, c.kind, c.method, c.small, c.shape, c.tokens, c.small_tokens) for c in found]
    return {case.name: case for case in found}


# ---------------------------------------------------------------- inputs and stock


def rotary_of(shape: Shape) -> Rotary:
    return Rotary(10000.0 ** (-torch.arange(0, shape.width, 2, dtype=torch.float64) / shape.width))


def random_qkv(shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [1, H or G, T, D] in the memory layout of a model's projections ([1, T, H, D], transposed)."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(  # type: ignore[return-value]
        torch.randn(1, tokens, heads, shape.width, generator=generator).to(device, dtype).transpose(1, 2)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )


def stock_tables(shape: Shape, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [1, T, D] as Llama computes them: fp32 angles, cast to the model's dtype."""
    angles = positions.float()[:, None] * rotary_of(shape).inverse_frequencies.float().to(positions.device)[None, :]
    angles = torch.cat((angles, angles), dim=-1)[None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def stock_rotary(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Llama's apply_rotary_pos_emb."""

    def half_turn(x: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

    cos, sin = cos[:, None], sin[:, None]
    return q * cos + half_turn(q) * sin, k * cos + half_turn(k) * sin


def stock_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


# ---------------------------------------------------------------- ours


@dataclass(eq=False)
class Ours:
    """One layer of Longreach and its store."""

    method: Method
    shape: Shape
    kernel: Kernel
    layer: Layer = field(init=False)
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.layer = Layer(0, self.method, rotary_of(self.shape))
        self.clear()

    def clear(self) -> None:
        self.store = Store([self.layer.forms])

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of the next tokens -> [1, T, H, D]."""
        columns = q.shape[2]
        now = Batch.of(1, columns, None, q.device, self.store)
        out = execute(self.layer, now, self.store.layers[0], self.kernel, q, k, v, Inputs(self.shape.scale))
        self.store.advance(None, columns)
        return out

    def fill(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store tokens without attending: what a prefill of them leaves behind."""
        start, count = self.store.seen, k.shape[2]
        now = Batch.of(1, count, None, k.device, self.store)
        rotations = {p: None if self.layer.rotary is None else now.table(self.layer.rotary, p, start, count, k.device) for p in self.layer.forms}
        memory = self.store.layers[0]
        memory.append(slice(0, 1), start, {p: k if rotation is None else rotation.rotate(k) for p, rotation in rotations.items()}, v)
        memory.release()
        self.store.advance(None, count)


# ---------------------------------------------------------------- the gate


@dataclass
class Gate:
    """Differences to the dense truth; `failures` is empty if the case may be timed."""

    measured: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def check(self, name: str, value: float, limit: float) -> None:
        if math.isfinite(value):  # JSON has no NaN
            self.measured[name] = value
        if not value <= limit:
            self.failures.append(f"{name} is {value:.3g}, more than {limit:.3g}")


def plain(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return torch.where(j <= i, (i - j).double(), math.nan)


def sampled_heads(shape: Shape) -> tuple[list[int], list[int]]:
    """The query heads of the first and the last key-value head, and those two: what is compared at full length."""
    groups, chosen = shape.heads // shape.kv_heads, sorted({0, shape.kv_heads - 1})
    return [head * groups + member for head in chosen for member in range(groups)], chosen


def truth(
    distances: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: list[int], shape: Shape
) -> torch.Tensor:
    """The dense fp64 result of some query rows of the sampled heads -> [1, heads, len(rows), D]."""
    heads, kv_heads = sampled_heads(shape)
    q, k, v, outs = q[:, heads], k[:, kv_heads], v[:, kv_heads], []
    with one_thread():
        for row in rows:
            i, j = torch.tensor([[row]], device=q.device), torch.arange(row + 1, device=q.device)[None, :]
            keys, values = k[:, :, : row + 1], v[:, :, : row + 1]
            outs.append(reference.attention(q[:, :, row : row + 1], keys, values, distances(i, j), rotary_of(shape), shape.scale)[0])
    return torch.cat(outs, dim=2)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the difference over that of the truth: comparable between methods that see different numbers of keys."""
    return ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()


def compare(
    gate: Gate, where: str, dtype: torch.dtype, ours: torch.Tensor, want: torch.Tensor, stock: torch.Tensor | None, stock_want: torch.Tensor | None
) -> None:
    """All [1, H, T, D]."""
    if dtype == torch.float32:
        gate.check(f"{where}, fp32, largest difference", (ours.double() - want).abs().max().item(), FP32_LIMIT)
        return
    assert stock is not None and stock_want is not None
    mine, theirs = relative_error(ours, want), relative_error(stock, stock_want)
    gate.check(f"{where}, relative error of stock", theirs, math.inf)
    gate.check(f"{where}, relative error of ours", mine, math.inf)
    gate.check(f"{where}, our error over stock's", mine / theirs, ERROR_RATIO)


def small_gate(case: Case, dtype: torch.dtype, device: torch.device, gate: Gate) -> None:
    """The same heads at a length whose dense truth is cheap: fp32 always, and the timed dtype against stock in that dtype."""
    for kind in dict.fromkeys((torch.float32, dtype)):
        compare(gate, f"{case.small_tokens} tokens", kind, *small_results(case, kind, device))


@functools.cache
def small_results(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Ours, its truth, stock, its truth, all [1, H, rows, D].

    Prefill compares every row. Decode feeds the last tokens one by one and compares those and a few rows before them.
    """
    shape, n = case.shape, case.small_tokens
    first, single = (0, 0) if case.kind == "prefill" else (n - 16, 8)
    rotary, index = rotary_of(shape), torch.arange(n, device=device)
    i, j = index[first:, None], index[None, :]
    q, k, v = random_qkv(shape, n, dtype, device, seed=1)
    ours = Ours(case.small, shape, kernel_for(device, dtype))
    cuts = [0, *range(n - single, n + 1)] if single else [0, n]
    got = torch.cat([ours.forward(*(x[:, :, a:b] for x in (q, k, v))) for a, b in pairwise(cuts)], dim=1).transpose(1, 2)[:, :, first:]
    with one_thread():
        want, _ = reference.attention(q[:, :, first:], k, v, case.small.distances(i, j), rotary, shape.scale)
        if dtype == torch.float32:
            return got, want, None, None
        stock = stock_attention(*stock_rotary(q, k, *stock_tables(shape, index, dtype)), v, causal=True)[:, :, first:]
        stock_want, _ = reference.attention(q[:, :, first:], k, v, plain(i, j), rotary, shape.scale)
    return got, want, stock, stock_want


def sampled_rows(n: int, window: int) -> list[int]:
    """The first row, rows around the window's edge, one in the middle, the last."""
    return sorted({0, window - 1, min(window + 1, n - 1), (n // 2) | 1, n - 2, n - 1})[:GATE_ROWS]


def window_of(method: Method) -> int:
    return method.window if isinstance(method, SelfExtend) else method.n_local  # type: ignore[attr-defined]


# ---------------------------------------------------------------- limits


def pairs_seen(method: Method, n: int) -> int:
    """(query, key) pairs of a causal prefill of `n` tokens that the method shows, per head."""
    if isinstance(method, LMInfinite):
        # Query i sees the last min(i + 1, n_local) keys and those of the first n_global that lie before them.
        near, pinned = method.n_local, method.n_global
        return sum(min(i + 1, near) + min(pinned, max(0, i + 1 - near)) for i in range(n))
    return n * (n + 1) // 2


def decode_bytes(method: Method, n: int, shape: Shape, dtype: torch.dtype) -> int:
    """Key and value bytes that one new token at length `n` has to read."""
    keys = n if not isinstance(method, LMInfinite) else min(n, method.n_local) + min(method.n_global, max(0, n - method.n_local))
    return 2 * keys * shape.kv_heads * shape.width * dtype.itemsize


# ---------------------------------------------------------------- measuring


def measure(case: Case, name: str, rounds: int, device: torch.device, bandwidth: float) -> dict[str, Any]:
    """One case in one dtype -> its JSON entry."""
    dtype, gate = DTYPES[name], Gate()
    small_gate(case, dtype, device, gate)
    entry: dict[str, Any] = {
        "case": case.name,
        "dtype": name,
        "tokens": case.tokens,
        "method": case.method.to_json(),
        "backend": kernel_for(device, dtype).name,
        "heads": case.shape.heads,
        "kv_heads": case.shape.kv_heads,
        "head_size": case.shape.width,
    }
    timings: dict[str, Timing] = {}
    if not gate.failures:
        run = prefill if case.kind == "prefill" else decode
        timings = run(case, dtype, rounds, device, gate, entry)
    entry["gate"] = {"passed": not gate.failures, "measured": gate.measured, "failures": gate.failures}
    if gate.failures:
        return entry
    entry["timings"] = {contestant: timing.to_json() for contestant, timing in timings.items()}
    entry["ratios"] = {baseline: Ratio.of(timings["longreach"], timing).to_json() for baseline, timing in timings.items() if baseline != "longreach"}
    entry["targets"] = {baseline: {"at_most": most, "met": entry["ratios"][baseline]["of_medians"] <= most} for baseline, most in case.targets}
    entry["limit"] = limit_of(case, dtype, timings, bandwidth)
    return entry


def limit_of(case: Case, dtype: torch.dtype, timings: dict[str, Timing], bandwidth: float) -> dict[str, float]:
    """What the case cannot be faster than, and how far from it we are (1 is at the limit).

    Prefill: our pairs at the rate at which stock's causal attention works off its own. Decode: the bytes at this machine's read bandwidth.
    """
    ours = timings["longreach"].median
    if case.kind == "prefill":
        pairs, stock_pairs = pairs_seen(case.method, case.tokens), case.tokens * (case.tokens + 1) // 2
        flops = 4 * pairs * case.shape.heads * case.shape.width
        bound = timings["sdpa"].median * pairs / stock_pairs
        return {
            "pairs_per_head": pairs,
            "stock_pairs_per_head": stock_pairs,
            "flops": flops,
            "flops_per_second": flops / ours,
            "stock_flops_per_second": flops * stock_pairs / pairs / timings["sdpa"].median,
            "bound_seconds": bound,
            "ours_over_bound": ours / bound,
        }
    read = decode_bytes(case.method, case.tokens, case.shape, dtype)
    return {
        "bytes_read": read,
        "bytes_per_second": read / ours,
        "read_bandwidth": bandwidth,
        "bound_seconds": read / bandwidth,
        "ours_over_bound": ours * bandwidth / read,
    }


def prefill(case: Case, dtype: torch.dtype, rounds: int, device: torch.device, gate: Gate, entry: dict[str, Any]) -> dict[str, Timing]:
    shape, n = case.shape, case.tokens
    q, k, v = random_qkv(shape, n, dtype, device)
    index = torch.arange(n, device=device)
    cos, sin = stock_tables(shape, index, dtype)
    ready_q, ready_k = (x.contiguous() for x in stock_rotary(q, k, cos, sin))
    ready_v = v.contiguous()
    ours = Ours(case.method, shape, kernel_for(device, dtype))

    def longreach() -> torch.Tensor:
        ours.clear()
        return ours.forward(q, k, v)

    def sdpa() -> torch.Tensor:
        return stock_attention(ready_q, ready_k, ready_v, causal=True)

    def sdpa_rotary() -> torch.Tensor:
        return stock_attention(*stock_rotary(q, k, *stock_tables(shape, index, dtype)), v, causal=True)

    rows = sampled_rows(n, window_of(case.method))
    heads, _ = sampled_heads(shape)
    got, stock = longreach().transpose(1, 2)[:, heads][:, :, rows], sdpa()[:, heads][:, :, rows]
    want = truth(case.method.distances, q, k, v, rows, shape)
    stock_want = None if dtype == torch.float32 else truth(plain, q, k, v, rows, shape)
    compare(gate, f"{len(rows)} rows of {n} tokens", dtype, got, want, stock, stock_want)
    if gate.failures:
        return {}
    entry["kv_bytes"] = ours.store.nbytes
    return alternate({"longreach": longreach, "sdpa": sdpa, "sdpa+rotary": sdpa_rotary}, rounds, device, warm_up=0)


@dataclass(eq=False)
class Preallocated:
    """Stock attention of one new token over a cache that is already large enough."""

    keys: torch.Tensor  # [1, G, capacity, D]
    values: torch.Tensor
    length: int
    groups: int
    expanded: bool = False  # expand key-value heads before the call, as the sdpa function of Transformers does with a mask

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = self.length
        self.keys[:, :, n : n + 1], self.values[:, :, n : n + 1] = k, v
        self.length = n + 1
        keys, values = self.keys[:, :, : n + 1], self.values[:, :, : n + 1]
        if self.expanded:
            keys, values = (x.repeat_interleave(self.groups, dim=1) for x in (keys, values))
        return stock_attention(q, keys, values, causal=False)

    def choose(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, device: torch.device) -> str:
        """Native GQA or expanded heads: whichever is faster here."""
        seconds = {}
        for expanded in (False, True):
            self.expanded, trials = expanded, []
            for _ in range(4):
                trials.append(seconds_of(lambda: self.forward(q, k, v), device))
                self.length -= 1
            seconds[expanded] = min(trials)
        self.expanded = seconds[True] < seconds[False]
        return "expanded heads" if self.expanded else "native GQA"


class StockModule(torch.nn.Module):
    """What Transformers' attention functions read from a layer."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal, self.layer_idx = groups, True, 0


def decode(case: Case, dtype: torch.dtype, rounds: int, device: torch.device, gate: Gate, entry: dict[str, Any]) -> dict[str, Timing]:
    """One new token after another on a cache of `tokens`; the rounds pass every amortised copy of the store at least once."""
    from transformers import DynamicCache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    shape, n, groups = case.shape, case.tokens, case.shape.heads // case.shape.kv_heads
    q, k, v = random_qkv(shape, n + rounds + 2, dtype, device)
    cos, sin = stock_tables(shape, torch.arange(k.shape[2], device=device), dtype)
    ready_q, ready_k = (x.contiguous() for x in stock_rotary(q, k, cos, sin))
    ready_v = v.contiguous()

    ours = Ours(case.method, shape, kernel_for(device, dtype))
    ours.fill(k[:, :, :n], v[:, :, :n])
    entry["kv_bytes_after_fill"] = ours.store.nbytes
    flat = Preallocated(ready_k.new_zeros(ready_k.shape), ready_v.new_zeros(ready_v.shape), n, groups)
    flat.keys[:, :, :n], flat.values[:, :, :n] = ready_k[:, :, :n], ready_v[:, :, :n]
    entry["preallocated_uses"] = flat.choose(*(x[:, :, n : n + 1] for x in (ready_q, ready_k, ready_v)), device)
    dynamic, module = DynamicCache(), StockModule(groups)
    dynamic.update(ready_k[:, :, :n], ready_v[:, :, :n], 0)

    def longreach() -> torch.Tensor:
        t = slice(ours.store.seen, ours.store.seen + 1)
        return ours.forward(q[:, :, t], k[:, :, t], v[:, :, t])

    def preallocated() -> torch.Tensor:
        t = slice(flat.length, flat.length + 1)
        return flat.forward(ready_q[:, :, t], ready_k[:, :, t], ready_v[:, :, t])

    def stock() -> torch.Tensor:
        t = slice(dynamic.get_seq_length(), dynamic.get_seq_length() + 1)
        keys, values = dynamic.update(ready_k[:, :, t], ready_v[:, :, t], 0)
        return sdpa_attention_forward(module, ready_q[:, :, t], keys, values, attention_mask=None, scaling=shape.scale)[0]

    steps = [(longreach().transpose(1, 2), preallocated(), stock().transpose(1, 2)) for _ in range(2)]
    rows = [n, n + 1]
    got, flat_out, dynamic_out = (torch.cat(parts, dim=2)[:, sampled_heads(shape)[0]] for parts in zip(*steps, strict=True))
    want = truth(case.method.distances, q, k, v, rows, shape)
    stock_want = None if dtype == torch.float32 else truth(plain, q, k, v, rows, shape)
    compare(gate, f"2 tokens at {n}", dtype, got, want, flat_out, stock_want)
    gate.check("the two baselines, largest difference", (flat_out.float() - dynamic_out.float()).abs().max().item(), 1e-5 if dtype == torch.float32 else 2e-2)
    if gate.failures:
        return {}
    timings = alternate({"longreach": longreach, "preallocated": preallocated, "dynamic": stock}, rounds, device, warm_up=0)
    entry["kv_bytes_at_end"] = ours.store.nbytes
    return timings


def kv_bytes(name: str, device: torch.device, quick: bool) -> dict[str, Any]:
    """Bytes that the stores of both methods allocate, against stock and against the closed formula; nothing is timed."""
    dtype, shape, n, cut = DTYPES[name], Shape(8, 8, 64), 32768 // (8 if quick else 1), 8 if quick else 1
    per_token = shape.kv_heads * shape.width * dtype.itemsize  # of one key form, or of the values
    stock = 2 * n * per_token
    entry: dict[str, Any] = {"case": "kv-bytes", "dtype": name, "tokens": n, "stock_bytes": stock, "stores": {}}
    _, k, v = random_qkv(shape, n, dtype, device)
    failures = []
    for method in (LMInfinite(4096 // cut, 10), SelfExtend(8, 1024 // cut)):
        ours = Ours(method, shape, kernel_for(device, dtype))
        ours.fill(k, v)
        if isinstance(method, LMInfinite):
            tail = method.n_local + ROLLBACK + SLACK
            formula = (2 * tail + 2 * method.n_global) * per_token  # rotated ring and values; raw first keys and their values
            bound = stock / ((2 * method.n_local + 2 * method.n_global) * per_token)
        else:
            near = window_of(method) + ROLLBACK + SLACK
            formula = (2 * (n + SLACK) + near) * per_token  # values and grouped keys, with room for SLACK more; near keys
            bound = 1.0
        if ours.store.nbytes != formula:
            failures.append(f"{method}: the store holds {ours.store.nbytes} bytes, the formula says {formula}")
        entry["stores"][method.name] = {
            "method": method.to_json(),
            "bytes": ours.store.nbytes,
            "formula": formula,
            "stock_over_ours": stock / ours.store.nbytes,
            "bound": bound,
            "at_least": 7.5 if isinstance(method, LMInfinite) and not quick else None,
        }
        ours.fill(k[:, :, : SLACK + 1], v[:, :, : SLACK + 1])
        entry["stores"][method.name]["bytes_after_65_more"] = ours.store.nbytes
        entry["stores"][method.name]["bytes_grown_in_chunks_of_512"] = grown(method, shape, k, v)
    entry["gate"] = {"passed": not failures, "measured": {}, "failures": failures}
    return entry


def grown(method: Method, shape: Shape, k: torch.Tensor, v: torch.Tensor, chunk: int = 512) -> int:
    """Bytes of a store that was filled chunk by chunk: growth by half leaves room behind."""
    ours = Ours(method, shape, kernel_for(k.device, k.dtype))
    for start in range(0, k.shape[2], chunk):
        ours.fill(k[:, :, start : start + chunk], v[:, :, start : start + chunk])
    return ours.store.nbytes


# ---------------------------------------------------------------- output


def milliseconds(timing: dict[str, Any]) -> str:
    return f"{timing['median'] * 1e3:.1f} ({timing['min'] * 1e3:.1f}-{timing['max'] * 1e3:.1f})"


def show(entry: dict[str, Any]) -> str:
    title = f"\n{entry['case']}, {entry['dtype']}, {entry['tokens']} tokens"
    if not entry["gate"]["passed"]:
        return "\n  ".join([f"{title}: THE GATE FAILED, nothing is reported", *entry["gate"]["failures"]])
    if entry["case"] == "kv-bytes":
        rows = []
        for name, held in entry["stores"].items():
            fewer = held["stock_over_ours"]
            rows.append([name, f"{held['bytes']:,}", f"{held['formula']:,}", f"{fewer:.3f}", f"{held['bound']:.3f}", _verdict(held["at_least"], fewer, ">=")])
        return table(f"{title}; stock holds {entry['stock_bytes']:,} bytes", ["store", "bytes", "formula", "stock/ours", "bound", "target"], rows)
    rows = []
    for name, timing in entry["timings"].items():
        ratio = entry["ratios"].get(name)
        target = entry["targets"].get(name, {}).get("at_most")
        cells = ["", "", ""]
        if ratio is not None:
            cells = [f"{ratio['of_medians']:.3f}", f"{ratio['pairwise_median']:.3f}", _verdict(target, ratio["of_medians"], "<=")]
        rows.append([name, milliseconds(timing), f"{timing['mean'] * 1e3:.1f}", *cells])
    limit = entry["limit"]
    amount = f"{limit['flops']:.3g} FLOP" if "flops" in limit else f"{limit['bytes_read'] / 1e6:.1f} MB"
    note = f"limit: {amount} take {limit['bound_seconds'] * 1e3:.1f} ms here; ours is {limit['ours_over_bound']:.2f} times that"
    gate = "; ".join(f"{name} {value:.2g}" for name, value in entry["gate"]["measured"].items())
    return table(title, ["", "ms: median (min-max)", "mean", "ours/this", "pairwise", "target"], rows) + f"\n{note}\ngate: {gate}"


def _verdict(target: float | None, value: float, sign: str) -> str:
    if target is None:
        return ""
    met = value <= target if sign == "<=" else value >= target
    return f"{sign} {target:.3g} {'met' if met else 'MISSED'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*cases(quick=False), "kv-bytes"]
    parser.add_argument("--case", default="all", help=f"all, or some of {', '.join(names)}, separated by commas")
    parser.add_argument("--dtype", help="some of fp32, bf16, fp16, separated by commas (default: fp32,bf16 on the CPU, bf16,fp16 on CUDA)")
    parser.add_argument("--repeats", type=int, help="rounds of a case (default: 5 for prefill, 96 for decode)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-cudnn", action="store_true", help="baselines without cuDNN's attention, which prepares itself anew for every number of keys")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/attention-<device>.json)")
    parser.add_argument("--quick", action="store_true", help="lengths and windows divided by eight, no targets: only to see that it runs")
    options = parser.parse_args()
    chosen = names if options.case == "all" else options.case.split(",")
    dtypes = (options.dtype or ("fp32,bf16" if options.device == "cpu" else "bf16,fp16")).split(",")
    for unknown in {*chosen} - {*names} | {*dtypes} - {*DTYPES}:
        parser.error(f"{unknown!r} is not known; cases: all, {', '.join(names)}; dtypes: {', '.join(DTYPES)}")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, not {options.repeats}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device; use --device cpu")
    torch.backends.cuda.enable_cudnn_sdp(not options.no_cudnn)
    device = device_of(options.device)

    bandwidth = read_bandwidth(device)
    result: dict[str, Any] = {"benchmark": "attention", "quick": options.quick, "machine": facts(device) | {"read_bandwidth": bandwidth}, "cases": []}
    print(f"{result['machine']['cpu']}, {result['machine']['threads']} threads, torch {result['machine']['torch']}, reads {bandwidth / 1e9:.1f} GB/s")
    out = options.out or ROOT / "benchmarks" / "results" / f"attention-{options.device}{'-quick' if options.quick else ''}.json"
    with torch.inference_mode():
        for case in chosen:
            for name in dtypes:
                if case == "kv-bytes":
                    entry = kv_bytes(name, device, options.quick)
                else:
                    settings = cases(options.quick)[case]
                    rounds = options.repeats or (5 if settings.kind == "prefill" else SLACK + 32)
                    entry = measure(settings, name, rounds, device, bandwidth)
                result["cases"].append(entry)
                write_json(out, result)
                print(show(entry), flush=True)
    print(f"\nwritten to {out.resolve().relative_to(ROOT) if out.resolve().is_relative_to(ROOT) else out.name}")
    return 0 if all(entry["gate"]["passed"] for entry in result["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
