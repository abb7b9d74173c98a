"""`longreach check --all`: every method on every family of models, as a table, JSON or the page docs/families.md.

Knows options and tables; what is measured is in checking/exactness.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from longreach import files
from longreach.cli import targets
from longreach.cli.common import Output

if TYPE_CHECKING:
    from longreach.checking.exactness import Family


def run(out: Output, method: str | None, names: list[str] | None, markdown: Path | None, force: bool = False) -> dict[str, Any]:
    """Measure, write the page if wanted; -> the result as plain data."""
    from longreach.checking import exactness
    from longreach.checking.families import FAMILIES, REFUSED
    from longreach.cli import parameters

    known = [*FAMILIES, *REFUSED]
    if unknown := sorted(set(names or ()) - set(known)):
        raise ValueError(f"unknown family {unknown[0]!r}; choose among: {', '.join(known)}")
    if markdown is not None:
        targets.check(out, markdown, targets.FAMILIES_PAGE, force)
    wanted = None if method is None else [parameters.find(method).name]
    found: list[Family] = []
    for family in exactness.survey(names, wanted):
        found.append(family)
        out.note(f"{family.name}: {summary(family)}")
    if markdown is not None:
        from longreach.checking.families_page import page

        files.write(markdown, page(found), "page")
        out.note(f"wrote {markdown}")
    gates = {"fast_against_dense": exactness.FAST, "neutral_against_stock": exactness.NEUTRAL}
    return {"gates": gates, "families": [family.to_json() for family in found], "passed": all(family.passed for family in found)}


def summary(family: Family) -> str:
    if family.refusal is not None:
        return f"{'FAILS' if family.failed else 'refused'}: {family.refusal}"
    measured = [cell for cell in family.cells if cell.refusal is None]
    refused = len(family.cells) - len(measured)
    if not measured:
        return f"{refused} refused"
    fast, neutral = (max(getattr(cell, name) for cell in measured) for name in ("fast", "neutral"))
    failed = "".join(f"; {cell.method} FAILS" for cell in measured if not cell.passed)
    return f"{len(measured)} exact, fast against dense {fast:.1e}, neutral against stock {neutral:.1e}; {refused} refused{failed}"


def show(console: Console, result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="largest differences, relative to the largest logit, fp32", title_justify="left", box=box.SIMPLE)
    for column in ("family", "method", "fast against dense", "neutral against stock", ""):
        table.add_column(column, justify="right" if "against" in column else "left", no_wrap=column in ("family", "method"))
    for family in result["families"]:
        if family["refusal"]:
            table.add_row(family["name"], "every", "", "", Text(f"{'FAILS' if family['failed'] else 'refused'}: {family['refusal']}"))
        for cell in family["cells"]:
            if cell["refusal"]:
                table.add_row(family["name"], cell["method"], "", "", Text(f"refused: {cell['refusal']}"))
            else:
                state = Text("pass", "green") if cell["passed"] else Text("FAIL", "bold red")
                fast, neutral = ("not finite" if cell[name] is None else f"{cell[name]:.1e}" for name in ("fast", "neutral"))
                table.add_row(family["name"], cell["method"], fast, neutral, state)
    console.print(table)
    console.print("all gates pass" if result["passed"] else "a gate fails: please report it", style="" if result["passed"] else "bold red")
