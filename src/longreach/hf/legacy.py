"""Families whose attention does not go through Transformers' attention interface: GPT-J, CodeGen, Falcon, MPT, BLOOM.

Their attention modules project, rotate or bias, attend and project again in one forward. Per model instance that forward is replaced by one
that projects, hands un-rotated q, k and v to the executor, and projects again; `remove()` takes the replacement away and the class's own
forward is back. Which tensors these are is written down per family and believed only after every layer's output was compared with the
layer's own, on the same input.

Knows these five families; nothing about the method in force, stores or caches.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from longreach.core.differences import largest
from longreach.core.encodings import Alibi, Rotary
from longreach.hf import registration
from longreach.hf import rotary as probe
from longreach.hf.facts import PROBE_POSITIONS, Entry, Reading
from longreach.methods.stock import Stock

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Attend = Callable[..., tuple[torch.Tensor, None]]  # the attention function of an extension


class Family(ABC):
    """One family: where its attention modules are, what precedes attention in them, and what follows it."""

    blocks: ClassVar[str] = "h"
    attention: ClassVar[str] = "attn"

    @abstractmethod
    def encoding(self, base: Any, modules: list[Any], positions: torch.Tensor) -> tuple[Rotary | None, Alibi | None]:
        """What all layers do with positions, read from the model. Raises where it is not what we know."""

    @abstractmethod
    def project(self, module: Any, hidden: torch.Tensor) -> QKV:
        """hidden [B, T, C] -> q [B, H, T, D], k and v [B, G, T, D], not rotated."""

    def scale(self, module: Any) -> float:
        return float(module.inv_norm_factor)

    def dropout(self, module: Any) -> float:
        return float(module.attention_dropout.p)

    @abstractmethod
    def output(self, module: Any, context: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """context [B, T, H * D] -> what the module returns first."""

    def definition(self, base: Any) -> str | None:
        """The stock implementation that computes what the model was trained with; None: whichever is set."""
        return None


class GPTJ(Family):
    """Interleaved rotary on the first `rotary_dim` dims, from a table in every layer that ends at `n_positions`. Ours does not end."""

    def encoding(self, base: Any, modules: list[Any], positions: torch.Tensor) -> tuple[Rotary | None, Alibi | None]:
        width = modules[0].pos_embd_dim
        inverse = (1.0 / 10000 ** (torch.arange(0, width, 2, device=positions.device).float() / width)).double()
        angles = positions.double()[:, None] * inverse
        for index, module in enumerate(modules):
            table = module.embed_positions.to(positions.device)[positions]
            difference = largest(table.double() - torch.cat([angles.sin(), angles.cos()], -1))
            if not difference < (1e-4 if table.dtype == torch.float32 else 3e-2):
                raise ValueError(
                    f"the sines and cosines of layer {index} are not those of a rotary base of 10000 (off by {difference:.1e}); use the model without extend()"
                )
        return Rotary(inverse, pairing="interleaved"), None

    def project(self, module: Any, hidden: torch.Tensor) -> QKV:
        q, k, v = (heads(linear(hidden), module.num_attention_heads) for linear in (module.q_proj, module.k_proj, module.v_proj))
        return q, k, v

    def scale(self, module: Any) -> float:
        return float(module.scale_attn) ** -1

    def dropout(self, module: Any) -> float:
        return float(module.attn_dropout.p)

    def output(self, module: Any, context: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        return torch.as_tensor(module.resid_dropout(module.out_proj(context)))


class CodeGen(GPTJ):
    """GPT-J with one projection, laid out for four accelerators: in each quarter the queries, the values, then the keys."""

    QUARTERS: ClassVar[int] = 4

    def project(self, module: Any, hidden: torch.Tensor) -> QKV:
        q, v, k = module.qkv_proj(hidden).unflatten(-1, (self.QUARTERS, 3, -1)).unbind(-2)
        return tuple(heads(x.flatten(-2), module.num_attention_heads) for x in (q, k, v))  # type: ignore[return-value]


class Falcon(Family):
    """Rotary, or ALiBi scaled by the softmax scale. One projection in three layouts; keys are not expanded to all heads here, as stock does."""

    attention: ClassVar[str] = "self_attention"

    def encoding(self, base: Any, modules: list[Any], positions: torch.Tensor) -> tuple[Rotary | None, Alibi | None]:
        if not base.use_alibi:
            inverse, scaling = probe.frequencies(copy.deepcopy(base.rotary_emb), None, positions[None])
            return Rotary(inverse, scaling), None
        build = sys.modules[type(base).__module__].build_alibi_tensor
        bias = build(torch.ones(1, 2, dtype=torch.long, device=positions.device), base.num_heads, dtype=torch.float32)
        return None, Alibi(slope_of(bias) * self.scale(modules[0]))

    def project(self, module: Any, hidden: torch.Tensor) -> QKV:
        fused, width = module.query_key_value(hidden), module.head_dim
        if module.new_decoder_architecture:  # per group: its queries, a key, a value
            x = fused.unflatten(-1, (module.num_kv_heads, -1, width))
            q, k, v = x[..., :-2, :].flatten(2, 3), x[..., -2, :], x[..., -1, :]
        elif module.multi_query:  # all queries, one key, one value
            x = fused.unflatten(-1, (-1, width))
            q, k, v = x[..., :-2, :], x[..., -2:-1, :], x[..., -1:, :]
        else:
            q, k, v = fused.unflatten(-1, (-1, 3, width)).unbind(-2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def output(self, module: Any, context: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        return torch.as_tensor(module.dense(context))

    def definition(self, base: Any) -> str | None:
        """The eager code adds ALiBi to the mask and to the scores, so twice; the code for SDPA adds it once, as the model was trained."""
        return "sdpa" if base.use_alibi else None


class MPT(Family):
    """ALiBi from a table of `max_seq_len` columns, beyond which stock stops with an error. Ours has no table."""

    blocks: ClassVar[str] = "blocks"

    def encoding(self, base: Any, modules: list[Any], positions: torch.Tensor) -> tuple[Rotary | None, Alibi | None]:
        return None, Alibi(slope_of(base.build_mpt_alibi_tensor(base.num_heads, 2, device=positions.device)))

    def project(self, module: Any, hidden: torch.Tensor) -> QKV:
        fused = module.Wqkv(hidden)
        if module.clip_qkv:
            fused = fused.clamp(min=-module.clip_qkv, max=module.clip_qkv)
        return tuple(heads(x, module.n_heads) for x in fused.chunk(3, dim=-1))  # type: ignore[return-value]

    def scale(self, module: Any) -> float:
        return float(module.softmax_scale)

    def dropout(self, module: Any) -> float:
        return float(module.attn_dropout_p)

    def output(self, module: Any, context: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        return torch.as_tensor(module.out_proj(context))


class Bloom(Family):
    """ALiBi; one projection with q, k and v side by side per head; the attention module adds the residual itself."""

    attention: ClassVar[str] = "self_attention"

    def encoding(self, base: Any, modules: list[Any], positions: torch.Tensor) -> tuple[Rotary | None, Alibi | None]:
        if any(module.pretraining_tp > 1 and module.slow_but_exact for module in modules):
            raise ValueError("slow_but_exact sums slices of the output projection, which is not followed here; load the model with slow_but_exact=False")
        ones = torch.ones(1, 2, dtype=torch.long, device=positions.device)
        return None, Alibi(slope_of(base.build_alibi_tensor(ones, base.num_heads, dtype=torch.float32)))

    def project(self, module: Any, hidden: torch.Tensor) -> QKV:
        q, k, v = module.query_key_value(hidden).unflatten(-1, (module.num_heads, 3, module.head_dim)).unbind(-2)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def output(self, module: Any, context: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        assert residual is not None
        return F.dropout(module.dense(context), module.hidden_dropout, module.training) + residual


FAMILIES: dict[str, Family] = {"gptj": GPTJ(), "codegen": CodeGen(), "falcon": Falcon(), "mpt": MPT(), "bloom": Bloom()}  # by model_type


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    """[B, T, H * D] -> [B, H, T, D]."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def slope_of(bias: torch.Tensor) -> torch.Tensor:
    """The slope of every head, fp64, from a bias [H, 1, 2] of two neighbouring keys: the model's own function says which slopes it has."""
    return (bias[:, 0, 1].double() - bias[:, 0, 0].double()).clone()


