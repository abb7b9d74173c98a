"""`longreach plan`: what a length costs with a model on a device, by method, before anything is downloaded.

Knows the options and the tables; sizing.py plans, speedtest.py measures.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from longreach.cli import common
from longreach.cli.common import Output
from longreach.cli.targets import check_picture
from longreach.quantities import CHUNK_SIZE, counted

if TYPE_CHECKING:
    from longreach.planning.sizing import Plan, Row

TAKES_METHOD_PARAMETERS = True
IMPOSSIBLE = 1


def command(
    context: typer.Context,
    model: common.Model = "nano",
    config: Annotated[Path | None, typer.Option("--config", help="A config.json in place of the model's; nothing is downloaded then.")] = None,
    declared: common.Context = None,
    hardware: Annotated[str, typer.Option("--hardware", help="H200, H100-80, A100-80, RTX4090, ..., cpu, cuda (calibrated), or a TOML file.")] = "cpu",
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Users at a time.")] = 1,
    new_tokens: Annotated[int, typer.Option("--new-tokens", parser=common.tokens, metavar="TOKENS", help="Tokens of the answer, part of the context.")] = 128,
    method: common.MethodName = None,
    chunk_size: Annotated[int, typer.Option("--chunk-size", parser=common.tokens, metavar="TOKENS", help="Prompt tokens of one forward.")] = CHUNK_SIZE,
    dtype: common.Dtype = None,
    trained_window: common.TrainedWindow = None,
    memory: common.Memory = None,
    png: Annotated[Path | None, typer.Option("--png", help="Draw cost against length into this file.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine once (about a minute), for --hardware cpu or cuda.")] = False,
    device: Annotated[str, typer.Option("--device", help="What --calibrate measures: cpu or cuda.")] = "cpu",
    force: common.Force = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Will it fit, how long will it take, and with which method? From the configuration alone, without weights.

    Exits with 1 if no method can serve the request; the nearest that can be served are shown. Parameters of a method are options too.
    """
    with common.output(as_json, verbose, quiet) as out, common.quiet_transformers(verbose):
        check_picture(out, png, force)
        if calibrate:
            measured = measure(out, device)
            if declared is None:
                out.finish(measured, lambda console: None)
                return
        if declared is None:
            raise ValueError("pass --context N, the prompt plus the new tokens, for example longreach plan --context 32768 --hardware A100-80")
        from longreach.planning.sizing import plan

        chosen = common.method_of(context, method)
        found = plan(
            model, declared, hardware, config=config, new_tokens=new_tokens, concurrency=concurrency, method=chosen, dtype=dtype,
            trained_window=trained_window, chunk_size=chunk_size, memory=memory,
        )  # fmt: skip
        result = found.to_json()
        if png is not None:
            draw(found, chosen, result, png)
            out.note(f"wrote {png}")
            result["png"] = str(png)
        out.finish(result, lambda console: show(console, found))
    if not found.possible:
        raise typer.Exit(IMPOSSIBLE)


def measure(out: Output, device: str) -> dict[str, Any]:
    """Calibrates, and tells where the figures are and what they are."""
    from longreach.checking import speedtest
    from longreach.planning import calibration

    common.check_device(device)
    out.note(f"measuring {device}; the figures are only as good as the machine is quiet")
    made = speedtest.calibrate(device, say=lambda text: out.note(f"  {text}"))
    out.note(f"wrote {calibration.default_path()}")
    found = {name: dataclasses.asdict(speeds) for name, speeds in (made.measured or {}).items()}
    for name, speeds in (made.measured or {}).items():
        best = max(y for _, y in speeds.gemm.points)
        out.note(
            f"  {name}: products up to {best / 1e9:.3g} GFLOP/s, attention {speeds.attention(64) / 1e9:.3g} GFLOP/s, keys {speeds.keys / 1e9:.3g} GB/s, "
            f"overhead {1e3 * speeds.forward_seconds:.3g} ms per forward and {1e3 * speeds.layer_seconds:.3g} ms per layer"
        )
    return {"file": str(calibration.default_path()), "device": device, "memory": made.memory, "reserved": made.reserved, "speeds": found}


def draw(found: Plan, method: Any, result: dict[str, Any], png: Path) -> None:
    from longreach.drawing import costs
    from longreach.planning.curves import curves, lengths_around

    def point(n: int, row: Row) -> tuple[int, int, float]:
        return n, row.peak_bytes, row.prefill_seconds + min(request.new_tokens, n - 1) * row.token_seconds

    request = found.request
    rows = curves(found, lengths_around(request.context, request.new_tokens), method)
    costs.draw(result, {name: [point(n, row) for n, row in by_length.items()] for name, by_length in rows.items()}, png)


