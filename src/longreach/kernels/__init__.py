"""Kernels: attention of a block of queries to keys inside a band, with its log-sum-exp. One call shape (protocol.py), one file per device."""

from __future__ import annotations

import functools

import torch

from longreach.kernels.protocol import Kernel


@functools.cache
def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel of a device, self-tested at its first use. Raises where there is none."""
    from longreach.kernels import selftest

    if device.type == "cuda":
        from longreach.kernels.cuda import cuda_kernel

        return cuda_kernel(device, dtype)
    if device.type == "cpu":
        from longreach.kernels.cpu import CpuKernel

        kernel: Kernel = CpuKernel()
    elif device.type == "mps":
        from longreach.kernels.plain import PlainKernel

        kernel = PlainKernel()
    else:
        raise ValueError(f"no attention kernel for device {device.type!r}; move the model to 'cpu', 'cuda' or 'mps'")
    selftest.require(kernel, device, dtype)
    return kernel
