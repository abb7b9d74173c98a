"""The probabilities of the dense truth: what watching a forward is compared with."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

import longreach
from longreach.engine import reference
from methods_matrix import context


def probabilities(model: Any, method: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """ids [B, T] -> [B, H, T, N] of every layer; 0 where a key is hidden."""
    found, real = [], reference.softmax

    def softmax(inputs: Any, distance: torch.Tensor, v: torch.Tensor, sink: Any = None) -> Any:
        out, lse = real(inputs, distance, v, sink)
        logits = inputs.logits(distance.nan_to_num(0.0)).masked_fill(distance.isnan() | ~inputs.seen, -torch.inf)
        found.append(torch.exp(logits - lse[..., None]).nan_to_num(0.0))
        return out, lse

    with mock.patch.object(reference, "softmax", softmax), longreach.extend(model, method, context=context(method, ids.shape[1]), backend="reference"):
        found.clear()
        model(ids, use_cache=False)
    return found
