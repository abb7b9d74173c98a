"""`longreach chat`: a conversation over a file, at a terminal or with one question a line on standard input.

Knows options, the terminal and the commands of the conversation; what is attached and when that changes is in session.py.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach.cli import common, profiles, stored, talking, text
from longreach.cli.common import Output
from longreach.cli.console import stopping_gently
from longreach.cli.run import sampling_of
from longreach.cli.session import ROOM, Session
from longreach.cli.talking import HINT, questions
from longreach.quantities import CHUNK_SIZE, counted
from longreach.running import prompts

if TYPE_CHECKING:
    from longreach.hf.interfaces import Tokenizer
    from longreach.running.generation import Answer
    from longreach.running.sampling import Sampling

TAKES_METHOD_PARAMETERS = True
WRONG = 2  # the exit code after a line that was refused, where lines are piped in
COMMANDS = {
    "/help": "these lines",
    "/save FILE": "keep the text and the turns in a folder, as they were read",
    "/load FILE": "go on from such a folder, without reading it again",
    "/reset": "forget the turns and keep the text, which is read again with the next question",
    "/why [UNIT]": "which parts of the conversation made the last answer; UNIT is sentence, paragraph or passage",
    "/facts": "the method in force, its layers, capacity and measured exactness",
    "/quit": "end, as Ctrl-D does",
}
# options of a model that is loaded here
OWN = ("declared", "method", "truncate", "chunk_size", "dtype", "device", "trained_window", "profile", "no_profile", "memory")


def command(
    context: typer.Context,
    model: common.Model = "nano",
    declared: common.Context = None,
    method: common.MethodName = None,
    file: Annotated[str | None, typer.Option("--file", "-f", help="The text to talk about: a file (.xz and .gz too) or @book.")] = None,
    encoding: common.Encoding = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message, for models with a chat template.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")] = 128,
    hide: Annotated[list[str] | None, typer.Option("--hide", help="A sentence to hide in the text; may be given several times, then spread evenly.")] = None,
    truncate: Annotated[text.Side | None, typer.Option("--truncate", help="What to leave out of a too long text. Without it, too long is an error.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, help="Sample at this temperature; greedy if not given or 0.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the sampling; 0 if not given.")] = None,
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Tokens of one forward while reading.")] = CHUNK_SIZE,
    server: Annotated[
        str | None, typer.Option("--server", metavar="URL", help="Ask the model of a server, such as http://127.0.0.1:8000, instead of loading one.")
    ] = None,
    document: Annotated[
        str | None, typer.Option("--document", metavar="NAME", help="A document that the server keeps, which the conversation is about. Goes with --server.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option("--api-key-env", metavar="NAME", help="The environment variable that holds the API key of --server.")
    ] = None,
    dtype: common.Dtype = None,
    device: common.Device = None,
    trained_window: common.TrainedWindow = None,
    profile: common.ProfileFile = None,
    no_profile: common.NoProfile = False,
    memory: common.Memory = None,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Talk about a text: it is read once, every question then costs only its own tokens.

    Questions come from the terminal, or one a line from standard input. Ctrl-C stops an answer and keeps the conversation; /help lists the commands.
    Without --context and --method, plain attention is used as long as the conversation fits the trained window; when it leaves it, it is read again
    once with what the dial chooses. With one of them, the method is in force from the start. Parameters of a method are options too: see
    `longreach methods`.
    """
    with common.output(as_json, verbose, quiet) as out:
        if file == text.STDIN:
            raise ValueError("standard input is where the questions come from; pass the text as a file")
        if sys.stdin is None:
            raise ValueError("standard input is closed, and the questions come from there; run it at a terminal, or pipe in one question a line")
        if file is None and encoding is not None:
            raise ValueError(text.NOTHING_TO_DECODE)
        for option, value in (("--system", system), *(("--hide", sentence) for sentence in hide or [])):
            text.check_argument(option, value)
        if server is not None or api_key_env is not None or document is not None:
            result, wrong = elsewhere(out, context)
            out.finish(result if wrong is None else {**result, "error": wrong}, lambda console: None)
            if wrong is not None:
                raise typer.Exit(WRONG)
            return
        chosen = common.method_of(context, method)
        by_profile = profiles.asked(profile, no_profile, chosen, model=model)
        words = text.read(file, text.LARGEST_FILE, out.note, encoding) if file is not None else ""
        with common.quiet_transformers(verbose):
            loaded, tokenizer = common.load_model(out, model, dtype, device)
            sampling = sampling_of(out, temperature, None, seed)
            words, cut = fit(tokenizer, words, hide or [], declared, truncate)
            if cut is not None:
                out.warn(str(cut))
            session = Session(out, loaded, tokenizer, stored.Choice(chosen, declared, trained_window, chunk_size, by_profile, memory), max_new_tokens)
            session.begin(words, system)
            try:
                read = session.read()
                out.note(f"{counted(read, 'token')} of text read; {HINT}" if words else HINT)
                turns, wrong = converse(session, sampling)
                result = {"model": model, "context": session.talk.limit, "document_tokens": read, "turns": turns, "extension": session.extension.report()}
            finally:
                session.end()
        out.finish(result if wrong is None else {**result, "error": wrong}, lambda console: None)
        if wrong is not None:
            raise typer.Exit(WRONG)


