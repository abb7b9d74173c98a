"""Tiers as they will be: what lies where once a text has been read, and how many bytes every token then brings to the device.

Counts blocks as `memory/tiered.py` and `memory/tiers.py` read and place them. Knows budgets and sizes; no seconds. What a method that chooses will choose is
known only when it runs: what it brings is the most that it can be, and comes from the lowest tier that has any.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from longreach.configs import Attention, Decoder
from longreach.core.choice import Choice
from longreach.core.segments import Layout, forms, summaries
from longreach.engine import chosen
from longreach.memory.blocks import sealed
from longreach.memory.budgets import SUMMARIES, Tiered, room_for_summaries, size_at_least, size_text, slots_of, spare_of
from longreach.methods.base import Method
from longreach.planning.memory import MARGIN, Budget, Schedule, temporary_bytes, tier_bytes
from longreach.planning.work import layouts
from longreach.quantities import CHUNK_SIZE, counted

ITEMSIZE = 4  # bytes of a number, at most
LARGEST = 3  # tiers: device, host and disk


@dataclass(frozen=True)
class Spread:
    """In bytes, of one user but for `missing`.

    blocks     all of them. `held`: in every tier, when the schedule ends, each where it lies highest. `missing`: room that those of all users lack, of which
               a slot of every kind stays free where there are several tiers.
    summaries  what an index keeps, on the device. `room`: what there is for all users.
    enough     what tiers have to hold together, however it is divided among them, so that nothing is missing.
    apart      on the device beside its budget: last tokens and bounded forms.
    token      blocks that the last token reads from every tier but the device; `prefill`: that all forwards up to the first new token do.
    at_most    whether they may be fewer.
    """

    blocks: int
    held: dict[str, int]
    missing: int
    summaries: int
    room: int
    enough: int
    apart: int
    token: dict[str, int]
    prefill: dict[str, int]
    at_most: bool

    def fits(self, users: int = 1) -> bool:
        """Of so many users, for whom `missing` was counted."""
        return not self.missing and users * self.summaries <= self.room

    def lacks(self, users: int = 1) -> str | None:
        """Why it does not fit, in words; None where it does."""
        if users * self.summaries > self.room:
            return f"the index of all users takes {size_text(users * self.summaries)} on the device, whose budget has {size_text(self.room)} for it"
        return f"{size_text(self.missing)} of blocks, and of the slots that stay free, have no room in any tier" if self.missing else None

    @property
    def device(self) -> int:
        """Budget of the device at least, for the summaries."""
        return math.ceil(self.summaries / SUMMARIES)

    @property
    def moved(self) -> int:
        """What a token reads from all tiers."""
        return sum(self.token.values())


@dataclass(frozen=True)
class Reads:
    """Blocks of a layer's keys and values that one forward reads: `passed` go by, wherever they lie, `chosen` come to the device."""

    passed: int = 0
    chosen: int = 0
    compared: int = 0  # of keys alone, by an index without summaries, or the first of several stages
    opened: int = 0  # of keys alone, by later stages, for which they come to the device


