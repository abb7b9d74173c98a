"""A run as pictures and tables see it: its label, its records, its rows of numbers, its curve."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import Any

from longreach.evals.results import Folder, Record, Row


@dataclass(frozen=True)
class View:
    """`curve` are the rows of curves.csv: position, mean, var, count."""

    label: str
    run: dict[str, Any]
    records: list[Record]
    rows: list[Row]
    curve: list[tuple[int, float, float, int]]

    @property
    def window(self) -> int | None:
        return self.run.get("extension", {}).get("trained_window")

    def metric(self, task: str) -> str:
        return str(self.run.get("tasks", {}).get(task, {}).get("metric", "accuracy"))


def view(folder: Folder, label: str | None = None) -> View:
    run = folder.run
    method = run.get("config", {}).get("method_text")
    curve: list[tuple[int, float, float, int]] = []
    if (path := folder.path / "curves.csv").is_file():
        with open(path, encoding="utf-8", newline="") as stream:
            curve = [(int(row["position"]), float(row["mean"]), float(row["var"]), int(row["count"])) for row in csv.DictReader(stream)]
    return View(label or f"{folder.path.name}" + (f": {method}" if method else ""), run, folder.records(), folder.metrics(), curve)
