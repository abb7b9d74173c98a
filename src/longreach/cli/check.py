"""`longreach check`: exactness, capacity and parameters for one model, measured on it.

Knows the options and the tables; the measurements are made in checking/measurements.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from longreach.cli import check_all, check_recall, common, profiles
from longreach.cli.common import Output
from longreach.quantities import counted

if TYPE_CHECKING:
    import torch

    from longreach.checking.measurements import Measurement
    from longreach.hf.extension import Extension
    from longreach.memory.budgets import Tiered
    from longreach.methods.base import Method
    from longreach.planning.profile import Profile

TAKES_METHOD_PARAMETERS = True
MULTIPLES = (2, 4, 8, 16, 32)
FEWEST_TOKENS, MOST_TOKENS = 48, 2048
FAILED = 1


def command(
    context: typer.Context,
    model: common.Model = "nano",
    declared: common.Context = None,
    method: common.MethodName = None,
    tokens: Annotated[int, typer.Option("--tokens", min=FEWEST_TOKENS, max=MOST_TOKENS, help="Length of the measured input; the dense truth is slow.")] = 300,
    dtype: common.Dtype = None,
    device: common.Device = None,
    trained_window: common.TrainedWindow = None,
    profile: common.ProfileFile = None,
    no_profile: common.NoProfile = False,
    memory: common.Memory = None,
    recall: Annotated[bool, typer.Option("--recall", help="Only this: hide keys at --context and inside the window, and see how many are found.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Every method on every family of tiny random models; minutes. --method NAME: one method.")] = False,
    family: Annotated[list[str] | None, typer.Option("--family", help="With --all: this family only; may be repeated.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="With --all: write the table as a Markdown page.")] = None,
    force: common.Force = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Measure on a model how exact Longreach is, and show what it would choose; or, with --recall, what it finds. Exits with 1 if a gate fails.

    Parameters of a method (--group-size, --window, --n-local, ...) are options too: see `longreach methods`.
    """
    with common.output(as_json, verbose, quiet) as out:
        if memory is not None and (every or recall):
            raise ValueError("--memory is for what is measured on one model; leave out --all and --recall, or --memory")
        if every:
            if context.args:
                raise ValueError(f"with --all every method runs at a small configuration of its own; leave out {context.args[0]}")
            if recall:
                raise ValueError("--recall looks at one model, and --all at tiny random ones; leave out one")
            if profile is not None:
                raise ValueError("with --all tiny random models are measured, which no profile was tuned for; leave out --profile")
            with common.quiet_transformers(verbose):
                found = check_all.run(out, method, family, markdown, force)
            out.finish(found, lambda console: check_all.show(console, found))
            if not found["passed"]:
                raise typer.Exit(FAILED)
            return
        if family or markdown:
            raise ValueError("--family and --markdown belong to --all; add it")
        if recall and declared is None:
            raise ValueError("--recall looks at a context; pass --context N too")
        chosen = common.method_of(context, method)
        by_profile = profiles.asked(profile, no_profile, chosen, model=model)
        if profile is not None and declared is None:
            raise ValueError("--profile chooses the method for a context; pass --context N too")
        with common.quiet_transformers(verbose):
            loaded, tokenizer = common.load_model(out, model, dtype, device)
            if recall and declared is not None:
                seen = {"model": model, **check_recall.run(out, loaded, tokenizer, chosen, declared, trained_window, by_profile)}
                out.finish(seen, lambda console: check_recall.show(console, seen, trained_window))
                return
            result = {"model": model, **examine(out, loaded, tokenizer, chosen, declared, tokens, trained_window, by_profile, memory)}
        out.finish(result, lambda console: show(console, result))
        if not result["passed"]:
            raise typer.Exit(FAILED)


def examine(
    out: Output,
    model: Any,
    tokenizer: Any,
    method: Method | None,
    declared: int | None,
    tokens: int,
    trained_window: int | None,
    by_profile: profiles.Asked,
    memory: Tiered | None = None,
) -> dict[str, Any]:
    """Everything about one model, as plain data. The model ends in fp32."""
    from longreach import extend
    from longreach.checking import measurements
    from longreach.hf.placement import device_of
    from longreach.methods.stock import Stock

    profile = profiles.find(out, by_profile, model, method, declared, trained_window)
    with extend(model, method or (None if declared else Stock()), context=declared, trained_window=trained_window, profile=profile) as extension:
        facts = extension.report()
        dial = list(choices(extension, profile))
        subject = method or (extension.method if declared else None)
        rotation = measurements.rotation(extension)
    ids = measurements.texts(model, tokenizer, tokens)
    groups = [group(None, [rotation, *own(out, model, ids[:, : facts["trained_window"]])])]
    for each in measurements.subjects(subject, tokens):
        out.note(f"measuring {each} on {counted(tokens, 'token')}")
        found = group(each, measurements.consistency(model, each, ids[:1], declared, memory))
        groups.append(found if memory is None else {**found, "memory": measurements.kept(model, each, ids[:1], declared, memory)})
    return {
        "device": str(device_of(model)),
        "tokens": tokens,
        "texts": measurements.TEXTS,
        "extension": facts,
        "dial": dial,
        "groups": groups,
        "passed": all(m["passed"] for g in groups for m in g["measurements"]),
    }


