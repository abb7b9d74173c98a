"""`longreach demo`: three ways to read the same book, side by side.

Knows options, tables and words; measuring and drawing are done elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach.cli import text
from longreach.cli.common import Device, Dtype, Encoding, Force, Json, Model, Output, Quiet, Verbose, load_model, output, progress_bar, quiet_transformers, size
from longreach.cli.targets import check_picture

if TYPE_CHECKING:
    from rich.console import Console

    from longreach.apps.demo import Design, Progress


def command(
    model: Model = "nano",
    file: Annotated[str, typer.Option("--file", "-f", help="The book: a file (.xz and .gz too), or @book, which comes with nano.")] = text.BOOK,
    encoding: Encoding = None,
    lengths: Annotated[str, typer.Option("--lengths", help="Lengths of the texts, in trained windows.")] = "1,2,4,8",
    depths: Annotated[int, typer.Option("--depths", min=1, help="Depths at which a key is hidden, evenly spread.")] = 5,
    keys: Annotated[int, typer.Option("--keys", min=1, help="Keys for every length and depth.")] = 2,
    texts: Annotated[int, typer.Option("--texts", min=1, help="Passages over which the loss is averaged.")] = 1,
    loss_length: Annotated[int, typer.Option("--loss-length", min=1, help="The loss is followed over so many trained windows.")] = 16,
    stream_length: Annotated[int, typer.Option("--stream-length", min=1, help="LM-Infinite reads on to so many.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Of the passages and keys.")] = 1,
    png: Annotated[Path, typer.Option("--png", help="Draw the figure into this file.")] = Path("longreach-demo.png"),
    dtype: Dtype = None,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Stock, SelfExtend and LM-Infinite read one book: who finds a hidden key, who stays fluent, and what it costs.

    The embedded model was trained on 512 tokens and has never seen the book. A minute or two on two cores.
    """
    with output(as_json, verbose, quiet) as out:
        from longreach.apps.demo import Design

        design = Design(whole_numbers(lengths), depths, keys, loss_length, stream_length, texts, seed)
        check_picture(out, png, force)
        book = text.read(file, text.LARGEST_FILE, out.note, encoding)
        with quiet_transformers(verbose):
            from longreach import configs
            from longreach.apps import demo
            from longreach.drawing import reach

            loaded, tokenizer = load_model(out, model, dtype, device)
            window = configs.trained_window(loaded.config).tokens
            with bar(out, design, window) as progress:
                result = demo.run(loaded, tokenizer, book, design, progress)
        reach.draw(result, demo.NAMES, png)
        words = demo.verdict(result)
        out.finish({"model": model, "book": file, **result, "verdict": words, "png": str(png)}, lambda console: show(console, model, result, words, png))


def whole_numbers(listed: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in listed.split(",")}))
    except ValueError:
        raise ValueError(f"--lengths must be whole numbers with commas between them, such as 1,2,4,8, not {listed!r}") from None


@contextmanager
def bar(out: Output, design: Design, window: int) -> Iterator[Progress]:
    """Adds up the tokens that have been read."""
    read = 0

    with progress_bar(out, design.tokens(window), "loading") as update:

        def advance(tokens: int, what: str) -> None:
            nonlocal read
            read += tokens
            update(read, what)

        yield advance


def show(console: Console, model: str, result: dict[str, Any], words: dict[str, str], png: Path) -> None:
    from rich.text import Text

    from longreach.apps.demo import NAMES

    window = result["window"]
    trained = f" was trained on {window} tokens and has not been trained further. Every method reads the same texts.\n"
    console.print(Text.assemble("\n", (model, "bold"), trained))
    console.print(found_table(result))
    console.print(depth_table(result))
    console.print(loss_table(result))
    console.print(cost_table(result))
    for name in NAMES:
        console.print(Text.assemble((NAMES[name], "bold"), words[name].removeprefix(NAMES[name]), "\n"))
    console.print("A low loss is not recall: look at both before you choose. `longreach run --context N` chooses for a length; `longreach methods` lists all.")
    console.print(f"\nfigure: {png}   ({result['seconds']:.0f} s)")


def found_table(result: dict[str, Any]) -> Any:
    from longreach.apps.demo import NAMES, share

    window = result["window"]
    table = _table("Keys found, all depths (in brackets: of those farther away than the trained window)", "length of the text", *NAMES.values())
    for n in result["plan"]["lengths"]:
        cells = []
        for name in NAMES:
            every, far = share(result, name, n * window), share(result, name, n * window, far=True)
            cells.append(f"{every}" + (f"  ({far})" if far.asked else ""))
        table.add_row(f"{n * window} tokens, {n}x", *cells)
    return table


def depth_table(result: dict[str, Any]) -> Any:
    from longreach.apps.demo import NAMES, share

    longest = max(result["plan"]["lengths"]) * result["window"]
    table = _table(f"Keys found in {longest} tokens, by depth (0 % is the beginning)", "depth", *NAMES.values())
    for depth in sorted({row["depth"] for row in result["trials"]}):
        table.add_row(f"{100 * depth:.0f} %", *(str(share(result, name, longest, depth)) for name in NAMES))
    return table


def loss_table(result: dict[str, Any]) -> Any:
    from longreach.apps.demo import NAMES

    window, curves = result["window"], result["loss"]["methods"]
    table = _table("Loss (nats per token) in the window that ends there", "position in the text", *NAMES.values())
    last = max(map(len, curves.values()))
    n = 1
    while n <= last:
        table.add_row(f"{n * window} tokens, {n}x", *(f"{curves[name][n - 1]:.2f}" if n <= len(curves[name]) else "" for name in NAMES))
        n *= 2
    return table


def cost_table(result: dict[str, Any]) -> Any:
    from longreach.apps.demo import NAMES

    longest = max(result["plan"]["lengths"]) * result["window"]
    table = _table(f"Cost at {longest} tokens", "", *NAMES.values())
    costs = [result["cost"][name] for name in NAMES]
    table.add_row("method", *(result["methods"][name][str(longest)].replace("(", " (", 1) for name in NAMES))  # a line may end there
    table.add_row("reading the text", *(f"{c['prefill_seconds']:.2f} s" for c in costs))
    table.add_row("a further token", *(f"{c['decode_ms']:.1f} ms" for c in costs))
    table.add_row("keys and values", *(size(c["store_bytes"]) for c in costs))
    return table


def _table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
