"""NTK-by-parts (Peng et al., ICLR 2024, arXiv 2309.00071, section 3.2): slow pairs interpolated, fast pairs as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from longreach.core.encodings import Frequencies, Rope
from longreach.methods.base import FrequencyMethod, require, require_number, require_positive, stretched


@dataclass(frozen=True)
class NTKByParts(FrequencyMethod):
    """With L the trained window, a pair makes r_a = L * theta_a / (2 pi) turns within it:

        gamma(r) = 0 below alpha, 1 above beta, linear in r between
        theta_a' = (1 - gamma(r_a)) * theta_a / factor + gamma(r_a) * theta_a

    This is the paper's ramp, linear in the number of turns. YaRN's official code and every checkpoint trained with it use a ramp
    that is linear in the pair's index, and a temperature: see `YaRN`.

    factor  context / trained window, >= 1; 1 is plain attention.
    alpha   turns up to which a pair is interpolated, > 0; the paper uses 1 for Llama.
    beta    turns from which a pair stays as it is, > alpha; the paper uses 32 for Llama.

    Raises ValueError for parameters out of range; extend() refuses a checkpoint whose rotary is scaled already.
    """

    factor: float = field(metadata={"help": "context / trained window"})
    alpha: float = field(default=1.0, metadata={"help": "turns up to which a pair is interpolated"})
    beta: float = field(default=32.0, metadata={"help": "turns from which a pair stays as it is"})

    name: ClassVar[str] = "ntk-by-parts"
    paper: ClassVar[str] = "arXiv 2309.00071"
    recalls: ClassVar[str] = "everything, near order kept"

    def __post_init__(self) -> None:
        require_number("factor", self.factor, 1)
        require_positive("alpha", self.alpha)
        require_positive("beta", self.beta)
        require(self.alpha < self.beta, f"beta must be larger than alpha ({self.alpha:g}), not {self.beta:g}; raise it")

    @classmethod
    def recommended(cls, window: int, context: int) -> NTKByParts:
        """Context over trained window."""
        return cls(max(1.0, context / window))

    def frequencies(self, rope: Rope) -> Frequencies:
        own = rope.own.inverse
        turns = rope.window * own / (2 * math.pi)
        gamma = ((turns - self.alpha) / (self.beta - self.alpha)).clamp(0, 1)
        return Frequencies((1 - gamma) * own / self.factor + gamma * own)

    def capacity(self, window: int) -> int | None:
        """Where the interpolated pairs reach their largest trained angle; the others have passed every angle in the trained window."""
        return stretched(window, self.factor)

    @classmethod
    def small(cls, pairs: int) -> NTKByParts:
        return cls(2.0, beta=4.0)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> NTKByParts:
        return cls(1.0)