def group(method: Method | None, found: list[Measurement]) -> dict[str, Any]:
    return {"method": None if method is None else method.to_json(), "measurements": [m.to_json() for m in found]}


def own(out: Output, model: Any, ids: torch.Tensor) -> list[Measurement]:
    """The engine with neutral parameters: in the model's own precision if that is half, then in fp32, which the model is left in."""
    import torch

    from longreach.checking import measurements

    found = []
    if next(model.parameters()).dtype != torch.float32:
        out.note(f"measuring neutral parameters in {next(model.parameters()).dtype}, then everything in fp32")
        measurements.require_ordinary(model)
        found.append(measurements.half_precision(model, ids))
        torch.nn.Module.float(model)  # Transformers' own declines a model from a GGUF file
    return found + measurements.neutral(model, ids)


def choices(extension: Extension, profile: Profile | None) -> Iterator[dict[str, Any]]:
    """What the dial chooses for multiples of the trained window; by the profile, as far as that reaches."""
    from longreach.planning import dial

    window = extension.window
    for times in MULTIPLES:
        context = times * window.tokens
        try:
            choice = dial.choose(window, context, profile=profile if profile is not None and profile.reaches(context) else None)
        except ValueError as error:
            yield {"times": times, "context": context, "method": None, "capacity": None, "reason": None, "warning": None, "refusal": str(error)}
            continue
        yield {
            "times": times,
            "context": context,
            "method": choice.method.to_json(),
            "capacity": choice.method.capacity(window.tokens),
            "reason": choice.reason,
            "warning": choice.warning,
            "refusal": None,
        }


def show(console: Console, result: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from longreach.cli import parameters
    from longreach.memory import pooled
    from longreach.methods import from_json

    facts = result["extension"]
    ours, without = facts["layers_with_method"], facts["layers_without_positions"]
    chunked = len(facts["layers_in_chunks"])
    sliding = facts["layers"] - len(ours) - chunked
    layers = f"{facts['layers']}: {len(ours)} with the method, {sliding} sliding and {chunked} chunked as trained, {len(without)} without positions"
    rows = [
        ("trained window", f"{counted(facts['trained_window'], 'token')} ({facts['trained_window_reason']})"),
        ("layers", layers),
        ("backend", f"{facts['backend']}, {facts['dtype']}, {result['device']}"),
        ("looked at", str(from_json(facts["method"]))),
        ("capacity", "unlimited" if facts["capacity"] is None else counted(facts["capacity"], "token")),
    ]
    console.print(common.pairs_table(result["model"], rows))

    dial = Table(title="what the dial chooses", title_justify="left", box=box.SIMPLE)
    for column in ("context", "method", "capacity"):
        dial.add_column(column, justify="right" if column == "capacity" else "left")
    for row in result["dial"]:
        name = "refused" if row["method"] is None else Text(parameters.brief(row["method"]))
        dial.add_row(f"{row['context']} ({row['times']}x)", name, "" if row["capacity"] is None else str(row["capacity"]))
    console.print(dial)
    for row in result["dial"]:
        if remark := row["refusal"] or row["warning"]:
            console.print(Text(f"  {row['times']}x: {remark}"))

    how = f"relative to the largest logit, fp32 unless said; {result['texts']} texts, {result['tokens']} tokens"
    gates = Table(title=f"\nmeasured ({how})", title_justify="left", box=box.SIMPLE)
    for column in ("", "measurement", "value", "gate"):
        gates.add_column(column, justify="right" if column in ("value", "gate") else "left")
    for group in result["groups"]:
        if group["method"] is not None:
            gates.add_row("", Text(parameters.brief(group["method"]), style="bold"), "", "")
        for m in group["measurements"]:
            state = Text("skip") if m["value"] is None and m["passed"] else Text("pass", "green") if m["passed"] else Text("FAIL", "bold red")
            gates.add_row(state, Text(m["name"]), m["note"] if m["value"] is None else f"{m['value']:.2g}", f"{m['gate']:.2g}")
    console.print(gates)
    for group in result["groups"]:
        if group.get("memory") is not None:
            lines = list(zip(("in tiers", *[""] * 9), pooled.said(group["memory"])))
            console.print(common.pairs_table(f"{parameters.brief(group['method'])}, {result['tokens']} tokens read, the last of them one by one", lines))
    failed = "a gate fails: do not trust this model under Longreach, and report it"
    console.print("all gates pass" if result["passed"] else failed, style="" if result["passed"] else "bold red")
