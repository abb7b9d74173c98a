"""Longreach: a context far longer than a model was trained on, without training it.

    model, tokenizer = longreach.load("nano")
    extension = longreach.extend(model, context=4096)
    model.generate(...)

Names are imported when they are first used, so that `longreach --help` is instant.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it; importing typing takes longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from longreach.apps.attribution.attribute import attribute as attribute
    from longreach.hf.extension import Extension as Extension
    from longreach.hf.extension import extend as extend
    from longreach.memory.budgets import Tiered as Tiered
    from longreach.methods import from_json as from_json
    from longreach.methods.base import Method as Method
    from longreach.methods.block_selfextend import BlockSelfExtend as BlockSelfExtend
    from longreach.methods.combined import Combined as Combined
    from longreach.methods.dual_chunk import DualChunk as DualChunk
    from longreach.methods.dynamic_ntk import DynamicNTK as DynamicNTK
    from longreach.methods.dynamic_yarn import DynamicYaRN as DynamicYaRN
    from longreach.methods.infinitehip import InfiniteHiP as InfiniteHiP
    from longreach.methods.infllm import InfLLM as InfLLM
    from longreach.methods.leaky_rerope import LeakyReRoPE as LeakyReRoPE
    from longreach.methods.lm_infinite import LMInfinite as LMInfinite
    from longreach.methods.logistic_selfextend import LogisticSelfExtend as LogisticSelfExtend
    from longreach.methods.longheads import LongHeads as LongHeads
    from longreach.methods.longrope import LongRoPE as LongRoPE
    from longreach.methods.ntk import NTK as NTK
    from longreach.methods.ntk_by_parts import NTKByParts as NTKByParts
    from longreach.methods.pi import PI as PI
    from longreach.methods.quest import Quest as Quest
    from longreach.methods.rerope import ReRoPE as ReRoPE
    from longreach.methods.selfextend import SelfExtend as SelfExtend
    from longreach.methods.sirllm import SirLLM as SirLLM
    from longreach.methods.stock import Stock as Stock
    from longreach.methods.streaming_llm import StreamingLLM as StreamingLLM
    from longreach.methods.string import STRING as STRING
    from longreach.methods.yarn import YaRN as YaRN
    from longreach.planning.profile import Profile as Profile
    from longreach.planning.sizing import Plan as Plan
    from longreach.planning.sizing import plan as plan
    from longreach.running.loading import load as load
    from longreach.running.loading import shipped_book as shipped_book
    from longreach.running.pieces import token_ids as token_ids
    from longreach.running.reading import stream as stream
    from longreach.running.together import generate as generate
    from longreach.version import __version__ as __version__

_HOMES = {
    "load": "running.loading",
    "shipped_book": "running.loading",
    "extend": "hf.extension",
    "Extension": "hf.extension",
    "plan": "planning.sizing",
    "Plan": "planning.sizing",
    "Profile": "planning.profile",
    "Tiered": "memory.budgets",
    "stream": "running.reading",
    "token_ids": "running.pieces",
    "generate": "running.together",
    "attribute": "apps.attribution.attribute",
    "Method": "methods.base",
    "from_json": "methods",
    "__version__": "version",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"longreach.{_HOMES[name]}"), name)
    if name[:1].isupper():  # a method; modules are found by whoever imports them, and must not wait for all methods
        from longreach.methods import registry

        for method in registry().values():
            if method.__name__ == name:
                return method
    if name == "apps":
        return import_module("longreach.apps")
    if name in ("loading", "auto"):  # moved; attributes as soon as a model was loaded and extended, so old code does not import them
        return import_module(f"longreach.{name}")
    raise AttributeError(f"module 'longreach' has no attribute {name!r}")


def __dir__() -> list[str]:
    from longreach.methods import registry

    return sorted({*globals(), *_HOMES, *(method.__name__ for method in registry().values())})
