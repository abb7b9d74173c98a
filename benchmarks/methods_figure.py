"""The figure of methods_on_nano.py. Knows its result and matplotlib; measures nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from methods_result import share

from longreach.drawing import canvas
from longreach.methods import registry

# Okabe and Ito's colours, told apart by every kind of colour vision; markers and dashes beside them for print
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
BASELINE = "stock"
GROUPS = {"positions": "Positions changed, every token visible", "frequencies": "Frequencies changed", "bounded": "Constant memory"}
Cell = dict[str, Any]


def draw(result: dict[str, Any], path: Path) -> None:
    """Columns: groups of methods, stock in each. Rows: loss along the longest text, far keys found, keys found at all depths."""
    from matplotlib.figure import Figure

    groups = grouped(result["cells"])
    figure = Figure(figsize=(4.6 * len(groups), 10.2), dpi=130, layout="constrained")
    grid = figure.subplots(3, len(groups), squeeze=False, sharey="row")
    baseline = [cell for cell in result["cells"] if cell["asked"] == BASELINE]
    for column, (group, methods) in enumerate(groups.items()):
        axes = grid[:, column]
        axes[0].set_title(GROUPS[group], fontsize=11, fontweight="bold")
        for number, cells in enumerate(([baseline] if baseline else []) + list(methods.values())):
            style = style_of(number - len([baseline] if baseline else []))
            loss_curve(axes[0], cells, result["window"], style)
            recall_curve(axes[1], cells, result, style, far=True, shift=number)
            recall_curve(axes[2], cells, result, style, far=False, shift=number)
        axes[2].legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncol=2, frameon=False, fontsize=8.5)
    finish(grid, result)
    canvas.save(figure, path)


def grouped(cells: list[Cell]) -> dict[str, dict[str, list[Cell]]]:
    """{group: {method: its cells}}, without the baseline and without empty groups."""
    found: dict[str, dict[str, list[Cell]]] = {group: {} for group in GROUPS}
    for cell in cells:
        if cell["asked"] != BASELINE:
            kind = registry()[cell["asked"]]
            group = "frequencies" if kind.rescales else "bounded" if cell["bounded"] else "positions"
            found[group].setdefault(cell["asked"], []).append(cell)
    return {group: methods for group, methods in found.items() if methods} or {"positions": {}}


def style_of(number: int) -> dict[str, Any]:
    if number < 0:
        return {"color": "#8a8a8a", "marker": ".", "ls": "--", "lw": 2}
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "ls": "-" if number < len(COLOURS) else ":", "lw": 1.6}


def loss_curve(axis: Any, cells: list[Cell], window: int, style: dict[str, Any]) -> None:
    """With the parameters for the longest text; a point is the mean of a window of tokens, at its end."""
    curve = max(cells, key=lambda cell: cell["length"])["loss"]
    axis.plot([window * (n + 1) for n in range(len(curve))], curve, ms=4, **style)


def recall_curve(axis: Any, cells: list[Cell], result: dict[str, Any], style: dict[str, Any], far: bool, shift: int) -> None:
    """Percent found with 95 % intervals, the methods a little apart so that the bars do not hide each other."""
    lengths = result["plan"]["lengths"]
    points = [(lengths.index(c["length"]) + 0.06 * (shift - 3), s) for c in cells if (s := share(c, result["window"], far=far))]
    name = registry()[cells[0]["asked"]].__name__
    if points:
        below = [s.percent - s.interval[0] for _, s in points]
        above = [s.interval[1] - s.percent for _, s in points]
        axis.errorbar([x for x, _ in points], [s.percent for _, s in points], yerr=[below, above], label=name, ms=5, elinewidth=0.8, **style)
    else:
        axis.plot([], [], label=name, **style)


def finish(grid: Any, result: dict[str, Any]) -> None:
    window, lengths = result["window"], result["plan"]["lengths"]
    last = [cell["loss"] for cell in result["cells"] if cell["length"] == max(lengths)]
    lowest, highest = min(map(min, last)), max(map(max, last))
    for column in range(grid.shape[1]):
        loss, far, every = grid[:, column]
        loss.set_ylim(lowest - 0.1, min(highest + 0.1, lowest + 2.5))  # what leaves the panel has failed, by how much is in the JSON
        loss.set_xscale("log", base=2)
        loss.set_xticks(lengths, [str(n) for n in lengths])
        loss.minorticks_off()
        loss.axvline(window, color="black", ls=":", lw=1)
        loss.set_xlabel(f"position in a text of {max(lengths)} tokens", fontsize=9)
        for axis in (far, every):
            axis.set_ylim(-4, 104)
            axis.set_xlim(-0.4, len(lengths) - 0.6)
            axis.set_xticks(range(len(lengths)), [f"{n}\n{n // window}x" for n in lengths])
            axis.set_xlabel("length of the text (tokens)", fontsize=9)
        for axis in (loss, far, every):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#e4e4e4", lw=0.8)
            axis.set_axisbelow(True)
            axis.tick_params(labelsize=8.5)
    grid[0, 0].set_ylabel("loss (nats per token)", fontsize=9)
    grid[1, 0].set_ylabel(f"keys farther than {window} tokens found (%)", fontsize=9)
    grid[2, 0].set_ylabel("keys at all depths found (%)", fontsize=9)
