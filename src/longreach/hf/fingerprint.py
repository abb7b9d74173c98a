"""Two fingerprints of weights, the same for the same model on every device, others after a fine-tune, a merge or a switched adapter.

`fingerprint` changes with a cast, as what was computed does; `checkpoint_fingerprint` does not, as which model it is does not.
Knows modules and tensors, those of quantised, sharded and off-loaded models too; not what they compute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from longreach.hf.placement import FLOATS, at_hand, saved_tensors

SAMPLES = 64  # elements of every tensor: enough to tell checkpoints apart, few enough to be read at once
ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")  # what decides, beside weights, which adapters act


def fingerprint(model: nn.Module) -> str:
    """A hash of the shape, dtype and evenly spaced elements of every parameter and saved buffer, and of which adapters act."""
    return _hash(model, lambda part: (str(part.dtype), _sample(part)))


def checkpoint_fingerprint(model: nn.Module) -> str:
    """The same of a model in float32, and of the same cast to bfloat16: elements are rounded to bfloat16, and no dtype is hashed.

    What a quantisation packs has no such rounding: it keeps its own dtype, and so has another fingerprint than the checkpoint it was made of.
    Nor has a float32 checkpoint cast to float16 the same one: what was rounded there may round to another bfloat16.
    """

    def facts(part: torch.Tensor) -> tuple[str, torch.Tensor]:
        return ("", _sample(part).to(torch.bfloat16)) if part.dtype in FLOATS else (str(part.dtype), _sample(part))

    return _hash(model, facts)


def _hash(model: nn.Module, facts: Callable[[torch.Tensor], tuple[str, torch.Tensor]]) -> str:
    """`facts` gives of a plain tensor what names its kind, and the elements that are hashed."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        if hasattr(module, "base_layer"):
            digest.update(repr([path, *(str(getattr(module, name, None)) for name in ADAPTER_STATE)]).encode())
        with at_hand(module):
            for name, tensor in saved_tensors(module):
                for part in _plain(tensor.detach()):
                    kind, sample = facts(part)
                    digest.update(repr([path, name, list(part.shape), kind]).encode())
                    digest.update(bytes(sample.contiguous().view(torch.uint8).cpu().numpy()))
    return digest.hexdigest()


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The ordinary tensors that a quantised or sharded one is made of."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for name in flatten()[0]:
        yield from _plain(getattr(tensor, name))


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """[SAMPLES or fewer] elements from the first to the last."""
    flat = tensor.reshape(-1)
    if not flat.numel():
        return flat
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return flat[index.to(flat.device)]
