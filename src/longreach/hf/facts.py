"""What is true of one model under one method, frozen: read from the model, proven on it by `verify.py`, and used by every forward.

Holds data; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from longreach.configs import Window
from longreach.core.encodings import Alibi, Rotary
from longreach.engine.layer import Layer
from longreach.hf.interfaces import CausalLM
from longreach.hf.registration import Configs
from longreach.hf.rotary import Key
from longreach.memory.stored import Placed
from longreach.methods.base import Method
from longreach.methods.stock import Stock
from longreach.planning import dial

PROBE_POSITIONS = (0, 1, 2, 3, 5, 8, 13, 21, 30, 34, 41, 55)


class Entry(NamedTuple):
    """What one layer stores of a token, and its query heads."""

    heads: int
    key_width: int
    value_width: int
    dtype: torch.dtype
    device: torch.device
    queries: int


@dataclass(frozen=True)
class Chosen:
    """What a user asked for, or the dial chose.

    capacity  the longest sequence that the method reaches on this window; None: any length.
    """

    method: Method
    window: Window
    context: int | None
    capacity: int | None
    choice: dial.Choice | None = None


@dataclass(frozen=True, eq=False)
class Reading:
    """What the attention layers of a model are, in the order of the layers.

    rotaries    how each rotates its queries and keys; None: not at all. `keys` are the names that the model has for these kinds of frequencies.
    trained     the attention that each was trained with, as a method.
    difference  our rotation against the model's own, largest over all layers, relative to the largest value.
    dtype       of the hidden states.
    """

    modules: list[Any]
    keys: list[Key]
    rotaries: list[Rotary | None]
    alibi: Alibi | None
    trained: list[Stock]
    entries: list[Entry]
    dtype: torch.dtype
    difference: float | None = None  # None of a legacy family


class Seam(Protocol):
    """How a kind of models is listened to, and where our functions go."""

    legacy: ClassVar[bool]
    model: Any
    base: Any  # the text model around the layers
    name: str  # of our attention function
    before: Configs  # what the configurations had

    def probe(self, window: int) -> torch.Tensor:
        """[n] positions that the model is probed at."""

    def read(self, ids: torch.Tensor, positions: torch.Tensor) -> Reading:
        """ids [1, n]. Raises ValueError where the model does something that we do not know."""

    def kernels(self, reading: Reading) -> Sequence[str]:
        """The stock kernels to compare with, the definition last."""

    def stock(self, kernel: str) -> AbstractContextManager[None]:
        """Inside, the model is stock with this kernel. What it does there leaves no trace in it."""

    def install(self, attend: Any, modules: Sequence[Any]) -> None:
        """Put our attention, which is registered, in place of the model's own."""

    def remove(self) -> None:
        """Take it off. May be called where nothing was installed."""


@dataclass(frozen=True)
class Exactness:
    """Measured on this model at attach time, on 12 tokens with neutral parameters.

    rotary        q and k of every layer: our rotation against the model's own; of a legacy family, the output of every attention layer. Relative to the
                  largest value.
    logits        against the stock model's eager code in fp32, relative to the largest logit. In half precision against the same weights computed in
                  fp32, root mean square over that of the logits; where that cannot be, against the nearer stock kernel.
    layers        half precision: the same of the attention layers, each on the input that it has in the stock model; the largest.
    stock_logits, stock_layers  what the better of the stock kernels (eager, sdpa) has of these errors by itself.
    """

    rotary: float
    logits: float
    what: str = "rotation"  # "attention" of a legacy family
    layers: float | None = None
    stock_logits: float | None = None
    stock_layers: float | None = None
    dtype: str = "float32"
    without: str = ""  # half precision: why there is nothing in fp32 to compare with

    def __str__(self) -> str:
        text = f"{self.what} {self.rotary:.1e}, logits {self.logits:.1e}"
        if self.layers is None:
            return f"{text} (largest relative difference to the stock model on {len(PROBE_POSITIONS)} tokens)"
        if self.stock_logits is None or self.stock_layers is None:
            return f"{text}, a layer {self.layers:.1e} (relative difference to the nearer stock kernel: rounding of {self.dtype}; {self.without})"
        return (
            f"{text} where stock itself has {self.stock_logits:.1e}, a layer {self.layers:.1e} where stock has {self.stock_layers:.1e} (relative error against "
            f"the same weights in fp32, on {len(PROBE_POSITIONS)} tokens: rounding of {self.dtype})"
        )


@dataclass(frozen=True, eq=False)
class Facts:
    """A model under a method.

    name         of our attention function in the configuration.
    slot_scales  steps of the query scaling that layers without positions compute from slots, see `layer_kinds`.
    remark       what a user should know about this method on this model.
    """

    model: CausalLM
    base: Any
    legacy: bool
    name: str
    chosen: Chosen
    reading: Reading
    layers: tuple[Layer, ...]
    slot_scales: set[int]
    exactness: Exactness = Exactness(float("nan"), float("nan"))
    remark: str | None = None

    @property
    def covered(self) -> list[int]:
        """The layers that take the method."""
        return [layer.index for layer in self.layers if layer.method is self.chosen.method]

    def device_of_layer(self, index: int) -> torch.device:
        """Where a layer computes, and so keeps its keys and values."""
        weight = next(self.reading.modules[index].parameters())
        return self.reading.entries[index].device if weight.is_meta else weight.device

    @property
    def stored(self) -> list[Placed]:
        """What every layer stores of a token."""
        return [
            Placed(layer.kept, e.heads, e.queries, e.key_width, e.value_width, e.dtype.itemsize, e.dtype, self.device_of_layer(layer.index))
            for layer, e in zip(self.layers, self.reading.entries, strict=True)
        ]
