"""docs/reproduce.md: every command is one that the command line understands, up to the model that it would load."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from longreach.cli import main

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = re.findall(r"^    (longreach eval .*)$", (ROOT / "docs/reproduce.md").read_text(encoding="utf-8"), re.M)


class Reached(ValueError):
    pass


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: shlex.split(c)[-1])
def test_commands_are_understood(command, tmp_path, monkeypatch, capsys):
    if " lm-eval " in command:
        pytest.importorskip("lm_eval")

    def load(*_: Any, **__: Any) -> Any:
        raise Reached("so far all was understood")

    monkeypatch.setattr("longreach.cli.common.load_model", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    words = []
    for word in shlex.split(command)[1:]:
        if word.endswith(".txt"):  # a text of one's own, or a pattern that the shell expands
            word = word.replace("*", "book")
            Path(word).parent.mkdir(parents=True, exist_ok=True)
            Path(word).write_text("A book.")
        words.append(word)
    assert main(words) == 2
    assert "so far all was understood" in capsys.readouterr().err


def test_there_are_commands():
    assert len(COMMANDS) > 15
