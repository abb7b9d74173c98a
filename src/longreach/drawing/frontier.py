"""A picture of what tuning found: recall against loss of every candidate, with intervals, the choice marked, the ceiling as a line.

Knows plain numbers and matplotlib, which is imported when a picture is drawn. A candidate without a loss is at the right edge, beyond the line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longreach.drawing import canvas

STEP = 0.01  # nats between candidates whose loss is not known
NAMED = 8  # candidates that are named in the picture; the others are grey points


def draw(found: dict[str, Any], path: str | Path) -> None:
    """A PNG at `path`, whole or not at all. `found`: what `longreach tune --json` prints."""
    tried = [row for row in found["candidates"] if row["recall"] is not None]
    figure = canvas.figure(9.5, 5.4, dpi=150)
    axes = figure.subplots()
    losses = [row["loss"] for row in tried if row["loss"] is not None]
    edge = _edge(losses, found["price"])
    named = sorted(tried, key=lambda row: (not row["chosen"], row["loss"] is None, -row["recall"]))[:NAMED]
    colours = dict(zip((row["label"] for row in named), canvas.cycle(len(named))))
    unmeasured = 0
    for row in tried:
        place = row["loss"]
        if place is None:  # beside each other: many share a recall
            place, unmeasured = edge + unmeasured * STEP, unmeasured + 1
        _point(axes, row, place, colours.get(row["label"]))
    if losses:
        axes.axvline(min(losses) + found["price"], color="#777777", lw=0.8, ls="--")
        axes.annotate(f"price {found['price']:g}", (min(losses) + found["price"], 2), fontsize=7, rotation=90, ha="right", va="bottom", color="#555555")
    if len(losses) < len(tried) and losses:
        axes.annotate("loss not measured", (edge, -4), fontsize=7, ha="left", va="top", color="#777777")
    ceiling = next((row for row in found["ceiling"] if "recall" in row), None)
    if ceiling is not None:
        canvas.level(axes, 100 * ceiling["recall"], f"plain attention inside the window, {ceiling['length']} tokens")
    axes.set_xlabel("loss (nats per token) of the passage beyond the window" if losses else "no loss was measured", fontsize=9)
    axes.set_ylabel("recall (%), 95 % interval", fontsize=9)
    axes.set_ylim(-8, 108)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.legend(figure, axes)
    tasks = ", ".join(found["tasks"])
    figure.suptitle(f"{found['model']} at {found['context']} tokens (window {found['trained_window']}): {tasks}", fontsize=11)
    canvas.save(figure, path)


def _edge(losses: Sequence[float], price: float) -> float:
    """Where candidates without a loss are drawn: right of all others, and of the line of the price."""
    return max(*losses, min(losses) + price) + 0.05 if losses else 0.0


def _point(axes: Any, row: dict[str, Any], x: float, colour: str | None) -> None:
    y = 100 * row["recall"]
    bars = [[100 * (row["recall"] - row["low"])], [100 * (row["high"] - row["recall"])]]
    label = None if colour is None else f"{row['label']}: {row['found']:g} of {row['of']}" + (" (chosen)" if row["chosen"] else "")
    axes.errorbar([x], [y], yerr=bars, fmt="o", ms=5, color=colour or "#b8b8b8", elinewidth=1, capsize=2, label=label, zorder=3 if colour else 2)
    if row["chosen"]:
        axes.plot([x], [y], "o", ms=13, mfc="none", mec="black", mew=1.4, zorder=4)
