"""Dynamic NTK (emozilla 2023, described in the YaRN paper, arXiv 2309.00071): NTK-aware scaling by as much as the length asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from longreach.core.encodings import Frequencies, Rope
from longreach.methods.base import FrequencyMethod, require, require_number


@dataclass(frozen=True)
class DynamicNTK(FrequencyMethod):
    """With N the declared context, L the trained window and D the number of rotary dims:

        base' = base * (factor * max(N, L) / L - (factor - 1)) ** (D / (D - 2))

    Up to L it is plain attention. Transformers recomputes the base as N grows; here N is the declared context, fixed for the whole
    sequence, so that cached decoding equals one forward.

    factor  >= 1; 1 slows the slowest pair by N / L, larger factors leave the other pairs more room.

    Raises ValueError for parameters out of range; extend() refuses a checkpoint whose rotary is scaled already, and a missing context.
    """

    factor: float = field(default=1.0, metadata={"help": "1 scales by context / trained window; larger scales more"})

    name: ClassVar[str] = "dynamic-ntk"
    paper: ClassVar[str] = "arXiv 2309.00071"
    recalls: ClassVar[str] = "everything, near order kept; worse the longer the context"
    needs_context: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_number("factor", self.factor, 1)

    @classmethod
    def recommended(cls, window: int, context: int) -> DynamicNTK:
        """The default: scaled by what the context asks for."""
        return cls()

    def frequencies(self, rope: Rope) -> Frequencies:
        require(rope.own.inverse.numel() > 1, "dynamic NTK needs two pairs of rotary dims or more, and this model rotates one; use PI(factor=...)")
        return rope.standard("dynamic", rope.length, factor=self.factor)

    def capacity(self, window: int) -> int | None:
        """No limit of its own: the frequencies follow the declared context."""
        return None

    @classmethod
    def small(cls, pairs: int) -> DynamicNTK:
        return cls(2.0)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> DynamicNTK:
        return cls(4.0)
