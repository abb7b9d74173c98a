"""Bodies: the tensors in which the entries of rows lie, and how they move when the rows get other places.

Knows tensors and where they lie, which a placement says; not what is written or read.
"""

from __future__ import annotations

import itertools

import torch

from longreach.memory.bases import Base
from longreach.memory.held import Frozen, require_dtype
from longreach.memory.moves import moves
from longreach.memory.placement import Placement, Places


class Bodies:
    """[slots, H, room, D] for every bucket: what rows have of their own. `bases`: what they share with others. Memory is never a tensor of inference mode,
    which nobody could write to outside it."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.places: Places = placement.places  # as the bodies lie; the placement may be ahead
        self.bodies: dict[int, torch.Tensor] = {}
        self.bases: dict[Base, Frozen] = {}
        self._moving: list[tuple[torch.Tensor, torch.Tensor]] = []  # places that are written over while entries move to the front, and what was there

    @property
    def shared(self) -> bool:
        """Whether somebody else reads what is not frozen."""
        return False

    def _arrange(self, like: torch.Tensor) -> None:
        """Lie as the placement says."""
        require_dtype(next(iter(self.bodies.values()), None), like)
        places = self.placement.places
        if self.places is not places or not self.bodies:
            self._undo()
            self.bodies, self.places, self._moving = self._copied(like, places), places, []  # in one statement: no interrupt comes between

    def _copied(self, like: torch.Tensor, places: Places, source: list[int] | None = None, fresh: bool = False) -> dict[int, torch.Tensor]:
        """The bodies at other places; `source`: the row of before that each row is now; `fresh`: in memory of their own, all of them."""
        bodies, old, ends = {}, self.places, self.placement.ends
        for bucket, rows in places.members.items():
            size = places.rooms[bucket]
            if not fresh and (kept := self._in_place(places, bucket, source)) is not None:
                bodies[bucket] = kept
                continue
            grown = self._made(like, len(rows), size)
            for slots, bucket_before, before, shift in moves(old, places, rows, source, ends) if self.bodies else ():
                body = self.bodies[bucket_before]
                length = min(size, body.shape[2] - shift, ends[row := rows[slots.start]] - places.firsts[row])
                if length > 0 and shift >= 0:  # else the row was cut within its bases, and what comes is all new
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
        if any(body is frozen.entries for frozen in self.bases.values()):
            return None
        moved = [places.firsts[a] - old.firsts[b] for a, b in zip(now, rows)]
        if not any(moved):
            return body if source is None or not self.shared else None
        if source is not None or self.shared:
            return None
        lengths = [self.placement.ends[row] - places.firsts[row] for row in now]
        for (shift, length), stretch in itertools.groupby(range(len(now)), key=lambda slot: (moved[slot], lengths[slot])):
            slots, kept = list(stretch), min(length, body.shape[2] - shift)
            if shift > 0 and kept > 0:
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
