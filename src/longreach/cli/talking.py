"""A conversation at a terminal, or with one question a line on standard input: where lines come from, and what ends it.

Knows lines, commands that begin with a slash, and interrupts; not who answers.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from typing import Any

from longreach.cli.console import Output
from longreach.quantities import counted

HINT = "/help lists the commands, /quit or Ctrl-D ends"
LEAVING = "Ctrl-C again leaves, and so do /quit and Ctrl-D; during an answer Ctrl-C stops the answer only"
QUIT = ("/quit", "/exit")


def converse(
    out: Output,
    lines: Iterable[str],
    asking: bool,
    ask: Callable[[str], dict[str, Any] | None],
    obey: Callable[[str, str], None],
    kept: Callable[[str], str] = lambda answered: f"{answered}, the conversation is not saved",
) -> tuple[list[dict[str, Any]], str | None]:
    """Questions and commands until one ends it -> the turns as plain data, and what went wrong. At a terminal nothing but the user ends it; where
    questions are piped in, nobody would see what the first wrong line did to those after it, so it is the last.

    asking  at a terminal.
    ask     a question -> its turn, None where it was given up.
    obey    the name of a command, and what follows it.
    kept    how many questions are answered -> what is said where the program is interrupted.
    """
    turns: list[dict[str, Any]] = []
    try:
        for line in lines:
            name, _, rest = line.partition(" ")
            if name in QUIT:
                break
            try:
                if name.startswith("/"):
                    obey(name, rest.strip())
                elif (found := ask(line)) is not None:
                    turns.append(found)
            except (ValueError, OSError) as error:
                if not asking or isinstance(error, BrokenPipeError):
                    raise
                out.error(" ".join(str(error).split()))
            except KeyboardInterrupt:  # in the work of a command, which is put back; an answer has its own way to stop
                if not asking:
                    raise
                out.note(f"\n{name if name.startswith('/') else 'the question'} is given up; the conversation goes on")
            out.kept = kept(f"{counted(len(turns), 'question')} answered")
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        wrong = " ".join(str(error).split())
        out.error(wrong)
        return turns, wrong
    return turns, None


def help_lines(commands: dict[str, str]) -> str:
    width = max(map(len, commands))
    return "\n".join(f"{usage.ljust(width)}  {meaning}" for usage, meaning in commands.items())


def questions(out: Output, asking: bool) -> Iterator[str]:
    """Lines that are not empty, until the input ends. Ctrl-C at the prompt gives a line up; twice in a row it leaves."""
    if asking:
        import readline  # noqa: F401  gives input() a history and editing
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    pressed = False
    while True:
        try:
            line = _typed(out) if asking else sys.stdin.readline()
        except KeyboardInterrupt:
            if not asking or pressed:
                raise
            pressed = True
            out.note(f"\n{LEAVING}")
            continue
        except UnicodeDecodeError:
            raise ValueError("a question on standard input is not UTF-8 text; convert it to UTF-8 first") from None
        pressed = False
        if not line:
            return
        if line.strip():
            yield line.strip()


def _typed(out: Output) -> str:
    """A line from the terminal; the prompt shows in quiet mode too. Python edits lines only where it sees the real standard output."""
    prompt = "\n> "
    if not out.stdout.isatty():
        out.errors.file.write(prompt)
        out.errors.file.flush()
        prompt = ""
    try:
        with redirect_stdout(out.stdout):
            return input(prompt) + "\n"
    except EOFError:
        return ""
