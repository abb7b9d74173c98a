"""LongRoPE (Ding et al., ICML 2024, arXiv 2402.13753): every pair has a divisor of its own, found by a search for the model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from longreach.core.encodings import Frequencies, Rope
from longreach.methods.base import FrequencyMethod, is_positive, require, require_attention_factor, require_number, stretched
from longreach.quantities import MOST_TOKENS

Factors = tuple[float, ...] | str


@dataclass(frozen=True)
class LongRoPE(FrequencyMethod):
    """With lambda the list for the length, L the trained window:

        theta_a' = theta_a / lambda_a
        lambda = short_factor up to length L, long_factor beyond; cos and sin times attention_factor at every length

    The length is the declared context, or factor * L if none is declared; it is fixed for the whole sequence. The paper's
    search, and its first n tokens that keep the original rotation, are not offered: supply your own lists.

    factor            context / trained window that the lists were searched for, >= 1.
    long_factor       one divisor > 0 per pair of rotary dims, or the path of a JSON file: a list, or an object with `long_factor` and,
                      if wanted, `short_factor`, also inside `rope_parameters` or `rope_scaling`, such as a checkpoint's config.json.
    short_factor      the same for short texts; None takes it from the file, else ones: short texts as the model computes them.
    attention_factor  0.01 to 100; None is sqrt(1 + ln(factor) / ln(L)).

    Raises ValueError for parameters out of range and unreadable files; extend() refuses lists of another length than the model's
    pairs, and a checkpoint whose rotary is scaled already.
    """

    factor: float = field(metadata={"help": "context / trained window that the lists were searched for"})
    long_factor: Factors = field(metadata={"help": "one divisor per pair of rotary dims, or a JSON file with them"})
    short_factor: Factors | None = field(default=None, metadata={"help": "the same up to the trained window; ones if not given"})
    attention_factor: float | None = field(default=None, metadata={"help": "factor on cos and sin; sqrt(1 + ln(factor) / ln(window)) if not given"})

    name: ClassVar[str] = "longrope"
    paper: ClassVar[str] = "arXiv 2402.13753"
    recalls: ClassVar[str] = "everything, as far as the searched lists allow"

    def __post_init__(self) -> None:
        require_number("factor", self.factor, 1)
        long = self.long_factor
        if isinstance(long, str) and self.short_factor is None:
            object.__setattr__(self, "short_factor", _read(long, "short_factor", required=False))
        object.__setattr__(self, "long_factor", _divisors("long_factor", long))
        if self.short_factor is not None:
            object.__setattr__(self, "short_factor", _divisors("short_factor", self.short_factor))
            require(
                len(self.short_factor) == len(self.long_factor),
                f"short_factor has {len(self.short_factor)} numbers and long_factor {len(self.long_factor)}; give both one per pair of rotary dims",
            )
        require_attention_factor(self.attention_factor)

    def frequencies(self, rope: Rope) -> Frequencies:
        pairs = rope.own.inverse.numel()
        require(
            len(self.long_factor) == pairs,
            f"long_factor has {len(self.long_factor)} numbers, but this model rotates {pairs} pairs of dims; give one number per pair",
        )
        return rope.standard(
            "longrope",
            rope.length,
            factor=self.factor,
            long_factor=list(self.long_factor),
            short_factor=list(self.short_factor or (1.0,) * pairs),
            attention_factor=self.attention_factor,
        )

    def capacity(self, window: int) -> int | None:
        return stretched(window, self.factor)

    @classmethod
    def small(cls, pairs: int) -> LongRoPE:
        return cls(2.0, tuple(1.0 + 0.2 * pair for pair in range(pairs)))

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> LongRoPE:
        return cls(1.0, (1.0,) * pairs)


def _divisors(name: str, value: Any) -> tuple[float, ...]:
    if isinstance(value, str):
        value = _read(value, name, required=True)
    require(
        isinstance(value, list | tuple) and len(value) > 0 and all(is_positive(x) for x in value),
        f"{name} must be numbers above 0, from {1 / MOST_TOKENS:.3g} to {MOST_TOKENS}, one per pair of rotary dims, or the path of a JSON file with them",
    )
    return tuple(float(x) for x in value)


def _read(path: str, name: str, required: bool) -> Any:
    """The list `name` of a JSON file; a bare list is the one that is required."""
    try:
        data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path!r} cannot be read as a JSON file of LongRoPE factors ({error}); pass the numbers or the path of such a file") from None
    if isinstance(data, dict):
        data = data.get("rope_parameters") or data.get("rope_scaling") or data
        require(not required or name in data, f"{path!r} has no {name}; pass a JSON list, or an object with {name}")
        return data.get(name)
    return data if required else None
