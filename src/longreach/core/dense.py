"""Logits straight from distances, in fp64: what dense truths are computed from. Short and slow.

A pair of rotary dims (a, b) of query and key at distance d contributes  (q_a k_a + q_b k_b) cos(d f) + (q_a k_b - q_b k_a) sin(d f), and ALiBi adds
-slope d to the scaled logit. Knows encodings; no segments, position maps, choices, layers or models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from longreach.core.encodings import Alibi, Rotary


@dataclass(frozen=True, eq=False)
class Dense:
    """One forward of one layer, as a truth sees it.

    q       [B, H, T, D] of the new tokens, un-rotated, times their factor; k [B, H, N, D] of all tokens, those of a group repeated. Both fp64.
    layer   its number, from 0.
    barred  [N] keys that a mask hides from all queries, whatever the method says, or [..., T, N] from each of them.
    v       [B, H, N, E] fp64, of all tokens, where an index asks for it.
    sink    [H] learned logits in the denominator, and earlier: of the tokens before the new ones, q [B, H, n, D] as above and the log-sum-exp [B, H, n, 1] of
            all that each has seen, infinite where a mask hid something from it, for an index that asks for masses; of one that asks for queries, only these.
    """

    q: torch.Tensor
    k: torch.Tensor
    rotary: Rotary | None
    scale: float
    layer: int = 0
    alibi: Alibi | None = None
    softcap: float | None = None
    barred: torch.Tensor | None = None
    groups: int = 1  # query heads that share keys and values
    sink: torch.Tensor | None = None
    earlier: tuple[torch.Tensor, ...] = ()
    v: torch.Tensor | None = None

    @property
    def i(self) -> torch.Tensor:
        """[T, 1] indices of the queries."""
        keys = self.k.shape[2]
        return torch.arange(keys - self.q.shape[2], keys, device=self.q.device)[:, None]

    @property
    def j(self) -> torch.Tensor:
        """[1, N] indices of the keys."""
        return torch.arange(self.k.shape[2], device=self.q.device)[None]

    @property
    def seen(self) -> torch.Tensor:
        """[1, N] or [..., T, N] keys that no mask hides."""
        return torch.ones_like(self.j, dtype=torch.bool) if self.barred is None else ~self.barred if self.barred.dim() > 1 else ~self.barred[None]

    def logits(self, distance: torch.Tensor) -> torch.Tensor:
        """distance [..., T, N] -> [B, H, T, N], scaled and capped."""
        content_q, content_k, rotated_q, rotated_k = self.q, self.k, None, None
        if self.rotary is not None:
            a, b = self.rotary.start, self.rotary.start + self.rotary.width
            rotated_q, rotated_k = self.q[..., a:b], self.k[..., a:b]
            content_q, content_k = (torch.cat([x[..., :a], x[..., b:]], -1) for x in (self.q, self.k))
        logits = content_q @ content_k.transpose(-1, -2)
        if self.rotary is not None and rotated_q is not None and rotated_k is not None:
            for a, b, frequency in pairs(self.rotary):
                qa, qb, ka, kb = rotated_q[..., a, None], rotated_q[..., b, None], rotated_k[..., None, :, a], rotated_k[..., None, :, b]
                angle = distance.double() * frequency
                logits = logits + self.rotary.scaling**2 * ((qa * ka + qb * kb) * angle.cos() + (qa * kb - qb * ka) * angle.sin())
        logits = logits * self.scale
        if self.alibi is not None:
            logits = logits - self.alibi.on(logits.device).double().view(-1, 1, 1) * distance.double()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def turned(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x [..., T, D] fp64, rotated to the positions [T] as the model does it."""
        if self.rotary is None:
            return x
        turned = x.clone()
        for a, b, frequency in pairs(self.rotary):
            a, b = a + self.rotary.start, b + self.rotary.start
            cos, sin = (f(positions.double() * frequency) * self.rotary.scaling for f in (torch.cos, torch.sin))
            turned[..., a], turned[..., b] = x[..., a] * cos - x[..., b] * sin, x[..., b] * cos + x[..., a] * sin
        return turned


def pairs(rotary: Rotary) -> Iterator[tuple[int, int, float]]:
    """(a, b, radians per position) of the rotated dims, counted from the first of them."""
    for number, frequency in enumerate(rotary.inverse_frequencies.double().tolist()):
        pair = (number, number + rotary.width // 2) if rotary.pairing == "half" else (2 * number, 2 * number + 1)
        yield *pair, rotary.sign * frequency
