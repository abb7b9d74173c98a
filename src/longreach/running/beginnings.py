"""Constrained decoding of the first words: an answer that begins with one of several given ones, and goes on freely.

Knows token ids and logits; not text or models. Transformers' own `prefix_allowed_tokens_fn` would list the whole vocabulary at every free token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def allowed(new: Sequence[int], beginnings: Sequence[Sequence[int]]) -> set[int] | None:
    """The tokens that may follow the new ones, so that one of the beginnings comes out; None: any, for one of them is there."""
    if any(list(new[: len(begin)]) == list(begin) for begin in beginnings):
        return None
    return {begin[len(new)] for begin in beginnings if list(begin[: len(new)]) == list(new)}


def begins_with(prompt: int, beginnings: Sequence[Sequence[int]]) -> list[Any]:
    """A list of one logits processor for `generate`, after a prompt of so many tokens; of none without beginnings. Raises ValueError for an empty one."""
    if not beginnings:
        return []
    if not all(beginnings):
        raise ValueError("a beginning without tokens asks for nothing; leave it out")
    from transformers import LogitsProcessor

    class OneOf(LogitsProcessor):  # type: ignore[misc,unused-ignore]
        """All but the tokens that may follow get no probability."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            kept = scores
            for row, ids in enumerate(input_ids):
                tokens = allowed(ids[prompt:].tolist(), beginnings)
                if tokens is not None:
                    places = torch.tensor(sorted(tokens), device=scores.device)
                    kept = scores.clone() if kept is scores else kept
                    kept[row] = torch.full_like(scores[row], -torch.inf).index_copy(0, places, scores[row, places])
            return kept

    return [OneOf()]
