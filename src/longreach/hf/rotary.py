"""Reading a model's own rotary encoding: identity in its place, and a probe that verifies what we read, layer by layer.

Two short forwards, one with the model's rotary and one with the identity, give every layer's q and k with and without rotation.
The pairing, slice and sign that turn one into the other, with the model's own cos and sin, are the layer's facts. Support is
therefore verified on the model at hand, not looked up in a list.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from longreach.core.differences import relative
from longreach.core.encodings import Rotary, exact_device

Key = str | None  # the layer type a model passes to its rotary module, None where there is one set of frequencies


class IdentityRotary(nn.Module):
    """Stands in for a model's rotary module: cos = 1, sin = 0, so q and k reach attention un-rotated. Keeps the original."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.probed = copy.deepcopy(original)  # some rotary modules change with what they see; the original must not
        self.widths: dict[Key, int] = {}
        self.turns = False  # whether the model takes cos + i sin, one complex number per pair
        self.record: list[tuple[Key, torch.Tensor, torch.Tensor]] | None = None  # filled while probing with the original

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        key = args[0] if args else kwargs.get("layer_type")
        if self.record is not None:
            result = self.probed(x, position_ids, *args, **kwargs)
            self.turns = isinstance(result, torch.Tensor)
            cos, sin = cos_and_sin(self.original, result)
            self.record.append((key, cos, sin))
            self.widths[key] = cos.shape[-1]
            return result
        one = torch.ones((), dtype=torch.complex64 if self.turns else x.dtype, device=x.device).expand(*position_ids.shape, self.widths[key])
        return one if self.turns else (one, torch.zeros((), dtype=x.dtype, device=x.device).expand_as(one))


def cos_and_sin(module: nn.Module, result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rotary module returned, as (cos, sin) [B, T, width]: given as such, or as complex numbers."""
    if isinstance(result, torch.Tensor) and result.is_complex():
        result = result.real, result.imag
    if isinstance(result, tuple) and len(result) == 2 and all(isinstance(t, torch.Tensor) and t.dim() == 3 for t in result):
        return result[0], result[1]
    raise ValueError(
        f"{type(module).__name__} does not return (cos, sin) of shape [batch, tokens, width]; "
        "this rotary encoding is not supported, use the model without extend()"
    )


@dataclass
class Seen:
    """What one attention layer received in a probe forward."""

    module: nn.Module
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kwargs: dict[str, Any] = field(repr=False)


def frequencies(original: nn.Module, key: Key, positions: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The module's inverse frequencies fp64 and scaling, checked against its own cos and sin in fp32."""
    prefix = "" if key is None else f"{key}_"
    buffer = getattr(original, f"{prefix}inv_freq", getattr(original, "inv_freq", None))
    if not isinstance(buffer, torch.Tensor):
        raise ValueError(f"{type(original).__name__} has no inverse frequencies that we can read; use the model without extend()")
    scaling = getattr(original, f"{prefix}attention_scaling", getattr(original, "attention_scaling", 1.0))
    exact = exact_device(positions.device)
    args = () if key is None else (key,)
    cos, sin = cos_and_sin(original, original(torch.zeros(1, 1, device=positions.device, dtype=torch.float32), positions, *args))

    def matches(inverse: torch.Tensor) -> bool:
        angles, n = positions[0].to(exact).double()[:, None] * inverse, inverse.numel()
        ours = (angles.cos() * scaling, angles.sin() * scaling)
        # cat(f, f) and half width begin with all frequencies; repeat-interleave has each twice in a row
        return any(
            all(take(t).shape == w.shape and torch.allclose(take(t).to(exact).double(), w, atol=1e-4) for t, w in zip((cos, sin), ours, strict=True))
            for take in (lambda t: t[0, :, :n], lambda t: t[0, :, ::2])
        )

    inverse = buffer.detach().to(exact).double()
    if matches(inverse):
        return inverse, float(scaling)
    if callable(compute := getattr(original, "rope_init_fn", None)):
        # PhiMoE computes them anew in every forward, in fp32, whatever dtype the buffer was cast to
        inverse = compute(original.config)[0].to(exact).double()
        if matches(inverse):
            return inverse, float(scaling)
    raise ValueError(f"the cos and sin of {type(original).__name__} are not those of its inverse frequencies; use the model without extend()")


def match(
    raw: Seen, turned: Seen, tables: dict[Key, tuple[torch.Tensor, torch.Tensor]], encodings: dict[Key, tuple[torch.Tensor, float]], kind: Key = None
) -> tuple[Key, Rotary | None, float]:
    """The rotary of one layer of type `kind`: (key, facts, largest relative difference of q and k). Facts None: the layer rotates nothing."""
    if torch.equal(raw.q, turned.q) and torch.equal(raw.k, turned.k):
        return None, None, 0.0
    best: tuple[Key, Rotary | None, float] = (None, None, float("inf"))
    for key, (cos, sin) in sorted(tables.items(), key=lambda item: item[0] != kind):  # two kinds may agree on so few positions
        inverse, scaling = encodings[key]
        width = 2 * inverse.numel()
        if width > raw.q.shape[-1]:  # of another kind of layer, with wider heads
            continue
        pairings: tuple[Literal["half", "interleaved"], ...] = ("half", "interleaved")
        for pairing in pairings:
            for start in {0, raw.q.shape[-1] - width}:
                for sign in (1, -1):
                    rotary = Rotary(inverse, scaling, pairing, start, sign)
                    difference = max(_difference(raw.q, turned.q, cos, sin, rotary), _difference(raw.k, turned.k, cos, sin, rotary))
                    if difference < best[2]:
                        best = (key, rotary, difference)
    return best


def _difference(raw: torch.Tensor, turned: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary: Rotary) -> float:
    """Rotate `raw` with the model's own cos and sin, in their dtype, and compare with what the model made of it."""
    n, start = rotary.width // 2, rotary.start
    interleaved_layout = cos.shape[-1] == 2 * n and bool((cos[..., 0] == cos[..., 1]).all()) and not bool((cos[..., 0] == cos[..., n]).all())
    cos, sin = cos.to(raw.device), sin.to(raw.device)  # layers may lie on other devices than the rotary module
    cos, sin = (t[:, None, :, ::2] if interleaved_layout else t[:, None, :, :n] for t in (cos, sin))
    part = raw[..., start : start + 2 * n]
    a, b = (part[..., :n], part[..., n:]) if rotary.pairing == "half" else (part[..., 0::2], part[..., 1::2])
    sin = sin * rotary.sign
    new = (a * cos - b * sin, b * cos + a * sin)
    pairs = torch.cat(new, -1) if rotary.pairing == "half" else torch.stack(new, -1).flatten(-2)
    result = torch.cat([raw[..., :start].to(pairs.dtype), pairs, raw[..., start + 2 * n :].to(pairs.dtype)], -1)
    return relative(result, turned)


@contextmanager
def evaluation(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode without gradients, autocast and compiled code: what is measured is the model itself. Every module's own flag is put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, flag in flags:
            module.training = flag
