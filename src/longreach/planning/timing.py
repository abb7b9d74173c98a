"""Seconds of reading a prompt and of one new token, from the work and the speeds of the hardware.

A roofline per kind of operation: a matrix product takes the longer of its FLOP and its bytes. Every term is kept, so that the bound is named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from longreach.configs import Attention
from longreach.core.segments import Layout, forms
from longreach.methods.base import Method
from longreach.planning.architecture import Architecture
from longreach.planning.hardware import Hardware, Speeds
from longreach.planning.memory import Schedule
from longreach.planning.theory import distinct_experts
from longreach.planning.work import Counts, count, layouts

Bound = Literal["compute", "memory bandwidth", "host link", "disk", "capacity", "overhead"]


@dataclass(frozen=True)
class Seconds:
    """Where the time goes. `compute`: matrix products and attention of many rows; `bandwidth`: bytes of weights, keys, values and elementwise
    steps; `overhead`: launching and Python, whatever the sizes; `link` and `disk`: bytes from the host and from files."""

    compute: float = 0.0
    bandwidth: float = 0.0
    overhead: float = 0.0
    link: float = 0.0
    disk: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.bandwidth + self.overhead + self.link + self.disk

    @property
    def bound(self) -> Bound:
        parts: dict[Bound, float] = {"compute": self.compute, "memory bandwidth": self.bandwidth, "host link": self.link, "disk": self.disk}
        parts["overhead"] = self.overhead
        return max(parts, key=lambda name: parts[name])

    def __add__(self, other: Seconds) -> Seconds:
        flows = self.link + other.link, self.disk + other.disk
        return Seconds(self.compute + other.compute, self.bandwidth + other.bandwidth, self.overhead + other.overhead, *flows)

    def __mul__(self, times: float) -> Seconds:
        return Seconds(self.compute * times, self.bandwidth * times, self.overhead * times, self.link * times, self.disk * times)


def prefill(architecture: Architecture, method: Method, schedule: Schedule, speeds: Speeds) -> Seconds:
    """From the first token of the prompt to the first new one."""
    total = Seconds()
    lengths = Counter(tokens for _, tokens in schedule.reads())
    for tokens, times in lengths.items():
        total += products(architecture, tokens, speeds, 1 if schedule.eviction is None else tokens) * times
    if schedule.eviction is not None:
        total += evictions(architecture, method, schedule, speeds)
    forwards = lengths.total()
    square = (speeds.square - 1) * sum(times * tokens * (tokens + 1) // 2 for tokens, times in lengths.items())
    for (layer, layout), n in layouts(architecture, method).items():
        attended = read_counts(layout, schedule)
        calls = max(0, attended.calls - forwards)
        flop = 2 * layer.heads * ((attended.pairs + square) * (layer.key_width + layer.value_width) + (attended.scored + attended.massed) * layer.key_width)
        steps = elementwise_bytes(architecture, layer, layout) * schedule.prompt / speeds.elementwise
        total += Seconds(flop / speeds.attention(layer.key_width), steps, calls * speeds.call_seconds) * n
    return total + Seconds(overhead=forwards * (speeds.forward_seconds + len(architecture.layers) * speeds.layer_seconds))


def evictions(architecture: Architecture, method: Method, schedule: Schedule, speeds: Speeds) -> Seconds:
    """Before a turn that has no room, what stays is read, turned to its new place in every form, and written again; every token is scored by its logits."""
    kept, before = 0, 0
    for held, tokens in schedule.turns():
        kept, before = kept + held * (held < before), held + tokens
    scored = schedule.prompt * architecture.vocabulary * (architecture.itemsize + 2 * 4)
    numbers = 0
    for (layer, layout), n in layouts(architecture, method).items():
        numbers += n * layer.kv_heads * (layer.key_width * (1 + 2 * len(forms(layout))) + 2 * layer.value_width)
    return Seconds(bandwidth=(kept * numbers * architecture.itemsize + scored) / speeds.elementwise)


def read_counts(layout: Layout, schedule: Schedule) -> Counts:
    """Of the whole prompt. What is attended to does not depend on where it is cut; what the last query of a forward chooses does, and then every forward is
    looked at; so it is where tokens are evicted between them."""
    if schedule.eviction is not None or (layout.choice is not None and layout.choice.who == "last"):
        return sum((count(layout, start, start + new) for start, new in schedule.reads()), Counts(0, 0, 0))
    forwards = -(-schedule.chunked // schedule.step) + (not schedule.whole)
    middle = schedule.prompt // 2
    calls = count(layout, middle, min(schedule.prompt, middle + schedule.step)).calls
    return replace(count(layout, 0, schedule.prompt), calls=forwards * calls)


def token(architecture: Architecture, method: Method, index: int, speeds: Speeds, rows: int = 1) -> Seconds:
    """One more token at `index` for each of `rows` users in one batch."""
    total = products(architecture, rows, speeds, rows)
    for (layer, layout), n in layouts(architecture, method).items():
        seen = count(layout, index, index + 1)
        numbers: float = layer.kv_heads * ((seen.pairs - seen.chosen) * (layer.key_width + layer.value_width) + seen.scored * layer.key_width)
        if layout.choice is not None:  # what is chosen is read, written side by side, and read again
            numbers += 3 * layout.choice.count(layer.heads, layer.kv_heads) * seen.chosen * (layer.key_width + layer.value_width)
            if mass := layout.choice.index.mass:  # once for the tokens of a block: its keys, and the queries that have paid to them
                numbers += layer.heads * layer.key_width * (mass + layout.choice.block) / layout.choice.block
        steps = elementwise_bytes(architecture, layer, layout)
        read = rows * (numbers * architecture.itemsize / speeds.keys + steps / speeds.elementwise)
        total += Seconds(bandwidth=read, overhead=max(0, seen.calls - 1) * speeds.call_seconds) * n
    return total + Seconds(overhead=speeds.forward_seconds + len(architecture.layers) * speeds.layer_seconds)


def decode(architecture: Architecture, method: Method, schedule: Schedule, speeds: Speeds, rows: int = 1) -> Seconds:
    """The mean token of the answer: that in its middle, for bytes grow evenly."""
    index = schedule.prompt + schedule.new_tokens // 2
    return token(architecture, method, index if schedule.eviction is None else min(index, schedule.eviction.most - 1), speeds, rows)


def products(architecture: Architecture, rows: int, speeds: Speeds, head_rows: int = 1) -> Seconds:
    """Every matrix times `rows` rows, and the head times those whose logits are wanted."""
    weights, compute, bandwidth = architecture.weights, 0.0, 0.0
    work: list[tuple[int, int, int, float]] = [(elements, times, rows, times) for elements, times in weights.matrices]  # the last: how many are read
    if weights.experts:
        met = distinct_experts(weights.experts, weights.experts_per_token, rows)
        work += [(elements, times, rows * weights.experts_per_token, times * met) for elements, times in weights.expert_matrices]
    if weights.head:
        work.append((weights.head, 1, head_rows, 1))
    for elements, times, n, read in work:
        flop, nbytes = 2 * n * elements * times / speeds.gemm(elements), elements * read * architecture.itemsize / speeds.gemv(elements)
        if flop > nbytes:
            compute += flop
        else:
            bandwidth += nbytes
    return Seconds(compute, bandwidth)


def elementwise_bytes(architecture: Architecture, layer: Attention, layout: Layout) -> float:
    """Bytes that one token moves in one layer outside of products and kernels: reads and writes of each step, in its precision.

    Two norms (7 passes, most of them in fp32) and two additions over the hidden width, the activation and its product over the feed-forward
    width; per segment a rotation of the queries and a merge; per key form a rotation and a copy into the store.
    """
    b = architecture.itemsize
    hidden = architecture.hidden * (2 * (2 * b + 5 * 4) + 2 * 3 * b)
    feed_forward = architecture.intermediate * 5 * b
    queries, outputs = layer.heads * layer.key_width, layer.heads * layer.value_width
    keys, values = layer.kv_heads * layer.key_width, layer.kv_heads * layer.value_width
    rotations = len({(segment.query_positions, segment.query_scale) for segment in layout.segments})
    merges = 3 * 4 * outputs * (len(layout.segments) - 1) + (4 + 2 * b) * outputs
    rotated = (rotations * queries + len(forms(layout)) * keys) * (2 * b + 4 * 4)
    stored = 2 * b * (len(forms(layout)) * keys + values)
    return hidden + feed_forward + merges + rotated + stored


def switch(kv: float, speeds: Speeds) -> Seconds:
    """One user's keys and values leave for the host and another's come back."""
    return Seconds(link=2 * kv / speeds.link)


def moved(found: Mapping[str, int], hardware: Hardware, speeds: Speeds) -> Seconds:
    """Bytes that come to the device from the tiers below it, as if nothing were computed meanwhile. A CPU has the host's memory itself."""
    host, disk = found.get("host", 0), found.get("disk", 0) / hardware.disk
    return Seconds(bandwidth=host / speeds.keys, disk=disk) if hardware.device == "cpu" else Seconds(link=host / speeds.link, disk=disk)
