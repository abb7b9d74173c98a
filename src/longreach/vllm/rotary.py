"""Reading an engine's rotary modules, and the identity in their place.

They hold tables of cos and sin, row t for position t. Frequencies are read back from the rows of powers of two, whose angles are exact in fp32. Knows tables
and the attributes of such a module; whether what was read is right is decided by `probe.py`.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from longreach.core.encodings import Rotary

TABLES = frozenset({  # kinds whose table has cos and sin of one set of frequencies, row by row
    "RotaryEmbedding", "LinearScalingRotaryEmbedding", "NTKScalingRotaryEmbedding", "DynamicNTKScalingRotaryEmbedding", "DynamicNTKAlphaRotaryEmbedding",
    "Llama3RotaryEmbedding", "YaRNScalingRotaryEmbedding",
})  # fmt: skip
LONG = "Phi3LongRoPEScaledRotaryEmbedding"  # two tables, one of which is in force


class Unturned(nn.Module):
    """Stands in for a rotary module: queries and keys leave as they came. It has none of the original's tables, so that code which reads them fails."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._kept = (original,)  # not a child: it has no weights, and nobody shall walk to it

    @property
    def original(self) -> nn.Module:
        return self._kept[0]

    def forward(self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        return query, key


def read(module: nn.Module) -> Rotary:
    """What a rotary module does. Raises ValueError for kinds that are not known to do just this."""
    kind, given = type(module).__name__, module_of(module)
    if kind == LONG:
        long = bool(given.use_long_rope)
        length, factors, factor = (
            (given.max_position_embeddings, given.long_factor, given.long_mscale) if long
            else (given.original_max_position_embeddings, given.short_factor, given.short_mscale)
        )  # fmt: skip
        table = given._compute_cos_sin_cache(length, factors, factor)
        return Rotary(*frequencies(table), pairing="half")
    if kind not in TABLES:
        raise ValueError(
            f"the rotary encoding {kind} is not supported on vLLM's pages (positions of several dimensions, mixed frequencies and latent attention are not); "
            "use longreach serve, or vLLM without longreach"
        )
    if isinstance(given, nn.Module) and len(getattr(given, "scaling_factors", [None])) != 1:
        raise ValueError(f"{kind} has tables for several scaling factors, one of which each request chooses; pass a model with one")
    pairing: Literal["half", "interleaved"] = "half" if given.is_neox_style else "interleaved"
    return Rotary(*frequencies(given._compute_cos_sin_cache()), pairing=pairing)


def module_of(module: nn.Module) -> Any:
    """Its attributes are the engine's."""
    return module


def frequencies(table: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A table [P, r] of cos and sin, [:, : r/2] and the rest, times one factor -> frequencies [r/2] fp64 in radians per position, and the factor.

    Position 2^n has the angle 2^n f without any rounding, so that each such row tells a frequency twice as well as the one before it, up to the last bit of
    what was an fp32 number. Raises ValueError where the rows are not those of such frequencies.
    """
    if len(table) < 2:
        raise ValueError("the rotary table has less than two positions; use vLLM without longreach for this model")
    cos, sin = table.detach().cpu().double().chunk(2, dim=-1)
    factor = float(torch.hypot(cos[0], sin[0])[0])
    inverse = torch.atan2(sin[1], cos[1])
    row = 2
    while row < len(table):
        difference = torch.atan2(sin[row], cos[row]) - row * inverse
        inverse = inverse + (difference - 2 * math.pi * torch.round(difference / (2 * math.pi))) / row
        row *= 2
    inverse = inverse.float().double()
    rows = torch.tensor([t for t in (0, 1, 2, 3, 5, 13, 55, len(table) - 1) if t < len(table)], dtype=torch.float64)
    angles = rows[:, None] * inverse
    found, want = torch.cat([cos[rows.long()], sin[rows.long()]], -1), factor * torch.cat([angles.cos(), angles.sin()], -1)
    allowed = 1e-5 * factor + (rows[:, None] * inverse * 2e-7).repeat(1, 2) * factor  # the angles of other rows were rounded to fp32
    if bool(((found - want).abs() > allowed).any()) or not bool(inverse.isfinite().all()):
        raise ValueError("the rotary table is not that of one set of frequencies; use vLLM without longreach for this model")
    return inverse, factor
