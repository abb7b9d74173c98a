"""Placement: in which bucket, slot and column the entries of every row lie. Index arithmetic, done once for all layers that keep the same tokens.

Rows of about the same length share a bucket, so that one call reads all of them. A row is its own sequence: its tokens lie in the order of their true
indices, pads are never stored. Knows lengths and what is to be kept; no tensors, positions or models.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from longreach.core.segments import Retention
from longreach.memory.bases import COPIED, Base, Share, Shares, cut_off, sides

ROLLBACK = 128  # tokens a crop may always undo (assisted decoding)
SLACK = 64  # tokens a bounded buffer takes before it moves its tail to the front
SMALLEST, STEP = 256, 1.5  # entries of a row of the first bucket at most, and how much longer those of the next may be


def room(old: int, needed: int, most: int | None) -> int:
    """Columns of a bucket that had `old` and needs `needed` <= `most`: it grows by an eighth, and never beyond `most`."""
    if needed <= old:
        return old
    size = max(needed + SLACK, old + old // 8)
    return size if most is None else min(size, most)


def bucket_of(entries: int, before: int | None = None) -> int:
    """The bucket of a row that holds so many tokens. One that was in bucket `before` moves down only where it is two steps too long for it, so that a row
    that is cropped and goes on, as assisted decoding has it, is not moved back and forth."""
    found = 0 if entries <= SMALLEST else math.ceil(math.log(entries / SMALLEST, STEP) - 1e-9)
    return before if before is not None and before - 1 <= found <= before else found


@dataclass(frozen=True, eq=False)
class Places:
    """Row r lies at slot `slots[r]` of bucket `buckets[r]`, its entry of index j at column j - firsts[r].

    members  of a bucket: its rows, ascending; their slots are 0, 1, ...
    rooms    of a bucket: its columns.
    age      how often something was left behind the end of a row: where this is another one, every row is copied, so that nothing lies there.
    """

    buckets: tuple[int, ...]
    firsts: tuple[int, ...]
    rooms: Mapping[int, int]
    slots: tuple[int, ...]
    members: Mapping[int, tuple[int, ...]]
    age: int = 0

    @classmethod
    def of(cls, buckets: Sequence[int], firsts: Sequence[int], rooms: Mapping[int, int], age: int = 0) -> Places:
        members: dict[int, list[int]] = {}
        slots = []
        for row, bucket in enumerate(buckets):
            slots.append(len(members.setdefault(bucket, [])))
            members[bucket].append(row)
        return cls(tuple(buckets), tuple(firsts), {b: rooms[b] for b in members}, tuple(slots), {b: tuple(rows) for b, rows in members.items()}, age)

    @property
    def even(self) -> bool:
        """Whether all rows lie alike."""
        return len(self.members) == 1 and self.firsts.count(self.firsts[0]) == len(self.firsts)

    def side_by_side(self, rows: slice) -> slice:
        """The slots of consecutive rows that lie alike."""
        slot = self.slots[rows.start]
        return slice(slot, slot + rows.stop - rows.start)


@dataclass(frozen=True)
class Write:
    """How the new tokens of a row are taken in, decided before a forward. `at_once`: there is a place for them where nothing is stored; else they wait in a
    copy until the forward is finished, and the row begins with entry `first` then."""

    start: int
    stop: int
    at_once: bool
    first: int


@dataclass(frozen=True, eq=False)
class Cut:
    """What `Placement.cut` would have frozen, and how all rows lie then."""

    bases: tuple[Base, ...]
    shares: list[Shares]
    places: Places


class Placement:
    """Where all rows lie in the buffers that keep their last `tail` tokens (None: all; 0: none, only first tokens, which have a place of their own).

    A bounded bucket has `tail + ROLLBACK + SLACK` columns: a row that has filled them moves its tail to the front, once in SLACK tokens. Others grow by an
    eighth of their size: a token then costs eight copied entries, little beside the whole length that attention reads for it.

    Where all tokens are kept, the first ones of a row may be shares of bases: `places` are then of its own tail, which begins behind them. Where they go to
    blocks of `unit` entries (`memory.blocks`), it begins with a block, and what is short is not frozen.
    """

    def __init__(self, kept: Retention, rows: int, joins: bool = False, unit: int = 1) -> None:
        self.kept = kept
        self.tail = kept.tail
        self.joins = joins  # whether other rows may come and go
        self.unit = unit
        self.ends = [0] * rows  # number of entries of a row: tokens, or of summaries the complete blocks of them
        self.places = Places.of([0] * rows, [0] * rows, {0: 0})
        self.shares: list[Shares] = [()] * rows
        self.bases: frozenset[Base] = frozenset()  # those that any row has a share of
        self.writes: dict[int, Write] = {}  # of the forward under way, by row

    # -- a forward ----------------------------------------------------------------------------------------------------------------

    def reserve(self, new: Iterable[tuple[int, int, int]], rollback: int) -> None:
        """Before a forward: rows get new tokens, (row, start, stop). `start` may lie before the end of a row: what it holds from there on is forgotten when
        the forward is finished. `rollback`: tokens that a crop may undo afterwards."""
        tail, entries = self.tail, self.kept.entries
        new = [(row, entries(start), entries(stop)) for row, start, stop in new]
        if tail == 0:
            self.writes = {row: Write(start, stop, True, 0) for row, start, stop in new}
            return
        self.writes = {}
        needed = {}
        firsts = [*self.places.firsts]
        for row, start, stop in new:
            first, most = firsts[row], None if tail is None else tail + rollback + SLACK
            if most is not None and tail is not None and start == self.ends[row] and stop - first > most >= stop - max(first, start - tail - rollback):
                first = firsts[row] = max(first, start - tail - rollback)  # a few tokens more: what nobody can go back to makes room for them
            at_once = start == self.ends[row] and (most is None or stop - first <= most)
            kept = first if at_once else self.begins(row, start) if tail is None else max(first, stop - tail - rollback)
            self.writes[row] = Write(start, stop, at_once, kept)
            if at_once:
                needed[row] = stop - first
        if firsts != list(self.places.firsts):
            self.places = Places.of(self.places.buckets, firsts, self.places.rooms, self.places.age)
        self._make_room(needed, None if tail is None else tail + rollback + SLACK)

    def commit(self) -> None:
        """The new tokens count from now on. May be called again where it was interrupted."""
        tail, firsts, longest = self.tail, [*self.places.firsts], {}
        for row, write in self.writes.items():
            self.ends[row] = write.stop
            if not write.at_once:
                firsts[row] = write.first
                longest[row] = write.stop - write.first
                self._cut_off(row, write.first)
        if tail == 0:
            return
        if firsts != list(self.places.firsts):
            self.places = Places.of(self.places.buckets, firsts, self.places.rooms, self.places.age)
        self._make_room(longest, None if tail is None else tail + ROLLBACK + SLACK)
        if tail is not None:
            self.shrink(tail + ROLLBACK + SLACK)

    def finish(self, counts: bool = True) -> None:
        """The forward is over, and what it has written counts or does not."""
        if self.writes and not counts:
            self._spoilt()
        self.writes = {}

    def _spoilt(self) -> None:
        """Something lies behind the end of a row that does not count. It may be NaN, which would come through the mask of rows that are read in one call."""
        if self.shared and self.tail != 0:
            self.places = replace(self.places, age=self.places.age + 1)

    @property
    def shared(self) -> bool:
        """Whether several rows may be read in one call."""
        return self.joins or len(self.ends) > 1

    def _make_room(self, needed: Mapping[int, int], most: int | None) -> None:
        """Rows need so many columns: they go to the bucket of that length, which grows where it is too small."""
        old, block = self.places, self.kept.block
        if all(entries <= old.rooms[own := old.buckets[row]] and bucket_of(entries * block, own) == own for row, entries in needed.items()):
            return
        buckets = list(old.buckets)
        for row, entries in needed.items():
            buckets[row] = bucket_of(entries * block, old.buckets[row])
        members: dict[int, list[int]] = {}
        for row, bucket in enumerate(buckets):
            members.setdefault(bucket, []).append(row)
        rooms: dict[int, int] = {}
        for bucket, rows in members.items():
            came = bucket if bucket in old.rooms else old.buckets[rows[0]]
            before = old.rooms[came] if came == bucket or old.members[came] == tuple(rows) else 0  # whoever moves as a whole takes its room along
            longest = max(needed[row] if row in needed else self.ends[row] - old.firsts[row] for row in rows)
            rooms[bucket] = room(before, longest, None if most is None else max(most, longest))
        if buckets != list(old.buckets) or any(rooms[b] != old.rooms[b] for b in rooms):
            self.places = Places.of(buckets, old.firsts, rooms, old.age)

    def shrink(self, most: int) -> None:
        """A bucket that a long rollback or forward has made larger than `most` becomes small again, where no row needs its room."""
        old = self.places
        if max(old.rooms.values(), default=0) <= most:
            return
        longest = {bucket: max(self.ends[row] - old.firsts[row] for row in rows) for bucket, rows in old.members.items()}
        rooms = {bucket: most if size > most >= longest[bucket] else size for bucket, size in old.rooms.items()}
        if rooms != old.rooms:
            self.places = Places.of(old.buckets, old.firsts, rooms, old.age)

    # -- between forwards ---------------------------------------------------------------------------------------------------------

    def reaches(self, row: int) -> int:
        """The smallest length to which a row can be cut."""
        tail, first = self.tail, self.places.firsts[row]
        return first + tail - 1 if tail and first else 0

    def kept_by(self, row: int) -> int:
        """Entries of a row, those of the forward under way among them."""
        return self.writes[row].stop if row in self.writes else self.ends[row]

    def begins(self, row: int, stop: int) -> int:
        """Where all is kept: the first entry of its own that a row has when it has gone back to entry `stop`."""
        return first if stop >= (first := self.places.firsts[row]) else stop // self.unit * self.unit

    def rewind(self, row: int, stop: int) -> None:
        """Forget what a row holds of token `stop` and later; not before `reaches`."""
        if (stop := self.kept.entries(stop)) < self.ends[row]:
            self.ends[row] = stop
            self._spoilt()
            if self.tail is None and stop < self.places.firsts[row]:
                self._cut_off(row, first := self.begins(row, stop))
                places = self.places
                self.places = replace(places, firsts=(*places.firsts[:row], first, *places.firsts[row + 1 :]))

    def share(self, shares: list[Shares]) -> None:
        self.shares, self.bases = shares, frozenset(share.base for own in shares for share in own)

    def _cut_off(self, row: int, stop: int) -> None:
        """A row shares nothing from entry `stop` on."""
        if self.shares[row] and self.shares[row][-1].stop > stop:
            self.share([*self.shares[:row], cut_off(self.shares[row], stop), *self.shares[row + 1 :]])

    @property
    def firsts(self) -> list[int]:
        """The first entry that each row keeps, in a base or of its own."""
        return [own[0].start if own else first for own, first in zip(self.shares, self.places.firsts, strict=True)]

    def cut(self, rows: Collection[int]) -> Cut | None:
        """What some rows have of their own is frozen where it is long, and they begin tails of their own. Of a bucket that loses all its rows, nothing is
        copied. None: there is nothing to freeze. Bounded forms are not frozen, for they are small, and what they hold moves."""
        if self.tail is not None or self.unit > 1:
            return None
        places, ends = self.places, self.ends
        bases: list[Base] = []
        shares, buckets, firsts, rooms = [*self.shares], [*places.buckets], [*places.firsts], dict(places.rooms)
        for bucket, members in places.members.items():
            own = [row for row in members if row in rows]
            if max((ends[row] - firsts[row] for row in own), default=0) < COPIED:
                continue
            whole = len(own) == len(members)
            if whole:
                del rooms[bucket]
                bases.append(Base(bucket))
            for row in own:
                if not whole:
                    bases.append(Base(bucket, places.slots[row], ends[row] - firsts[row]))
                if firsts[row] < ends[row]:
                    shares[row] = (*shares[row], Share(bases[-1], places.slots[row] if whole else 0, firsts[row], ends[row]))
                buckets[row], firsts[row] = 0, ends[row]
        return Cut(tuple(bases), shares, Places.of(buckets, firsts, {0: 0, **rooms}, places.age)) if bases else None

    def adopt(self, cut: Cut) -> None:
        """The buffers have the bases."""
        bases = frozenset(share.base for own in cut.shares for share in own)
        self.shares, self.bases, self.places = cut.shares, bases, cut.places  # in one statement: no interrupt comes between

    def join(self) -> None:
        """One more row, which is empty."""
        places = self.places
        self.ends.append(0)
        self.shares.append(())
        self.places = Places.of([*places.buckets, 0], [*places.firsts, 0], {0: 0, **places.rooms}, places.age)

    def occupy(self, row: int, shares: Shares, first: int, end: int) -> None:
        """A row that is empty gets shares, and entries first .. end of its own, which the buffers receive next; fewer of a bounded form, where nobody goes
        back to them."""
        self.ends[row] = end
        self.share([*self.shares[:row], shares, *self.shares[row + 1 :]])
        if self.tail != 0:
            first = first if self.tail is None else max(first, end - self.tail - ROLLBACK)
            places = self.places
            self.places = Places.of(places.buckets, [*places.firsts[:row], first, *places.firsts[row + 1 :]], places.rooms, places.age)
            self._make_room({row: end - first}, None if self.tail is None else self.tail + ROLLBACK + SLACK)

    def select(self, rows: Sequence[int]) -> None:
        """Rows become the rows `rows` of before."""
        self.ends = [self.ends[row] for row in rows]
        self.share([self.shares[row] for row in rows])
        self.places = Places.of([self.places.buckets[row] for row in rows], [self.places.firsts[row] for row in rows], self.places.rooms, self.places.age)

    def fork(self) -> Placement:
        """Of a store with the same content, without the forward under way."""
        other = Placement(self.kept, 0, self.joins, self.unit)
        other.ends, other.shares, other.bases, other.places = [*self.ends], [*self.shares], self.bases, self.places
        if self.writes:
            other._spoilt()
        return other

    def restore(self, firsts: Sequence[int], ends: Sequence[int]) -> None:
        """As after having read this much, with room for what comes."""
        self.ends = [*ends]
        self.share([()] * len(self.ends))
        if self.tail != 0:
            self.places = Places.of([0] * len(self.ends), firsts, {0: 0})
            tail = self.tail
            self._make_room(dict(enumerate(end - first for first, end in zip(firsts, ends, strict=True))), None if tail is None else tail + ROLLBACK + SLACK)


def alike(placements: Iterable[Placement], rows: Sequence[int]) -> list[object]:
    """A key for each row: rows that follow each other may be read in one call where these are equal, for then they lie side by side in every buffer."""
    placements = list(placements)
    uneven = [placement.places for placement in placements if placement.tail != 0 and not placement.places.even]
    keys: list[object] = [tuple((places.buckets[row], places.firsts[row]) for places in uneven) for row in rows]
    for placement in placements:
        if placement.bases:
            beside = sides(placement.shares)
            keys = [(key, beside[row]) for key, row in zip(keys, rows, strict=True)]
    return keys
