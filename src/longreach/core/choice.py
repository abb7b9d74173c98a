"""Choice: a segment that shows only some of its visible keys, which an index picks by their content, in blocks.

Knows tensors of queries and of what is kept of keys; not where they are kept, layers or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

Lookup = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Probes:
    """Keys of complete blocks [R, G, .., D], un-rotated, for an index that looks at some of them, one by one. They are counted from the segment's first key.

    open     (first [R or 1, S or 1, n], size, passing) -> what looks up keys [R, G, S, n] of the stretches first .. first + size, or of their own last stretch,
             as [R, G, S, n, D]. `passing`: all keys are gone through, so that none is worth to be kept at hand.
    turned   x [.., n, D] un-rotated at positions [n].
    at_once  so many keys of a row can be looked at together.
    """

    open: Callable[[torch.Tensor, int, bool], Lookup]
    turned: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    at_once: int


@dataclass(frozen=True, eq=False)
class Past:
    """What R rows with T queries each choose from. A block is `block` visible keys; `N` of them are complete for some query.

    Of queries that choose together, the first says what is complete: T is the number of such groups then, and all have as many queries.

    compared    [R, G, N, S]: what the index made of every complete block; of an index without any, the keys [R, G, N, D] themselves; empty where it probes.
    candidates  [R or 1, T, N]: whether a query may choose a block: it is complete, wholly visible to the query, and a mask hides not all of it.
    open        [R or 1, T, 1]: whether a query sees a last block that is not complete for it. It is always shown, and counts among those that are kept.
    probes      what looks up keys, for an index that probes.
    """

    compared: torch.Tensor
    candidates: torch.Tensor
    open: torch.Tensor
    probes: Probes | None = None

    @property
    def complete(self) -> torch.Tensor:
        """[R or 1, T] how many blocks there are before the end of the last one that may be chosen."""
        blocks = self.candidates.shape[2]
        return (self.candidates * torch.arange(1, blocks + 1, device=self.candidates.device)).amax(-1)


class Index(ABC):
    """How blocks of keys are told apart. A frozen dataclass in the file of its method.

    width   numbers that a summary has, in widths of a key; 0: there is none, the keys themselves are compared (blocks of one key).
    each    "group": there is one for every group of heads that share keys; "head": one for every query head.
    frame   "segment": queries and keys are compared at the positions of the segment; "raw": un-rotated. "block": so are the queries who choose, and what is
            summarised of a block is at positions that begin with 0 there.
    needs   what `summarise` gets beside the keys: "q", the queries of the block's own tokens, and "v", the values.
    mass    not 0: and "mass", what the queries that are less than so many tokens ahead have paid to every key.
    probes  it has no summaries and looks up keys one by one, un-rotated, in `stages`.
    first   so many first keys of the segment are among what it chooses, whatever the query.
    """

    each: ClassVar[Literal["group", "head"]] = "group"
    frame: ClassVar[Literal["segment", "raw", "block"]] = "segment"
    needs: ClassVar[tuple[Literal["q", "v"], ...]] = ()
    probes: ClassVar[bool] = False

    @property
    def width(self) -> int:
        return 0

    @property
    def mass(self) -> int:
        return 0

    @property
    def first(self) -> int:
        return 0

    def summarise(self, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """k [R, G, N, block, D], the keys of complete blocks in the frame -> [R, G, N, S], in their dtype, S being `numbers` widths of a key.

        By name come what it `needs`, q [R, H, N, block, D], un-rotated or of the block, with the `scale` of the layer's logits, and v [R, G, N, block, E];
        and mass [R, H, N, block] fp32, the sum of the final probabilities. A query from which a mask hides keys pays nothing.

        Asked once for every block, when its last key has come, or the last query that pays to it. After a crop behind that it is asked again.
        """
        raise NotImplementedError(f"{type(self).__name__} has summaries of width {self.width} but no summarise()")

    @abstractmethod
    def choose(self, q: torch.Tensor, past: Past) -> torch.Tensor:
        """q [R, H, T, D] in the frame, times the factor of the segment -> [R, C, T, n] numbers of blocks in any order, -1 for none; C as the choice says, n at
        most `keep`. Queries that choose together come all of them, one group after the other, and each group gets one answer: [R, C, groups, n]."""

    def stage(self, number: int, q: torch.Tensor, before: torch.Tensor | None, past: Past) -> torch.Tensor:
        """One of the stages of a choice, by queries as `choose` gets them: what it leaves of what the one `before` has left; the last one, what is chosen."""
        raise NotImplementedError(f"{type(self).__name__} chooses in one stage")

    def compared(self, blocks: int, queries: int) -> tuple[int, ...]:
        """What so many queries who choose together among so many complete blocks are compared with, in every stage, in widths of a key; for a cost model."""
        return (blocks * max(1, self.width),)

    def opened(self, blocks: int) -> tuple[tuple[int, int], ...]:
        """Of every stage behind the first, among so many complete blocks: (stretches of keys that it looks into, keys of each), at most; for a cost model."""
        return ()

    def require_widths(self, key: int, value: int) -> None:  # noqa: B027
        """Raises ValueError where keys and values of these widths cannot be summarised."""

    def numbers(self, group: int) -> int:
        """Of a summary beside each other for `group` query heads that share keys, in widths of a key."""
        return self.width * (group if self.each == "head" else 1)


@dataclass(frozen=True)
class OfQueries:
    """The form of what is kept of the queries of some last tokens, for summaries that are still to be made.

    q    as they came, un-rotated.
    lse  the log-sum-exp of all that each has seen, [.., 1] fp32.
    """

    what: Literal["q", "lse"]


@dataclass(frozen=True)
class Choice:
    """At most `keep` blocks of `block` keys, one that is not complete among them, for each query and each ...

    heads    "head": query head, "group": group of heads that share keys and values, "layer".
    who      "every": every query chooses. "single": the only query of a forward does, those of longer forwards see all that is visible. "last": the last
             query of a forward does, the others see nothing of the segment.
    queries  so many choose together: those of a forward whose index is in one block [n queries, (n + 1) queries) and who see any key. What was complete for
             the first of them is chosen from; all that has come since is shown, as far as each query sees it.
    lag      a block is complete for a query once so many keys are visible behind it. The latest `lag` keys are always shown.
    refresh  of an index that probes: the only query of a forward, with index i, takes what stage s answered to the query floor(i / refresh[s]) refresh[s], of
             what was complete for that of the first stage; all that has come since is shown. Each is a multiple of the next.
    """

    index: Index
    keep: int
    block: int = 1
    heads: Literal["head", "group", "layer"] = "head"
    who: Literal["every", "single", "last"] = "every"
    queries: int = 1
    lag: int = 0
    refresh: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.keep < 1 or self.block < 1 or (self.block > 1 and not self.index.width and not self.index.probes):
            raise ValueError("a choice keeps at least one block of at least one key, and an index without summaries has blocks of one key")
        if self.queries < 1 or self.lag < 0 or (self.queries > 1 and self.who != "every"):
            raise ValueError("at least one query makes a choice, and where several do together every query takes part: leave out who, or queries")
        if bool(self.refresh) != self.index.probes or any(a < 1 or b < 1 or a % b for a, b in zip(self.refresh, (*self.refresh[1:], 1))):
            raise ValueError("an index that probes says for every stage how often it is refreshed, each a multiple of the next; others do not")

    def asked(self, i: int) -> tuple[int, ...]:
        """The queries whose answers, of all stages, the only query of a forward takes."""
        return tuple(i // every * every for every in self.refresh)

    def of(self, start: int, stop: int) -> tuple[int, bool]:
        """Of a forward of the queries start .. stop -> (the first that takes part, whether they choose)."""
        if self.who == "last":
            return stop - 1, True
        return start, self.who == "every" or stop - start == 1

    def together(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The queries first .. last of a forward, in stretches that choose together."""
        return stretches(first, last, self.queries)

    def complete(self, keys: int) -> int:
        """Blocks that are complete for a query that sees so many keys."""
        return max(0, keys - self.lag) // self.block

    def shown(self, keys: int, first: int | None = None) -> int:
        """How many of `keys` visible keys a query sees that chooses, `first` being visible to the first of those that choose together."""
        hidden = ((keys if first is None else first) - max(1, self.lag)) // self.block - self.keep + 1  # where a block is open it counts, else all are complete
        return keys - max(0, hidden) * self.block

    def count(self, heads: int, groups: int) -> int:
        """How many choices a query makes in a layer."""
        return {"head": heads, "group": groups, "layer": 1}[self.heads]


def stretches(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """first .. last, divided at the multiples of `size`."""
    while first < last:
        stop = min(last, first - first % size + size)
        yield first, stop
        first = stop
