"""The rows of published data sets: from the Hub, or from files and folders of the user in the official format.

Knows files, archives and the Hub; not tasks, samples or tokenizers. What is read is not trusted: sizes are bounded, nothing is unpacked to
the disk, no code of a data set runs, and what is wrong is said with its line.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path, PurePosixPath
from random import Random
from typing import IO, Any, TypeVar

from longreach.configs import sentence
from longreach.evals.samples.base import Settings, Task

FILE_BYTES = 4 << 30  # the largest published file has under 1 GB
LINE_BYTES = 64 << 20  # the longest published row, a book, has under 10 MB
SUFFIXES = (".jsonl", ".json", ".zip", ".parquet")
Columns = Mapping[str, type | tuple[type, ...]]
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where a data set lies.

    repo     of the Hub's data sets: "owner/name".
    files    names its file may have, best first; `*` stands for anything. Folders before them are not named: copies arrange them differently.
    archive  a zip file that holds one of `files`, where the repository has no plain ones.
    columns  the fields that a row must have, with their types.
    """

    repo: str
    files: tuple[str, ...]
    columns: Columns
    archive: str | None = None

    @property
    def wanted(self) -> str:
        return " or ".join(self.files) + (f", or {self.archive} with it" if self.archive else "")


@dataclass(frozen=True)
class Place:
    """A file, or a member of an archive."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return f"{self.path}, {self.member}" if self.member else str(self.path)

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.member or self.path.name).suffix.lower()


def rows(source: Source, settings: Settings, group: str = "") -> list[Row]:
    """Every row, in the order of the file.

    settings.data  a file, a folder with the file in it, at most three folders deep (one called `group` is looked at first), or the id of
                   another data set of the Hub in the same format. None: the data set's own repository.

    Raises ValueError, with the fix, if there is no such file or it is not what it should be.
    """
    places = locate(source, settings.data, group)
    found = [checked(row, source.columns, where) for place in places for where, row in _read(place)]
    if not found:
        raise ValueError(f"{places[0]} has no rows; download it again")
    return found


def document(source: Source, settings: Settings, group: str = "") -> Any:
    """The content of a JSON file that is no list of rows, or the rows."""
    places = locate(source, settings.data, group)
    if places[0].suffix == ".json":
        return _json(places[0])
    return rows(source, settings, group)


def pick(items: Sequence[T], settings: Settings, name: str) -> list[T]:
    """`settings.samples` of the items, in their order; 0 stands for all. Fewer are always among more, so that a run can be made larger."""
    if settings.samples < 0:
        raise ValueError(f"samples must be 0 (all) or more, not {settings.samples}")
    if settings.samples in (0, len(items)) or settings.samples > len(items):
        return list(items)
    order = list(range(len(items)))
    Random(f"{settings.seed}:{name}").shuffle(order)
    return [items[i] for i in sorted(order[: settings.samples])]


def refuse_lengths(task: Task, settings: Settings) -> None:
    if settings.lengths:
        raise ValueError(
            f"{task.name} has documents with lengths of their own, and cannot be made for {', '.join(map(str, settings.lengths))} tokens; "
            "leave the lengths out, and pass --context with --truncate to shorten what is too long"
        )


def checked(row: Any, columns: Columns, where: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(columns)}, found {type(row).__name__}; this is not the official format")
    for name, kind in columns.items():
        if name not in row:
            raise ValueError(f"{where}: there is no field {name!r}, only {', '.join(map(str, list(row)[:12]))}; this is not the official format")
        if not isinstance(row[name], kind):
            raise ValueError(f"{where}: the field {name!r} holds {type(row[name]).__name__}; this is not the official format")
    return row


def strings(value: Any) -> tuple[str, ...]:
    """A field that holds one answer or a list of them."""
    return tuple(str(v) for v in (value if isinstance(value, (list, tuple)) else [value]))


def literal(value: Any, where: str) -> Any:
    """A field that holds data as text, in JSON's or Python's notation. No part of it is run."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"{where}: neither JSON nor a Python literal: {value[:80]!r}; this is not the official format") from error


# -- finding ------------------------------------------------------------------------------------------------------------------


def locate(source: Source, data: str | None, group: str = "") -> list[Place]:
    """The files of a data set (more than one where a table is split), or ValueError."""
    path = Path(data).expanduser() if data is not None else None
    if path is not None and path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path} is not one of {', '.join(SUFFIXES)}; pass {source.wanted}")
        return [_member(path, source)] if path.suffix.lower() == ".zip" else [Place(path)]
    if path is not None and path.is_dir():
        return _in_folder(path, source, group)
    if data is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", data):
        raise ValueError(f"there is no file or folder {data!r}; pass one with {source.wanted}, or the id of a data set such as {source.repo!r}")
    return _in_folder(download(data or source.repo, source), source, group)


