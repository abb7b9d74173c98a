"""Sealed blocks: records in files that are only appended to, and a manifest that says which of their bytes count.

    manifest.longreach    JSON: the files, the tail and what the client says, with a checksum. It is replaced in one step, and only after everything that it
                          names has reached the disk; whatever a folder holds beside that is of a write that was not finished, and is cut off or removed
    blocks-00000001       records (`memory.records`) one behind the other; a file that has SEALED bytes is closed and the next one begins
    tail-00000002         what is written anew every time: whatever the client makes of it

Names are made of numbers here, never read from a file, and links are not followed, so nothing outside the folder is touched. Blocks are handed out in the
memory of the file, mapped privately: nothing is copied, and a stray write would not reach the disk. A file that somebody cuts while it is read ends the
process, as with every mapping; `files.held` keeps our own processes apart.

A record holds BLOCK entries of one form of one layer of one row, because keys and values are wanted apart later. 256 entries of 8 heads of 128 in bf16 are
512 KiB: enough that a header, a checksum and a call cost nothing beside it, while it is still in the processor's cache for the second look; few enough that
the unfinished block, which is written again with every save, is small; and a multiple of the usual blocks of kernels and indices.

Knows files, rows, layers and forms as names; not lengths, horizons, methods or models.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from longreach import files
from longreach.memory import records
from longreach.memory.records import Damaged, Key, Record

FORMAT = 3
BLOCK = 256
SEALED = 64 * 2**20
MANIFEST = "manifest.longreach"
LARGEST_MANIFEST = 16 * 2**20
MAPPED = 64  # files that are mapped at the same time: each holds a handle
OURS = re.compile(r"(?:blocks|tail)-(\d{8})|\.(?:tail-\d{8}|manifest\.longreach)\.[0-9a-f]{16}\.partial")
TORN = re.compile(r"\.tail-\d{8}\.[0-9a-f]{16}\.partial")
BESIDE = re.compile(r"\.tmp[0-9A-Za-z]{6}")  # safetensors writes here first what becomes such a part
MOST = 10**8
AGAIN = "read the text again and save it"


@dataclass(frozen=True)
class Blocks:
    """Of file `number` the first `bytes` bytes count: `records` records, whose headers have this checksum one after the other."""

    number: int
    bytes: int
    records: int
    checksum: int


@dataclass(frozen=True)
class Tail:
    number: int
    bytes: int
    checksum: int  # crc32 of all of it


@dataclass(frozen=True)
class Manifest:
    """What counts in a folder. `facts` are the client's, plain JSON."""

    blocks: tuple[Blocks, ...]
    tail: Tail | None
    facts: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(file.bytes for file in self.blocks) + (0 if self.tail is None else self.tail.bytes)


def blocks_name(number: int) -> str:
    return f"blocks-{number:08d}"


def tail_path(folder: Path, number: int) -> Path:
    return folder / f"tail-{number:08d}"


# -- the manifest ---------------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> Manifest:
    """Raises ValueError, with the fix, where there is none, it is of another format, or it is damaged."""
    with _opened(folder, MANIFEST) as (handle, size):
        data = os.read(handle, LARGEST_MANIFEST + 1) if size <= LARGEST_MANIFEST else b""
    try:
        found = json.loads(data)
        version, checksum, content = found["format"], found["checksum"], found["content"]
        whole = checksum == zlib.crc32(_canonical(content))
    except (ValueError, TypeError, KeyError, RecursionError):
        version, whole = FORMAT, False
    if version != FORMAT:
        raise ValueError(f"{str(folder)!r} has format {version!r} and this version of Longreach reads {FORMAT}; install the version that wrote it, or {AGAIN}")
    if not whole:
        raise _refused(folder, MANIFEST, "does not have its checksum")
    try:
        blocks = tuple(Blocks(**file) for file in content["blocks"])
        tail = None if content["tail"] is None else Tail(**content["tail"])
        named: list[Blocks | Tail] = [*blocks, *([] if tail is None else [tail])]
        counts = [value for file in named for value in vars(file).values()]
        fine = all(type(value) is int and 0 <= value < 2**62 for value in counts) and all(0 < file.number < MOST and file.bytes for file in named)
        fine = fine and len({file.number for file in named}) == len(named) and type(content["facts"]) is dict
    except (TypeError, KeyError):
        fine = False
    if not fine:
        raise _refused(folder, MANIFEST, "contradicts itself")
    return Manifest(blocks, tail, content["facts"])


