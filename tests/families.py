"""The random tiny models of the tests; they live in the package, for `longreach check --all` runs over them too.

LONGREACH_TEST_DEVICE=cuda runs every test that takes its model from here on the card.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from longreach.checking import families
from longreach.checking.families import BASE, FAMILIES, REFUSED, WINDOW, rope

__all__ = ["BASE", "DEVICE", "FAMILIES", "REFUSED", "WINDOW", "build", "each_once", "rope", "tokens"]

DEVICE = os.environ.get("LONGREACH_TEST_DEVICE", "cpu")


def build(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return families.build(family, dtype, **more).to(DEVICE)


def tokens(rows: int, count: int, seed: int = 3) -> torch.Tensor:
    return families.tokens(rows, count, seed).to(DEVICE)


def each_once(rows: int, count: int, seed: int = 3) -> torch.Tensor:
    """The same, but no token comes twice in a row. Equal tokens have equal un-rotated keys in the first layer, and which of two equal blocks is chosen
    nobody says."""
    return torch.stack([torch.randperm(95, generator=torch.Generator().manual_seed(seed + row))[:count] + 1 for row in range(rows)]).to(DEVICE)
