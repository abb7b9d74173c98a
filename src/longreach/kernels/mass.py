"""What queries pay to keys: their final probabilities, from the log-sum-exp that is known once all parts are merged, added up over queries or over heads.

A second, light pass: products of queries and keys once more, no values, any device. Knows tensors; not positions, methods or memories.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from longreach.core.merge import NEGATIVE_INFINITY
from longreach.kernels.biased import Bias
from longreach.kernels.protocol import Chosen
from longreach.kernels.tiles import Band

LOGITS_AT_ONCE = 2**24  # fp32 entries: 64 MiB


def paid(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, work: Band | Chosen, scale: float, softcap: float | None = None, bias: Bias | None = None
) -> torch.Tensor:
    """q [R, H, T, D], k [R or 1, G, C, D], lse [R, H, T] of all that the queries see -> sum over t of exp(logit - lse) [R, H, C] fp32."""
    total = torch.zeros(*q.shape[:2], k.shape[2], device=q.device)
    for part in _probabilities(q, k, lse, work, scale, softcap, bias):
        total += part.sum(2)
    return total


def of_each(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, work: Band | Chosen, scale: float, softcap: float | None = None, bias: Bias | None = None
) -> torch.Tensor:
    """The same of every query alone: the sum over h of exp(logit - lse) [R, T, C] fp32."""
    return torch.cat([part.sum(1) for part in _probabilities(q, k, lse, work, scale, softcap, bias)], 1)


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, work: Band | Chosen, scale: float, softcap: float | None, bias: Bias | None
) -> Iterator[torch.Tensor]:
    """[R, H, t, C] of some queries after others."""
    rows, heads, queries = q.shape[:3]
    keys, groups = k.float()[:, :, None].transpose(-1, -2), heads // k.shape[1]
    column = torch.arange(k.shape[2], device=q.device)
    step = max(1, LOGITS_AT_ONCE // max(1, rows * heads * k.shape[2]))
    for a in range(0, queries, step):
        b = min(queries, a + step)
        logits = (q[:, :, a:b].float().unflatten(1, (-1, groups)) @ keys).flatten(1, 2) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if isinstance(work, Chosen):
            seen = work.seen[:, None, a:b] if work.seen.shape[1] > 1 else work.seen[:, None]
            logits = logits if work.bias is None else logits + work.bias[:, :, a:b]
        else:
            behind = work.offset + torch.arange(a, b, device=q.device)[:, None] - column
            seen = (behind >= work.low) & (behind < work.high) if work.high is not None else behind >= work.low
            logits = logits if bias is None else logits + bias.of_each(a, b, 0, len(column))
        yield torch.exp(logits.masked_fill(~seen, NEGATIVE_INFINITY) - lse[:, :, a:b, None]).nan_to_num(0.0)
