"""Bands cut into few large tiles that need no mask, for kernels that know only "all keys" and "causal square".

The merge is exact for any partition of the keys, so a block of rows takes
  - the near edge, a square on the diagonal: causal as it is,
  - the middle, a rectangle in which every row sees every column,
  - the far edge, a square in which row r sees columns >= r + 1: causal after reversing the order of rows and columns.

Knows shapes and merging; the kernel is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from longreach.merge import NEGATIVE_INFINITY, Merge

ROWS_PER_TILE = 1024  # rows of a sliding tile
NARROW = 48  # bands narrower than this are cheaper with a mask
MASKED_ROWS = 256


@dataclass(frozen=True)
class Band:
    """Row r of the queries sees column c of the keys iff low <= offset + r - c < high (None: no upper limit)."""

    offset: int
    low: int = 0
    high: int | None = None


class Kernel(Protocol):
    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of non-empty q to non-empty k. `causal` comes with squares only; `mask` is additive, [T, C] in q's dtype."""
        ...


def attend(
    kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, scale: float, rows_per_tile: int = ROWS_PER_TILE
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [B, H, T, E], lse [B, H, T] fp32."""
    rows, columns = q.shape[2], k.shape[2]
    diagonal = band.offset - band.low  # row r sees columns up to diagonal + r
    first = max(0, -diagonal)
    if first >= rows or columns == 0 or (band.high is not None and band.high <= band.low):
        return empty(q, v)
    tiles = _Tiles(kernel, q, k, v, diagonal, scale, Merge(rows))
    if band.high is None:
        tiles.growing(first, rows)
    else:
        width = band.high - band.low
        split = min(rows, max(first, width - diagonal))  # rows before it see back to column 0
        tiles.growing(first, split)
        tiles.sliding(split, rows, width, rows_per_tile)
    if tiles.merge.out is None:
        return empty(q, v)
    return tiles.merge.result()


def empty(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    return out, torch.full(q.shape[:3], NEGATIVE_INFINITY, dtype=torch.float32, device=q.device)


@dataclass
class _Tiles:
    kernel: Kernel
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    diagonal: int
    scale: float
    merge: Merge

    def rectangle(self, a: int, b: int, start: int, stop: int, causal: bool = False) -> None:
        """Rows [a, b) see all columns [start, stop), or the causal square on them."""
        if a < b and start < stop:
            columns = slice(start, stop)
            self.merge.add(*self.kernel(self.q[:, :, a:b], self.k[:, :, columns], self.v[:, :, columns], self.scale, causal), a)

    def growing(self, a: int, b: int) -> None:
        """Rows [a, b) see columns [0, diagonal + r]."""
        columns, e = self.k.shape[2], self.diagonal
        full = min(b, max(a, columns - 1 - e))  # from here on every column is visible
        self.rectangle(full, b, 0, columns)
        if full - a == 1:
            self.rectangle(a, full, 0, e + a + 1)
        else:
            self.rectangle(a, full, 0, e + a)
            self.rectangle(a, full, e + a, e + full, causal=True)

    def sliding(self, a: int, b: int, width: int, rows_per_tile: int) -> None:
        """Rows [a, b) see the `width` columns that end at diagonal + r; all of them begin at column 1 or later."""
        columns, e = self.k.shape[2], self.diagonal
        inside = min(b, max(a, columns - e))  # from here on the diagonal is beyond the last column
        if width < NARROW and inside - a > 1:
            inside = a
        step = min(width, rows_per_tile)
        for p in range(a, inside, step):
            rows = min(step, inside - p)
            if rows == 1:
                self.rectangle(p, p + 1, e + p - width + 1, e + p + 1)
                continue
            self.rectangle(p, p + rows, e + p, e + p + rows, causal=True)
            self.rectangle(p, p + rows, e + p + rows - width, e + p)
            self.far_edge(p, p + rows - 1, e + p - width + 1)
        for p in range(inside, b, MASKED_ROWS):
            self.masked(p, min(b, p + MASKED_ROWS), width)

    def far_edge(self, a: int, b: int, start: int) -> None:
        """Row a + r sees columns [start + r, start + (b - a))."""
        columns = slice(start, start + (b - a))
        q, k, v = (x.flip(2) for x in (self.q[:, :, a:b], self.k[:, :, columns], self.v[:, :, columns]))
        out, lse = self.kernel(q, k, v, self.scale, True)
        self.merge.add(out.flip(2), lse.flip(2), a)

    def masked(self, a: int, b: int, width: int) -> None:
        """Odd shapes and narrow bands: one call with a mask."""
        start, stop = max(0, self.diagonal + a - width + 1), min(self.k.shape[2], self.diagonal + b)
        if start >= stop:
            return
        behind = self.diagonal + torch.arange(a, b, device=self.q.device)[:, None] - torch.arange(start, stop, device=self.q.device)[None, :]
        visible = (behind >= 0) & (behind < width)
        mask = torch.zeros(visible.shape, dtype=self.q.dtype, device=self.q.device).masked_fill_(~visible, NEGATIVE_INFINITY)
        out, lse = self.kernel(self.q[:, :, a:b], self.k[:, :, start:stop], self.v[:, :, start:stop], self.scale, False, mask)
        nothing = ~visible.any(1)
        self.merge.add(out.masked_fill(nothing[:, None], 0.0), lse.masked_fill(nothing, NEGATIVE_INFINITY), a)


def capped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, scale: float, softcap: float, rows_per_tile: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """The band with soft-capped logits, cap * tanh(logit / cap), which no fused kernel of PyTorch computes: blocks of rows in fp32."""
    groups, rows, columns = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    out, lse = empty(q, v)
    out = out.float()
    for a in range(0, rows, rows_per_tile):
        b = min(rows, a + rows_per_tile)
        stop = min(columns, band.offset - band.low + b)
        start = 0 if band.high is None else max(0, band.offset + a - band.high + 1)
        if start >= stop:
            continue
        keys, values = (x[:, :, None, start:stop].float() for x in (k, v))
        block = q[:, :, a:b].float().unflatten(1, (-1, groups))
        logits = softcap * torch.tanh((block @ keys.transpose(-1, -2)) * (scale / softcap))
        behind = band.offset + torch.arange(a, b, device=q.device)[:, None] - torch.arange(start, stop, device=q.device)[None, :]
        visible = behind >= band.low
        if band.high is not None:
            visible &= behind < band.high
        logits = logits.masked_fill(~visible, NEGATIVE_INFINITY)
        total = torch.logsumexp(logits, -1)
        weights = torch.exp(logits - total[..., None]).nan_to_num(0.0)
        out[:, :, a:b] = (weights @ values).flatten(1, 2)
        lse[:, :, a:b] = total.flatten(1, 2)
    return out, lse
