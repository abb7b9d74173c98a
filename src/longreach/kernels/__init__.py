"""Kernels: attention of a block of queries to keys inside a band, with its log-sum-exp. One call shape (protocol.py), one file per kind of device."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch

from longreach.kernels.protocol import Kernel


@functools.cache
def kernel_for(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The kernel of a device: `kernels(device, dtype)` of the file that has the name of its type says which may be used, the fastest first, and the first that
    passes the self-test is. Raises ValueError where there is none."""
    from longreach.kernels import selftest

    if importlib.util.find_spec(f"{__name__}.{device.type}") is None:
        raise ValueError(f"no attention kernel for device {device.type!r}; move the model to 'cpu', 'cuda' or 'mps'")
    failures = []
    for kernel in importlib.import_module(f"{__name__}.{device.type}").kernels(device, dtype):
        if (failure := selftest.failure(kernel, device, dtype)) is None:
            return kernel
        failures.append(f"{kernel.name}: {failure}")
    raise ValueError(f"no attention of this PyTorch passes the self-test on {device.type} ({'; '.join(failures)}); update PyTorch, or move the model to 'cpu'")
