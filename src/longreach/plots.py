"""Pictures of what a method sees. Knows matrices and matplotlib, which is imported when a picture is drawn; no models.

Figures are drawn by the Agg canvas directly: no display, no global state of pyplot.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch

HIDDEN = "#e4e4e4"


def distances(matrix: torch.Tensor, title: str, path: str | Path) -> None:
    """matrix [Q, K] of effective distances, NaN where hidden -> a PNG at `path`."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    colours = colormaps["viridis_r"].with_extremes(bad=HIDDEN)
    figure = Figure(figsize=(7.2, 6.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(matrix.numpy(), cmap=colours, vmin=0, interpolation="nearest", origin="upper")
    axes.set_xlabel("key index j")
    axes.set_ylabel("query index i")
    axes.set_title("\n".join(textwrap.wrap(title, 72)), fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    for side in axes.spines.values():
        side.set_visible(False)
    _write_numbers(axes, matrix)
    bar = figure.colorbar(image, ax=axes, label="effective distance", shrink=0.9)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.legend(handles=[Patch(facecolor=HIDDEN, edgecolor="#b0b0b0", label="not visible")], loc="upper right", frameon=True, framealpha=1, fontsize=9)
    figure.savefig(path, format="png")


def _write_numbers(axes: Any, matrix: torch.Tensor, most: int = 16) -> None:
    """Small matrices carry their numbers."""
    if matrix.shape[0] > most:
        return
    largest = matrix.nan_to_num(0).max().item() or 1.0
    for i, row in enumerate(matrix.tolist()):
        for j, d in enumerate(row):
            if d == d:
                axes.text(j, i, f"{d:.2f}".rstrip("0").rstrip("."), ha="center", va="center", fontsize=8, color="white" if d > 0.45 * largest else "black")
