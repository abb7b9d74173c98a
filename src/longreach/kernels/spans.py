"""Rows with one query each that sees a stretch of columns, or with queries that see any, in one call of an operator that knows "all keys" and "mask".

Columns that some row sees and another does not are masked for that one, so rows that share a call should be of about the same length. Knows shapes; the
operator is handed in.
"""

from __future__ import annotations

import torch

from longreach.core.merge import NEGATIVE_INFINITY
from longreach.kernels.protocol import KV, Chosen, Spans
from longreach.kernels.tiles import Operator, between, empty


def attend(operator: Operator, q: torch.Tensor, kv: KV, spans: Spans, scale: float, softcap: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """q [R, H, 1, D] -> out [R, H, 1, E], lse [R, H, 1] fp32."""
    first, last = spans.reach
    if first >= last:
        return empty(q, kv.v)
    k, v = between(kv.k, first, last), between(kv.v, first, last)
    mask = None if spans.even else spans.mask(torch.float32 if softcap is not None else q.dtype, q.device)
    out, lse = operator(q, k, v, scale, False, mask) if softcap is None else capped(q, k, v, scale, softcap, mask)
    if (nothing := spans.empty(q.device)) is not None:
        out = out.masked_fill(nothing[:, None, None, None], 0.0)
        lse = lse.masked_fill(nothing[:, None, None], NEGATIVE_INFINITY)
    return out, lse


def chosen(operator: Operator, q: torch.Tensor, kv: KV, work: Chosen, scale: float, softcap: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """q [R, H, T, D] -> out [R, H, T, E], lse [R, H, T] fp32."""
    if not kv.k.shape[2]:
        return empty(q, kv.v)
    mask, nothing = work.mask(torch.float32 if softcap is not None else q.dtype), work.empty
    out, lse = operator(q, kv.k, kv.v, scale, False, mask) if softcap is None else capped(q, kv.k, kv.v, scale, softcap, mask)
    return out.masked_fill(nothing[..., None], 0.0), lse.masked_fill(nothing, NEGATIVE_INFINITY)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, softcap: float, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """With soft-capped logits, in fp32."""
    groups, queries = q.shape[1] // k.shape[1], q.shape[2]
    folded = q.float().unflatten(1, (-1, groups)).flatten(2, 3)  # [R, G, g T, D]
    logits = softcap * torch.tanh(folded @ k.float().transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        logits = logits + mask.repeat(1, 1, groups, 1)
    lse = torch.logsumexp(logits, -1)
    out = torch.exp(logits - lse[..., None]) @ v.float()
    return out.unflatten(2, (groups, queries)).flatten(1, 2), lse.unflatten(2, (groups, queries)).flatten(1, 2)
