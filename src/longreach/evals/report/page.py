"""Several runs as one HTML page that needs nothing else: tables that sort, pictures and their numbers embedded, light and dark.

Knows views of runs, and what page.html shows of them: rows of cells, which are text, a number, a pair (number, text) that sorts by the number and
shows the text, or a measured value. Whatever comes out of a run (answers of a model, names, errors) is text, never markup: Jinja escapes it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from longreach.drawing.canvas import Picture
from longreach.evals.harness.results import Folder, Row, compare, size
from longreach.evals.report.figures import draw
from longreach.evals.report.view import View

TEMPLATE = Path(__file__).with_name("page.html")
WRONG = 12  # wrong answers shown of each run
LONGEST = 300  # characters of an answer


def render(folders: Sequence[Folder], views: Sequence[View], figures: str | Path, palette: str = "needle") -> tuple[bytes, list[Picture]]:
    """Draw the pictures into the folder `figures` -> the page, and the pictures."""
    labels = [view.label for view in views]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two runs are called the same ({', '.join(sorted(labels))}); give their folders different names")
    pictures = draw(views, figures, palette)
    template = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        runs=runs(views),
        results=tables(views, lambda row: row.depth is None and row.bench != "perplexity", "(%)", "{:.1f}"),
        caution=caution(views),
        perplexities=tables(views, lambda row: row.bench == "perplexity", "", "{:.4g}"),
        pictures=[{"title": p.title, "name": p.csv.name, "png": in_base64(p.png), "csv": in_base64(p.csv)} for p in pictures],
        comparisons=comparisons(folders, views),
        troubles=troubles(views),
        wrong=[{"label": view.label, "rows": spread_out(rows, WRONG), "count": len(rows)} for view in views if (rows := wrong_answers(view))],
        how=[(view.label, json.dumps(view.run, indent=1, sort_keys=True)) for view in views],
    )
    return page.encode("utf-8", "replace"), pictures  # an answer may hold half a character


def in_base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def runs(views: Sequence[View]) -> list[tuple[Any, ...]]:
    rows = []
    for view in views:
        config = view.run.get("config", {})
        rows.append((
            view.label, config.get("model"), config.get("method_text"), config.get("context"), view.window, config.get("dtype"), len(view.records) or None,
            sum(r.error is not None for r in view.records), sum(r.truncated_tokens > 0 for r in view.records),
        ))  # fmt: skip
    return rows


def tables(views: Sequence[View], wanted: Callable[[Row], bool], unit: str, form: str) -> list[dict[str, Any]]:
    """A table for each task and metric, with a line for each run and a column for each length; shares of a hundred are shaded."""
    found: dict[tuple[str, str], list[tuple[str, Row]]] = {}
    for view in views:
        for row in view.rows:
            if row.value is not None and wanted(row):
                found.setdefault((row.task, row.metric), []).append((view.label, row))
    return [by_length(f"{task}: {metric} {unit}".strip(), cells, form, bool(unit)) for (task, metric), cells in found.items()]


def by_length(title: str, cells: Sequence[tuple[str, Row]], form: str, shaded: bool) -> dict[str, Any]:
    """`cells` are pairs of a run's label and a row of metrics."""
    lengths = sorted({row.length for _, row in cells}, key=lambda n: (n is None, n or 0))
    counted = [row for _, row in cells if row.length is not None] or [row for _, row in cells]
    counts = [size(*each) for each in sorted({(row.n, row.documents or row.n) for row in counted})]
    at = {(label, row.length): row for label, row in cells}
    rows = [(label, *(measured(at.get((label, n)), form, shaded) for n in lengths)) for label in dict.fromkeys(label for label, _ in cells)]
    samples = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
    return {"title": title, "samples": samples, "head": ("run", *("all" if n is None else str(n) for n in lengths)), "rows": rows}


def measured(row: Row | None, form: str, shaded: bool) -> dict[str, Any] | None:
    """The value, with its interval below it."""
    if row is None or row.value is None:
        return None
    share = f"{row.value / 100:.3f}" if shaded else None
    return {"value": row.value, "text": form.format(row.value), "share": share, "interval": interval(row)}


def interval(row: Row) -> str:
    digits = ".4g" if row.bench == "perplexity" else ".0f"
    return "" if row.ci_low is None or row.ci_high is None or row.n < 2 else f"{row.ci_low:{digits}} to {row.ci_high:{digits}}"


def caution(views: Sequence[View]) -> str:
    """Perplexity is never shown without a word about recall."""
    measured = any(row.bench == "perplexity" for view in views for row in view.rows)
    recall = any(view.records for view in views)
    if measured and not recall:
        return "These runs hold perplexities only. A low perplexity does not imply that anything far away is remembered: run the pass key too."
    return "A low perplexity does not imply recall; look at both." if measured else ""


def comparisons(folders: Sequence[Folder], views: Sequence[View]) -> list[tuple[Any, ...]]:
    """Every run against the first, where they have samples in common."""
    rows: list[tuple[Any, ...]] = []
    for folder, view in zip(folders[1:], views[1:]):
        try:
            found = compare(folders[0], folder)
        except ValueError:  # nothing in common, such as a run of perplexities
            continue
        for r in found:
            length = (r["length"], str(r["length"])) if r["length"] is not None else (0, "all")
            p = (r["p"], "" if r["p"] is None else f"{r['p']:.3g}")
            spread = f"{r['low']:+.1f} to {r['high']:+.1f}"
            n, difference = (r["n"], size(r["n"], r["documents"])), (r["difference"], f"{r['difference']:+.1f}")
            rows.append((views[0].label, view.label, r["task"], r["metric"], length, n, difference, spread, p))
    return rows


def troubles(views: Sequence[View]) -> list[tuple[str, str, str]]:
    lines = []
    for view in views:
        if cut := [r for r in view.records if r.truncated_tokens]:
            lines.append((view.label, f"{len(cut)} prompts were cut, by {sum(r.truncated_tokens for r in cut)} tokens in all", ""))
        for r in view.records:
            if r.error is not None:
                lines.append((view.label, r.sample_id, r.error[:LONGEST]))
    return lines


def wrong_answers(view: View) -> list[tuple[Any, ...]]:
    rows = []
    for r in view.records:
        if r.error is None and r.metrics.get(view.metric(r.task), 1.0) < 1:
            wanted = " | ".join(r.references)
            rows.append((r.sample_id, (r.prompt_tokens, str(r.prompt_tokens)), wanted[:LONGEST], (r.prediction or "")[:LONGEST]))
    return rows


def spread_out(rows: list[Any], most: int) -> list[Any]:
    """At most so many, from the whole list."""
    return rows if len(rows) <= most else [rows[n * len(rows) // most] for n in range(most)]
