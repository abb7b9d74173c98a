"""How exact every method is on every family of models: fast path against dense truth, neutral parameters against stock.

Knows families and methods and how to compare logits; not terminals or pages. Every cell is measured, or refused with the sentence that
`extend` raises. Differences are relative to the largest logit, in fp32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from longreach.checking import families
from longreach.core.differences import relative
from longreach.hf.checks import Inexact
from longreach.hf.extension import Extension, extend
from longreach.methods import registry
from longreach.methods.base import Method
from longreach.methods.stock import Stock

FAST, NEUTRAL = 1e-5, 1e-4  # gates
ROWS, TOKENS, NEUTRAL_TOKENS = 2, 75, 60


@dataclass(frozen=True)
class Cell:
    """One method on one family: two differences, or why `extend` refuses."""

    family: str
    method: str
    fast: float | None = None
    neutral: float | None = None
    refusal: str | None = None
    remark: str | None = None

    @property
    def passed(self) -> bool:
        return self.refusal is not None or (self.fast is not None and self.fast <= FAST and self.neutral is not None and self.neutral <= NEUTRAL)

    def to_json(self) -> dict[str, Any]:
        """A difference that is not finite, which never passes, is null: JSON has no infinity."""
        finite = {name: value if value is not None and math.isfinite(value) else None for name, value in (("fast", self.fast), ("neutral", self.neutral))}
        return {**asdict(self), **finite, "passed": self.passed}


@dataclass(frozen=True)
class Family:
    """A family, its kinds of layers in words, and its cells; or why no method can be attached. `failed`: not by intent, but as the engine is not exact.

    alone  why its requests cannot be read together in a flat forward; None: they can.
    """

    name: str
    architecture: str
    layers: str = ""
    refusal: str | None = None
    cells: list[Cell] = field(default_factory=list)
    failed: bool = False
    alone: str | None = None

    @property
    def passed(self) -> bool:
        return not self.failed and all(cell.passed for cell in self.cells)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "cells": [cell.to_json() for cell in self.cells], "passed": self.passed}


def survey(names: list[str] | None = None, methods: list[str] | None = None) -> Iterator[Family]:
    """Every family (or those named) with every method (or those named). Random weights, the same each time."""
    wanted = {name: method for name, method in registry().items() if not methods or name in methods}
    for name in names or [*families.FAMILIES, *families.REFUSED]:
        model = families.build(name)
        architecture = type(model).__name__
        try:
            with extend(model, Stock(), trained_window=families.WINDOW) as extension:
                layers, pairs, alone = kinds(extension), pairs_of(extension), read_alone(extension)
        except ValueError as error:
            yield Family(name, architecture, refusal=str(error), failed=isinstance(error, Inexact))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # far beyond the windows on purpose; remarks are in the cells
            yield Family(name, architecture, layers, cells=[measure(name, model, method, pairs) for method in wanted.values()], alone=alone)


@torch.no_grad()
def measure(family: str, model: Any, kind: type[Method], pairs: int) -> Cell:
    ids = families.tokens(ROWS, TOKENS)
    method, neutral = kind.small(pairs), kind.neutral(NEUTRAL_TOKENS, pairs)
    declared = TOKENS if method.needs_context else None
    try:
        with extend(model, method, context=declared, backend="reference"):
            truth = model(ids, use_cache=False).logits
        with extend(model, method, context=declared) as extension:
            remark, replaced = extension.report()["warning"], extension.report()["sliding_window_overridden"]
            fast = relative(model(ids, use_cache=True).logits, truth)
        ids = ids[:, :NEUTRAL_TOKENS]
        with extend(model, neutral, context=NEUTRAL_TOKENS if neutral.needs_context else None, trained_window=families.WINDOW):
            ours = model(ids, use_cache=False).logits
    except Inexact as error:
        return Cell(family, kind.name, math.inf, math.inf, remark=str(error))
    except ValueError as error:
        return Cell(family, kind.name, refusal=str(error))
    # a method replaces a window that every layer has, so the stock model it should equal has none
    stock = families.build(family, sliding_window=None) if replaced else model
    return Cell(family, kind.name, fast, relative(ours, stock(ids).logits), remark=remark)


def kinds(extension: Extension) -> str:
    """The layers in words: "full", "sliding 24 | full without positions"."""
    words: dict[str, None] = {}
    for layer in extension.layers:
        trained = layer.method
        assert isinstance(trained, Stock)
        word = f"sliding {trained.sliding_window}" if trained.sliding_window else f"chunks of {trained.attention_chunk}" if trained.attention_chunk else "full"
        words[word if layer.rotary is not None else f"{word} without positions"] = None
    return " | ".join(words)


def read_alone(extension: Extension) -> str | None:
    """Why requests cannot be read together; None: they can, which was compared with each of them alone."""
    try:
        extension.flat()
    except ValueError as error:
        return str(error)
    return None


def pairs_of(extension: Extension) -> int:
    """Rotary pairs of a head."""
    return next((layer.rotary.width // 2 for layer in extension.layers if layer.rotary is not None), 1)
