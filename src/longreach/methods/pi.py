"""Position interpolation (Chen et al. 2023, arXiv 2306.15595): every frequency divided by one factor."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from longreach.core.encodings import Frequencies, Rope
from longreach.methods.base import FrequencyMethod, require_number, stretched


@dataclass(frozen=True)
class PI(FrequencyMethod):
    """Also called linear scaling. With theta_a the frequency of pair a:

        theta_a' = theta_a / factor

    A distance d is thus encoded as d / factor: at length factor * L no angle is larger than those of the trained window L. Near
    tokens move together by the same factor as far ones, and models without fine-tuning handle that badly.

    factor  context / trained window, >= 1; 1 is plain attention.

    Raises ValueError for parameters out of range; extend() refuses a checkpoint whose rotary is scaled already.
    """

    factor: float = field(metadata={"help": "context / trained window"})

    name: ClassVar[str] = "pi"
    paper: ClassVar[str] = "arXiv 2306.15595"
    recalls: ClassVar[str] = "everything, near order blurred by the factor"

    def __post_init__(self) -> None:
        require_number("factor", self.factor, 1)

    @classmethod
    def recommended(cls, window: int, context: int) -> PI:
        """Context over trained window."""
        return cls(max(1.0, context / window))

    def frequencies(self, rope: Rope) -> Frequencies:
        return rope.standard("linear", factor=self.factor)

    def capacity(self, window: int) -> int | None:
        return stretched(window, self.factor)

    @classmethod
    def small(cls, pairs: int) -> PI:
        return cls(2.5)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> PI:
        return cls(1.0)
