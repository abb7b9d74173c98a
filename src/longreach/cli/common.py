"""What the commands share: their common options, what goes to which stream, silence from the libraries, loading a model.

Knows terminals and streams; not methods or what a command computes. Imports nothing heavy at the top.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from longreach.quantities import token_count

if TYPE_CHECKING:
    from longreach.methods.base import Method

LONG = 2048  # tokens from which progress is shown
MORE = "Parameters of the method are options too, for example [bold]--group-size 16 --window 64[/bold]; `longreach methods` lists them."

Json = Annotated[bool, typer.Option("--json", help="Standard output is one JSON object and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the logs and warnings of the libraries, and where an error came from.")]
Model = Annotated[str, typer.Option("--model", "-m", help="'nano' (embedded), a folder, a GGUF file, or the id of a model on the Hugging Face Hub.")]


def tokens(text: str | int) -> int:
    """ "4096" or "4k" -> 4096."""
    try:
        return token_count(text, "it")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


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


@dataclass(frozen=True)
class Output:
    """Where a command writes. `stdout` is the real one: in JSON mode everything else that prints is sent to standard error."""

    as_json: bool
    stdout: IO[str]
    errors: Console

    @property
    def tables(self) -> Console:
        return Console(file=self.stdout, highlight=False, markup=False)  # what is printed may hold brackets of its own

    def note(self, text: str) -> None:
        """A line for people, on standard error in both modes."""
        self.errors.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def finish(self, result: dict[str, Any], show: Callable[[Console], None]) -> None:
        """The result: one JSON object, or what `show` prints."""
        if self.as_json:
            self.stdout.write(json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
            self.stdout.flush()
        else:
            show(self.tables)


@contextmanager
def output(as_json: bool, verbose: bool = False) -> Iterator[Output]:
    """Streams of one command. In JSON mode a stray print of any library cannot reach standard output."""
    found = Output(as_json, sys.stdout, Console(stderr=True, highlight=False, markup=False))
    with redirect_stdout(sys.stderr if as_json else sys.stdout), warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")  # ours are in the report of an extension, and printed from there
        else:
            logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(name)s: %(message)s")
        yield found


@contextmanager
def quiet_transformers(verbose: bool) -> Iterator[None]:
    """No logs and progress bars of Transformers and of what it imports, unless wanted."""
    import huggingface_hub  # noqa: F401  sets the level of its own logger when it is imported, so that comes first
    from transformers.utils import logging as library

    others = [logging.getLogger(name) for name in ("huggingface_hub", "torchao", "torch.utils._pytree")]
    level, levels, bars = library.get_verbosity(), [other.level for other in others], library.is_progress_bar_enabled()
    if not verbose:
        library.set_verbosity(library.CRITICAL)
        for other in others:
            other.setLevel(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        for other, before in zip(others, levels, strict=True):
            other.setLevel(before)
        if bars:
            library.enable_progress_bar()


def load_model(out: Output, name: str, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """`longreach.load`, after the device has been checked."""
    import longreach

    check_device(device)
    if name != "nano" and not Path(name).expanduser().exists():
        out.note(f"loading {name} from the Hugging Face Hub or its local cache")
    return longreach.load(name, dtype=dtype, device=device)


def method_of(context: typer.Context, name: str | None) -> Method | None:
    """The method that the options name, with its parameters out of what Typer left over; None if it is to be chosen."""
    if name is None and not context.args:
        return None
    from longreach.cli import parameters

    return parameters.build(name, context.args, [option for parameter in context.command.params for option in parameter.opts])


def check_picture(png: Path | None) -> None:
    """Refuses a picture that could not be written, before any work is done."""
    if png is None:
        return
    if png.suffix.lower() != ".png":
        raise ValueError(f"--png writes a PNG picture; name the file {png.with_suffix('.png')}")
    if not png.parent.is_dir():
        raise ValueError(f"there is no folder {str(png.parent)!r} for the picture; create it first")
    if png.is_dir():
        raise ValueError(f"{str(png)!r} is a folder; name a file")


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


@contextmanager
def progress_bar(out: Output, prompt_tokens: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error while a long prompt is read; gone before the answer. None where there is no terminal."""
    if prompt_tokens < LONG or not out.errors.is_terminal:
        yield lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn()
    with Progress(*columns, console=out.errors, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("reading", total=prompt_tokens - 1)

        def update(done: int) -> None:
            bar.update(task, completed=done)
            if done >= prompt_tokens - 1:
                bar.stop()

        yield update


def writer(out: Output) -> Callable[[str], None]:
    """Streams the answer to standard output; says nothing in JSON mode."""

    def write(part: str) -> None:
        if not out.as_json and part:
            out.stdout.write(part)
            out.stdout.flush()

    return write


def rate(count: int, seconds: float) -> float | None:
    return round(count / seconds, 2) if seconds > 0 else None


def pairs_table(title: str, rows: list[tuple[str, str]]) -> Table:
    """A two-column table of names and values."""
    from rich import box
    from rich.text import Text

    table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def size(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for bigger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, bigger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
