"""What has been read already: a cache and the ids that it holds, taken back to where a new sequence agrees with them.

Knows caches, ids and reading in chunks; not what the ids mean: no conversations, documents or tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from longreach.hf.cache import take_back
from longreach.hf.extension import Extension
from longreach.quantities import CHUNK_SIZE
from longreach.running.reading import stream

STRETCH = 1024  # ids that are compared at once


@dataclass
class Prefix:
    """A cache, and the ids that it holds. `resume` hands the cache out and `keep` takes it in again; in between nothing is held. So work that fails
    or is interrupted while it writes to the cache costs a reading, and never gives a wrong answer."""

    cache: Any = field(default=None, repr=False)
    ids: list[int] = field(default_factory=list, repr=False)

    def keep(self, cache: Any, ids: list[int]) -> None:
        """`ids` begin with what the cache holds; those that it has not read yet are left out."""
        self.cache, self.ids = cache, ids[: cache.get_seq_length()]

    def forget(self) -> None:
        self.cache, self.ids = None, []

    def resume(self, ids: list[int]) -> tuple[Any, int]:
        """-> (a cache that holds a beginning of `ids`, how many of them), the longest that can be had: the cache goes back to where the two differ.
        One that cannot go back so far (bounded methods keep 128 tokens) gives way to an empty one."""
        cache, held, same = self.cache, len(self.ids), common(self.ids, ids)
        self.forget()
        if same and (same == held or take_back(cache, held - same)):
            return cache, same
        from transformers import DynamicCache

        return DynamicCache(), 0

    def read(self, extension: Extension, ids: list[int], *, chunk_size: int = CHUNK_SIZE, progress: Callable[[int], None] = lambda done: None) -> int:
        """Hold exactly `ids`, read in chunks -> how many of them were held already. `progress` gets the number read so far."""
        same, cut = common(self.ids, ids), extension.method.cut or 1
        cache, held = self.resume(ids if same == len(ids) else ids[: max(0, min(same, len(ids) - cut))])  # what is read has at least `cut` tokens
        if held < len(ids):
            for chunk in stream(extension, torch.tensor(ids[held:]), chunk_size=chunk_size, losses=False, cache=cache):
                progress(min(chunk.start + chunk_size, len(ids)))
        self.keep(cache, ids)
        return held


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the longest common beginning."""
    shorter = min(len(one), len(other))
    for at in range(0, shorter, STRETCH):
        if one[at : at + STRETCH] != other[at : at + STRETCH]:
            for n in range(at, min(at + STRETCH, shorter)):
                if one[n] != other[n]:
                    return n
    return shorter
