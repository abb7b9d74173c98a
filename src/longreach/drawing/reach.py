"""The picture of a demonstration: the loss along a text, and for each method the keys found by length and depth.

Knows its plain result; no models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longreach.drawing import canvas


def draw(result: dict[str, Any], labels: dict[str, str], path: str | Path) -> None:
    """A PNG of a demonstration's result: `window` and `plan.lengths` in windows; `loss.methods`, a curve for each method; `trials`, a row for each key.

    labels  of the methods, in the order of their panels.
    """
    window = result["window"]
    figure = canvas.figure(12.6, 3.9, dpi=150)
    axes = figure.subplots(1, 1 + len(labels), width_ratios=[1.9, *([1] * len(labels))])
    _loss_curves(axes[0], result["loss"]["methods"], labels, window)
    lengths = [n * window for n in result["plan"]["lengths"]]
    depths = sorted({row["depth"] for row in result["trials"]})
    colours = canvas.blend(*canvas.FEW_TO_MANY)
    for axis, (name, label) in zip(axes[1:], labels.items()):
        cells = [[_percent_found(result["trials"], name, length, depth) for length in lengths] for depth in depths]
        axis.imshow(cells, cmap=colours, vmin=0, vmax=100, aspect="auto", origin="upper")
        for y, row in enumerate(cells):
            for x, value in enumerate(row):
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value > 60 else "#333333")
        axis.set_xticks(range(len(lengths)), [f"{n // window}x" for n in lengths])
        axis.set_yticks(range(len(depths)), [f"{100 * d:.0f}" for d in depths] if axis is axes[1] else [""] * len(depths))
        axis.set_title(label, fontsize=11, color=canvas.METHODS[name], fontweight="bold")
        axis.set_xlabel(f"length ({window} tokens = 1x)", fontsize=9)
        axis.tick_params(length=0, labelsize=8.5)
        for side in axis.spines.values():
            side.set_visible(False)
    axes[1].set_ylabel("depth of the key in the text (%)", fontsize=9)
    figure.suptitle("Left: loss along a book.  Right: pass keys found (%), by length of the text and depth of the key", fontsize=11)
    canvas.save(figure, path)


def _percent_found(trials: list[dict[str, Any]], method: str, length: int, depth: float) -> float:
    found = [row["found"] for row in trials if (row["method"], row["length"], row["depth"]) == (method, length, depth)]
    return 100 * sum(found) / len(found) if found else 0.0


def _loss_curves(axis: Any, curves: dict[str, list[float]], labels: dict[str, str], window: int) -> None:
    longest = max(map(len, curves.values()))
    for name, label in labels.items():
        curve = curves[name]
        axis.plot([window * (n + 1) for n in range(len(curve))], curve, color=canvas.METHODS[name], label=label, lw=2, marker="o", ms=2.5)
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
