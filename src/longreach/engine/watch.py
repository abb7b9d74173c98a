"""Watching the forwards of a model, layer by layer: how much attention the tokens of a text get, from all queries or from each, or which of them an index
chooses. Knows layers and rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from longreach.core.choice import Choice
from longreach.core.segments import Piece
from longreach.engine.chosen import Asked
from longreach.engine.layer import Inputs
from longreach.kernels import mass
from longreach.kernels.biased import Bias
from longreach.kernels.protocol import KV
from longreach.kernels.tiles import Band


class Ended(Exception):
    """A forward has come as far as it is wanted; not an error."""


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

    def least(self, rows: slice, start: int, stop: int) -> int:
        """Of a forward of the queries start .. stop, the first that counts."""
        return start if self.queries is None else max(start, stop - self.queries)

    def add(self, layer: int, rows: slice, query: int, q: torch.Tensor, kv: KV, lse: torch.Tensor, band: Band, inputs: Inputs, bias: Bias | None) -> None:
        """q [n, H, t, D] of some rows, the first of them with the index `query`, and the log-sum-exp [n, H, t] of all that they see: what they pay to `kv`."""
        paid = mass.paid(q, kv.k, lse, band, inputs.scale, inputs.softcap, bias)
        whole = self._room(layer, rows.stop, kv.index + paid.shape[2], paid)
        whole[rows, :, kv.index : kv.index + paid.shape[2]] += paid

    def add_chosen(self, layer: int, rows: slice, query: int, asked: Asked, key: int, lse: torch.Tensor, inputs: Inputs) -> None:
        """The same of what queries have chosen; `key` is the segment's first key. A token may come more than once."""
        paid = mass.paid(asked.q, asked.kv.k, asked.folded(lse), asked.work, inputs.scale, inputs.softcap)
        paid = asked.unfolded(paid[:, :, None])  # [n, H, T or 1, C]
        tokens = (asked.columns + key).repeat_interleave(paid.shape[1] // asked.columns.shape[1], 1).flatten(2)
        whole = self._room(layer, rows.stop, int(tokens.max()) + 1, paid)
        whole[rows] = whole[rows].scatter_add(2, tokens, paid.flatten(2))

    def _room(self, layer: int, rows: int, tokens: int, like: torch.Tensor) -> torch.Tensor:
        found = self.mass.get(layer)
        found = like.new_zeros((rows, like.shape[1], tokens)) if found is None else found
        self.mass[layer] = F.pad(found, (0, max(0, tokens - found.shape[2]), 0, 0, 0, max(0, rows - found.shape[0])))
        return self.mass[layer]


@dataclass(eq=False)
class Probabilities:
    """What each of some queries pays to every token, all heads added up.

    first   of each row, the index of the first query that counts; a number: the same in all rows.
    layers  those that are watched; None: all.
    paid    layer -> [B, T, N] fp32: the sum over heads of the final probabilities of the query `first + t`, for every token by its index in its row. Over the
            tokens it adds up to the number of heads, less what a learned sink has taken.
    """

    first: int | Sequence[int]
    layers: Collection[int] | None = None
    paid: dict[int, torch.Tensor] = field(default_factory=dict)

    def wants(self, layer: int) -> bool:
        return self.layers is None or layer in self.layers

    def first_of(self, row: int) -> int:
        if isinstance(self.first, int):
            return self.first
        if row >= len(self.first):
            raise ValueError(f"first has an index for each of {len(self.first)} rows, and there is a row {row}; pass one for every row, or one number for all")
        return self.first[row]

    def least(self, rows: slice, start: int, stop: int) -> int:
        """Of a forward of the queries start .. stop of some rows, the first that counts in any."""
        return max(start, min(map(self.first_of, range(rows.start, rows.stop))))

    def add(self, layer: int, rows: slice, query: int, q: torch.Tensor, kv: KV, lse: torch.Tensor, band: Band, inputs: Inputs, bias: Bias | None) -> None:
        """As in `Watch`."""
        paid = mass.of_each(q, kv.k, lse, band, inputs.scale, inputs.softcap, bias)
        stop = kv.index + paid.shape[2]
        for number, counting, whole in self._counting(layer, rows, query, paid, stop):
            whole[:, kv.index : stop] += paid[number, counting]

    def add_chosen(self, layer: int, rows: slice, query: int, asked: Asked, key: int, lse: torch.Tensor, inputs: Inputs) -> None:
        """As in `Watch`."""
        paid = mass.of_each(asked.q, asked.kv.k, asked.folded(lse), asked.work, inputs.scale, inputs.softcap)
        paid = asked.unfolded(paid[:, None]).transpose(1, 2)  # [n, T, C, c]
        tokens = (asked.columns + key).repeat_interleave(paid.shape[1] // asked.columns.shape[2], 2).transpose(1, 2)
        for number, counting, whole in self._counting(layer, rows, query, paid, int(tokens.max()) + 1 if tokens.numel() else 0):
            whole.scatter_add_(1, tokens[number, counting].flatten(1), paid[number, counting].flatten(1))

    def _counting(self, layer: int, rows: slice, query: int, paid: torch.Tensor, tokens: int) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """Of what queries pay [n, t, ...]: the number of a row, those of its queries that count, and where that is added up [t, N]; there is room for it."""
        given, firsts = paid.shape[1], [self.first_of(row) for row in range(rows.start, rows.stop)]
        before = self.paid.get(layer)
        before = paid.new_zeros(0, 0, 0) if before is None else before
        room = (max(0, need - have) for need, have in zip((rows.stop, query + given - min(firsts), tokens), before.shape))
        self.paid[layer] = whole = F.pad(before, [n for more in reversed([*room]) for n in (0, more)])
        for number, first in enumerate(firsts):
            if (skipped := max(0, first - query)) < given:
                yield number, slice(skipped, given), whole[rows.start + number, query + skipped - first : query + given - first]


@dataclass(eq=False)
class Choices:
    """What an index chooses for the queries of the forwards under way, as they are computed: nothing is asked twice.

    first   queries with an index from this one on count; of a layer that chooses only those who do, for the others see all that they may.
    chosen  layer that chooses -> [B, N] int32, N tokens of the longest row: how often its index has shown a token, over queries and over those who choose
            apart in each (heads, groups, or the layer).
    always  layer -> [B, N] int32: to how many queries it shows a token whatever the index says: near and first tokens, and a block that is not complete.
    asked   layer -> [B, 1] int32: the queries that count. A layer in which none does is in none of the three.
    """

    first: int = 0
    chosen: dict[int, torch.Tensor] = field(default_factory=dict)
    always: dict[int, torch.Tensor] = field(default_factory=dict)
    asked: dict[int, torch.Tensor] = field(default_factory=dict)

    def wants(self, layer: int) -> bool:
        return True

    def ask(self, layer: int, rows: slice, queries: int, tokens: int, device: torch.device) -> None:
        """So many queries more, of rows that have so many tokens: both counts of a layer speak of the same rows and tokens."""
        self._room(self.asked, layer, rows.stop, 1, device)[rows] += queries
        counts = [found for found in (self.chosen, self.always) if found is self.always or layer in found]
        shapes = [found[layer].shape for found in counts if layer in found]
        for found in counts:
            self._room(found, layer, max([rows.stop, *(shape[0] for shape in shapes)]), max([tokens, *(shape[1] for shape in shapes)]), device)

    def show(self, layer: int, rows: slice, piece: Piece, device: torch.device) -> None:
        """What no index decides about."""
        whole = self._room(self.always, layer, rows.stop, piece.to_key, device)
        for i in range(max(self.first, piece.first), piece.last):
            first = piece.from_key if piece.high is None else max(piece.from_key, i - piece.high + 1)
            whole[rows, first : max(first, min(piece.to_key, i - piece.low + 1))] += 1

    def choose(self, layer: int, rows: slice, choice: Choice, asked: Asked, query: int, key: int) -> None:
        """The first of the queries is `query`, and `key` is the segment's first key."""
        if query + asked.queries <= self.first:
            return
        columns, device = asked.columns, asked.columns.device
        counted = (torch.arange(query, query + asked.queries, device=device) >= self.first).view(columns.shape[2], -1)
        shown = (asked.work.seen.unflatten(0, columns.shape[:3]) & counted[..., None]).sum(3)  # [R, C, S, n]
        complete = ((asked.choosing - choice.lag).clamp_min(0) // choice.block * choice.block)[:, None, :, None]
        by_index = (columns >= choice.index.first) & (columns < complete)
        tokens = key + int(columns.max()) + 1 if columns.numel() else 0
        one = slice(1)  # who choose apart see the same of what is not complete
        for found, counts, among in ((self.chosen, shown * by_index, slice(None)), (self.always, shown * ~by_index, one)):
            whole = self._room(found, layer, rows.stop, tokens, device)
            whole[rows] = whole[rows].scatter_add(1, columns[:, among].flatten(1) + key, counts[:, among].flatten(1).int())

    @staticmethod
    def _room(found: dict[int, torch.Tensor], layer: int, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
        before = found.get(layer)
        before = torch.zeros((rows, tokens), dtype=torch.int32, device=device) if before is None else before
        found[layer] = F.pad(before, (0, max(0, tokens - before.shape[1]), 0, max(0, rows - before.shape[0])))
        return found[layer]


Watcher = Watch | Probabilities | Choices
