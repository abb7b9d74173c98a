"""A model's configuration -> what its layers store and compute. The model is built on the meta device: shapes without weights.

Knows configurations and module names of Transformers; no tensors of data, no methods, no hardware.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

KNOWN_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")


@dataclass(frozen=True)
class Attention:
    """One attention layer: what its attention call gets per token."""

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    window: int | None = None  # the sliding window it was trained with
    chunk: int | None = None  # the chunks it was trained with

    @property
    def reach(self) -> int | None:
        """The most keys that a query of the trained layer sees; None: all."""
        return self.window or self.chunk

    def pairs(self, tokens: int) -> float:
        """Query and key of the trained layer, leading terms."""
        if self.chunk is not None:
            whole, rest = divmod(tokens, self.chunk)
            return (whole * self.chunk**2 + rest**2) / 2
        window = min(tokens, self.window or tokens)
        return window**2 / 2 + (tokens - window) * window

    @property
    def entry(self) -> int:
        """Values of one key and one value of one token."""
        return self.kv_heads * (self.key_width + self.value_width)


@dataclass(frozen=True)
class Weights:
    """Exact sizes, read off the modules. A tied matrix counts once in `nbytes` and is still multiplied with."""

    parameters: int
    nbytes: int
    matrices: tuple[tuple[int, int], ...]  # (elements, how many) of every matrix that each token meets, head and experts left out
    head: int  # elements of the matrix that makes logits
    expert_matrices: tuple[tuple[int, int], ...] = ()  # of one expert: (elements, how many over all layers)
    experts: int = 0  # per layer
    experts_per_token: int = 0

    @property
    def active(self) -> int:
        """Elements that one token is multiplied with."""
        routed = sum(elements * count for elements, count in self.expert_matrices) * self.experts_per_token
        return sum(elements * count for elements, count in self.matrices) + routed + self.head


@dataclass(frozen=True)
class Architecture:
    """A decoder of attention layers, as its configuration states it."""

    name: str
    dtype: torch.dtype
    hidden: int
    intermediate: int  # width of the feed-forward part that a token meets, all its experts together
    vocabulary: int
    layers: tuple[Attention, ...]
    weights: Weights
    latent: int | None = None  # MLA: values per token and layer of the compressed cache, which the attention call does not see
    notes: tuple[str, ...] = ()

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def kinds(self) -> Counter[Attention]:
        return Counter(self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in every layer, each once."""
        return sum(layer.entry for layer in self.layers) * self.itemsize


def read(config: Any, dtype: torch.dtype | None = None) -> Architecture:
    """The architecture of a Transformers configuration, at `dtype` or the configuration's own. Raises ValueError for what it does not know."""
    from transformers import AutoModelForCausalLM

    notes: list[str] = []
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder; plan covers decoder-only causal language models")
    text = copy.deepcopy(config.get_text_config())
    if text.model_type != config.model_type:
        notes.append(f"{config.model_type} wraps a text model; only its text model ({text.model_type}) is counted")
    if getattr(config, "quantization_config", None) is not None or getattr(text, "quantization_config", None) is not None:
        notes.append("the checkpoint is quantised; its weights are counted unquantised, so that less memory may do")
        text.quantization_config = None
        del text.quantization_config
    stated = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    if dtype is None and stated is None:
        notes.append("the configuration states no dtype; float32 is counted, pass --dtype for another")
    found = outline(text, dtype or stated or torch.float32)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text, dtype=found.dtype)
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"no causal language model can be built from this {text.model_type} configuration ({reason}); pass that of a decoder") from error
    verify(model, found.layers)
    return replace(found, weights=weigh(model, text), notes=tuple(notes))


def outline(config: Any, dtype: torch.dtype) -> Architecture:
    """What the configuration alone tells: layers and widths, no weights. Enough for the bytes of keys and values."""
    refuse(config)
    width = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
    if chosen := first_of(config, EXPERTS_PER_TOKEN) if first_of(config, EXPERTS) else 0:
        width = (getattr(config, "moe_intermediate_size", None) or width) * chosen
    rank = getattr(config, "kv_lora_rank", None)
    return Architecture(
        name=config.model_type,
        dtype=dtype,
        hidden=config.hidden_size,
        intermediate=max(width) if isinstance(width, list) else width,
        vocabulary=config.vocab_size,
        layers=attention_layers(config),
        weights=Weights(0, 0, (), 0),
        latent=rank + config.qk_rope_head_dim if rank else None,
    )


def first_of(config: Any, names: tuple[str, ...]) -> int:
    """The first of these that the configuration states, 0 if none."""
    return next((n for name in names if (n := getattr(config, name, None))), 0)


