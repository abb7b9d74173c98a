"""The program itself: help, versions, bad arguments, interrupts and bugs; and that --help is instant."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import longreach
from commands import Run, refused
from longreach.cli import text
from longreach.cli.program import COMMANDS
from longreach.methods import registry


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["check", "--help"], ["serve", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = "{'torch', 'transformers', 'matplotlib', 'tokenizers', 'numpy', 'fastapi', 'uvicorn'}"
    found = python(f"import sys; from longreach.cli import main; code = main({arguments!r}); print(code, sorted({heavy} & set(sys.modules)), file=sys.stderr)")
    assert found.stderr.strip() == "0 []"
    assert "Usage: longreach" in found.stdout


def test_who_serves_nothing_needs_nothing_for_it() -> None:
    assert python("import sys, longreach; print(sorted({'fastapi', 'uvicorn', 'pydantic', 'longreach.serving'} & set(sys.modules)))").stdout.strip() == "[]"


def test_help_lists_every_command_and_no_arguments_are_help(run: Run) -> None:
    found = run()
    assert found.code == 0
    assert all(name in found.out for name in COMMANDS)
    assert "longreach methods" in " ".join(run("run", "--help").out.split())


def test_version(run: Run) -> None:
    assert run("--version").out.strip() == longreach.__version__


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "choose one of: demo, run, chat, serve, methods, distances, check"),
        (["distances"], "see longreach distances --help"),
        (["distances", "stock", "--length", "x"], "--length"),
        (["distances", "stock", "--length", 0], "must be a positive number of tokens"),
        (["distances", "stock", "--length", 5000], "between 1 and 4096"),
        (["distances", "--window", 4, "selfextend"], "name the method before its parameters"),
        (["distances", "selfextnd"], f"did you mean 'selfextend'? choose one of: {', '.join(registry())}"),
        (["distances", "selfextend"], "pass --group-size N --window N"),
        (["distances", "selfextend", "--group-size", 2], "selfextend needs --window"),
        (["distances", "selfextend", "--group-size", 0, "--window", 4], "at least 1"),
        (["distances", "selfextend", "--group-size", "two", "--window", 4], "--group-size must be of type int, not 'two'"),
        (["distances", "selfextend", "--group-size", 2, "--window"], "--window needs a value"),
        (["distances", "selfextend", "--group-size", 2, "--window", 4, "--window", 8], "--window is given twice"),
        (["distances", "selfextend", "--group-size", 2, "--window", 4, "--shift", "up"], "--shift must be one of floor | true_division"),
        (["distances", "selfextend", "--grup-size", 2, "--window", 4], "did you mean --group-size?"),
        (["distances", "lm-infinite", "--n-local", -1], "at least 1 and at most 4294967296, not -1"),
        (["distances", "lm-infinite", "--window", 4], "its parameters are: --n-local, --n-global"),
        (["distances", "lm-infinite", "--n-local", 4, "--distance-limit", 2, "--distance", "constant"], "needs distance_limit >= n_local"),
        (["distances", "stock", "7"], "unexpected argument '7'"),
        (["distances", "stock", "--png", "picture.svg"], "picture.png"),
        (["distances", "stock", "--png", "/no/such/folder/picture.png"], "create it first"),
        (["distances", "pi", "--factor", 2, "--trained-window", 64], "add --png FILE"),
        (["methods", "--markdown", "/no/such/page.md"], "there is no page"),
    ],
)
def test_bad_arguments(run: Run, arguments: list[object], says: str) -> None:
    refused(run, *arguments, says=says)


def test_an_interrupt_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "read", interrupt)
    found = run("run", "--prompt", "x")
    assert (found.code, found.out, found.err) == (130, "", "interrupted; nothing was kept\n")
    assert run("run", "--prompt", "x", "--json").json == {"error": "interrupted; nothing was kept"}


def test_a_bug_of_ours_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def bug(*_: object) -> str:
        raise AssertionError("ours")

    monkeypatch.setattr(text, "read", bug)
    with pytest.raises(AssertionError, match="ours"):
        run("run", "--prompt", "x", "--json")
    assert json.loads(capsys.readouterr().out) == {"error": "AssertionError: ours"}


@pytest.mark.parametrize("module", ["typer", "longreach.cli.program", "longreach.cli.console"])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_interrupt_while_the_program_is_loaded_is_one_line(module: str, more: list[str]) -> None:
    found = python(f"""
import sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
from longreach.cli import main
sys.exit(main(["methods", *{more!r}]))""")
    assert (found.returncode, found.stderr) == (130, "interrupted; nothing was kept\n")
    assert found.stdout == ("" if not more else '{"error": "interrupted; nothing was kept"}\n')
