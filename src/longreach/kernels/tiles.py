"""Bands cut into few calls of a kernel that knows "all keys", "causal square" and "mask".

The merge is exact for any partition of the keys, so
  - rows that see back to the first column take a rectangle without a mask and a causal square on the diagonal;
  - rows of a sliding band take, in tiles of many rows, the rectangle that all rows of the tile see, without a mask. What is left of the
    tile lies before and behind it; side by side those columns are a narrower band again, which is computed with a small mask in
    tiles of few rows. All tiles are the heads of one call, for their keys are overlapping views.
Causal squares and reversed causal squares need no mask either, but the CPU kernel works on 256 rows at a time and wastes a quarter of
a square of 1024; small masked tiles waste a sixteenth.

Knows shapes and merging; the kernel is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from longreach.core.merge import NEGATIVE_INFINITY, Merge

ROWS_PER_TILE = 64  # rows of a masked tile
LARGEST_CORE = 1024  # rows that share a rectangle without a mask
MASKED_ROWS = 256  # rows of a masked call of odd shape


@dataclass(frozen=True)
class Band:
    """Row r of the queries sees column c of the keys iff low <= offset + r - c < high (None: no upper limit)."""

    offset: int
    low: int = 0
    high: int | None = None

    def seen_by_first(self, columns: int) -> tuple[int, int]:
        """The stretch of columns that row 0 sees; empty where its stop is not behind its start."""
        return 0 if self.high is None else max(0, self.offset - self.high + 1), min(columns, self.offset - self.low + 1)


class Operator(Protocol):
    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of non-empty q to non-empty k. `causal` comes with squares only. `mask` is additive, [T, C] in q's dtype, or with a
        bias fp32 and [1, H, T or 1, C]; or [B, 1, T, C]."""
        ...


