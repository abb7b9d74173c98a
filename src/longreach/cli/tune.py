"""`longreach tune`: measure which method and setting this model likes best at a context, and write a profile that other commands use.

Knows options, tables and what is said; proposing, measuring and choosing is done in `longreach.evals.tune`.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach.cli import common, eval_options, targets
from longreach.cli import text as texts
from longreach.cli.common import Output
from longreach.cli.console import duration
from longreach.quantities import CHUNK_SIZE, counted, seconds_of

if TYPE_CHECKING:
    from rich.console import Console

    from longreach.evals.tune.outcome import Outcome
    from longreach.evals.tune.plan import Cost, Plan
    from longreach.evals.tune.study import ModelBench

PRICE = 0.25


def budget_of(text: str | float) -> float:
    """ "10m" -> 600. Raises for a number without a unit: of 10, nobody knows whether it means seconds or minutes."""

    def with_unit(given: str | float) -> float:
        seconds = seconds_of(given)
        if str(given).strip()[-1].isdigit():
            raise ValueError(f"budget needs a unit; write {given}s, {given}m or {given}h")
        return seconds

    return common.parsed(with_unit, text)


Budget = Annotated[float, typer.Option("--budget", parser=budget_of, metavar="TIME", help="Time for all of it, such as 90s, 10m or 1h; earlier calls count.")]


def command(
    context: Annotated[int, typer.Option("--context", parser=common.tokens, metavar="TOKENS", help="Tokens of the whole sequence, such as 16k.")],
    model: common.Model = "nano",
    budget: Budget = "10m",  # type: ignore[assignment]
    text: Annotated[str | None, typer.Option("--text", help="Text to hide facts in and to predict: a file or @book. Filler and the book if not given.")] = None,
    encoding: common.Encoding = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Task to be good at; may be repeated. passkeys if not given.")] = None,
    price: Annotated[float, typer.Option("--price", min=0.0, help="Nats per token above the lowest loss that recall may cost.")] = PRICE,
    profile: Annotated[Path | None, typer.Option("--out", "-o", help="The profile to write or to add to; the user's cache if not given.")] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw recall against loss into a PNG.")] = None,
    work: Annotated[Path | None, typer.Option("--work", help="Folder of what is measured, where a tune goes on; in the user's cache if not given.")] = None,
    seed: eval_options.Seed = 0,
    chat: eval_options.Chat = "auto",
    only_list: Annotated[bool, typer.Option("--list", help="Show the candidates and an estimate of the time; measure nothing else.")] = False,
    chunk_size: eval_options.ChunkSize = CHUNK_SIZE,
    dtype: common.Dtype = None,
    device: common.Device = None,
    trained_window: common.TrainedWindow = None,
    force: common.Force = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Measure which setting finds most at a context on this model, and at what price in loss; write it to a profile."""
    with common.output(as_json, verbose, quiet) as out:
        if profile is not None:
            targets.refuse(profile, targets.PROFILE, None)
        targets.check_picture(out, picture, force, "--picture")
        passage = None if text is None else texts.read(text, texts.LARGEST_FILE, out.note, encoding)
        chosen = tuple(eval_options.find_tasks(tasks or ["passkeys"]))
        with common.quiet_transformers(verbose):
            loaded, tokenizer = common.load_model(out, model, dtype, device)
            from longreach.drawing import frontier
            from longreach.evals.tune import outcome
            from longreach.evals.tune.study import Asked, ModelBench

            asked = Asked(context, chosen, passage, seed, chat, trained_window, chunk_size)
            bench = ModelBench(loaded, tokenizer, model, asked, work)
            if only_list:
                listed = {"model": model, **outcome.listing(bench, budget)}
                out.finish(listed, lambda console: show_list(console, listed))
                return
            out.kept = f"what was measured is kept in {bench.place.path}, and the same command goes on from there"
            if remark := outcome.before(bench, profile, price)[1]:
                out.warn(remark)
            from longreach.cli.eval_run import progress_of

            with progress_of(out, bench.place.path, "reading") as progress:
                found = outcome.tune(bench, budget, price, said=lambda plan, cost: say_plan(out, bench, plan, cost, budget), progress=progress)
        result = {**found.to_json(), "model": model}
        if found.decision.chosen is not None:  # before the picture: what was measured for long is kept even where that fails
            written = outcome.keep(found, profile)
            result |= {"profile": str(written), "use": use(model, context, profile, trained_window)}
        if picture is not None:
            frontier.draw(result, picture)
        out.finish(result, lambda console: show(console, found, result))


