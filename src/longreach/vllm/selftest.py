"""The self-test of attention on pages at the start of an engine: each kind of layer beside the dense truth, at the lengths that the engine will read.

A long request gets a short chunk, another decodes, a third is new. Their pages lie in any order, and hold NaN where a bounded method reads nothing again.
Knows pages and truths; no engine.
"""

from __future__ import annotations

import torch

from longreach.core.differences import relative
from longreach.engine import reference
from longreach.vllm.pages import Paged
from longreach.vllm.requests import Requests

LONGEST = 4096  # tokens of the longest request
NEW = (3, 1, 17)  # tokens of each request that are asked for


def difference(paged: Paged, heads: int, groups: int, width: int, dtype: torch.dtype, device: torch.device, size: int, longest: int) -> float:
    """The largest difference of any output, relative to the largest value."""
    generator = torch.Generator().manual_seed(0)
    top = max(NEW[-1], min(longest, LONGEST))
    lengths = (top, max(1, top * 2 // 3), NEW[-1])
    pages = [-(-length // size) for length in lengths]
    order = torch.randperm(sum(pages), generator=generator, dtype=torch.int32) + 1
    table = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    for row, own in enumerate(order.split(pages)):
        table[row, : len(own)] = own
    texts = [tuple(torch.randn(length, h, width, generator=generator).to(device, dtype) for h in (heads, groups, groups)) for length in lengths]
    pool = torch.zeros(sum(pages) + 1, groups, 2, size, width, dtype=dtype, device=device)

    def forward(first: tuple[int, ...], last: tuple[int, ...]) -> torch.Tensor:
        """The tokens first .. last of each request, in one forward."""
        counts = [b - a for a, b in zip(first, last)]
        ends = torch.tensor(counts).cumsum(0).tolist()
        slots = torch.cat([table[row, torch.arange(a, b) // size].long() * size + torch.arange(a, b) % size for row, (a, b) in enumerate(zip(first, last))])
        requests = Requests.of(ends, list(last), table.to(device), slots.to(device), size)
        q, k, v = (torch.cat([x[a:b] for x, a, b in zip(each, first, last)]) for each in zip(*texts))
        return paged.attend(requests, q, k, v, pool)

    before = tuple(length - new for length, new in zip(lengths, NEW))
    read = [torch.cat([x[:n] for x, n in zip(each, before)]) for each in zip(*texts)]
    paged.write(Requests.of(*_whole(before, table, size, device)), read[1], read[2], pool)
    if paged.bound is not None:  # pages that may be another's by then
        for row, length in enumerate(before):
            pool[table[row, slice(*paged.bound.gap(length, size))].long()] = torch.nan
    found = forward(before, lengths).split(list(NEW))
    worst = 0.0
    for (q, k, v), new, out in zip(texts, NEW, found):
        layer, inputs, n = paged.layer, paged.inputs, len(q)
        scale = layer.method.query_scale()
        factor = None if scale is None else scale(torch.arange(n - new, n, device=device))
        q, k, v = (x.transpose(0, 1)[None] for x in (q[n - new :], k, v))
        dense = reference.forward(q, k, layer.rotary, inputs.scale, layer=layer.index, query_scale=factor, softcap=inputs.softcap)
        want, _ = reference.softmax(dense, layer.method.truth(dense), v, inputs.sink)
        worst = max(worst, relative(out.transpose(0, 1)[None].double(), want))
    return worst


def _whole(lengths: tuple[int, ...], table: torch.Tensor, size: int, device: torch.device) -> tuple[list[int], list[int], torch.Tensor, torch.Tensor, int]:
    """All tokens of requests of these lengths."""
    slots = torch.cat([table[row, torch.arange(n) // size].long() * size + torch.arange(n) % size for row, n in enumerate(lengths)])
    return torch.tensor(lengths).cumsum(0).tolist(), list(lengths), table.to(device), slots.to(device), size
