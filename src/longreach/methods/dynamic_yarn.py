"""Dynamic YaRN (Peng et al., ICLR 2024, arXiv 2309.00071): YaRN with the factor that the length asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from longreach.core.encodings import Frequencies, Rope
from longreach.methods.base import FrequencyMethod, require_attention_factor
from longreach.methods.yarn import YaRN, require_ramp


@dataclass(frozen=True)
class DynamicYaRN(FrequencyMethod):
    """With N the declared context and L the trained window:

        YaRN with factor = max(1, N / L), temperature included

    Up to L it is plain attention. The paper recomputes the factor at every step; here N is the declared context, fixed for the
    whole sequence, so that cached decoding equals one forward.

    beta_fast         turns from which a pair stays as it is, > beta_slow; 32 for Llama.
    beta_slow         turns up to which a pair is interpolated, > 0; 1 for Llama.
    truncate_ramp     round the borders of the ramp to whole pairs, as the official code does.
    attention_factor  0.01 to 100; None is the paper's 0.1 ln(factor) + 1.

    Raises ValueError for parameters out of range; extend() refuses a checkpoint whose rotary is scaled already, and a missing context.
    """

    beta_fast: float = field(default=32.0, metadata={"help": "turns from which a pair stays as it is"})
    beta_slow: float = field(default=1.0, metadata={"help": "turns up to which a pair is interpolated"})
    truncate_ramp: bool = field(default=True, metadata={"help": "round the borders of the ramp to whole pairs"})
    attention_factor: float | None = field(default=None, metadata={"help": "factor on cos and sin; 0.1 ln(factor) + 1 if not given"})

    name: ClassVar[str] = "dynamic-yarn"
    paper: ClassVar[str] = "arXiv 2309.00071"
    recalls: ClassVar[str] = "everything, near order kept; worse the longer the context"
    needs_context: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_ramp(self.beta_fast, self.beta_slow, self.truncate_ramp)
        require_attention_factor(self.attention_factor)

    @classmethod
    def recommended(cls, window: int, context: int) -> DynamicYaRN:
        """The default: scaled by what the context asks for."""
        return cls()

    def frequencies(self, rope: Rope) -> Frequencies:
        factor = max(1.0, rope.length / rope.window)
        return YaRN(factor, self.beta_fast, self.beta_slow, self.truncate_ramp, self.attention_factor).frequencies(rope)

    def capacity(self, window: int) -> int | None:
        """No limit of its own: the frequencies follow the declared context."""
        return None

    @classmethod
    def small(cls, pairs: int) -> DynamicYaRN:
        return cls(attention_factor=1.3)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> DynamicYaRN:
        return cls()
