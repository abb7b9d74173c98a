"""A picture of what tuning found: recall against loss of every candidate, with intervals, the choice marked, the ceiling as a line.

Knows plain numbers and matplotlib, which is imported when a picture is drawn. A candidate without a loss has no place on the axis of losses: it stands in a
strip of its own, under its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longreach.drawing import canvas

WIDTH, COLUMN = 8.0, 0.24  # inches: of the picture, and of a candidate in the strip
GREY = "#777777"


def draw(found: dict[str, Any], path: str | Path) -> None:
    """A PNG at `path`, whole or not at all. `found`: what `longreach tune --json` prints."""
    canvas.save(picture(found), path)


def picture(found: dict[str, Any]) -> Any:
    """The figure: the candidates whose loss is known against that, the others beside them, on the same axis of recall."""
    tried = [row for row in found["candidates"] if row["recall"] is not None]
    measured = sorted((row for row in tried if row["loss"] is not None), key=lambda row: (not row["chosen"], -row["recall"]))
    others = sorted((row for row in tried if row["loss"] is None), key=lambda row: (not row["chosen"], -row["recall"]))
    widths = [WIDTH] * bool(measured) + [max(1.2, COLUMN * len(others))] * bool(others)
    figure = canvas.figure(1.5 + (sum(widths) or WIDTH), 5.4, dpi=150)
    panels = list(figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]) if widths else [figure.subplots()]
    if measured:
        _losses(panels[0], measured, found["price"])
    if others:
        _strip(panels[-1], others)
    ceiling = next((row for row in found["ceiling"] if "recall" in row), None)
    for axes in panels:
        if ceiling is not None:
            canvas.level(axes, 100 * ceiling["recall"], f"plain attention inside the window, {ceiling['length']} tokens" if axes is panels[0] else "")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("recall (%), 95 % interval", fontsize=9)
    panels[0].set_ylim(-8, 108)
    canvas.legend(figure, panels[0])
    tasks = ", ".join(found["tasks"])
    figure.suptitle(f"{found['model']} at {found['context']} tokens (window {found['trained_window']}): {tasks}", fontsize=11)
    return figure


def _losses(axes: Any, rows: Sequence[dict[str, Any]], price: float) -> None:
    for row, colour in zip(rows, canvas.cycle(len(rows))):
        label = f"{row['label']}: {row['found']:g} of {row['of']}" + (" (chosen)" if row["chosen"] else "")
        _point(axes, row, row["loss"], colour, label)
    edge = min(row["loss"] for row in rows) + price
    axes.axvline(edge, color=GREY, lw=0.8, ls="--")
    axes.annotate(f"price {price:g}", (edge, 2), fontsize=7, rotation=90, ha="right", va="bottom", color="#555555")
    axes.set_xlabel("loss (nats per token) of the passage beyond the window", fontsize=9)


def _strip(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    for place, row in enumerate(rows):
        _point(axes, row, place, "#8f8f8f", None)
    axes.set_xlim(-0.7, len(rows) - 0.3)
    axes.set_xticks(range(len(rows)), [row["label"] for row in rows], rotation=90, fontsize=6.5)
    axes.tick_params(axis="x", length=0)
    axes.set_title("loss not measured", fontsize=8, color=GREY)


def _point(axes: Any, row: dict[str, Any], x: float, colour: str, label: str | None) -> None:
    y = 100 * row["recall"]
    bars = [[100 * (row["recall"] - row["low"])], [100 * (row["high"] - row["recall"])]]
    axes.errorbar([x], [y], yerr=bars, fmt="o", ms=5, color=colour, elinewidth=1, capsize=2, label=label)
    if row["chosen"]:
        axes.plot([x], [y], "o", ms=13, mfc="none", mec="black", mew=1.4, zorder=4)
