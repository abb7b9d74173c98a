"""Files that a command is to write: refused before the work where they could not be written, or are not ours to replace.

Knows files and how to tell that Longreach wrote one; not what is in them. A file that Longreach wrote may be replaced; any other needs --force.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from longreach import files
from longreach.cli.console import Output

HEAD = 4096  # bytes in which a page says who wrote it


@dataclass(frozen=True)
class Kind:
    """What a file is called in sentences, an example of a name, how one of ours is recognised, and whether it is a folder."""

    name: str
    example: str
    ours: Callable[[Path], bool]
    folder: bool = False


def check(out: Output, path: Path, kind: Kind, force: bool | None) -> None:
    """Refuses a file that is not to be written; says so where one of ours will be replaced. `force` None: there is no such option here."""
    refuse(path, kind, force)
    if path.exists() and not force and kind.ours(path):
        out.note(f"{path} is a {kind.name} that Longreach wrote, and will be replaced")


def refuse(path: Path, kind: Kind, force: bool | None) -> None:
    """Raises ValueError, with the fix, where the file could not be written or is somebody else's."""
    there = (files.room_for(path, kind.name) if kind.folder else files.place(path, kind.name, kind.example)).exists()
    if kind.folder and there and not any(path.iterdir()):
        return
    if there and not force and not kind.ours(path):
        another = "name another folder" if kind.folder else "name another file"
        fix = another if force is None or kind.folder else f"{another}, or pass --force to overwrite it"
        raise ValueError(f"{str(path)!r} exists and is no {kind.name} that Longreach wrote; {fix}")


def check_picture(out: Output, png: Path | None, force: bool, option: str = "--png") -> None:
    """The same for --png, or another option for a picture."""
    if png is None:
        return
    if png.suffix.lower() != ".png" and not png.is_dir():
        raise ValueError(f"{option} writes a PNG picture; name the file {png.with_suffix('.png')}")
    check(out, png, PICTURE, force)


def _is_document(path: Path) -> bool:
    """Or what is left of one whose first save was broken off."""
    from longreach.hf import documents
    from longreach.memory import sealed

    try:
        documents.facts(path) if (path / sealed.MANIFEST).exists() else documents.writable(path)
    except (ValueError, OSError):
        return False
    return True


def _is_picture(path: Path) -> bool:
    from PIL import Image

    from longreach.drawing.canvas import SIGNATURE

    try:
        with Image.open(path) as opened:
            return all(opened.info.get(name) == text for name, text in SIGNATURE.items())
    except (OSError, ValueError, SyntaxError):
        return False


def _begins_with(*words: str) -> Callable[[Path], bool]:
    """Whether a page names one of us at its beginning."""

    def found(path: Path) -> bool:
        with open(path, "rb") as stream:
            head = stream.read(HEAD)
        return any(word.encode() in head for word in words)

    return found


def _is_result(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and "longreach" in found


def _is_profile(path: Path) -> bool:
    from longreach.planning.profile import Profile

    try:
        Profile.read(path)
    except ValueError:
        return False
    return True


DOCUMENT = Kind("document", "book", _is_document, folder=True)
PICTURE = Kind("picture", "picture.png", _is_picture)
NUMBERS = Kind("csv of a picture", "picture.csv", lambda path: _is_picture(path.with_suffix(".png")))
RESULT = Kind("file of results", "results.json", _is_result)
PROFILE = Kind("profile", "profile.json", _is_profile)
FAMILIES_PAGE = Kind("page", "families.md", _begins_with("longreach check --all"))
REPORT_PAGE = Kind("page", "report.html", _begins_with("<meta name=generator content=longreach>"))
ATTRIBUTION_PAGE = Kind("page", "attribution.html", REPORT_PAGE.ours)
REPORT_TABLES = Kind("page", "report.md", _begins_with("longreach eval report"))