def show(console: Console, found: Plan) -> None:
    from rich.text import Text

    request, weights = found.request, found.request.architecture.weights
    speeds = "measured on this machine" if request.hardware.measured is not None else f"{request.hardware.source}, at assumed efficiencies"
    rows = [
        ("model", f"{weights.parameters:,} parameters, {common.size(weights.nbytes)} in {request.dtype}"),
        ("trained window", f"{counted(request.window.tokens, 'token')} ({request.window.reason})"),
        ("request", f"{counted(request.context, 'token')}, {request.new_tokens} of them new, {request.concurrency} at a time"),
        ("hardware", f"{request.hardware.name}, {common.size(request.hardware.memory)} ({speeds})"),
    ]
    console.print(common.pairs_table(request.model, rows))
    console.print(method_table(found))
    if request.memory is not None:
        console.print(tiers_table(found))
    for row in found.rows:
        lacks = None if row.tiers is None else row.tiers.lacks(request.concurrency)
        said = row.remark + (f"; it does not fit: {lacks}" if lacks else "")
        console.print(Text.assemble("  ", (" ".join(row.method.options()), "bold"), f": {said}"), soft_wrap=True)
    console.print("\nto run")
    for row in shown_commands(found):
        console.print(Text(f"  {row.command}"), soft_wrap=True)
    if found.nearest:
        console.print("\nnearest requests that can be met", style="bold")
        for alternative in found.nearest:
            console.print(Text(f"  {alternative.change}" + (f"\n    {alternative.command}" if alternative.command else "")), soft_wrap=True)
    console.print(terms_table(found))
    on_host = found.offloading["layers_on_host"]
    thresholds = found.offloading["thresholds"]
    console.print(
        Text(
            f"SpeContext's memory model: plain attention fits up to {thresholds[0]} tokens; with all layers' keys on the host and {found.offloading['budget']} "
            f"tokens of each on the device, {thresholds[-1]}; this request needs {'more than all' if on_host is None else on_host} layers there"
        ),
        soft_wrap=True,
    )
    for note in found.notes:
        console.print(Text(f"note: {note}"), soft_wrap=True)


def method_table(found: Plan) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title="methods (* the dial's choice)", title_justify="left", box=box.SIMPLE, show_edge=False, padding=0)  # no word is broken in 80 columns
    most = {"fits": 6, "KV per user": 8, "bound": 9, "recalls": 10}  # the longest word of each: rich would else narrow them alike
    for column in ("method", "fits", "users", "KV per user", "prefill", "ms/token", "bound", "recalls"):
        side: Literal["left", "right"] = "right" if column in ("users", "KV per user", "prefill", "ms/token") else "left"
        table.add_column(column, justify=side, no_wrap=column == "method", overflow="fold", max_width=most.get(column))
    for row in found.rows:
        cells = [str(row.users), common.size(row.kv_bytes), f"{row.prefill_seconds:.3g} s", f"{1e3 * row.token_seconds:.3g}", row.bound, row.recall]
        table.add_row(row.method.name + ("*" if row.chosen else ""), fits(row, found), *cells)
    return table


def tiers_table(found: Plan) -> Any:
    """What lies where for one user, and what each of its tokens brings to the device."""
    from rich import box
    from rich.table import Table

    assert found.request.memory is not None
    names = list(found.request.memory.budgets)
    title = f"in tiers ({found.request.memory}), of one user; what a token brings to the device, and how long that takes by bandwidth"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_edge=False, padding=0)
    for column in ("method", *names, "index", "apart", "a token brings", "ms"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method", overflow="fold")
    for row in found.rows:
        assert row.tiers is not None
        seconds = row.moved.link + row.moved.disk + row.moved.bandwidth
        brings = ("at most " if row.tiers.at_most and row.tiers.moved else "") + common.size(row.tiers.moved)
        sizes = [common.size(row.tiers.held[name]) for name in names]
        table.add_row(row.method.name, *sizes, common.size(row.tiers.summaries), common.size(row.tiers.apart), brings, f"{1e3 * seconds:.3g}")
    return table


def fits(row: Row, found: Plan) -> str:
    if row.fits:
        return "yes"
    return f"{row.users} of {found.request.concurrency}" if row.users else "no"


def shown_commands(found: Plan) -> list[Row]:
    """The first that fits of every kind of recall."""
    best: dict[str, Row] = {}
    for row in found.rows:
        if row.fits and row.recall != "untrained":
            best.setdefault(row.recall, row)
    return list(best.values())


def terms_table(found: Plan) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="\nplain attention at the hardware's peak (arXiv 2405.08944): bounds, not predictions", title_justify="left", box=box.SIMPLE)
    for column in ("term", "value", "formula"):
        table.add_column(column, justify="right" if column == "value" else "left", no_wrap=column != "formula")
    for term in found.terms:
        value = common.size(int(term.value)) if term.unit == "bytes" else f"{term.value:,.4g} {term.unit}"
        table.add_row(term.name, value, Text(term.formula))
    return table
