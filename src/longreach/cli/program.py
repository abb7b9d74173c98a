"""The program behind `longreach COMMAND`: assembles one Typer app from one module per command and turns errors into sentences.

Knows the names of the commands and how errors leave the program; not what any command does. Command modules import PyTorch,
Transformers and matplotlib inside their functions, so that `longreach --help` is instant.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer

from longreach.cli.console import NOTHING, Interrupted, ReaderGone, as_line

# name -> module in this package whose function `command` it is; its docstring is the help. Order is that of --help.
# A module with a function `subcommands` is a group of commands.
COMMANDS = {
    "demo": "demo",
    "run": "run",
    "chat": "chat",
    "serve": "serve",
    "methods": "methods",
    "distances": "distances",
    "check": "check",
    "eval": "eval",
    "tune": "tune",
    "rag": "rag",
    "attribute": "attribute",
    "plan": "plan",
}
BAD_INPUT, INTERRUPTED = 2, 130
MAY_BE_EMPTY = ("--prompt", "-p", "--system")  # a template may treat an empty system message differently from none
# Method parameters are not declared to Typer: they come from the dataclass of the chosen method, see parameters.py.
LENIENT = {"allow_extra_args": True, "ignore_unknown_options": True}
# Typer carries its own copy of click in newer releases, so its base error is reached through a name both have.
CommandLineError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def build() -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_root)
    for name, module in COMMANDS.items():
        found = import_module(f"longreach.cli.{module}")
        if hasattr(found, "subcommands"):
            app.add_typer(found.subcommands(), name=name)
            continue
        app.command(name, context_settings=LENIENT if getattr(found, "TAKES_METHOD_PARAMETERS", False) else {})(found.command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from longreach.version import __version__

        print(__version__)
        raise typer.Exit()


def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False) -> None:
    """A context far longer than a model was trained on, without training it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; -> the exit code: 0, 1 where a check failed, 2 for bad input, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        open_streams()
        refuse_empty(given)
        code: Any = typer.main.get_command(build()).main(args=given or ["--help"], prog_name="longreach", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:  # outside of a command's work
            return _end(f"interrupted; {NOTHING}", as_json, INTERRUPTED)
        return code if isinstance(code, int) else 0
    except CommandLineError as error:
        return _refuse(_with_fix(error, given), as_json)
    except Interrupted as stop:
        return _end(f"interrupted; {stop}", as_json, INTERRUPTED)
    except (KeyboardInterrupt, typer.Abort):
        return _end(f"interrupted; {NOTHING}", as_json, INTERRUPTED)
    except (ReaderGone, BrokenPipeError):  # there is nobody to tell
        silence()
        return 0
    except (ValueError, OSError) as error:
        if "--verbose" in given:
            traceback.print_exc()
        return _refuse(_sentence(error), as_json)
    except Exception as error:
        if memory_is_short(error):
            return _refuse(f"out of memory ({_first_line(error)}); use a smaller --context or --chunk-size, or --dtype bfloat16", as_json)
        if as_json:
            print(json.dumps({"error": f"{type(error).__name__}: {_first_line(error)}"}))
        raise


def open_streams() -> None:
    """Every stream takes any text, and a closed one stays out of the way. Raises ValueError where there is nowhere to write results."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would be taken for the closed stream
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    if sys.stdout is None:
        raise ValueError("standard output is closed; leave it open, or send it to /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may lack the characters of an answer
            stream.reconfigure(errors="backslashreplace")


def silence() -> None:
    """What is still buffered goes nowhere, so that the end of the program does not stumble over it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def refuse_empty(given: list[str]) -> None:
    """An empty value is a shell variable that was not set, more often than a wish."""
    for option, value in zip(given, [*given[1:], None]):
        name, equals, rest = option.partition("=")
        if re.fullmatch(r"--?[a-z][a-z-]*", name) and name not in MAY_BE_EMPTY and ((equals and not rest) or value == ""):
            raise ValueError(f"{name} is given an empty value; give it one, or leave it out")


def _sentence(error: Exception) -> str:
    """The system's own errors have words, but no sentence."""
    if isinstance(error, OSError) and error.strerror and error.errno is not None:
        if error.filename is None:
            return f"the output could not be written ({error.strerror}); send it elsewhere, or make room for it"
        return f"{str(error.filename)!r} could not be read or written ({error.strerror}); look at its path, its permissions and the space that is left"
    return str(error)


def _with_fix(error: Exception, given: list[str]) -> str:
    """Typer's own sentence, and where to look."""
    sentence = str(error.format_message()).rstrip(".").replace("Value error, ", "")  # type: ignore[attr-defined]
    if given[0] in COMMANDS:
        context = getattr(error, "ctx", None)
        return f"{sentence}; see {context.command_path if context else f'longreach {given[0]}'} --help"
    return f"{sentence}; choose one of: {', '.join(COMMANDS)}"


def memory_is_short(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _refuse(sentence: str, as_json: bool) -> int:
    """One clear sentence on standard error; with --json also one object on standard output."""
    return _end(f"error: {sentence}", as_json, BAD_INPUT)


def _end(sentence: str, as_json: bool, code: int) -> int:
    sentence = " ".join(sentence.split())
    try:
        print(sentence, file=sys.stderr)
        if as_json and sys.stdout is not None:
            sys.stdout.write(as_line({"error": sentence.removeprefix("error: ")}, sys.stdout))
            sys.stdout.flush()
    except OSError:  # nobody is there to read it
        silence()
    return code