def download(repo: str, source: Source) -> Path:
    """The folder of a copy of the data set's files; HF_HUB_OFFLINE and the cache are the Hub client's."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    names = [*source.files, *([source.archive] if source.archive else [])]
    try:
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=[p for name in names for p in (name, f"*/{name}")]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        advice = f"download {source.wanted} elsewhere and pass its folder (--data FOLDER)"
        raise ValueError(f"could not get the data set {repo} from the Hub: {sentence(error)}; {advice}") from error


def _in_folder(folder: Path, source: Source, group: str) -> list[Place]:
    for root in (folder / group, folder) if group else (folder,):
        for name in source.files:
            found = _files(root, name)
            folders = {path.parent for path in found}
            if len(folders) > 1 or (len(found) > 1 and "*" not in name):
                raise ValueError(f"{root} has more than one {name}: {', '.join(map(str, found[:4]))}; pass the folder of one of them")
            if found:
                return [Place(path) for path in found]
        if source.archive and (archives := _files(root, source.archive)):
            return [_member(archives[0], source)]
    raise ValueError(f"{folder} has no {source.wanted}; pass the folder or file that has it, or none to get {source.repo} from the Hub")


def _files(root: Path, name: str) -> list[Path]:
    return sorted(path for depth in ("", "*/", "*/*/", "*/*/*/") for path in root.glob(depth + name) if path.is_file())


def _member(path: Path, source: Source) -> Place:
    """The member of an archive that is called as one of the files, in whatever folder of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir() and not info.filename.startswith("__MACOSX/")]
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is not a zip file ({error}); download it again") from error
    for pattern in source.files:
        if found := [name for name in names if fnmatchcase("/" + name, "*/" + pattern)]:
            if len(found) > 1:
                raise ValueError(f"{path} has more than one {pattern}: {', '.join(found[:4])}; unpack it and pass the folder of one of them")
            return Place(path, found[0])
    raise ValueError(f"{path} has no {' or '.join(source.files)}; pass the archive of {source.repo}")


# -- reading ------------------------------------------------------------------------------------------------------------------


def _read(place: Place) -> Iterator[tuple[str, Any]]:
    """-> (where it stands, row)"""
    if place.suffix == ".jsonl":
        yield from _lines(place)
    elif place.suffix == ".parquet":
        yield from _table(place)
    else:
        found = _json(place)
        if not isinstance(found, list):
            raise ValueError(f"{place}: expected a list of rows, found {type(found).__name__}; this is not the official format")
        yield from ((f"{place}, row {number}", row) for number, row in enumerate(found, 1))


def _open(place: Place) -> IO[bytes]:
    """A stream of bounded size. A member is read within the archive: its name cannot lead anywhere, and no more is unpacked than it declares."""
    size = place.path.stat().st_size
    if place.member is None:
        stream: IO[bytes] = place.path.open("rb")
    else:
        try:
            archive = zipfile.ZipFile(place.path)
            size = archive.getinfo(place.member).file_size
            stream = archive.open(place.member)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
            raise ValueError(f"{place} cannot be unpacked ({error}); download it again, or unpack it yourself and pass the folder") from error
    if size > FILE_BYTES:
        stream.close()
        raise ValueError(f"{place} has {size} bytes, more than the {FILE_BYTES} that any published file has; this is not the official file")
    return stream


def _lines(place: Place) -> Iterator[tuple[str, Any]]:
    with _open(place) as stream:
        for number in count(1):
            where = f"{place}, line {number}"
            with _reading(where):
                line = stream.readline(LINE_BYTES + 1)
                if len(line) > LINE_BYTES:
                    raise ValueError(f"longer than {LINE_BYTES} bytes")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                row = json.loads(text) if text else None
            if not line:
                return
            if text:
                yield where, row


def _json(place: Place) -> Any:
    with _open(place) as stream, _reading(str(place)):
        return json.loads(stream.read())


@contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError, zipfile.BadZipFile, zlib.error, OSError, EOFError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:120]
        raise ValueError(f"{where}: cannot be read ({reason}); download the file again") from error


def _table(place: Place) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise ValueError(f"{place}: parquet needs pyarrow, which is not installed; run pip install 'longreach[eval]', or pass the file as jsonl") from error
    try:
        table = parquet.ParquetFile(place.path)
        declared = sum(table.metadata.row_group(i).total_byte_size for i in range(table.metadata.num_row_groups))
        if declared > FILE_BYTES:
            raise ValueError(f"{place} unpacks to {declared} bytes, more than the {FILE_BYTES} that any published file has; this is not the official file")
        number = 0
        for batch in table.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                yield f"{place}, row {number}", row
    except (ArrowInvalid, OSError) as error:
        raise ValueError(f"{place}: cannot be read as parquet ({' '.join(str(error).split())[:120]}); download the file again") from error
