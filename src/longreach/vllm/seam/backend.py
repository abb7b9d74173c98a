"""The attention backend: what vLLM asks of a layer that has our attention. Knows vLLM's metadata of a forward and the layout of its pages."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from longreach.vllm.pages import Paged
from longreach.vllm.requests import Requests


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
