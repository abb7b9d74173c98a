"""A decoded token at 128k keys: Quest's layer, its choice and the copy of what it chose included, beside dense attention on the same keys.

    python benchmarks/choosing.py                        # 8 KV heads of 128, 32 heads, bf16
    python benchmarks/choosing.py --tokens 32768 --dtype fp32

Contestants take turns; each time is that of a step of a whole attention layer: rotation, storing, summaries of a page that became full, choice, attention.
"dense" is plain attention through the same layer; "sdpa" is PyTorch's alone, without rotary and store. No ratio is printed unless a step with a budget of all
keys equals the dense one, and a step that chooses equals the truth of the method on a shorter text.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from attention import Shape, random_qkv, relative_error, rotary_of, stock_attention
from common import DTYPES, ROOT, Ratio, alternate, device_of, facts, read_bandwidth, table, write_json

from longreach import Quest, Stock
from longreach.engine import reference, summaries
from longreach.engine.batch import Batch
from longreach.engine.executor import execute
from longreach.engine.layer import Inputs, Layer
from longreach.kernels import kernel_for
from longreach.memory.store import Store
from longreach.methods.base import Method

LAYER = 2  # the first that chooses


class Decoding:
    """A layer that has read some tokens, one step at a time."""

    def __init__(self, method: Method, shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.layer, self.shape, self.device, self.dtype = Layer(LAYER, method, rotary_of(shape)), shape, device, dtype
        self.store, self.kernel, self.round = Store([self.layer.kept]), kernel_for(device, dtype), 0
        _, self.k, self.v = random_qkv(shape, tokens, dtype, device)
        batch, memory = self.opened(tokens)
        rows = batch.groups[0]
        keys = {positions: batch.turned(self.k, self.layer.rotary, positions, 0, tokens) for positions in self.layer.forms}
        memory.append(rows.rows, 0, keys, self.v)
        summaries.summarise(self.layer, batch, memory, rows.rows, 0, tokens, Inputs(self.shape.width**-0.5))
        memory.release()
        self.store.advance(None, tokens)

    def opened(self, tokens: int) -> tuple[Batch, Any]:
        self.store.open(1, tokens)
        return Batch.of(1, tokens, None, self.device, self.store), self.store.layers[0]

    def step(self, seed: int | None = None) -> torch.Tensor:
        self.round += 1
        q, k, v = random_qkv(self.shape, 1, self.dtype, self.device, 1000 + (self.round if seed is None else seed))
        batch, memory = self.opened(1)
        out = execute(self.layer, batch, memory, self.kernel, q, k, v, Inputs(self.shape.width**-0.5))
        self.store.advance(None, 1)
        return out


def gate(shape: Shape, dtype: torch.dtype, device: torch.device) -> float:
    """The largest relative error of a budget of all keys against dense, and of a choice against its truth."""
    worst, scale = 0.0, shape.width**-0.5
    for method in (Stock(), Quest(2048), Quest(256)):
        decoding = Decoding(method, shape, 1537, dtype, device)
        found = decoding.step(0)
        q, k, v = random_qkv(shape, 1, dtype, device, 1000)
        k, v = torch.cat([decoding.k, k], 2), torch.cat([decoding.v, v], 2)
        dense = reference.forward(q, k, decoding.layer.rotary, scale, layer=LAYER)
        if dtype != torch.float32 and method == Quest(256):
            continue  # rounding changes which of two pages with nearly equal bounds is chosen
        truth, _ = reference.softmax(dense, method.truth(dense), v)
        worst = max(worst, relative_error(found, truth.transpose(1, 2)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--budgets", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device, dtype, shape = device_of(options.device), DTYPES[options.dtype], Shape(32, 8, 128)
    errors = {name: gate(shape, of, device) for name, of in (("fp32", torch.float32), (options.dtype, dtype))}
    for name, error in errors.items():
        if not error <= (1e-5 if name == "fp32" else 2e-2):
            raise SystemExit(f"no ratio: in {name} the layer differs from the truth by {error:.1e}")
    bandwidth = read_bandwidth(device)
    _, k, v = random_qkv(shape, options.tokens, dtype, device)
    k, v = k.contiguous(), v.contiguous()
    q = random_qkv(shape, 1, dtype, device, 7)[0]
    layers = {"dense": Decoding(Stock(), shape, options.tokens, dtype, device)}
    layers |= {f"budget {budget}": Decoding(Quest(budget), shape, options.tokens, dtype, device) for budget in options.budgets}
    contestants = {"sdpa": lambda: stock_attention(q, k, v, False), **{name: layer.step for name, layer in layers.items()}}
    timings = alternate(contestants, options.rounds, device)
    fastest = min(("sdpa", "dense"), key=lambda name: timings[name].median)
    entry = shape.width * dtype.itemsize
    rows, measured = [], {}
    for name, timing in timings.items():
        read = 2 * shape.kv_heads * options.tokens * entry  # keys and values
        if name.startswith("budget"):  # two numbers of every page and dim; what each head chose is read, written and read again
            pages = options.tokens // 16
            read = 2 * shape.kv_heads * pages * entry + 3 * 2 * shape.heads * int(name.split()[1]) * entry
        bound, ratio = read / bandwidth, Ratio.of(timing, timings[fastest])
        numbers = 1e3 * timing.median, ratio.of_medians, read / 2**20, 1e3 * bound, timing.median / bound
        rows.append([name, *(f"{x:.{digits}f}" for x, digits in zip(numbers, (1, 2, 0, 1, 1)))])
        measured[name] = {"timing": timing.to_json(), "ratio_to_fastest_dense": ratio.to_json(), "bytes": read, "bound_seconds": bound}
    title = f"{options.tokens} keys, 32 heads, 8 KV heads of 128, {options.dtype}: one decoded token in one layer; the fastest dense is {fastest}"
    print(table(title, ["layer", "ms", "of dense", "MiB moved", "bound ms", "times the bound"], rows))
    file = options.out or ROOT / "benchmarks/results/choosing.json"
    write_json(file, {"machine": facts(device) | {"read_bandwidth": bandwidth}, "tokens": options.tokens, "errors": errors, "measured": measured})


if __name__ == "__main__":
    main()
