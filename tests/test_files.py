"""A file is there as a whole or as it was before: through kills, full disks, links, and several writers at once."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from longreach import files

OLD, NEW = "old\n" * 10, "new\n" * 100_000


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(OLD)
    return path


def only(path: Path) -> bool:
    """Whether nothing was left beside it."""
    return [each.name for each in path.parent.iterdir()] == [path.name]


def test_text_bytes_and_what_a_function_writes(target: Path):
    files.write(target, "Grüße\r\nЖ\n")
    assert target.read_bytes() == "Grüße\r\nЖ\n".encode() and only(target)
    files.write(str(target), b"\x00\xff")
    assert target.read_bytes() == b"\x00\xff" and only(target)
    files.write_by(target, lambda part: part.write_text(f"{part.parent == target.parent}"))
    assert target.read_text() == "True" and only(target)


def test_a_name_as_long_as_a_file_system_takes(tmp_path: Path):
    path = tmp_path / ("ä" * 127)
    files.write(path, "x")
    assert path.read_text() == "x" and only(path)


@pytest.mark.parametrize("problem", [KeyboardInterrupt, RuntimeError])
def test_what_goes_wrong_in_the_middle_leaves_the_file_as_it_was(target: Path, problem: type[BaseException]):
    def half(part: Path) -> None:
        part.write_text("half")
        raise problem

    with pytest.raises(problem):
        files.write_by(target, half)
    assert target.read_text() == OLD and only(target)


def test_a_kill_in_the_middle_leaves_the_file_as_it_was(target: Path):
    code = """if True:
        import sys, time
        from longreach import files
        files.write_by(sys.argv[1], lambda part: (part.write_text('half'), print('!', flush=True), time.sleep(60)))"""
    child = subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert child.stdout is not None and child.stdout.readline() == b"!\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert target.read_text() == OLD
    files.write(target, NEW)  # and what was left behind is in nobody's way
    assert target.read_text() == NEW


def test_a_full_disk_leaves_the_file_as_it_was(target: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(ValueError, match=rf"^'{target}' cannot be written \(file too large\); free some space and try again, or choose another place$"):
            files.write(target, NEW)
        with pytest.raises(ValueError, match=r"; go on later$"):
            files.write(target, NEW, full="go on later")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert target.read_text() == OLD and only(target)


def test_it_is_on_the_disk_before_it_takes_its_place(target: Path, monkeypatch: pytest.MonkeyPatch):
    """What is on the disk first is what a crash of the machine leaves."""
    done: list[str] = []
    replace, fsync = os.replace, os.fsync

    def noted_fsync(number: int) -> None:
        done.append(f"{os.fstat(number).st_size} bytes on the disk")
        fsync(number)

    def noted_replace(part: Any, to: Any) -> None:
        done.append("in place")
        replace(part, to)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.write(target, NEW)
    assert done == [f"{len(NEW)} bytes on the disk", "in place"]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path):
    (tmp_path / "far").mkdir()
    real, link, dangling = tmp_path / "far" / "page", tmp_path / "link", tmp_path / "dangling"
    real.write_text(OLD)
    link.symlink_to(Path("far") / "page")
    files.write(link, "new")
    assert link.is_symlink() and real.read_text() == "new" and only(real)
    dangling.symlink_to(tmp_path / "far" / "page2")
    files.write(dangling, "second")
    assert dangling.is_symlink() and (tmp_path / "far" / "page2").read_text() == "second"


def test_permissions(target: Path):
    target.chmod(0o640)
    files.write(target, "new")
    assert target.stat().st_mode & 0o7777 == 0o640
    before = os.umask(0o027)
    try:
        files.write(target.with_name("fresh"), "new")
        files.write_by(target.with_name("private"), lambda part: (part.unlink(), part.touch(0o600)))  # as some libraries write
    finally:
        os.umask(before)
    assert {target.with_name(name).stat().st_mode & 0o7777 for name in ("fresh", "private")} == {0o640}


def test_places_that_cannot_be(tmp_path: Path):
    (tmp_path / "pipe").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, says in (
        ("", f"^'{tmp_path}' is a folder; name a file$"),
        ("none/x", f"^there is no folder '{tmp_path}/none' for the picture; create it first$"),
        ("pipe", "pipe' is not an ordinary file; name another one for the picture$"),
        ("loop", "loop' is not an ordinary file; name another one for the picture$"),
    ):
        with pytest.raises(ValueError, match=says):
            files.write(tmp_path / name, "x", "picture")
    with pytest.raises(ValueError, match=f"name a file, such as {tmp_path}/page.html$"):
        files.place(tmp_path, "page", "page.html")
    assert files.place(tmp_path / "x") == tmp_path / "x" and not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"^'/proc/x' (cannot be written \(.*\); choose another place|may not be written to.*)$"):
        files.write("/proc/x", "x")


def test_several_writers_at_once_leave_one_whole_file(target: Path):
    contents = {letter * 200_000 for letter in "abcd"}
    seen, stop = [], threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.append(target.read_text())
            time.sleep(0.001)

    reader = threading.Thread(target=look)
    writers = [threading.Thread(target=lambda c=content: [files.write(target, c) for _ in range(5)]) for content in contents]
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert target.read_text() in contents and set(seen) <= {OLD, *contents} and only(target)


def test_folders_are_made_once_and_held_by_one_writer(tmp_path):
    made = files.folder(tmp_path / "d")
    assert made == (tmp_path / "d").resolve() and made.is_dir() and files.folder(tmp_path / "d") == made
    (tmp_path / "link").symlink_to(made)
    assert files.folder(tmp_path / "link") == made
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file, and a document is a folder"):
        files.folder(tmp_path / "file", "document")
    with pytest.raises(ValueError, match="create it first"):
        files.room_for(tmp_path / "no" / "d")
    assert not files.room_for(tmp_path / "new").exists()
    files.sync(made)
    done = []
    with files.held(made, shared=True), files.held(made, shared=True):

        def write() -> None:
            with files.held(made):
                done.append(1)

        writer = threading.Thread(target=write)
        writer.start()
        writer.join(0.2)
        assert not done
    writer.join()
    assert done == [1]
