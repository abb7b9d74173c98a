"""What a method is. A method is a frozen dataclass that answers "is `j` visible to `i`, and how far away is it?".

Knows index arithmetic; no tensors of queries and keys, no models.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from longreach.core.choice import Choice
from longreach.core.dense import Dense
from longreach.core.encodings import Frequencies, Rope
from longreach.core.eviction import Eviction
from longreach.core.segments import PLAIN, Layout, LogScale
from longreach.quantities import MOST_TOKENS

UNMEASURED = "how much of that it finds was not measured"
DEEP = 16  # a layer that chooses, in a method that does so from some layer on
MOST_SHARPENING = 100  # of a factor on cos and sin; logits carry its square, and the papers' formulas stay below 4


class Method(ABC):
    """Base of all methods; see `SelfExtend` for a complete example.

    A subclass is a frozen dataclass. Its fields are its parameters: their names are the same in Python, on the command line
    and in JSON, and `dataclasses.field(metadata={"help": ...})` describes them.
    """

    name: ClassVar[str]  # kebab-case, on the command line
    paper: ClassVar[str]
    recalls: ClassVar[str]  # what a user can expect it to remember, in plain words
    evidence: ClassVar[str] = ""  # of a method that chooses keys: what it was measured to find, where, and against what
    bounded: ClassVar[bool] = False  # the store stops growing
    rescales: ClassVar[bool] = False  # its layers rotate with other frequencies than the model's own
    needs_context: ClassVar[bool] = False  # which depend on the declared context

    @abstractmethod
    def layout(self, layer: int = 0) -> Layout:
        """The segments of a layer: what the fast path executes."""

    @abstractmethod
    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """The paper's definition, written without segments: effective distance fp64, NaN where `j` is hidden from `i`. Of a method that chooses: of every
        pair that may be seen; which are, `truth` says."""

    def truth(self, dense: Dense) -> torch.Tensor:
        """Distances [T, N] or [B, H, T, N] of the pairs that are seen in one forward, NaN elsewhere. A method that chooses states its choice here, from the
        paper alone, without its index."""
        return self.distances(dense.i, dense.j)

    @property
    def eviction(self) -> Eviction | None:
        """Which tokens stay where a turn comes that has no room; None: nothing is evicted by its content, and an index is a true one."""
        return None

    @property
    def sees(self) -> str:
        """What it recalls with these parameters, in plain words."""
        return self.recalls

    @property
    def known(self) -> str:
        """The same, and of a method that chooses keys what was measured of it: an index may miss what a question needs."""
        return self.sees if self.choice is None else f"{self.sees}; {self.evidence or UNMEASURED}"

    def query_scale(self) -> LogScale | None:
        """A factor on every query, or None."""
        return None

    def frequencies(self, rope: Rope) -> Frequencies:
        """What its layers rotate with; asked once per kind of layer, at `extend()`, if the method `rescales`."""
        return rope.own

    def capacity(self, window: int) -> int | None:
        """Largest number of tokens whose distances a model trained on `window` tokens has seen; None: no limit."""
        return window

    def largest_distance(self, tokens: int) -> float:
        """Largest distance in a text of `tokens` tokens. The last query has it, unless a method's distances shrink on the way."""
        n = tokens
        i = torch.tensor([max(0, n - 1)])
        step = max(97, n // 2**23)  # bounded memory, however far a factor reaches
        j = torch.arange(n) if n < 65536 else torch.cat([torch.arange(1024), torch.arange(1024, n, step), torch.arange(n - 1024, n)])
        return self.distances(i, j).nan_to_num(0).max().item()

    @classmethod
    def recommended(cls, window: int, context: int) -> Method:
        """The setting that its authors recommend, on a trained window, for a text of `context` tokens: what it is compared with others at.

        Raises ValueError if there is none that follows from these two numbers.
        """
        raise ValueError(f"{cls.name} has no recommended setting that follows from a trained window and a context; name its parameters")

    @classmethod
    def small(cls, pairs: int) -> Method:
        """A configuration that shows all it does on 75 tokens of a model that rotates `pairs` pairs of dims: what the tests and `check --all` run."""
        raise NotImplementedError(f"{cls.__name__} does not say how it is exercised; define small() and neutral()")

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> Method:
        """A configuration that is plain attention on `tokens` tokens, or as near to it as the method can be made."""
        raise NotImplementedError(f"{cls.__name__} does not say when it is plain attention; define small() and neutral()")

    @property
    def cut(self) -> int | None:
        """Where a prompt may be cut into forwards. 1: anywhere, the result is the same. n: only at multiples of n, and no forward of a prompt is shorter than
        n, unless the prompt is; decoded tokens come one by one after it. None: nowhere, a prompt is one forward. Of a method that evicts this is about a turn:
        the result depends on the turns that a text is read in."""
        return 1

    def apart(self, tokens: int) -> int:
        """How many tokens of a prompt can be read before the rest of it."""
        return 0 if self.cut is None else max(0, (tokens - self.cut) // self.cut * self.cut)

    @property
    def choice(self) -> Choice | None:
        """That of a deep layer: some methods choose from some layer on."""
        return self.layout(DEEP).choice

    @classmethod
    def suggest(cls, window: int, context: int) -> Method | None:
        """`recommended`, where there is one that reaches the context; else None."""
        try:
            method = cls.recommended(window, context)
        except ValueError:
            return None
        reach = method.capacity(window)
        return method if reach is None or reach >= context else None

    def options(self) -> list[str]:
        """The method as one types it on the command line, without the defaults."""
        found = [self.name]
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value == f.default:
                continue
            typed = ",".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)
            found += ["--" + f.name.replace("_", "-"), f'"{" ".join(value.options())}"' if isinstance(value, Method) else typed]
        return found

    def to_json(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"method": self.name, **{name: value.to_json() if isinstance(value, Method) else value for name, value in values.items()}}

    def __str__(self) -> str:
        parameters = ", ".join(f"{f.name}={_brief(getattr(self, f.name))}" for f in dataclasses.fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({parameters})"

    def brief(self) -> str:
        """The method and those of its parameters that are not the defaults."""
        values = [(f, getattr(self, f.name)) for f in dataclasses.fields(self)]  # type: ignore[arg-type]
        given = [f"{f.name}={value.brief() if isinstance(value, Method) else _brief(value)}" for f, value in values if value != f.default]
        return f"{type(self).__name__}({', '.join(given)})"


class FrequencyMethod(Method):
    """Base of the methods that see every earlier key at its true distance and rotate with other frequencies."""

    rescales: ClassVar[bool] = True

    def layout(self, layer: int = 0) -> Layout:
        return Layout((PLAIN,))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return hidden_to_nan(i - j, j <= i)

    @abstractmethod
    def frequencies(self, rope: Rope) -> Frequencies: ...


def stretched(window: int, factor: float) -> int:
    """Tokens whose distances stay inside the trained window when divided by `factor`."""
    return math.floor(factor * window + 1e-6)  # 1.1 * 10 is ten tokens and one, not a rounding error less


def _brief(value: object) -> str:
    if isinstance(value, tuple) and len(value) > 8:
        return f"({value[0]!r}, {value[1]!r}, ..., {value[-1]!r}: {len(value)} values)"
    return str(value) if isinstance(value, Method) else repr(value)


def hidden_to_nan(distance: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    return torch.where(visible, distance.double(), math.nan)


def require(condition: bool, sentence: str) -> None:
    """A user's parameter is checked here; the sentence contains the fix."""
    if not condition:
        raise ValueError(sentence)


def require_integer(name: str, value: object, least: int) -> None:
    """`least` to `MOST_TOKENS`: whatever is counted is tokens or fewer things, and what is beyond overflows in some product of sizes."""
    ok = isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST_TOKENS
    require(ok, f"{name} must be an integer of at least {least} and at most {MOST_TOKENS}, not {value!r}; pass {name.replace('_', '-')} in this range")


def require_number(name: str, value: object, least: float) -> None:
    """`least` to `MOST_TOKENS`: a factor of a window is bounded as tokens are."""
    ok = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= MOST_TOKENS
    require(ok, f"{name} must be a number of at least {least:g} and at most {MOST_TOKENS}, not {value!r}; pass {name.replace('_', '-')} in this range")


def require_positive(name: str, value: object, most: float = MOST_TOKENS) -> None:
    """1 / `most` to `most`."""
    require(is_positive(value, most), f"{name} must be a number above 0, from {1 / most:.3g} to {most:.10g}, not {value!r}; leave it out for its default")


def require_attention_factor(value: object) -> None:
    """None is the method's own formula."""
    if value is not None:
        require_positive("attention_factor", value, MOST_SHARPENING)


def is_positive(value: object, most: float = MOST_TOKENS) -> bool:
    """Whether a number is in 1 / `most` to `most`, where neither it nor its reciprocal overflows what it is multiplied with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 1 / most <= value <= most
