"""Muon: momentum whose every matrix is replaced by the nearest orthogonal one (Jordan et al. 2024).

    M <- beta M + G,   U = orthogonalise(G + beta M),   W <- W - rate * sqrt(max(1, rows / columns)) * U

`torch.optim.Muon` computes in bf16, which a CPU without bf16 instructions emulates: seven seconds a step for nano's 28
matrices, against 0.2 for these lines, which batch the matrices of one shape in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """[N, rows, columns] -> about the nearest matrices with singular values 1: a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For the matrices of hidden layers; embeddings and vectors belong to another optimizer."""

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, same in shapes.items():
                updates = []
                for p in same:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.mul_(group["momentum"]).add_(p.grad)
                    updates.append(p.grad + group["momentum"] * momentum)
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(same, orthogonalise(torch.stack(updates))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(scale * update)
