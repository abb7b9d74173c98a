"""A picture of cost against length: memory and time of every method, with the limits of the device as lines.

Knows plain numbers and matplotlib, which is imported when a picture is drawn. Methods whose curves coincide share one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longreach.drawing import canvas
from longreach.quantities import counted

GIB = 2**30


def draw(plan: dict[str, Any], curves: dict[str, list[tuple[int, int, float]]], path: str | Path) -> None:
    """A PNG at `path`, whole or not at all.

    plan    what `longreach plan --json` prints.
    curves  name of a method -> (length, bytes on the device, seconds of one answer).
    """
    hardware = plan["hardware"]
    figure = canvas.figure(11.5, 4.6, dpi=150)
    memory, time = figure.subplots(1, 2)
    panel(memory, {name: [(n, size / GIB) for n, size, _ in points] for name, points in curves.items()}, "memory on the device (GiB)")
    panel(time, {name: [(n, seconds) for n, _, seconds in points] for name, points in curves.items()}, "seconds of one answer")
    for limit, label, line in ((hardware["memory"], f"memory of {hardware['name']}", "--"), (plan["weights"]["bytes"], "weights", ":")):
        memory.axhline(limit / GIB, color="black", lw=1, ls=line)
        memory.annotate(label, (memory.get_xlim()[0], limit / GIB), xytext=(2, 3), textcoords="offset points", fontsize=8)
    for axes in (memory, time):
        axes.axvline(plan["context"], color="#555555", lw=1, ls=":")
        axes.annotate("asked for", (plan["context"], axes.get_ylim()[1]), xytext=(-3, -3), textcoords="offset points", ha="right", va="top", fontsize=8)
        window = plan["trained_window"]
        axes.axvline(window, color="#bbbbbb", lw=1)
        axes.annotate("trained window", (window, axes.get_ylim()[0]), xytext=(3, 3), textcoords="offset points", fontsize=8, color="#777777")
        axes.set_xlabel("context (tokens)")
    time.legend(frameon=False, fontsize=8)
    users = counted(plan["concurrency"], "user")
    how = "measured speeds" if plan["speeds"] == "measured" else "datasheet and assumed efficiencies"
    title = f"{plan['model']}, {plan['dtype']}, {users}, {plan['new_tokens']} new tokens on {hardware['name']} ({how})"
    figure.suptitle(title, fontsize=11)
    canvas.save(figure, path)


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
