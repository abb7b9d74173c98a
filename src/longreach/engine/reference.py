"""The dense truth: distance matrix, visibility matrix, one softmax. Short, slow, and used by tests, `check` and benchmarks.

Knows the definition of a method (`distances`, or `truth` where it chooses), not its segments: no position maps, no merge, no store, no index.
"""

from __future__ import annotations

import math

import torch

from longreach.core.dense import Dense
from longreach.core.encodings import Alibi, Rotary


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    rotary: Rotary | None,
    scale: float,
    *,
    layer: int = 0,
    alibi: Alibi | None = None,
    query_scale: torch.Tensor | None = None,
    softcap: float | None = None,
    barred: torch.Tensor | None = None,
) -> Dense:
    """q [B, H, T, D], k [B, G, N, D] un-rotated, as the layer gets them; query t has index N - T + t. `query_scale` [T]."""
    q, groups = q.double(), q.shape[1] // k.shape[1]
    if query_scale is not None:
        q = q * query_scale.double()[:, None]
    return Dense(q, k.double().repeat_interleave(groups, dim=1), rotary, scale, layer, alibi, softcap, barred, groups)


def softmax(dense: Dense, distance: torch.Tensor, v: torch.Tensor, sink: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """distance [..., T, N], NaN where hidden; v [B, G, N, E] -> out [B, H, T, E] and the log-sum-exp [B, H, T], both fp64."""
    logits = dense.logits(distance.nan_to_num(0.0)).masked_fill(distance.isnan() | ~dense.seen, -math.inf)
    lse = torch.logsumexp(logits, dim=-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.double().view(1, -1, 1))
    weights = torch.exp(logits - lse[..., None]).nan_to_num(0.0)
    return weights @ v.double().repeat_interleave(dense.groups, dim=1), lse


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    distance: torch.Tensor,
    rotary: Rotary | None,
    scale: float,
    *,
    alibi: Alibi | None = None,
    query_scale: torch.Tensor | None = None,
    softcap: float | None = None,
    sink: torch.Tensor | None = None,
    barred: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """At known distances [T, N]: see `forward` and `softmax`."""
    dense = forward(q, k, rotary, scale, alibi=alibi, query_scale=query_scale, softcap=softcap, barred=barred)
    return softmax(dense, distance, v, sink)
