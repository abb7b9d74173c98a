"""Pages: the memory of one layer whose keys and values lie in the blocks of an engine's paged cache, as one more implementation of `memory.layer`.

A page keeps each key once, in the form that decoding reads most; of the others a method sees few keys, and they are turned when they are read. These are
gathered from their pages; so are all for a kernel that does not read pages. Knows pages, forms and rotations; no method, and nothing of vLLM.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.core.encodings import Rotary
from longreach.core.segments import Identity, PositionMap, Retention, forms
from longreach.engine import executor
from longreach.engine.layer import RAW, Inputs, Layer
from longreach.kernels.paged import OnPages, PagedKernel
from longreach.kernels.protocol import KV, Kernel
from longreach.memory.bases import BaseShelf
from longreach.memory.recalled import Recalled
from longreach.memory.steps import Shelf, Step
from longreach.vllm.requests import Requests, Stretch

SLACK = 4  # requests are gathered together while the longest has at most a quarter more than the shortest


def stored_form(kept: Mapping[PositionMap, Retention]) -> PositionMap:
    """The form in which pages keep keys: the one that most keys are read in, the true positions where several are alike."""
    longest = max(kept.values(), key=lambda each: (each.tail is None, each.tail or 0))
    found = [positions for positions, each in kept.items() if (each.tail is None, each.tail) == (longest.tail is None, longest.tail)]
    return Identity() if Identity() in found else found[0]


@dataclass(frozen=True)
class Bound:
    """Which tokens a query sees at most: the last `near` ones, itself included, and the first `sinks` ones."""

    near: int
    sinks: int

    def gap(self, read: int, size: int) -> tuple[int, int]:
        """Where `read` tokens were read: the first page, and the one behind the last, that no later query reads. Empty where the second is not larger."""
        return -(-self.sinks // size), max(0, read + 1 - self.near) // size


@dataclass(frozen=True, eq=False)
class Paged:
    """What is fixed about one attention layer. `stored`: the positions that its pages keep keys at. `bound`: None where a query may see every key."""

    layer: Layer
    inputs: Inputs
    kernel: Kernel
    kept: dict[PositionMap, Retention] = field(init=False)
    stored: PositionMap = field(init=False)
    bound: Bound | None = field(init=False)

    def __post_init__(self) -> None:
        kept = forms(self.layer.layout)
        every = functools.reduce(operator.or_, kept.values())
        if self.layer.rotary is None:  # all forms are the keys as they are
            kept = {RAW: every}
        object.__setattr__(self, "bound", None if every.tail is None else Bound(every.tail, every.head))
        object.__setattr__(self, "kept", kept)
        object.__setattr__(self, "stored", stored_form(kept))

    def attend(self, requests: Requests, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        """q [T, H, D], k and v [T, G, D] of the new tokens, un-rotated; pool [N, G, 2, size, D] of all pages, keys before values, which is written to.
        -> [T, H, D]."""
        self.write(requests, k, v, pool)
        memory = Pages(requests, pool, self.stored, self.kept, self.layer.rest, isinstance(self.kernel, PagedKernel))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return executor.execute(self.layer, requests.batch, memory, self.kernel, q, k, v, self.inputs)[0]  # type: ignore[arg-type]  # see Pages

    def write(self, requests: Requests, k: torch.Tensor, v: torch.Tensor, pool: torch.Tensor) -> None:
        """k and v [T, G, D] of the new tokens to their pages."""
        rotary = self.layer.rotary
        if rotary is not None and (self.stored != RAW or rotary.scaling != 1.0):
            k = requests.table_of_new(rotary, self.stored, k.device).rotate(k.transpose(0, 1)).transpose(0, 1)
        rows, width = pool.view(-1, pool.shape[4]), pool.shape[4]
        for to, new in zip(requests.places(k.shape[1]), (k, v)):
            rows.index_copy_(0, to, new.reshape(-1, width))


@dataclass(frozen=True, eq=False)
class Pages:
    """Implements what layouts without a choice ask of `memory.layer.LayerMemory`: pages were written before, and belong to the engine, which frees, shares and
    moves them as it likes."""

    requests: Requests
    pool: torch.Tensor  # [N, G, 2, size, D], contiguous
    stored: PositionMap
    kept: Mapping[PositionMap, Retention]
    rest: Rotary | None  # what turns keys that have the factor of the rotary already
    stay: bool = False  # whether the kernel reads pages
    recalled: Recalled = field(default_factory=Recalled)

    at_hand: ClassVar[bool] = True
    weigh: ClassVar[None] = None

    def append(self, rows: slice, start: int, keys: Mapping[PositionMap, torch.Tensor], values: torch.Tensor) -> None:
        """New tokens are on their pages."""

    def append_step(self, step: Step, keys: Mapping[PositionMap, torch.Tensor], values: torch.Tensor | None) -> None:
        """New tokens are on their pages."""

    def release(self) -> None:
        """Nothing is held."""

    def view(self, positions: PositionMap, rows: slice, start: int, stop: int, pinned: bool) -> Sequence[KV]:
        first = start // self.requests.size
        count = -(-stop // self.requests.size) - first
        return (self.found(positions, ((rows.start, first),), count, start - first * self.requests.size, stop - start, start),)

    def found(self, positions: PositionMap, stretches: tuple[Stretch, ...], count: int, skip: int, columns: int, index: int = 0) -> KV:
        """So many columns of `count` pages of each of some requests, from its first one on, after `skip`."""

        def gather() -> tuple[torch.Tensor, torch.Tensor]:
            k, v = self.read(positions, stretches, count)
            return k.narrow(2, skip, columns), v.narrow(2, skip, columns)

        if not self.stays(positions):
            return KV(*gather(), index)
        return OnPages(self.pool, self.requests.pages(stretches, count).view(len(stretches), -1), skip, columns, index, gather)

    def stays(self, positions: PositionMap) -> bool:
        """Whether the kernel reads keys at these positions on their pages."""
        return self.stay and (positions == self.stored or self.rest is None)

    def read(self, positions: PositionMap, stretches: tuple[Stretch, ...], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys at some positions and values [m, G, C, D] of `count` pages of each of some requests, from its first one on. Columns behind the last token of a
        request are finite."""
        heads, width = self.pool.shape[1], self.pool.shape[4]
        pages = self.pool.view(-1, self.pool.shape[3] * width)  # one row for the keys of a head, and one for the values; whole rows are copied fast
        k, v = (pages.index_select(0, rows).view(heads, -1, width) for rows in self.requests.rows(stretches, count, heads))  # [G, m C, D]
        if positions != self.stored and self.rest is not None:
            k = self.requests.turn(self.rest, self.stored, positions, stretches, count, k.device).rotate(k)
        if len(behind := self.requests.behind(stretches, count)):
            k.index_fill_(1, behind, 0)  # whatever lies there, a mask does not make of NaN a zero
            v.index_fill_(1, behind, 0)
        k, v = (x.unflatten(1, (len(stretches), -1)).transpose(0, 1) for x in (k, v))
        return k, v

    def shelves(self, positions: PositionMap, step: Step) -> Iterator[tuple[Shelf, KV]]:
        """Requests of about the same length are gathered together; on their pages all are read together."""
        size, tail = self.requests.size, self.kept[positions].tail
        first = [0 if tail is None else max(0, start + 1 - tail) // size for start in step.starts]
        pages = [start // size + 1 - a for start, a in zip(step.starts, first)]
        order = sorted(range(len(pages)), key=lambda n: pages[n])
        while order:
            most = pages[order[-1]] if self.stays(positions) else pages[order[0]] + max(1, pages[order[0]] // SLACK)
            together = [n for n in order if pages[n] <= most]
            order = order[len(together) :]
            members = tuple(sorted(together))
            count = max(pages[n] for n in members)
            kv = self.found(positions, tuple((step.rows[n], first[n]) for n in members), count, 0, count * size)
            yield Shelf(0, slice(0, 0), members, (), tuple(first[n] * size for n in members)), kv

    def bases(self, positions: PositionMap, step: Step) -> Iterator[tuple[BaseShelf, KV]]:
        """Requests that share pages read them each by itself."""
        return iter(())

    def first_tokens(self, positions: PositionMap, step: Step) -> KV:
        head = self.kept[positions].head
        return self.found(positions, tuple((row, 0) for row in step.rows), -(-head // self.requests.size), 0, head)
