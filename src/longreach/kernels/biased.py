"""A band with a linear bias on its logits (ALiBi): few calls of a kernel that knows "all keys" and "additive mask".

The bias of a logit is slope * (column - row), and a softmax does not see what a whole row has in common. Rows of a block therefore share one bias
per column, measured from the block's last row, which a kernel reads as a mask of one row; the rest is put right in the log-sum-exp.
Measured from the rows at hand, so that a bias is as exact at index 10^9 as at 10. Columns that only some rows of the block see take a
small mask of their own.

Knows coordinates, not methods or encodings; the kernel is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longreach.core.merge import NEGATIVE_INFINITY, Merge
from longreach.kernels import tiles
from longreach.kernels.tiles import Band, Operator, empty

ROWS_PER_BLOCK = 256  # in fp32 a shared bias of the steepest usual slope is then exact to 1e-5
LARGEST_MASK = 1 << 27  # entries of a mask that rows do not share


@dataclass(frozen=True, eq=False)
class Bias:
    """slope[h] * (column[c] - row[r]) is added to the logit of head h, row r and column c. All fp64: slope [H], row [T], column [C].

    device  where the bias is used, if that is a device without fp64; None: where the positions are.
    """

    slope: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    device: torch.device | None = None

    def shared(self, a: int, b: int, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One bias [1, H, 1, C] for all rows [a, b), and what it lacks [H, T], which is one value per row."""
        last = self.row[b - 1]
        return self._times(self.column[start:stop] - last)[None, :, None], self._times(last - self.row[a:b])

    def of_each(self, a: int, b: int, start: int, stop: int) -> torch.Tensor:
        """[1, H, T, C]."""
        return self._times(self.column[None, start:stop] - self.row[a:b, None])[None]

    def _times(self, x: torch.Tensor) -> torch.Tensor:
        return (self.slope.view(-1, *[1] * x.dim()) * x).to(self.device, torch.float32)


def dispatch(
    operator: Operator, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, scale: float, softcap: float | None, bias: Bias | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A band with a bias, with a soft-cap, or with neither, on one kernel."""
    if bias is not None:
        assert softcap is None, "no model has both a bias and a soft-cap"
        return attend(operator, q, k, v, band, scale, bias)
    if softcap is not None:
        return tiles.capped(q, k, v, band, scale, softcap)
    return tiles.attend(operator, q, k, v, band, scale)


def attend(
    operator: Operator, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, scale: float, bias: Bias, share: bool = True, rows: int = ROWS_PER_BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> out [B, H, T, E], lse [B, H, T] fp32. `share` only where the kernel takes an fp32 mask whatever the dtype of q."""
    blocks = _Blocks(operator, q, k, v, band, scale, bias, Merge(q.shape[2]))
    if not share:
        rows = max(1, min(rows, LARGEST_MASK // max(1, q.shape[1] * k.shape[2])))
    for a in range(0, q.shape[2], rows):
        blocks.add(a, min(q.shape[2], a + rows), share)
    return empty(q, v) if blocks.merge.out is None else blocks.merge.result()


@dataclass
class _Blocks:
    operator: Operator
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    band: Band
    scale: float
    bias: Bias
    merge: Merge

    def add(self, a: int, b: int, share: bool) -> None:
        """Rows [a, b): the columns that all of them see, and those before and behind that some of them see."""
        start, stop = self.columns(a)[0], self.columns(b - 1)[1]
        first, last = self.columns(b - 1)[0], self.columns(a)[1]
        if first >= last or not share:
            self.masked(a, b, start, stop)
            return
        self.masked(a, b, start, first)
        mask, lacking = self.bias.shared(a, b, first, last)
        out, lse = self.call(a, b, first, last, mask)
        self.merge.add(out, lse + lacking, a)
        self.masked(a, b, last, stop)

    def columns(self, row: int) -> tuple[int, int]:
        """The columns [start, stop) that a row sees."""
        behind = self.band.offset + row
        start = 0 if self.band.high is None else max(0, behind - self.band.high + 1)
        return start, min(self.k.shape[2], behind - self.band.low + 1)

    def masked(self, a: int, b: int, start: int, stop: int) -> None:
        if start >= stop:
            return
        device = self.q.device
        behind = self.band.offset + torch.arange(a, b, device=device)[:, None] - torch.arange(start, stop, device=device)[None, :]
        visible = behind >= self.band.low
        if self.band.high is not None:
            visible &= behind < self.band.high
        out, lse = self.call(a, b, start, stop, self.bias.of_each(a, b, start, stop).masked_fill_(~visible, NEGATIVE_INFINITY))
        nothing = ~visible.any(1)  # a kernel may return anything for a row without keys
        self.merge.add(out.masked_fill(nothing[:, None], 0.0), lse.masked_fill(nothing, NEGATIVE_INFINITY), a)

    def call(self, a: int, b: int, start: int, stop: int, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        columns = slice(start, stop)
        return self.operator(self.q[:, :, a:b], self.k[:, :, columns], self.v[:, :, columns], self.scale, False, mask)
