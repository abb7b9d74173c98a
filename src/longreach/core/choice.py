"""Choice: a segment that shows only some of its visible keys, which an index picks by their content, in blocks.

Knows tensors of queries and of what is kept of keys; not where they are kept, layers or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch


@dataclass(frozen=True, eq=False)
class Past:
    """What R rows with T queries each choose from. A block is `block` visible keys; `N` of them are complete for some query.

    compared    [R, G, N, S]: what the index made of every complete block; of an index without summaries, the keys [R, G, N, D] themselves.
    candidates  [R or 1, T, N]: whether a query may choose a block: it is complete, wholly visible to the query, and a mask hides not all of it.
    open        [R or 1, T, 1]: whether a query sees a last block that is not complete for it. It is always shown, and counts among those that are kept.
    """

    compared: torch.Tensor
    candidates: torch.Tensor
    open: torch.Tensor


class Index(ABC):
    """How blocks of keys are told apart. A frozen dataclass in the file of its method.

    width   numbers that a summary has, in widths of a key; 0: there is none, the keys themselves are compared (blocks of one key).
    frame   "segment": queries and keys are compared at the positions of the segment; "raw": un-rotated.
    """

    width: ClassVar[int] = 0
    frame: ClassVar[Literal["segment", "raw"]] = "segment"

    def summarise(self, k: torch.Tensor) -> torch.Tensor:
        """k [R, G, N, block, D], the keys of complete blocks in the frame -> [R, G, N, width * D], in their dtype.

        Asked once for every block, when its last key has come. After a crop into a block it is asked again.
        """
        raise NotImplementedError(f"{type(self).__name__} has summaries of width {self.width} but no summarise()")

    @abstractmethod
    def choose(self, q: torch.Tensor, past: Past) -> torch.Tensor:
        """q [R, H, T, D] in the frame, times the factor of the segment -> [R, C, T, n] numbers of blocks in any order, -1 for none; C as the choice says, n at
        most `keep`."""


@dataclass(frozen=True)
class Choice:
    """At most `keep` blocks of `block` keys, one that is not complete among them, for each query and each ...

    heads   "head": query head, "group": group of heads that share keys and values, "layer".
    who     "every": every query chooses. "single": the only query of a forward does, those of longer forwards see all that is visible. "last": the last
            query of a forward does, the others see nothing of the segment.
    """

    index: Index
    keep: int
    block: int = 1
    heads: Literal["head", "group", "layer"] = "head"
    who: Literal["every", "single", "last"] = "every"

    def __post_init__(self) -> None:
        if self.keep < 1 or self.block < 1 or (self.block > 1 and not self.index.width):
            raise ValueError("a choice keeps at least one block of at least one key, and an index without summaries has blocks of one key")

    def of(self, start: int, stop: int) -> tuple[int, bool]:
        """Of a forward of the queries start .. stop -> (the first that takes part, whether they choose)."""
        if self.who == "last":
            return stop - 1, True
        return start, self.who == "every" or stop - start == 1

    def shown(self, keys: int) -> int:
        """How many of `keys` visible keys a query sees that chooses."""
        return keys if keys <= self.keep * self.block else (self.keep - 1) * self.block + (keys - 1) % self.block + 1

    def count(self, heads: int, groups: int) -> int:
        """How many choices a query makes in a layer."""
        return {"head": heads, "group": groups, "layer": 1}[self.heads]