def commit(folder: Path, manifest: Manifest) -> None:
    """From here on the folder holds this and nothing else. Everything that it names has been written and synced."""
    files.sync(folder)
    content = {"blocks": [asdict(file) for file in manifest.blocks], "tail": None if manifest.tail is None else asdict(manifest.tail), "facts": manifest.facts}
    text = json.dumps({"format": FORMAT, "checksum": zlib.crc32(_canonical(content)), "content": content}, allow_nan=False)
    if len(text) > LARGEST_MANIFEST:
        raise ValueError(f"what is to be said of {str(folder)!r} takes {len(text)} bytes, more than {LARGEST_MANIFEST}; save fewer rows in one document")
    files.write(folder / MANIFEST, text, "manifest")
    files.sync(folder)


def recover(folder: Path) -> None:
    """Remove and cut off what the manifest does not name: a write that was not finished, or what the last one has replaced."""
    try:
        found = read(folder) if os.path.lexists(folder / MANIFEST) else Manifest((), None, {})
    except ValueError:
        return  # nobody can say what counts
    named = {blocks_name(file.number): file.bytes for file in found.blocks}
    keep = {MANIFEST, *named} | (set() if found.tail is None else {tail_path(folder, found.tail.number).name})
    for entry, ours in _entries(folder):
        if entry.name not in keep and ours and not entry.is_dir(follow_symlinks=False):
            os.unlink(entry.path)
        elif entry.name in named and entry.stat(follow_symlinks=False).st_size > named[entry.name] and entry.is_file(follow_symlinks=False):
            os.truncate(entry.path, named[entry.name])


def writable(folder: Path) -> None:
    """Raises ValueError where a folder holds something that is not of a log, and no manifest says that it is one nevertheless; or a link in its place."""
    for entry, named in _entries(folder):
        if (ours := named or entry.name == MANIFEST) and not entry.is_file(follow_symlinks=False):
            raise ValueError(f"{entry.path!r} is a link or a folder where a file of a document should be; remove it, or name another folder")
        if not ours and not os.path.lexists(folder / MANIFEST):
            raise ValueError(f"{str(folder)!r} is a folder that holds other things, such as {entry.name!r}; name a new folder for the document")


def _entries(folder: Path) -> list[tuple[os.DirEntry[str], bool]]:
    """What a folder holds, and whether it is of a log. Others use the names of BESIDE too: such a file is ours only beside a part that was to be a tail; so it
    comes first, and is removed before that."""
    found = sorted(os.scandir(folder), key=lambda entry: BESIDE.fullmatch(entry.name) is None)
    torn = any(TORN.fullmatch(entry.name) for entry in found)
    beside = {entry.name for entry in found if torn and BESIDE.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)}
    return [(entry, entry.name in beside or OURS.fullmatch(entry.name) is not None) for entry in found]


def next_number(folder: Path) -> int:
    """One that no file in the folder has."""
    found = 1 + max((int(name[1]) for entry in os.scandir(folder) if (name := OURS.fullmatch(entry.name)) and name[1]), default=0)
    if found >= MOST:
        raise ValueError(f"the files in {str(folder)!r} cannot be counted any further; name another folder")
    return found


# -- reading ----------------------------------------------------------------------------------------------------------------------------


class Log:
    """The records that count. Making one reads and checks every header; a payload is checked when it is asked for. `indexed`: whether any will be."""

    def __init__(self, folder: Path, blocks: Sequence[Blocks], indexed: bool = True) -> None:
        self.folder, self.blocks, self.indexed = folder, tuple(blocks), indexed
        self.index: dict[Key, tuple[Blocks, Record]] = {}  # in the order in which they were written
        self._maps: dict[int, mmap.mmap] = {}
        self._checksums: dict[Key, int] = {}  # of the headers of a file up to this one
        for file in self.blocks:
            self._scan(file)

    def _scan(self, file: Blocks) -> None:
        data, offset, chain, count = self._mapped(file), 0, 0, 0
        while offset < file.bytes:
            try:
                record, checksum = records.header(data, offset, file.bytes)
                if record.key in self.index:
                    raise Damaged("it holds a block twice")
            except Damaged as error:
                raise self._damaged(file, error) from None
            chain, count = zlib.crc32(records.CHECKSUM.pack(checksum), chain), count + 1
            if self.indexed:
                self.index[record.key], self._checksums[record.key] = (file, record), chain
            offset = record.stop
        if (chain, count) != (file.checksum, file.records):
            raise self._damaged(file, "it holds other records than the manifest says")

    def read(self, key: Key) -> torch.Tensor:
        """[heads, entries, width] in the memory of the file. Raises ValueError where its checksum is another one, KeyError where there is no such block."""
        file, record = self.index[key]
        try:
            return records.entries(self._mapped(file), record)
        except Damaged as error:
            raise self._damaged(file, error) from None

    def beginning(self, keep: Callable[[Record], bool]) -> tuple[Blocks, ...]:
        """The longest beginning of which all records are to be kept."""
        found: list[Blocks] = []
        for key, (file, record) in self.index.items():
            if not keep(record):
                break
            if not found or found[-1].number != file.number:
                found.append(Blocks(file.number, 0, 0, 0))
            found[-1] = Blocks(file.number, record.stop, found[-1].records + 1, self._checksums[key])
        return tuple(found)

    def _mapped(self, file: Blocks) -> mmap.mmap:
        if file.number not in self._maps:
            if len(self._maps) == MAPPED:
                del self._maps[next(iter(self._maps))]  # a block that somebody still holds keeps it
            with _opened(self.folder, blocks_name(file.number)) as (handle, size):
                if size < file.bytes:
                    raise self._damaged(file, f"it has {size} bytes and the manifest says {file.bytes}")
                self._maps[file.number] = mmap.mmap(handle, file.bytes, access=mmap.ACCESS_COPY)
        return self._maps[file.number]

    def _damaged(self, file: Blocks, what: object) -> ValueError:
        return _refused(self.folder, blocks_name(file.number), f"cannot be read ({what})")


