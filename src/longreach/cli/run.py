"""`longreach run`: a text and a question in, the answer out, with what it took.

Knows the options and the order of the work; reading text, generating and attaching a method are done elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach.cli import common, fitting, profiles, retrieval, stored, strategies, text
from longreach.cli.common import Output
from longreach.cli.targets import check_picture
from longreach.quantities import CHUNK_SIZE, counted

if TYPE_CHECKING:
    from longreach.hf.extension import Extension
    from longreach.hf.interfaces import CausalLM, Tokenizer
    from longreach.running.conversation import Conversation
    from longreach.running.generation import Answer
    from longreach.running.long_text import LongText
    from longreach.running.sampling import Sampling

TAKES_METHOD_PARAMETERS = True


def command(
    context: typer.Context,
    model: common.Model = "nano",
    declared: common.Context = None,
    method: common.MethodName = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", help="The text to read: a file (.xz and .gz too), - for standard input, or @book, a book that comes with nano."),
    ] = None,
    encoding: common.Encoding = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question or instruction that follows the text.")] = "",
    system: Annotated[str | None, typer.Option("--system", help="A system message, for models with a chat template.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")] = 128,
    save_document: Annotated[
        Path | None,
        typer.Option("--save-document", help="Save the text as it was read to this folder, so that --document need not read it again. Needs --context."),
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option("--document", help="Ask about a text that --save-document wrote, instead of --file; method and context are those it was read with."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="Keep what is read in this folder while it is read; the same command goes on from there. A --file of any length."),
    ] = None,
    strategy: strategies.Strategy = None,
    chunk_tokens: strategies.ChunkTokens = None,
    memory_tokens: strategies.MemoryTokens = None,
    layer: strategies.Layer = None,
    hide: Annotated[str | None, typer.Option("--hide", help="A sentence to hide in the text, to see whether it is found.")] = None,
    depth: Annotated[float | None, typer.Option("--depth", min=0, max=1, help="Where to hide it: 0 is the beginning, 1 the end; 0.5 if not given.")] = None,
    truncate: Annotated[text.Side | None, typer.Option("--truncate", help="What to leave out of a too long text. Without it, too long is an error.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, help="Sample at this temperature; greedy if not given or 0.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", max=1, help="Sample among the likeliest tokens that have this probability together.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the sampling; 0 if not given.")] = None,
    show_retrieval: Annotated[
        Path | None,
        typer.Option(retrieval.OPTION, metavar="PNG", help="Draw which places of the text every layer has chosen for the answer, for a method that chooses."),
    ] = None,
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Prompt tokens of one forward.")] = CHUNK_SIZE,
    dtype: common.Dtype = None,
    device: common.Device = None,
    trained_window: common.TrainedWindow = None,
    profile: common.ProfileFile = None,
    no_profile: common.NoProfile = False,
    memory: common.Memory = None,
    max_bytes: Annotated[
        int | None, typer.Option("--max-bytes", min=1, help=f"Refuse a longer text; {text.LARGEST_FILE} if not given, any length with --resume.")
    ] = None,
    force: common.Force = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Read a text of any length and answer a prompt about it.

    Parameters of a method (--group-size, --window, --n-local, ...) are options too: see `longreach methods`.
    """
    with common.output(as_json, verbose, quiet) as out:
        if top_p is not None and not top_p > 0:
            raise ValueError(f"--top-p must be above 0 and at most 1, not {top_p}; leave it out to sample among all tokens")
        chosen = common.method_of(context, method)
        by_profile = profiles.asked(profile, no_profile, chosen, document, model)
        if document is not None and encoding is not None:
            raise ValueError(text.NOTHING_TO_DECODE)
        reading = strategies.Given(strategy, chunk_tokens, memory_tokens, layer)
        reading.check(save_document=save_document, document=document, resume=resume, truncate=truncate, show_retrieval=show_retrieval, chunk_size=chunk_size)
        unread = document is not None or resume is not None or strategy is not None
        request = text.Request("" if unread else text.read(file, max_bytes or text.LARGEST_FILE, out.note, encoding), prompt.strip(), system, hide, depth)
        stored.check(out, document, save_document, request, file, truncate, force)
        if resume is not None:
            stored.check_resume(resume, {"--document": document, "--save-document": save_document, "--hide": hide, "--truncate": truncate}, request, file)
        if strategy is not None and not request.prompt:
            raise ValueError(f"--strategy {strategy} needs a question; pass --prompt TEXT")
        if not request.user.strip():
            raise ValueError("there is nothing to read; pass --file FILE, --prompt TEXT or both, or pipe a text in")
        if show_retrieval is not None:
            if not request.prompt and save_document is not None:
                raise ValueError(f"{retrieval.OPTION} draws what the tokens of an answer choose, and nothing is asked; pass --prompt too")
            check_picture(out, show_retrieval, force, retrieval.OPTION)
        if truncate is not None and declared is None and chosen is None:
            raise ValueError("--truncate needs to know for what length; pass --context N too")
        pieces = None if strategy is None else strategies.source(file, max_bytes, request, out, encoding)
        with common.quiet_transformers(verbose):
            loaded, tokenizer = common.load_model(out, model, dtype, device)
            sampling = sampling_of(out, temperature, top_p, seed)
            if show_retrieval is not None:
                retrieval.require(loaded, chosen, trained_window)
            choice = stored.Choice(chosen, declared, trained_window, chunk_size, by_profile, memory)
            if pieces is not None:
                return strategies.run(out, model, loaded, tokenizer, choice, pieces, request, max_new_tokens, sampling, reading)
            if document is not None:
                asked = Asked(stored.reopen(out, loaded, tokenizer, choice, document), request.prompt, file=document)
            elif save_document is not None:
                asked = Asked(stored.read_and_save(out, loaded, tokenizer, request, choice, save_document), request.prompt, file=save_document)
            elif resume is not None and file is not None:
                asked = take_up(out, loaded, tokenizer, request, choice, max_new_tokens, text.pieces(file, max_bytes, out.note, encoding), resume)
                announce(out, asked)
            else:
                asked = fit(out, loaded, tokenizer, request, choice, max_new_tokens, truncate)
                announce(out, asked)
            with asked.extension, kept_in(out, resume):
                result = answer(out, model, asked, max_new_tokens, sampling, declared is not None, show_retrieval, hide)
        if not as_json and "answer" in result:
            out.write("\n")
            out.aside(table(result, asked.extension))
        out.finish(result, lambda console: None)


