"""The README's snippets run, its two commands are the ones the repository uses, and its picture and pages exist."""

from __future__ import annotations

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


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("longreach ")])
def test_commands_run(command):
    done = subprocess.run([sys.executable, "-m", "longreach.cli", *shlex.split(command)[1:]], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_first_command_answers_from_far_beyond_the_window():
    first = COMMANDS[0].split(" && ", 1)[1]
    done = subprocess.run([sys.executable, "-m", "longreach.cli", *shlex.split(first)[1:]], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    key = re.search(r"key is (\d+)", first)
    assert key and key[1] in done.stdout


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