def use(model: str, context: int, profile: Path | None, trained_window: int | None) -> str:
    """The command that uses the profile; one in the cache is found by itself, one of a stated trained window needs that again."""
    from longreach.planning.profile import options

    more = [] if profile is None else ["--profile", str(profile)]
    return f'longreach run {shlex.join([*options(model, context, trained_window), *more])} --file FILE --prompt "..."'


def say_plan(out: Output, bench: ModelBench, plan: Plan, cost: Cost, budget: float) -> None:
    from longreach.evals.tune.outcome import plan_row

    out.note(f"the first document took {briefly(cost.document)}; plan for {duration(budget)}: {ladder(plan_row(plan))}")
    out.note(f"what is measured is kept in {bench.place.path}")


def show_list(console: Console, listed: dict[str, Any]) -> None:
    from rich.text import Text

    table = common.plain_table("", "candidate", "options", "why")
    for place, row in enumerate(listed["candidates"], 1):
        table.add_row(str(place), Text(row["label"]), Text(" ".join(row["options"])), row["why"])
    common.show_table(console, table)
    for row in listed["left_out"]:
        console.print(f"left out: {row['label']}: {row['reason']}", soft_wrap=True)
    seconds = listed["document_seconds"]
    if seconds is not None:
        console.print(f"one document with its questions: about {briefly(seconds)} (an estimate from short beginnings of the document)")
    if listed["plan"] is not None:
        console.print(f"a budget of {duration(listed['budget'])} buys: {ladder(listed['plan'])}", soft_wrap=True)
    for sentence in [*([listed["remark"]] if listed["remark"] else []), *listed["notes"]]:
        console.print(sentence, soft_wrap=True)


def ladder(plan: dict[str, Any]) -> str:
    if not plan["rungs"]:
        return "nothing new, because more is known already than it buys"
    rungs = ", then ".join(f"{counted(candidates, 'candidate')} with {counted(documents, 'document')}" for candidates, documents in plan["rungs"])
    losses = f"{plan['losses']} losses" if plan["losses"] != 1 else "1 loss"
    return f"{rungs}; {losses}; {counted(plan['ceiling'], 'part')} of the ceiling; about {duration(plan['seconds'])}"


def briefly(seconds: float) -> str:
    """Of one document, which may take less than a second."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g} s"


def found_of(row: dict[str, Any]) -> str:
    """Of every task where there are several."""
    tasks = row.get("by_task") or {"": row}
    return ", ".join(f"{name} {each['found']:g} of {each['of']}".strip() for name, each in tasks.items())


def show(console: Console, found: Outcome, result: dict[str, Any]) -> None:
    from longreach.evals.tune.outcome import summary

    table = common.plain_table("", "candidate", "found", "recall (%)", "95 % interval", "documents", "loss", "s")
    for row in sorted((row for row in result["candidates"] if row["recall"] is not None), key=lambda row: (-row["documents"], -row["recall"])):
        mark = "*" if row["chosen"] else "!" if row["reason"] else ""
        loss = "" if row["loss"] is None else f"{row['loss']:.3f}"
        table.add_row(
            mark, row["label"], found_of(row), f"{100 * row['recall']:.0f}", f"{100 * row['low']:.0f} to {100 * row['high']:.0f}",
            str(row["documents"]), loss, f"{row['seconds']:.3g}",
        )  # fmt: skip
    common.show_table(console, table)
    if len(result["tasks"]) > 1:
        console.print("recall is the mean over the tasks, each of which counts the same, however many questions it asks", soft_wrap=True)
    for row in result["ceiling"]:
        if "recall" in row:
            spread = f"{100 * row['low']:.0f} to {100 * row['high']:.0f} %"
            console.print(f"ceiling, {row['name']} ({counted(row['length'], 'token')}): {found_of(row)} ({spread})", soft_wrap=True)
        else:
            console.print(f"ceiling, {row['name']} (up to {row['length']}): loss {row['loss']:.3f}", soft_wrap=True)
    console.print()
    for sentence in summary(found):
        console.print(f"- {sentence}", soft_wrap=True)
    console.print()
    if "profile" in result:
        console.print(f"profile: {result['profile']}\nuse it: {result['use']}", soft_wrap=True, markup=False)
    else:
        console.print(f"no profile was written: {found.decision.sentences[0]}", soft_wrap=True, markup=False)
