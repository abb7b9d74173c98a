"""Apple GPUs, which have no fp64 and no fused attention with a log-sum-exp: matrix products."""

from __future__ import annotations

import torch

from longreach.kernels.plain import PlainKernel
from longreach.kernels.protocol import Kernel


def kernels(device: torch.device, dtype: torch.dtype) -> list[Kernel]:
    return [PlainKernel()]
