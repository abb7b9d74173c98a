"""Exact merge of attention segments by log-sum-exp, in fp32.

Knows nothing about how a segment was computed. A row that sees no key of a segment comes with `out = 0, lse = -inf`; a row
that is empty in every segment stays so.
"""

from __future__ import annotations

import torch

NEGATIVE_INFINITY = float("-inf")


class Merge:
    """Running merge of partial results for rows [B, H, T]: out = sum_s exp(lse_s - lse) out_s, lse = logsumexp_s(lse_s).

    The first part is taken over as it is; later parts rescale what is there, so only one accumulator is ever held.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.out: torch.Tensor | None = None  # [B, H, T, D] fp32; a single part stays in its dtype
        self.lse: torch.Tensor | None = None  # [B, H, T] fp32
        self.filled = 0  # rows before it were written

    def add(self, out: torch.Tensor, lse: torch.Tensor, first_row: int = 0) -> None:
        """Merge `out` [B, H, R, D] and `lse` [B, H, R] into the rows from `first_row` on."""
        lse = lse.float()
        if self.out is None or self.lse is None:
            if out.shape[2] == self.rows:
                self.out, self.lse, self.filled = out, lse, self.rows
                return
            self.out = out.new_empty((*out.shape[:2], self.rows, out.shape[3]), dtype=torch.float32)
            self.lse = lse.new_full((*lse.shape[:2], self.rows), NEGATIVE_INFINITY)
        rows = slice(first_row, first_row + out.shape[2])
        if first_row >= self.filled:  # the first part of these rows is taken over
            self._fill(first_row)
            self.out[:, :, rows], self.lse[:, :, rows], self.filled = out, lse, rows.stop
            return
        self._fill(rows.stop)
        self.out = self.out.float()
        old_lse = self.lse[:, :, rows]
        # sigmoid(a - b) = exp(a) / (exp(a) + exp(b)); a row that is empty on both sides stays zero.
        share = torch.sigmoid(lse - old_lse).nan_to_num_(0.0)
        total = torch.logaddexp(old_lse, lse)
        target = self.out[:, :, rows]
        target.lerp_(out.float(), share[..., None])
        self.lse[:, :, rows] = total

    def _fill(self, stop: int) -> None:
        """Rows up to `stop` that nothing was written to are empty."""
        if stop > self.filled:
            assert self.out is not None
            self.out[:, :, self.filled : stop] = 0
            self.filled = stop

    def sink(self, logit: torch.Tensor) -> None:
        """A learned logit per head [H] that takes part in the denominator only; once, after all segments."""
        assert self.out is not None and self.lse is not None
        self._fill(self.rows)
        logit = logit.float().view(1, -1, 1)
        self.out = self.out.float() * torch.sigmoid(self.lse - logit)[..., None]
        self.lse = torch.logaddexp(self.lse, logit.expand_as(self.lse))

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.out is not None and self.lse is not None
        self._fill(self.rows)
        return self.out, self.lse


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge whole parts (out [B, H, T, D], lse [B, H, T]); the plain form of `Merge`, used where all rows take part."""
    merged = Merge(parts[0][0].shape[2])
    for out, lse in parts:
        merged.add(out, lse)
    return merged.result()