def fit(tokenizer: Tokenizer, document: str, hidden: list[str], declared: int | None, truncate: text.Side | None) -> tuple[str, text.Truncation | None]:
    """The document with the hidden sentences in it, shortened if that was asked for, with room for the conversation in a declared context."""
    encode = lambda words: prompts.encode(tokenizer, words, special=False)  # noqa: E731
    known, extra, cut = len(encode(document)), sum(len(encode(f" {sentence}")) for sentence in hidden), None
    if declared is not None:
        most = declared - min(ROOM, declared // 4) - extra
        if known > most:
            if truncate is None:
                raise ValueError(
                    f"the text has {known + extra} tokens, which leaves too little of the context of {declared} for a conversation; "
                    f"pass --context {known + extra + ROOM}, a shorter text, or --truncate middle"
                )
            document, cut = text.shorten(tokenizer, document, most, truncate, encode)
    for n, sentence in enumerate(hidden):
        document = prompts.hide(document, sentence.strip(), (n + 1) / (len(hidden) + 1))
    return document, cut


def elsewhere(out: Output, context: typer.Context) -> tuple[dict[str, Any], str | None]:
    """The conversation with the model of a server. What only a model that is loaded here can honour is refused."""
    from longreach.cli import remote

    given = {name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    asked = context.params
    if asked["server"] is None and asked["document"] is not None:
        raise ValueError("--document names one that a server keeps; pass --server URL too, or --file, or /load FOLDER in the conversation")
    if asked["server"] is None:
        raise ValueError("--api-key-env is about the key of a server; pass --server URL too, or leave it out")
    if asked["document"] is not None and (asked["file"] is not None or asked["hide"]):
        raise ValueError("--document is the text that the conversation is about; leave out --file and --hide, or leave out --document")
    wrong = [parameter.opts[0] for parameter in context.command.params if parameter.name in given.intersection(OWN)]
    if wrong := wrong + [word for word in context.args if word.startswith("-")]:
        verb = "is" if len(wrong) == 1 else "are"
        raise ValueError(f"{' and '.join(wrong)} {verb} for the server to decide; pass to `longreach serve` there, or leave out --server")
    server = remote.Server.parse(asked["server"], remote.key_of(asked["api_key_env"]))
    document = text.read(asked["file"], text.LARGEST_FILE, out.note, asked["encoding"]) if asked["file"] is not None else ""
    hidden = asked["hide"] or []
    for n, sentence in enumerate(hidden):
        document = prompts.hide(document, sentence.strip(), (n + 1) / (len(hidden) + 1))
    settings = {name: asked[name] for name in ("system", "max_new_tokens", "temperature", "seed")}
    return remote.chat(out, server, asked["model"] if "model" in given else None, document, asked["document"], **settings)


def converse(session: Session, sampling: Sampling) -> tuple[list[dict[str, Any]], str | None]:
    """Questions and commands until one ends it -> the turns as plain data, and what went wrong."""
    out, asking = session.out, sys.stdin.isatty()

    def asked(line: str) -> dict[str, Any] | None:
        found = ask(session, line, sampling, asking)
        return None if found is None else turn(line, found)

    def kept(answered: str) -> str:
        return f"the conversation is saved in {session.saved}" if session.saved else f"{answered}, the conversation is not saved"

    return talking.converse(out, questions(out, asking), asking, asked, lambda name, rest: obey(session, name, rest), kept)


def obey(session: Session, name: str, rest: str) -> None:
    """One command of the conversation."""
    out = session.out
    if name in ("/save", "/load") and not rest:
        raise ValueError(f"{name} needs the name of a file, such as {name} talk.safetensors")
    if name == "/help":
        out.say(talking.help_lines(COMMANDS))
    elif name == "/reset":
        session.reset()
        out.note("the turns are forgotten; the text will be read again with the next question")
    elif name == "/why":
        from longreach.cli import attribute

        attribute.why(session, rest)
    elif name == "/facts":
        out.say(session.extension.describe())
    elif name == "/save":
        session.save(Path(rest).expanduser())
        out.note(f"{held(session)} saved to {rest}; /load {rest} goes on from there, and so does longreach run --document {rest}")
    elif name == "/load":
        lost = 0 if session.saved else len(session.talk.turns)
        session.load(Path(rest).expanduser())
        out.note(f"{held(session)} loaded from {rest}")
        if lost:
            out.warn(f"{counted(lost, 'turn')} of the conversation before, not saved, went; /save FILE keeps one before /load")
    else:
        raise ValueError(f"unknown command {name!r}; {HINT}")


def held(session: Session) -> str:
    return f"{counted(session.talk.known, 'token')} and {counted(len(session.talk.turns), 'turn')}"


def ask(session: Session, question: str, sampling: Sampling, asking: bool) -> Answer | None:
    """The answer, written as it comes; None where it was given up. At a terminal Ctrl-C stops the answer; elsewhere it ends the program."""
    out = session.out
    try:
        with stopping_gently() if asking else nullcontext() as stopped:
            found = session.ask(question, sampling, stopped)
    except KeyboardInterrupt:
        if not asking:
            raise
        out.write("\n")
        out.note("the answer is given up; the conversation goes on before this question, and is read again with the next one")
        return None
    out.write("\n")
    if not found.ids:
        out.note("stopped before the first word; the question is forgotten")
        return None
    speed = common.rate(found.tokens - 1, found.decode_seconds) if found.tokens > 1 else None
    decoding = f", {speed:.0f} tokens/s" if speed else ""
    stop = "stopped, what was written stays in the conversation; " if found.finish == "interrupted" else ""
    out.note(f"({stop}{found.prefill_seconds:.2f} s to the first token{decoding}, {common.size(found.store_bytes)} of keys and values)")
    return found


def turn(question: str, found: Answer) -> dict[str, Any]:
    return {
        "question": question, "answer": found.text.strip(), "finish": found.finish, "new_tokens": found.tokens,
        "prefill_seconds": round(found.prefill_seconds, 4), "decode_seconds": round(found.decode_seconds, 4), "kv_store_bytes": found.store_bytes,
    }  # fmt: skip
