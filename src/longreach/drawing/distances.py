"""Pictures of what a method sees: how far away every key is for every query, and the turns of its rotary pairs.

Knows matrices and frequencies; no methods, no models.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from longreach.drawing import canvas
from longreach.drawing.canvas import NEAR_TO_FAR, STOCK, UNTRAINED

MOST_CELLS = 512  # of a side of a drawn matrix; a larger one is sampled


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


def draw(matrix: torch.Tensor, title: str, path: str | Path, trained: int | None = None, pairs: Pairs | None = None) -> None:
    """matrix [Q, K] of effective distances, NaN where hidden -> a PNG at `path`.

    trained  distances above this were never trained and get a colour of their own; the colours up to it then mean the same in every picture. The
             trained window itself, one more than the largest trained distance, is the ceiling that published methods allow themselves.
    pairs    for a method that changes frequencies: a second panel, how long a turn of every rotary pair is. `trained` is taken from it.
    """
    trained = pairs.reach if pairs is not None else trained
    figure = canvas.figure(*(9.4, 4.3) if pairs is not None else (5.2, 4.6), dpi=110)
    panels = figure.subplots(1, 1 if pairs is None else 2, squeeze=False, width_ratios=[1] if pairs is None else [1.08, 1])[0]
    figure.suptitle("\n".join(textwrap.wrap(title, 56 if pairs is None else 100)), fontsize=11)
    _matrix(figure, panels[0], matrix, trained, fixed=pairs is None)
    if pairs is not None:
        _turns(panels[1], pairs)
    canvas.save(figure, path, canvas.REDUCED)


def _matrix(figure: Any, axes: Any, matrix: torch.Tensor, trained: int | None, fixed: bool) -> None:
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    n = matrix.shape[0]
    step = -(-n // MOST_CELLS)
    seen = matrix[::step, ::step]
    largest = seen.nan_to_num(0).max().item()
    beyond = trained is not None and largest > trained
    top = trained if trained is not None and (fixed or beyond) else largest
    colours = canvas.blend(*NEAR_TO_FAR).with_extremes(bad="white", over=UNTRAINED)
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
    axes.plot(index, own, color=STOCK, lw=2, label="as trained")
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
