"""A layout -> bytes: what the store allocates, to the byte, and what a forward needs beside it.

Asks memory/declared.py how many entries a buffer will have, and counts buffers and numbers; the tests compare with real ones. Knows no models' weights
beyond their sizes, no seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from longreach.configs import Attention, Decoder
from longreach.core.eviction import ALONE, Eviction
from longreach.core.segments import Form, Layout, Retention, forms, queries, summaries
from longreach.engine import chosen
from longreach.engine.executor import QUERIES_AT_ONCE
from longreach.memory import blocks, declared
from longreach.memory.placement import ROLLBACK, SLACK
from longreach.memory.stored import Stored
from longreach.methods.base import Method
from longreach.planning.work import layouts
from longreach.quantities import CHUNK_SIZE, counted

SCORED_AT_ONCE = 256  # rows of logits in fp32
MARGIN = 1.1  # estimates of temporary memory are good to a tenth


@dataclass(frozen=True)
class Schedule:
    """The forwards of one answer, as `longreach run` makes them: the prompt but its last token in chunks, then one token at a time.

    A method that allows no cut reads it in one forward, one that allows few ends it with a longer one. The last new token is never fed. Under one that evicts,
    the prompt is read in turns, and a token starts at its place in the cache.
    """

    prompt: int
    new_tokens: int
    chunk: int = CHUNK_SIZE
    cut: int | None = 1  # that the method allows
    eviction: Eviction | None = None  # of the method

    def __post_init__(self) -> None:
        if self.prompt < 1:
            raise ValueError(f"a context must hold the prompt and the {self.new_tokens} new tokens; pass a context of at least {self.new_tokens + 1}")

    @classmethod
    def of(cls, method: Method, context: int, new_tokens: int, chunk: int = CHUNK_SIZE) -> Schedule:
        return cls(context - new_tokens, new_tokens, chunk, method.cut, method.eviction)

    @property
    def whole(self) -> bool:
        return self.cut is None or self.prompt < 2 * self.cut

    @property
    def chunked(self) -> int:
        """Tokens that are read in chunks; of a method that evicts, those that are there at the same time."""
        if self.eviction is not None:
            return min(self.prompt - 1, self.eviction.most)
        return self.prompt if self.cut is None or self.whole else (self.prompt - self.cut) // self.cut * self.cut

    @property
    def step(self) -> int:
        """The largest forward."""
        if self.cut is None or self.whole:
            return max(1, self.chunked)
        if self.eviction is not None:
            return max(1, min(self.chunk, self.eviction.turn, self.chunked))
        return max(1, min(max(self.cut, self.chunk // self.cut * self.cut), self.chunked))

    @property
    def stored(self) -> int:
        """Tokens at the end."""
        tokens = self.prompt + self.new_tokens - 1
        return tokens if self.eviction is None else min(tokens, self.eviction.most)

    def reads(self) -> Iterator[tuple[int, int]]:
        """(start, tokens) of the forwards up to the first new token."""
        if self.eviction is not None:
            left = self.prompt
            for start, tokens in self.forwards():
                yield start, tokens
                if not (left := left - tokens):
                    return
            return
        for start in range(0, self.chunked, self.step):
            yield start, min(self.step, self.chunked - start)
        if not self.whole:
            yield self.chunked, self.prompt - self.chunked

    def turns(self) -> Iterator[tuple[int, int]]:
        """(tokens that stayed before it, tokens) of the turns of a method that evicts: of the prompt but its last token, then of that and the answer."""
        assert self.eviction is not None
        most, turn, held, answer = self.eviction.most, self.eviction.turn, 0, self.new_tokens
        told = [min(turn, self.prompt - 1 - start) for start in range(0, self.prompt - 1, turn)] + [min(answer, turn)]
        for tokens in told:
            held = min(held, most - tokens)
            yield held, tokens
            held += tokens
        answer -= told[-1]
        while answer > 0:
            alone = min(ALONE, turn, most - held if most > held else most)
            held = min(held, most - alone)
            yield held, min(alone, answer)
            held, answer = held + min(alone, answer), answer - alone

    def forwards(self) -> Iterator[tuple[int, int]]:
        if self.eviction is not None:
            read = 0
            for held, tokens in self.turns():
                size = self.step if read < self.prompt - 1 else 1
                yield from ((held + start, min(size, tokens - start)) for start in range(0, tokens, size))
                read += tokens
            return
        yield from self.reads()
        for start in range(self.prompt, self.stored):
            yield start, 1


def entries(kept: Retention, schedule: Schedule) -> int:
    """Entries that a buffer of the store has allocated per row at the end of the schedule."""
    return declared.allocated(kept, schedule.forwards(), schedule.chunked, schedule.step, schedule.prompt, schedule.stored)


def buffers(layer: Attention, layout: Layout, schedule: Schedule, itemsize: int, rows: int = 1) -> Iterator[tuple[Retention, int]]:
    """What is kept, and how many bytes are allocated, for every key form and the values of one layer and row, and beside them. `rows`: of the batch; where
    there are several, values are kept once more for every shorter tail."""
    kept: dict[Form, Retention] = dict([*forms(layout).items(), *summaries(layout).items(), *queries(layout).items()])
    stored = Stored(kept, layer.kv_heads, layer.heads, layer.key_width, layer.value_width, itemsize)
    for each, size in stored.buffers(shared=rows > 1):
        yield each, entries(each, schedule) * size


def kv_bytes(architecture: Decoder, method: Method, schedule: Schedule, rows: int = 1) -> int:
    """Bytes that the store has allocated when the schedule ends; equal to `Store.nbytes`."""
    kinds, itemsize = layouts(architecture, method), architecture.itemsize
    return rows * sum(n * size for (layer, layout), n in kinds.items() for _, size in buffers(layer, layout, schedule, itemsize, rows))


def tier_bytes(architecture: Decoder, method: Method, schedule: Schedule, block: int) -> dict[str, int]:
    """Over `longreach.Tiered` memory, for one row when the schedule ends: "blocks", which its tiers share among them, "summaries", which are on the device, and
    what comes on top, "apart": the last tokens, first tokens, and bounded forms with values of their own."""
    found = {"blocks": 0, "summaries": 0, "apart": 0}
    sealed, tail = blocks.allocated(block, schedule.forwards())
    for (layer, layout), count in layouts(architecture, method).items():
        whole = any(kept.place is None for kept in forms(layout).values())
        for kept, size in buffers(layer, layout, schedule, architecture.itemsize, 2 if whole else 1):
            if not (number := entries(kept, schedule)):
                continue
            each = size // number * count
            if kept.place is None:
                found["blocks"] += each * sealed
                found["apart"] += each * (kept.head + tail)
            else:
                found["summaries" if isinstance(kept.place, tuple) else "apart"] += each * number
    return found


def store_forms(architecture: Decoder, method: Method, schedule: Schedule) -> list[dict[str, object]]:
    """The bytes by kind of layer and form: which first and last tokens it keeps, where (contiguous memory has one tier; see `tier_bytes`)."""
    found = []
    for (layer, layout), count in layouts(architecture, method).items():
        names = [*(f"keys at {positions}" for positions in forms(layout)), "values", *(f"summaries of {form.block} keys" for form in summaries(layout))]
        names += ["queries" if of.what == "q" else "log-sum-exps" for of in queries(layout)]
        for name, (kept, size) in zip(names, buffers(layer, layout, schedule, architecture.itemsize), strict=True):
            form = {"layers": count, "form": name, "first": kept.head, "last": kept.tail, "tier": "device", "bytes": size * count}
            found.append(form)
    return found


def temporary_bytes(architecture: Decoder, method: Method, schedule: Schedule, rows: int = 1, expands_groups: bool = False) -> int:
    """The most that a forward holds beside weights and store.

    expands_groups  the backend copies keys and values for every query head of a group (the tiles on CUDA)
    """
    b, t, d = architecture.itemsize, schedule.step, architecture.hidden
    stream = 2 * d * b + 8 * d  # residual and normed input; a norm computes in fp32
    feed_forward = t * (stream + 3 * architecture.intermediate * b)
    attention = max(attention_bytes(layer, layout, schedule, b, expands_groups) for layer, layout in layouts(architecture, method)) + t * stream
    logits = architecture.vocabulary * (b + 8)
    if schedule.eviction is not None:  # every token is scored
        logits = architecture.vocabulary * (schedule.step * b + min(schedule.step, SCORED_AT_ONCE) * 8)
    growth = max(growing(layer, layout, schedule, b) for layer, layout in layouts(architecture, method))
    waiting = sum(n * added(layer, layout, schedule, b) for (layer, layout), n in layouts(architecture, method).items())
    return rows * (max(feed_forward, attention, logits, growth) + waiting)


def attention_bytes(layer: Attention, layout: Layout, schedule: Schedule, b: int, expands_groups: bool) -> int:
    t, at_once = schedule.step, min(schedule.step, QUERIES_AT_ONCE)
    q, k, o = layer.heads * layer.key_width, layer.kv_heads * layer.key_width, layer.heads * layer.value_width
    total = t * (q + layer.entry + o) * b + t * k * 4 * 2  # what arrives and leaves; a key form is rotated in fp32
    rotations = len({(segment.query_positions, segment.query_scale) for segment in layout.segments})
    total += at_once * (q * (rotations * b + 8) + o * (b + 8))  # rotated queries; the sum, and one part in both precisions
    for kept, size in buffers(layer, layout, schedule, b):
        if kept.tail and t > SLACK and schedule.chunked > kept.tail + t:
            total += (kept.tail + t) * size // entries(kept, schedule)  # a long chunk is attended from a copy
    if layout.choice is not None:
        choice, numbers, seen = layout.choice, layer.key_width + layer.value_width, schedule.stored
        queries = {"every": at_once, "last": 1, "single": 1}[choice.who]
        most = choice.queries if choice.index.mass else chosen.queries_at_once(choice, 1, layer.heads, layer.kv_heads, numbers, seen, b)
        queries = min(queries, most)
        total += chosen.nbytes(choice, layer.heads, layer.kv_heads, numbers, layer.key_width, seen, queries, b)
    if expands_groups and layer.heads > layer.kv_heads:
        total += schedule.stored * layer.heads * (layer.key_width + layer.value_width) * b
    return total


def added(layer: Attention, layout: Layout, schedule: Schedule, b: int) -> int:
    """Bytes that wait in a copy until the whole forward has succeeded: those of a long chunk for which a bounded buffer has no room."""
    found = 0
    for kept, size in buffers(layer, layout, schedule, b):
        if kept.tail and schedule.chunked > kept.tail + ROLLBACK + SLACK and schedule.step > SLACK:
            found += min(schedule.step, kept.tail + ROLLBACK) * size // entries(kept, schedule)
    return found


def growing(layer: Attention, layout: Layout, schedule: Schedule, b: int) -> int:
    """While the largest body grows, the old one is still there."""
    sizes = [size for kept, size in buffers(layer, layout, schedule, b) if kept.tail is None]
    return max(sizes, default=0) * 8 // 9 if schedule.chunked > schedule.step else 0


@dataclass(frozen=True)
class Budget:
    """Memory that is free for keys and values, and for what a forward needs beside them: the weights are there already."""

    architecture: Decoder
    free: int

    def needs(self, method: Method, context: int, chunk: int = CHUNK_SIZE) -> int:
        """Bytes, with a margin, when `context` tokens have been read and the last is decoded."""
        schedule = Schedule.of(method, max(2, context), 1, chunk)
        return round(MARGIN * (kv_bytes(self.architecture, method, schedule) + temporary_bytes(self.architecture, method, schedule)))

    def fits(self, method: Method, context: int) -> bool:
        return self.needs(method, context) <= self.free

    def short(self, method: Method, context: int) -> str:
        """Why it does not fit, in words."""
        return f"needs about {gigabytes(self.needs(method, context))} for {counted(context, 'token')} and {gigabytes(self.free)} are free"


def gigabytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in 1 .. most for which `fits`, which holds up to some n and not beyond; 0 if for none."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
