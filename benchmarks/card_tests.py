"""A pytest plugin for card.py: every test's result is a line of a file at once, and tests with a line there are not run again.

An error of the card fails everything after it in the same process, so the process ends there, and the next one goes on with the other tests.
Knows pytest only; importing it must not touch the card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CARD_ERROR = re.compile(r"CUDA (driver )?error|CUBLAS_STATUS|CUDNN_STATUS|cuDNN error|device-side assert|illegal memory access|AcceleratorError")
ENDED = "ended the process"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="file of results, a JSON object for every beginning and every end of a test")
    parser.addoption("--only", help="the id of the one test to run")


def pytest_configure(config: pytest.Config) -> None:
    if record := config.getoption("--record"):
        config.pluginmanager.register(Recorder(record), "card-record")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if only := config.getoption("--only"):
        keep(config, items, lambda name: name == only)


def keep(config: pytest.Config, items: list[pytest.Item], wanted: Callable[[str], bool]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item.nodeid)])
    items[:] = [item for item in items if wanted(item.nodeid)]


class Recorder:
    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        known = read(self.file)
        keep(config, items, lambda name: name not in known)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write({"test": nodeid, "outcome": ENDED})  # true until the next line

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        said = "\n".join(line for line in report.longreprtext.splitlines() if line.startswith("E "))
        of_card = report.failed and bool(CARD_ERROR.search(said))
        self.write({"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3), "card_error": of_card})
        if of_card:
            self.session.shouldstop = "the card failed; what follows would fail with it"

    def write(self, line: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def read(file: Path) -> dict[str, dict[str, Any]]:
    """The last line of every test, by its id."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {line["test"]: line for line in map(json.loads, lines)}
