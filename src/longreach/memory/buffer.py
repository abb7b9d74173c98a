"""Buffers: one form of keys, or the values, of all rows of one layer, kept only as long as a later query can need them.

Knows tensors and where they lie, which a placement says; not positions, layers or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakSet

import torch

from longreach.kernels.tiles import between
from longreach.memory.bases import Base, BaseShelf
from longreach.memory.bodies import Bodies
from longreach.memory.held import Frozen, Reader, Waiting, part, require_dtype
from longreach.memory.placement import Placement
from longreach.memory.steps import Shelf, Step


class Buffer(Bodies):
    """The entries of one form, or values, of all rows: [slots, H, room, D] for every bucket, and the first `first` tokens [rows, H, first, D].

    Of rows that share bases with others, the bodies hold the tails only.

    A forward writes only where nothing is stored, or keeps what it writes in a copy that waits. What was written counts when the placement says so: `settle`.
    A forward that fails in any layer therefore leaves every buffer as it was: `discard`.
    """

    def __init__(self, placement: Placement, first: int = 0) -> None:
        super().__init__(placement)
        self.first = first
        self.head: torch.Tensor | None = None
        self.reader = Reader()  # of head and bodies
        self.sharers: WeakSet[Reader] = WeakSet()  # who reads the same memory, this one among them; empty: nobody else
        self._waiting: list[Waiting] = []
        self._head_before: torch.Tensor | None = None  # of a forward that writes over first tokens

    @property
    def held(self) -> dict[int, int]:
        """The bytes of all that is held, by id."""
        found = (self.head, *self.bodies.values(), *(frozen.entries for frozen in self.bases.values()))
        return {id(t): t.numel() * t.element_size() for t in found if t is not None}

    @property
    def shared(self) -> bool:
        """Whether somebody else reads what is not frozen."""
        return len(self.sharers) > 1

    @property
    def nbytes(self) -> int:
        return sum(self.held.values())

    # -- a forward ------------------------------------------------------------------------------------------------------------

    def write(self, rows: slice, start: int, new: torch.Tensor, shown: bool = True) -> None:
        """`new` [n, H, T, D] goes to indices start .. start + T of consecutive rows that lie alike. The placement has made room for them. It may come in parts,
        one after the other. `shown`: whether it will be viewed in the forward under way."""
        self._own()
        if self.first > start:
            self._pin(rows, start, new)
        if self.placement.tail == 0:
            return
        self._arrange(new)
        write, first, stop = self.placement.writes[rows.start], self.places.firsts[rows.start], start + new.shape[2]
        slots, body = self.places.side_by_side(rows), self.bodies.get(self.places.buckets[rows.start])
        if write.at_once:
            assert body is not None
            part(body, slots, start - first, stop - first).copy_(new)
            return
        kept = new[:, :, max(0, write.first - start) :]
        if (before := next((each for each in self._waiting if each.rows == rows), None)) is not None:
            return before.add(new, kept)
        seen = min(first, start) if (tail := self.placement.tail) is None else max(first, start - tail)
        run = new[:, :, :0] if not shown else new if seen == start or body is None else torch.cat([part(body, slots, seen - first, start - first), new], dim=2)
        self._waiting.append(Waiting(rows, seen, run, kept.clone()))

    def write_step(self, step: Step, new: torch.Tensor) -> None:
        """`new` [n, H, D]: the token of each row of a step. The placement has made room for them."""
        self._own()
        for number, (row, start) in enumerate(zip(step.rows, step.starts)):
            if start < self.first:
                self._pin(slice(row, row + 1), start, new[number : number + 1, :, None])
        if self.placement.tail == 0:
            return
        self._arrange(new[:, :, None])
        for shelf in step.shelves(self.placement):
            members, slots, columns = shelf.index(new.device)
            self.bodies[shelf.bucket][shelf.slots][slots, :, columns] = new if shelf.members == step.all else new[members]

    def shelf(self, shelf: Shelf) -> torch.Tensor:
        """What is kept of the rows of a shelf, from the first entry of each on: [n, H, room, D]. Columns that hold nothing yet are finite."""
        return self.bodies[shelf.bucket][shelf.slots]

    def base(self, shelf: BaseShelf) -> torch.Tensor:
        """What the rows of a shelf share with others: [slots, H, C, D]."""
        return part(self.bases[shelf.base].entries, shelf.slots, 0, max(b - a for a, b in zip(shelf.firsts, shelf.stops)))

    def parts(self, rows: slice, start: int, stop: int) -> Sequence[tuple[int, torch.Tensor]]:
        """Entries start .. stop of consecutive rows that lie alike, those of the forward under way too, in as few parts as they lie in: the index of the
        first entry of each, and [n, H, C, D], or [1, H, C, D] where all rows share it."""
        own = self.places.firsts[rows.start]
        if own <= start and not self._waiting:
            return ((start, part(self.bodies[self.places.buckets[rows.start]], self.places.side_by_side(rows), start - own, stop - own)),)
        waiting = self._waiting_of(rows)
        own = own if waiting is None else waiting.first
        found = []
        if start < own:
            shares = self.placement.shares
            for share, last in zip(shares[rows.start], shares[rows.stop - 1], strict=True):
                a, b = max(start, share.start), min(stop, share.stop, own)
                if a < b:
                    found.append((a, part(self.bases[share.base].entries, slice(share.slot, last.slot + 1), a - share.start, b - share.start)))
        first = max(start, own)
        if first >= stop:
            return found
        assert first == start or found, f"indices {start}..{stop} are not kept from {own} on"
        if waiting is not None:
            run = waiting.run if waiting.rows == rows else waiting.run[rows.start - waiting.rows.start : rows.stop - waiting.rows.start]
            return [*found, (first, between(run, first - own, stop - own))]
        return [*found, (first, part(self.bodies[self.places.buckets[rows.start]], self.places.side_by_side(rows), first - own, stop - own))]

    def _waiting_of(self, rows: slice) -> Waiting | None:
        return next((each for each in self._waiting if each.rows.start <= rows.start and rows.stop <= each.rows.stop), None)

    def begins(self, rows: slice) -> int:
        """The first entry that consecutive rows that lie alike do not share, the forward under way included."""
        waiting = self._waiting_of(rows)
        return self.places.firsts[rows.start] if waiting is None else waiting.first

    def view(self, rows: slice, start: int, stop: int) -> torch.Tensor:
        """The same [n, H, stop - start, D] as one tensor: copied where it lies in several parts."""
        found = [tensor.expand(rows.stop - rows.start, -1, -1, -1) for _, tensor in self.parts(rows, start, stop)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def arrange(self) -> None:
        """Lie as the placement says, also where nothing was written since that changed."""
        if self.bodies:
            self._arrange(next(iter(self.bodies.values())))

    def pinned(self, rows: slice, start: int, stop: int) -> torch.Tensor:
        """First tokens start .. stop."""
        assert self.head is not None
        return part(self.head, rows, start, stop)

    def release(self) -> None:
        """The layer has been computed: what only its own queries read goes."""
        self._waiting = [Waiting(w.rows, w.first, w.new[:, :, :0], w.new) for w in self._waiting]

    def settle(self) -> None:
        """The placement has committed: what waits gets its place. May be called again where it was interrupted."""
        for waiting in self._waiting:
            self._own()
            self._arrange(waiting.new)
            row = waiting.rows.start
            stop = self.placement.ends[row] - self.places.firsts[row]
            body = self.bodies[self.places.buckets[row]]
            part(body, self.places.side_by_side(waiting.rows), stop - waiting.new.shape[2], stop).copy_(waiting.new)
        self.arrange()
        self._waiting, self._head_before = [], None
        if len(self.bases) > len(self.placement.bases):
            self._drop()

    def discard(self) -> None:
        """The forward failed: as if it had never begun."""
        self._waiting = []
        if self._head_before is not None:
            self.head, self._head_before = self._head_before, None

    # -- between forwards -----------------------------------------------------------------------------------------------------

    def join(self) -> None:
        """One more row, which is empty: that of the placement."""
        if self.head is not None:
            with torch.inference_mode(False):
                self.head = torch.cat([self.head, self.head.new_zeros((1, *self.head.shape[1:]))])

    def select(self, index: torch.Tensor) -> None:
        """Rows become the rows `index` of before, after the placement's have."""
        rows = index.tolist()
        with torch.inference_mode(False):
            head = None if self.head is None else self.head.index_select(0, index.to(self.head.device))
        like = next(iter(self.bodies.values()), None)
        bodies = {} if like is None else self._copied(like, self.placement.places, rows)
        self._leave()
        self.head, self.bodies, self.places = head, bodies, self.placement.places
        self._drop()

    def freeze(self, bases: Iterable[Base]) -> None:
        """Before the placement adopts them: the entries of new bases, where they lay or copied. Then bodies of tails take the place of those that were."""
        if not self.bodies:
            return
        self.arrange()
        for base in bases:
            body = self.bodies[base.bucket]
            with torch.inference_mode(False):
                copied = None if base.slot is None else body[base.slot : base.slot + 1, :, : base.columns].clone()
            self.bases[base] = Frozen(body, self.reader) if copied is None else Frozen(copied, None)

    def fork(self, placement: Placement) -> Buffer:
        """The same entries for another to go on from, without those of a forward under way. Whoever writes takes a copy of what is not frozen."""
        self._undo()
        other = self._another(placement)
        other.head = self.head if self._head_before is None else self._head_before
        other.bodies, other.bases, other.places = dict(self.bodies), dict(self.bases), self.places
        self.sharers.update((self.reader, other.reader))
        other.sharers = self.sharers
        return other

    def _another(self, placement: Placement) -> Buffer:
        return Buffer(placement, self.first)

    def entries(self, sealed: Sequence[int]) -> dict[str, torch.Tensor]:
        """What is kept, on the CPU and without room to grow: "head", and "body" [rows, H, longest, D]; zeros where a row keeps nothing, whatever lay there.

        sealed  entries of each row that are left out: somebody has them already, or reads them by `view`.
        """
        self.arrange()
        found: dict[str, torch.Tensor] = {}
        ends = self.placement.ends
        firsts = [max(a, b) for a, b in zip(self.placement.firsts, sealed, strict=True)]
        if self.head is not None:
            found["head"] = self.head.detach().to("cpu", copy=True).contiguous()
            for row, end in enumerate(ends):
                found["head"][row, :, end:] = 0
        if self.bodies and (length := max(b - a for a, b in zip(firsts, ends, strict=True))):
            like = next(iter(self.bodies.values()))
            body = torch.zeros((len(ends), like.shape[1], length, like.shape[3]), dtype=like.dtype)
            for row, (first, end) in enumerate(zip(firsts, ends, strict=True)):
                if first < end:
                    body[row, :, : end - first] = self.view(slice(row, row + 1), first, end)[0]
            found["body"] = body
        return found

    def restore(self, head: torch.Tensor | None, body: torch.Tensor | None, sealed: Sequence[int]) -> None:
        """The inverse of `entries`, once the placement is restored. What was left out comes to `receive`."""
        self._leave()
        self.head, self.bodies, self.bases, self.places = head, {}, {}, self.placement.places
        if body is not None:
            for bucket, rows in self.places.members.items():
                self.bodies[bucket] = made = self._made(body, len(rows), self.places.rooms[bucket])
                for slot, row in enumerate(rows):
                    start, stop = (max(sealed[row], first := self.places.firsts[row]) - first, self.placement.ends[row] - first)
                    made[slot, :, start:stop] = body[row, :, : stop - start]

    def receive(self, row: int, start: int, entries: torch.Tensor) -> None:
        """What was left out of `restore`: entries [H, C, D] of a row from `start` on, in their order."""
        self.view(slice(row, row + 1), start, start + entries.shape[1])[0].copy_(entries)

    def adopt(self, row: int, other: Buffer, its: int) -> None:
        """What row `its` of another buffer holds, as the placement says that this row has it: frozen entries become common to both, others are copied."""
        self._own()
        other.arrange()
        if self.first and other.head is not None:  # values of a shorter tail come from those that have a head
            with torch.inference_mode(False):
                if self.head is None:
                    self.head = other.head.new_zeros((len(self.placement.ends), *other.head.shape[1:]))
            self.head[row] = other.head[its]
        self._adopt_bases(row, other)
        first, end = self.placement.places.firsts[row], self.placement.ends[row]
        if other.bodies:
            self._arrange(next(iter(other.bodies.values())))
        if self.placement.tail != 0 and first < end:
            kept = other.view(slice(its, its + 1), first, end)[0]
            self.bodies[self.places.buckets[row]][self.places.slots[row], :, : end - first] = kept

    def _adopt_bases(self, row: int, other: Buffer) -> None:
        for share in self.placement.shares[row]:
            self.bases[share.base] = other.bases[share.base]

    def take_over(self, longer: Buffer) -> None:
        """Copy what is to be kept from a buffer that keeps more of the same tokens."""
        if not longer.bodies:
            return
        like = next(iter(longer.bodies.values()))
        self.places = self.placement.places
        for bucket, rows in self.places.members.items():
            self.bodies[bucket] = body = self._made(like, len(rows), self.places.rooms[bucket])
            for slot, row in enumerate(rows):
                first, end = self.places.firsts[row], self.placement.ends[row]
                if first < end:
                    body[slot, :, : end - first] = longer.view(slice(row, row + 1), first, end)[0]

    # -- memory -------------------------------------------------------------------------------------------------------------------

    def _own(self) -> None:
        """Before a write: memory that nobody else reads."""
        if len(self.sharers) > 1:
            self._undo()
            with torch.inference_mode(False):
                head = None if self.head is None else self.head.clone()
            like, places = next(iter(self.bodies.values()), None), self.placement.places
            bodies = {} if like is None else self._copied(like, places, fresh=True)
            self.head, self.bodies, self.places = head, bodies, places
            self._leave()

    def _leave(self) -> None:
        self.reader, self.sharers = Reader(), WeakSet()

    def _drop(self) -> None:
        """Bases that no row has a share of any more."""
        self.bases = {base: frozen for base, frozen in self.bases.items() if base in self.placement.bases}

    def _pin(self, rows: slice, start: int, new: torch.Tensor) -> None:
        require_dtype(self.head, new)
        with torch.inference_mode(False):
            if self.head is None:
                self.head = new.new_zeros((len(self.placement.ends), new.shape[1], self.first, new.shape[3]))
            elif self._head_before is None and start < max(self.placement.ends[rows]):
                self.head, self._head_before = self.head.clone(), self.head
        stop = min(self.first, start + new.shape[2])
        self.head[rows, :, start:stop] = new[:, :, : stop - start]
