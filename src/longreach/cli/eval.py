"""`longreach eval`: the group of commands that measure what a method buys. Here: what there is to run, reports and comparisons of what was run.

Knows options, tables and folders of runs; running is in eval_run.py, eval_ppl.py and eval_lm.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach import files
from longreach.cli import targets
from longreach.cli.common import Force, Json, Output, output, plain_table
from longreach.quantities import counted

if TYPE_CHECKING:
    from rich.console import Console

    from longreach.drawing.canvas import Picture
    from longreach.evals.report.view import View

PALETTE = Annotated[str, typer.Option("--palette", help="Colours of the depth maps: needle, or safe for the colour-blind.")]


def subcommands() -> typer.Typer:
    """The commands of `longreach eval`."""
    from longreach.cli import eval_lm, eval_ppl, eval_run
    from longreach.cli.program import LENIENT

    app = typer.Typer(rich_markup_mode="rich")
    app.callback(invoke_without_command=True)(_help)
    app.command("list")(list_tasks)
    app.command("run", context_settings=LENIENT)(eval_run.command)
    app.command("estimate", context_settings=LENIENT)(eval_run.estimate)
    app.command("ppl", context_settings=LENIENT)(eval_ppl.command)
    app.command("lm-eval", context_settings=LENIENT)(eval_lm.command)
    app.command("report")(report)
    app.command("compare")(compare)
    return app


def _help(context: typer.Context) -> None:
    """Measure recall and perplexity at long lengths, and compare methods."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def list_tasks(as_json: Json = False) -> None:
    """List the tasks: their benchmark, licence, whether they need data, and their options."""
    with output(as_json) as out:
        from longreach.evals.tasks import tasks

        found = [
            {
                "name": task.name, "group": task.group, "version": task.version, "needs_data": task.needs_data, "license": task.license,
                "source": task.source, "metric": task.metric, "random": task.random, "options": dict(task.options),
                "doc": " ".join((type(task).__doc__ or "").split()),
            }
            for task in tasks().values()
        ]  # fmt: skip
        out.finish({"tasks": found}, lambda console: show_tasks(console, found))


def show_tasks(console: Console, found: list[dict[str, Any]]) -> None:
    """A table for each benchmark, so that the names of the tasks are whole on a narrow terminal."""
    for group in dict.fromkeys(task["group"] for task in sorted(found, key=lambda task: task["group"])):
        members = [task for task in found if task["group"] == group]
        licences = " / ".join(dict.fromkeys(task["license"] for task in members))
        console.print(f"{group or 'tasks of their own'}: {licences}", style="bold")
        table = plain_table("task", "data", "metric", "options and their defaults")
        table.columns[0].no_wrap = True
        for task in members:
            options = ", ".join(f"{name}={value}" for name, value in task["options"].items())
            table.add_row(task["name"], "needed" if task["needs_data"] else "made", task["metric"], options)
        console.print(table)
    console.print("A benchmark's name stands for all its tasks. Options are given as --option NAME=VALUE.")


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders that `eval run` or `eval ppl` wrote; the first is what others are compared with.")],
    html: Annotated[Path, typer.Option("--html", help="The page to write.")] = Path("longreach-report.html"),
    figures: Annotated[Path | None, typer.Option("--figures", help="Folder for the pictures and their csv; `figures` beside the page if not given.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Also write the results as tables in Markdown.")] = None,
    palette: PALETTE = "needle",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """One HTML page of several runs, with everything in it."""
    with output(as_json) as out:
        from longreach.evals.harness.results import Folder, runs_in_markdown
        from longreach.evals.report import page
        from longreach.evals.report.view import view

        targets.check(out, html, targets.REPORT_PAGE, force)
        if markdown is not None:
            targets.check(out, markdown, targets.REPORT_TABLES, force)
        folder = figures or html.parent / "figures"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is a file; name a folder for the pictures")
        opened = [Folder(each) for each in folders]
        views = [view(each) for each in opened]
        unfinished(out, folders, views)
        with files.said(html), TemporaryDirectory(dir=html.parent, prefix=".report-") as made:  # what the pictures are called is known when they are drawn
            text, drawn = page.render(opened, views, made, palette)
            pictures = placed(drawn, folder, force)
        files.write(html, text, "page")
        if markdown is not None:
            files.write(markdown, f"<!-- written by longreach eval report -->\n\n{runs_in_markdown(opened)}", "page")
        result = {"html": str(html), "figures": [{"title": p.title, "png": str(p.png), "csv": str(p.csv)} for p in pictures]}
        out.finish(result, lambda console: console.print(f"{html}: {counted(len(opened), 'run')}, {counted(len(pictures), 'picture')}", soft_wrap=True))


