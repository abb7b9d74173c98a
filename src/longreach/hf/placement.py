"""Where the weights of a model are: on one device, on several, or away until a forward needs them (accelerate's off-loading).

Knows modules and accelerate's hooks; not what a model computes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from longreach.hf.interfaces import CausalLM


def device_of(model: nn.Module | CausalLM) -> torch.device:
    """The device that a model takes its input on."""
    embeddings = cast(Any, model).get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for tensor in itertools.chain(embeddings.parameters() if isinstance(embeddings, nn.Module) else (), model.parameters()):  # asked before every forward
        if not tensor.is_meta:
            return tensor.device
    for module in model.modules():
        if (device := getattr(getattr(module, "_hf_hook", None), "execution_device", None)) is not None:
            return torch.device(device)
    raise ValueError("the weights of this model are on the meta device and were never loaded; load it with from_pretrained or to_empty and a state dict")


def saved_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a module itself and the buffers that a checkpoint holds."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32)


def ordinary(model: nn.Module) -> bool:
    """Whether all weights are at hand as plain floating-point tensors: not packed by a quantisation, sharded or off-loaded. Those of a GGUF file are."""
    plain = all(p.dtype in FLOATS and not p.is_meta and not hasattr(p, "__tensor_flatten__") for p in model.parameters())
    return plain and not any(b.dtype in INTEGERS and b.dim() > 1 for b in model.buffers())


def at_hand(module: nn.Module) -> AbstractContextManager[Any]:
    """Inside, the weights of the module itself can be read: those that accelerate keeps elsewhere are brought to the CPU."""
    if not any(tensor.is_meta for _, tensor in saved_tensors(module)):
        return nullcontext()
    from accelerate.utils import align_module_device

    found: AbstractContextManager[Any] = align_module_device(module, torch.device("cpu"))
    return found
