"""A decoded token in a layer that reads a fixed number of keys of its own choice, from 32k to a million keys: choice and copy included, beside dense attention.

    python benchmarks/fixed_budget.py                                  # 8 KV heads of 128, 32 heads, bf16; under eight minutes, 10 GB
    python benchmarks/fixed_budget.py --tokens 32768 131072 --methods infinitehip

Each time is that of a step of a whole attention layer: rotation, storing, summaries, choice, attention. What a method asks anew every so many tokens is
amortised: times are means over 96 steps, in which all of its stages fall due. Dense attention (without rotary and store, by the call that is fastest here)
reads the same buffers in between. No ratio is printed unless each layer equals the truth of its method on a shorter text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attention import Shape, random_qkv, relative_error, rotary_of, stock_attention
from common import DTYPES, ROOT, device_of, facts, read_bandwidth, table, write_json

from longreach import InfiniteHiP, Quest
from longreach.engine import reference, summaries
from longreach.engine.batch import Batch
from longreach.engine.executor import execute
from longreach.engine.layer import QUERY, Inputs, Layer
from longreach.kernels import kernel_for
from longreach.kernels.tiles import Band
from longreach.memory.store import Store
from longreach.methods.base import Method

LAYER = 8  # one that chooses, and none of the first
STEPS = 96
GROWTH, FASTER = 1.25, 18.95
METHODS: dict[str, Method] = {
    "quest-16": Quest(2048, 16),
    "quest-32": Quest(2048, 32),
    "infinitehip": InfiniteHiP(refresh=(96, 24, 8)),
}
GATED = {"quest-16": Quest(256, 16), "quest-32": Quest(256, 32), "infinitehip": InfiniteHiP(64, 16, 128, (64, 32, 8), (512, 256), refresh=(96, 24, 8))}


class Decoding:
    """A layer that has read some tokens, one step at a time."""

    def __init__(self, method: Method, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, exact: bool) -> None:
        self.layer, self.shape, self.device, self.dtype = Layer(LAYER, method, rotary_of(shape)), shape, device, dtype
        self.store, self.kernel, self.round, self.inputs = Store([self.layer.kept]), kernel_for(device, dtype), 0, Inputs(shape.width**-0.5)
        last = 512  # of the tokens that only the end of has queries, and forms that keep the last ones
        k, v = ((torch.empty(1, shape.kv_heads, tokens, shape.width, dtype=dtype, device=device).normal_(generator=self.generator(n))) for n in (1, 2))
        q = torch.empty(1, shape.heads, last, shape.width, dtype=dtype, device=device).normal_(generator=self.generator(3))
        for a, b in ((0, tokens - last), (tokens - last, tokens)):
            batch, memory = self.opened(b - a)
            rows, new = batch.groups[0].rows, k[:, :, a:b]
            turned = {p: batch.turned(new, self.layer.rotary, p, a, b - a) if exact or kept.tail is not None else new for p, kept in self.layer.forms.items()}
            memory.append(rows, a, turned, v[:, :, a:b])
            if self.layer.queries and b == tokens:
                memory.append_summaries(rows, a, {QUERY: q})
            summaries.summarise(self.layer, batch, memory, rows, a, b, self.inputs)
            memory.release()
            self.store.advance(None, b - a)
        self.read = (q, k, v) if exact else None
        del k, v

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def opened(self, tokens: int) -> tuple[Batch, Any]:
        self.store.open(1, tokens)
        return Batch.of(1, tokens, None, self.device, self.store), self.store.layers[0]

    def step(self) -> torch.Tensor:
        self.round += 1
        self.new = random_qkv(self.shape, 1, self.dtype, self.device, 1000 + self.round)
        return self.timed()

    def timed(self) -> torch.Tensor:
        batch, memory = self.opened(1)
        out = execute(self.layer, batch, memory, self.kernel, *self.new, self.inputs)
        self.store.advance(None, 1)
        return out

    def dense(self) -> list[Callable[[], torch.Tensor]]:
        """Dense attention to the keys that it keeps."""
        memory, length = self.store.layers[0], self.store.lengths[0]
        form = next(form for form, kept in self.layer.forms.items() if kept.tail is None)
        (kv,) = memory.view(form, slice(0, 1), 0, length, False)
        q = random_qkv(self.shape, 1, self.dtype, self.device, 7)[0]
        folded = q.unflatten(1, (self.shape.kv_heads, -1))[:, :, :, 0]  # the heads of a group as rows: each key is read once
        return [
            lambda: stock_attention(q, kv.k, kv.v, False),
            lambda: torch.nn.functional.scaled_dot_product_attention(folded, kv.k, kv.v),
            lambda: self.kernel.attend(q, kv, Band(length - 1), self.inputs.scale)[0],
        ]


def gate(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """Relative error against the truth of the method, after steps that take what earlier ones were answered."""
    decoding = Decoding(GATED[name], shape, 2048, dtype, device, True)
    assert decoding.read is not None
    q, k, v = decoding.read
    queries, worst = [torch.zeros(1, shape.heads, 1536, shape.width, dtype=dtype, device=device), q], 0.0
    for n in range(5):
        found, (new_q, new_k, new_v) = decoding.step(), decoding.new
        k, v = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
        dense = reference.forward(new_q, k, decoding.layer.rotary, shape.width**-0.5, layer=LAYER)
        dense.__dict__["earlier"] = (torch.cat(queries, 2).double(),)
        queries.append(new_q)
        if n in (0, 4):
            out, _ = reference.softmax(dense, decoding.layer.method.truth(dense), v)
            worst = max(worst, relative_error(found, out.transpose(1, 2)))
    return worst


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def read_bytes(method: Method, shape: Shape, tokens: int, itemsize: int) -> float:
    """Of a step, at least: what is compared, and what is chosen, which is read, written and read again."""
    entry = shape.kv_heads * shape.width * itemsize
    if isinstance(method, Quest):
        return 2 * entry * tokens / method.page_size + 3 * 2 * method.budget * shape.heads * shape.width * itemsize
    assert isinstance(method, InfiniteHiP)
    probed, chunks = 0.0, tokens / method.chunks[0]
    for size, keep, every in zip(method.chunks, (*method.kept, method.budget), method.refresh):
        chunks = min(chunks, tokens / size)
        probed += 2 * (size.bit_length()) * chunks * entry / every
        after = method.chunks[method.chunks.index(size) + 1] if size != method.chunks[-1] else size
        chunks = min(chunks, keep / size) * size / after
    return probed + 2 * entry * (method.window + 3 * (method.sink + method.budget))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**15, 2**17, 2**19, 2**20])
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, dtype, shape = device_of(options.device), DTYPES[options.dtype], Shape(32, 8, 128)
    errors = {name: gate(name, shape, torch.float32, device) for name in options.methods}
    for name, error in errors.items():
        if not error <= 1e-5:
            raise SystemExit(f"no ratio: {name} differs from its truth by {error:.1e}")
    bandwidth, fastest = read_bandwidth(device), dict[str, int]()
    rows, measured = list[list[str]](), dict[str, Any]()
    for tokens in options.tokens:
        for name in options.methods:
            decoding = Decoding(METHODS[name], shape, tokens - tokens % STEPS, dtype, device, False)
            own, dense = [], []
            calls = decoding.dense()
            if name not in fastest:  # on the first of the lengths
                times = [min(seconds(run, device) for _ in range(3)) for run in calls]
                fastest[name] = times.index(min(times))
            call = calls[fastest[name]]
            for n in range(STEPS):
                decoding.new = random_qkv(shape, 1, dtype, device, 1000 + n)
                own.append(seconds(decoding.timed, device))
                if n % 12 == 6:
                    dense.append(seconds(call, device))
            mean, of_dense = sum(own) / STEPS, sorted(dense)[len(dense) // 2]
            bytes_read, everything = read_bytes(METHODS[name], shape, tokens, dtype.itemsize), 2 * shape.kv_heads * tokens * shape.width * dtype.itemsize
            measured[f"{name} {tokens}"] = {
                "seconds": own, "mean": mean, "dense": dense, "times_faster": of_dense / mean, "bytes": bytes_read, "bound": everything / bytes_read,
                "bound_seconds": bytes_read / bandwidth,
            }  # fmt: skip
            first = measured[f"{name} {options.tokens[0]}"]["mean"]
            numbers = (1e3 * mean, 1e3 * sorted(own)[STEPS // 2], 1e3 * max(own), mean / first, 1e3 * of_dense, of_dense / mean, everything / bytes_read)
            rows.append([f"{tokens}", name, *(f"{x:.{2 if n == 3 else 1}f}" for n, x in enumerate(numbers))])
            print(" ".join(rows[-1]), flush=True)
            del decoding, calls, call
    header = ["keys", "method", "mean ms", "median ms", "slowest ms", "of the first", "dense ms", "times faster", "by bytes"]
    print(table(f"32 heads, 8 KV heads of 128, {options.dtype}: a decoded token in one layer, mean of {STEPS} steps", header, rows))
    for name in options.methods:
        growth = [measured[f"{name} {n}"]["mean"] / measured[f"{name} {2**15}"]["mean"] for n in (2**19,) if {2**15, n} <= set(options.tokens)]
        faster = [measured[f"{name} {2**20}"]["times_faster"]] if 2**20 in options.tokens else []
        print(f"{name}: " + ", ".join([*(f"{x:.2f} of the time of 32k keys at 512k (at most {GROWTH})" for x in growth),
                                       *(f"{x:.1f} times faster than dense at 1M (at least {FASTER})" for x in faster)]))  # fmt: skip
    write_json(options.out or ROOT / "benchmarks/results/fixed-budget.json", {
        "machine": facts(device) | {"read_bandwidth": bandwidth}, "errors": errors, "measured": measured,
    })  # fmt: skip


if __name__ == "__main__":
    main()
