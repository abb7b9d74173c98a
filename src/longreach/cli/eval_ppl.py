"""`longreach eval ppl`: perplexity of texts under a method, by one of the protocols, into a folder.

Knows options and files; measuring is done in `longreach.evals.harness.perplexity`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longreach import files
from longreach.cli import common, profiles
from longreach.cli import text as texts
from longreach.cli.common import Output
from longreach.cli.eval_options import ChunkSize, announce, made_with, parse_lengths, window_of
from longreach.evals.harness.environment import now
from longreach.quantities import CHUNK_SIZE, counted

if TYPE_CHECKING:
    from rich.console import Console

    from longreach.evals.harness.perplexity import Curve, Document, Point, Stretch
    from longreach.evals.harness.results import Row
    from longreach.hf.interfaces import Tokenizer

BENCH = "perplexity"
CURVES = "curves.csv"
Protocol = Literal["truncated", "sliding", "streaming"]


def command(
    context: typer.Context,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results.")],
    files: Annotated[list[str] | None, typer.Option("--text", help="A file (.xz and .gz too) or @book; one document each. @book if not given.")] = None,
    encoding: common.Encoding = None,
    model: common.Model = "nano",
    declared: common.Context = None,
    method: common.MethodName = None,
    protocol: Annotated[
        Protocol,
        typer.Option(
            "--protocol", help="truncated: the first tokens of each document, and the loss at every position; sliding: windows; streaming: a carried cache."
        ),
    ] = "truncated",
    lengths: Annotated[str | None, typer.Option("--lengths", help="Lengths of texts, of windows (sliding), or of the stream: its last one counts.")] = None,
    passages: Annotated[int | None, typer.Option("--passages", min=1, help="Cut so many passages out of each text, at drawn places, as documents.")] = None,
    stride: Annotated[
        int, typer.Option("--stride", parser=common.tokens, metavar="TOKENS", help="New tokens of a window (sliding), or of a stretch (streaming).")
    ] = 256,
    weighting: Annotated[Literal["token", "window"], typer.Option("--weighting", help="window: the published script's mean over windows (sliding).")] = "token",
    seed: Annotated[int, typer.Option("--seed", help="Of the passages.")] = 0,
    chunk_size: ChunkSize = CHUNK_SIZE,
    dtype: common.Dtype = None,
    device: common.Device = None,
    trained_window: common.TrainedWindow = None,
    profile: common.ProfileFile = None,
    no_profile: common.NoProfile = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Perplexity and bits per byte by length. Writes run.json, metrics.json and, for `truncated`, curves.csv.

    Parameters of a method (--group-size, --window, --n-local, ...) are options too: see `longreach methods`.
    A low perplexity does not imply that anything far away is remembered: run `eval run passkey` too.
    """
    started = now()
    with common.output(as_json, verbose, quiet) as out:
        from longreach.evals.harness.results import Folder

        folder = Folder(out_folder)
        folder.check()
        chosen = common.method_of(context, method)
        by_profile = profiles.asked(profile, no_profile, chosen, model=model)
        wanted = None if lengths is None else parse_lengths(lengths)
        sources = {name: texts.read(name, texts.LARGEST_FILE, out.note, encoding) for name in files or [texts.BOOK]}
        with common.quiet_transformers(verbose):
            from longreach.evals.harness import perplexity
            from longreach.evals.harness.model_engine import attached, span

            loaded, tokenizer = common.load_model(out, model, dtype, device)
            window = window_of(loaded, trained_window)
            bos = tokenizer.bos_token_id
            found = wanted or (window, 2 * window, 4 * window)
            documents = read_documents(tokenizer, sources, max(found), passages, seed)
            bounds = span(chosen, window, declared, max(found))
            if bounds.limit is not None and max(found) > bounds.limit:
                limit = counted(bounds.limit, "token")
                raise ValueError(f"--lengths up to {max(found)} exceed {limit}; pass --context {max(found)}, another method, or shorter ones")
            if protocol != "sliding":
                documents = long_enough(out, documents, found)
            by = profiles.find(out, by_profile, loaded, chosen, bounds.context, trained_window)
            with attached(loaded, tokenizer, chosen, bounds.context, trained_window=trained_window, profile=by, chunk_size=chunk_size) as engine:
                extension = engine.extension
                assert extension is not None
                facts = announce(out, extension)
                config = {
                    "model": model, "method": extension.method.to_json(), "method_text": extension.method.brief(), "context": extension.context,
                    "trained_window": window, "dtype": facts["dtype"], "device": loaded.device.type, "chunk_size": chunk_size, "protocol": protocol,
                    "lengths": list(found), "documents": [identity(doc) for doc in documents], "stride": stride, "weighting": weighting, "seed": seed,
                }  # fmt: skip
                folder.start({"config": config, "tasks": {}, **made_with(loaded.device, facts, started, None)})
                rows: list[Row] = []
                if protocol == "truncated":
                    curve, each = perplexity.positions(extension, documents, max(found), chunk_size)
                    rows = [row for point in perplexity.truncated(documents, each, found) for row in rows_of(protocol, point)]
                    write_curve(folder.path / CURVES, curve)
                elif protocol == "sliding":
                    for length in found:
                        step = min(stride, length - (bos is not None))
                        point = perplexity.sliding(extension, documents, length, step, bos=bos, weighting=weighting, chunk_size=chunk_size)
                        rows += rows_of(protocol, point)
                else:
                    for stretch in perplexity.streaming(extension, documents[0].ids[: max(found)], every=stride, chunk_size=chunk_size):
                        rows += rows_of_stretch(stretch)
        folder.conclude(rows, now())
        result = {"out": str(out_folder), "method": config["method"], "context": config["context"], "metrics": [dataclasses.asdict(row) for row in rows]}
        out.finish(result, lambda console: show(console, rows))


