"""What a buffer holds beside its bodies: entries that wait for a place, and frozen ones that others read too. Knows tensors only."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longreach.kernels.tiles import between


def part(x: torch.Tensor, rows: slice, start: int, stop: int) -> torch.Tensor:
    """x[rows, :, start:stop], in as few operations as it takes: a decoding step asks for it in every layer."""
    return between(x if rows == slice(0, x.shape[0]) else x[rows], start, stop)


@dataclass(eq=False)
class Waiting:
    """New entries of some rows that have no place yet. `run` is what their own queries read, from index `first` on; `new` are the last of them."""

    rows: slice
    first: int
    run: torch.Tensor
    new: torch.Tensor

    def add(self, run: torch.Tensor, new: torch.Tensor) -> None:
        """A part that has come later in the same forward."""
        self.run, self.new = torch.cat([self.run, run], dim=2), torch.cat([self.new, new], dim=2)


class Reader:
    """Somebody who reads some memory, as long as this is held."""


@dataclass(frozen=True, eq=False)
class Frozen:
    """The entries of a base [slots, H, C, D]. Whoever shares the memory counts its readers: nobody writes to it while this is held."""

    entries: torch.Tensor
    reader: Reader | None


def require_dtype(kept: torch.Tensor | None, new: torch.Tensor) -> None:
    """A buffer holds one dtype."""
    if kept is not None and kept.dtype != new.dtype:
        raise ValueError(
            f"this cache was read in {kept.dtype} and the model now computes in {new.dtype}; pass a new DynamicCache() and the whole text, and "
            "extend() again after a cast"
        )
