"""Products of queries with what they are compared with, by the fastest call of a device. Knows shapes; not what is compared."""

from __future__ import annotations

import torch

FEW = 32  # rows of queries


def products(q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """q [R, H, T, S], x [R, G, N, S] of one dtype, whose matrices need not follow each other -> q x^T [R, H, T, N]."""
    groups, queries = q.shape[1] // x.shape[1], q.shape[2]
    folded = q.unflatten(1, (-1, groups)).flatten(2, 3)  # [R, G, g T, S]
    if x.device.type == "cpu" and x.dtype != torch.float32:  # the batched product would copy x first
        found = folded.new_empty((*folded.shape[:3], x.shape[2]))
        for row in range(x.shape[0]):
            for group in range(x.shape[1]):
                torch.mm(folded[row, group], x[row, group].t(), out=found[row, group])
    elif x.device.type == "cpu" and folded.shape[2] <= FEW:  # rows of x as rows of the product: each is read where it lies
        found = (x @ folded.transpose(-1, -2)).transpose(-1, -2)
    else:
        found = folded @ x.transpose(-1, -2)
    return found.unflatten(2, (groups, queries)).flatten(1, 2)
