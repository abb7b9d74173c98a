"""Pictures that belong to one method or to one benchmark: SelfExtend's group size by neighbour window, LongBench by category and by bins of length.

Knows runs as `figures.View` shows them, and how these two are put together; like figures.py, each picture has the csv of its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from longreach.drawing import canvas
from longreach.drawing.canvas import Picture
from longreach.evals.harness.results import Record
from longreach.evals.report.view import View, coloured
from longreach.methods.selfextend import SelfExtend

PANELS = 4
TRUSTED = 2 / 3  # of the trained window: distances beyond it are poorly trained, see `longreach.planning.dial`


def selfextend_map(views: Sequence[View], task: str, folder: Path, palette: str) -> Picture | None:
    """Score by group size and neighbour window, a panel for each length beyond the trained window. Hatched: parameters that reach distances
    beyond 2/3 of it. Drawn where at least four runs differ in these two parameters only."""
    cells: dict[tuple[int, int, int], tuple[View, Any]] = {}
    for v in views:
        method = v.run.get("config", {}).get("method", {})
        if method.get("method") != SelfExtend.name:
            continue
        for row in v.rows:
            if row.task == task and row.metric == v.metric(task) and row.length is not None and row.depth is None and row.value is not None:
                cells[row.length, method["group_size"], method["window"]] = v, row
    lengths = [n for n in sorted({length for length, _, _ in cells}) if any(n > (v.window or 0) for v, _ in cells.values())][-PANELS:]
    groups, windows = sorted({g for _, g, _ in cells}), sorted({w for _, _, w in cells})
    if len({(g, w) for _, g, w in cells}) < 4 or not lengths:
        return None
    trained = next(iter(cells.values()))[0].window or 0
    figure = canvas.figure(1.6 + len(lengths) * max(2.4, 0.62 * len(windows)), 1.6 + max(1.8, 0.42 * len(groups)))
    axes = figure.subplots(1, len(lengths), squeeze=False)[0]
    for axis, length in zip(axes, lengths):
        grid = [[cells[length, g, w][1].value if (length, g, w) in cells else math.nan for w in windows] for g in groups]
        image = axis.imshow(grid, cmap=canvas.scores(palette), vmin=0, vmax=100, aspect="auto", origin="lower")
        for y, g in enumerate(groups):
            for x, w in enumerate(windows):
                if not math.isnan(grid[y][x]):
                    axis.text(x, y, f"{grid[y][x]:.0f}", ha="center", va="center", fontsize=8, color="#222222")
                if not trusted(trained, length, g, w):
                    axis.add_patch(rectangle(x, y))
        axis.set_xticks(range(len(windows)), [str(w) for w in windows])
        axis.set_yticks(range(len(groups)), [str(g) for g in groups] if axis is axes[0] else [""] * len(groups))
        axis.set_title(f"{canvas.short(length)} tokens", fontsize=9)
        axis.set_xlabel("neighbour window", fontsize=8.5)
        axis.tick_params(length=0, labelsize=8)
    axes[0].set_ylabel("group size", fontsize=8.5)
    figure.colorbar(image, ax=list(axes), shrink=0.9, label="score (%)").outline.set_visible(False)
    head = ("length", "group_size", "window", "trusted", "value", "n", "ci_low", "ci_high")
    rows = [(n, g, w, trusted(trained, n, g, w), r.value, r.n, r.ci_low, r.ci_high) for (n, g, w), (_, r) in sorted(cells.items())]
    title = f"{task}: SelfExtend's parameters; hatched: distances beyond {TRUSTED:.2g} of the trained window"
    return canvas.write(figure, folder, f"selfextend_{task}", title, head, rows)


def trusted(trained: int, length: int, group: int, window: int) -> bool:
    """Whether no distance of a text of this length is beyond what is well trained: window + (length - window) / group < 2/3 trained."""
    return length <= trained or window + (length - window) / group < TRUSTED * trained


def rectangle(x: int, y: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="///", edgecolor="#00000055", lw=0)


def categories(views: Sequence[View], group: str, folder: Path) -> Picture | None:
    """LongBench: the mean of each category's tasks, a bar for each run; LongBench-E too, and below it the mean of its tasks in three bins of length."""
    scores = {v.label: by_category(v, group) for v in views}
    names = sorted({name for found in scores.values() for name in found})
    if len(names) < 2:
        return None
    bins = {v.label: by_bin(v, group) for v in views}
    binned = any(bins.values())
    figure = canvas.figure(10, 6 if binned else 3.6)
    axes = figure.subplots(1 + binned, 1, squeeze=False)[:, 0]
    shown = [v.label for v in views if scores[v.label]]
    width = 0.8 / len(shown)
    for n, (v, colour) in enumerate(coloured(views, lambda v: scores[v.label])):
        label = v.label
        axes[0].bar(
            [x - 0.4 + (n + 0.5) * width for x in range(len(names))], [scores[label].get(name, math.nan) for name in names], width, color=colour, label=label
        )
        if binned and bins[label]:
            axes[1].plot(range(len(BINS)), [bins[label].get(name, math.nan) for name in BINS], color=colour, marker="o", ms=4)
    axes[0].set_xticks(range(len(names)), names, fontsize=8)
    axes[0].set_ylabel("mean score (%)", fontsize=9)
    axes[0].spines[["top", "right"]].set_visible(False)
    if binned:
        axes[1].set_xticks(range(len(BINS)), [f"{name} words" for name in BINS], fontsize=8)
        axes[1].set_ylabel("mean score (%)", fontsize=9)
        axes[1].spines[["top", "right"]].set_visible(False)
    canvas.legend(figure, axes[0])
    rows = [(label, "category", name, value) for label in shown for name, value in sorted(scores[label].items())]
    rows += [(label, "bin", name, value) for label in shown for name, value in bins[label].items()]
    return canvas.write(figure, folder, f"categories_{group}", f"{group}: score by category", ("run", "what", "name", "value"), rows)


BINS = ("0-4k", "4-8k", "8k+")


def by_category(v: View, group: str) -> dict[str, float]:
    """The mean of the means of a category's tasks, in percent."""
    return {name: fmean(map(fmean, tasks.values())) for name, tasks in scores_of(v, group, "category").items()}


def by_bin(v: View, group: str) -> dict[str, float]:
    found = scores_of(v, group, "bin")
    return {name: fmean(map(fmean, found[name].values())) for name in BINS if name in found}


def scores_of(v: View, group: str, key: str) -> dict[str, dict[str, list[float]]]:
    """Scores in percent by a field of a sample's facts, then by task; what failed counts as nothing."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in v.records:
        if record.bench == group and key in record.meta and (score := main_score(v, record)) is not None:
            found.setdefault(str(record.meta[key]), {}).setdefault(record.task, []).append(100 * score)
    return found


def main_score(v: View, record: Record) -> float | None:
    return record.metrics.get(v.metric(record.task)) if record.error is None else None
