"""Watching: how much attention the tokens of a text get, layer by layer and head by head, in the forwards of a model. Knows layers and rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass(eq=False)
class Watch:
    """What the queries of the forwards under way pay to every token.

    layers   those that are watched; None: all.
    queries  of each forward only the last so many count; None: all.
    mass     layer -> [B, H, N] fp32: the sum over these queries of their final probabilities, for every token by its index in its row. Over the tokens it
             adds up to the number of queries, less what a learned sink has taken.
    """

    layers: Collection[int] | None = None
    queries: int | None = None
    mass: dict[int, torch.Tensor] = field(default_factory=dict)

    def wants(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def first(self, start: int, stop: int) -> int:
        """Of a forward of the queries start .. stop, the first that counts."""
        return start if self.queries is None else max(start, stop - self.queries)

    def add(self, layer: int, rows: slice, first: int, paid: torch.Tensor) -> None:
        """paid [n, H, C] to the tokens first, first + 1, ... of some rows."""
        whole = self._room(layer, rows.stop, first + paid.shape[2], paid)
        whole[rows, :, first : first + paid.shape[2]] += paid

    def scatter(self, layer: int, rows: slice, tokens: torch.Tensor, paid: torch.Tensor) -> None:
        """paid [n, H, C] to the tokens [n, H, C] of some rows; a token may come more than once."""
        whole = self._room(layer, rows.stop, int(tokens.max()) + 1, paid)
        whole[rows] = whole[rows].scatter_add(2, tokens, paid)

    def _room(self, layer: int, rows: int, tokens: int, like: torch.Tensor) -> torch.Tensor:
        found = self.mass.get(layer)
        found = like.new_zeros((rows, like.shape[1], tokens)) if found is None else found
        self.mass[layer] = F.pad(found, (0, max(0, tokens - found.shape[2]), 0, 0, 0, max(0, rows - found.shape[0])))
        return self.mass[layer]
