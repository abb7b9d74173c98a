"""Attention on pages, in Triton: one pass over the pages of each row and head of keys, softmax as it goes, with the log-sum-exp.

    program (block of queries, row and head, split): out_s and lse_s of the columns of a split, merged by out = sum_s exp(lse_s - lse) out_s

Queries and the heads that share a key are the rows of one product, so a page is read once for all of them. Few queries leave few programs: the columns are
split then. The bound is the bytes of the pages. Each key's page comes from the table, so pages may have any size and order. Imports Triton; see `paged`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from longreach.kernels.protocol import Spans
from longreach.kernels.tiles import Band, empty

SPLIT = 2048  # columns of one program where there are few
FEW = 64  # programs that are few
FARTHEST = 1 << 30  # more columns than there are


def attend(
    q: torch.Tensor, pool: torch.Tensor, table: torch.Tensor, skip: int, columns: int, work: Band | Spans, scale: float, softcap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [R, H, T, D], pool [N, G, 2, size, D], table [R, n] -> out [R, H, T, D] and lse [R, H, T] fp32; column 0 is the token `skip` of a row's first page."""
    rows, heads, queries, width = q.shape
    groups, size = pool.shape[1], pool.shape[3]
    if not columns or not queries:
        return empty(q, pool[:, :, 1])
    assert pool.is_contiguous() and table.stride(1) == 1
    lows, highs = ends(work, rows, q.device)
    each = queries * heads // groups
    block = max(16, min(64 if width * q.element_size() <= 512 else 16, triton.next_power_of_2(each)))  # what is shared by threads fits every card since sm_80
    blocks = triton.cdiv(each, block)
    splits = triton.cdiv(columns, SPLIT) if blocks * rows * groups < FEW else 1
    out = torch.empty((splits, rows, heads, queries, width), dtype=torch.float32, device=q.device)
    lse = torch.empty((splits, rows, heads, queries), dtype=torch.float32, device=q.device)
    q = q if q.stride(3) == 1 else q.contiguous()
    _attend[(blocks, rows * groups, splits)](
        q, pool, table, lows, highs, out, lse, scale, softcap or 0.0, *q.stride()[:3], table.stride(0), rows, heads, groups, queries, skip, columns,
        triton.cdiv(columns, splits), WIDTH=width, WIDE=max(16, triton.next_power_of_2(width)), SIZE=size, CAPPED=softcap is not None,
        ROWS=block, COLUMNS=64 if width <= 128 and q.element_size() < 4 else 32, PRODUCT=product(q),
    )  # fmt: skip
    if splits == 1:
        return out[0], lse[0]
    whole = torch.logsumexp(lse, 0)
    return ((lse - whole).exp().nan_to_num(0.0)[..., None] * out).sum(0), whole


def ends(work: Band | Spans, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """[R] each: row r and query t see the columns lows[r] + t <= c < highs[r] + t."""
    if isinstance(work, Spans):
        return work.ends(device)
    low = -FARTHEST if work.high is None else work.offset - work.high + 1
    lows, highs = (torch.full((rows,), x, dtype=torch.int32, device=device) for x in (low, work.offset - work.low + 1))
    return lows, highs


def product(q: torch.Tensor) -> tl.dtype:
    """What is multiplied: numbers as they are, but Triton's interpreter, which is all that works on a CPU, multiplies the bits of bf16 as integers."""
    if q.device.type == "cpu":
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[q.dtype]


@triton.jit
def _attend(  # type: ignore[no-untyped-def]  # Triton's values have no types of Python
    q, pool, table, lows, highs, out, lse, scale, softcap, q_row, q_head, q_query, table_row, rows, heads, groups, queries, skip, columns, per,
    WIDTH: tl.constexpr, WIDE: tl.constexpr, SIZE: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRODUCT: tl.constexpr,
):  # fmt: skip
    row, group, split = tl.program_id(1) // groups, tl.program_id(1) % groups, tl.program_id(2)
    shared = heads // groups
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # of a query and a head
    live = number < queries * shared
    query, head = number // shared, group * shared + number % shared
    low = tl.maximum(tl.load(lows + row) + query, 0)
    high = tl.minimum(tl.load(highs + row) + query, columns)
    first = tl.maximum(tl.min(tl.where(live, low, columns), 0), split * per)
    last = tl.minimum(tl.max(tl.where(live, high, 0), 0), split * per + per)
    wide = tl.arange(0, WIDE)
    mine = live[:, None] & (wide < WIDTH)[None, :]
    x = tl.load(q + row * q_row + head[:, None] * q_head + query[:, None] * q_query + wide[None, :], mask=mine, other=0.0).to(PRODUCT)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, WIDE], tl.float32)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < last
        page = tl.load(table + row * table_row + (skip + column) // SIZE, mask=there, other=0).to(tl.int64)
        place = ((page * groups + group) * 2 * SIZE + (skip + column) % SIZE) * WIDTH
        cells = place[:, None] + wide[None, :]
        inside = there[:, None] & (wide < WIDTH)[None, :]
        k = tl.load(pool + cells, mask=inside, other=0.0).to(PRODUCT)
        logits = tl.dot(x, tl.trans(k), input_precision="ieee") * scale
        if CAPPED:
            logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
        seen = (column[None, :] >= low[:, None]) & (column[None, :] < high[:, None]) & there[None, :]
        logits = tl.where(seen, logits, float("-inf"))
        most = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(most == float("-inf"), 0.0, most)
        weights = tl.exp(logits - finite[:, None])
        before = tl.exp(largest - finite)
        v = tl.load(pool + cells + SIZE * WIDTH, mask=inside, other=0.0).to(PRODUCT)
        sums = sums * before[:, None] + tl.dot(weights.to(PRODUCT), v, input_precision="ieee")
        total = total * before + tl.sum(weights, 1)
        largest = most
    something = total > 0.0
    at = ((split * rows + row) * heads + head) * queries + query
    tl.store(lse + at, tl.where(something, largest + tl.log(tl.where(something, total, 1.0)), float("-inf")), mask=live)
    sums = tl.where(something[:, None], sums / tl.where(something, total, 1.0)[:, None], 0.0)
    tl.store(out + at[:, None].to(tl.int64) * WIDTH + wide[None, :], sums, mask=mine)
