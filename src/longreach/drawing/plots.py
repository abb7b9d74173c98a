"""Pictures: what a method sees, and what it reaches. Knows matrices, plain results and matplotlib, which is imported when a picture is
drawn; no models.

Figures are drawn by the Agg canvas directly: no display, no global state of pyplot.
"""

from __future__ import annotations

import math
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COLOURS = {"stock": "#8a8a8a", "selfextend": "#1b6ca8", "lm-infinite": "#d9822b"}
# Blue for distances, orange for what was never trained: the pair that every kind of colour vision tells apart. Lightness falls with nearness.
NEAR_TO_FAR = ["#08306b", "#2171b5", "#6baed6", "#cfe1f2"]
UNTRAINED = "#e6872d"
MOST_CELLS = 512  # of a side of a drawn matrix; a larger one is sampled
PALETTE = 256  # colours of a matrix picture, which keeps it small
SIGNATURE = {"Software": "Longreach"}  # in the text of every PNG, so that a picture of ours is known from one of somebody else's


@dataclass(frozen=True)
class Pairs:
    """The rotary pairs of a head, as trained and under a method: inverse frequencies [pairs], from the fastest to the slowest.

    window, context: trained tokens, and those of the text. largest: the largest distance in it.
    """

    own: torch.Tensor
    new: torch.Tensor
    window: int
    context: int
    largest: float
    scaling: float = 1.0

    @property
    def reaches(self) -> torch.Tensor:
        """[pairs]: the distance up to which the angles of a pair are trained ones. A pair that makes a full turn in the trained window met all."""
        turned = self.window * self.own >= 2 * torch.pi
        return torch.where(turned, torch.inf, self.window * self.own / self.new * (1 + 1e-6))

    @property
    def untrained(self) -> torch.Tensor:
        """[pairs]: whether it meets an angle in the text that it did not meet in training."""
        return self.largest > self.reaches

    @property
    def reach(self) -> int | None:
        """The largest distance with trained angles only; None if all distances of the text are."""
        least = self.reaches.min().item()
        return math.floor(least) if least < self.largest else None


def distances(matrix: torch.Tensor, title: str, path: str | Path, trained: int | None = None, pairs: Pairs | None = None) -> None:
    """matrix [Q, K] of effective distances, NaN where hidden -> a PNG at `path`.

    trained  distances above this were never trained and get a colour of their own; the colours up to it then mean the same in every picture. The
             trained window itself, one more than the largest trained distance, is the ceiling that published methods allow themselves.
    pairs    for a method that changes frequencies: a second panel, how long a turn of every rotary pair is. `trained` is taken from it.
    """
    from matplotlib.figure import Figure

    trained = pairs.reach if pairs is not None else trained
    figure = Figure(figsize=(9.4, 4.3) if pairs is not None else (5.2, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(1, 1 if pairs is None else 2, squeeze=False, width_ratios=[1] if pairs is None else [1.08, 1])[0]
    figure.suptitle("\n".join(textwrap.wrap(title, 56 if pairs is None else 100)), fontsize=11)
    _matrix(figure, panels[0], matrix, trained, fixed=pairs is None)
    if pairs is not None:
        _turns(panels[1], pairs)
    save(figure, path, PALETTE)


def _matrix(figure: Any, axes: Any, matrix: torch.Tensor, trained: int | None, fixed: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    n = matrix.shape[0]
    step = -(-n // MOST_CELLS)
    seen = matrix[::step, ::step]
    largest = seen.nan_to_num(0).max().item()
    beyond = trained is not None and largest > trained
    top = trained if trained is not None and (fixed or beyond) else largest
    colours = LinearSegmentedColormap.from_list("distance", NEAR_TO_FAR).with_extremes(bad="white", over=UNTRAINED)
    edges = (-0.5, n - 0.5, n - 0.5, -0.5)
    image = axes.imshow(seen.numpy(), cmap=colours, vmin=0, vmax=max(top, 1), interpolation="nearest", origin="upper", extent=edges)
    axes.set_xlabel("key index $j$")
    axes.set_ylabel("query index $i$")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    for side in axes.spines.values():
        side.set_color("#9a9a9a")
    _write_numbers(axes, matrix, top)
    bar = figure.colorbar(image, ax=axes, label="effective distance (tokens)", shrink=0.9, extend="max" if beyond else "neither")
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    handles = [Patch(facecolor="white", edgecolor="#9a9a9a", label="not visible")]
    if beyond:
        handles.append(Patch(facecolor=UNTRAINED, label="never trained"))
    axes.legend(handles=handles, loc="upper right", frameon=False, fontsize=9)


def _write_numbers(axes: Any, matrix: torch.Tensor, top: float, most: int = 16) -> None:
    """Small matrices carry their numbers."""
    if matrix.shape[0] > most:
        return
    for i, row in enumerate(matrix.tolist()):
        for j, d in enumerate(row):
            if d == d:
                axes.text(j, i, f"{d:.2f}".rstrip("0").rstrip("."), ha="center", va="center", fontsize=8, color="white" if d < 0.6 * top else "black")


def _turns(axes: Any, pairs: Pairs) -> None:
    """The tokens of one full turn, by pair. What is above the line of the trained window never turned fully in training."""
    own, new = 2 * torch.pi / pairs.own, 2 * torch.pi / pairs.new
    index = torch.arange(len(own))
    bad = pairs.untrained
    axes.plot(index, own, color="#8a8a8a", lw=2, label="as trained")
    scaled = f"; cos and sin times {pairs.scaling:.4g}" if pairs.scaling != 1 else ""
    axes.plot(index, new, color=NEAR_TO_FAR[1], lw=2, label=f"with the method{scaled}")
    if bool(bad.any()):
        axes.plot(index[bad], new[bad], color=UNTRAINED, ls="", marker="o", ms=5, label="untrained angles in the text")
    for tokens, name in ((pairs.window, "trained window"), (pairs.context, "text")):
        axes.axhline(tokens, color="black", ls=":", lw=1)
        axes.annotate(f"{name}, {tokens}", (len(own) - 1, tokens), xytext=(0, 2), textcoords="offset points", ha="right", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("rotary pair, from fast to slow")
    axes.set_ylim(top=3 * max(own.max().item(), new.max().item()))
    axes.set_ylabel("tokens of one full turn")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")


def save(figure: Any, path: str | Path, colours: int | None = None) -> None:
    """The whole picture or none; with `colours`, reduced to so many."""
    temporary = Path(f"{path}.tmp")
    try:
        _draw(figure, temporary, colours)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw(figure: Any, path: Path, colours: int | None) -> None:
    if colours is None:
        figure.savefig(path, format="png", metadata=SIGNATURE)
    else:
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


def reach(result: dict[str, Any], path: str | Path) -> None:
    """The result of `longreach.apps.demo.run` -> a PNG: the loss along a text, and for each method the keys found by length and depth."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    from longreach.apps.demo import NAMES, share

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
    save(figure, path)


def _loss_curves(axis: Any, result: dict[str, Any]) -> None:
    from longreach.apps.demo import NAMES

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
