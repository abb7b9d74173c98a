"""The dense truth: distance matrix, visibility matrix, one softmax. Short, slow, and used by tests, `check` and benchmarks.

Knows the definition of a method (`distances`), not its segments: no position maps, no merge, no store. A pair of rotary
dims (a, b) of query and key at distance d contributes  (q_a k_a + q_b k_b) cos(d f) + (q_a k_b - q_b k_a) sin(d f), and ALiBi adds
-slope d to the scaled logit.
"""

from __future__ import annotations

import math

import torch

from longreach.core.encodings import Alibi, Rotary
from longreach.core.segments import TopK


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
    late: TopK | None = None,
    barred: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, T, D], k [B, G, N, D], v [B, G, N, E] un-rotated; distance [T, N], NaN where hidden; query t has index N - T + t.

    barred  [N] keys that a mask hides from all queries, whatever the method says.

    -> out [B, H, T, E] and the log-sum-exp [B, H, T], both fp64.
    """
    groups = q.shape[1] // k.shape[1]
    q = q.double()
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    if query_scale is not None:
        q = q * query_scale.double()[:, None]
    visible = ~distance.isnan()
    candidates = ~visible
    if barred is not None:
        visible, candidates = visible & ~barred, candidates & ~barred
    logits = scores(q, k, distance.nan_to_num(0.0), rotary, scale, alibi)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, -math.inf)
    if late is not None:
        logits = _with_late(logits, q, k, candidates, rotary, scale, alibi, softcap, late)
    lse = torch.logsumexp(logits, dim=-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.double().view(1, -1, 1))
    weights = torch.exp(logits - lse[..., None]).nan_to_num(0.0)
    return weights @ v, lse


def scores(q: torch.Tensor, k: torch.Tensor, distance: torch.Tensor, rotary: Rotary | None, scale: float, alibi: Alibi | None = None) -> torch.Tensor:
    """Scaled logits [B, H, T, N] of q [B, H, T, D] and k [B, H, N, D] at distance [T, N]."""
    logits = (q @ k.transpose(-1, -2) if rotary is None else _rotated_products(q, k, distance, rotary)) * scale
    return logits if alibi is None else logits - alibi.on(q.device).view(-1, 1, 1) * distance.double()


def _rotated_products(q: torch.Tensor, k: torch.Tensor, distance: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    start, width = rotary.start, rotary.width
    plain = [slice(0, start), slice(start + width, None)]
    logits = sum((q[..., s] @ k[..., s].transpose(-1, -2) for s in plain), torch.zeros((), dtype=q.dtype))
    rotated_q, rotated_k = q[..., start : start + width], k[..., start : start + width]
    for number, frequency in enumerate(rotary.inverse_frequencies.double().tolist()):
        pair = (number, number + width // 2) if rotary.pairing == "half" else (2 * number, 2 * number + 1)
        qa, qb = (rotated_q[..., dim, None] for dim in pair)
        ka, kb = (rotated_k[..., None, :, dim] for dim in pair)
        angle = rotary.sign * distance.double() * frequency
        logits = logits + rotary.scaling**2 * ((qa * ka + qb * kb) * angle.cos() + (qa * kb - qb * ka) * angle.sin())
    return logits


def _with_late(
    logits: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    candidate: torch.Tensor,
    rotary: Rotary | None,
    scale: float,
    alibi: Alibi | None,
    softcap: float | None,
    late: TopK,
) -> torch.Tensor:
    """Give the k best hidden candidates of each query (or of the last query only) their logit at the one late distance."""
    queries, keys = logits.shape[-2:]
    i = torch.arange(keys - queries, keys, device=logits.device)[:, None]
    j = torch.arange(keys, device=logits.device)[None, :]
    candidate = candidate & (j >= late.first_key) & (i - j >= late.low)
    candidate &= candidate.sum(-1, keepdim=True) >= late.k
    if late.rows == "last":
        candidate &= i == keys - 1
    middle = scores(q, k, torch.full_like(logits[0, 0], late.distance), rotary, scale, alibi)
    if softcap is not None:
        middle = softcap * torch.tanh(middle / softcap)
    middle = middle.masked_fill(~candidate, -math.inf)
    best = middle.topk(min(late.k, keys), dim=-1).indices
    chosen = candidate & torch.zeros_like(middle, dtype=torch.bool).scatter_(-1, best, True)
    return torch.where(chosen, middle, logits)