def unfinished(out: Output, folders: list[Path], views: list[View]) -> None:
    """Say which runs have not ended. Raises ValueError where there is nothing at all to show."""
    for folder, seen in zip(folders, views, strict=True):
        if seen.run.get("ended") is None:
            what = "some of its results" if seen.rows else "no results yet"
            out.warn(f"{folder} holds {what}: its run has not ended; the command that began it completes it")
    if not any(seen.rows for seen in views):
        raise ValueError(f"there is nothing to report: no run in {', '.join(map(str, folders))} has results; run it to its end")


def placed(pictures: list[Picture], folder: Path, force: bool) -> list[Picture]:
    """Put the pictures and their numbers into the folder, if all of them may be there."""
    folder.mkdir(parents=True, exist_ok=True)
    final = [dataclasses.replace(p, png=folder / p.png.name, csv=folder / p.csv.name) for p in pictures]
    for picture in final:
        targets.refuse(picture.png, targets.PICTURE, force)
        targets.refuse(picture.csv, targets.NUMBERS, force)
    for drawn, picture in zip(pictures, final, strict=True):
        files.write(picture.csv, drawn.csv.read_bytes(), "csv of a picture")
        files.write(picture.png, drawn.png.read_bytes(), "picture")
    return final


def compare(
    a: Annotated[Path, typer.Argument(help="Folder of a run.")],
    b: Annotated[Path, typer.Argument(help="Folder of another run of the same tasks.")],
    as_json: Json = False,
) -> None:
    """Compare two runs on the samples that both answered, paired: difference, its 95 % interval, and McNemar's exact test."""
    with output(as_json) as out:
        from longreach.evals.harness import results

        rows = results.compare(results.Folder(a), results.Folder(b))
        out.finish({"a": str(a), "b": str(b), "rows": rows}, lambda console: show_comparison(console, a, b, rows))


def show_comparison(console: Console, a: Path, b: Path, rows: list[dict[str, Any]]) -> None:
    console.print(f"A: {a}\nB: {b}")
    table = plain_table("task", "metric", "length", "n", "A (%)", "B (%)", "B - A", "95 % interval", "only A", "only B", "p")
    for r in rows:
        length = "all" if r["length"] is None else str(r["length"])
        only = ["" if r[name] is None else str(r[name]) for name in ("only_a", "only_b")]
        p = "" if r["p"] is None else f"{r['p']:.3g}"
        spread = f"{r['low']:+.1f} to {r['high']:+.1f}"
        table.add_row(r["task"], r["metric"], length, str(r["n"]), f"{r['a']:.1f}", f"{r['b']:.1f}", f"{r['difference']:+.1f}", spread, *only, p)
    console.print(table)
    whole = [r for r in rows if r["length"] is None and r["documents"] < r["n"]]
    if some := ", ".join({r["task"]: f"{r['task']}: {r['n']} about {counted(r['documents'], 'document')}" for r in whole}.values()):
        told = "samples about one document are not independent: documents are the units, and intervals and p are those of fewer samples"
        console.print(f"{told} ({some})", soft_wrap=True)
