"""Budgets: how much memory blocks may take in each tier, as people say it. Knows sizes and folders; no tensors."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longreach.quantities import byte_count

LARGEST_BLOCK = 256  # tokens; as many as a record of a document has, which blocks divide
SUMMARIES = 0.5  # of the budget of the device, at most


@dataclass(frozen=True)
class Tiered:
    """Keep what a method keeps of every token in blocks, in the memory of the device, of the host, and on disk, with a budget for each.

        extend(model, method, memory=Tiered(device="512MiB", host="1GiB", disk="DIR:8GiB"))

    device   bytes of blocks, and of what an index keeps of them, where the model computes: of all layers and caches together.
    host     bytes of blocks in the memory of the host; None: none.
    disk     "FOLDER:SIZE", bytes of blocks in files of a folder, which has to be there; None: none. The files have no names and are gone with the process.
    block    tokens of a block: 1, 2, 4, ... 256.
    policy   which block makes room: "lru", the one that was used longest ago; "mass", the one with the least attention of those who chose it, under a method
             that chooses: score <- decay * score + (what all heads and queries of a forward have paid to it). Blocks that the query under way has chosen stay.
    decay    the share of its score that a block keeps with every forward that pays; InfLLM's paper has 0.1.
    staging  bytes at most of blocks that are being read, or attended to, and have no slot on the device. They come on top of the budgets, as the new tokens
             of a forward and the last tokens do, which a crop may take back.

    Sizes are numbers of bytes or texts such as "512MiB". Raises ValueError, with the fix.
    """

    device: int | str
    host: int | str | None = None
    disk: str | None = None
    block: int = 128
    policy: Literal["lru", "mass"] = "lru"
    decay: float = 0.1
    staging: int | str = "32MiB"

    def __post_init__(self) -> None:
        for name in ("device", "host", "staging"):
            if getattr(self, name) is not None or name != "host":
                object.__setattr__(self, name, byte_count(getattr(self, name), name))
        if self.disk is not None:
            folder, size = _divided(self.disk)
            object.__setattr__(self, "disk", f"{folder}:{size}")
        if type(self.block) is not int or self.block not in [2**n for n in range(LARGEST_BLOCK.bit_length())]:
            raise ValueError(f"a block has 1, 2, 4, ... or {LARGEST_BLOCK} tokens, not {self.block!r}; leave out block for 128")
        if self.policy not in ("lru", "mass"):
            raise ValueError(f"policy must be 'lru' or 'mass', not {self.policy!r}")
        if isinstance(self.decay, bool) or not isinstance(self.decay, int | float) or not 0 < self.decay <= 1:
            raise ValueError(f"decay is the share of its mass that a block keeps with every forward, above 0, at most 1, not {self.decay!r}; leave out for 0.1")

    @property
    def folder(self) -> Path | None:
        return None if self.disk is None else _divided(self.disk)[0]

    @property
    def budgets(self) -> dict[str, int]:
        """Bytes of the tiers that there are, the fastest first."""
        found = {"device": self.device, "host": self.host, "disk": None if self.disk is None else _divided(self.disk)[1]}
        return {name: int(size) for name, size in found.items() if size is not None}

    @classmethod
    def parse(cls, text: str) -> Tiered:
        """As the command line has it: "device=512MiB,host=1GiB,disk=DIR:8GiB". A folder may hold "=", no comma."""
        given: dict[str, str] = {}
        for part in text.split(","):
            name, sign, value = part.strip().partition("=")
            if not sign or name not in ("device", "host", "disk", "staging", "policy") or name in given:
                raise ValueError(
                    f"{part!r} is no budget of its own; pass for example device=512MiB,host=1GiB,disk=FOLDER:8GiB (staging=32MiB and policy=mass may be added)"
                )
            given[name] = value
        if "device" not in given:
            raise ValueError(f"{text!r} says nothing of the device, where blocks are used; add for example device=512MiB")
        return cls(**given)  # type: ignore[arg-type]

    def __str__(self) -> str:
        said = [f"{name}={f'{self.folder}:' if name == 'disk' else ''}{size_text(size)}" for name, size in self.budgets.items()]
        return ",".join(said if self.policy == "lru" else [*said, f"policy={self.policy}"])


def size_text(count: int) -> str:
    """1536 -> "1.5 KiB", as texts of a budget are read."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count}B"


def size_at_least(count: int) -> str:
    """As `size_text`, but never less than `count`: for a size to be passed."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{math.ceil(count / size * 100) / 100:g}{unit}"
    return f"{count}B"


def _divided(disk: object) -> tuple[Path, int]:
    """"FOLDER:SIZE" -> both."""
    folder, sign, size = disk.rpartition(":") if isinstance(disk, str) else ("", "", "")
    if not sign or not folder:
        raise ValueError(f"disk must be a folder and a size, such as 'spill:8GiB', not {disk!r}")
    found = byte_count(size, "the size of disk")
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {folder!r} for the blocks on disk; make it first, or name another one")
    return Path(folder), found


def room_for_summaries(spec: Tiered, share: float) -> int:
    """Bytes of the device's budget for what an index keeps of blocks, `share` bytes for every byte of them."""
    return int(min(spec.budgets["device"] * SUMMARIES, share * sum(spec.budgets.values())))


def slots_of(spec: Tiered, room: int, count: int, unit: int) -> list[int]:
    """By tier, the slots of a kind of which `count` blocks come to every `unit` bytes of all kinds, where summaries have `room` on the device."""
    return [(budget - room if name == "device" else budget) * count // unit for name, budget in spec.budgets.items()]


def spare_of(spec: Tiered) -> int:
    """Slots of every kind that stay free, to move blocks through."""
    return 1 if len(spec.budgets) > 1 else 0
