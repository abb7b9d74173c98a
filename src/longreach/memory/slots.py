"""Slots: the columns that Transformers counts in a cache, and which of them hold a token.

A row's pads are kept as runs of consecutive slots, so that what they take grows with the number of runs and not with the length of a stream.
Knows nothing of keys, values or models.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

Stretch = tuple[int, int]  # first, last + 1


@dataclass
class Slots:
    """`seen` columns of every row; `pads` of a row are the runs of slots that hold no token, in order and never adjacent. `evicted` tokens of a row have
    left; nobody knows their slots."""

    pads: list[list[Stretch]]
    seen: int = 0
    evicted: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.evicted = self.evicted or [0] * len(self.pads)

    @classmethod
    def empty(cls, rows: int) -> Slots:
        return cls([[] for _ in range(rows)])

    @classmethod
    def of(cls, real: torch.Tensor) -> Slots:
        """real [B, T] on the CPU."""
        found = cls.empty(real.shape[0])
        found.append(real, real.shape[1])
        return found

    def copy(self) -> Slots:
        return Slots([[*row] for row in self.pads], self.seen, [*self.evicted])

    def tokens(self, row: int) -> int:
        return self.seen - sum(b - a for a, b in self.pads[row]) - self.evicted[row]

    def append(self, real: torch.Tensor | None, columns: int) -> None:
        """`columns` more; real [B, columns] on the CPU, None if all of them hold tokens."""
        if real is not None:
            for row, own in enumerate(real):
                for a, b in runs(~own):
                    self._pad(row, a + self.seen, b + self.seen)
        self.seen += columns

    def _pad(self, row: int, start: int, stop: int) -> None:
        runs = self.pads[row]
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, stop))

    def without(self, slots: int) -> Slots:
        """Without the last `slots` columns."""
        stop = self.seen - slots
        return Slots([[(a, min(b, stop)) for a, b in row if a < stop] for row in self.pads], stop, [*self.evicted])

    def keeping(self, row: int, tokens: int) -> None:
        """Only the first `tokens` tokens of a row still count; the slots of the others are pads from now on."""
        kept: list[Stretch] = []
        slot = 0  # where the next token lies, if no pad is in its way
        for a, b in self.pads[row]:
            if tokens <= a - slot:
                break
            tokens -= a - slot
            kept.append((a, b))
            slot = b
        self.pads[row] = kept
        if slot + tokens < self.seen:
            self._pad(row, slot + tokens, self.seen)

    def select(self, rows: list[int]) -> None:
        self.pads = [[*self.pads[row]] for row in rows]
        self.evicted = [self.evicted[row] for row in rows]

    @property
    def real(self) -> torch.Tensor | None:
        """[B, seen] which slots hold tokens; None while all do."""
        if not any(self.pads):
            return None
        real = torch.ones(len(self.pads), self.seen, dtype=torch.bool)
        for row, runs in enumerate(self.pads):
            for a, b in runs:
                real[row, a:b] = False
        return real


def runs(flags: torch.Tensor) -> list[Stretch]:
    """The stretches of a bool vector that are True."""
    edges = torch.diff(flags.to(torch.int8), prepend=flags.new_zeros(1, dtype=torch.int8), append=flags.new_zeros(1, dtype=torch.int8)).nonzero()[:, 0]
    return [(a, b) for a, b in edges.view(-1, 2).tolist()]
