"""The frequencies of one kind of layer, fixed once at `extend()`: the model's own, or those of a method.

Knows Transformers' rope functions; not forwards or caches.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longreach import configs
from longreach.core.encodings import Frequencies, Rope, Rotary
from longreach.hf.rotary import Key
from longreach.methods.base import Method

SWITCHING = ("dynamic", "longrope")  # rope types that choose their frequencies from the length


def fixed(config: Any, key: Key, found: Rotary, method: Method, window: configs.Window, context: int | None) -> Rotary:
    """The rotary of a layer under `method`, its length-dependent frequencies fixed from the largest distance the method makes."""
    length = int(method.largest_distance(context or method.capacity(window.tokens) or window.tokens)) + 1
    rope = configs.scaling(config, key or "full_attention")
    if method.rescales:
        refuse_scaled(method, rope)
        own = Frequencies(found.inverse_frequencies, found.scaling)
        new = method.frequencies(Rope(own, window.tokens, length, _Standard(config.model_type, rope.base, own, window.tokens)))
        assert new.inverse.shape == own.inverse.shape, f"{method.name} gives {new.inverse.numel()} frequencies for {own.inverse.numel()} pairs"
        return found.at(new)
    if rope.kind not in SWITCHING:
        return found
    arguments = {} if key is None else {"layer_type": key}
    length = max(length, configs.original_window(config, key or "full_attention", window.tokens)) if rope.kind == "dynamic" else length
    inverse, scaling = ROPE_INIT_FUNCTIONS[rope.kind](config, found.inverse_frequencies.device, seq_len=length, **arguments)
    return found.at(Frequencies(inverse.double(), float(scaling)))


def refuse_scaled(method: Method, rope: configs.Scaling) -> None:
    """Two scalings do not add up: the lists and ramps of a method are meant for frequencies as they were first trained."""
    if rope.kind == "default":
        return
    by = f" by {rope.factor:g}" if rope.factor else ""
    raise ValueError(
        f"the rotary of this model is scaled already ({rope.kind}{by}), and {method.name} would scale it again; use a method that "
        f"keeps its frequencies, such as SelfExtend or LMInfinite, or load the model with rope_type 'default' and its first trained window"
    )


def change(before: Rotary, after: Rotary) -> dict[str, Any]:
    """What a method did to the frequencies of a layer, from the fastest to the slowest pair, as plain data."""
    ratio = before.inverse_frequencies / after.inverse_frequencies
    return {"divided_by": [ratio[0].item(), ratio[-1].item()], "attention_factor": after.scaling}


class _Standard:
    """Transformers' rope functions at the base and the width of one kind of layer; see `encodings.Standard`."""

    def __init__(self, model: str, base: float | None, own: Frequencies, window: int) -> None:
        self.base = base or 10000.0  # RoPE's own, which GPT-J does not write down; compared below before it is used
        self.own, self.window, self.model = own, window, model

    def __call__(self, rope_type: str, length: int | None = None, **parameters: Any) -> Frequencies:
        # the functions read width and partial rotation from many kinds of configuration: a plain one that says what the probe found
        # is right for all, and this comparison proves it
        own = self.own.inverse
        cast = any(torch.equal(own, own.to(half).double()) for half in (torch.bfloat16, torch.float16))  # model.half() rounds buffers too
        rtol, atol = (1e-2, 1e-7) if cast else (1e-5, 0.0)
        if not torch.allclose(self.evaluate("linear", None, factor=1.0).inverse, own, rtol=rtol, atol=atol):
            raise ValueError(
                f"the frequencies of {self.model} are not powers of its rope_theta ({self.base}), so {rope_type} scaling has no meaning for them; "
                "use a method that keeps them, such as SelfExtend or LMInfinite"
            )
        return self.evaluate(rope_type, length, **parameters)

    def evaluate(self, rope_type: str, length: int | None, **parameters: Any) -> Frequencies:
        width = 2 * self.own.inverse.numel()
        plain = LlamaConfig(hidden_size=width, num_attention_heads=1, head_dim=width, max_position_embeddings=self.window)
        plain.rope_parameters = {"rope_type": rope_type, "rope_theta": self.base, "original_max_position_embeddings": self.window, **parameters}
        inverse, scaling = ROPE_INIT_FUNCTIONS[rope_type](plain, self.own.inverse.device, seq_len=length)
        return Frequencies(inverse.double(), float(scaling))


def without_model(method: Method, window: int, context: int, base: float, width: int) -> tuple[Frequencies, Frequencies]:
    """What a head of `width` rotary dims, trained on `window` tokens, rotates with by itself and under the method: for pictures and tables."""
    pair = torch.arange(0, width, 2).float() / width  # fp32 as in the models, whose frequencies the standard functions are compared with
    own = Frequencies((1.0 / base**pair).double())
    if not method.rescales:
        return own, own
    length = int(method.largest_distance(context)) + 1
    return own, method.frequencies(Rope(own, window, length, _Standard("this head", base, own, window)))
