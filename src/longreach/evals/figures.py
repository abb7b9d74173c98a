"""Pictures of runs, each with the csv of its numbers: depth by length, accuracy by length, perplexity by length and position, cost by length.

Knows the folders of runs and matplotlib, which is imported when a picture is drawn. Figures are drawn by the Agg canvas: no display, no state of pyplot.
"""

from __future__ import annotations

import csv
import math
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from longreach.evals.results import Folder, Record, Row

NEEDLE_COLOURS = ["#F0496E", "#EBB839", "#0CD79F"]  # those of the original needle test
LINES = ["#1b6ca8", "#d9822b", "#2a9d6f", "#8a5ab5", "#c0392b", "#8a8a8a", "#b5a100", "#4b4b4b"]
PALETTES = ("needle", "safe")
RULER_THRESHOLD = 85.6  # Llama-2-7B at 4k: what RULER calls effective
CLIP = 100.0  # perplexities above it are arrows
ARROW = {"arrowstyle": "<-"}
PANELS = 4  # small ones, side by side
LENGTH_HEAD = ("run", "task", "length", "value", "n", "ci_low", "ci_high")


@dataclass(frozen=True)
class View:
    """A run as pictures and tables see it. `curve` are the rows of curves.csv: position, mean, var, count."""

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


@dataclass(frozen=True)
class Picture:
    name: str
    title: str
    png: Path
    csv: Path


def view(folder: Folder, label: str | None = None) -> View:
    run = folder.run
    method = run.get("config", {}).get("method_text")
    curve: list[tuple[int, float, float, int]] = []
    if (path := folder.path / "curves.csv").is_file():
        with open(path, encoding="utf-8", newline="") as stream:
            curve = [(int(row["position"]), float(row["mean"]), float(row["var"]), int(row["count"])) for row in csv.DictReader(stream)]
    return View(label or f"{folder.path.name}" + (f": {method}" if method else ""), run, folder.records(), folder.metrics(), curve)


def draw(views: Sequence[View], folder: str | Path, palette: str = "needle") -> list[Picture]:
    """Every picture for which the runs have numbers, into a folder."""
    if palette not in PALETTES:
        raise ValueError(f"there is no palette {palette!r}; choose one of {', '.join(PALETTES)}")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    pictures: list[Picture | None] = []
    tasks = sorted({record.task for v in views for record in v.records})
    for task in tasks:
        pictures.append(depth_grid(views, task, path, palette))
        pictures.append(accuracy(views, task, path))
    for group in sorted({record.bench for v in views for record in v.records}):
        members = [task for task in tasks if any(record.task == task and record.bench == group for v in views for record in v.records)]
        if len(members) > 1:
            pictures.append(benchmark(views, group, members, path))
    pictures += [perplexity(views, path), positions(views, path), cost(views, path)]
    return [picture for picture in pictures if picture is not None]


def depth_grid(views: Sequence[View], task: str, folder: Path, palette: str = "needle") -> Picture | None:
    """Depth by length, a panel for each run. Cells of few samples are pictures, not claims."""
    cells: dict[str, dict[tuple[int, float], Row]] = {}
    for v in views:
        own = (r for r in v.rows if r.task == task and r.metric == v.metric(task))
        cells[v.label] = {(r.length, r.depth): r for r in own if r.length is not None and r.depth is not None}
    keys = {key for found in cells.values() for key in found}
    lengths, depths = sorted({length for length, _ in keys}), sorted({depth for _, depth in keys})
    shown = [v for v in views if cells[v.label]]
    if not shown:
        return None
    figure = _figure(max(4.6, 1.1 + len(shown) * max(2.6, 0.62 * len(lengths))), 1.3 + max(2.0, 0.34 * len(depths)))
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    colours = _colours(palette)
    for axis, v in zip(axes, shown):
        grid = [[_value(cells[v.label].get((length, depth))) for length in lengths] for depth in depths]
        image = axis.imshow(grid, cmap=colours, vmin=0, vmax=100, aspect="auto", origin="upper")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if not math.isnan(value) and len(lengths) * len(depths) <= 200:
                    axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color="#222222")
        axis.set_xticks(range(len(lengths)), [_short(length) for length in lengths], rotation=45 if len(lengths) > 6 else 0)
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths] if axis is axes[0] else [""] * len(depths))
        axis.set_title("\n".join(textwrap.wrap(v.label, max(24, 5 * len(lengths)))), fontsize=8.5)
        axis.set_xlabel("length (tokens)", fontsize=8.5)
        axis.tick_params(length=0, labelsize=8)
        _window_between(axis, lengths, v.window)
        for side in axis.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel("depth (%)", fontsize=8.5)
    figure.colorbar(image, ax=list(axes), shrink=0.9, label="score (%)").outline.set_visible(False)
    rows = [(v.label, r.length, r.depth, r.metric, r.value, r.n, r.ci_low, r.ci_high) for v in shown for r in cells[v.label].values()]
    head = ("run", "length", "depth", "metric", "value", "n", "ci_low", "ci_high")
    return _write(figure, folder, f"depth_{task}", f"{task}: score by depth and length", head, rows)


