"""A scheduler of pages for tests: requests are read in any pieces, on pages in any order, and compared with the dense truth."""

from __future__ import annotations

import random

import torch

from longreach import LMInfinite, StreamingLLM, kernels
from longreach.core.encodings import Frequencies, Rope, Rotary
from longreach.engine import reference
from longreach.engine.layer import Inputs, Layer
from longreach.hf.frequencies import _Standard
from longreach.kernels.protocol import Kernel
from longreach.methods.stock import Stock
from longreach.vllm.pages import Paged
from longreach.vllm.requests import Requests
from longreach.vllm.settings import refuse
from methods_matrix import METHODS

HEADS, GROUPS, WIDTH = 4, 2, 16


def takes(method) -> bool:
    try:
        refuse(method)
    except ValueError:
        return False
    return True


PAGED = [method for method in METHODS if takes(method)]


def rotary(method, pairing="half", start=0, width=WIDTH, scaling=1.0) -> Rotary:
    own = Frequencies((1.0 / 10000.0 ** (torch.arange(0, width, 2).float() / width)).double(), scaling)
    if method.rescales:
        own = method.frequencies(Rope(own, 32, 80, _Standard("tiny", 10000.0, own, 32)))
    return Rotary(own.inverse, own.scaling, pairing, start)


class Engine:
    """A scheduler of pages: tokens of requests are read in any pieces, on pages in any order, with NaN wherever nothing was written.

    frees  pages that a bounded method never reads again are others' at once, and hold NaN until then. Tables keep naming them, as vLLM's do.
    """

    def __init__(self, paged: Paged, size: int = 4, pages: int = 64, frees: bool = False) -> None:
        self.paged, self.size, self.frees, self.freed = paged, size, frees, dict[str, int]()
        self.pool = torch.full((pages, GROUPS, 2, size, WIDTH), torch.nan)
        self.free = random.Random(1).sample(range(1, pages), pages - 1)
        self.table: dict[str, list[int]] = {}
        self.text: dict[str, tuple[torch.Tensor, ...]] = {}

    def read(self, new: dict[str, int]) -> dict[str, torch.Tensor]:
        """So many new tokens of each request -> the output [n, H, E] of each."""
        parts, ends, lengths, slots, total = [], [], [], [], 0
        for name, count in new.items():
            qkv = tuple(torch.randn(count, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS))
            before = self.text.get(name)
            self.text[name] = qkv if before is None else tuple(torch.cat(pair) for pair in zip(before, qkv))
            length = len(self.text[name][0])
            pages = self.table.setdefault(name, [])
            while len(pages) * self.size < length:
                pages.append(self.free.pop())
            slots += [pages[i // self.size] * self.size + i % self.size for i in range(length - count, length)]
            total += count
            parts.append(qkv)
            ends.append(total)
            lengths.append(length)
        table = torch.zeros(len(new), max(len(self.table[name]) for name in new), dtype=torch.int32)
        for row, name in enumerate(new):
            table[row, : len(self.table[name])] = torch.tensor(self.table[name])
        requests = Requests.of(ends, lengths, table, torch.tensor(slots), self.size)
        q, k, v = (torch.cat(each) for each in zip(*parts))
        out = self.paged.attend(requests, q, k, v, self.pool)
        for name, length in zip(new, lengths) if self.frees else ():
            self.release(name, length)
        return dict(zip(new, out.split(list(new.values()))))

    def release(self, name: str, read: int) -> None:
        assert self.paged.bound is not None
        first, last = self.paged.bound.gap(read, self.size)
        for page in self.table[name][max(first, self.freed.get(name, 0)) : last]:
            self.pool[page] = torch.nan
            self.free.insert(0, page)
        self.freed[name] = max(first, last)

    def held(self, name: str) -> int:
        """Pages that a request has now."""
        assert self.paged.bound is not None
        return len(self.table[name]) - max(0, self.freed[name] - self.paged.bound.gap(0, self.size)[0])

    def leave(self, name: str) -> None:
        self.free += self.table.pop(name)
        del self.text[name]

    def truth(self, name: str, count: int) -> torch.Tensor:
        """The last `count` tokens of a request, from the paper."""
        layer, inputs = self.paged.layer, self.paged.inputs
        q, k, v = (x.transpose(0, 1)[None] for x in self.text[name])
        n = q.shape[2]
        scale = layer.method.query_scale()
        factor = None if scale is None else scale(torch.arange(n - count, n))
        dense = reference.forward(q[:, :, n - count :], k, layer.rotary, inputs.scale, query_scale=factor, softcap=inputs.softcap)
        return reference.softmax(dense, layer.method.truth(dense), v, inputs.sink)[0][0].transpose(0, 1)


def engine(method, inputs=None, turning: Rotary | None = None, kernel: Kernel | None = None, **more) -> Engine:
    inputs = inputs or Inputs(WIDTH**-0.5)
    kernel = kernel or kernels.kernel_for(torch.device("cpu"), torch.float32)
    return Engine(Paged(Layer(0, method, turning, written=True), inputs, kernel), **more)


def check(run: Engine, new: dict[str, int]) -> None:
    for name, out in run.read(new).items():
        want = run.truth(name, new[name])
        assert (out - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max())), (name, new)


HISTORY = [
    {"a": 13, "b": 1}, {"a": 1, "b": 30, "c": 5}, {"c": 1, "a": 1, "b": 1}, {"a": 40, "c": 1, "b": 1}, {"b": 1, "a": 1, "c": 7}, {"a": 1, "b": 1, "c": 1},
]  # fmt: skip
ROTARIES = {
    "interleaved": rotary(Stock(), "interleaved"), "partial": rotary(Stock(), start=4, width=8), "scaled": rotary(Stock(), scaling=1.2), "none": None,
}  # fmt: skip
LONG = [
    {"a": 61, "b": 3}, {"b": 40, "a": 1}, {"a": 1, "b": 1, "c": 9}, {"c": 33, "a": 1, "b": 2}, {"a": 30, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1},
    {"a": 2, "b": 13, "c": 1}, {"a": 1, "b": 1, "c": 18},
]  # fmt: skip
BOUNDED = [
    LMInfinite(9, 3), LMInfinite(8, 5, distance_limit=10), StreamingLLM(9, 3), StreamingLLM(9, 3, counting="chunkable"), StreamingLLM(5, 0),
    *(method for method in PAGED if method.bounded),
]  # fmt: skip