@lru_cache(maxsize=256)
def spread(architecture: Decoder, method: Method, schedule: Schedule, memory: Tiered, users: int = 1) -> Spread:
    """Where the blocks of `users` lie who each have read a text of this schedule. Remembered: a choice asks several times. Not to be changed by the caller."""
    budgets, unit = memory.budgets, memory.block
    each = [(layer, layout, n) for (layer, layout), n in layouts(architecture, method).items()]
    sizes = [(*buffers(layer, layout, architecture.itemsize * unit), n) for layer, layout, n in each]
    counts: Counter[tuple[int, int]] = Counter()  # heads and bytes of a block -> buffers that have such
    for keys, values, n in sizes:
        counts.update({kind: own * n for kind, own in Counter([*keys, *values]).items()})
    whole = sum(kind[1] * count for kind, count in counts.items())
    kept = sum(summary_bytes(layer, layout, architecture.itemsize) * n for layer, layout, n in each) * unit
    share = kept / whole if whole else 0.0
    room = room_for_summaries(memory, share)
    total, count = tier_bytes(architecture, method, schedule, unit), sealed(schedule.stored, unit)

    slots = {kind: slots_of(memory, room, own, whole) for kind, own in counts.items()}

    def placed(kind: tuple[int, int], blocks: int) -> list[int]:
        """Blocks of one kind by tier, the oldest lowest."""
        found, left = [], blocks * counts[kind] * users
        for most in slots[kind]:
            found.append(min(left, most))
            left -= found[-1]
        return found

    def moved(start: int, stop: int) -> Counter[str]:
        passed, wanted, found = Counter[tuple[int, int]](), Counter[tuple[int, int]](), Counter[str]()
        for (layer, layout, n), (keys, values, _) in zip(each, sizes):
            read = reads(layer, layout, start, stop, unit)
            for kind, compared, opened in [*((kind, read.compared, read.opened) for kind in keys[:1]), *((kind, 0, 0) for kind in values)]:
                passed[kind] += (read.passed + compared) * n
                wanted[kind] += (read.chosen + opened) * n
        for kind, blocks in passed.items():
            lie, every = placed(kind, sealed(start, unit)), sealed(start, unit) * counts[kind] * users
            below = [(name, lie[tier]) for tier, name in enumerate(budgets) if tier and lie[tier]]
            for name, some in below:  # evenly, for all of them go by
                found[name] += kind[1] * blocks * some // every
            if below:
                found[below[-1][0]] += kind[1] * wanted[kind]
        return found

    held, spare = {kind: placed(kind, count) for kind in counts}, spare_of(memory)
    lost = sum(size for _, size in counts) * (LARGEST + 1) if count else 0  # of every kind the spare slot, and what is left of every budget
    enough = (total["blocks"] + lost) / (1 - min(share, SUMMARIES))
    return Spread(
        blocks=total["blocks"],
        held={name: sum(kind[1] * held[kind][tier] for kind in counts) // users for tier, name in enumerate(budgets)},
        missing=sum(kind[1] * max(0, count * counts[kind] * users + spare - sum(slots[kind])) for kind in counts) if count else 0,
        summaries=total["summaries"],
        room=room,
        enough=math.ceil(max(enough, total["summaries"] / share if share else 0)),
        apart=total["apart"],
        token=dict(moved(schedule.stored, schedule.stored + 1)),
        prefill=dict(sum((moved(start, start + new) for start, new in schedule.reads()), Counter())),
        at_most=method.choice is not None,
    )


def buffers(layer: Attention, layout: Layout, token: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Heads and bytes of a block of every buffer that keeps all tokens: of keys, of values. `token`: bytes of a block of width 1."""
    heads = layer.kv_heads
    keys = [(heads, heads * layer.key_width * token) for kept in forms(layout).values() if kept.place is None]
    return keys, [(heads, heads * layer.value_width * token)] if keys else []


def summary_bytes(layer: Attention, layout: Layout, itemsize: int) -> float:
    """What an index keeps of a token."""
    key = layer.kv_heads * layer.key_width * itemsize
    return sum(key * form.index.numbers(layer.heads // layer.kv_heads) / form.block for form in summaries(layout))


def reads(layer: Attention, layout: Layout, start: int, stop: int, unit: int) -> Reads:
    """Of one forward of the queries start .. stop."""
    kept, stops, found = forms(layout), sealed(start, unit) * unit, Reads()
    for segment in layout.segments:
        visible, choosing = segment.visible, False
        if segment.choice is not None:
            first, choosing = segment.choice.of(start, stop)
            visible = replace(visible, first_query=max(first, visible.first_query))
        if kept[segment.kept].place is not None or visible.last_key is not None:  # first and last tokens lie apart
            continue
        for piece in visible.pieces(start, stop):
            every = -(-min(piece.to_key, stops) // unit) - piece.from_key // unit
            if every <= 0:
                continue
            if not choosing or segment.choice is None:
                found = replace(found, passed=found.passed + every)
                continue
            choice = segment.choice
            lengths = [*stretches(choice, layer, piece.first, piece.last, piece.to_key)]
            times = sum(n * min(every, touched(choice, layer, queries, unit)) for queries, n in lengths)
            passed, single = 0 if choice.index.width else every, stop - start == 1
            if choice.refresh and single:  # its share of what the first stage goes through
                passed = -(-every // choice.refresh[0])
            opened, asks = 0, 1 if single else sum(n for _, n in lengths)
            for (some, keys), refresh in zip(choice.index.opened(choice.complete(piece.to_key)), choice.refresh[1:]):
                opened += -(-asks * min(every, some * ((keys - 2) // unit + 2)) // (refresh if single else 1))
            found = replace(found, chosen=found.chosen + times, compared=found.compared + passed, opened=found.opened + opened)
    return found


def stretches(choice: Choice, layer: Attention, first: int, last: int, visible: int) -> Iterator[tuple[int, int]]:
    """(queries whose keys are gathered in one go, how often) of the queries first .. last."""
    if choice.queries > 1:
        yield from Counter(b - a for a, b in choice.together(first, last)).items()
        return
    size = chosen.queries_at_once(choice, 1, layer.heads, layer.kv_heads, layer.key_width + layer.value_width, visible, ITEMSIZE)
    yield from ((queries, n) for queries, n in ((size, (last - first) // size), ((last - first) % size, 1)) if queries * n)


def touched(choice: Choice, layer: Attention, queries: int, unit: int) -> int:
    """Blocks of a tier that such queries gather from, at most: those in which chosen ones lie, and those of the latest keys."""
    choices = choice.count(layer.heads, layer.kv_heads) * (1 if choice.queries > 1 else queries)
    across = 1 if unit % choice.block == 0 else (choice.block - 2) // unit + 2
    return choices * choice.keep * across + (choice.block + choice.lag + queries - 2) // unit + 2


@dataclass(frozen=True)
class InTiers(Budget):
    """The same over tiers, for a text of which every token is read. `lazily`: an arena takes what was written to it, and the host's memory is the device's own,
    as on a CPU."""

    memory: Tiered
    lazily: bool

    def spread(self, method: Method, context: int, chunk: int = CHUNK_SIZE) -> Spread:
        return spread(self.architecture, method, read_whole(method, context, chunk), self.memory)

    def needs(self, method: Method, context: int, chunk: int = CHUNK_SIZE) -> int:
        found, schedule = self.spread(method, context, chunk), read_whole(method, context, chunk)
        tiers = found.held["device"] + found.summaries + found.held.get("host", 0) if self.lazily else self.memory.budgets["device"]
        beside = found.apart + temporary_bytes(self.architecture, method, schedule) + int(self.memory.staging) * bool(found.blocks)
        return round(MARGIN * beside) + tiers * bool(found.blocks)

    def fits(self, method: Method, context: int) -> bool:
        return self.spread(method, context).fits() and super().fits(method, context)

    def short(self, method: Method, context: int) -> str:
        found = self.spread(method, context)
        if found.fits():
            return super().short(method, context)
        if found.summaries > found.room:
            index = f"an index of {size_text(found.summaries)} of {counted(context, 'token')}"
            return f"keeps {index} on the device, whose budget has {size_text(found.room)} for it"
        beside = " beside the block of each kind that stays free" if len(self.memory.budgets) > 1 else ""
        return f"keeps {size_text(found.blocks + found.summaries)} of {counted(context, 'token')}, for which the tiers ({self.memory}) have no room{beside}"

    def fix(self, method: Method, context: int) -> str:
        """Tiers that would do, however they are divided."""
        found = self.spread(method, context)
        device = f", of which the device at least {size_at_least(found.device)}" if found.summaries else ""
        return f"pass tiers that hold {size_at_least(found.enough)} together{device} (memory=, --memory)"


def read_whole(method: Method, context: int, chunk: int) -> Schedule:
    """Reading so many tokens; the one that is answered then is never fed."""
    return Schedule.of(method, max(1, context) + 1, 1, chunk)
