"""How far two tensors are apart, as a gate needs it: what is not finite is infinitely far, so that NaN fails every gate.

Python's `max(worst, nan)` is `worst`, and a comparison with NaN is False in the direction that passes as well. No number from here is NaN.
"""

from __future__ import annotations

import torch

TINY = 1e-30


def largest(x: torch.Tensor) -> float:
    """The largest absolute value, infinite if anything is not finite; 0 of nothing."""
    if not x.numel():
        return 0.0
    found = float(x.detach().abs().max().item())
    return found if found < float("inf") else float("inf")


def relative(ours: torch.Tensor, want: torch.Tensor) -> float:
    """Largest absolute difference over the largest value of `want`, in fp32; infinite if anything of either is not finite."""
    ours, want = ours.detach().float(), want.detach().float()
    error = largest(ours - want)
    return error if error == float("inf") else error / max(largest(want), TINY)


def root_mean_square(ours: torch.Tensor, want: torch.Tensor) -> float:
    """Root mean square of the difference over that of `want`, in fp32; infinite if anything of either is not finite."""
    ours, want = ours.detach().float(), want.detach().float()
    if largest(ours - want) == float("inf"):
        return float("inf")
    scale = max(largest(want), TINY)  # squares of small fp32 values would vanish
    error, size = (((x / scale).square().mean()).sqrt().item() for x in (ours - want, want))
    return error / max(size, TINY)
