"""What README.md shows is what happens: its snippet prints its answer, its two commands are the repository's, its numbers are those of the results.

The same for the pages that README hands over to: the commands of docs/commands.md run, the tables of docs/results.md and docs/nano.md are those of
benchmarks/results, and every link of every page leads somewhere.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longreach.cli import main
from scripts import scripts

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TOUR = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.S)


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.strip().splitlines()]


def installed(command: str) -> str:
    """The same command through the interpreter that runs the tests."""
    return command.replace("longreach ", f"{shlex.quote(sys.executable)} -m longreach.cli ", 1)


def test_the_snippet_prints_the_answer_that_is_shown(tmp_path):
    [snippet], [shown] = blocks(README, "python"), blocks(README, "text")
    more = "print(inputs['input_ids'].shape[1], extension.method.name)\nassert extension.describe()\nextension.remove()"
    done = subprocess.run([sys.executable, "-c", f"{snippet}\n{more}"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tokens = re.search(r"# (\d+) tokens$", snippet, re.M)
    assert tokens and 7 * 512 < int(tokens[1]) <= 4096
    assert done.stdout == f"{shown}{tokens[1]} selfextend\n"
    key = re.search(r"key is (\d+)\.", snippet)
    assert key and f"extended: ' {key[1]}'" in shown and shown.count(key[1]) == 1  # stock does not find it


@pytest.mark.parametrize("command", commands(TOUR))
def test_the_commands_of_the_tour_run(command, tmp_path):
    done = subprocess.run(installed(command), shell=True, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if number := re.search(r"--hide \"[^\"]*? is (\d+)", command):
        assert number[1] in done.stdout


def test_the_tour_names_every_command(capsys):
    assert main(["--help"]) == 0
    assert sorted(re.findall(r"^\| `longreach ([\w-]+)`", TOUR, re.M)) == sorted(re.findall(r"^│ ([a-z]+) {2,}\S", capsys.readouterr().out, re.M))
    assert len(commands(TOUR)) >= 5


def test_the_first_command_shows_who_finds_what(tmp_path):
    first = commands(README)[0].split(" && ", 1)[1]
    done = subprocess.run(shlex.split(installed(f"{first} --keys 1 --json")), cwd=tmp_path, capture_output=True, text=True, timeout=900)
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


def test_the_two_commands_are_those_of_ci_and_the_page_is_short():
    install, test = commands(README)
    assert install == "pip install -c constraints.txt . && longreach demo"
    assert test == "pip install -c constraints.txt '.[dev]' && pytest"
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "-c constraints.txt '.[dev]'" in script and "pytest" in script
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert len(README.splitlines()) <= 120


@pytest.fixture(scope="module")
def tables() -> Any:
    """The functions of the benchmarks that write tables."""
    found = scripts("benchmarks", "methods_result", "nano_reach")
    return found.methods_result, found.nano_reach


def section(page: str, name: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8").split(f"<!-- begin {name} -->\n")[1].split(f"\n<!-- end {name} -->")[0]


def test_the_tables_are_those_of_the_results(tables):
    methods_result, nano_reach = tables
    read = lambda name: json.loads((ROOT / "benchmarks/results" / name).read_text(encoding="utf-8"))  # noqa: E731
    reach = read("nano-reach.json")
    assert section("README.md", "reach") == nano_reach.summary(reach)
    assert section("docs/nano.md", "reach") == nano_reach.page(reach)
    assert section("docs/results.md", "methods") == methods_result.tables(read("methods-on-nano.json"))


def test_the_files_that_the_design_names_exist():
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([\w/]+\.py)`", text) if "/" in name}
    missing = [name for name in named if not (ROOT / "src/longreach" / name).exists()]
    assert len(named) > 10 and not missing
    rooms = re.findall(r"^    ([a-z_]+)(?:/|\.py) ", text, re.M)
    here = {path.stem for path in (ROOT / "src/longreach").iterdir() if not path.name.startswith("_")}
    assert len(rooms) > 10 and set(rooms) <= here and len(text.splitlines()) <= 110


def anchors(text: str) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads} | set(re.findall(r'<a id="([^"]+)"', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", text) + [(source, "") for source in re.findall(r'<img src="([^"]+)"', text)]
    for target, anchor in links:
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{target}#{anchor}"
