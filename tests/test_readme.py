"""The README's snippets run, its two commands are the ones the repository uses, and its picture and pages exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.strip().splitlines()]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.splitlines()[-1][:40])
def test_python_snippets_run(snippet):
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("longreach ", "echo "))])
def test_commands_run(command, tmp_path):
    done = subprocess.run(installed(command), shell=True, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if number := re.search(r"--hide \"[^\"]*? is (\d+)", command):
        assert number[1] in done.stdout


def installed(command: str) -> str:
    """The same command through the interpreter that runs the tests."""
    return command.replace("longreach ", f"{shlex.quote(sys.executable)} -m longreach.cli ", 1)


def test_the_first_command_shows_who_finds_what(tmp_path):
    first = COMMANDS[0].split(" && ", 1)[1]
    done = subprocess.run(shlex.split(installed(f"{first} --json")), cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    far = {name: [r["found"] for r in result["trials"] if r["method"] == name and r["distance"] > result["window"]] for name in result["methods"]}
    assert sum(far["selfextend"]) >= 0.7 * len(far["selfextend"]) > 0
    assert sum(far["lm-infinite"]) == 0  # what has left its window is gone
    long = [r["found"] for r in result["trials"] if r["method"] == "stock" and r["length"] >= 4 * result["window"] and r["distance"] > result["window"]]
    assert sum(long) <= 0.2 * len(long)
    losses = {name: sum(curve[8:16]) / 8 for name, curve in result["loss"]["methods"].items()}  # the same text for all
    assert losses["stock"] > losses["selfextend"] + 0.15 and losses["stock"] > losses["lm-infinite"] + 0.15
    assert (tmp_path / "longreach-demo.png").stat().st_size > 10_000


def test_the_two_commands_come_first_and_agree_with_ci():
    install, test = COMMANDS[:2]
    assert install.startswith("pip install -c constraints.txt . && longreach ")
    assert test == "pip install -c constraints.txt '.[dev]' && pytest"
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "-c constraints.txt '.[dev]'" in script and "pytest" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
