"""Which pages of a request vLLM's scheduler frees while the request goes on: those between its first tokens and its last ones, under a method that is bounded.

Knows how vLLM plans and manages the pages of a layer; how far a layer sees is its `Bound`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from longreach.vllm.pages import Bound

OF_FULL = ("sliding_window", "attention_chunk_size", "non_causal")  # what a plan for all tokens has besides


@dataclass(frozen=True, kw_only=True)
class BoundedSpec(SlidingWindowSpec):
    """The plan of a layer that sees its last `sliding_window` tokens and its first `sinks` ones."""

    sinks: int

    @property
    def bound(self) -> Bound:
        return Bound(self.sliding_window + self.extra_retained_tokens, self.sinks)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """The most pages that a request holds at a time: those of the last tokens and of a chunk, as vLLM counts them, and of the first ones."""
        if KVCacheSpecRegistry.get_manager_class(self) is not BoundedManager:
            raise ValueError("vLLM would free the first tokens too, because longreach's plan of pages was not made known to it; report this")
        return super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len) + self.bound.gap(0, self.block_size)[0]

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        return all(isinstance(spec, BoundedSpec) and (spec.sliding_window, spec.sinks) == (self.sliding_window, self.sinks) for spec in kv_cache_specs.values())


class BoundedManager(SlidingWindowManager):
    """Frees the pages of a request that nobody reads again."""

    def __init__(self, kv_cache_spec: BoundedSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        if self.enable_caching:
            raise ValueError('freed pages are not found again by another request: leave out prefix caching, or set "pages": "keep" for longreach')
        self.bound = kv_cache_spec.bound

    def remove_skipped_blocks(self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None) -> None:
        self._remove_blocks_in_range(request_id, *self.bound.gap(processed_computed_tokens, self.block_size))


def spec_of(module: Any, bound: Bound, config: Any) -> Any:
    """What a layer plans, where vLLM would plan pages for all tokens."""
    full = type(module).get_kv_cache_spec(module, config)
    return replace_as(full, BoundedSpec, drop=OF_FULL, sliding_window=bound.near, sinks=bound.sinks)


def make_known() -> None:
    """Tell vLLM who manages the pages of such layers; it may be told again."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # its own kinds first: it takes a list that is not empty for a whole one
    KVCacheSpecRegistry.register(BoundedSpec, BoundedManager, uniform_type_base_spec=BoundedSpec)
