"""What the result of methods_on_nano.py says, in shares, tables and sentences. Measures and draws nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common import markdown

from longreach.evals.scores.statistics import mean
from longreach.methods import registry


@dataclass(frozen=True)
class Share:
    """`found` of `asked`, in percent, with Wilson's 95 % interval."""

    found: int
    asked: int

    @property
    def percent(self) -> float:
        return 100 * self.found / self.asked

    @property
    def interval(self) -> tuple[float, float]:
        sure = mean([1.0] * self.found + [0.0] * (self.asked - self.found))
        return 100 * sure.low, 100 * sure.high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.percent:.0f} % ({low:.0f} to {high:.0f})"


def share(cell: dict[str, Any], window: int, far: bool = False) -> Share | None:
    """Keys found, of all or of those farther away than the trained window; None if none was asked for."""
    found = [trial["found"] for trial in cell["trials"] if not far or trial["distance"] > window]
    return Share(sum(found), len(found)) if found else None


def label(cell: dict[str, Any]) -> str:
    return registry()[cell["asked"]].__name__


def tables(result: dict[str, Any]) -> str:
    """Two tables, methods by lengths, and what follows from them."""
    window, lengths = result["window"], result["plan"]["lengths"]
    cells = {(cell["asked"], cell["length"]): cell for cell in result["cells"]}
    names = list(dict.fromkeys(cell["asked"] for cell in result["cells"]))
    heads = [f"{length} ({length // window}x)" for length in lengths]
    far_lengths = [n for n in lengths if any(share(cell, window, far=True) for cell in result["cells"] if cell["length"] == n)]
    recall, other = [], []
    for name in names:
        row = [cells[name, n] for n in lengths]
        mark = lambda cell: "*" if cell["beyond_reach"] else ""  # noqa: E731
        recall.append([label(row[0]), *(f"{share(cell, window, far=True)}{mark(cell)}" for cell in row if cell["length"] in far_lengths)])
        other.append([label(row[0]), *(f"{all_keys.percent:.0f} %, {cell['loss'][-1]:.2f}" for cell in row if (all_keys := share(cell, window)))])
    parts = []
    if far_lengths:
        parts.append(markdown([f"far keys found (more than {window} tokens away)", *(heads[lengths.index(n)] for n in far_lengths)], recall))
        parts.append("95 % intervals in brackets. * This length is beyond the capacity of the parameters: some distances were never trained.")
    parts.append(markdown(["keys found at all depths, loss in the last window", *heads], other))
    parts.append("\n".join(f"- {sentence}" for sentence in findings(result)))
    return "\n\n".join(parts)


def several(names: list[str], row: list[dict[str, Any]]) -> str:
    """The names, unless they are those of all but one."""
    return "all others" if len(names) == len(row) - 1 else ", ".join(names)


def findings(result: dict[str, Any]) -> list[str]:
    """Who is ahead at which length, as far as the intervals tell."""
    window, said = result["window"], []
    for length in result["plan"]["lengths"]:
        row = [cell for cell in result["cells"] if cell["length"] == length]
        lowest = min(row, key=lambda cell: cell["loss"][-1])
        close = [label(cell) for cell in row if cell is not lowest and cell["loss"][-1] < lowest["loss"][-1] + 0.02]
        loss = f"the lowest loss in the last window is {label(lowest)}'s, {lowest['loss'][-1]:.2f}"
        loss += f" (within 0.02: {several(close, row)})" if close else ""
        shares = [(cell, found) for cell in row if (found := share(cell, window, far=True))]
        if not shares:
            said.append(f"{length} tokens: {loss}.")
            continue
        best, most = max(shares, key=lambda pair: pair[1].percent)
        level = [label(cell) for cell, found in shares if cell is not best and found.interval[1] >= most.interval[0]]
        recall = f"{label(best)} finds {most} of {most.asked} far keys, " if most.found else f"no method finds any of {most.asked} far keys"
        if most.found:
            recall += f"and these overlap with its interval: {several(level, row)}" if level else "its interval above all others"
        said.append(f"{length} tokens: {recall}; {loss}.")
    if bounded := [cell for cell in result["cells"] if cell["bounded"]]:
        found = [share(cell, window, far=True) for cell in bounded]
        asked = sum(s.asked for s in found if s)
        if asked:
            names = " and ".join(dict.fromkeys(map(label, bounded)))
            said.append(f"{names}, whose memory is constant, found {sum(s.found for s in found if s)} of {asked} far keys over all lengths.")
    said += [f"{registry()[name].__name__} is left out: {reason}." for name, reason in result["left_out"].items()]
    return said
