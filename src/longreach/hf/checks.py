"""What a model, a configuration or a call must be for a method to be attached to it, with the sentences that say what to do if it is not.

Knows Transformers' names; attaches and computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from longreach.engine.batch import Batch
from longreach.hf import legacy
from longreach.hf.rotary import IdentityRotary, Seen

# Arguments of an attention call that we honour, or that do not change what attention computes.
HONOURED = {"softcap", "s_aux", "sliding_window"}
HARMLESS = {"position_ids", "use_cache", "output_router_logits", "cache_position", "output_attentions", "is_causal", "layer_type", "past_key_values"}


class Inexact(ValueError):
    """The engine was attached and does not compute what the stock model does: a refusal of a model that we do not know, a fault on one that we do."""


def require_in_force(extension: Any, model: object = None) -> None:
    """Raise where an extension was removed, or is another model's than this one."""
    if not extension.attached:
        raise ValueError("this extension was removed from its model; extend() it again and pass the new one, or none for the stock model")
    if model is not None and uncompiled(model) is not extension.model:
        raise ValueError("this extension is in force on another model; pass the model that was extended, or the extension of this one")


def uncompiled(model: Any) -> Any:
    """A model without the wrapper of torch.compile, which calls the model that it wraps, and so sees what is attached to it."""
    return getattr(model, "_orig_mod", model)


def find_base(model: object) -> Any:
    """The text model that owns the rotary module, or of a legacy family the layers. Raises if there is none, several, or one that is extended already."""
    if not isinstance(model, nn.Module) or not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"{type(model).__name__} is not a Transformers model; load one with longreach.load(...) or AutoModelForCausalLM")
    if (seam := legacy.seam_of(model)) is not None:
        return seam.base
    # some versions leave a rotary module in every attention layer too, which nothing calls
    owners = [m for m in model.modules() if isinstance(m, PreTrainedModel) and isinstance(getattr(m, "rotary_emb", None), nn.Module)]
    if any(isinstance(owner.rotary_emb, IdentityRotary) for owner in owners):
        raise ValueError("this model is extended already; call remove() on its extension first")
    if getattr(model.config, "vision_config", None) is not None or len(owners) > 1:
        raise ValueError(f"{type(model).__name__} is a multimodal wrapper; extend its text model, loaded as a causal language model")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; Longreach extends decoder-only causal language models")
    if not owners or not hasattr(owners[0].config, "num_hidden_layers"):
        raise ValueError(
            f"{type(model).__name__} has no rotary position module, so there are no rotary positions to extend; use a causal language model with RoPE"
        )
    if any(getattr(module, "is_causal", True) is False for module in owners[0].modules()) or getattr(owners[0].config, "is_causal", True) is False:
        raise ValueError(f"{type(model).__name__} lets tokens attend to later ones, and every method here is causal; use a causal language model with RoPE")
    return owners[0]


def configs_of(model: nn.Module) -> Iterator[Any]:
    """Every configuration that set_attn_implementation may write to, once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
            for name in getattr(config, "sub_configs", ()):
                if hasattr(sub := getattr(config, name, None), "_attn_implementation_internal"):
                    found.setdefault(id(sub), sub)
    return iter(found.values())


def check_arguments(index: int, seen: Seen) -> None:
    """Refuse an argument of the attention call that we would otherwise ignore."""
    for name, value in seen.kwargs.items():
        if name not in HONOURED | HARMLESS and value is not None and not isinstance(value, bool):
            raise ValueError(f"layer {index} passes {name!r} to its attention, which Longreach does not honour; use the model without extend()")


def check_positions(position_ids: torch.Tensor, batch: Batch) -> None:
    """Positions a caller passes are honoured only as what they usually are, the order of the tokens; anything else raises.

    The first call may begin anywhere, for an offset changes no distance. Later ones go on from there, or count tokens or slots.
    """
    rows, store = len(batch.past or ()), batch.store
    if position_ids.dim() != 2 or position_ids.shape[-1] != batch.columns or position_ids.shape[0] not in (1, rows):
        raise ValueError(f"position_ids of shape {list(position_ids.shape)} do not count {batch.columns} tokens of {rows} rows; leave them out")
    for group in batch.groups:
        own = position_ids[group.rows if position_ids.shape[0] > 1 else slice(0, 1)][:, group.columns]
        if not bool((own[:, 1:] - own[:, :-1] == 1).all()):
            raise ValueError("position_ids must count the tokens of each row one by one; leave them out (packed sequences cannot be honoured)")
        if store is None or group.hidden:  # generate counts anew by a mask that hides tokens, which the caller was told
            continue
        members = range(group.rows.start, group.rows.stop)
        for row, first in zip(members, own[:, 0].tolist() * (1 if position_ids.shape[0] > 1 else len(members)), strict=True):
            if store.seen == 0:
                store.offsets[row] = int(first) - group.start
                continue
            column = group.columns.start if isinstance(group.columns, slice) else int(group.columns[0])
            if first not in (group.start, group.start + store.offsets[row], store.seen + column):
                raise ValueError(
                    f"position_ids begin at {first} for row {row}, whose next token has index {group.start}: a gap between tokens cannot be honoured, for a "
                    "method says how far apart they are; leave position_ids out"
                )
