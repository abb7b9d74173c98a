"""Tiers: blocks that nobody writes to any more, in the memory of the device, of the host, or on disk, within a budget for each.

One pool serves all layers and caches of an extension. A block is there while somebody holds its `Block`; then its slots are free. It may lie in several tiers:
what was written to disk once costs nothing to leave the tiers above it again. Keys and values are blocks of their own. Knows slots and policies; not rows,
tokens or forms.

Every move of a block counts by itself, once its bytes are where it goes, and nothing is written over that lies nowhere else. So an interrupt, or a disk that
fails, loses no block at any moment, and the forward can be repeated. Where there are several tiers, one slot of every kind stays free for this, in any of them.
"""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from longreach.memory.arenas import Arena, InFile, InMemory, Kind, runs
from longreach.memory.budgets import Tiered, room_for_summaries, size_text, slots_of, spare_of
from longreach.memory.lane import Lane, Reading
from longreach.memory.shelves import Block, ByMass, ByUse, Entry, Shelf


class Pool:
    """kinds    of every kind of block, how many buffers of all layers fill one with the same tokens.
    summaries  bytes that an index keeps of blocks, for every byte of them. They are on the device: of its budget, at most half is for them.

    Raises ValueError where a tier is too small.
    """

    def __init__(self, spec: Tiered, kinds: Mapping[Kind, int], summaries: float = 0.0) -> None:
        self.spec, self.kinds = spec, dict(kinds)
        self.names = list(spec.budgets)
        self.step = 0  # forwards in which blocks were paid to
        self._paid = False  # in the last forward, or the one under way
        self._entries: dict[Entry, None] = {}  # of all blocks
        self._moving = False  # what lies where is being changed, or was when something was raised
        self.fetched = dict.fromkeys(self.names, 0)  # blocks that were asked for, by the fastest tier that had them
        self.evicted = dict.fromkeys(self.names, 0)
        self.waited = 0.0  # seconds
        self.summaries = room_for_summaries(spec, summaries)  # bytes that these may take
        self.most_staged = 0  # bytes
        self._staged: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._gone: deque[Entry] = deque()
        self._lane = Lane()
        unit = sum(kind.nbytes * count for kind, count in kinds.items())  # bytes of the same tokens in all layers
        self._shelves: dict[Kind, list[Shelf]] = {kind: [] for kind in kinds}
        room = {kind: slots_of(spec, self.summaries, count, unit) for kind, count in kinds.items()}
        for tier, (name, budget) in enumerate(spec.budgets.items()):
            for kind in kinds:
                if (slots := room[kind][tier]) < 1:
                    raise ValueError(f"{name}={size_text(budget)} is too small for a block of each kind of keys and values; pass at least {size_text(unit)}")
                folder = spec.folder if name == "disk" else None
                device = kind.device if name == "device" else torch.device("cpu")
                arena: Arena = InMemory(kind, slots, device) if folder is None else InFile(kind, slots, folder)
                self._shelves[kind].append(Shelf(tier, arena, ByMass() if self.weighs else ByUse()))

    @property
    def weighs(self) -> bool:
        """Whether it is to be told what blocks are paid."""
        return self.spec.policy == "mass"

    # -- room -----------------------------------------------------------------------------------------------------------------

    def require(self, count: int) -> None:
        """Before a forward: room for `count` blocks more of every buffer. Raises ValueError where there is none."""
        self._sweep()
        self.step, self._paid = self.step + self._paid, False
        if any(self._missing(kind, count) > 0 for kind in self.kinds):
            gc.collect()  # caches that nobody can reach any more
            self._sweep()
        for kind, shelves in self._shelves.items():
            if (missing := self._missing(kind, count)) > 0:
                raise ValueError(self._full(missing * kind.nbytes))
            if self.names[-1] == "disk":
                needed = missing + shelves[-1].arena.capacity  # of its slots, where those of the other tiers are full
                shelves[-1].arena.grow(max(0, needed))

    def has_room(self, count: int, gone: Mapping[Kind, int]) -> bool:
        """Whether `require` would find room for so many, when so many of each kind have gone."""
        self._sweep()
        return all(self._missing(kind, count) <= gone.get(kind, 0) for kind in self.kinds)

    def require_ever(self, count: int) -> None:
        """Raises ValueError where so many blocks of every buffer have no room even if all others have gone."""
        for kind, shelves in self._shelves.items():
            if count * self.kinds[kind] > (slots := sum(shelf.arena.capacity for shelf in shelves) - spare_of(self.spec)):
                unit = sum(kind.nbytes * times for kind, times in self.kinds.items())
                most = size_text(unit * (slots // self.kinds[kind]))
                raise ValueError(f"{size_text(unit * count)} of keys and values are to lie in blocks, of which the tiers together hold {most}")

    def _missing(self, kind: Kind, count: int) -> int:
        """Slots that `count` blocks more of every buffer would need beyond those that there are."""
        shelves = self._shelves[kind]
        return sum(len(shelf.only) - shelf.arena.capacity for shelf in shelves) + count * self.kinds[kind] + spare_of(self.spec)

    def require_summaries(self, size: int) -> None:
        if size > self.summaries:
            raise ValueError(
                f"what the method's index keeps would take {size_text(size)} and device={size_text(self.spec.budgets['device'])} has "
                f"{size_text(self.summaries)} for it; pass a larger device budget, or begin a new cache"
            )

    def _full(self, missing: int) -> str:
        said = ", ".join(f"{name} {size_text(found['bytes'])} of {size_text(found['budget'])}" for name, found in self.tiers().items())
        larger = "disk='FOLDER:SIZE'" if "disk" not in self.names else "a larger disk budget"
        return (
            f"the tiers have no room left ({said}): what is to be read needs {size_text(missing)} more; pass {larger} in memory=Tiered(...), or let go of "
            "other caches of this extension, and read on: the cache is as it was"
        )

    def _sweep(self) -> None:
        """Blocks that nobody holds any more; and what was broken off is made good."""
        if self._moving:
            self._mend()
        while self._gone:
            self._moving = True
            entry = self._gone[0]
            for shelf, slot in zip(self._shelves[entry.kind], entry.slots):
                if slot is not None:
                    shelf.free.append(slot)
                    shelf.only.pop(entry, None)
                    shelf.copies.pop(entry, None)
            self._entries.pop(entry, None)
            self._gone.popleft()
            self._moving = False

    def _mend(self) -> None:
        for _ in range(len(self._gone)):
            self._entries.pop(self._gone[0], None)
            self._gone.popleft()
        for kind, shelves in self._shelves.items():
            own = dict.fromkeys(entry for entry in self._entries if entry.kind == kind)
            for shelf in shelves:
                shelf.mend(own)
        self._moving = False

    # -- blocks ---------------------------------------------------------------------------------------------------------------

    def put(self, kind: Kind, entries: torch.Tensor) -> Block:
        """entries [G, tokens, width], for which `require` has found room -> a block, on the device."""
        self._sweep()
        block = Block(Entry(kind, [None] * len(self.names)), self._gone)
        self._moving = True
        slot = self._slot(0, kind)
        self._shelves[kind][0].arena.write(slot, entries)
        self._lies(block.entry, 0, slot)
        self._moving = False
        return block

    def _lies(self, entry: Entry, tier: int, slot: int) -> None:
        """A slot of a tier holds the block now, whose fastest this is."""
        shelves = self._shelves[entry.kind]
        if entry in self._entries:
            before = shelves[entry.tier]
            before.only.pop(entry, None)
            before.copies[entry] = None
        entry.slots[tier] = slot
        self._entries[entry] = None
        shelves[tier].only[entry] = None

    def touch(self, blocks: Sequence[Block], mass: float) -> None:
        """What each of these has got of the attention of the forward under way, for the policy "mass". All scores decay together, so ranks need not."""
        self._paid = True
        for entry in (block.entry for block in blocks):
            entry.score, entry.step = self.score(entry) + mass, self.step
            entry.rank = math.log2(entry.score) - self.step * math.log2(self.spec.decay) if entry.score else -math.inf
            self._shelves[entry.kind][entry.tier].only.ranked(entry)

    def score(self, entry: Entry) -> float:
        """The mass of a block: decay * what it was in the forward before, and what it got in the one under way."""
        return entry.score * self.spec.decay ** (self.step - entry.step)

    def _slot(self, tier: int, kind: Kind, chosen: Collection[Entry] = ()) -> int:
        """A slot for a block to come: one that is free, that of a block which a faster tier has too, or that of one which goes to the next tier."""
        shelf = self._shelves[kind][tier]
        if (slot := shelf.take()) is not None:
            return slot
        if shelf.copies:
            entry = next(iter(shelf.copies))
        else:
            entry = self._victim(shelf, chosen)
            self._lower(entry, tier, chosen)
            self.evicted[self.names[tier]] += 1
        found, entry.slots[tier] = entry.slots[tier], None
        shelf.copies.pop(entry, None)
        shelf.only.pop(entry, None)
        assert found is not None
        return found

    def _victim(self, shelf: Shelf, chosen: Collection[Entry]) -> Entry:
        """Of those that are chosen together none makes room on the device; elsewhere, where there is no other."""
        found = shelf.only.first(chosen)
        return found if found is not None else next(iter(shelf.only))

    def _lower(self, entry: Entry, tier: int, chosen: Collection[Entry]) -> None:
        """A block is about to leave a tier: it lies in one below."""
        shelves = self._shelves[entry.kind]
        below = next((shelf for shelf in shelves[tier + 1 :] if entry.slots[shelf.tier] is not None), None)
        if below is None:
            below, source, at = shelves[tier + 1], shelves[tier].arena, entry.slots[tier]
            assert at is not None and isinstance(source, InMemory)
            slot = self._slot(below.tier, entry.kind, chosen)
            below.arena.write(slot, source.entries[at])
            entry.slots[below.tier] = slot
        below.copies.pop(entry, None)
        below.only[entry] = None

    # -- reading --------------------------------------------------------------------------------------------------------------

    def fits(self, kinds: Iterable[Kind], count: int) -> bool:
        """Whether `count` blocks of each of these kinds can be on the device together."""
        return all(times * count <= self._shelves[kind][0].arena.capacity for kind, times in Counter(kinds).items())

    def on_device(self, blocks: Sequence[Block]) -> list[int]:
        """The slots of blocks, which fit, on the device: those that were not there are brought, and none of them makes room for another."""
        self._sweep()
        chosen = dict.fromkeys(block.entry for block in blocks)
        missing: dict[Kind, list[Entry]] = {}
        for entry in chosen:
            self._used(entry)
            if entry.slots[0] is None:
                missing.setdefault(entry.kind, []).append(entry)
        started = time.perf_counter()
        for kind, entries in missing.items():
            size = max(1, int(self.spec.staging) // kind.nbytes)
            for a in range(0, len(entries), size):
                self._bring(kind, entries[a : a + size], chosen)
        self.waited += time.perf_counter() - started if missing else 0.0
        return [slot for block in blocks if (slot := block.entry.slots[0]) is not None]

    def _bring(self, kind: Kind, entries: Sequence[Entry], chosen: Collection[Entry]) -> None:
        """Blocks come to the device, by way of a copy: what makes room for one may take the very slot in which another lay."""
        staged = torch.empty((len(entries), *kind.shape), dtype=kind.dtype, device=kind.device)
        self.stage(staged)
        self._copy(self._plan(entries), staged)
        for number, entry in enumerate(entries):
            self._moving = True
            slot = self._slot(0, kind, chosen)
            self._shelves[kind][0].arena.write(slot, staged[number])
            self._lies(entry, 0, slot)
            self._moving = False

    def arena(self, kind: Kind) -> torch.Tensor:
        """[slots, G, tokens, width] of the device."""
        arena = self._shelves[kind][0].arena
        assert isinstance(arena, InMemory)
        return arena.entries

    def read(self, wanted: Sequence[tuple[Sequence[Block], torch.Tensor]]) -> Reading:
        """Begin to copy blocks into tensors [n, G, tokens, width], of any strides, from wherever they lie. They stay where they are."""
        self._sweep()
        plans = []
        for blocks, out in wanted:
            for block in blocks:
                self._used(block.entry)
            plans.append((self._plan([block.entry for block in blocks]), out))
        return self._lane.begin(lambda: [self._copy(plan, out) for plan, out in plans], [out for _, out in wanted])

    def wait(self, reading: Reading) -> None:
        """Until a reading is done."""
        started = time.perf_counter()
        reading.done()
        self.waited += time.perf_counter() - started

    def _used(self, entry: Entry) -> None:
        self.fetched[self.names[entry.tier]] += 1
        self._shelves[entry.kind][entry.tier].only.move_to_end(entry)

    def _plan(self, entries: Sequence[Entry]) -> list[tuple[Arena, int, int, int]]:
        """What is to be copied: from which slot of an arena, to the places first .. last + 1."""
        found = []
        tiers = [entry.tier for entry in entries]
        slots = [entry.slots[tier] or 0 for entry, tier in zip(entries, tiers)]
        far = [slot + tier * 2**40 for slot, tier in zip(slots, tiers)]  # slots of different tiers do not follow each other
        for a, b in runs(far):
            found.append((self._shelves[entries[a].kind][tiers[a]].arena, slots[a], a, b))
        return found

    @staticmethod
    def _copy(plan: Sequence[tuple[Arena, int, int, int]], out: torch.Tensor) -> None:
        for arena, slot, a, b in plan:
            arena.read(slot, out[a:b])

    def stage(self, *tensors: torch.Tensor) -> None:
        """These hold blocks apart from the budgets, as long as they live."""
        self._staged = [(found, size) for found, size in self._staged if found() is not None] + [(weakref.ref(x), x.nbytes) for x in tensors]
        self.most_staged = max(self.most_staged, sum(size for _, size in self._staged))

    # -- people ---------------------------------------------------------------------------------------------------------------

    def tiers(self) -> dict[str, dict[str, int]]:
        """Of every tier: bytes of its budget and of what lies there, blocks and what was asked of it."""
        self._sweep()
        found: dict[str, dict[str, int]] = {}
        for tier, name in enumerate(self.names):
            shelves = {kind: shelves[tier] for kind, shelves in self._shelves.items()}
            found[name] = {
                "budget": self.spec.budgets[name],
                "bytes": sum(kind.nbytes * shelf.used for kind, shelf in shelves.items()),
                "allocated": sum(shelf.arena.allocated for shelf in shelves.values()),
                "blocks": sum(shelf.used for shelf in shelves.values()),
                "fetched": self.fetched[name],
                "evicted": self.evicted[name],
            }
        return found

    def report(self) -> dict[str, Any]:
        """Plain data. `hit_rate`: of the blocks that were asked for, how many lay on the device; None before the first."""
        asked = sum(self.fetched.values())
        return {
            "tiers": self.tiers(),
            "hit_rate": self.fetched["device"] / asked if asked else None,
            "seconds_waited": self.waited,
            "most_staged": self.most_staged,
        }

    def close(self) -> None:
        """Everything goes, the files too."""
        self._lane.close()
        for shelves in self._shelves.values():
            for shelf in shelves:
                shelf.arena.close()
