"""`longreach run`: a text and a question in, the answer out, with what it took.

Knows the options and the order of the work; reading text, generating and attaching a method are done elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach.cli import stored, text
from longreach.cli.common import (
    Context,
    Device,
    Dtype,
    Encoding,
    Force,
    Json,
    MethodName,
    Model,
    Output,
    Quiet,
    TrainedWindow,
    Verbose,
    load_model,
    method_of,
    output,
    pairs_table,
    progress_bar,
    quiet_transformers,
    rate,
    size,
)
from longreach.quantities import counted

if TYPE_CHECKING:
    from longreach.hf.extension import Extension
    from longreach.methods.base import Method
    from longreach.running.conversation import Conversation
    from longreach.running.generation import Answer, Sampling

TAKES_METHOD_PARAMETERS = True


def command(
    context: typer.Context,
    model: Model = "nano",
    declared: Context = None,
    method: MethodName = None,
    file: Annotated[
        str | None,
        typer.Option("--file", "-f", help="The text to read: a file (.xz and .gz too), - for standard input, or @book, a book that comes with nano."),
    ] = None,
    encoding: Encoding = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question or instruction that follows the text.")] = "",
    system: Annotated[str | None, typer.Option("--system", help="A system message, for models with a chat template.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")] = 128,
    save_document: Annotated[
        Path | None,
        typer.Option("--save-document", help="Save the text as it was read to this file, so that --document need not read it again. Needs --context."),
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option("--document", help="Ask about a text that --save-document wrote, instead of --file; method and context are those it was read with."),
    ] = None,
    hide: Annotated[str | None, typer.Option("--hide", help="A sentence to hide in the text, to see whether it is found.")] = None,
    depth: Annotated[float, typer.Option("--depth", min=0, max=1, help="Where to hide it: 0 is the beginning, 1 the end.")] = 0.5,
    truncate: Annotated[text.Side | None, typer.Option("--truncate", help="What to leave out of a too long text. Without it, too long is an error.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, help="Sample at this temperature; greedy if not given or 0.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", max=1, help="Sample among the likeliest tokens that have this probability together.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the sampling.")] = 0,
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Prompt tokens of one forward.")] = 512,
    dtype: Dtype = None,
    device: Device = None,
    trained_window: TrainedWindow = None,
    max_bytes: Annotated[int, typer.Option("--max-bytes", min=1, help="Refuse a longer text.")] = text.LARGEST_FILE,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Read a text of any length and answer a prompt about it.

    Parameters of a method (--group-size, --window, --n-local, ...) are options too: see `longreach methods`.
    """
    with output(as_json, verbose, quiet) as out:
        if top_p is not None and not top_p > 0:
            raise ValueError(f"--top-p must be above 0 and at most 1, not {top_p}; leave it out to sample among all tokens")
        chosen = method_of(context, method)
        if document is not None and encoding is not None:
            raise ValueError(text.NOTHING_TO_DECODE)
        request = text.Request("" if document else text.read(file, max_bytes, out.note, encoding), prompt.strip(), system, hide, depth)
        stored.check(out, document, save_document, request, file, truncate, force)
        if not request.user.strip():
            raise ValueError("there is nothing to read; pass --file FILE, --prompt TEXT or both, or pipe a text in")
        if truncate is not None and declared is None and chosen is None:
            raise ValueError("--truncate needs to know for what length; pass --context N too")
        with quiet_transformers(verbose):
            from longreach.running import generation

            loaded, tokenizer = load_model(out, model, dtype, device)
            sampling = generation.Sampling(temperature or (1.0 if top_p is not None and temperature is None else None), top_p, seed)
            if (stored_file := document or save_document) is not None:
                choice = stored.Choice(chosen, declared, trained_window, chunk_size)
                if document is not None:
                    talk = stored.reopen(out, loaded, tokenizer, choice, document)
                else:
                    talk = stored.read_and_save(out, loaded, tokenizer, request, choice, stored_file)
                result = ask(out, model, talk, request.prompt, max_new_tokens, sampling, stored_file, declared is not None)
                out.finish(result, lambda console: None)
                return
            fitted = fit(loaded, tokenizer, request, chosen, declared, max_new_tokens, truncate, trained_window)
            extension = fitted.attach(loaded)
            with extension:
                announce(out, extension, fitted)
                with progress_bar(out, len(fitted.ids)) as progress:
                    found = generation.answer(
                        loaded,
                        tokenizer,
                        fitted.ids,
                        max_new_tokens,
                        extension=extension,
                        chunk_size=chunk_size,
                        sampling=sampling,
                        write=out.write,
                        progress=progress,
                    )
                result = report(model, extension, fitted, found)
        if not as_json:
            out.write("\n")
            out.aside(table(result, extension))
        out.finish(result, lambda console: None)


def ask(
    out: Output, model: str, talk: Conversation, prompt: str, max_new_tokens: int, sampling: Sampling, file: Path, declared: bool
) -> dict[str, Any]:
    """The answer to a question about a text on disk, written as it comes -> the report; without a question, what was saved."""
    extension = talk.extension
    assert extension is not None
    with extension:
        read, ids = talk.known, talk.sequence(prompt)
        if not prompt:
            return stored.summary(model, talk, file, read)
        found = talk.ask(prompt, max_new_tokens, sampling=sampling, write=out.write)
        fitted = Fitted(ids, talk.limit or len(ids) + max_new_tokens, declared, extension.method, None, None, None)
        result = {**report(model, extension, fitted, found, read), "document": str(file), "document_tokens": read}
    if not out.as_json:
        out.write("\n")
        out.aside(table(result, extension))
    return result


