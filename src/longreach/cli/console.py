"""What reaches which stream: results, notes, warnings and progress; and how a command ends that is interrupted.

Knows terminals, streams and signals; not models, methods or what a command computes. Imports nothing heavy at the top.
"""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import IO, Any, Protocol

from rich.console import Console

from longreach.quantities import counted

LONG = 2048  # tokens from which progress is shown
LINE_EVERY = 10.0  # seconds between lines of progress where there is no terminal
NOTHING = "nothing was kept"


class Interrupted(Exception):
    """Ctrl-C while a command ran; the message says what was kept."""


class ReaderGone(Exception):
    """Whoever read standard output or standard error has gone, as in `longreach methods | head -1`."""


class Terminal(Console):
    """A console whose reader may go away: Rich would end the program there and then."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Discard(io.TextIOBase):
    """Where the prints, logs and bars of the libraries go."""

    encoding = "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


class Update(Protocol):
    """How far a piece of work is, and what is being done."""

    def __call__(self, done: int, what: str | None = None) -> None: ...


@dataclass
class Output:
    """Where a command writes. `stdout` and `errors` are the real streams; whatever else prints goes to neither, or with --verbose to standard error."""

    as_json: bool
    stdout: IO[str]
    errors: Console
    quiet: bool = False
    kept: str = NOTHING  # what is said where the command is interrupted; commands keep it true

    @property
    def tables(self) -> Console:
        return Terminal(file=self.stdout, highlight=False, markup=False)  # what is printed may hold brackets of its own

    def note(self, text: str) -> None:
        """A line for people, on standard error in both modes."""
        if not self.quiet:
            self.say(text)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def error(self, sentence: str) -> None:
        """An error that does not end the command."""
        self.say(f"error: {sentence}")

    def say(self, text: str) -> None:
        """A line on standard error in every mode: what somebody asked for."""
        self.errors.print(text, soft_wrap=True)

    def aside(self, renderable: Any) -> None:
        """A table for people, on standard error."""
        if not self.quiet:
            self.errors.print(renderable)

    @contextmanager
    def bars(self) -> Iterator[None]:
        """Lets the bars of a library through where they are the progress of ours, at a terminal."""
        with redirect_stderr(self.errors.file) if self.errors.is_terminal and not self.quiet else nullcontext():
            yield

    def write(self, part: str) -> None:
        """A part of an answer as it comes, on standard output; nothing in JSON mode."""
        if not self.as_json and part:
            self.stdout.write(part)
            self.stdout.flush()

    def finish(self, result: dict[str, Any], show: Callable[[Console], None]) -> None:
        """The result: one JSON object, or what `show` prints."""
        if self.as_json:
            self.stdout.write(as_line(result, self.stdout))
            self.stdout.flush()
        else:
            show(self.tables)


def as_line(result: dict[str, Any], stream: IO[str]) -> str:
    """One object on one line, in ASCII where the stream has no other characters."""
    return json.dumps(result, ensure_ascii=not (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf"), allow_nan=False) + "\n"


@contextmanager
def output(as_json: bool, verbose: bool = False, quiet: bool = False) -> Iterator[Output]:
    """Streams of one command. What libraries print is seen with --verbose only, on standard error, and never on standard output.

    Raises Interrupted for Ctrl-C, and ReaderGone for a broken pipe.
    """
    if verbose and quiet:
        raise ValueError("--verbose and --quiet contradict each other; leave out one")
    found = Output(as_json, sys.stdout, Terminal(stderr=True, file=sys.stderr, highlight=False, markup=False), quiet)
    others: Any = sys.stderr if verbose else Discard()
    try:
        with redirect_stdout(others), redirect_stderr(others), warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")  # ours are in the report of an extension, and printed from there
            else:
                logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
            yield found
    except KeyboardInterrupt:
        raise Interrupted(found.kept) from None
    except BrokenPipeError:  # Typer has an answer of its own to this one
        raise ReaderGone from None


@contextmanager
def quiet_transformers(verbose: bool) -> Iterator[None]:
    """No logs and progress bars of Transformers and of what it imports, unless wanted."""
    import huggingface_hub  # noqa: F401  sets the level of its own logger when it is imported, so that comes first
    from transformers.utils import logging as library

    others = [logging.getLogger(name) for name in ("huggingface_hub", "torchao", "torch.utils._pytree")]
    level, levels, bars = library.get_verbosity(), [other.level for other in others], library.is_progress_bar_enabled()
    if not verbose:
        library.set_verbosity(library.CRITICAL)
        for other in others:
            other.setLevel(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        for other, before in zip(others, levels, strict=True):
            other.setLevel(before)
        if bars:
            library.enable_progress_bar()


# -- progress -------------------------------------------------------------------------------------------------------------------------


class Pace:
    """Tells when another line is due where there is no terminal."""

    def __init__(self, at_once: bool = False) -> None:
        self.started = time.monotonic()
        self.next = self.started if at_once else self.started + LINE_EVERY

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def due(self) -> bool:
        now = time.monotonic()
        if now < self.next:
            return False
        self.next = now + LINE_EVERY
        return True


@contextmanager
def progress_bar(out: Output, tokens: int, what: str = "reading", unit: str = "token", least: int | None = None) -> Iterator[Update]:
    """While many tokens (or other things) are read: a bar that is gone afterwards, or a line now and then where standard error is no terminal."""
    if tokens < (LONG if least is None else least) or out.quiet:
        yield lambda done, what=None: None
    elif not out.errors.is_terminal:
        yield _lines(out, tokens, what, unit)
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(f"{unit}s"), TimeRemainingColumn()
        with Progress(*columns, console=out.errors, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
            task = bar.add_task(what, total=tokens)

            def update(done: int, what: str | None = None) -> None:
                bar.update(task, completed=done, description=what)
                if done >= tokens - 1:  # the last token of a prompt is read with the first new one
                    bar.stop()

            yield update


def _lines(out: Output, tokens: int, what: str, unit: str) -> Update:
    pace, doing = Pace(), what

    def update(done: int, what: str | None = None) -> None:
        if done and pace.due():
            left = duration(pace.seconds * (tokens - done) / done)
            out.note(f"{what or doing}: {done} of {counted(tokens, unit)} ({100 * done // tokens} %), about {left} left")

    return update


def duration(seconds: float) -> str:
    """Time for people."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"


# -- interrupts -----------------------------------------------------------------------------------------------------------------------


@contextmanager
def stopping_gently() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the given function true, so that work can end where it is consistent; a second one interrupts."""
    pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