def sampling_of(out: Output, temperature: float | None, top_p: float | None, seed: int | None) -> Sampling:
    """What the options say; a temperature of 0 is greedy. What has no effect is said."""
    from longreach.running.sampling import Sampling

    if temperature is None and top_p is not None:
        temperature = 1.0
    given = {"--seed": seed, "--top-p": top_p}
    if not temperature and (idle := [name for name, value in given.items() if value is not None]):
        out.warn(f"without a --temperature above 0 the answer is greedy, and {' and '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect")
    return Sampling(temperature or None, top_p, seed or 0)


@dataclass(frozen=True)
class Asked:
    """A question to a conversation whose method is attached, and what there is to say about it."""

    talk: Conversation | LongText
    question: str
    cut: text.Truncation | None = None
    beyond: str | None = None  # what to say where plain attention goes beyond its window
    file: Path | None = None  # the text on disk that the conversation is about

    @property
    def extension(self) -> Extension:
        assert self.talk.extension is not None
        return self.talk.extension


def answer(
    out: Output, model: str, asked: Asked, max_new_tokens: int, sampling: Sampling, declared: bool, png: Path | None = None, hidden: str | None = None
) -> dict[str, Any]:
    """The answer, written as it comes -> the report; without a question, what was saved. `png`: to draw what was retrieved, where a sentence was `hidden`."""
    from longreach.running.conversation import Conversation

    talk, known = asked.talk, asked.talk.known
    if not asked.question:
        assert asked.file is not None and isinstance(talk, Conversation)
        return stored.summary(model, talk, asked.file, known)
    ids = talk.sequence(asked.question)
    tokens = len(ids)
    with retrieval.watched(asked.extension, png, tokens) as choices, common.progress_bar(out, tokens - known) as progress:
        found = talk.ask(asked.question, max_new_tokens, sampling=sampling, write=out.write, progress=lambda done: progress(max(0, done - known)))
    result = report(model, asked, found, tokens, known, talk.limit or tokens + max_new_tokens, declared)
    if choices is not None and png is not None:
        result["retrieval"] = retrieval.finish(asked.extension, talk.tokenizer, choices, [*map(int, ids), *found.ids[:-1]], hidden, png)
        out.note(f"wrote {png}")
    return result if asked.file is None else {**result, "document": str(asked.file), "document_tokens": known}


def fit(
    out: Output, model: CausalLM, tokenizer: Tokenizer, request: text.Request, choice: stored.Choice, max_new_tokens: int, truncate: text.Side | None
) -> Asked:
    """Make sure that the prompt and the new tokens fit, and attach the method; raises with the numbers and the fix if they do not."""
    from longreach.running.conversation import Conversation

    window, limit = fitting.limits(model, choice)
    talk, question = Conversation(model, tokenizer, system=request.system, chunk_size=choice.chunk_size), request.user
    ids, cut = talk.sequence(question), None
    if not ids:
        raise ValueError("the tokenizer makes no tokens of this text; pass another --prompt or --file")
    if limit is not None and len(ids) + max_new_tokens > limit:
        if truncate is None:
            raise ValueError(fitting.too_long(len(ids), max_new_tokens, limit, choice.context is not None, choice.method, window))
        if limit <= max_new_tokens:
            raise ValueError(f"{max_new_tokens} new tokens leave no room for a prompt in {limit}; pass a smaller --max-new-tokens")
        encode = lambda document: talk.sequence(replace(request, document=document).user)  # noqa: E731
        document, cut = text.shorten(tokenizer, request.document, limit - max_new_tokens, truncate, encode)
        question = replace(request, document=document).user
        ids = talk.sequence(question)
    extension, total, beyond = fitting.attached(out, model, choice, window, len(ids), max(ids), max_new_tokens)
    talk.attach(extension, total)
    return Asked(talk, question, cut, beyond)