def refuse(config: Any) -> None:
    """Layers whose state is not keys and values."""
    if unknown := set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS:
        raise ValueError(
            f"the model has layers of type {', '.join(sorted(unknown))}, whose cost is not known here; plan a model of full, sliding or chunked attention"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError("the model shares keys and values between layers, which plan does not count; plan a model without shared layers")
    for name in ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size"):
        if not isinstance(getattr(config, name, None), int):
            raise ValueError(f"the {config.model_type} configuration has no {name}, so its layers cannot be counted; pass that of a decoder")


def attention_layers(config: Any) -> tuple[Attention, ...]:
    """Heads and widths by the names that configurations share; `verify` compares them with the modules."""
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):  # MLA: latents are expanded before attention, one key per query head
        kv_heads, key, value = heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    else:
        kv_heads = getattr(config, "num_key_value_heads", None) or falcon_groups(config) or heads
        key = value = getattr(config, "head_dim", None) or config.hidden_size // heads
    chunks = attention_chunks(config)
    return tuple(Attention(heads, kv_heads, key, value, window, chunk) for window, chunk in zip(sliding_windows(config), chunks, strict=True))


def falcon_groups(config: Any) -> int | None:
    """Falcon names its groups otherwise, and one flag stands for a single group."""
    if getattr(config, "new_decoder_architecture", False):
        return int(config.num_kv_heads)
    return 1 if getattr(config, "multi_query", False) else None


def attention_chunks(config: Any) -> list[int | None]:
    """The chunk size of every layer, None where attention is not chunked."""
    types, chunk = getattr(config, "layer_types", None), getattr(config, "attention_chunk_size", None)
    return [chunk if types is not None and types[index] == "chunked_attention" else None for index in range(config.num_hidden_layers)]


def sliding_windows(config: Any) -> list[int | None]:
    """The sliding window of every layer, None for full attention."""
    count, window = config.num_hidden_layers, getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return [None] * count
    types = getattr(config, "layer_types", None)
    return [window] * count if types is None else [window if kind == "sliding_attention" else None for kind in types]


def verify(model: Any, layers: tuple[Attention, ...]) -> None:
    """The projections have the widths that the configuration led us to expect; raises where they do not, for then the bytes would be wrong."""
    found = 0
    for index, name, width in projections(model):
        layer = layers[index]
        both = layer.kv_heads * (layer.key_width + layer.value_width)
        wanted = {
            "k_proj": layer.kv_heads * layer.key_width,
            "kv_b_proj": layer.heads * (layer.key_width + layer.value_width) - layer.heads * rope_width(model),
        }.get(name, layer.heads * layer.key_width + both)
        if width != wanted:
            raise ValueError(
                f"layer {index} of this {model.config.model_type} has a {name} of width {width} where its configuration lets one expect {wanted}; "
                "plan does not know how it stores keys, so measure it with longreach bench or run"
            )
        found += 1
    if found != len(layers):
        raise ValueError(
            f"the key projections of {len(layers) - found} of {len(layers)} layers of this {model.config.model_type} have names that plan does not know, "
            "so the bytes of its keys are not certain; plan a model with k_proj, qkv_proj or kv_b_proj"
        )


def rope_width(model: Any) -> int:
    """MLA: the rotated part of a key is shared by the heads and does not come from kv_b_proj."""
    return int(getattr(model.config, "qk_rope_head_dim", 0) or 0)


def projections(model: Any) -> Iterator[tuple[int, str, int]]:
    """(layer, name, output width) of every module that makes keys."""
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        number = re.search(r"\.(\d+)\.", path)
        if number is not None and name in ("k_proj", "kv_b_proj", "qkv_proj", "query_key_value", "Wqkv") and hasattr(module, "out_features"):
            yield int(number[1]), name, module.out_features


def weigh(model: Any, config: Any) -> Weights:
    """Every parameter once; the matrices by whether all tokens meet them."""
    total = [(name, p) for name, p in model.named_parameters()]
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {id(m.weight) for m in (embedding, output) if m is not None}
    experts, chosen = first_of(config, EXPERTS), first_of(config, EXPERTS_PER_TOKEN)
    dense: Counter[int] = Counter()
    routed: Counter[int] = Counter()
    for name, p in total:
        if id(p) in tables or p.dim() < 2:
            continue
        parts = name.split(".")
        if "experts" not in parts:
            dense[p.numel()] += 1
        elif parts[parts.index("experts") + 1].isdigit():  # one module per expert
            routed[p.numel()] += 1
        elif p.dim() == 3:  # all experts of a layer in one tensor
            routed[p.numel() // p.shape[0]] += p.shape[0]
    return Weights(
        parameters=sum(p.numel() for _, p in total),
        nbytes=sum(p.numel() * p.element_size() for _, p in total),
        matrices=tuple(sorted(dense.items())),
        head=output.weight.numel() if output is not None else 0,
        expert_matrices=tuple(sorted((elements, count // experts) for elements, count in routed.items())) if experts else (),
        experts=experts if routed else 0,
        experts_per_token=chosen if routed else 0,
    )
