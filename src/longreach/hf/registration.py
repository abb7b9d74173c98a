"""What the process, the caches and the layers of a model hold of an extension, so that each can be dropped without the others.

Transformers finds attention and mask functions by name in mappings of the whole process, and a cache outlives the forwards that filled it. None
of them may keep a model alive. Knows Transformers' mappings and nothing about methods, plans or stores.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

if TYPE_CHECKING:
    from longreach.engine.batch import Plan
    from longreach.hf.rotary import Seen
    from longreach.memory.store import Store

PREFIX = "longreach"  # of the names of our functions, each followed by the number of an extension
MAPPINGS = (AttentionInterface, AttentionMaskInterface)

Configs = Sequence[tuple[Any, str]]  # every configuration of a model, with the implementation it had before


@dataclass(eq=False)
class Call:
    """A forward of the model around the base model: its tokens count when the head, too, has run."""

    tokens: weakref.ref[torch.Tensor]
    announced: int  # new tokens that may be cropped again
    used: bool = False  # whether it has called the base model
    finished: Plan | None = None


@dataclass(eq=False)
class Forward:
    """A forward of the base model."""

    tokens: weakref.ref[torch.Tensor]
    plan: Plan
    caller: Call | None


class Forwards(threading.local):
    """The forwards of one extension that are under way in this thread, the innermost last: one may be called from a hook inside another.

    Each is known by the tensor of its tokens, which it alone holds; those whose tensor is gone were broken off, by an interrupt for example.
    Stores know it as their owner. It holds no model.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.open: list[Forward] = []
        self.seen: list[Seen] | None = None  # filled while a model is probed

    @property
    def plan(self) -> Plan | None:
        return self.open[-1].plan if self.open else None

    def _prune(self) -> None:
        self.calls = [call for call in self.calls if call.tokens() is not None]
        self.open = [forward for forward in self.open if forward.tokens() is not None]

    def enter(self, tokens: torch.Tensor, announced: int) -> None:
        self._prune()
        self.calls.append(Call(weakref.ref(tokens), announced))

    def leave(self, tokens: torch.Tensor | None) -> Plan | None:
        """The plan of what the call has read; None if there is none, or if it counts already."""
        place = next((place for place, call in enumerate(self.calls) if call.tokens() is tokens is not None), None)
        if place is None:
            return None
        finished = self.calls[place].finished
        del self.calls[place:]
        return finished

    def caller(self) -> Call | None:
        """The call that the base model is run for; None where it is called by itself."""
        self._prune()
        return self.calls[-1] if self.calls and not self.calls[-1].used else None

    def refuse_nested(self, store: Store) -> None:
        if any(forward.plan.store is store for forward in self.open) or any(call.finished is not None and call.finished.store is store for call in self.calls):
            raise ValueError("this cache is written to by the forward that is under way; inside it, pass another: extension.fork(cache), or use_cache=False")

    def begin(self, plan: Plan, tokens: torch.Tensor, caller: Call | None) -> None:
        if caller is not None:
            caller.used = True
        self.open.append(Forward(weakref.ref(tokens), plan, caller))

    def end(self, tokens: torch.Tensor | None, finished: bool) -> Plan | None:
        """The plan of the forward that is over, if its tokens count now; None if its caller has to finish first, or if it never began."""
        place = next((place for place, forward in enumerate(self.open) if forward.tokens() is tokens is not None), None)
        if place is None:
            if not finished or not self.open:
                return None
            place = len(self.open) - 1  # another hook has exchanged the tokens
        forward = self.open[place]
        del self.open[place:]
        if forward.caller is None or forward.caller not in self.calls:
            return forward.plan
        forward.caller.finished = forward.plan if finished else None
        return None

    def expects(self, store: Store) -> bool:
        """Whether the forward that is under way writes to `store`."""
        return self.plan is not None and self.plan.store is store

    def __deepcopy__(self, memo: Any) -> Forwards:
        return self  # a copied cache belongs to the same extension


def register(name: str, attention: Callable[..., Any], mask: Callable[..., Any]) -> None:
    for mapping, function in zip(MAPPINGS, (attention, mask), strict=True):
        mapping.register(name, _weakly(function))


def unregister(name: str, configs: Configs) -> None:
    """Undo `register`, and give every configuration that has the name its own implementation back."""
    for mapping in MAPPINGS:
        mapping._global_mapping.pop(name, None)
    for config, implementation in configs:
        if config._attn_implementation_internal == name:
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

    @torch.compiler.disable
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
