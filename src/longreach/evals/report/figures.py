"""Pictures of runs, each with the csv of its numbers: depth by length, accuracy by length, perplexity by length and position, cost by length.

Knows the folders of runs and matplotlib, which is imported when a picture is drawn. Figures are drawn by the Agg canvas: no display, no state of pyplot.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from longreach.drawing import canvas
from longreach.drawing.canvas import PALETTES, Picture
from longreach.evals.harness.results import Record, Row
from longreach.evals.report import special_figures
from longreach.evals.report.view import View, coloured

RULER_THRESHOLD = 85.6  # Llama-2-7B at 4k: what RULER calls effective
CLIP = 100.0  # perplexities above it are arrows
ARROW = {"arrowstyle": "<-"}
PANELS = 4  # small ones, side by side
ACROSS = 5  # depth maps, side by side
CSV_POINTS = 1024  # of a run's smoothed curve; every position is in the run's curves.csv
LENGTH_HEAD = ("run", "task", "length", "value", "n", "ci_low", "ci_high")


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
        pictures.append(special_figures.selfextend_map(views, task, path, palette))
    for group in sorted({record.bench for v in views for record in v.records}):
        members = [task for task in tasks if any(record.task == task and record.bench == group for v in views for record in v.records)]
        if len(members) > 1:
            pictures.append(benchmark(views, group, members, path))
        pictures.append(special_figures.categories(views, group, path))
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
    across = min(len(shown), ACROSS)
    down = math.ceil(len(shown) / across)
    figure = canvas.figure(max(4.6, 1.1 + across * max(2.6, 0.62 * len(lengths))), 0.5 + down * (0.8 + max(2.0, 0.34 * len(depths))))
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for spare in axes[len(shown) :]:
        spare.set_axis_off()
    colours = canvas.scores(palette)
    for axis, v in zip(axes, shown):
        grid = [[_value(cells[v.label].get((length, depth))) for length in lengths] for depth in depths]
        image = axis.imshow(grid, cmap=colours, vmin=0, vmax=100, aspect="auto", origin="upper")
        for y, line in enumerate(grid):
            for x, value in enumerate(line):
                if not math.isnan(value) and len(lengths) * len(depths) <= 200:
                    axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7.5, color="#222222")
        axis.set_xticks(range(len(lengths)), [canvas.short(length) for length in lengths], rotation=45 if len(lengths) > 6 else 0)
        axis.set_yticks(range(len(depths)), [f"{100 * depth:.0f}" for depth in depths] if axis in axes[::across] else [""] * len(depths))
        axis.set_title("\n".join(textwrap.wrap(v.label, max(24, 5 * len(lengths)), break_long_words=False)), fontsize=8.5)
        axis.set_xlabel("length (tokens)", fontsize=8.5)
        axis.tick_params(length=0, labelsize=8)
        canvas.window_between(axis, lengths, v.window)
        for side in axis.spines.values():
            side.set_visible(False)
    for axis in axes[::across]:
        axis.set_ylabel("depth (%)", fontsize=8.5)
    figure.colorbar(image, ax=list(axes), shrink=0.9, label="score (%)").outline.set_visible(False)
    rows = [(v.label, r.length, r.depth, r.metric, r.value, r.n, r.ci_low, r.ci_high) for v in shown for r in cells[v.label].values()]
    head = ("run", "length", "depth", "metric", "value", "n", "ci_low", "ci_high")
    return canvas.write(figure, folder, f"depth_{task}", f"{task}: score by depth and length", head, rows)


def accuracy(views: Sequence[View], task: str, folder: Path) -> Picture | None:
    """Score of a task by length, with 95 % bands."""
    if not any(_by_length(v, task) for v in views):
        return None
    figure = canvas.figure(6.4, 3.6)
    axis = figure.add_subplot()
    for v, colour in coloured(views, lambda v: _by_length(v, task)):
        _band(axis, _by_length(v, task), colour, v.label)
    _score_axis(axis, views, [task])
    axis.set_ylabel(f"{views[0].metric(task)} (%)", fontsize=9)
    guess = next((g for v in views if (g := v.run.get("tasks", {}).get(task, {}).get("random")) is not None), None)
    if guess is not None:
        canvas.level(axis, 100 * guess, "guessing")
    canvas.legend(figure, axis)
    return canvas.write(figure, folder, f"accuracy_{task}", f"{task}: score by length", LENGTH_HEAD, _length_rows(views, [task]))


def benchmark(views: Sequence[View], group: str, tasks: Sequence[str], folder: Path) -> Picture | None:
    """The mean of a benchmark's tasks by length, and a small panel for each task."""
    rows = math.ceil(len(tasks) / PANELS)
    figure = canvas.figure(11, 3 + 1.9 * rows)
    grid = figure.add_gridspec(1 + rows, PANELS, height_ratios=[1.6] + [1] * rows)
    main = figure.add_subplot(grid[0, :])
    means: list[tuple[Any, ...]] = []
    for v, colour in coloured(views, lambda v: any(_by_length(v, task) for task in tasks)):
        by_task = [{r.length: r.value for r in found} for task in tasks if (found := _by_length(v, task))]
        lengths = sorted(length for length in (by_task[0] if by_task else {}) if length is not None and all(length in scores for scores in by_task))
        values = [fmean(scores[length] or 0.0 for scores in by_task) for length in lengths]
        name = f"mean of {len(by_task)} tasks"
        main.plot(lengths, values, color=colour, marker="o", ms=3.5, label=f"{v.label} ({name})")
        means += [(v.label, name, length, value, "", "", "") for length, value in zip(lengths, values)]
    for n, task in enumerate(tasks):
        axis = figure.add_subplot(grid[1 + n // PANELS, n % PANELS])
        for v, colour in coloured(views, lambda v: _by_length(v, task)):  # noqa: B023
            _band(axis, _by_length(v, task), colour, None)
        _score_axis(axis, views, [task], small=True)
        axis.set_title(task, fontsize=8)
    if not means:
        return None
    _score_axis(main, views, tasks)
    main.set_ylabel("mean score (%)", fontsize=9)
    if group == "ruler":
        canvas.level(main, RULER_THRESHOLD, f"RULER's threshold {RULER_THRESHOLD}")
    canvas.legend(figure, main)
    return canvas.write(figure, folder, f"benchmark_{group}", f"{group}: score by length", LENGTH_HEAD, means + _length_rows(views, tasks))


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
    figure = canvas.figure(6.4 * len(protocols), 3.8)
    axes = figure.subplots(1, len(protocols), squeeze=False)[0]
    for axis, protocol in zip(axes, protocols):
        for v, colour in coloured(views, lambda v: (v.label, protocol) in lines):  # noqa: B023
            rows = lines[v.label, protocol]
            x, y = [r.length for r in rows], [r.value or 0.0 for r in rows]
            axis.plot(x, [min(value, CLIP) for value in y], color=colour, marker="o", ms=3.5, label=v.label)
            for place, value in zip(x, y):
                if value > CLIP:
                    axis.annotate(f"{value:.3g}", (place, CLIP), xytext=(0, 12), textcoords="offset points", ha="center", fontsize=7, arrowprops=ARROW)
        canvas.length_axis(axis, sorted({r.length for key, rows in lines.items() if key[1] == protocol for r in rows if r.length is not None}))
        axis.set_ylim(bottom=0)
        if any((r.value or 0) > CLIP for rows in lines.values() for r in rows):
            axis.set_ylim(0, 1.15 * CLIP)
        axis.set_title(protocol, fontsize=10)
        _window_line(axis, views)
    axes[0].set_ylabel("perplexity", fontsize=9)
    canvas.legend(figure, axes[0])
    table = [(label, task, r.length, r.value, r.n, r.ci_low, r.ci_high) for (label, task), found in lines.items() for r in found]
    head = ("run", "protocol", "length", "perplexity", "documents", "ci_low", "ci_high")
    return canvas.write(figure, folder, "perplexity", "Perplexity by length (it does not imply recall)", head, table)


def positions(views: Sequence[View], folder: Path) -> Picture | None:
    """The loss at every position, as an exponential moving average."""
    shown = [v for v in views if v.curve]
    if not shown:
        return None
    figure = canvas.figure(7.2, 3.8)
    axis = figure.add_subplot()
    rows: list[tuple[Any, ...]] = []
    for v, colour in coloured(views, lambda v: v.curve):
        points = [(p, m) for p, m, _, _ in v.curve if not math.isnan(m)]
        weight = min(1.0, 2 / (1 + len(points) / 50))  # about a fiftieth of the curve
        smooth: list[float] = []
        for _, value in points:
            smooth.append(value if not smooth else (1 - weight) * smooth[-1] + weight * value)
        axis.plot([p for p, _ in points], smooth, color=colour, lw=1.4, label=v.label)
        step = math.ceil(len(points) / CSV_POINTS)
        rows += [(v.label, p, f"{s:.4f}") for (p, _), s in list(zip(points, smooth))[::step]]
    axis.set_xlabel("position (tokens)", fontsize=9)
    axis.set_ylabel("loss (nats per token), smoothed", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    _window_line(axis, shown)
    canvas.legend(figure, axis)
    return canvas.write(figure, folder, "positions", "Loss by position", ("run", "position", "smoothed"), rows)


def cost(views: Sequence[View], folder: Path) -> Picture | None:
    """What answers took: seconds to the first token and decoded tokens a second, medians by length, of prompts that were read in whole."""
    panels: list[tuple[str, Callable[[Record], float | None]]] = [
        ("seconds to the first token", lambda r: r.t_prefill if not r.reused_tokens else None),
        ("decoded tokens a second", lambda r: r.tok_per_s),
        ("peak memory (GiB)", lambda r: None if r.peak_mem is None else r.peak_mem / 2**30),
    ]
    rows: list[tuple[Any, ...]] = []
    figure = canvas.figure(11, 3.2)
    axes = figure.subplots(1, len(panels))
    for v, colour in coloured(views, lambda v: any(r.length_target is not None and r.error is None for r in v.records)):
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
        canvas.length_axis(axis, sorted({row[2] for row in rows}))
        axis.set_ylim(bottom=0)
        axis.set_title(name, fontsize=9)
    canvas.legend(figure, axes[0])
    return canvas.write(figure, folder, "cost", "Cost by length (medians)", ("run", "what", "length", "median", "n"), rows)


def _by_length(v: View, task: str) -> list[Row]:
    return [r for r in v.rows if r.task == task and r.length is not None and r.depth is None and r.metric == v.metric(task) and r.value is not None]


def _length_rows(views: Sequence[View], tasks: Sequence[str]) -> list[tuple[Any, ...]]:
    return [(v.label, task, r.length, r.value, r.n, r.ci_low, r.ci_high) for v in views for task in tasks for r in _by_length(v, task)]


def _value(row: Row | None) -> float:
    return math.nan if row is None or row.value is None else row.value


def _band(axis: Any, rows: list[Row], colour: str, label: str | None) -> None:
    x = [r.length for r in rows]
    axis.plot(x, [r.value for r in rows], color=colour, marker="o", ms=3, lw=1.5, label=label)
    axis.fill_between(x, [r.ci_low for r in rows], [r.ci_high for r in rows], color=colour, alpha=0.15, lw=0)


def _score_axis(axis: Any, views: Sequence[View], tasks: Sequence[str], small: bool = False) -> None:
    canvas.length_axis(axis, sorted({r.length for v in views for task in tasks for r in _by_length(v, task) if r.length is not None}), small)
    axis.set_ylim(-3, 103)
    _window_line(axis, views, label=not small)


def _window_line(axis: Any, views: Sequence[View], label: bool = True) -> None:
    for window in sorted({v.window for v in views if v.window}):
        axis.axvline(window, color="black", ls=":", lw=1)
        if label:
            axis.annotate("trained window", (window, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0), textcoords="offset points", fontsize=7)
