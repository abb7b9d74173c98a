"""A picture of cost against length: memory and time of every method, with the limits of the device as lines.

Knows the rows of a plan and matplotlib, which is imported when a picture is drawn. Methods whose curves coincide share one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from longreach.drawing import canvas

if TYPE_CHECKING:
    from longreach.planning.sizing import Plan, Row

GIB = 2**30


def draw(plan: Plan, curves: dict[str, dict[int, Row]], path: str | Path) -> None:
    """`curves`: name of a method -> length -> row. A PNG at `path`, whole or not at all."""
    request = plan.request
    figure = canvas.figure(11.5, 4.6, dpi=150)
    memory, time = figure.subplots(1, 2)
    panel(memory, {name: [(n, row.peak_bytes / GIB) for n, row in rows.items()] for name, rows in curves.items()}, "memory on the device (GiB)")
    panel(time, {name: [(n, turn(row, min(request.new_tokens, n - 1))) for n, row in rows.items()] for name, rows in curves.items()}, "seconds of one answer")
    for limit, label in ((request.hardware.memory, f"memory of {request.hardware.name}"), (request.architecture.weights.nbytes, "weights")):
        memory.axhline(limit / GIB, color="black", lw=1, ls="--" if limit == request.hardware.memory else ":")
        memory.annotate(label, (memory.get_xlim()[0], limit / GIB), xytext=(2, 3), textcoords="offset points", fontsize=8)
    for axes in (memory, time):
        axes.axvline(request.context, color="#555555", lw=1, ls=":")
        axes.annotate("asked for", (request.context, axes.get_ylim()[1]), xytext=(-3, -3), textcoords="offset points", ha="right", va="top", fontsize=8)
        axes.axvline(request.window.tokens, color="#bbbbbb", lw=1)
        axes.annotate("trained window", (request.window.tokens, axes.get_ylim()[0]), xytext=(3, 3), textcoords="offset points", fontsize=8, color="#777777")
        axes.set_xlabel("context (tokens)")
    time.legend(frameon=False, fontsize=8)
    users = f"{request.concurrency} user{'s' if request.concurrency > 1 else ''}"
    how = "measured speeds" if request.hardware.measured is not None else "datasheet and assumed efficiencies"
    figure.suptitle(f"{request.model}, {request.dtype}, {users}, {request.new_tokens} new tokens on {request.hardware.name} ({how})", fontsize=11)
    canvas.save(figure, path)


def turn(row: Row, new_tokens: int) -> float:
    return row.prefill_seconds + new_tokens * row.token_seconds


def panel(axes: Any, curves: dict[str, list[tuple[int, float]]], label: str) -> None:
    for number, (name, points) in enumerate(merged(curves).items()):
        axes.plot([n for n, _ in points], [y for _, y in points], color=canvas.COSTS[number % len(canvas.COSTS)], lw=2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def merged(curves: dict[str, list[tuple[int, float]]], tolerance: float = 0.02) -> dict[str, list[tuple[int, float]]]:
    """Curves that never differ by more than `tolerance` become one, named after all of them."""
    found: list[tuple[list[str], list[tuple[int, float]]]] = []
    for name, points in curves.items():
        for names, other in found:
            if [n for n, _ in other] == [n for n, _ in points] and all(abs(a - b) <= tolerance * b for (_, a), (_, b) in zip(points, other)):
                names.append(name)
                break
        else:
            found.append(([name], points))
    return {", ".join(names) if len(names) <= 3 else f"{', '.join(names[:2])} and {len(names) - 2} more": points for names, points in found}