def accuracy(views: Sequence[View], task: str, folder: Path) -> Picture | None:
    """Score of a task by length, with 95 % bands."""
    if not any(_by_length(v, task) for v in views):
        return None
    figure = _figure(6.4, 3.6)
    axis = figure.add_subplot()
    for v, colour in zip(views, _cycle(len(views))):
        _band(axis, _by_length(v, task), colour, v.label)
    _score_axis(axis, views, [task])
    axis.set_ylabel(f"{views[0].metric(task)} (%)", fontsize=9)
    guess = next((g for v in views if (g := v.run.get("tasks", {}).get(task, {}).get("random")) is not None), None)
    if guess is not None:
        _level(axis, 100 * guess, "guessing")
    _legend(figure, axis)
    return _write(figure, folder, f"accuracy_{task}", f"{task}: score by length", LENGTH_HEAD, _length_rows(views, [task]))


def benchmark(views: Sequence[View], group: str, tasks: Sequence[str], folder: Path) -> Picture | None:
    """The mean of a benchmark's tasks by length, and a small panel for each task."""
    rows = math.ceil(len(tasks) / PANELS)
    figure = _figure(11, 3 + 1.9 * rows)
    grid = figure.add_gridspec(1 + rows, PANELS, height_ratios=[1.6] + [1] * rows)
    main = figure.add_subplot(grid[0, :])
    means: list[tuple[Any, ...]] = []
    for v, colour in zip(views, _cycle(len(views))):
        by_task = [{r.length: r.value for r in found} for task in tasks if (found := _by_length(v, task))]
        lengths = sorted(length for length in (by_task[0] if by_task else {}) if length is not None and all(length in scores for scores in by_task))
        values = [fmean(scores[length] or 0.0 for scores in by_task) for length in lengths]
        name = f"mean of {len(by_task)} tasks"
        main.plot(lengths, values, color=colour, marker="o", ms=3.5, label=f"{v.label} ({name})")
        means += [(v.label, name, length, value, "", "", "") for length, value in zip(lengths, values)]
    for n, task in enumerate(tasks):
        axis = figure.add_subplot(grid[1 + n // PANELS, n % PANELS])
        for v, colour in zip(views, _cycle(len(views))):
            _band(axis, _by_length(v, task), colour, None)
        _score_axis(axis, views, [task], small=True)
        axis.set_title(task, fontsize=8)
    if not means:
        return None
    _score_axis(main, views, tasks)
    main.set_ylabel("mean score (%)", fontsize=9)
    if group == "ruler":
        _level(main, RULER_THRESHOLD, f"RULER's threshold {RULER_THRESHOLD}")
    _legend(figure, main)
    return _write(figure, folder, f"benchmark_{group}", f"{group}: score by length", LENGTH_HEAD, means + _length_rows(views, tasks))


def perplexity(views: Sequence[View], folder: Path) -> Picture | None:
    """By length. Protocols never share a picture's line; what is above 100 is an arrow."""
    lines = {
        (v.label, task): [r for r in v.rows if r.bench == "perplexity" and r.task == task and r.metric == "perplexity" and r.length is not None]
        for v in views for task in sorted({r.task for r in v.rows if r.bench == "perplexity"})
    }  # fmt: skip
    lines = {key: rows for key, rows in lines.items() if rows}
    if not lines:
        return None
    protocols = sorted({task for _, task in lines})
    figure = _figure(6.4 * len(protocols), 3.8)
    axes = figure.subplots(1, len(protocols), squeeze=False)[0]
    for axis, protocol in zip(axes, protocols):
        for v, colour in zip(views, _cycle(len(views))):
            rows = lines.get((v.label, protocol), [])
            x, y = [r.length for r in rows], [r.value or 0.0 for r in rows]
            axis.plot(x, [min(value, CLIP) for value in y], color=colour, marker="o", ms=3.5, label=v.label)
            for place, value in zip(x, y):
                if value > CLIP:
                    axis.annotate(f"{value:.3g}", (place, CLIP), xytext=(0, 12), textcoords="offset points", ha="center", fontsize=7, arrowprops=ARROW)
        _length_axis(axis, sorted({r.length for key, rows in lines.items() if key[1] == protocol for r in rows if r.length is not None}))
        axis.set_ylim(bottom=0)
        if any((r.value or 0) > CLIP for rows in lines.values() for r in rows):
            axis.set_ylim(0, 1.15 * CLIP)
        axis.set_title(protocol, fontsize=10)
        _window_line(axis, views)
    axes[0].set_ylabel("perplexity", fontsize=9)
    _legend(figure, axes[0])
    table = [(label, task, r.length, r.value, r.n, r.ci_low, r.ci_high) for (label, task), found in lines.items() for r in found]
    head = ("run", "protocol", "length", "perplexity", "documents", "ci_low", "ci_high")
    return _write(figure, folder, "perplexity", "Perplexity by length (it does not imply recall)", head, table)


def positions(views: Sequence[View], folder: Path) -> Picture | None:
    """The loss at every position, as an exponential moving average."""
    shown = [v for v in views if v.curve]
    if not shown:
        return None
    figure = _figure(7.2, 3.8)
    axis = figure.add_subplot()
    rows: list[tuple[Any, ...]] = []
    for v, colour in zip(shown, _cycle(len(shown))):
        points = [(p, m) for p, m, _, _ in v.curve if not math.isnan(m)]
        weight = min(1.0, 2 / (1 + len(points) / 50))  # about a fiftieth of the curve
        smooth: list[float] = []
        for _, value in points:
            smooth.append(value if not smooth else (1 - weight) * smooth[-1] + weight * value)
        axis.plot([p for p, _ in points], smooth, color=colour, lw=1.4, label=v.label)
        rows += [(v.label, p, m, s) for (p, m), s in zip(points, smooth)]
    axis.set_xlabel("position (tokens)", fontsize=9)
    axis.set_ylabel("loss (nats per token), smoothed", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    _window_line(axis, shown)
    _legend(figure, axis)
    return _write(figure, folder, "positions", "Loss by position", ("run", "position", "nll", "smoothed"), rows)


def cost(views: Sequence[View], folder: Path) -> Picture | None:
    """What answers took: seconds to the first token and decoded tokens a second, medians by length, of prompts that were read in whole."""
    panels: list[tuple[str, Callable[[Record], float | None]]] = [
        ("seconds to the first token", lambda r: r.t_prefill if not r.reused_tokens else None),
        ("decoded tokens a second", lambda r: r.tok_per_s),
        ("peak memory (GiB)", lambda r: None if r.peak_mem is None else r.peak_mem / 2**30),
    ]
    rows: list[tuple[Any, ...]] = []
    figure = _figure(11, 3.2)
    axes = figure.subplots(1, len(panels))
    for v, colour in zip(views, _cycle(len(views))):
        lengths = sorted({r.length_target for r in v.records if r.length_target is not None and r.error is None})
        for axis, (name, value) in zip(axes, panels):
            points = []
            for length in lengths:
                values = [y for r in v.records if r.length_target == length and r.error is None and (y := value(r)) is not None]
                if values:
                    points.append((length, median(values), len(values)))
            axis.plot([p[0] for p in points], [p[1] for p in points], color=colour, marker="o", ms=3.5, label=v.label)
            rows += [(v.label, name, *point) for point in points]
    if not rows:
        return None
    for axis, (name, _) in zip(axes, panels):
        _length_axis(axis, sorted({row[2] for row in rows}))
        axis.set_ylim(bottom=0)
        axis.set_title(name, fontsize=9)
    _legend(figure, axes[0])
    return _write(figure, folder, "cost", "Cost by length (medians)", ("run", "what", "length", "median", "n"), rows)


def _by_length(v: View, task: str) -> list[Row]:
    return [r for r in v.rows if r.task == task and r.length is not None and r.depth is None and r.metric == v.metric(task) and r.value is not None]


def _length_rows(views: Sequence[View], tasks: Sequence[str]) -> list[tuple[Any, ...]]:
    return [(v.label, task, r.length, r.value, r.n, r.ci_low, r.ci_high) for v in views for task in tasks for r in _by_length(v, task)]


def _value(row: Row | None) -> float:
    return math.nan if row is None or row.value is None else row.value


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _colours(palette: str) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    made = colormaps["cividis"] if palette == "safe" else LinearSegmentedColormap.from_list("needle", NEEDLE_COLOURS)
    return made.with_extremes(bad="#e4e4e4")


def _cycle(count: int) -> list[str]:
    return [LINES[n % len(LINES)] for n in range(count)]


def _band(axis: Any, rows: list[Row], colour: str, label: str | None) -> None:
    x = [r.length for r in rows]
    axis.plot(x, [r.value for r in rows], color=colour, marker="o", ms=3, lw=1.5, label=label)
    axis.fill_between(x, [r.ci_low for r in rows], [r.ci_high for r in rows], color=colour, alpha=0.15, lw=0)


def _length_axis(axis: Any, lengths: list[int], small: bool = False) -> None:
    axis.set_xscale("log", base=2)
    ticks = lengths if len(lengths) <= 9 else lengths[:: math.ceil(len(lengths) / 8)]
    axis.set_xticks(ticks, [_short(tick) for tick in ticks])
    axis.minorticks_off()
    axis.tick_params(labelsize=7 if small else 8)
    axis.spines[["top", "right"]].set_visible(False)
    if not small:
        axis.set_xlabel("length (tokens)", fontsize=9)


def _score_axis(axis: Any, views: Sequence[View], tasks: Sequence[str], small: bool = False) -> None:
    _length_axis(axis, sorted({r.length for v in views for task in tasks for r in _by_length(v, task) if r.length is not None}), small)
    axis.set_ylim(-3, 103)
    _window_line(axis, views, label=not small)


def _level(axis: Any, value: float, label: str) -> None:
    axis.axhline(value, color="#999999", lw=0.8, ls="--")
    axis.annotate(label, (0.01, value), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")


def _window_line(axis: Any, views: Sequence[View], label: bool = True) -> None:
    for window in sorted({v.window for v in views if v.window}):
        axis.axvline(window, color="black", ls=":", lw=1)
        if label:
            axis.annotate("trained window", (window, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points", fontsize=7)


def _legend(figure: Any, axis: Any) -> None:
    """Below the picture: the names of methods are long."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8)


def _window_between(axis: Any, lengths: Sequence[Any], window: int | None) -> None:
    """A line between the columns where the trained window ends."""
    if window is not None and lengths[0] <= window < lengths[-1]:
        axis.axvline(sum(length <= window for length in lengths) - 0.5, color="black", ls=":", lw=1.4)


def _short(length: Any) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)


def _write(figure: Any, folder: Path, name: str, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Picture:
    """Picture and numbers, each whole or not at all."""
    figure.suptitle(title, fontsize=11)
    picture = Picture(name, title, folder / f"{name}.png", folder / f"{name}.csv")
    temporary = picture.png.with_suffix(".png.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, picture.png)
    temporary = picture.csv.with_suffix(".csv.tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])
    os.replace(temporary, picture.csv)
    return picture
