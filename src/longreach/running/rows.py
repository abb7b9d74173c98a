"""Rows of flat forwards: sequences that are read in chunks and then decoded, side by side.

Knows flat forwards, where a method allows cuts, and samplers. Who has a place, and how much of each is read in a forward, is decided elsewhere: by a `Pool`
(running/together.py) or a `Scheduler` (serving/scheduler.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from longreach.hf.flat import Flat
from longreach.methods.base import Method
from longreach.running.sampling import Sampler, refusal


@dataclass(eq=False)
class Row:
    """One sequence.

    name     its request of the flat forwards.
    ids      the prompt, and the tokens decoded so far.
    sampler  decides the next token; None: it is only read.
    read     how many of the ids were read.
    prompt   how many of them were asked for, all that came after them are new.
    end      how many of them are read in chunks; after these, one by one.
    """

    name: int
    ids: list[int]
    sampler: Sampler | None
    read: int = 0
    prompt: int = field(init=False)
    end: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = self.end = len(self.ids)

    @property
    def new(self) -> list[int]:
        return self.ids[self.prompt :]

    @property
    def decodes(self) -> bool:
        """Whether it has begun its answer."""
        return self.read >= self.end


def forward(flat: Flat, counts: Mapping[Row, int]) -> dict[Row, torch.Tensor]:
    """Read so many more tokens of each row, in one forward -> the logits [V] of those that go on with a new token. If it fails, nothing was read."""
    logits = flat.read({row.name: row.ids[row.read : row.read + count] for row, count in counts.items()})
    for row, count in counts.items():
        row.read += count
    return {row: logits[row.name] for row in counts if row.sampler is not None and row.read == len(row.ids)}


def tokens(found: Mapping[Row, torch.Tensor]) -> dict[Row, int | ValueError]:
    """The next token of each row, those of plain ones all at once; or why it has none."""
    chosen: dict[Row, int | ValueError] = {}
    if plain := [row for row in found if row.sampler is not None and row.sampler.plain]:
        best, which = torch.stack([found[row] for row in plain]).max(-1)
        chosen = {row: refusal(value) or token for row, value, token in zip(plain, best.tolist(), which.tolist(), strict=True)}
    for row, logits in found.items():
        if row not in chosen and row.sampler is not None:
            try:
                chosen[row] = row.sampler.token(row.ids, logits)
            except ValueError as problem:
                chosen[row] = problem
    return chosen


def chunk(method: Method, read: int, end: int, budget: int) -> int:
    """How many more tokens of a prompt of `end` to read, of which `budget` are to be read at most, where the method allows to cut it there."""
    if budget < (method.cut or 1):
        return 0
    if method.cut is None or end - read <= budget:
        return end - read
    last = min((read + budget) // method.cut * method.cut, method.apart(end))
    return last - read if last > read else end - read


def shareable(method: Method, common: int, lengths: Sequence[int]) -> int:
    """How many of the first tokens that prompts of these lengths have in common can be read once for all of them."""
    return 0 if method.cut is None else min(method.apart(common + method.cut), *map(method.apart, lengths), common)
