"""Files that are there as a whole or as they were before: every page, picture, result and document is written here.

Knows paths and bytes, not what they mean; imports nothing of ours. The new content is written beside the file, reaches the disk, and takes its place
in one step. A symbolic link stays, and what it points to is replaced; a file that is replaced keeps its permissions.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FULL = "free some space and try again, or choose another place"


def write(path: str | Path, content: str | bytes, what: str = "file", full: str = FULL) -> None:
    """Text (as UTF-8, its line ends as they are) or bytes. `what` and `full`: see `place` and `said`."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    write_by(path, lambda part: part.write_bytes(data), what, full)


def write_by(path: str | Path, make: Callable[[Path], object], what: str = "file", full: str = FULL) -> None:
    """The same with what `make` writes into the path that it is given. Whatever it raises leaves the file as it was."""
    target = place(path, what)
    part = target.with_name(f".{target.name[:40]}.{secrets.token_hex(8)}.partial")
    with said(Path(path), full):
        try:
            part.touch(exist_ok=False)
            mode = (target if target.exists() else part).stat().st_mode
            make(part)
            with open(part, "rb+") as written:
                os.fsync(written.fileno())
            if part.stat().st_mode != mode:
                part.chmod(mode & 0o7777)
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def place(path: str | Path, what: str = "file", example: str | None = None) -> Path:
    """-> where the file lies, behind symbolic links. Raises ValueError, with the fix, where it cannot be written.

    what     what the sentence calls it: a picture, a document.
    example  a name for it, where a folder was given.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file" + (f", such as {Path(path) / example}" if example else ""))
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {str(target.parent)!r} for the {what}; create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ValueError(f"the folder {str(target.parent)!r} may not be written to; name a file in another one for the {what}")
    if os.path.lexists(target) and not target.is_file():  # a device or a pipe would be replaced
        raise ValueError(f"{str(path)!r} is not an ordinary file; name another one for the {what}")
    return target


@contextmanager
def said(path: Path, full: str = FULL) -> Iterator[None]:
    """A full disk, or a place that cannot be written, becomes a ValueError with a sentence. `full`: what to do where there is no space left."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error) or type(error).__name__).lower()
        fix = full if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO) else "choose another place"
        raise ValueError(f"{str(path)!r} cannot be written ({reason}); {fix}") from error


def folder(path: str | Path, what: str = "folder") -> Path:
    """-> the folder, behind symbolic links, which is made if there is none. Raises ValueError, with the fix, where it cannot be written to."""
    target = room_for(path, what)
    with said(Path(path)):
        target.mkdir(exist_ok=True)
    return target


def room_for(path: str | Path, what: str = "folder") -> Path:
    """The same without making it."""
    target = Path(os.path.realpath(path))
    if os.path.lexists(target) and not target.is_dir():
        raise ValueError(f"{str(path)!r} is a file, and a {what} is a folder; name another one, or remove the file first")
    above = target if target.is_dir() else target.parent
    if not above.is_dir():
        raise ValueError(f"there is no folder {str(above)!r} for the {what}; create it first")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"the folder {str(above)!r} may not be written to; choose another place for the {what}")
    return target


def sync(path: Path) -> None:
    """What was made, renamed or removed in a folder has reached the disk. Systems that do not open folders (Windows) do this by themselves."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def held(path: Path, shared: bool = False) -> Iterator[None]:
    """Inside, no other process that asks for the same folder writes to it (`shared`: others may read it too). Waits for them. A system or a file system
    without such locks has none: there two writers at the same time are the user's to prevent."""
    if fcntl is None:
        yield
        return
    with ExitStack() as stack:
        with suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