def take_up(
    out: Output, model: CausalLM, tokenizer: Tokenizer, request: text.Request, choice: stored.Choice, max_new_tokens: int, pieces: Iterator[str], folder: Path
) -> Asked:
    """The same of a text that is not in memory, and is kept in a folder while it is read."""
    from longreach.running import long_text, resuming

    if resuming.held(folder):
        out.kept = f"{folder} is as it was"
    window, limit = fitting.limits(model, choice)
    ids = long_text.prompt_ids(tokenizer, pieces, request.prompt, request.system)
    tokens = len(ids)
    own = long_text.before_question(tokenizer, tokens, request.prompt, request.system)
    talk = long_text.LongText(model, tokenizer, ids, folder, own, choice.chunk_size)
    if limit is not None and tokens + max_new_tokens > limit:
        raise ValueError(fitting.too_long(tokens, max_new_tokens, limit, choice.context is not None, choice.method, window, truncate=""))
    extension, total, beyond = fitting.attached(out, model, choice, window, tokens, int(talk.ids.max()), max_new_tokens, kept=True)
    try:
        stored.require_same(extension, folder)
        talk.attach(extension, total)
    except BaseException:
        extension.remove()
        raise
    if talk.known:
        out.note(f"{counted(talk.known, 'token')} of {tokens} were read before; going on from {folder}")
    return Asked(talk, request.prompt, beyond=beyond)


@contextmanager
def kept_in(out: Output, folder: Path | None) -> Iterator[None]:
    """Inside, a text is read and kept in a folder. Where that is interrupted, it is said whether a save had come already."""
    from longreach.running import resuming

    try:
        yield
    except KeyboardInterrupt:
        if folder is not None and resuming.held(folder):
            out.kept = f"what was read so far is in {folder}; the same command goes on from there"
        raise


def announce(out: Output, asked: Asked) -> None:
    """What will be used, before the work starts."""
    stored.announce(out, asked.extension)
    for warning in (asked.beyond, asked.cut):
        if warning is not None:
            out.warn(str(warning))


def report(model: str, asked: Asked, found: Answer, prompt_tokens: int, known: int, context: int, declared: bool) -> dict[str, Any]:
    """`known` tokens of the prompt had been read before."""
    from longreach.planning.machine import peak_memory

    facts = asked.extension.report()
    further = found.tokens - 1
    cut = asked.cut
    return {
        "model": model,
        "answer": found.text,
        "finish": found.finish,
        "method": facts["method"],
        "reason": facts["reason"],
        "warning": facts["warning"] or asked.beyond,
        "context": context,
        "context_declared": declared,
        "capacity": facts["capacity"],
        "trained_window": facts["trained_window"],
        "prompt_tokens": prompt_tokens,
        "new_tokens": found.tokens,
        "truncated": None if cut is None else {"side": cut.side, "document_tokens": cut.document_tokens, "kept_tokens": cut.kept_tokens},
        "prefill_seconds": round(found.prefill_seconds, 4),
        "prefill_tokens_per_second": common.rate(prompt_tokens - known, found.prefill_seconds),
        "decode_tokens_per_second": common.rate(further, found.decode_seconds) if further > 0 else None,
        "peak_memory_bytes": peak_memory(),
        "peak_device_memory_bytes": peak_device_memory(asked.extension),
        "kv_store_bytes": found.store_bytes,
        "extension": facts,
    }


def peak_device_memory(extension: Extension) -> int | None:
    import torch

    device = next(extension.model.parameters()).device
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def table(result: dict[str, Any], extension: Extension) -> Any:
    from longreach.memory import pooled

    def speed(value: float | None) -> str:
        return "" if value is None else f", {value:.1f} tokens/s"

    prompt = counted(result["prompt_tokens"], "token")
    rows = [
        ("method", str(extension.method)),
        ("reason", result["reason"]),
        ("context", f"{counted(result['context'], 'token')}, {'declared' if result['context_declared'] else 'prompt and new tokens'}"),
        ("capacity", "unlimited" if result["capacity"] is None else counted(result["capacity"], "token")),
        ("prompt", f"{prompt}, {result['prefill_seconds']:.2f} s to the first new one{speed(result['prefill_tokens_per_second'])}"),
        ("answer", f"{counted(result['new_tokens'], 'token')}{speed(result['decode_tokens_per_second'])}"),
        ("keys and values", common.size(result["kv_store_bytes"])),
    ]
    if (memory := result["extension"]["memory"]) is not None:
        rows += zip(("in tiers", *[""] * 9), pooled.said(memory))
    if result["truncated"] is not None:
        cut = result["truncated"]
        rows.insert(5, ("left out", f"{cut['document_tokens'] - cut['kept_tokens']} of the document's {cut['document_tokens']} tokens ({cut['side']})"))
    if result["peak_memory_bytes"] is not None:
        rows.append(("peak memory", common.size(result["peak_memory_bytes"])))
    if result["peak_device_memory_bytes"] is not None:
        rows.append(("on the device", common.size(result["peak_device_memory_bytes"])))
    return common.pairs_table("", rows)
