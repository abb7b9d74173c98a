"""What one layer keeps of the rows of a forward, and hands to kernels. Knows no positions beyond the names of key forms, no layers and no models."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import ClassVar, Protocol

import torch

from longreach.core.choice import Lookup, OfQueries
from longreach.core.segments import Form, Place, PositionMap, Retention, Summary
from longreach.kernels.protocol import KV
from longreach.memory.bases import Base, BaseShelf
from longreach.memory.placement import Placement
from longreach.memory.recalled import Recalled
from longreach.memory.steps import Shelf, Step

Weigh = Callable[[PositionMap, slice, int, torch.Tensor, torch.Tensor], None]  # (positions, rows, start, columns, paid), as `gather` has them; paid is fp32


class Shown(Protocol):
    """Writing is not reading: `append` returns nothing, and `view` shows what was appended in the forward under way too.

    Rows are consecutive ones that lie alike (`Store.reserve` says which), indices are true indices of their tokens.
    """

    recalled: Recalled

    @property
    def weigh(self) -> Weigh | None:
        """Who wants to know what was paid to the tokens that were gathered; None: nobody."""
        ...

    def append(self, rows: slice, start: int, keys: Mapping[PositionMap, torch.Tensor], values: torch.Tensor) -> None:
        """New tokens from index `start` on: keys [n, G, T, D] in every form, values [n, G, T, E]. Of a form that keeps first tokens only, fewer may come."""
        ...

    def view(self, positions: PositionMap, rows: slice, start: int, stop: int, pinned: bool) -> Iterable[KV]:
        """Tokens start .. stop in a form, in the parts in which they lie, one after the other: one but for forks, and some at a time where not all are at hand.
        `pinned`: they are among the first tokens that the form keeps. A part that all rows share has one row."""
        ...

    def gather(self, positions: PositionMap, rows: slice, start: int, stop: int, columns: torch.Tensor) -> KV:
        """Of the tokens start .. stop in a form, those at `columns` [R, C, T, n], counted from `start`; shapes as `kernels.protocol.gather` has them. Nothing
        else has to be at hand."""
        ...

    def keys_of(self, positions: PositionMap, rows: slice, start: int, stop: int) -> torch.Tensor:
        """The keys of tokens start .. stop in a form, without their values: [R, G, stop - start, D]."""
        ...

    def lookup(self, positions: PositionMap, rows: slice, start: int, stop: int, first: torch.Tensor, size: int, passing: bool) -> Lookup:
        """Of the keys of tokens start .. stop in a form, counted from `start`, those of the stretches first .. first + size, `first` [R or 1, S or 1, n]: what
        looks up any of them. `passing`: all keys are gone through, and none should make room for them."""
        ...

    def at_once(self, positions: PositionMap, rows: slice) -> int:
        """Keys of each row that can be looked up together at little cost."""
        ...

    def append_summaries(self, rows: slice, start: int, new: Mapping[Summary | OfQueries, torch.Tensor]) -> None:
        """What is kept of the blocks [n, G, blocks, S] that tokens have completed, those from token `start` on, or of their queries [n, H, T, D or 1]. It may
        come in parts, one after the other, in one forward."""
        ...

    def summaries(self, form: Summary | OfQueries, rows: slice, stop: int, start: int = 0) -> torch.Tensor:
        """Of the blocks start .. stop, more than none, or the queries of these tokens: [n, G or H, stop - start, S]."""
        ...

    def release(self) -> None:
        """The layer has been computed: nothing will be viewed until more is appended."""
        ...


class LayerMemory(Shown, Protocol):
    """One that stores, so that rows go on from what they have read.

    What a forward has appended counts once the placements have committed: `settle`. A forward that failed leaves the memory as it was: `discard`.

    at_hand  what rows share can be read where it lies; else whoever has chosen asks for that alone.
    """

    at_hand: ClassVar[bool]

    @property
    def held(self) -> Mapping[int, int]:
        """The bytes of all that is held, by id: what forks share is the same."""
        ...

    @property
    def frozen(self) -> Mapping[int, int]:
        """Of these, what nobody writes to any more and forks read."""
        ...

    @property
    def shared(self) -> Collection[Place]:
        """Which forms, by their places, somebody else reads too who does not know that they may be frozen."""
        ...

    def settle(self) -> None:
        """The placements have committed. May be called again where it was interrupted."""
        ...

    def discard(self) -> None:
        """The forward failed."""
        ...

    def join(self) -> None:
        """One more row, which is empty, after the placements have it."""
        ...

    def select(self, index: torch.Tensor) -> None:
        """Rows become the rows `index` of before, after the placements' have."""
        ...

    def freeze(self, place: Place, bases: Collection[Base]) -> None:
        """What lies in new bases of the forms of one place is not written to any more. The placement adopts them next."""
        ...

    def adopt(self, row: int, other: LayerMemory, its: int) -> None:
        """An empty row gets what row `its` of another memory of the same kind holds, after the placements have made room for it."""
        ...

    def fork(self, placements: Mapping[Place, Placement]) -> LayerMemory:
        """The same for another store to go on from."""
        ...

    def append_step(self, step: Step, keys: Mapping[PositionMap | OfQueries, torch.Tensor], values: torch.Tensor | None) -> None:
        """One new token for each of some rows, which may be of any lengths: keys [n, G, D] in every form, values [n, G, E], and of queries [n, H, D or 1],
        which may come later by themselves."""
        ...

    def shelves(self, positions: PositionMap, step: Step) -> Iterator[tuple[Shelf, KV]]:
        """What is kept of the rows of a step in a form, those of about the same length together; columns count from the first entry of each row."""
        ...

    def shelf_of_summaries(self, form: Summary, step: Step, shelf: Shelf, stop: int) -> torch.Tensor:
        """Of the first `stop` blocks of the rows of a shelf, whether they have so many or not: [n, G, stop, S], finite."""
        ...

    def bases(self, positions: PositionMap, step: Step) -> Iterator[tuple[BaseShelf, KV]]:
        """What rows of a step share with others in a form, which comes before what is on their shelves."""
        ...

    def first_tokens(self, positions: PositionMap, step: Step) -> KV:
        """The first tokens that a form keeps of every row of a step, columns from index 0 on."""
        ...


Memory = Callable[[Mapping[Place, Placement], Mapping[Form, Retention]], LayerMemory]  # makes that of a layer, which keeps forms of keys and the values


def joined(parts: Iterable[KV], rows: int) -> KV:
    """One KV of what is viewed in parts: a copy where there are several."""
    parts = tuple(parts)
    if len(parts) == 1 and parts[0].k.shape[0] == rows:
        return parts[0]
    k, v = (torch.cat([x.expand(rows, -1, -1, -1) for x in each], dim=2) for each in zip(*((kv.k, kv.v) for kv in parts)))
    return KV(k, v, parts[0].index)