@dataclass(frozen=True)
class Fitted:
    """A prompt that fits, and how to attach the method that it fits."""

    ids: list[int]
    context: int
    declared: bool
    method: Method | None  # None: the dial chooses
    trained_window: int | None
    cut: text.Truncation | None
    beyond: str | None  # what to say where plain attention goes beyond its window

    def attach(self, model: Any) -> Extension:
        import longreach

        context = None if self.beyond else self.context  # stock beyond its window: no declared context, so that nothing refuses it
        return longreach.extend(model, self.method, context=context, trained_window=self.trained_window)


def fit(
    model: Any,
    tokenizer: Any,
    request: text.Request,
    method: Method | None,
    declared: int | None,
    max_new_tokens: int,
    truncate: text.Side | None,
    trained_window: int | None,
) -> Fitted:
    """Encode the prompt and make sure that it and the new tokens fit; raises with the numbers and the fix if not."""
    from longreach.configs import refuse_unsupported
    from longreach.hf.checks import find_base
    from longreach.methods.stock import Stock
    from longreach.planning import dial

    base = find_base(model)
    refuse_unsupported(base.config)
    window = dial.trained_window(base.config).tokens if trained_window is None else trained_window
    for_comparison = isinstance(method, Stock)
    capacity = None if method is None or for_comparison else method.capacity(window)
    if capacity == 0:
        raise ValueError(f"{method} uses distances beyond the trained window of {window} tokens for any text; choose parameters of at most {window}")
    if capacity is not None and declared is not None and declared > capacity:
        raise ValueError(
            f"the declared context of {declared} tokens exceeds the capacity of {capacity} of {method} on a trained window of {window}; "
            f"pass --context {capacity}, other parameters, or leave out --method to have them chosen"
        )
    ids = text.encode(tokenizer, request)
    if not ids:
        raise ValueError("the tokenizer makes no tokens of this text; pass another --prompt or --file")
    limit, cut = declared or capacity, None
    if limit is not None and len(ids) + max_new_tokens > limit:
        if truncate is None:
            raise ValueError(too_long(len(ids), max_new_tokens, limit, declared is not None, method, window))
        if limit <= max_new_tokens:
            raise ValueError(f"{max_new_tokens} new tokens leave no room for a prompt in {limit}; pass a smaller --max-new-tokens")
        ids, cut = text.shorten(tokenizer, request, limit - max_new_tokens, truncate)
    if max(ids) >= (known := model.get_input_embeddings().weight.shape[0]):
        raise ValueError(f"the tokenizer makes token {max(ids)} but the model knows {known} only; they do not belong together, reload the checkpoint's files")
    total = declared or len(ids) + max_new_tokens
    beyond = None
    if for_comparison and total > window:
        beyond = f"plain attention on {total} tokens, beyond the trained window of {window}: distances that were never trained, for comparison only"
    return Fitted(ids, total, declared is not None, method, trained_window, cut, beyond)


def too_long(prompt: int, new: int, limit: int, declared: bool, method: Method | None, window: int) -> str:
    total = prompt + new
    sentence = f"the prompt has {counted(prompt, 'token')} and with {new} new ones needs {total}, more than "
    if declared:
        return f"{sentence}the declared context of {limit}; pass --context {total}, a shorter text, or --truncate middle"
    return (
        f"{sentence}the capacity of {limit} tokens of {method} on a trained window of {window}; leave out --method and pass --context {total} to have "
        f"parameters chosen, read any length with --method lm-infinite --n-local {window}, or pass --truncate middle"
    )


def announce(out: Output, extension: Extension, fitted: Fitted) -> None:
    """What will be used, before the work starts."""
    stored.announce(out, extension)
    for warning in (fitted.beyond, fitted.cut):
        if warning is not None:
            out.warn(str(warning))


def report(model: str, extension: Extension, fitted: Fitted, found: Answer, known: int = 0) -> dict[str, Any]:
    """`known` tokens of the prompt had been read before."""
    from longreach.planning.machine import peak_memory

    facts = extension.report()
    prompt_tokens = len(fitted.ids)
    further = found.tokens - 1
    cut = fitted.cut
    return {
        "model": model,
        "answer": found.text,
        "finish": found.finish,
        "method": facts["method"],
        "reason": facts["reason"],
        "warning": facts["warning"] or fitted.beyond,
        "context": fitted.context,
        "context_declared": fitted.declared,
        "capacity": facts["capacity"],
        "trained_window": facts["trained_window"],
        "prompt_tokens": prompt_tokens,
        "new_tokens": found.tokens,
        "truncated": None if cut is None else {"side": cut.side, "document_tokens": cut.document_tokens, "kept_tokens": cut.kept_tokens},
        "prefill_seconds": round(found.prefill_seconds, 4),
        "prefill_tokens_per_second": rate(prompt_tokens - known, found.prefill_seconds),
        "decode_tokens_per_second": rate(further, found.decode_seconds) if further > 0 else None,
        "peak_memory_bytes": peak_memory(),
        "peak_device_memory_bytes": peak_device_memory(extension),
        "kv_store_bytes": found.store_bytes,
        "extension": facts,
    }


def peak_device_memory(extension: Extension) -> int | None:
    import torch

    device = next(extension.model.parameters()).device
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def table(result: dict[str, Any], extension: Extension) -> Any:
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
        ("keys and values", size(result["kv_store_bytes"])),
    ]
    if result["truncated"] is not None:
        cut = result["truncated"]
        rows.insert(5, ("left out", f"{cut['document_tokens'] - cut['kept_tokens']} of the document's {cut['document_tokens']} tokens ({cut['side']})"))
    if result["peak_memory_bytes"] is not None:
        rows.append(("peak memory", size(result["peak_memory_bytes"])))
    if result["peak_device_memory_bytes"] is not None:
        rows.append(("on the device", size(result["peak_device_memory_bytes"])))
    return pairs_table("", rows)
