"""What pictures are drawn on: figures of the Agg canvas, every colour, axes of lengths, PNG files, and the csv of a picture's numbers beside it.

Knows matplotlib, which is imported when a picture is drawn; no display, no state of pyplot. Knows nothing about runs, methods or models.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longreach import files

STOCK, BLUE, ORANGE = "#8a8a8a", "#1b6ca8", "#d9822b"
METHODS = {"stock": STOCK, "selfextend": BLUE, "lm-infinite": ORANGE}
LINES = [
    BLUE, ORANGE, "#2a9d6f", "#8a5ab5", "#c0392b", STOCK, "#b5a100", "#4b4b4b",
    "#6fb3e0", "#f2b96b", "#7fd1ae", "#c9a6e4", "#f08a7c", "#c4c4c4", "#7a5230", "#d16ba5",
]  # fmt: skip
COSTS = [STOCK, BLUE, ORANGE, "#3a923a", "#8c564b", "#9467bd", "#c03d3e", "#17becf"]
# Blue for distances, orange for what was never trained: the pair that every kind of colour vision tells apart. Lightness falls with nearness.
NEAR_TO_FAR = ["#08306b", "#2171b5", "#6baed6", "#cfe1f2"]
UNTRAINED = "#e6872d"
FEW_TO_MANY = ["#f4e3d2", "#9cc3dc", BLUE]
NEEDLE = ["#F0496E", "#EBB839", "#0CD79F"]  # of the original needle test
PALETTES = ("needle", "safe")
REDUCED = 256  # colours of a picture's file, which makes it a third as large; with half as many, lines lose their colours
SIGNATURE = {"Software": "Longreach"}  # in the text of every PNG, so that a picture of ours is known from one of somebody else's


@dataclass(frozen=True)
class Picture:
    name: str
    title: str
    png: Path
    csv: Path


def figure(width: float, height: float, dpi: int = 130) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def blend(*colours: str) -> Any:
    """A colour map that goes evenly from the first to the last."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blend", list(colours))


def scores(palette: str) -> Any:
    """The colour map of scores; what was not measured is grey."""
    from matplotlib import colormaps

    return (colormaps["cividis"] if palette == "safe" else blend(*NEEDLE)).with_extremes(bad="#e4e4e4")


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


def save(figure: Any, path: str | Path, colours: int | None = None) -> None:
    """The whole picture as a PNG, or none; with `colours`, reduced to so many."""
    files.write_by(path, lambda part: _draw(figure, part, colours), "picture")


def _draw(figure: Any, path: Path, colours: int | None) -> None:
    if colours is None:
        figure.savefig(path, format="png", metadata=SIGNATURE)
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    signed = PngInfo()
    for name, text in SIGNATURE.items():
        signed.add_text(name, text)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB").quantize(colours)
    drawn.save(path, "png", optimize=True, pnginfo=signed)


def write(figure: Any, folder: Path, name: str, title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Picture:
    """Picture and numbers, each whole or not at all."""
    figure.suptitle(title, fontsize=11)
    picture = Picture(name, title, folder / f"{name}.png", folder / f"{name}.csv")
    save(figure, picture.png, REDUCED)
    table = io.StringIO(newline="")
    csv.writer(table).writerows([head, *rows])
    files.write(picture.csv, table.getvalue())
    return picture
