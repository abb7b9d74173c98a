"""`longreach methods`: every method with its paper, its parameters and what it recalls, generated from the dataclasses.

Knows the registry; loads no model.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from longreach.cli.common import Json, output

if TYPE_CHECKING:
    from longreach.methods.base import Method


def command(
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Fill the generated sections of this page and draw its pictures instead.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods and their parameters."""
    with output(as_json) as out:
        from longreach.methods import registry

        if markdown is not None:
            from longreach.cli import methods_page

            written = [str(path) for path in methods_page.write(markdown)]
            out.finish({"written": written}, lambda console: console.print("\n".join(written), soft_wrap=True))
            return
        found = [describe(method) for method in registry().values()]
        out.finish({"methods": found}, lambda console: show(console, found))


def describe(method: type[Method]) -> dict[str, Any]:
    from longreach.cli import parameters

    try:  # may be a property of the parameters: class attributes are the defaults, so an empty instance answers for them
        bounded = bool(method.__new__(method).bounded)
    except AttributeError:
        bounded = False
    return {
        "name": method.name,
        "class": method.__name__,
        "paper": method.paper,
        "recalls": method.recalls,
        "bounded": bounded,
        "parameters": [p.to_json() for p in parameters.of(method)],
        "doc": inspect.getdoc(method) or "",
    }


def show(console: Console, found: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for method in found:
        console.print(Text.assemble((method["name"], "bold"), f"   {method['class']}, {method['paper']}"))
        console.print(f"  recalls {method['recalls']}; memory {'is bounded' if method['bounded'] else 'grows with the text'}")
        table = Table(box=box.SIMPLE, pad_edge=False)
        for column in ("parameter", "type", "default", "meaning"):
            table.add_column(column, no_wrap=column == "parameter")
        for p in method["parameters"]:
            default = "required" if p["required"] else "none" if p["default"] is None else str(p["default"])
            table.add_row(Text(p["option"]), Text(p["type"]), default, Text(p["help"]))
        console.print(table)
