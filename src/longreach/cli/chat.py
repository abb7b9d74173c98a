"""`longreach chat`: a conversation over a file, at a terminal or with one question a line on standard input.

Knows options, the terminal and the commands of the conversation; what is read and remembered is decided elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach.cli import text
from longreach.cli.common import (
    Context,
    Device,
    Dtype,
    Encoding,
    Json,
    MethodName,
    Model,
    Output,
    TrainedWindow,
    Verbose,
    load_model,
    method_of,
    output,
    progress_bar,
    quiet_transformers,
    rate,
    size,
    writer,
)
from longreach.quantities import counted

if TYPE_CHECKING:
    from longreach.conversation import Conversation
    from longreach.methods.base import Method
    from longreach.seam.extend import Extension

TAKES_METHOD_PARAMETERS = True
ROOM = 1024  # tokens for questions and answers where no context is declared
HELP = "/reset forgets the turns and keeps the text, /facts says what is in force, /quit ends; an empty line does nothing"


def command(
    context: typer.Context,
    model: Model = "nano",
    declared: Context = None,
    method: MethodName = None,
    file: Annotated[str | None, typer.Option("--file", "-f", help="The text to talk about: a file (.xz and .gz too) or @book.")] = None,
    encoding: Encoding = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message, for models with a chat template.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")] = 128,
    hide: Annotated[list[str] | None, typer.Option("--hide", help="A sentence to hide in the text; may be given several times, then spread evenly.")] = None,
    truncate: Annotated[text.Side | None, typer.Option("--truncate", help="What to leave out of a too long text. Without it, too long is an error.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, help="Sample at this temperature; greedy if not given or 0.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Tokens of one forward while reading.")] = 512,
    dtype: Dtype = None,
    device: Device = None,
    trained_window: TrainedWindow = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Talk about a text: it is read once, every question then costs only its own tokens.

    Questions come from the terminal, or one a line from standard input. Parameters of a method are options too: see `longreach methods`.
    """
    with output(as_json, verbose) as out:
        if file == text.STDIN:
            raise ValueError("standard input is where the questions come from; pass the text as a file")
        chosen = method_of(context, method)
        document = text.read(file, text.LARGEST_FILE, out.note, encoding) if file is not None else ""
        with quiet_transformers(verbose):
            import longreach
            from longreach.conversation import Conversation
            from longreach.generation import Sampling

            loaded, tokenizer = load_model(out, model, dtype, device)
            fitted = fit(tokenizer, document, hide or [], declared, truncate, unlimited(loaded, chosen, trained_window))
            if fitted.cut is not None:
                out.warn(str(fitted.cut))
            with longreach.extend(loaded, chosen, context=fitted.context, trained_window=trained_window) as extension:
                talk = Conversation(loaded, tokenizer, fitted.document, system, fitted.context, extension, chunk_size)
                facts = extension.report()
                out.note(f"method: {extension.method.brief()} ({facts['reason']})")
                if facts["warning"]:
                    out.warn(facts["warning"])
                with progress_bar(out, fitted.tokens) as progress:
                    read = talk.read(progress)
                out.note(f"{counted(read, 'token')} of text read; {HELP}" if read else HELP)
                turns = converse(out, talk, extension, max_new_tokens, Sampling(temperature or None, seed=seed))
        out.finish({"model": model, "context": fitted.context, "document_tokens": read, "turns": turns, "extension": facts}, lambda console: None)


@dataclass(frozen=True)
class Fitted:
    document: str
    tokens: int
    context: int | None
    cut: text.Truncation | None


def unlimited(model: Any, method: Method | None, trained_window: int | None) -> bool:
    """Whether the method reads texts of any length, so that no context has to be declared."""
    from longreach import auto
    from longreach.seam.checks import find_base

    window = auto.trained_window(find_base(model).config).tokens if trained_window is None else trained_window
    return method is not None and method.capacity(window) is None


def fit(tokenizer: Any, document: str, hidden: list[str], declared: int | None, truncate: text.Side | None, unlimited: bool) -> Fitted:
    """The document with the hidden sentences in it, shortened if that was asked for, and the context for it and the conversation."""
    known = len(tokenizer(document, add_special_tokens=False)["input_ids"])
    extra = sum(len(tokenizer(f" {sentence}", add_special_tokens=False)["input_ids"]) for sentence in hidden)
    cut = None
    if declared is not None:
        most = declared - min(ROOM, declared // 4) - extra
        if known > most:
            if truncate is None:
                raise ValueError(
                    f"the text has {known + extra} tokens, which leaves too little of the context of {declared} for a conversation; "
                    f"pass --context {known + extra + ROOM}, a shorter text, or --truncate middle"
                )
            document, cut = text.shorten_document(tokenizer, document, most, truncate)
    from longreach.evals.haystack import hide

    for n, sentence in enumerate(hidden):
        document = hide(document, sentence.strip(), (n + 1) / (len(hidden) + 1))
    tokens = len(tokenizer(document)["input_ids"])
    return Fitted(document, tokens, declared if declared is not None or unlimited else tokens + ROOM, cut)


def converse(out: Output, talk: Conversation, extension: Extension, max_new_tokens: int, sampling: Any) -> list[dict[str, Any]]:
    turns = []
    for question in questions(out):
        if question in ("/quit", "/exit"):
            break
        if question == "/reset":
            talk.reset()
            out.note("the turns are forgotten; the text will be read again with the next question")
        elif question == "/facts":
            out.note(extension.describe())
        elif question.startswith("/"):
            out.note(f"unknown command {question!r}: {HELP}")
        else:
            try:
                found = talk.ask(question, max_new_tokens, sampling=sampling, write=writer(out))
            except ValueError as error:
                if not sys.stdin.isatty():
                    raise
                out.note(f"error: {error}")
                continue
            if not out.as_json:
                print(file=out.stdout, flush=True)
            speed = rate(found.tokens - 1, found.decode_seconds) if found.tokens > 1 else None
            decoding = f", {speed:.0f} tokens/s" if speed else ""
            out.note(f"({found.prefill_seconds:.2f} s to the first token{decoding}, {size(found.store_bytes)} of keys and values)")
            turns.append({
                "question": question, "answer": found.text.strip(), "finish": found.finish, "new_tokens": found.tokens,
                "prefill_seconds": round(found.prefill_seconds, 4), "decode_seconds": round(found.decode_seconds, 4), "kv_store_bytes": found.store_bytes,
            })  # fmt: skip
    return turns


def questions(out: Output) -> Iterator[str]:
    """Lines that are not empty, until the input ends."""
    asking = sys.stdin.isatty()
    if asking:
        import readline  # noqa: F401  gives input() a history and editing
    while True:
        if asking:
            out.errors.print("\n> ", end="", style="bold")
        line = sys.stdin.readline() if not asking else _typed()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _typed() -> str:
    try:
        return input() + "\n"
    except EOFError:
        return ""
