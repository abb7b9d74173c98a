"""Backends: attention of a block of queries to a run of keys inside a band, returned with its log-sum-exp.

A backend knows tensors of one device; it does not know positions, methods, stores or models.
"""

from __future__ import annotations

from typing import Protocol

import torch

from longreach.kernels.biased import Bias
from longreach.kernels.tiles import Band


class Backend(Protocol):
    name: str

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, band: Band, scale: float, softcap: float | None = None, bias: Bias | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [B, H, T, D], k [B, G, C, D], v [B, G, C, E] -> out [B, H, T, E], lse [B, H, T] fp32, natural logarithm.

        G divides H; groups are not expanded by the caller. A row that sees no key has out = 0 and lse = -inf.
        A bias comes without a soft-cap.
        """
        ...


def backend_for(device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of a device, self-tested at its first use on CUDA. Raises where there is none."""
    if device.type == "cpu":
        from longreach.kernels.cpu import CpuBackend

        return CpuBackend()
    if device.type == "cuda":
        from longreach.kernels.cuda import cuda_backend

        return cuda_backend(device, dtype)
    if device.type == "mps":
        from longreach.kernels.plain import PlainBackend

        return PlainBackend()
    raise ValueError(f"no attention backend for device {device.type!r}; move the model to 'cpu', 'cuda' or 'mps'")
