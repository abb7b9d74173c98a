"""YaRN (Peng et al., ICLR 2024, arXiv 2309.00071): interpolation by parts and a temperature of the attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from longreach.core.encodings import Frequencies, Rope
from longreach.methods.base import FrequencyMethod, require, require_attention_factor, require_number, require_positive, stretched


@dataclass(frozen=True)
class YaRN(FrequencyMethod):
    """Pairs with many turns in the trained window L stay, pairs with few turns are divided by `factor`, and a ramp joins them; logits are sharpened:

        theta_a' = ramp_a * theta_a / factor + (1 - ramp_a) * theta_a
        ramp: 0 at pair low, 1 at pair high, linear in the pair's index between
        low = floor(pair(beta_fast)), high = ceil(pair(beta_slow)), pair(turns) = D * ln(L / (2 pi turns)) / (2 ln base)
        cos and sin times attention_factor, so logits of rotated dims times its square

    The ramp is that of the official code and of Transformers, which checkpoints are trained with; the paper's is in `NTKByParts`.

    factor            context / trained window, >= 1; 1 is plain attention.
    beta_fast         turns from which a pair stays as it is, > beta_slow; 32 for Llama.
    beta_slow         turns up to which a pair is interpolated, > 0; 1 for Llama.
    truncate_ramp     round low and high to whole pairs, as the official code does.
    attention_factor  0.01 to 100; None is the paper's 0.1 ln(factor) + 1.

    Raises ValueError for parameters out of range; extend() refuses a checkpoint whose rotary is scaled already.
    """

    factor: float = field(metadata={"help": "context / trained window"})
    beta_fast: float = field(default=32.0, metadata={"help": "turns from which a pair stays as it is"})
    beta_slow: float = field(default=1.0, metadata={"help": "turns up to which a pair is interpolated"})
    truncate_ramp: bool = field(default=True, metadata={"help": "round the borders of the ramp to whole pairs"})
    attention_factor: float | None = field(default=None, metadata={"help": "factor on cos and sin; 0.1 ln(factor) + 1 if not given"})

    name: ClassVar[str] = "yarn"
    paper: ClassVar[str] = "arXiv 2309.00071"
    recalls: ClassVar[str] = "everything, near order kept"

    def __post_init__(self) -> None:
        require_number("factor", self.factor, 1)
        require_ramp(self.beta_fast, self.beta_slow, self.truncate_ramp)
        require_attention_factor(self.attention_factor)

    @classmethod
    def recommended(cls, window: int, context: int) -> YaRN:
        """Context over trained window."""
        return cls(max(1.0, context / window))

    def frequencies(self, rope: Rope) -> Frequencies:
        return rope.standard(
            "yarn",
            factor=self.factor,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
            truncate=self.truncate_ramp,
            attention_factor=self.attention_factor,
        )

    def capacity(self, window: int) -> int | None:
        """Where the interpolated pairs reach their largest trained angle; the others have passed every angle in the trained window."""
        return stretched(window, self.factor)

    @classmethod
    def small(cls, pairs: int) -> YaRN:
        return cls(2.0)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> YaRN:
        return cls(1.0)


def require_ramp(beta_fast: float, beta_slow: float, truncate_ramp: bool) -> None:
    require_positive("beta_fast", beta_fast)
    require_positive("beta_slow", beta_slow)
    require(beta_slow < beta_fast, f"beta_fast must be larger than beta_slow ({beta_slow:g}), not {beta_fast:g}; raise it")
    require(isinstance(truncate_ramp, bool), f"truncate_ramp must be true or false, not {truncate_ramp!r}; leave it out for true")
