"""What the commands share: their common options, loading a model, small words for people.

Knows options; streams and silence are in console.py, files to be written in targets.py. Imports nothing heavy at the top.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.table import Table

from longreach.cli.console import Output as Output
from longreach.cli.console import Terminal
from longreach.cli.console import output as output
from longreach.cli.console import progress_bar as progress_bar
from longreach.cli.console import quiet_transformers as quiet_transformers
from longreach.quantities import token_count

if TYPE_CHECKING:
    from rich.console import Console

    from longreach.methods.base import Method

T = TypeVar("T")
WIDE = 1000  # columns where there is no terminal
MORE = "Parameters of the method are options too, for example [bold]--group-size 16 --window 64[/bold]; `longreach methods` lists them."

Json = Annotated[bool, typer.Option("--json", help="Standard output is one JSON object and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the logs and warnings of the libraries, and where an error came from.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on standard error but errors and warnings.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite a file that Longreach did not write.")]
Model = Annotated[str, typer.Option("--model", "-m", help="'nano' (embedded), a folder, a GGUF file, or the id of a model on the Hugging Face Hub.")]


def parsed(parse: Callable[..., T], *given: Any) -> T:
    """What it makes of an option; its ValueError is about that option."""
    try:
        return parse(*given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def tokens(text: str | int) -> int:
    """ "4096" or "4k" -> 4096; "1m" -> 1048576."""
    return parsed(token_count, text, "it")


def budgets(text: str) -> Any:
    """ "device=512MiB,host=1GiB" -> Tiered."""
    from longreach.memory.budgets import Tiered

    return parsed(Tiered.parse, text)


Context = Annotated[
    int | None, typer.Option("--context", parser=tokens, metavar="TOKENS", help="Tokens of the whole sequence, new tokens included, such as 4096 or 4k.")
]
MethodName = Annotated[str | None, typer.Option("--method", help=f"Chosen for the context if not given. {MORE}")]
Encoding = Annotated[str | None, typer.Option("--text-encoding", help="Of the text, such as utf-16 or latin-1; UTF-8 if not given.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the checkpoint's own if not given.")]
Device = Annotated[str | None, typer.Option("--device", help="Such as cpu or cuda; the CPU if not given.")]
TrainedWindow = Annotated[
    int | None, typer.Option("--trained-window", parser=tokens, metavar="TOKENS", help="Overrides the trained window that the configuration states.")
]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", help="What `longreach tune` found for the model: it chooses the method; by default the one in your cache.")
]
Memory = Annotated[
    Any,
    typer.Option(
        "--memory", parser=budgets, metavar="BUDGETS",
        help="How much of what is kept of every token may lie where: device=512MiB and, after a comma each, host=1GiB and disk=FOLDER:8GiB; "
        "all of it on the device if not given.",
    ),
]  # fmt: skip
NoProfile = Annotated[bool, typer.Option("--no-profile", help="Ignore the profile in your cache; the dial's rule chooses.")]


def load_model(out: Output, name: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """`longreach.load`, after the device has been checked."""
    import longreach

    check_device(device)
    if name != "nano" and Path(name).suffix.lower() != ".gguf" and not Path(name).expanduser().exists():
        out.note(f"loading {name} from the Hugging Face Hub or its local cache")
    return longreach.load(name, dtype=dtype, device=device)


def method_of(context: typer.Context, name: str | None) -> Method | None:
    """The method that the options name, with its parameters out of what Typer left over; None if it is to be chosen."""
    if name is None and not context.args:
        return None
    from longreach.cli import parameters

    return parameters.build(name, context.args, [option for parameter in context.command.params for option in parameter.opts])


def check_device(name: str | None) -> None:
    import torch

    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; pass --device cpu or --device cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("this PyTorch sees no CUDA device; leave out --device, or install a CUDA build of PyTorch on a machine with a GPU")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {name!r}; this machine has {torch.cuda.device_count()}, counted from cuda:0")


def rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if seconds > 0 else None


def pairs_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """A two-column table of names and values."""
    from rich import box
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def plain_table(*columns: str) -> Table:
    """A table with a head, whose cells fold: a narrow terminal must not hide digits."""
    from rich import box

    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def show_table(console: Console, table: Table) -> None:
    """At a terminal as wide as that; elsewhere as wide as it is, since nothing folds a file."""
    where = console if console.is_terminal else Terminal(file=console.file, width=WIDE, highlight=False, markup=False)
    where.print(table)


def size(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, bigger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
