"""The command line: `longreach COMMAND`. Assembles one Typer app from one module per command and turns errors into sentences.

Knows the names of the commands and how errors leave the program; not what any command does. Command modules import PyTorch,
Transformers and matplotlib inside their functions, so that `longreach --help` is instant.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

# name -> module in this package whose function `command` it is; its docstring is the help. Order is that of --help.
# A module with a function `subcommands` is a group of commands.
COMMANDS = {
    "demo": "demo",
    "run": "run",
    "chat": "chat",
    "methods": "methods",
    "distances": "distances",
    "check": "check",
    "eval": "eval",
    "plan": "plan",
}
BAD_INPUT, INTERRUPTED = 2, 130
# Method parameters are not declared to Typer: they come from the dataclass of the chosen method, see parameters.py.
LENIENT = {"allow_extra_args": True, "ignore_unknown_options": True}
# Typer carries its own copy of click in newer releases, so its base error is reached through a name both have.
CommandLineError: type[Exception] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def build() -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_root)
    for name, module in COMMANDS.items():
        found = import_module(f"{__name__}.{module}")
        if hasattr(found, "subcommands"):
            app.add_typer(found.subcommands(), name=name)
            continue
        app.command(name, context_settings=LENIENT if getattr(found, "TAKES_METHOD_PARAMETERS", False) else {})(found.command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from longreach import __version__

        print(__version__)
        raise typer.Exit()


def _root(version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False) -> None:
    """A context far longer than a model was trained on, without training it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; -> the exit code: 0, 1 where a check failed, 2 for bad input, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    try:
        code: Any = typer.main.get_command(build()).main(args=given or ["--help"], prog_name="longreach", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except CommandLineError as error:
        return _refuse(_with_fix(error, given), as_json)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `longreach methods | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if "--verbose" in given:
            traceback.print_exc()
        return _refuse(str(error), as_json)
    except Exception as error:
        if memory_is_short(error):
            return _refuse(f"out of memory ({_first_line(error)}); use a smaller --context or --chunk-size, or --dtype bfloat16", as_json)
        if as_json:
            print(json.dumps({"error": f"{type(error).__name__}: {_first_line(error)}"}))
        raise


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
    sentence = " ".join(sentence.split())
    print(f"error: {sentence}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": sentence}, ensure_ascii=False))
    return BAD_INPUT
