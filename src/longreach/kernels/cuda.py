"""CUDA kernels on core PyTorch: one windowed flash call per segment where that passes a self-test, mask-free tiles otherwise.

Signatures, the layout of the log-sum-exp and the meaning of windows differ between releases, so nothing is believed: the
windowed call is compared with a dense computation once per (device, dtype), and what was chosen is in the kernel's name.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from longreach.core.differences import largest
from longreach.kernels import biased, spans, tiles
from longreach.kernels.biased import Bias
from longreach.kernels.protocol import KV, Chosen, Kernel, Spans
from longreach.kernels.tiles import Band


class CudaTiles:
    """Causal squares and rectangles: flash attention for half precision, memory-efficient attention for fp32."""

    name = "cuda: fused attention, tiled"

    def attend(
        self, q: torch.Tensor, kv: KV, work: Band | Spans | Chosen, scale: float, softcap: float | None = None, bias: Bias | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(work, Spans):
            return spans.attend(operator, q, kv, work, scale, softcap)
        if isinstance(work, Chosen):
            return spans.chosen(operator, q, kv, work, scale, softcap)
        if bias is not None:
            assert softcap is None, "no model has both a bias and a soft-cap"
            require_bias(q.device, q.dtype)
            return biased.attend(operator, q, kv.k, kv.v, work, scale, bias, share=False)  # masks in q's dtype are exact only as true distances
        if softcap is not None:
            return tiles.capped(q, kv.k, kv.v, work, scale, softcap)
        return tiles.attend(operator, q, kv.k, kv.v, work, scale, rows_per_tile=128)


class CudaWindow(CudaTiles):
    """A band is one flash call: rows and keys are trimmed so that the last row meets the last key, the window does the rest."""

    name = "cuda: flash attention with window"

    def attend(
        self, q: torch.Tensor, kv: KV, work: Band | Spans | Chosen, scale: float, softcap: float | None = None, bias: Bias | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not isinstance(work, Band):
            return super().attend(q, kv, work, scale, softcap, bias)
        rows, columns = q.shape[2], kv.k.shape[2]
        diagonal = work.offset - work.low
        first, last = max(0, -diagonal), columns - diagonal  # rows [first, last) have their diagonal on a key
        if softcap is not None or bias is not None or last < rows or first >= rows or columns == 0:
            return super().attend(q, kv, work, scale, softcap, bias)
        keys = slice(0, diagonal + rows)
        window = -1 if work.high is None else work.high - work.low - 1
        part, part_lse = windowed(q[:, :, first:], kv.k[:, :, keys], kv.v[:, :, keys], scale, window)
        if not first:
            return part, part_lse
        out, lse = tiles.empty(q, kv.v)
        out[:, :, first:], lse[:, :, first:] = part, part_lse
        return out, lse


def operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, width, rows = q.shape[1] // k.shape[1], v.shape[3], q.shape[2]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    q, k, v = tiles.widened(q, k, v)
    if mask is None and q.dtype != torch.float32:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        bias = None if mask is None else _aligned(mask.to(q.dtype)).expand(q.shape[0], q.shape[1], -1, -1)
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, causal, scale=scale)[:2]
    return out[..., :width], lse[:, :, :rows].float()


def _aligned(mask: torch.Tensor, multiple: int = 16) -> torch.Tensor:
    """The memory-efficient kernel wants rows of the bias to start at aligned addresses."""
    columns = mask.shape[-1]
    return F.pad(mask, (0, -columns % multiple))[..., :columns]


def windowed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal to the bottom right, `window` keys before the diagonal (-1: all)."""
    width = v.shape[3]
    q, k, v = tiles.widened(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=scale, window_size_left=window, window_size_right=0
    )[:2]
    return out.transpose(1, 2)[..., :width], lse.float()


def kernels(device: torch.device, dtype: torch.dtype) -> list[Kernel]:
    return [CudaWindow(), CudaTiles()] if dtype != torch.float32 else [CudaTiles()]


@functools.cache
def require_bias(device: torch.device, dtype: torch.dtype) -> None:
    """Raise unless biased attention reproduces a dense computation on this device; asked at the first use of a bias."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    q, k, v = (torch.randn(1, h, t, 64, generator=generator).to(device, dtype) for h, t in ((4, 70), (2, 150), (2, 150)))
    slope = (2.0 ** -torch.arange(1.0, 5.0)).double().to(device)
    row, column = (torch.arange(a, b, device=device).double() for a, b in ((80, 150), (0, 150)))
    bias, worst = Bias(slope, row, column), 0.0
    for band in (Band(80), Band(80, 0, 33), Band(80, 100)):
        try:
            out, lse = biased.attend(operator, q, k, v, band, 0.125, bias, share=False)
        except RuntimeError as error:
            raise ValueError(f"no CUDA attention of this PyTorch takes the bias of ALiBi ({error}); move the model to 'cpu' or update PyTorch") from error
        # the bias as two more columns of q and k, in fp32
        wide_q = torch.cat([q.float(), (slope.view(1, -1, 1, 1) * torch.stack([torch.ones_like(row), -row], -1) / 0.125).float()], -1)
        wide_k = torch.cat([k.float(), torch.stack([column, torch.ones_like(column)], -1).float().expand(1, 2, -1, -1)], -1)
        want, want_lse = tiles.capped(wide_q, wide_k, v.float(), band, 0.125, softcap=1e6)
        seen = ~want_lse.isneginf()
        worst = max(worst, largest(out.float() - want), largest((lse - want_lse)[seen]))
    if not worst < (1e-3 if dtype == torch.float32 else 5e-2):
        raise ValueError(f"the bias of ALiBi is off by {worst:.1e} on this device; move the model to 'cpu' or update PyTorch")