class Forward:
    """In place of the forward of one attention module. Arguments that serve the module's own attention only are not needed."""

    def __init__(self, family: Family, module: Any, attend: Attend) -> None:
        self.family, self.module, self.attend = family, module, attend

    @torch.compiler.disable  # compiled code would be specialised on the layer
    def __call__(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, *, attention_mask: Any = None, **unused: Any
    ) -> tuple[torch.Tensor, None]:
        family, module = self.family, self.module
        dropout = family.dropout(module) if module.training else 0.0
        context, _ = self.attend(module, *family.project(module, hidden_states), attention_mask, scaling=family.scale(module), dropout=dropout)
        return family.output(module, context.flatten(2), residual), None


@dataclass(eq=False)
class LegacySeam:
    """The attention modules of one model, and the forwards put in their place."""

    legacy: ClassVar[bool] = True

    model: Any
    base: Any
    family: Family
    name: str
    before: registration.Configs
    modules: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.modules = [getattr(block, self.family.attention) for block in getattr(self.base, self.family.blocks)]

    def probe(self, window: int) -> torch.Tensor:
        return torch.arange(min(len(PROBE_POSITIONS), window))

    def read(self, ids: torch.Tensor, positions: torch.Tensor) -> Reading:
        rotary, alibi = self.family.encoding(self.base, self.modules, positions)
        embedded = self.base.get_input_embeddings()(ids[:, :1])
        weights = [next(module.parameters()) for module in self.modules]  # accelerate moves the input of a module whose weights are not at hand
        made = [self.family.project(m, embedded if weight.is_meta else embedded.to(weight.device)) for m, weight in zip(self.modules, weights)]
        entries = [Entry(k.shape[1], k.shape[-1], v.shape[-1], k.dtype, k.device, q.shape[1]) for q, k, v in made]
        n = len(self.modules)
        return Reading(self.modules, [None] * n, [rotary] * n, alibi, [Stock()] * n, entries, embedded.dtype)

    def kernels(self, reading: Reading) -> Sequence[str]:
        return [self.family.definition(self.base) or self.base.config._attn_implementation]

    @contextmanager
    def stock(self, kernel: str) -> Iterator[None]:
        self.base.config._attn_implementation_internal = kernel
        try:
            yield
        finally:
            registration.set_back(self.before)

    def install(self, attend: Attend, modules: Sequence[Any]) -> None:
        for config, _ in self.before:  # set_attn_implementation declines models of these families
            config._attn_implementation_internal = self.name
        for module in modules:
            module.forward = Forward(self.family, module, attend)

    def remove(self) -> None:
        for module in self.modules:
            if isinstance(module.__dict__.get("forward"), Forward):
                del module.forward
        registration.set_back(self.before, self.name)


def seam_of(model: nn.Module, name: str = "", before: registration.Configs = ()) -> LegacySeam | None:
    """The seam of a model of these families, None for all others. Raises if its attention is taken already."""
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if family is None:
        return None
    # torch.compile's wrapper of a base model has its attributes too
    bases = [m for m in model.modules() if isinstance(m, PreTrainedModel) and isinstance(getattr(m, family.blocks, None), nn.ModuleList)]
    if len(bases) != 1 or not all(hasattr(block, family.attention) for block in getattr(bases[0], family.blocks)):
        return None  # code of its own under a known name
    seam = LegacySeam(model, bases[0], family, name, before)
    for module in seam.modules:
        if isinstance(taken := module.__dict__.get("forward"), Forward):
            raise ValueError("this model is extended already; call remove() on its extension first")
        if taken is not None:
            raise ValueError(
                f"the forward of {type(module).__name__} was replaced by another library (device_map does that); load the model on one device, then extend it"
            )
    return seam
