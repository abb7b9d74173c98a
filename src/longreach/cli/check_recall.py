"""`longreach check --recall`: a quick look at what a model finds at a context, beside what it finds inside its trained window.

Knows options, a table and what is said; the looking is done in evals/tune/recall.py.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from longreach.cli import common, eval_options, profiles
from longreach.cli.common import Output
from longreach.cli.console import Pace
from longreach.quantities import counted

if TYPE_CHECKING:
    from rich.console import Console

    from longreach.methods.base import Method


def run(out: Output, model: Any, tokenizer: Any, method: Method | None, context: int, trained_window: int | None, by_profile: profiles.Asked) -> dict[str, Any]:
    """Two documents with five keys each, as plain data. Both are made before one is read, and the context comes first: what is refused is refused at once."""
    from longreach.evals.tune.recall import look, questions
    from longreach.methods.stock import Stock

    window = eval_options.window_of(model, trained_window)
    profile = profiles.find(out, by_profile, model, method, context, trained_window)
    pace = Pace(at_once=True)

    def progress(length: int) -> Any:
        def update(done: int, total: int) -> None:
            if pace.due():
                out.note(f"reading a document of {counted(length, 'token')}, question {done + 1} of {total}")

        return update

    asked, asked_inside = questions(tokenizer, context), questions(tokenizer, window)
    here = look(model, tokenizer, method, context, asked, trained_window=trained_window, profile=profile, progress=progress(context))
    inside = look(model, tokenizer, Stock(), window, asked_inside, trained_window=trained_window, progress=progress(window))
    for note in dict.fromkeys((*inside.alone, *here.alone)):
        out.warn(note)
    return {"context": context, "trained_window": window, "recall": {"here": here.to_json(), "inside": inside.to_json()}}


def show(console: Console, result: dict[str, Any], trained_window: int | None) -> None:
    from rich.text import Text

    from longreach.cli import parameters
    from longreach.planning.profile import options

    table = common.plain_table("", "tokens", "method", "found", "95 % interval", "s")
    for name, where in (("here", "at the context"), ("inside", "inside the window")):
        row = result["recall"][name]
        spread = f"{100 * row['low']:.0f} to {100 * row['high']:.0f} %"
        method = Text(parameters.brief(row["method"]))
        table.add_row(where, str(row["length"]), method, f"{row['found']} of {row['keys']}", spread, f"{row['seconds']:.3g}")
    console.print(table)
    here, inside = result["recall"]["here"], result["recall"]["inside"]
    console.print(
        f"at {counted(here['length'], 'token')} this model finds {here['found']} of {here['keys']} keys here, "
        f"{inside['found']} of {inside['keys']} inside its window",
        soft_wrap=True,
    )
    said = "one document each: a look, not a measurement"
    if here["length"] > result["trained_window"]:  # inside it there is nothing to tune
        said += f". longreach tune {shlex.join(options(result['model'], here['length'], trained_window))} measures"
    console.print(said, soft_wrap=True, markup=False)
