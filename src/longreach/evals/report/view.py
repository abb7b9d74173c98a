"""A run as pictures and tables see it: its label, its records, its rows of numbers, its curve."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from longreach.drawing.canvas import cycle
from longreach.evals.harness.results import Folder, Record, Row


@dataclass(frozen=True)
class View:
    """`curve` are the rows of curves.csv: position, mean, var, count."""

    label: str
    run: dict[str, Any]
    records: list[Record]
    rows: list[Row]
    curve: list[tuple[int, float, float, int]]

    @property
    def name(self) -> str:
        """The model and its method: runs that share them share a colour."""
        config = self.run.get("config", {})
        return f"{config.get('model')} {config.get('method_text')}"

    @property
    def window(self) -> int | None:
        return self.run.get("extension", {}).get("trained_window")

    def metric(self, task: str) -> str:
        return str(self.run.get("tasks", {}).get(task, {}).get("metric", "accuracy"))


def coloured(views: Sequence[View], shown: Callable[[View], Any]) -> list[tuple[View, str]]:
    """The runs that have something to show, each with the colour that it has in every picture of these runs."""
    names = list(dict.fromkeys(v.name for v in views))
    colours = dict(zip(names, cycle(len(names))))
    return [(v, colours[v.name]) for v in views if shown(v)]


def view(folder: Folder, label: str | None = None) -> View:
    run = folder.run
    method = run.get("config", {}).get("method_text")
    curve: list[tuple[int, float, float, int]] = []
    if (path := folder.path / "curves.csv").is_file():
        with open(path, encoding="utf-8", newline="") as stream:
            curve = [(int(row["position"]), float(row["mean"]), float(row["var"]), int(row["count"])) for row in csv.DictReader(stream)]
    return View(label or f"{folder.path.name}" + (f": {method}" if method else ""), run, folder.records(), folder.metrics(), curve)
