"""Pictures: what a method sees, and what it reaches. Knows matrices, plain results and matplotlib, which is imported when a picture is
drawn; no models.

Figures are drawn by the Agg canvas directly: no display, no global state of pyplot.
"""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

import torch

HIDDEN = "#e4e4e4"
COLOURS = {"stock": "#8a8a8a", "selfextend": "#1b6ca8", "lm-infinite": "#d9822b"}


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
    _save(figure, path)


def _save(figure: Any, path: str | Path) -> None:
    """The whole picture or none."""
    temporary = Path(f"{path}.tmp")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)


def _write_numbers(axes: Any, matrix: torch.Tensor, most: int = 16) -> None:
    """Small matrices carry their numbers."""
    if matrix.shape[0] > most:
        return
    largest = matrix.nan_to_num(0).max().item() or 1.0
    for i, row in enumerate(matrix.tolist()):
        for j, d in enumerate(row):
            if d == d:
                axes.text(j, i, f"{d:.2f}".rstrip("0").rstrip("."), ha="center", va="center", fontsize=8, color="white" if d > 0.45 * largest else "black")


def reach(result: dict[str, Any], path: str | Path) -> None:
    """The result of `longreach.demo.run` -> a PNG: the loss along a text, and for each method the keys found by length and depth."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    from longreach.demo import NAMES, share

    window = result["window"]
    figure = Figure(figsize=(12.6, 3.9), dpi=150, layout="constrained")
    axes = figure.subplots(1, 1 + len(NAMES), width_ratios=[1.9, *([1] * len(NAMES))])
    _loss_curves(axes[0], result)
    lengths = [n * window for n in result["plan"]["lengths"]]
    depths = sorted({row["depth"] for row in result["trials"]})
    colours = LinearSegmentedColormap.from_list("found", ["#f4e3d2", "#9cc3dc", "#1b6ca8"])
    for axis, (name, label) in zip(axes[1:], NAMES.items()):
        cells = [[share(result, name, length, depth).percent or 0.0 for length in lengths] for depth in depths]
        axis.imshow(cells, cmap=colours, vmin=0, vmax=100, aspect="auto", origin="upper")
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 60 else "#333333")
        axis.set_xticks(range(len(lengths)), [f"{n // window}x" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f}" for d in depths] if axis is axes[1] else [""] * len(depths))
        axis.set_title(label, fontsize=11, color=COLOURS[name], fontweight="bold")
        axis.set_xlabel(f"length ({window} tokens = 1x)", fontsize=9)
        axis.tick_params(length=0, labelsize=8.5)
        for side in axis.spines.values():
            side.set_visible(False)
    axes[1].set_ylabel("depth of the key in the text (%)", fontsize=9)
    figure.suptitle("Left: loss along a book.  Right: pass keys found (%), by length of the text and depth of the key", fontsize=11)
    _save(figure, path)


def _loss_curves(axis: Any, result: dict[str, Any]) -> None:
    from longreach.demo import NAMES

    window, longest = result["window"], 1
    for name, label in NAMES.items():
        curve = result["loss"]["methods"][name]
        longest = max(longest, len(curve))
        axis.plot([window * (n + 1) for n in range(len(curve))], curve, color=COLOURS[name], label=label, lw=2, marker="o", ms=2.5)
    axis.axvline(window, color="black", ls=":", lw=1)
    axis.annotate("trained window", (window, axis.get_ylim()[1]), xytext=(5, -3), textcoords="offset points", va="top", fontsize=8.5)
    ticks = [window * 2**n for n in range(longest.bit_length()) if 2**n <= longest]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [f"{t}" for t in ticks], rotation=30 if len(ticks) > 5 else 0)
    axis.minorticks_off()
    axis.set_xlabel("position in the text (tokens)", fontsize=9)
    axis.set_ylabel("loss (nats per token)", fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
