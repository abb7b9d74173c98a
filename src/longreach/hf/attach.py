"""Our functions in a model, and out of it again: per instance, and the model is bit-identical after.

Four pieces: our attention in place of the model's own (the seam knows how), a mask function under the same name, hooks around the base model, and
hooks around the model that has the head. Knows modules and hooks; not what the functions do.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from longreach.hf import registration
from longreach.hf.cache import keep_in_generation
from longreach.hf.facts import Seam
from longreach.hf.forward import Forward


class Attachment:
    """A forward put into its model. `remove()`, or the end of a `with` block, takes it off."""

    def __init__(self, seam: Seam, forward: Forward) -> None:
        self.seam, self.forward = seam, forward
        self._hooks: list[Any] = []
        self._undo: Any = lambda: None
        registration.register(seam.name, forward)
        self._unregister = weakref.finalize(forward, registration.unregister, seam.name, seam.before)  # for models that are dropped, not given back
        self._unregister.atexit = False
        try:
            self._put(seam, forward)
        except BaseException:
            self.remove()
            raise

    def _put(self, seam: Seam, forward: Forward) -> None:
        seam.install(forward.attention, forward.modules)
        self._hooks = [
            seam.base.register_forward_pre_hook(forward.open, with_kwargs=True),
            seam.base.register_forward_hook(forward.close, with_kwargs=True, always_call=True),
        ]
        if (outer := _caller_of(seam.model, seam.base)) is not None:
            self._hooks += [
                outer.register_forward_pre_hook(forward.enter, with_kwargs=True),
                outer.register_forward_hook(forward.leave, with_kwargs=True, always_call=True),
            ]
            self._undo = keep_in_generation(outer)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._undo()
        self.seam.remove()
        self._unregister()
        self.forward.end()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _caller_of(model: nn.Module, base: nn.Module) -> nn.Module | None:
    """The model that calls the base model and puts a head on it; None of a bare base model."""
    around = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not base and any(inner is base for inner in m.modules())]
    return around[-1] if around else None
