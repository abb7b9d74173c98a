"""Entries of memory, keys or values, picked by row, head and column. Knows tensors of any strides; not what is in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def picked(x: torch.Tensor, row: torch.Tensor, head: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """x [R, G, C, D] -> x[row, head, column] [..., D], of indices that broadcast to each other. Where strides allow it x is read as one long matrix whose rows
    are copied whole: on a CPU that costs a tenth of what an index of three tensors does."""
    step = x.stride(2)
    if x.stride(3) != 1 or step < x.shape[3] or x.stride(0) % step or x.stride(1) % step:
        return x[row, head, column]
    rows = sum((size - 1) * stride for size, stride in zip(x.shape[:3], x.stride())) // step + 1
    place = row * (x.stride(0) // step) + head * (x.stride(1) // step) + column
    return x.as_strided((rows, x.shape[3]), (step, 1)).index_select(0, place.flatten()).unflatten(0, place.shape)


def picked_of(parts: Sequence[tuple[int, torch.Tensor]], row: torch.Tensor, head: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """The same of parts that follow each other, (column of the first entry, entries); one of them may be of one row that all share."""
    (first, x), *others = parts
    if not others:
        return picked(x, row if x.shape[0] > 1 else torch.zeros_like(row), head, column - first if first else column)
    row, head, column = torch.broadcast_tensors(row, head, column)
    found = picked(x, row if x.shape[0] > 1 else torch.zeros_like(row), head, (column - first).clamp(0, x.shape[2] - 1))
    for first, x in others:  # most lie in the first, so that what lies in others is written over it
        at = column - first
        if len((where := ((at >= 0) & (at < x.shape[2])).nonzero(as_tuple=True))[0]):
            found[where] = picked(x, row[where] if x.shape[0] > 1 else torch.zeros_like(row[where]), head[where], at[where])
    return found
