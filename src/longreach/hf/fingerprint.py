"""A fingerprint of weights: the same for the same model on every device, another after a fine-tune, a cast, a merge or a switched adapter.

Knows modules and tensors, those of quantised, sharded and off-loaded models too; not what they compute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from longreach.hf.placement import at_hand, saved_tensors

SAMPLES = 64  # elements of every tensor: enough to tell checkpoints apart, few enough to be read at once
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")  # what decides, beside weights, which adapters act


def fingerprint(model: nn.Module) -> str:
    """A hash of the shape, dtype and evenly spaced elements of every parameter and saved buffer, and of which adapters act."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        if hasattr(module, "base_layer"):
            digest.update(repr([path, *(str(getattr(module, name, None)) for name in ADAPTER_STATE)]).encode())
        with at_hand(module):
            for name, tensor in saved_tensors(module):
                for part in _plain(tensor.detach()):
                    digest.update(repr([path, name, list(part.shape), str(part.dtype)]).encode())
                    digest.update(_sample(part))
    return digest.hexdigest()


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The ordinary tensors that a quantised or sharded one is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from _plain(getattr(tensor, name))


def _sample(tensor: torch.Tensor) -> bytes:
    flat = tensor.reshape(-1)
    if not flat.numel():
        return b""
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return bytes(flat[index.to(flat.device)].contiguous().view(torch.uint8).cpu().numpy())
