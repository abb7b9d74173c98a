"""The worker: attaches a method to the model that a worker of vLLM has loaded. Knows vLLM's workers and attention layers."""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.v1.attention.backend import AttentionType

from longreach import configs
from longreach.core.encodings import Rotary
from longreach.engine.layer import Inputs, Layer
from longreach.hf.frequencies import fixed
from longreach.kernels import kernel_for
from longreach.kernels.paged import reading_pages
from longreach.kernels.protocol import Kernel
from longreach.methods.stock import Stock
from longreach.vllm import probe, selftest, settings
from longreach.vllm.pages import Bound, Paged
from longreach.vllm.seam import blocks
from longreach.vllm.seam.backend import Backend, Impl
from longreach.vllm.seam.plugin import WORKERS, settings_of

ROTARY = "vllm.model_executor.layers.rotary_embedding"

logger = logging.getLogger("vllm.longreach")


class _Attaching:
    """Beside a worker of vLLM."""

    vllm_config: Any
    model_runner: Any

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)  # type: ignore[misc]
        with importlib.import_module("vllm.config").set_current_vllm_config(self.vllm_config):
            attach(self.vllm_config, self.model_runner.get_model())


def __getattr__(name: str) -> Any:
    """vLLM asks for a worker by its name: one of `WORKERS`, which attaches the method to the model that it has loaded."""
    if name not in WORKERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _worker(name)


@functools.cache
def _worker(name: str) -> type:
    return type(name, (_Attaching, getattr(importlib.import_module(WORKERS[name]), name)), {})


def attach(config: Any, model: nn.Module) -> None:
    """Put our attention in place of every layer's own, and the identity in place of its rotary. Raises ValueError where anything is not as we know it."""
    base = importlib.import_module("vllm.model_executor.layers.attention_layer_base").AttentionLayerBase
    plain = importlib.import_module("vllm.model_executor.layers.attention").Attention
    number = importlib.import_module("vllm.model_executor.models.utils").extract_layer_index
    text = config.model_config.hf_text_config
    decided = settings.decide(settings.parse(settings_of(config)), text, config.model_config.max_model_len)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, base)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention layers that longreach knows; use vLLM without longreach")
    for name, module in found:
        _refuse_layer(name, module, plain)
    trained = configs.trained_layers(text)  # of the whole model, some of whose layers may be elsewhere
    own = {each.sliding_window for each in trained}
    takes_all = all(each is decided.method for each in configs.methods_of(trained, decided.method))
    worst, tested, rotaries, kernels = 0.0, {}, list[Rotary](), dict[tuple[torch.dtype, int], tuple[Kernel, str]]()
    for name, module in found:
        method = decided.method if module.sliding_window is None or takes_all else Stock(sliding_window=module.sliding_window)
        rotary, difference = probe.replace_rotaries(probe.unit_of(model, name, ROTARY))
        worst = max(worst, difference)
        if rotary is None and method.rescales:
            raise ValueError(f"{name} rotates nothing, so {method.name} would change nothing there; use SelfExtend or LMInfinite")
        if rotary is not None and method is decided.method:
            rotary = fixed(text, None, rotary, method, decided.window, decided.context)
        rotary = None if rotary is None else _shared(rotary, rotaries)
        device = next(model.parameters()).device
        inputs = Inputs(float(module.impl.scale), getattr(module.impl, "logits_soft_cap", None) or None, getattr(module.impl, "sinks", None))
        dtype = module.kv_cache_torch_dtype
        if (shape := (dtype, module.head_size)) not in kernels:
            kernels[shape] = reading_pages(kernel_for(device, dtype), device, *shape)
        paged = Paged(Layer(number(name), method, rotary, written=True), inputs, kernels[shape][0])
        kind = (method, module.num_heads, module.num_kv_heads, module.head_size, rotary is None, inputs.softcap)
        if kind not in tested:
            tested[kind] = _tested(paged, module, device, config)
        module.impl, module.attn_backend = Impl(paged, module), Backend
        if method is decided.method:
            module.sliding_window = None  # where all layers slide, the method takes them
            if decided.frees:
                module.get_kv_cache_spec = functools.partial(blocks.spec_of, module, _apart(name, paged, own))
    logger.info(
        "longreach: attached to %d layers; rotation %.1e, attention on pages %.1e (largest relative differences to vLLM's own rotary and the dense truth); %s",
        len(found), worst, max(tested.values()), "; ".join({said: None for _, said in kernels.values()}),
    )  # fmt: skip


def _shared(rotary: Rotary, others: list[Rotary]) -> Rotary:
    """One object for all layers that rotate alike: angles are made once for it in a forward."""
    found = next((each for each in others if each.same_as(rotary)), None)
    if found is None:
        others.append(rotary)
    return found or rotary


def _apart(name: str, paged: Paged, own: set[int | None]) -> Bound:
    """How far a layer sees, at least: vLLM takes layers of one window for one kind, and those that slide by themselves keep no first tokens."""
    bound = paged.bound
    if bound is None:
        raise ValueError(f'{paged.layer.method} may see any key in {name}, so that no page can be freed; set "pages": "keep" for longreach')
    while bound.near in own:
        bound = replace(bound, near=bound.near + 1)
    return bound


def _refuse_layer(name: str, module: Any, plain: type) -> None:
    if (kind := type(module)) is not plain:
        raise ValueError(f"{name} is a {kind.__name__}, which keeps something else than keys and values of every token; use vLLM without longreach")
    for what, wrong in {
        "attends to more than what comes before": module.attn_type != AttentionType.DECODER,
        "reads the keys of another layer": module.kv_sharing_target_layer_name is not None,
        "has the biases of ALiBi": getattr(module.impl, "alibi_slopes", None) is not None,
        "has values of another width than its keys": module.head_size_v != module.head_size,
    }.items():
        if wrong:
            raise ValueError(f"{name} {what}, which longreach does not support on vLLM; use longreach serve")


def _tested(paged: Paged, module: Any, device: torch.device, config: Any) -> float:
    """The self-test of one kind of layer. Raises ValueError where it fails."""
    dtype = module.kv_cache_torch_dtype
    size, longest = config.cache_config.block_size or 16, config.model_config.max_model_len
    found = selftest.difference(paged, module.num_heads, module.num_kv_heads, module.head_size, dtype, device, size, longest)
    if not found < (1e-4 if dtype == torch.float32 else 5e-2):
        raise ValueError(f"attention on pages differs from the dense truth of {paged.layer.method} by {found:.1e} here; use longreach serve, and report this")
    return found
