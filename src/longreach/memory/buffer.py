"""Buffers: one form of keys, or the values, of all rows of one layer, kept only as long as a later query can need them.

Knows tensors and where they lie, which a placement says; not positions, layers or models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakSet

import torch

from longreach.kernels.tiles import between
from longreach.memory.placement import Placement, Places, Shelf, Step


def part(x: torch.Tensor, rows: slice, start: int, stop: int) -> torch.Tensor:
    """x[rows, :, start:stop], in as few operations as it takes: a decoding step asks for it in every layer."""
    return between(x if rows == slice(0, x.shape[0]) else x[rows], start, stop)


@dataclass(frozen=True, eq=False)
class _Waiting:
    """New entries of some rows that have no place yet. `run` is what their own queries read, from index `first` on; `new` are the last of them."""

    rows: slice
    first: int
    run: torch.Tensor
    new: torch.Tensor


class Buffer:
    """The entries of one form, or values, of all rows: [slots, H, room, D] for every bucket, and the first `first` tokens [rows, H, first, D].

    A forward writes only where nothing is stored, or keeps what it writes in a copy that waits. What was written counts when the placement says so: `settle`.
    A forward that fails in any layer therefore leaves every buffer as it was: `discard`.
    """

    def __init__(self, placement: Placement, first: int = 0) -> None:
        self.placement = placement
        self.first = first
        self.places: Places = placement.places  # as the bodies lie; the placement may be ahead
        self.head: torch.Tensor | None = None
        self.bodies: dict[int, torch.Tensor] = {}
        self.sharers: WeakSet[Buffer] = WeakSet()  # the forks that read the same memory, this one among them; empty: nobody else
        self._waiting: list[_Waiting] = []
        self._moving: list[tuple[torch.Tensor, torch.Tensor]] = []  # places that are written over while entries move to the front, and what was there
        self._head_before: torch.Tensor | None = None  # of a forward that writes over first tokens

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.head, *self.bodies.values()) if t is not None)

    # -- a forward ------------------------------------------------------------------------------------------------------------

    def write(self, rows: slice, start: int, new: torch.Tensor, shown: bool = True) -> None:
        """`new` [n, H, T, D] goes to indices start .. start + T of consecutive rows that lie alike. The placement has made room for them.

        shown  whether it will be viewed in the forward under way.
        """
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
        tail = self.placement.tail
        seen = first if tail is None else max(first, start - tail)
        run = new[:, :, :0] if not shown else new if seen == start or body is None else torch.cat([part(body, slots, seen - first, start - first), new], dim=2)
        self._waiting.append(_Waiting(rows, seen, run, new[:, :, max(0, write.first - start) :].clone()))

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
            self.bodies[shelf.bucket][shelf.slots][slots, :, columns] = new[members]

    def shelf(self, shelf: Shelf) -> torch.Tensor:
        """What is kept of the rows of a shelf, from the first entry of each on: [n, H, room, D]. Columns that hold nothing yet are finite."""
        return self.bodies[shelf.bucket][shelf.slots]

    def view(self, rows: slice, start: int, stop: int) -> torch.Tensor:
        """Entries start .. stop [n, H, stop - start, D] of consecutive rows that lie alike, those of the forward under way too."""
        for waiting in self._waiting:
            if waiting.rows.start <= rows.start and rows.stop <= waiting.rows.stop:
                run = waiting.run if waiting.rows == rows else waiting.run[rows.start - waiting.rows.start : rows.stop - waiting.rows.start]
                return between(run, start - waiting.first, stop - waiting.first)
        first = self.places.firsts[rows.start]
        assert first <= start, f"indices {start}..{stop} are not kept from {first} on"
        return part(self.bodies[self.places.buckets[rows.start]], self.places.side_by_side(rows), start - first, stop - first)

    def pinned(self, rows: slice, start: int, stop: int) -> torch.Tensor:
        """First tokens start .. stop."""
        assert self.head is not None
        return part(self.head, rows, start, stop)

    def release(self) -> None:
        """The layer has been computed: what only its own queries read goes."""
        self._waiting = [_Waiting(w.rows, w.first, w.new[:, :, :0], w.new) for w in self._waiting]

    def settle(self) -> None:
        """The placement has committed: what waits gets its place. May be called again where it was interrupted."""
        for waiting in self._waiting:
            self._own()
            self._arrange(waiting.new)
            row = waiting.rows.start
            stop = self.placement.ends[row] - self.places.firsts[row]
            body = self.bodies[self.places.buckets[row]]
            part(body, self.places.side_by_side(waiting.rows), stop - waiting.new.shape[2], stop).copy_(waiting.new)
        if self.bodies:
            self._arrange(next(iter(self.bodies.values())))
        self._waiting, self._head_before = [], None

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

    def fork(self, placement: Placement) -> Buffer:
        """The same entries for another to go on from, without those of a forward under way. The memory is shared until one of them writes: it then
        takes a copy of its own."""
        other = Buffer(placement, self.first)
        other.head = self.head if self._head_before is None else self._head_before
        other.bodies, other.places = dict(self.bodies), self.places
        self.sharers.update((self, other))
        other.sharers = self.sharers
        return other

    def entries(self, sealed: Sequence[int]) -> dict[str, torch.Tensor]:
        """What is kept, on the CPU and without room to grow: "head", and "body" [rows, H, longest, D]; zeros where a row keeps nothing, whatever lay there.

        sealed  entries of each row that are left out: somebody has them already, or reads them by `view`.
        """
        if self.bodies:
            self._arrange(next(iter(self.bodies.values())))
        found, ends = {}, self.placement.ends
        firsts = [max(a, b) for a, b in zip(self.places.firsts, sealed, strict=True)]
        if self.head is not None:
            found["head"] = _blank(self.head.detach().to("cpu", copy=True), [0] * len(ends), ends)
        if self.bodies and (length := max(b - a for a, b in zip(firsts, ends, strict=True))):
            like = next(iter(self.bodies.values()))
            body = torch.zeros((len(ends), like.shape[1], length, like.shape[3]), dtype=like.dtype)
            for row, (first, end) in enumerate(zip(firsts, ends, strict=True)):
                if first < end:
                    body[row, :, : end - first] = self.view(slice(row, row + 1), first, end)[0]
            found["body"] = body
        return found

    def restore(self, head: torch.Tensor | None, body: torch.Tensor | None, sealed: Sequence[int]) -> None:
        """The inverse of `entries`, once the placement is restored. The caller copies what was left out into `view`."""
        self._leave()
        self.head, self.bodies, self.places = head, {}, self.placement.places
        if body is not None:
            for bucket, rows in self.places.members.items():
                self.bodies[bucket] = made = self._made(body, len(rows), self.places.rooms[bucket])
                for slot, row in enumerate(rows):
                    start, stop = (max(sealed[row], first := self.places.firsts[row]) - first, self.placement.ends[row] - first)
                    made[slot, :, start:stop] = body[row, :, : stop - start]

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

    # -- memory: never a tensor of inference mode, which nobody could write to outside it ------------------------------------------

    def _own(self) -> None:
        """Before a write: memory that no fork reads."""
        if len(self.sharers) > 1:
            with torch.inference_mode(False):
                self.head = None if self.head is None else self.head.clone()
                self.bodies = {bucket: body.clone() for bucket, body in self.bodies.items()}
            self._leave()

    def _leave(self) -> None:
        self.sharers.discard(self)
        self.sharers = WeakSet()

    def _pin(self, rows: slice, start: int, new: torch.Tensor) -> None:
        self._require_dtype(self.head, new)
        with torch.inference_mode(False):
            if self.head is None:
                self.head = new.new_zeros((len(self.placement.ends), new.shape[1], self.first, new.shape[3]))
            elif self._head_before is None and start < max(self.placement.ends[rows]):
                self.head, self._head_before = self.head.clone(), self.head
        stop = min(self.first, start + new.shape[2])
        self.head[rows, :, start:stop] = new[:, :, : stop - start]

    def _arrange(self, like: torch.Tensor) -> None:
        """Lie as the placement says."""
        self._require_dtype(next(iter(self.bodies.values()), None), like)
        places = self.placement.places
        if self.places is not places or not self.bodies:
            self._undo()
            self.bodies, self.places, self._moving = self._copied(like, places), places, []  # in one statement: no interrupt comes between

    def _copied(self, like: torch.Tensor, places: Places, source: list[int] | None = None) -> dict[int, torch.Tensor]:
        """The bodies at other places; `source`: the row of before that each row is now."""
        bodies, old, ends = {}, self.places, self.placement.ends
        for bucket, rows in places.members.items():
            size = places.rooms[bucket]
            if (kept := self._in_place(places, bucket, source)) is not None:
                bodies[bucket] = kept
                continue
            grown = self._made(like, len(rows), size)
            for slots, bucket_before, before, shift in _moves(old, places, rows, source, ends) if self.bodies else ():
                body = self.bodies[bucket_before]
                length = min(size, body.shape[2] - shift, ends[row := rows[slots.start]] - places.firsts[row])
                if length > 0:
                    grown[slots, :, :length] = body[before, :, shift : shift + length]
            bodies[bucket] = grown
        return bodies

    def _in_place(self, places: Places, bucket: int, source: list[int] | None) -> torch.Tensor | None:
        """The body of rows that stay at their slots, their entries moved to the front; None where it has to be another one."""
        now, old = places.members[bucket], self.places
        rows = now if source is None else tuple(source[row] for row in now)
        if rows[0] >= len(old.buckets):
            return None
        before = old.buckets[rows[0]]
        body = self.bodies.get(before)
        if places.age != old.age or old.members[before] != rows or body is None or body.shape[2] != places.rooms[bucket]:
            return None
        moved = [places.firsts[a] - old.firsts[b] for a, b in zip(now, rows)]
        if not any(moved):
            return body if source is None or len(self.sharers) < 2 else None
        if source is not None or len(self.sharers) > 1:
            return None
        lengths = [self.placement.ends[row] - places.firsts[row] for row in now]
        for (shift, length), stretch in itertools.groupby(range(len(now)), key=lambda slot: (moved[slot], lengths[slot])):
            slots, kept = list(stretch), min(length, body.shape[2] - shift)
            if shift and kept > 0:
                self._to_front(body[slots[0] : slots[-1] + 1], shift, kept)
        return body

    def _to_front(self, rows: torch.Tensor, shift: int, kept: int) -> None:
        """Move columns shift .. shift + kept of some rows to the front. What would be written over while it is read is kept until the buffer lies as it
        should, so that an interrupted move can be undone: `_undo`."""
        source = rows[:, :, shift : shift + kept]
        if kept > shift:
            self._moving.append((source, source.clone()))
            source = self._moving[-1][1]
        rows[:, :, :kept] = source

    def _undo(self) -> None:
        """Put back what an interrupted move has written over; the columns before it are of entries that nobody needs any more."""
        for place, kept in self._moving:
            place.copy_(kept)
        self._moving = []

    def _made(self, like: torch.Tensor, rows: int, size: int) -> torch.Tensor:
        """A body. Where several rows are read in one call up to the end of the longest, what a mask hides is multiplied by zero: it must be finite."""
        with torch.inference_mode(False):
            return (like.new_zeros if self.placement.shared else like.new_empty)((rows, like.shape[1], size, like.shape[3]))

    @staticmethod
    def _require_dtype(kept: torch.Tensor | None, new: torch.Tensor) -> None:
        if kept is not None and kept.dtype != new.dtype:
            raise ValueError(
                f"this cache was read in {kept.dtype} and the model now computes in {new.dtype}; pass a new DynamicCache() and the whole text, and "
                "extend() again after a cast"
            )


def _moves(old: Places, new: Places, rows: tuple[int, ...], source: list[int] | None, ends: list[int]) -> Iterator[tuple[slice, int, slice, int]]:
    """For stretches of slots that move together and are of one length: (slots now, bucket before, slots before, columns to leave out)."""

    def whence(slot: int) -> tuple[int, int, int, int]:
        row = rows[slot]
        before = row if source is None else source[row]
        if before >= len(old.buckets):  # it has joined since, and is empty
            return -1, 0, 0, 0
        return old.buckets[before], old.slots[before] - slot, new.firsts[row] - old.firsts[before], ends[row] - new.firsts[row]

    for (bucket, ahead, shift, _), stretch in itertools.groupby(range(len(rows)), key=whence):
        if bucket < 0:
            continue
        slots = list(stretch)
        yield slice(slots[0], slots[-1] + 1), bucket, slice(slots[0] + ahead, slots[-1] + 1 + ahead), shift


def _blank(kept: torch.Tensor, firsts: Iterable[int], ends: Iterable[int]) -> torch.Tensor:
    kept = kept.contiguous()
    for row, (first, end) in enumerate(zip(firsts, ends)):
        kept[row, :, end - first :] = 0
    return kept
