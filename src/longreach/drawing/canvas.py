"""What pictures are drawn on: figures of the Agg canvas, colours, axes of lengths, and a file with the csv of its numbers beside it.

Knows matplotlib, which is imported when a picture is drawn; no display, no state of pyplot. Knows nothing about runs.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach.drawing import plots

NEEDLE_COLOURS = ["#F0496E", "#EBB839", "#0CD79F"]  # those of the original needle test
LINES = [
    "#1b6ca8", "#d9822b", "#2a9d6f", "#8a5ab5", "#c0392b", "#8a8a8a", "#b5a100", "#4b4b4b",
    "#6fb3e0", "#f2b96b", "#7fd1ae", "#c9a6e4", "#f08a7c", "#c4c4c4", "#7a5230", "#d16ba5",
]  # fmt: skip
PALETTES = ("needle", "safe")
COLOURS = 256  # of a picture's file; with half as many, lines lose their colours


@dataclass(frozen=True)
class Picture:
    name: str
    title: str
    png: Path
    csv: Path


def figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def colours(palette: str) -> Any:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    made = colormaps["cividis"] if palette == "safe" else LinearSegmentedColormap.from_list("needle", NEEDLE_COLOURS)
    return made.with_extremes(bad="#e4e4e4")


def cycle(count: int) -> list[str]:
    return [LINES[n % len(LINES)] for n in range(count)]


def length_axis(axis: Any, lengths: list[int], small: bool = False) -> None:
    axis.set_xscale("log", base=2)
    ticks = lengths if len(lengths) <= 9 else lengths[:: math.ceil(len(lengths) / 8)]
    axis.set_xticks(ticks, [short(tick) for tick in ticks])
    axis.minorticks_off()
    axis.tick_params(labelsize=7 if small else 8)
    axis.spines[["top", "right"]].set_visible(False)
    if not small:
        axis.set_xlabel("length (tokens)", fontsize=9)


def level(axis: Any, value: float, label: str) -> None:
    axis.axhline(value, color="#999999", lw=0.8, ls="--")
    axis.annotate(label, (0.01, value), xycoords=("axes fraction", "data"), fontsize=7, va="bottom")


def legend(figure: Any, axis: Any) -> None:
    """Below the picture: the names of methods are long."""
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        columns = 2 if len(labels) > 6 and figure.get_figwidth() > 9 else 1
        figure.set_figheight(figure.get_figheight() + 0.17 * max(0, math.ceil(len(labels) / columns) - 3))
        figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8, ncols=columns)


def window_between(axis: Any, lengths: Sequence[Any], window: int | None) -> None:
    """A line between the columns where the trained window ends."""
    if window is not None and lengths[0] <= window < lengths[-1]:
        axis.axvline(sum(length <= window for length in lengths) - 0.5, color="black", ls=":", lw=1.4)


def short(length: Any) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)


def write(figure: Any, folder: Path, name: str, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Picture:
    """Picture and numbers, each whole or not at all. A palette makes the file of a drawing a third as large."""
    figure.suptitle(title, fontsize=11)
    picture = Picture(name, title, folder / f"{name}.png", folder / f"{name}.csv")
    plots.save(figure, picture.png, COLOURS)
    temporary = picture.csv.with_suffix(".csv.tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([head, *rows])
    os.replace(temporary, picture.csv)
    return picture