def attend(
    operator: Operator, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, scale: float, rows_per_tile: int = ROWS_PER_TILE
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [B, H, T, E] in q's dtype or fp32, lse [B, H, T] fp32."""
    rows, columns = q.shape[2], k.shape[2]
    diagonal = band.offset - band.low  # row r sees columns up to diagonal + r
    first = max(0, -diagonal)
    if first >= rows or columns == 0 or (band.high is not None and band.high <= band.low):
        return empty(q, v)
    if rows == 1:  # one row sees one stretch of columns
        start, stop = band.seen_by_first(columns)
        return operator(q, between(k, start, stop), between(v, start, stop), scale) if start < stop else empty(q, v)
    tiles = _Tiles(operator, q, k, v, diagonal, scale, Merge(rows))
    if band.high is None:
        tiles.growing(first, rows)
    else:
        width = band.high - band.low
        split = min(rows, max(first, width - 1 - diagonal))  # rows before it see fewer than `width` columns
        tiles.growing(first, split)
        tiles.sliding(split, rows, width, rows_per_tile)
    if tiles.merge.out is None:
        return empty(q, v)
    return tiles.merge.result()


def between(x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """x[:, :, start:stop], in one operation or none."""
    return x if start == 0 and stop == x.shape[2] else x.narrow(2, start, stop - start)


def widened(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v padded with zeros to one width, which fused kernels want; the caller crops the output again."""
    missing = v.shape[3] - k.shape[3]
    if missing > 0:
        return F.pad(q, (0, missing)), F.pad(k, (0, missing)), v
    return q, k, F.pad(v, (0, -missing)) if missing else v


def empty(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    return out, torch.full(q.shape[:3], NEGATIVE_INFINITY, dtype=torch.float32, device=q.device)


@dataclass
class _Tiles:
    operator: Operator
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
            self.merge.add(*self.operator(self.q[:, :, a:b], self.k[:, :, columns], self.v[:, :, columns], self.scale, causal), a)

    def growing(self, a: int, b: int) -> None:
        """Rows [a, b) see columns [0, diagonal + r]."""
        columns, e = self.k.shape[2], self.diagonal
        full = min(b, max(a, columns - e))  # from here on every column is visible
        self.rectangle(full, b, 0, columns)
        if full - a == 1:
            self.rectangle(a, full, 0, e + a + 1)
        else:
            self.rectangle(a, full, 0, e + a)
            self.rectangle(a, full, e + a, e + full, causal=True)

    def sliding(self, a: int, b: int, width: int, rows_per_tile: int) -> None:
        """Rows [a, b) see the `width` columns that end at diagonal + r; all of them begin at column 0 or later."""
        inside = min(b, max(a, self.k.shape[2] - self.diagonal))  # from here on the diagonal is beyond the last column
        large = min(LARGEST_CORE, 1 << max(0, (width // 4).bit_length() - 1))
        if large >= 2 * rows_per_tile and large % rows_per_tile == 0 and inside - a >= large:
            whole = a + (inside - a) // large * large
            self.cored(a, whole, width, large, rows_per_tile)
            a = whole
        whole = a + (inside - a) // rows_per_tile * rows_per_tile
        if whole > a:
            start = self.diagonal + a - width + 1
            keys = slice(start, start + (whole - a) + width - 1)
            k, v = (x[:, :, keys].flatten(0, 1) for x in (self.k, self.v))
            self.merge.add(*self.windows(self.q[:, :, a:whole], k, v, whole - a, width, rows_per_tile), a)
        if whole + 1 == b == inside:  # one row needs no mask
            self.rectangle(whole, b, self.diagonal + whole - width + 1, self.diagonal + b)
            return
        for p in range(whole, b, MASKED_ROWS):
            self.masked(p, min(b, p + MASKED_ROWS), width)

    def cored(self, a: int, b: int, width: int, large: int, step: int) -> None:
        """Rows [a, b) in tiles of `large` rows. What all rows of a tile see is one rectangle without a mask. The rest is `large` columns before
        it and `large` - 1 behind it; side by side they are a band again, of width `large`: row r sees columns [r, r + large) of them."""
        count, start = (b - a) // large, self.diagonal + a - width + 1
        core, last = width - large, (count - 1) * large

        def views(x: torch.Tensor, first: int, length: int) -> torch.Tensor:  # [B G, tiles, length, D]
            return x[:, :, first : first + last + length].flatten(0, 1).unfold(1, length, large).transpose(2, 3)

        q = self.q[:, :, a:b]
        out, lse = self.operator(*(self.folded(q, count, large), views(self.k, start + large, core), views(self.v, start + large, core)), self.scale)
        self.merge.add(*self.unfolded(out, lse, q.shape, count, large), a)
        k, v = (torch.cat([views(x, start, large), views(x, start + width, large - 1)], dim=2).flatten(0, 1) for x in (self.k, self.v))
        self.merge.add(*self.windows(q, k, v, large, large, step), a)

    def windows(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: int, width: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Stretches of `rows` rows of q [B, H, n * rows, D] with their own keys [B G n, rows + width - 1, D]: row r of a stretch sees columns
        [r, r + width). Tiles of `step` rows are the heads of one masked call, overlapping views of the keys theirs."""
        span, tiles = step + width - 1, rows // step
        folded = self.folded(q, q.shape[2] // step, step).unflatten(1, (-1, tiles)).flatten(0, 1)  # [B G n, tiles, g * step, D]
        k, v = (x.unfold(1, span, step).transpose(2, 3) for x in (k, v))
        row, column = torch.arange(step, device=q.device)[:, None], torch.arange(span, device=q.device)[None, :]
        hidden = (column < row) | (column >= row + width)
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, NEGATIVE_INFINITY)
        out, lse = self.operator(folded, k, v, self.scale, False, mask.repeat(folded.shape[2] // step, 1))
        return self.unfolded(out, lse, q.shape, q.shape[2] // step, step)

    def folded(self, q: torch.Tensor, count: int, step: int) -> torch.Tensor:
        """[B, H, count * step, D] -> [B G, count, g * step, D]: tiles become heads, the query heads of a group become rows. A view if g is 1."""
        heads = self.k.shape[1]
        q = q.unflatten(2, (count, step)).unflatten(1, (heads, -1)).transpose(2, 3)  # [B, G, count, g, step, D]
        return q.reshape(q.shape[0] * heads, count, -1, q.shape[-1])

    def unfolded(self, out: torch.Tensor, lse: torch.Tensor, shape: torch.Size, count: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, groups = shape[0], self.k.shape[1], shape[1] // self.k.shape[1]
        out = out.reshape(batch, heads, count, groups, step, -1).transpose(2, 3).reshape(batch, shape[1], shape[2], -1)
        return out, lse.reshape(batch, heads, count, groups, step).transpose(2, 3).reshape(batch, shape[1], shape[2])

    def masked(self, a: int, b: int, width: int) -> None:
        """Rows of odd shape: one call with a mask."""
        start, stop = max(0, self.diagonal + a - width + 1), min(self.k.shape[2], self.diagonal + b)
        if start >= stop:
            return
        behind = self.diagonal + torch.arange(a, b, device=self.q.device)[:, None] - torch.arange(start, stop, device=self.q.device)[None, :]
        visible = (behind >= 0) & (behind < width)
        mask = torch.zeros(visible.shape, dtype=self.q.dtype, device=self.q.device).masked_fill_(~visible, NEGATIVE_INFINITY)
        out, lse = self.operator(self.q[:, :, a:b], self.k[:, :, start:stop], self.v[:, :, start:stop], self.scale, False, mask)
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
