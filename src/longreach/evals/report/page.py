"""Several runs as one HTML page that needs nothing else: tables that sort, pictures and their numbers embedded, light and dark.

Knows views of runs and HTML. Whatever comes out of a run (answers of a model, names, errors) is text, never markup.
"""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from longreach.drawing.canvas import Picture
from longreach.evals.harness.results import Folder, Row, compare
from longreach.evals.report.figures import draw
from longreach.evals.report.view import View

WRONG = 12  # wrong answers shown of each run
LONGEST = 300  # characters of an answer

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #fbfbf9; --line: #d8d8d2; --soft: #f1f1ec; --link: #1b6ca8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e5e8; --paper: #15181d; --line: #363b44; --soft: #1e2229; --link: #7db8e8; --bad: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.88rem; margin: 0.5rem 0 1rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { background: var(--soft); position: sticky; top: 0; } th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " \\2191"; } th[aria-sort=descending] button::after { content: " \\2193"; }
td.share { background: color-mix(in srgb, #0cd79f calc(var(--share) * 45%), transparent); } small { opacity: 0.7; } summary { cursor: pointer; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; background: white; border-radius: 6px; }
figcaption, .note { font-size: 0.88rem; } a { color: var(--link); } code, pre { font-family: ui-monospace, monospace; font-size: 0.85em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; } .bad { color: var(--bad); }
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, row = head.parentElement, body = row.parentElement.nextElementSibling, column = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of row.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = line => line.cells[column].dataset.value ?? line.cells[column].textContent;
  const compare = (a, b) => {
    const x = key(a), y = key(b), n = parseFloat(x), m = parseFloat(y);
    if (isNaN(n) !== isNaN(m)) return isNaN(n) ? 1 : -1;
    return (isNaN(n) ? x.localeCompare(y) : n - m) * (up ? 1 : -1);
  };
  body.append(...[...body.rows].sort(compare));
});
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write(folders: Sequence[Folder], views: Sequence[View], path: str | Path, figures: str | Path, palette: str = "needle") -> list[Picture]:
    """Draw the pictures into the folder `figures` and write the page -> the pictures."""
    labels = [view.label for view in views]
    if len(set(labels)) < len(labels):
        raise ValueError(f"two runs are called the same ({', '.join(sorted(labels))}); give their folders different names")
    pictures = draw(views, figures, palette)
    target = Path(path)
    temporary = target.with_name(f"{target.name}.tmp")
    temporary.write_bytes(page(folders, views, pictures).encode("utf-8", "replace"))
    os.replace(temporary, target)
    return pictures


def page(folders: Sequence[Folder], views: Sequence[View], pictures: Sequence[Picture]) -> str:
    parts = [
        "<h1>Long context, measured</h1>",
        "<p class=note>Every mean stands with its 95 % interval and the number of samples. Means of few samples are pictures, not claims.</p>",
        section("Runs", runs_table(views)),
        section("Results", results_table(views)),
    ]
    if text := caution(views):
        parts.append(f"<p class=note>{text}</p>")
    parts += [section("Perplexity", perplexity_table(views))] if any(row.bench == "perplexity" for view in views for row in view.rows) else []
    parts.append(section("Pictures", "".join(map(figure, pictures))))
    if (pairs := comparisons(folders, views)) is not None:
        parts.append(section("Paired comparison", pairs, closed=True))
    parts += [section("Errors and cuts", text)] if (text := troubles(views)) else []
    parts.append(section("Answers that were not fully right", "".join(wrong_answers(view) for view in views) or "<p>None.</p>", closed=True))
    parts.append(section("How it was run", "".join(how(view) for view in views), closed=True))
    return (
        f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=generator content=longreach>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<meta name=viewport content='width=device-width'><title>Long context, measured</title><style>{STYLE}</style></head>"
        f"<body>{''.join(parts)}<script>{SCRIPT}</script></body></html>\n"
    )


def section(title: str, body: str, closed: bool = False) -> str:
    """`closed`: what few read is a click away."""
    inside = f"<details><summary>show</summary>{body}</details>" if closed else body
    return f"<section><h2>{escape(title)}</h2>{inside}</section>"


def escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Cells are text; a number is set to the right, and a pair (number, text) sorts by the number and shows the text."""
    names = "".join(f"<th scope=col><button type=button>{escape(name)}</button></th>" for name in head)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"


class Html(str):
    """A cell that is markup already."""


def cell(value: Any) -> str:
    if isinstance(value, Html):
        return value
    if isinstance(value, tuple):
        number, text = value
        return f'<td class=n data-value="{escape("" if number is None else number)}">{escape(text)}</td>'
    if value is None:
        return "<td></td>"
    return f"<td{' class=n' if isinstance(value, int | float) else ''}>{escape(value)}</td>"


def runs_table(views: Sequence[View]) -> str:
    rows = []
    for view in views:
        config = view.run.get("config", {})
        rows.append((
            view.label, config.get("model"), config.get("method_text"), config.get("context"), view.window, config.get("dtype"), len(view.records) or None,
            sum(r.error is not None for r in view.records), sum(r.truncated_tokens > 0 for r in view.records),
        ))  # fmt: skip
    return table(("run", "model", "method", "context", "trained window", "dtype", "samples", "errors", "cut"), rows)


def results_table(views: Sequence[View]) -> str:
    """A table for each task and metric: a line for each run, a column for each length."""
    found = grouped(views, lambda row: row.depth is None and row.bench != "perplexity")
    return "".join(by_length(f"{task}: {metric} (%)", cells, "{:.1f}", True) for (task, metric), cells in found.items()) or "<p>No scored samples.</p>"


def perplexity_table(views: Sequence[View]) -> str:
    found = grouped(views, lambda row: row.bench == "perplexity")
    return "".join(by_length(f"{protocol}: {measure}", cells, "{:.4g}", False) for (protocol, measure), cells in found.items())


def grouped(views: Sequence[View], wanted: Callable[[Row], bool]) -> dict[tuple[str, str], list[tuple[str, Row]]]:
    """The rows that have a value, each with its run's label, by task and metric."""
    found: dict[tuple[str, str], list[tuple[str, Row]]] = {}
    for view in views:
        for row in view.rows:
            if row.value is not None and wanted(row):
                found.setdefault((row.task, row.metric), []).append((view.label, row))
    return found


def by_length(title: str, cells: Sequence[tuple[str, Row]], form: str, shaded: bool) -> str:
    """`cells` are pairs of a run's label and a row of metrics; the interval stands below the value."""
    lengths = sorted({row.length for _, row in cells}, key=lambda n: (n is None, n or 0))
    counts = sorted({row.n for _, row in cells if row.length is not None}) or sorted({row.n for _, row in cells})
    head = ("run", *("all" if n is None else str(n) for n in lengths))
    at = {(label, row.length): row for label, row in cells}
    rows = [(label, *(measured(at.get((label, n)), form, shaded) for n in lengths)) for label in dict.fromkeys(label for label, _ in cells)]
    samples = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"<h3>{escape(title)}</h3><p class=note>n = {samples} for each length</p>{table(head, rows)}"


def measured(row: Row | None, form: str, shaded: bool) -> Html | None:
    if row is None or row.value is None:
        return None
    shade = f' style="--share: {row.value / 100:.3f}" class="n share"' if shaded else " class=n"
    return Html(f'<td{shade} data-value="{row.value}">{form.format(row.value)}<br><small>{escape(interval(row))}</small></td>')


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


def figure(picture: Picture) -> str:
    image, numbers = (base64.b64encode(path.read_bytes()).decode() for path in (picture.png, picture.csv))
    title = escape(picture.title)
    return (
        f'<figure><img alt="{title}" src="data:image/png;base64,{image}"><figcaption>{title} '
        f'(<a download="{escape(picture.csv.name)}" href="data:text/csv;base64,{numbers}">numbers as csv</a>)</figcaption></figure>'
    )


def comparisons(folders: Sequence[Folder], views: Sequence[View]) -> str | None:
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
            rows.append((views[0].label, view.label, r["task"], r["metric"], length, r["n"], (r["difference"], f"{r['difference']:+.1f}"), spread, p))
    if not rows:
        return None
    words = "<p class=note>B minus A on the samples that both answered, in points, with a paired bootstrap; p is McNemar's exact test.</p>"
    return words + table(("A", "B", "task", "metric", "length", "n", "B - A", "95 % interval", "p"), rows)


def troubles(views: Sequence[View]) -> str:
    lines = []
    for view in views:
        if cut := [r for r in view.records if r.truncated_tokens]:
            lines.append((view.label, f"{len(cut)} prompts were cut, by {sum(r.truncated_tokens for r in cut)} tokens in all", ""))
        for r in view.records:
            if r.error is not None:
                lines.append((view.label, r.sample_id, r.error[:LONGEST]))
    return table(("run", "sample", "error"), lines) if lines else ""


def wrong_answers(view: View) -> str:
    rows = []
    for r in view.records:
        if r.error is None and r.metrics.get(view.metric(r.task), 1.0) < 1:
            wanted = " | ".join(r.references)
            rows.append((r.sample_id, (r.prompt_tokens, str(r.prompt_tokens)), wanted[:LONGEST], (r.prediction or "")[:LONGEST]))
    if not rows:
        return ""
    return f"<h3>{escape(view.label)}</h3><p class=note>{min(WRONG, len(rows))} of {len(rows)}</p>" + table(
        ("sample", "prompt tokens", "wanted", "answered"), spread_out(rows, WRONG)
    )


def spread_out(rows: list[Any], most: int) -> list[Any]:
    """At most so many, from the whole list."""
    return rows if len(rows) <= most else [rows[n * len(rows) // most] for n in range(most)]


def how(view: View) -> str:
    return f"<details><summary>{escape(view.label)}</summary><pre>{escape(json.dumps(view.run, indent=1, sort_keys=True))}</pre></details>"
