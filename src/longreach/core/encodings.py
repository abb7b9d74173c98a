"""Encodings: what one layer of a model does with a position, and how it is applied to a tensor. Rotary, and the linear biases of ALiBi.

Knows frequencies, pairing, slices and slopes; not where they were read from (see `hf/rotary.py`, `hf/legacy.py`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch

ROWS_AT_ONCE = 1024  # of a rotation on the CPU: what is touched twice stays in the cache
LAUNCH_ROWS = 32768  # elsewhere: few launches, bounded temporary memory
FEW_ROWS = 16  # up to this many, the number of operations counts and not the bytes
WITHOUT_FP64 = frozenset({"mps"})  # device types on which no fp64 tensor can exist


def exact_device(device: torch.device) -> torch.device:
    """Where angles for `device` are computed: there, or on the CPU if it has no fp64."""
    return torch.device("cpu") if device.type in WITHOUT_FP64 else device


class Frequencies(NamedTuple):
    """What a layer rotates with: [r/2] fp64 radians per position, and the factor on cos and sin (attention factor)."""

    inverse: torch.Tensor
    scaling: float = 1.0


class Standard(Protocol):
    """A rope type under its name in Transformers, at the base, width and trained window of one kind of layer."""

    def __call__(self, rope_type: str, length: int | None = None, **parameters: Any) -> Frequencies: ...


@dataclass(frozen=True, eq=False)
class Rope:
    """What a method is told about one kind of layer when it is asked for other frequencies.

    own: those the model was trained with, unscaled. window: trained tokens.
    length: the largest distance at the declared context plus one; frequencies that depend on the length are fixed from it.
    """

    own: Frequencies
    window: int
    length: int
    standard: Standard


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary encoding of one kind of layer.

    inverse_frequencies: [r/2] fp64, radians per position; r of the head's dims are rotated.
    scaling: factor on cos and sin (YaRN, LongRoPE), so logits of rotated dims carry its square.
    pairing: "half" pairs dim a with a + r/2, "interleaved" pairs 2a with 2a + 1.
    start: first rotated dim of the head. sign: -1 where the model rotates by minus the angle.
    """

    inverse_frequencies: torch.Tensor
    scaling: float = 1.0
    pairing: Literal["half", "interleaved"] = "half"
    start: int = 0
    sign: int = 1

    @property
    def width(self) -> int:
        return 2 * self.inverse_frequencies.numel()

    def at(self, frequencies: Frequencies) -> Rotary:
        """The same pairing and slice with other frequencies."""
        return replace(self, inverse_frequencies=frequencies.inverse, scaling=frequencies.scaling)

    @functools.cached_property
    def unscaled(self) -> Rotary:
        """The same without its factor: one object, so that whoever keeps tables by it makes them once."""
        return self if self.scaling == 1.0 else replace(self, scaling=1.0)

    def same_as(self, other: Rotary) -> bool:
        facts = lambda r: (r.scaling, r.pairing, r.start, r.sign, r.inverse_frequencies.device)  # noqa: E731
        return facts(self) == facts(other) and torch.equal(self.inverse_frequencies, other.inverse_frequencies)

    def table(self, positions: torch.Tensor) -> Table:
        """cos and sin [T, r/2] in fp32 from fp64 angles, so that position 10^9 is as exact as position 10."""
        angles = positions.double()[:, None] * self.inverse_frequencies.to(positions.device)[None, :]
        if self.sign < 0:
            angles = -angles
        return Table((angles.cos() * self.scaling).float(), (angles.sin() * self.scaling).float(), self)


@dataclass(frozen=True, eq=False)
class Alibi:
    """Attention with linear biases (Press et al., ICLR 2022, arXiv 2108.12409): a pair at distance d gets -slope * d on its scaled logit.

    slopes: [H] fp64, one per query head. Keys are stored as they are, whatever their positions: the bias is a matter of the logits.
    """

    slopes: torch.Tensor

    def on(self, device: torch.device) -> torch.Tensor:
        return self.slopes.to(device)


@dataclass(frozen=True, eq=False)
class Table:
    """cos and sin for given positions, ready to rotate any number of heads."""

    cos: torch.Tensor  # [T, r/2] fp32
    sin: torch.Tensor  # [T, r/2] fp32
    rotary: Rotary

    def to(self, device: torch.device) -> Table:
        return self if self.cos.device == device else Table(self.cos.to(device), self.sin.to(device), self.rotary)

    def rotate(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., T, D] -> the same shape and dtype, rotated in fp32 and cast once. `scale` [T] multiplies the result."""
        if x.shape[-2] <= FEW_ROWS and self.rotary.pairing == "half" and self.rotary.width == x.shape[-1]:
            y = x.float()
            y = torch.addcmul(y * self._whole[0], y.roll(self.rotary.width // 2, -1), self._whole[1])
            return (y if scale is None else y * scale[:, None]).to(x.dtype)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        at_once = ROWS_AT_ONCE if x.device.type == "cpu" else LAUNCH_ROWS
        for a in range(0, x.shape[-2], at_once):
            rows = slice(a, a + at_once)
            self._rotate(x[..., rows, :], out[..., rows, :], rows, None if scale is None else scale[rows])
        return out

    @functools.cached_property
    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What multiplies a head, and what multiplies it with its halves exchanged."""
        return torch.cat([self.cos, self.cos], -1), torch.cat([-self.sin, self.sin], -1)

    def _rotate(self, x: torch.Tensor, target: torch.Tensor, rows: slice, scale: torch.Tensor | None) -> None:
        """Write the rotation of `x`, whose positions are those of `rows`, into `target`."""
        out = target if target.dtype == torch.float32 else torch.empty(x.shape, dtype=torch.float32, device=x.device)
        cos, sin, r, start = self.cos[rows], self.sin[rows], self.rotary.width, self.rotary.start
        if start:
            out[..., :start] = x[..., :start]
        if start + r < x.shape[-1]:
            out[..., start + r :] = x[..., start + r :]
        a, b = self._pairs(x[..., start : start + r].float())
        out_a, out_b = self._pairs(out[..., start : start + r])
        torch.mul(a, cos, out=out_a)
        out_a.addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out_b)
        out_b.addcmul_(a, sin)
        if scale is not None:
            out *= scale[:, None]
        if out is not target:
            target.copy_(out)

    def _pairs(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.rotary.pairing == "half":
            half = self.rotary.width // 2
            return x[..., :half], x[..., half:]
        return x[..., 0::2], x[..., 1::2]
