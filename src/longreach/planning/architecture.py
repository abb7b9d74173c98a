"""A model's configuration -> what it weighs. The model is built on the meta device: shapes without weights.

Knows module names of Transformers; no tensors of data, no methods, no hardware.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from longreach.configs import Decoder, decoder, text_part


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


@dataclass(frozen=True, kw_only=True)
class Architecture(Decoder):
    """A decoder and its weights."""

    weights: Weights
    notes: tuple[str, ...] = ()


def read(config: Any, dtype: torch.dtype | None = None) -> Architecture:
    """The architecture of a Transformers configuration, at `dtype` or the configuration's own. Raises ValueError for what it does not know."""
    from transformers import AutoModelForCausalLM

    text, dtype, notes = text_part(config, dtype)
    found = decoder(text, dtype)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text, dtype=found.dtype)
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"no causal language model can be built from this {found.name} configuration ({reason}); pass that of a decoder") from error
    verify(model, found)
    return Architecture(**vars(found), weights=weigh(model, found), notes=notes)


def verify(model: Any, expected: Decoder) -> None:
    """The projections have the widths that the configuration led us to expect; raises where they do not, for then the bytes would be wrong."""
    found, layers = 0, expected.layers
    for index, name, width in projections(model):
        layer = layers[index]
        wanted = {
            "k_proj": layer.kv_heads * layer.key_width,
            "kv_b_proj": layer.heads * (layer.key_width + layer.value_width - expected.shared_key),
        }.get(name, layer.heads * layer.key_width + layer.entry)
        if width != wanted:
            raise ValueError(
                f"layer {index} of this {expected.name} has a {name} of width {width} where its configuration lets one expect {wanted}; "
                "plan does not know how it stores keys, so measure it with longreach run"
            )
        found += 1
    if found != len(layers):
        raise ValueError(
            f"the key projections of {len(layers) - found} of {len(layers)} layers of this {expected.name} have names that plan does not know, "
            "so the bytes of its keys are not certain; plan a model with k_proj, qkv_proj or kv_b_proj"
        )


def projections(model: Any) -> Iterator[tuple[int, str, int]]:
    """(layer, name, output width) of every module that makes keys."""
    for path, module in model.named_modules():
        name = path.rsplit(".", 1)[-1]
        number = re.search(r"\.(\d+)\.", path)
        if number is not None and name in ("k_proj", "kv_b_proj", "qkv_proj", "query_key_value", "Wqkv") and hasattr(module, "out_features"):
            yield int(number[1]), name, module.out_features


def weigh(model: Any, expected: Decoder) -> Weights:
    """Every parameter once; the matrices by whether all tokens meet them."""
    total = [(name, p) for name, p in model.named_parameters()]
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tables = {id(m.weight) for m in (embedding, output) if m is not None}
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
        expert_matrices=tuple(sorted((elements, count // expected.experts) for elements, count in routed.items())) if expected.experts else (),
        experts=expected.experts if routed else 0,
        experts_per_token=expected.experts_per_token if routed else 0,
    )
