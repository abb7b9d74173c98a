"""Arenas: slots for blocks of one kind in one tier, in memory or in a file. Knows tensors and slots; not which block lies where, or why.

A file has no name: it is removed from its folder when it is made, so that its space is free again whenever the process ends, however that comes about. (Where a
system cannot do this, it has a name of its own and is removed when it is closed.)
"""

from __future__ import annotations

import math
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from longreach import files


@dataclass(frozen=True)
class Kind:
    """Blocks that are alike: shape [G, tokens, width], dtype, and the device where they are read."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Arena(Protocol):
    """`capacity` slots; a slot that was not written holds anything."""

    capacity: int

    @property
    def allocated(self) -> int:
        """Bytes."""
        ...

    def grow(self, slots: int) -> None:
        """There is room for so many. Raises ValueError where there is not after all."""
        ...

    def write(self, slot: int, entries: torch.Tensor) -> None:
        """entries [G, tokens, width], on any device."""
        ...

    def read(self, slot: int, out: torch.Tensor) -> None:
        """Slots slot .. slot + n into out [n, G, tokens, width], of any strides and on any device."""
        ...

    def close(self) -> None: ...


class InMemory:
    """Slots in the memory of a device: one tensor [capacity, G, tokens, width], so that any choice of blocks is gathered by one operation. It is allocated
    whole with the first block; what was never written takes no memory of a CPU."""

    def __init__(self, kind: Kind, capacity: int, device: torch.device) -> None:
        self.kind, self.capacity, self.device = kind, capacity, device
        self.pinned = device.type == "cpu" and kind.device.type == "cuda"  # so that copies run beside what is computed
        self._entries: torch.Tensor | None = None

    @property
    def entries(self) -> torch.Tensor:
        if self._entries is None:
            try:
                with torch.inference_mode(False):
                    self._entries = torch.empty((self.capacity, *self.kind.shape), dtype=self.kind.dtype, device=self.device, pin_memory=self.pinned)
            except (RuntimeError, MemoryError) as error:
                size = self.capacity * self.kind.nbytes
                raise ValueError(f"{self.device} has no {size / 2**20:.0f} MiB for the blocks of a tier; extend() again with a smaller budget") from error
        return self._entries

    @property
    def allocated(self) -> int:
        return 0 if self._entries is None else self._entries.nbytes

    def grow(self, slots: int) -> None:
        pass

    def write(self, slot: int, entries: torch.Tensor) -> None:
        self.entries[slot].copy_(entries, non_blocking=self.device.type == "cuda")

    def read(self, slot: int, out: torch.Tensor) -> None:
        out.copy_(self.entries[slot : slot + out.shape[0]], non_blocking=self.pinned)

    def close(self) -> None:
        self._entries = None


class InFile:
    """Slots in a file of a folder, which grows as they are needed."""

    def __init__(self, kind: Kind, capacity: int, folder: Path) -> None:
        self.kind, self.capacity, self.folder = kind, capacity, folder
        self._file: Any = None
        self._slots = 0
        self._place = threading.Lock()  # the file has one place at which it is read and written

    @property
    def allocated(self) -> int:
        return self._slots * self.kind.nbytes

    def grow(self, slots: int) -> None:
        if slots <= self._slots:
            return
        fix = "free some space, or pass a smaller disk budget and larger device and host budgets"
        with files.said(self.folder, fix), self._place:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="longreach-", suffix=".blocks", dir=self.folder, buffering=0)  # noqa: SIM115
            before, now = self.allocated, slots * self.kind.nbytes
            if hasattr(os, "posix_fallocate"):  # what was promised is there: a full disk is met here, and not when something is written
                os.posix_fallocate(self._file.fileno(), before, now - before)
            else:
                self._file.truncate(now)
            self._slots = slots

    def write(self, slot: int, entries: torch.Tensor) -> None:
        data = _bytes(entries.detach().to("cpu").contiguous())
        with files.said(self.folder), self._place:
            self._file.seek(slot * self.kind.nbytes)
            while data:
                data = data[self._file.write(data) :]

    def read(self, slot: int, out: torch.Tensor) -> None:
        found = torch.empty(out.shape, dtype=out.dtype, pin_memory=out.device.type == "cuda")
        data = _bytes(found)
        with files.said(self.folder, "its disk cannot be read"), self._place:
            self._file.seek(slot * self.kind.nbytes)
            while data:
                if not (count := self._file.readinto(data)):
                    raise OSError("a file of blocks has ended too early")
                data = data[count:]
        out.copy_(found, non_blocking=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file, self._slots = None, 0


def _bytes(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def runs(slots: Sequence[int]) -> list[tuple[int, int]]:
    """Places (first, last + 1) of slots that follow each other."""
    found: list[tuple[int, int]] = []
    for place, slot in enumerate(slots):
        if found and slot == slots[place - 1] + 1:
            found[-1] = found[-1][0], place + 1
        else:
            found.append((place, place + 1))
    return found
