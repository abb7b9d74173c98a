"""Names under which Transformers finds our functions, and code of a model that is kept out of compiled graphs.

Transformers finds attention and mask functions by name in mappings of the whole process, which must not keep a model alive. Knows these
mappings; nothing about methods, batches or stores.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PREFIX = "longreach"  # of the names of our functions, each followed by the number of an extension
MAPPINGS = (AttentionInterface, AttentionMaskInterface)

Configs = Sequence[tuple[Any, str]]  # every configuration of a model, with the implementation it had before


def register(name: str, functions: Any) -> None:
    """`functions` has an attention function and a mask function. It is not kept alive.

    Compiled code calls the mask function; the attention function is called by modules that are not compiled, see `Uncompiled`.
    """
    AttentionInterface.register(name, _weakly(functions.attention))
    AttentionMaskInterface.register(name, torch.compiler.disable(_weakly(functions.mask)))


def unregister(name: str, configs: Configs = ()) -> None:
    """Undo `register`, and give every configuration that has the name its own implementation back."""
    for mapping in MAPPINGS:
        mapping._global_mapping.pop(name, None)
    set_back(configs, name)


def set_back(configs: Configs, name: str | None = None) -> None:
    """The implementations that the configurations had before, of those that have `name` now; None: of all."""
    for config, implementation in configs:
        if name is None or config._attn_implementation_internal == name:
            config._attn_implementation_internal = implementation


def refuse_taken(configs: Iterable[Any]) -> None:
    """A configuration names one attention function, so it can serve one extended model."""
    if any(str(config._attn_implementation_internal).startswith(PREFIX) for config in configs):
        raise ValueError(
            "the config of this model is in use by another model that is extended, or was copied from one; call remove() on that extension, then give "
            "each model its own: model.config = copy.deepcopy(config) before the model is made, or load the model again"
        )


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls a bound method and does not keep what it is bound to."""
    reference = weakref.WeakMethod(method)

    def call(*args: Any, **kwargs: Any) -> Any:
        found = reference()
        if found is None:
            raise ValueError("the model that was extended is gone; give each model its own config (copy.deepcopy) and extend it itself")
        return found(*args, **kwargs)

    return call


class Uncompiled:
    """In place of an attention module's forward: the same, outside compiled graphs.

    A forward reads the number of its layer for the cache, so that its compiled code would be made anew for every layer, up to torch.compile's limit.
    """

    def __init__(self, module: nn.Module) -> None:
        self.own = module.__dict__.get("forward")  # of another library, such as accelerate
        self.forward = module.forward

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)


def uncompile(modules: Iterable[Any]) -> None:
    for module in modules:
        module.forward = Uncompiled(module)


def restore(modules: Iterable[Any]) -> None:
    for module in modules:
        if isinstance(placed := module.__dict__.get("forward"), Uncompiled):
            if placed.own is None:
                del module.forward
            else:
                module.forward = placed.own
