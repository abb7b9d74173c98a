"""A picture of retrieval: which places of a text each layer has chosen for the tokens of an answer. Knows plain data; no models and no methods."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longreach.drawing import canvas

COLUMNS = 800  # at most, about as many as the picture has pixels there
SELDOM_TO_ALWAYS = ["#b9d7ee", "#4292c6", "#08306b"]  # what was chosen once has to be told from white
ANYWAY = "#dcdcdc"
LOWEST, HIGHEST, A_LAYER = 2.6, 7.6, 0.3  # inches of the picture and of a layer in it


def draw(found: dict[str, Any], title: str, path: str | Path, marked: Sequence[tuple[int, int]] = ()) -> None:
    """A PNG at `path`, whole or not at all.

    found   `tokens` of the text and its `layers`: for each `chosen` and `always`, stretches [first, stop, share]; ascending, none over another.
    marked  stretches of tokens to be pointed at.

    A column of the picture stands for several tokens where the text is long: its colour is that of the largest share among them.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import EngFormatter, MaxNLocator

    tokens, layers = found["tokens"], found["layers"]
    figure = canvas.figure(9.4, min(HIGHEST, max(LOWEST, 1.7 + A_LAYER * len(layers))), dpi=110)
    axes = figure.subplots()
    figure.suptitle("\n".join(part for line in title.splitlines() for part in textwrap.wrap(line, 100)), fontsize=11)
    step = -(-tokens // COLUMNS)
    edges = (0, -(-tokens // step) * step, layers[-1]["layer"] + 0.5, layers[0]["layer"] - 0.5)
    shown: dict[str, Any] = {"aspect": "auto", "interpolation": "nearest", "origin": "upper", "extent": edges}
    anyway, chosen = (matrix([layer[name] for layer in layers], tokens, step) for name in ("always", "chosen"))
    axes.imshow(anyway, cmap=ListedColormap([ANYWAY]).with_extremes(bad="white"), vmin=0, vmax=1, **shown)
    image = axes.imshow(chosen, cmap=canvas.blend(*SELDOM_TO_ALWAYS).with_extremes(bad=(0, 0, 0, 0)), vmin=0, vmax=1, **shown)
    axes.set_xlim(0, tokens)
    axes.set_xlabel("position in the text (tokens)" + (f"; a column is {step} tokens, and has the largest share among them" if step > 1 else ""))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    for side in axes.spines.values():
        side.set_color("#9a9a9a")
    for first, stop in marked:
        axes.annotate("▼", ((first + stop) / 2, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=9, color=canvas.ORANGE)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("share of tokens and heads", fontsize=8)
    bar.outline.set_visible(False)
    seen = "seen without a choice: window, first tokens, what is not to be chosen yet"
    handles = [Patch(facecolor="white", edgecolor="#9a9a9a", label="not chosen"), Patch(facecolor=ANYWAY, label=seen)]
    if marked:
        handles.append(Patch(facecolor=canvas.ORANGE, label="▼ the hidden sentence"))
    figure.legend(handles=handles, loc="outside lower left", frameon=False, fontsize=8, ncols=len(handles))
    canvas.save(figure, path, canvas.REDUCED)


def matrix(layers: Sequence[Sequence[Sequence[float]]], tokens: int, step: int) -> Any:
    """Stretches of every layer -> [layers, columns], the largest share of `step` tokens each, NaN where there is none."""
    import numpy as np

    rows = []
    for stretches in layers:
        values, ends = [math.nan], [0]
        for first, stop, share in stretches:
            values += [share, math.nan]
            ends += [int(first), int(stop)]
        row = np.repeat(values, np.diff([*ends, -(-tokens // step) * step]))
        rows.append(np.fmax.reduce(row.reshape(-1, step), axis=1))
    return np.array(rows)
