"""CPU kernel: PyTorch's fused CPU attention, which returns the log-sum-exp for free.

The operator has traps that this file keeps away from everyone else: a fully masked row comes back with lse = 0, an empty key
dimension kills the process, `is_causal` is aligned to the top left, q, k and v must have one width, and the gradient through
the lse is dropped (the executor refuses a backward pass).
"""

from __future__ import annotations

import torch

from longreach.kernels import biased, spans, tiles
from longreach.kernels.biased import Bias
from longreach.kernels.protocol import KV, Chosen, Kernel, Spans
from longreach.kernels.tiles import Band

FOLDED_ROWS = 32  # up to this many rows, the query heads of a group become rows of one call and share each key that is read


class CpuKernel:
    name = "cpu: fused attention, tiled"

    def attend(
        self, q: torch.Tensor, kv: KV, work: Band | Spans | Chosen, scale: float, softcap: float | None = None, bias: Bias | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(work, Spans):
            return spans.attend(operator, q, kv, work, scale, softcap)
        if isinstance(work, Chosen):
            return spans.chosen(operator, q, kv, work, scale, softcap)
        return biased.dispatch(operator, q, kv.k, kv.v, work, scale, softcap, bias)


def kernels(device: torch.device, dtype: torch.dtype) -> list[Kernel]:
    return [CpuKernel()]


def operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    assert q.shape[2] and k.shape[2], "an empty dimension would end the process inside the operator"
    assert not causal or q.shape[2] == k.shape[2], "causal is aligned to the top left, so only squares may use it"
    heads, rows, width = q.shape[1], q.shape[2], v.shape[3]
    groups = heads // k.shape[1]
    q, k, v = tiles.widened(q, k, v)
    own = mask is not None and mask.dim() == 4 and mask.shape[1] == 1  # each row of the batch has a mask, whatever the head
    fold = groups > 1 and rows <= FOLDED_ROWS and not causal and (mask is None or own)
    if fold:
        q = q.unflatten(1, (-1, groups)).flatten(2, 3)
        mask = mask.repeat(1, 1, groups, 1) if mask is not None and mask.shape[2] > 1 else mask
    if mask is not None and mask.dim() == 4:
        mask = mask.expand(*q.shape[:3], -1)  # the operator reads what rows share through a stride of 0
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if fold:
        out = out.unflatten(2, (groups, rows)).flatten(1, 2)
        lse = lse.unflatten(2, (groups, rows)).flatten(1, 2)
    return out[..., :width], lse
