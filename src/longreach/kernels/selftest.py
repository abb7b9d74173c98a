"""The self-test of every kernel on every device: outputs and log-sum-exps beside a dense computation, at the first use.

Signatures, the layout of the log-sum-exp and the meaning of windows differ between releases and devices, so nothing is believed.
"""

from __future__ import annotations

import torch

from longreach.core.differences import largest
from longreach.kernels import tiles
from longreach.kernels.protocol import KV, Chosen, Kernel, Spans
from longreach.kernels.tiles import Band

SHAPES = ((70, 64), (3, 64), (1, 64), (70, 16), (1, 16), (1, 128))  # queries and width: a prompt, a short chunk and a decoded token, wide and narrow heads
BANDS = (Band(80), Band(80, 0, 33), Band(80, 100), Band(80, 20, 60), Band(149), Band(149, 0, 33))  # with an offset, a gap, a window


def failure(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot be used on a device; None: it can."""
    try:
        found = difference(kernel, device, dtype)
    except (RuntimeError, TypeError, AttributeError) as error:
        return str(error)
    return verdict(found, dtype)


def verdict(found: float, dtype: torch.dtype) -> str | None:
    """Why a kernel that differs by so much cannot be used; None: it can."""
    return None if found < (1e-4 if dtype == torch.float32 else 2e-2) else f"differs by {found:.1e}"


Part = tuple[torch.Tensor, torch.Tensor]  # out and lse


def apart(found: Part, want: Part) -> float:
    """The largest difference; infinite where a row is taken for empty that is not, or the other way round."""
    (out, lse), (want_out, want_lse) = found, want
    seen = ~want_lse.isneginf()
    if not torch.equal(seen, ~lse.isneginf()):
        return float("inf")
    return max(largest(out.float() - want_out.float()), largest((lse - want_lse)[seen]))


def difference(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference, for a batch of two; infinite where a row is taken for empty that is not, or the other way round."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    worst = 0.0
    for rows, width in SHAPES:
        q, k, v = (torch.randn(2, h, t, width, generator=generator).to(device, dtype) for h, t in ((4, rows), (2, 150), (2, 150)))
        for band in BANDS:
            want = tiles.capped(q.float(), k.float(), v.float(), band, width**-0.5, softcap=1e6)
            worst = max(worst, apart(kernel.attend(q, KV(k, v), band, width**-0.5), want))
        if rows == 1:
            worst = max(worst, _of_spans(kernel, q, KV(k, v)))
        worst = max(worst, _of_chosen(kernel, q, KV(k, v)))
    return worst


def _of_spans(kernel: Kernel, q: torch.Tensor, kv: KV) -> float:
    """Rows of other lengths, one of which may see nothing."""
    worst = 0.0
    for starts, stops in (((0, 0), (150, 150)), ((3, 0), (150, 70)), ((20, 9), (20, 150))):
        out, lse = kernel.attend(q, kv, Spans(starts, stops), q.shape[3] ** -0.5)
        for row, (start, stop) in enumerate(zip(starts, stops)):
            own = [x[row : row + 1, :, start:stop].float() for x in (kv.k, kv.v)]
            want = tiles.capped(q[row : row + 1].float(), own[0], own[1], Band(stop - start - 1), q.shape[3] ** -0.5, softcap=1e6)
            worst = max(worst, apart((out[row : row + 1], lse[row : row + 1]), want))
    return worst


def _of_chosen(kernel: Kernel, q: torch.Tensor, kv: KV) -> float:
    """Any columns, with and without a bias; each query others, one and all of a row none. Heads that share keys, and each its own."""
    rows, columns = q.shape[2], torch.arange(150, device=q.device)
    seen = ((columns % 7 > 2) & (columns < 150 - torch.arange(rows, device=q.device)[:, None])).expand(2, -1, -1).clone()
    seen[1] = False
    if rows > 1:
        seen[0, 1] = False
    some = seen[0].any(-1)
    worst, scale = 0.0, q.shape[3] ** -0.5
    bias = torch.linspace(-1, 0, 150, device=q.device) * torch.arange(1, 5, device=q.device)[None, :, None, None]
    for queries, own in ((q, kv), (q[:, :1], KV(kv.k[:, :1], kv.v[:, :1]))):
        for added in (None, bias[:, : queries.shape[1]].expand(2, -1, rows, -1).contiguous()):
            out, lse = kernel.attend(queries, own, Chosen(seen, added), scale)
            groups = queries.shape[1] // own.k.shape[1]
            k, v = (x[:1].float().repeat_interleave(groups, 1) for x in (own.k, own.v))
            logits = queries[:1].float() @ k.transpose(-1, -2) * scale + (0.0 if added is None else added[:1])
            logits = logits.masked_fill(~seen[:1, None], float("-inf"))[:, :, some]
            if not bool(lse[1:].isneginf().all()) or bool(out[1:].any()) or not bool(lse[:, :, ~some].isneginf().all()) or bool(out[:, :, ~some].any()):
                return float("inf")
            worst = max(worst, largest(out[:1, :, some].float() - logits.softmax(-1) @ v), largest(lse[:1, :, some] - logits.logsumexp(-1)))
    return worst
