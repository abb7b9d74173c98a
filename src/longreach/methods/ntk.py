"""NTK-aware scaling (bloc97 2023, described in the YaRN paper, arXiv 2309.00071): a larger base, so that fast pairs stay as they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.core.encodings import Frequencies, Rope
from longreach.methods.base import FrequencyMethod, require, require_number, stretched


@dataclass(frozen=True)
class NTK(FrequencyMethod):
    """With D the number of rotary dims and theta_a = base ** (-2 a / D) the frequency of pair a:

        base' = base * factor ** (D / (D - 2)),   which is   theta_a' = theta_a * factor ** (-2 a / (D - 2))

    The fastest pair is unchanged, the slowest is divided by `factor` exactly as in position interpolation. The pairs between are
    divided by less. Those that make no full turn in the trained window therefore exceed their trained angles before factor * L: choose a
    factor larger than context / trained window.

    factor  by how much the slowest pair is slowed down, >= 1; 1 is plain attention.

    Raises ValueError for parameters out of range; extend() refuses a checkpoint whose rotary is scaled already.
    """

    factor: float = field(metadata={"help": "by how much the slowest pair is slowed down; larger than context / trained window"})

    name: ClassVar[str] = "ntk"
    paper: ClassVar[str] = "arXiv 2309.00071"
    recalls: ClassVar[str] = "everything, near order kept; less than factor times the window in practice"

    def __post_init__(self) -> None:
        require_number("factor", self.factor, 1)

    @classmethod
    def recommended(cls, window: int, context: int) -> NTK:
        """Larger than context over trained window, as the paper asks: 2 N / L - 1, which is Transformers' dynamic scaling with its usual factor of 2."""
        return cls(max(1.0, 2 * context / window - 1))

    def frequencies(self, rope: Rope) -> Frequencies:
        pairs = rope.own.inverse.numel()
        require(pairs > 1, "NTK-aware scaling needs two pairs of rotary dims or more, and this model rotates one; use PI(factor=...)")
        pair = torch.arange(pairs, dtype=torch.float64, device=rope.own.inverse.device)
        return Frequencies(rope.own.inverse * self.factor ** (-pair / (pairs - 1)))

    def capacity(self, window: int) -> int | None:
        """Where the slowest pair reaches its largest trained angle."""
        return stretched(window, self.factor)

    @classmethod
    def small(cls, pairs: int) -> NTK:
        return cls(4.0)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> NTK:
        return cls(1.0)