def verified(folder: Path, tail: Tail) -> Path:
    """The file of a tail, whose checksum is right."""
    path = tail_path(folder, tail.number)
    with _opened(folder, path.name) as (handle, size):
        if size != tail.bytes or _checksum(handle) != tail.checksum:
            raise _refused(folder, path.name, "does not have its checksum")
    return path


# -- writing ----------------------------------------------------------------------------------------------------------------------------


class Writer:
    """Appends records to a beginning of a log, or to none. What counted before is never written over: only `commit` lets it go."""

    def __init__(self, folder: Path, beginning: Sequence[Blocks], counted: Sequence[Blocks]) -> None:
        """counted  what the manifest on the disk names. A last file goes on only where all of it that counts is kept."""
        self.folder = folder
        self._done = [*beginning]
        self._handle: int | None = None
        self._fresh = not beginning or beginning[-1] not in counted or beginning[-1].bytes >= SEALED

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def append(self, key: Key, entries: torch.Tensor) -> None:
        """entries [heads, n, width]. Raises OSError."""
        parts = records.packed(key, entries)
        handle, file = self._file()
        for part in parts:
            write_all(handle, part)
        chain = zlib.crc32(parts[0][-records.CHECKSUM.size :], file.checksum)
        self._done[-1] = Blocks(file.number, file.bytes + sum(map(len, parts)), file.records + 1, chain)
        if self._done[-1].bytes >= SEALED:
            self._close()

    def finish(self) -> tuple[Blocks, ...]:
        """Everything has reached the disk -> what a manifest may name."""
        self._close()
        return tuple(self._done)

    def _file(self) -> tuple[int, Blocks]:
        if self._handle is None:
            if self._fresh:
                self._done.append(Blocks(next_number(self.folder), 0, 0, 0))
            flags = os.O_WRONLY | (os.O_CREAT | os.O_EXCL if self._fresh else 0) | SAFELY
            self._handle = os.open(self.folder / blocks_name(self._done[-1].number), flags, 0o666)
            os.ftruncate(self._handle, self._done[-1].bytes)  # what is behind it is of a write that was not finished
            os.lseek(self._handle, 0, os.SEEK_END)
        return self._handle, self._done[-1]

    def _close(self) -> None:
        if self._handle is not None:
            os.fsync(self._handle)
            os.close(self._handle)
            self._handle, self._fresh = None, True


def write_all(handle: int, data: bytes | memoryview) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(handle, left) :]


def tail(folder: Path, make: Callable[[Path], object]) -> Tail:
    """Write a tail anew, under a number of its own, with what `make` writes into the path that it is given."""
    number = next_number(folder)
    path = tail_path(folder, number)
    files.write_by(path, make, "tail of the document")
    with _opened(folder, path.name) as (handle, size):
        return Tail(number, size, _checksum(handle))


# -- opening ----------------------------------------------------------------------------------------------------------------------------

SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[tuple[int, int]]:
    """An ordinary file of a folder -> its handle and its size. Neither links nor pipes."""
    try:
        handle = os.open(folder / name, os.O_RDONLY | SAFELY)
    except OSError as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be opened ({(error.strerror or str(error)).lower()})"
        raise _refused(folder, name, reason) from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise _refused(folder, name, "is not an ordinary file")
        yield handle, found.st_size
    finally:
        os.close(handle)


def _checksum(handle: int) -> int:
    os.lseek(handle, 0, os.SEEK_SET)
    found = 0
    while data := os.read(handle, 2**20):
        found = zlib.crc32(data, found)
    return found


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _refused(folder: Path, name: str, what: str) -> ValueError:
    return ValueError(f"{str(folder)!r} is damaged or forged: {name} {what}; copy it again, or {AGAIN}")
