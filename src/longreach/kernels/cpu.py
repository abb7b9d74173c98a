"""CPU backend: PyTorch's fused CPU attention, which returns the log-sum-exp for free.

The operator has traps that this file keeps away from everyone else: a fully masked row comes back with lse = 0, an empty key
dimension kills the process, `is_causal` is aligned to the top left, q, k and v must have one width, and the gradient through
the lse is dropped (the executor refuses a backward pass).
"""

from __future__ import annotations

import torch

from longreach.kernels import biased, tiles
from longreach.kernels.biased import Bias
from longreach.kernels.tiles import Band

FOLDED_ROWS = 32  # up to this many rows, the query heads of a group become rows of one call and share each key that is read


class CpuBackend:
    name = "cpu: fused attention, tiled"

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, scale: float, softcap: float | None = None, bias: Bias | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return biased.dispatch(kernel, q, k, v, band, scale, softcap, bias)


def kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool = False, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    assert q.shape[2] and k.shape[2], "an empty dimension would end the process inside the operator"
    assert not causal or q.shape[2] == k.shape[2], "causal is aligned to the top left, so only squares may use it"
    heads, rows, width = q.shape[1], q.shape[2], v.shape[3]
    groups = heads // k.shape[1]
    q, k, v = tiles.widened(q, k, v)
    if mask is not None and mask.dim() == 4:
        mask = mask.expand(*q.shape[:3], -1)  # the operator reads what rows share through a stride of 0
    fold = groups > 1 and rows <= FOLDED_ROWS and not causal and mask is None
    if fold:
        q = q.unflatten(1, (-1, groups)).flatten(2, 3)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if fold:
        out = out.unflatten(2, (groups, rows)).flatten(1, 2)
        lse = lse.unflatten(2, (groups, rows)).flatten(1, 2)
    return out[..., :width], lse
