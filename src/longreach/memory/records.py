"""Records: one block of entries of one form of one layer and row, with a header that says what it is and checksums of both.

Knows bytes and tensors; not files, layers' meaning or models. A record is read from memory that may be hostile: what a header says is checked against its
own checksum, against itself and against the bytes that are there before anything is made of it, and a payload against its checksum before it is used.

    header   128 bytes, little-endian: magic, length of the record, length of the payload, first entry, row, layer, heads, entries, width, dtype, form,
             crc32 of the payload, crc32 of the header up to here
    payload  [heads, entries, width], contiguous, as the machine has it in memory (little-endian)
    zeros    up to a multiple of 64 bytes, so that the next payload is aligned for every dtype
"""

from __future__ import annotations

import math
import mmap
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

MAGIC = b"LRblock1"
HEADER = struct.Struct("<8sQQQIIIII4x8s32sI")
CHECKSUM = struct.Struct("<I")
SIZE, ALIGNMENT = 128, 64
LARGEST = 2**31  # bytes of a payload
DTYPES = {b"F64": torch.float64, b"F32": torch.float32, b"F16": torch.float16, b"BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FORM = re.compile(r"[a-z0-9.-]{1,32}")


class Damaged(Exception):
    """What stands there cannot be a record that was written; the message says what is wrong, not where."""


class Key(NamedTuple):
    """Which block: entries first, first + 1, ... of a form of a layer, of one row."""

    layer: int
    row: int
    form: str
    first: int


@dataclass(frozen=True)
class Record:
    """What a header says. `shape` is (heads, entries, width); `start` and `bytes` are of the payload, `stop` is where the next record begins."""

    key: Key
    shape: tuple[int, int, int]
    dtype: torch.dtype
    start: int
    bytes: int
    stop: int
    checksum: int  # of the payload

    @property
    def last(self) -> int:
        """The entry behind the last one."""
        return self.key.first + self.shape[1]


def packed(key: Key, entries: torch.Tensor) -> tuple[bytes, memoryview, bytes]:
    """entries [heads, n, width] -> header, payload and padding, to be written one behind the other."""
    if entries.dtype not in NAMES:
        raise ValueError(f"keys and values in {entries.dtype} cannot be stored in blocks; compute in one of {', '.join(map(str, NAMES))}")
    assert entries.dim() == 3 and entries.numel() and FORM.fullmatch(key.form) and entries.nbytes <= LARGEST
    array: Any = entries.detach().to("cpu").contiguous().view(torch.uint8).numpy()
    payload = memoryview(array).cast("B")
    padding = bytes(-len(payload) % ALIGNMENT)
    header = HEADER.pack(
        MAGIC, SIZE + len(payload) + len(padding), len(payload), key.first, key.row, key.layer, *entries.shape, NAMES[entries.dtype], key.form.encode(),
        zlib.crc32(payload),
    ).ljust(SIZE - CHECKSUM.size, b"\0")  # fmt: skip
    return header + CHECKSUM.pack(zlib.crc32(header)), payload, padding


def header(data: mmap.mmap | bytes, offset: int, stop: int) -> tuple[Record, int]:
    """The record at `offset` of data that counts up to `stop` -> what it says, and the checksum of its header. Raises Damaged."""
    if stop - offset < SIZE:
        raise Damaged("it ends within a header")
    found = bytes(data[offset : offset + SIZE])
    (checksum,) = CHECKSUM.unpack_from(found, SIZE - CHECKSUM.size)
    magic, length, size, first, row, layer, heads, count, width, dtype, form, crc = HEADER.unpack_from(found)
    if magic != MAGIC or checksum != zlib.crc32(found[: -CHECKSUM.size]):
        raise Damaged("a header does not have its checksum")
    name, kind = form.rstrip(b"\0").decode("ascii", "replace"), DTYPES.get(dtype.rstrip(b"\0"))
    if kind is None or not FORM.fullmatch(name):
        raise Damaged("a header names an unknown dtype or form")
    if not (0 < size <= LARGEST and size == math.prod((heads, count, width)) * kind.itemsize and length == SIZE + size + -size % ALIGNMENT):
        raise Damaged("a header contradicts itself")
    if length > stop - offset:
        raise Damaged("it ends within a record")
    if first + count >= 2**62:
        raise Damaged("a header counts too far")
    return Record(Key(layer, row, name, first), (heads, count, width), kind, offset + SIZE, size, offset + length, crc), checksum


def entries(data: mmap.mmap, record: Record) -> torch.Tensor:
    """[heads, n, width] in the very memory of `data`, which has to be writable for torch (a private mapping is) and lives as long as the tensor. Raises
    Damaged where the payload does not have its checksum."""
    with memoryview(data) as whole, whole[record.start : record.start + record.bytes] as payload:
        if zlib.crc32(payload) != record.checksum:
            raise Damaged("keys or values do not have their checksum")
    return torch.frombuffer(data, dtype=record.dtype, count=record.bytes // record.dtype.itemsize, offset=record.start).view(record.shape)
