"""What rows chose some tokens ago, for those after them. It can be made again at any time from what the memory keeps, so that it is no part of a document.
Knows rows and indices of tokens; not what was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


@dataclass
class Recalled:
    """By row and stage the last answer, with the index of the query that it was given to."""

    found: dict[int, dict[int, tuple[int, torch.Tensor]]] = field(default_factory=dict)

    def get(self, row: int, stage: int, index: int) -> torch.Tensor | None:
        of, answer = self.found.get(row, {}).get(stage, (-1, None))
        return answer if of == index else None

    def put(self, row: int, stage: int, index: int, answer: torch.Tensor) -> None:
        self.found.setdefault(row, {})[stage] = index, answer

    def forget(self, rows: Sequence[int], starts: Sequence[int]) -> None:
        """Rows get new tokens from these indices on."""
        for row, start in zip(rows, starts):
            if row in self.found:
                self.found[row] = {stage: (of, answer) for stage, (of, answer) in self.found[row].items() if of < start}

    def select(self, rows: Sequence[int]) -> None:
        """Rows become the rows `rows` of before."""
        self.found = {new: dict(self.found[old]) for new, old in enumerate(rows) if old in self.found}

    def fork(self) -> Recalled:
        return Recalled({row: dict(answers) for row, answers in self.found.items()})