def read_documents(tokenizer: Tokenizer, sources: dict[str, str], longest: int, passages: int | None, seed: int) -> list[Document]:
    """Each text as a document, or passages of it."""
    from longreach.evals.harness import perplexity
    from longreach.evals.samples import haystack

    found = []
    for name, text in sources.items():
        rng = Random(f"{seed}:{name}")
        if passages is None:
            head = text[: 16 * longest + 4096]  # more than `longest` tokens of any tokenizer make, but not a whole library
            found.append(perplexity.document(tokenizer, head, name))
            if len(found[-1]) < longest and len(head) < len(text):
                found[-1] = perplexity.document(tokenizer, text, name)
            continue
        for index in range(passages):
            piece = haystack.first_tokens(tokenizer, text, haystack.sentence_start(text, rng.random()), longest + 8)
            found.append(perplexity.document(tokenizer, piece, f"{name}#{index}"))
    return found


def long_enough(out: Output, documents: list[Document], lengths: tuple[int, ...]) -> list[Document]:
    """The documents that have all lengths, so that every length is measured on the same ones."""
    kept = [doc for doc in documents if len(doc) >= max(lengths)]
    if not kept:
        longest = max(len(doc) for doc in documents)
        raise ValueError(f"no text has {counted(max(lengths), 'token')}, the longest has {longest}; pass longer texts, or --lengths up to {longest}")
    for doc in documents:
        if len(doc) < max(lengths):
            out.warn(f"{doc.name} has {counted(len(doc), 'token')}, fewer than {max(lengths)}, and is left out")
    return kept


def identity(document: Document) -> dict[str, Any]:
    """Which text it was, without the text."""
    ids = document.ids.tolist()
    return {"name": document.name, "tokens": len(ids), "sha256": hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()}


def rows_of(protocol: str, point: Point) -> list[Row]:
    """Values of this bench are not percents: perplexity, nats per token, bits per byte."""
    from longreach.evals.harness.results import Row

    bounds = (math.exp(min(point.low, 700.0)), math.exp(min(point.high, 700.0)))
    rows = [
        Row(BENCH, protocol, point.length, None, "perplexity", point.perplexity, point.documents, *bounds, 0, 0),
        Row(BENCH, protocol, point.length, None, "nll", point.nll, point.documents, point.low, point.high, 0, 0),
    ]
    if point.bits_per_byte is not None:
        rows.append(Row(BENCH, protocol, point.length, None, "bits_per_byte", point.bits_per_byte, point.documents, None, None, 0, 0))
    return rows


def rows_of_stretch(stretch: Stretch) -> list[Row]:
    from longreach.evals.harness.results import Row

    value = math.exp(min(stretch.nll, 700.0))
    return [
        Row(BENCH, "streaming", stretch.end, None, "perplexity", value, 1, None, None, 0, 0),
        Row(BENCH, "streaming", stretch.end, None, "nll", stretch.nll, 1, None, None, 0, 0),
        Row(BENCH, "streaming", stretch.end, None, "store_bytes", float(stretch.store_bytes), 1, None, None, 0, 0),
    ]


def write_curve(path: Path, curve: Curve) -> None:
    """Positions that some document has; the first token of a text is predicted by nothing."""
    lines = ["position,mean,var,count"]
    for place, (mean, variance, count) in enumerate(zip(curve.mean.tolist(), curve.variance.tolist(), curve.count.tolist())):
        if count:
            lines.append(f"{place},{mean:.6f},{variance:.6f},{count}")
    files.write(path, "\n".join(lines) + "\n")


def show(console: Console, rows: list[Row]) -> None:
    table = common.plain_table("protocol", "length", "perplexity", "nats per token", "bits per byte", "documents")
    for length in dict.fromkeys(row.length for row in rows):
        values = {row.metric: row for row in rows if row.length == length}
        bits = values.get("bits_per_byte")
        table.add_row(
            values["nll"].task, str(length), f"{values['perplexity'].value:.4g}", f"{values['nll'].value:.4f}",
            "" if bits is None else f"{bits.value:.4f}", str(values["nll"].n),
        )  # fmt: skip
    console.print(table)
    console.print("A low perplexity does not imply recall; run `longreach eval run passkey` too.")
