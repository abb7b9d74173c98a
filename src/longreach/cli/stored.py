"""Documents on disk for `longreach run` and `chat`: read once and saved, then asked any number of times without reading again.

Knows options and files; what a document is, and whether it fits a model, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longreach.cli import profiles, targets, text
from longreach.cli.common import Output, progress_bar
from longreach.quantities import counted

if TYPE_CHECKING:
    from longreach.hf.extension import Extension
    from longreach.hf.interfaces import CausalLM, Tokenizer
    from longreach.memory.budgets import Tiered
    from longreach.methods.base import Method
    from longreach.running.conversation import Conversation


@dataclass(frozen=True)
class Choice:
    """The method that the options name (None: by the dial, or the document's own), and the lengths that they declare."""

    method: Method | None
    context: int | None
    trained_window: int | None
    chunk_size: int
    profile: profiles.Asked = profiles.BY_DEFAULT
    memory: Tiered | None = None


def check(out: Output, document: Path | None, save: Path | None, request: text.Request, file: str | None, truncate: text.Side | None, force: bool) -> None:
    """Refuses, before a model is loaded, options that do not go together and a file that is not to be overwritten."""
    from longreach.hf import documents

    if document is not None:
        given = {"--save-document": save, "--file": file, "--hide": request.hidden, "--truncate": truncate, "--system": request.system}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"--document is a text that was read already, so {' and '.join(wrong)} cannot change it; leave it out, or read the text anew")
        if not request.prompt:
            raise ValueError("--document needs a question; pass --prompt TEXT")
        documents.facts(document)
    if save is not None:
        if not request.document.strip():
            raise ValueError("there is no text to save; pass --file FILE")
        if truncate is not None:
            raise ValueError("--save-document keeps the whole text; leave out --truncate, or shorten the text yourself")
        if file is not None and save.exists() and Path(file).expanduser().exists() and save.samefile(Path(file).expanduser()):
            raise ValueError(f"--save-document {str(save)!r} would take the place of the text itself; name another folder")
        targets.check(out, save, targets.DOCUMENT, force)
        if save.exists():
            documents.writable(save)
        out.kept = unsaved(save)


def check_resume(folder: Path, others: Mapping[str, object], request: text.Request, file: str | None) -> None:
    """The same of a text that is kept while it is read. `others`: options that make another text of it, if they were given."""
    from longreach.running import resuming

    if wrong := [name for name, value in others.items() if value is not None]:
        raise ValueError(f"--resume reads the text as it is, and only once: leave out {' and '.join(wrong)}, or --resume")
    if file is None or file == text.STDIN:
        raise ValueError("--resume reads the text from its beginning each time it goes on; pass --file FILE")
    if not request.prompt:
        raise ValueError("--resume needs a question about the text; pass --prompt TEXT")
    resuming.held(folder)


def read_and_save(out: Output, model: CausalLM, tokenizer: Tokenizer, request: text.Request, choice: Choice, file: Path) -> Conversation:
    """Read the text with the method attached and write it to `file`."""
    import longreach
    from longreach.running.conversation import Conversation

    if choice.context is None and not (choice.method is not None and choice.method.bounded):
        raise ValueError("--save-document needs the length that the text, later questions and answers may have together; pass --context N")
    profile = profiles.find(out, choice.profile, model, choice.method, choice.context, choice.trained_window)
    extension = longreach.extend(model, choice.method, context=choice.context, trained_window=choice.trained_window, profile=profile, memory=choice.memory)
    try:
        talk = Conversation(model, tokenizer, request.text, request.system, choice.context, extension, choice.chunk_size)
        tokens = len(talk.sequence(request.prompt or "?"))
        if choice.context is not None and tokens > choice.context:
            raise ValueError(f"the text and its question have {tokens} tokens, more than the declared context of {choice.context}; pass a larger --context")
        out.kept = unsaved(file)
        announce(out, extension)
        with progress_bar(out, tokens) as progress:
            read = talk.read(progress)
        talk.save(file)
        out.kept = f"{counted(read, 'token')} saved in {file}"
        out.note(f"{counted(read, 'token')} read and saved to {file}; ask about them with --document {file}")
        return talk
    except BaseException:
        extension.remove()
        raise


def unsaved(file: Path) -> str:
    return f"nothing was saved, {file} is as it was" if file.exists() else "nothing was saved"


def announce(out: Output, extension: Extension) -> None:
    """What will be used, before the work starts."""
    facts = extension.report()
    out.note(f"method: {extension.method} ({facts['reason']})")
    if facts["offer"]:
        out.note(facts["offer"])
    if facts["warning"]:
        out.warn(facts["warning"])


def reopen(out: Output, model: CausalLM, tokenizer: Tokenizer, choice: Choice, file: Path) -> Conversation:
    """Attach what the document was read with and take it up again; raises if the options name something else."""
    import longreach
    from longreach.hf import documents
    from longreach.running.conversation import Conversation

    method, context = _read_with(documents.facts(file), file)
    if choice.context not in (None, context):
        raise ValueError(f"{str(file)!r} was read for a context of {context} tokens; leave out --context, or read it again with --context {choice.context}")
    if choice.method not in (None, method):
        raise ValueError(f"{str(file)!r} was read with {method.brief()}; leave out --method, or read the text again with {choice.method}")
    extension = longreach.extend(model, method, context=context, trained_window=choice.trained_window, memory=choice.memory)
    try:
        announce(out, extension)
        return Conversation.open(model, tokenizer, extension, file, limit=context if context is not None else extension.capacity, chunk_size=choice.chunk_size)
    except BaseException:
        extension.remove()
        raise


def require_same(extension: Extension, folder: Path) -> None:
    """Raises ValueError, with the options to pass, where the folder of --resume was read with another method or context."""
    from longreach.cli import parameters
    from longreach.hf import documents
    from longreach.running import resuming

    if not resuming.held(folder):
        return
    method, context = _read_with(documents.facts(folder), folder)
    if (method, context) == (extension.method, extension.context):
        return
    fixes = [] if method == extension.method else [f"pass --method {parameters.words(method)}"]
    if context != extension.context:
        fixes.append("leave out --context" if context is None else f"pass --context {context}")
    declared = "no declared context" if context is None else f"a context of {context} tokens"
    raise ValueError(f"{str(folder)!r} was read with {method.brief()} and {declared}; {' and '.join(fixes)}, or name another folder")


def _read_with(found: Mapping[str, Any], file: Path) -> tuple[Method, int | None]:
    import longreach

    try:
        return longreach.from_json(found["method"]), found["context"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} does not say what it was read with ({error}); read the text again and save it") from error


def summary(model: str, talk: Conversation, file: Path, read: int) -> dict[str, Any]:
    """What `run` reports where a text was saved and nothing asked."""
    from longreach.hf import documents

    assert talk.extension is not None
    return {"model": model, "document": str(file), "document_tokens": read, "file_bytes": documents.size(file), "extension": talk.extension.report()}
