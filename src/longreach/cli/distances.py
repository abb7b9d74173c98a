"""`longreach distances METHOD`: the effective distance between every query and key, from the segments that are executed.

Knows methods and their layouts; loads no model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach.cli.common import Force, Json, Output, method_of, output, tokens
from longreach.cli.targets import check_picture

if TYPE_CHECKING:
    import torch

    from longreach.drawing import distances
    from longreach.methods.base import Method

TAKES_METHOD_PARAMETERS = True
MOST_TOKENS = 4096
MOST_DIMS = 4096
LAYERS_SEARCHED = 256  # for one whose keys are chosen


def command(
    context: typer.Context,
    method: Annotated[str, typer.Argument(help="selfextend, lm-infinite, ...; its parameters follow as options, see `longreach methods`.")],
    length: Annotated[int, typer.Option("--length", "-n", parser=tokens, metavar="TOKENS", help=f"Number of tokens, at most {MOST_TOKENS}.")] = 10,
    layer: Annotated[int, typer.Option("--layer", min=0, help="The layer, for methods that treat layers differently.")] = 0,
    png: Annotated[Path | None, typer.Option("--png", help="Draw the matrix into this file instead of printing it.")] = None,
    trained_window: Annotated[
        int | None, typer.Option("--trained-window", parser=tokens, metavar="TOKENS", help="For the picture: mark what so many tokens do not train.")
    ] = None,
    base: Annotated[float, typer.Option("--rope-base", help="For the picture of a frequency method: the model's rope_theta.")] = 1e4,
    dims: Annotated[int, typer.Option("--rotary-dims", min=2, help="For the picture of a frequency method: rotated dims of a head.")] = 128,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show how far away every key is for every query: rows are queries, columns keys, "." is not visible.

    Example: longreach distances selfextend --group-size 2 --window 4 --length 10
    """
    with output(as_json) as out:
        if method.startswith("-"):
            raise ValueError("name the method before its parameters: longreach distances METHOD --length N ...")
        if not 1 <= length <= MOST_TOKENS:
            raise ValueError(f"--length must be between 1 and {MOST_TOKENS}, not {length}; the matrix has length x length entries")
        check_picture(out, png, force)
        if png is None and trained_window is not None:
            raise ValueError("--trained-window marks a picture; add --png FILE")
        from longreach.core.matrices import matrices

        chosen = method_of(context, method)
        assert chosen is not None
        matrix = matrices(chosen.layout(layer).segments, length).distance
        note_choice(out, chosen)
        pairs = pairs_of(chosen, trained_window, length, base, dims) if png is not None and chosen.rescales and trained_window is not None else None
        if chosen.rescales and pairs is None:
            drawn = "" if png is None else "; pass --trained-window N to draw them too"
            out.note(f"note: {chosen.name} changes the frequencies at which these distances are encoded, which is not drawn{drawn}")
        result: dict[str, Any] = {"method": chosen.to_json(), "length": length, "layer": layer}
        if png is not None:
            from longreach.drawing import distances

            distances.draw(matrix, chosen.brief(), png, trained_window, pairs)
            out.note(f"wrote {png}")
            result["png"] = str(png)
        if as_json:
            result["distances"] = rows(matrix)
        out.finish(result, lambda console: None if png is not None else print(text(matrix), file=out.stdout))


def pairs_of(method: Method, window: int, context: int, base: float, dims: int) -> distances.Pairs:
    """The rotary pairs of a model that the options describe, for the second panel."""
    from longreach.drawing import distances
    from longreach.hf import frequencies

    if dims % 2:
        raise ValueError(f"--rotary-dims must be even, not {dims}: dims are rotated in pairs")
    if dims > MOST_DIMS:
        raise ValueError(f"--rotary-dims must be at most {MOST_DIMS}, not {dims}; they are those of one head")
    if not 1 < base < math.inf:
        raise ValueError(f"--rope-base must be a number above 1, such as 10000, not {base:g}")
    own, new = frequencies.without_model(method, window, context, base, dims)
    return distances.Pairs(own.inverse, new.inverse, window, context, method.largest_distance(context), new.scaling)


def note_choice(out: Output, method: Method) -> None:
    found = next(((layer, choice) for layer in range(LAYERS_SEARCHED) if (choice := method.layout(layer).choice) is not None), None)
    if found is not None:
        layer, choice = found
        kept = choice.keep * choice.block
        out.note(f"note: from layer {layer} on, {method.name} chooses keys by content, at most {kept} for a query; there (--layer) all that may be are drawn")


def rows(matrix: torch.Tensor) -> list[list[float | int | None]]:
    """Whole numbers as integers, None where the key is hidden."""
    return [[None if d != d else int(d) if d == int(d) else d for d in row] for row in matrix.tolist()]


def text(matrix: torch.Tensor) -> str:
    """Aligned columns; at most three decimals."""
    cells = [["." if d is None else f"{d:.3f}".rstrip("0").rstrip(".") for d in row] for row in rows(matrix)]
    width = max(len(cell) for row in cells for cell in row)
    return "\n".join(" ".join(cell.rjust(width) for cell in row) for row in cells)
