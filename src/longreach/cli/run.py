"""`longreach run`: a text and a question in, the answer out, with what it took.

Knows the options and the order of the work; reading text, generating and attaching a method are done elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach.cli import common, profiles, retrieval, stored, text
from longreach.cli.common import Output
from longreach.cli.targets import check_picture
from longreach.quantities import CHUNK_SIZE, counted

if TYPE_CHECKING:
    from longreach.hf.extension import Extension
    from longreach.hf.interfaces import CausalLM, Tokenizer
    from longreach.methods.base import Method
    from longreach.running.conversation import Conversation
    from longreach.running.generation import Answer, Sampling

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
    max_bytes: Annotated[int, typer.Option("--max-bytes", min=1, help="Refuse a longer text.")] = text.LARGEST_FILE,
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
        request = text.Request("" if document else text.read(file, max_bytes, out.note, encoding), prompt.strip(), system, hide, depth)
        stored.check(out, document, save_document, request, file, truncate, force)
        if not request.user.strip():
            raise ValueError("there is nothing to read; pass --file FILE, --prompt TEXT or both, or pipe a text in")
        if show_retrieval is not None:
            if not request.prompt and save_document is not None:
                raise ValueError(f"{retrieval.OPTION} draws what the tokens of an answer choose, and nothing is asked; pass --prompt too")
            check_picture(out, show_retrieval, force, retrieval.OPTION)
        if truncate is not None and declared is None and chosen is None:
            raise ValueError("--truncate needs to know for what length; pass --context N too")
        with common.quiet_transformers(verbose):
            loaded, tokenizer = common.load_model(out, model, dtype, device)
            sampling = sampling_of(out, temperature, top_p, seed)
            if show_retrieval is not None:
                retrieval.require(loaded, chosen, trained_window)
            choice = stored.Choice(chosen, declared, trained_window, chunk_size, by_profile, memory)
            if document is not None:
                asked = Asked(stored.reopen(out, loaded, tokenizer, choice, document), request.prompt, file=document)
            elif save_document is not None:
                asked = Asked(stored.read_and_save(out, loaded, tokenizer, request, choice, save_document), request.prompt, file=save_document)
            else:
                asked = fit(out, loaded, tokenizer, request, choice, max_new_tokens, truncate)
                announce(out, asked)
            with asked.extension:
                result = answer(out, model, asked, max_new_tokens, sampling, declared is not None, show_retrieval, hide)
        if not as_json and "answer" in result:
            out.write("\n")
            out.aside(table(result, asked.extension))
        out.finish(result, lambda console: None)


def sampling_of(out: Output, temperature: float | None, top_p: float | None, seed: int | None) -> Sampling:
    """What the options say; a temperature of 0 is greedy. What has no effect is said."""
    from longreach.running.generation import Sampling

    if temperature is None and top_p is not None:
        temperature = 1.0
    given = {"--seed": seed, "--top-p": top_p}
    if not temperature and (idle := [name for name, value in given.items() if value is not None]):
        out.warn(f"without a --temperature above 0 the answer is greedy, and {' and '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect")
    return Sampling(temperature or None, top_p, seed or 0)


@dataclass(frozen=True)
class Asked:
    """A question to a conversation whose method is attached, and what there is to say about it."""

    talk: Conversation
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
    talk, known = asked.talk, asked.talk.known
    if not asked.question:
        assert asked.file is not None
        return stored.summary(model, talk, asked.file, known)
    ids = talk.sequence(asked.question)
    tokens = len(ids)
    with retrieval.watched(asked.extension, png, tokens) as choices, common.progress_bar(out, tokens - known) as progress:
        found = talk.ask(asked.question, max_new_tokens, sampling=sampling, write=out.write, progress=lambda done: progress(max(0, done - known)))
    result = report(model, asked, found, tokens, known, talk.limit or tokens + max_new_tokens, declared)
    if choices is not None and png is not None:
        result["retrieval"] = retrieval.finish(asked.extension, talk.tokenizer, choices, ids + found.ids[:-1], hidden, png)
        out.note(f"wrote {png}")
    return result if asked.file is None else {**result, "document": str(asked.file), "document_tokens": known}


def fit(
    out: Output, model: CausalLM, tokenizer: Tokenizer, request: text.Request, choice: stored.Choice, max_new_tokens: int, truncate: text.Side | None
) -> Asked:
    """Make sure that the prompt and the new tokens fit, and attach the method; raises with the numbers and the fix if they do not."""
    import longreach
    from longreach import configs
    from longreach.hf.checks import find_base
    from longreach.planning import dial
    from longreach.running.conversation import Conversation

    base = find_base(model)
    configs.refuse_unsupported(base.config)
    method, declared = choice.method, choice.context
    window = configs.trained_window(base.config, choice.trained_window).tokens
    capacity = dial.limit(method, window)
    if capacity is not None and declared is not None and declared > capacity:
        raise ValueError(
            f"the declared context of {declared} tokens exceeds the capacity of {capacity} of {method} on a trained window of {window}; "
            f"pass --context {capacity}, other parameters, or leave out --method to have them chosen{dial.combined(method, window, declared)}"
        )
    talk, question = Conversation(model, tokenizer, system=request.system, chunk_size=choice.chunk_size), request.user
    ids = talk.sequence(question)
    if not ids:
        raise ValueError("the tokenizer makes no tokens of this text; pass another --prompt or --file")
    limit, cut = declared or capacity, None
    if limit is not None and len(ids) + max_new_tokens > limit:
        if truncate is None:
            raise ValueError(too_long(len(ids), max_new_tokens, limit, declared is not None, method, window))
        if limit <= max_new_tokens:
            raise ValueError(f"{max_new_tokens} new tokens leave no room for a prompt in {limit}; pass a smaller --max-new-tokens")
        encode = lambda document: talk.sequence(replace(request, document=document).user)  # noqa: E731
        document, cut = text.shorten(tokenizer, request.document, limit - max_new_tokens, truncate, encode)
        question = replace(request, document=document).user
        ids = talk.sequence(question)
    if max(ids) >= (known := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(f"the tokenizer makes token {max(ids)} but the model knows {known} only; they do not belong together, reload the checkpoint's files")
    total = declared or len(ids) + max_new_tokens
    context, beyond = dial.declare(method, window, total)
    profile = profiles.find(out, choice.profile, model, method, context, choice.trained_window)
    talk.attach(longreach.extend(model, method, context=context, trained_window=choice.trained_window, profile=profile, memory=choice.memory), total)
    return Asked(talk, question, cut, beyond)


def too_long(prompt: int, new: int, limit: int, declared: bool, method: Method | None, window: int) -> str:
    total = prompt + new
    sentence = f"the prompt has {counted(prompt, 'token')} and with {new} new ones needs {total}, more than "
    if declared:
        return f"{sentence}the declared context of {limit}; pass --context {total}, a shorter text, or --truncate middle"
    return (
        f"{sentence}the capacity of {limit} tokens of {method} on a trained window of {window}; leave out --method and pass --context {total} to have "
        f"parameters chosen, read any length with --method lm-infinite --n-local {window}, or pass --truncate middle"
    )


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
