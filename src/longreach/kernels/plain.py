"""Kernel of matrix products and a softmax in fp32: any device, no fused kernel, no fp64. For devices without one of their own (MPS).

Right before it is fast: the logits of a tile are formed in memory. Queries come in blocks, so that memory does not grow with the square
of the length.
"""

from __future__ import annotations

import torch

from longreach.core.merge import NEGATIVE_INFINITY
from longreach.kernels import biased, spans
from longreach.kernels.biased import Bias
from longreach.kernels.protocol import KV, Chosen, Spans
from longreach.kernels.tiles import Band

LOGITS_AT_ONCE = 2**26  # fp32 entries: 256 MiB


class PlainKernel:
    name = "plain: matrix products in fp32, tiled"

    def attend(
        self, q: torch.Tensor, kv: KV, work: Band | Spans | Chosen, scale: float, softcap: float | None = None, bias: Bias | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(work, Spans):
            return spans.attend(operator, q, kv, work, scale, softcap)
        if isinstance(work, Chosen):
            return spans.chosen(operator, q, kv, work, scale, softcap)
        return biased.dispatch(operator, q, kv.k, kv.v, work, scale, softcap, bias)


def operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, T, D], k [B, G, C, D], v [B, G, C, E] -> out [B, H, T, E] in q's dtype, lse [B, H, T] fp32.

    A mask is [T, C], [1, H, T or 1, C] or [B, 1, T, C]."""
    groups, rows = q.shape[1] // k.shape[1], q.shape[2]
    if mask is not None:
        mask = mask.expand(mask.shape[0] if mask.dim() == 4 else 1, q.shape[1], rows, -1).unflatten(1, (-1, groups))
    keys, values = k.float()[:, :, None], v.float()[:, :, None]
    folded = q.float().unflatten(1, (-1, groups))  # [B, G, g, T, D]
    step = max(1, LOGITS_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    outs, lses = [], []
    for a in range(0, rows, step):
        logits = folded[:, :, :, a : a + step] @ keys.transpose(-1, -2) * scale
        if mask is not None:
            logits = logits + mask[:, :, :, a : a + step].float()
        if causal:
            index = torch.arange(rows, device=q.device)
            logits = logits.masked_fill(index[None, :] > index[a : a + step, None], NEGATIVE_INFINITY)
        lse = torch.logsumexp(logits, dim=-1)
        outs.append(torch.exp(logits - lse[..., None]).nan_to_num(0.0) @ values)
        lses.append(lse)
    return torch.cat(outs, 3).flatten(1, 2).to(q.dtype), torch.cat(lses, 3).flatten(1, 2)
