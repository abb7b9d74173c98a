"""`longreach attribute`: which parts of a text made an answer, as a table, as data or as a page; and the table of `/why` in a chat.

Knows options and what is printed; how parts are searched for is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach import files
from longreach.apps import parts
from longreach.apps.attribution import scores as kinds
from longreach.apps.attribution.search import TOP, expected, require_searchable
from longreach.cli import common, profiles, run, stored, targets, text
from longreach.cli.common import Output
from longreach.cli.console import progress_bar, stopping_gently
from longreach.quantities import CHUNK_SIZE, counted

if TYPE_CHECKING:
    from rich.console import Console

    from longreach.apps.attribution.attribute import Attribution, Scored
    from longreach.cli.session import Session

TAKES_METHOD_PARAMETERS = True


def command(
    context: typer.Context,
    model: common.Model = "nano",
    declared: common.Context = None,
    method: common.MethodName = None,
    file: Annotated[str | None, typer.Option("--file", "-f", help="The text: a file (.xz and .gz too), - for standard input, or @book.")] = None,
    encoding: common.Encoding = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question that follows the text.")] = "",
    answer: Annotated[str | None, typer.Option("--answer", "-a", help="The answer to explain; the model answers first if not given.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message, for models with a chat template.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")] = 128,
    by: Annotated[str, typer.Option("--by", help="What the text is cut into: sentence, paragraph or passage.")] = "passage",
    words: Annotated[int, typer.Option("--words", min=1, help="The length of a passage.")] = parts.WORDS,
    top: Annotated[int, typer.Option("--top", min=1, help="How many parts to search for.")] = TOP,
    scores: Annotated[str, typer.Option("--scores", help="Of alone, leave-one-out, shapley and denoised-shapley, with commas.")] = ",".join(kinds.ENSEMBLE),
    permutations: Annotated[int, typer.Option("--permutations", min=1, help="Orders that the Shapley scores draw.")] = kinds.PERMUTATIONS,
    seed: Annotated[int, typer.Option("--seed", help="Of these orders.")] = 0,
    hide: Annotated[str | None, typer.Option("--hide", help="A sentence to hide in the text, to see whether it is found.")] = None,
    depth: Annotated[float | None, typer.Option("--depth", min=0, max=1, help="Where to hide it: 0 is the beginning, 1 the end; 0.5 if not given.")] = None,
    truncate: Annotated[text.Side | None, typer.Option("--truncate", help="What to leave out of a too long text. Without it, too long is an error.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the text with its parts marked into this file, as a page.")] = None,
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="Prompts that are read together; fewer take less memory.")] = 16,
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Prompt tokens of one forward.")] = CHUNK_SIZE,
    dtype: common.Dtype = None,
    device: common.Device = None,
    trained_window: common.TrainedWindow = None,
    profile: common.ProfileFile = None,
    no_profile: common.NoProfile = False,
    memory: common.Memory = None,
    force: common.Force = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Which parts of a text made the answer? They are searched for by leaving parts out and looking at how likely the answer is then.

    Parameters of a method (--group-size, --window, --n-local, ...) are options too: see `longreach methods`. Ctrl-C ends the search with what it has found.
    """
    with common.output(as_json, verbose, quiet) as out:
        unit = parts.unit_of(by)
        scorers = kinds.named(tuple(name.strip() for name in scores.split(",")), permutations, seed)
        chosen = common.method_of(context, method)
        by_profile = profiles.asked(profile, no_profile, chosen, model=model)
        text.check_argument("--answer", answer)
        if answer is not None and not answer.strip():
            raise ValueError("--answer has no words; pass those of the answer, or leave it out to have the model answer")
        request = text.Request(text.read(file, text.LARGEST_FILE, out.note, encoding), prompt.strip(), system, hide, depth)
        if not request.document.strip():
            raise ValueError("there is no text; pass --file FILE, or pipe a text in")
        if not request.prompt:
            raise ValueError("there is no question; pass --prompt TEXT, and --answer TEXT for an answer of your own")
        if truncate is not None and declared is None and chosen is None:
            raise ValueError("--truncate needs to know for what length; pass --context N too")
        if html is not None:
            targets.check(out, html, targets.ATTRIBUTION_PAGE, force)
        with common.quiet_transformers(verbose):
            from longreach.apps.attribution import attribute, page
            from longreach.running import prompts

            loaded, tokenizer = common.load_model(out, model, dtype, device)
            new = max_new_tokens if answer is None else len(attribute.encoded(tokenizer, answer))
            asked = run.fit(out, loaded, tokenizer, request, stored.Choice(chosen, declared, trained_window, chunk_size, by_profile, memory), new, truncate)
            document = asked.question.removesuffix(prompts.BETWEEN + request.prompt)
            pieces = parts.cut(document, unit, words)
            run.announce(out, asked)
            with asked.extension as extension, searching(out, len(pieces), scorers, top) as (progress, stopped):
                found = attribute.attribute(
                    extension, tokenizer, document, request.prompt, answer, parts=pieces, top=top, scorers=scorers, system=system,
                    max_new_tokens=max_new_tokens, at_once=at_once, chunk_size=chunk_size, progress=progress, stopped=stopped,
                )  # fmt: skip
                facts = extension.report()
        if not found.complete:
            out.warn("the search was stopped; the parts are as fine as it came")
        if html is not None:
            files.write(html, page.render(found, document, "standard input" if file in (None, text.STDIN) else file, model), "page")
            out.note(f"wrote {html}")
        result = {"model": model, "file": file, "method": facts["method"], "warning": facts["warning"] or asked.beyond, **asdict(found)}
        out.finish({**result, "html": None if html is None else str(html)}, lambda console: show(console, found))


@contextmanager
def searching(out: Output, count: int, scorers: tuple[kinds.Scorer, ...], top: int) -> Iterator[tuple[Callable[[int, int], None], Callable[[], bool]]]:
    """Inside, a search among so many parts says how far it is, and the first Ctrl-C ends it."""
    require_searchable(count, top)
    with stopping_gently() as stopped, progress_bar(out, expected(count, scorers, top), "searching", "prompt", 1) as update:
        yield lambda done, _: update(done), stopped


def show(console: Console, found: Attribution) -> None:
    """The answer, the parts and what they do together."""
    from rich.text import Text

    from longreach.apps.attribution import page

    console.print(Text(found.answer.strip(), "bold"), "\n", sep="")
    if shown := page.mattering(found):
        console.print(table(shown))
    console.print(Text(page.verdict(found)))
    if (evidence := found.evidence) is not None:
        rows = (("whole text", evidence.whole), ("without the parts", evidence.without), ("the parts alone", evidence.only), ("no text", evidence.nothing))
        console.print(common.pairs_table("How likely the answer is", [(name, chance(nats, found.answer_tokens)) for name, nats in rows]))
    work = found.work
    console.print(
        f"{counted(found.count, 'part')}, {counted(work.evaluations, 'evaluation')} in {counted(work.forwards, 'forward')}; "
        f"{counted(work.tokens_read, 'token')} read of {work.tokens_asked} asked for ({work.seconds:.1f} s)"
    )


def chance(nats: float, tokens: int) -> str:
    from longreach.apps.attribution import page

    return f"{100 * page.per_token(nats, tokens):.3g} % a token ({nats:.2f} nats)"


def table(found: list[Scored]) -> Any:
    """The parts, the best first."""
    from rich.text import Text

    from longreach.apps.attribution.page import excerpt

    shown = common.plain_table("", "score", "where", "part")
    for rank, part in enumerate(found, 1):
        shown.add_row(str(rank), f"{part.score:.2f}", place(part), Text(excerpt(part.text)))
    return shown


def place(part: Scored) -> str:
    if part.upto is None:
        return f"{part.start} to {part.stop}" if part.turn is None else f"turn {part.turn}"
    turns = f"turns {part.turn or 1} to {part.upto}" if part.upto > (part.turn or 1) else "turn 1"
    return f"{part.start} to {part.stop} and {turns}" if part.turn is None else turns


def why(session: Session, unit: str) -> None:
    """`/why`: which parts of the conversation made its last answer. On standard error, as what the other commands say."""
    from longreach.apps.attribution import attribute

    out, talk, by = session.out, session.talk, parts.unit_of(unit or "passage")
    count = len(parts.cut(talk.document, by)) + max(0, len(talk.turns) - 1)
    scorers = kinds.named()
    with searching(out, count, scorers, TOP) as (progress, stopped):
        found = attribute.why(talk, by=by, scorers=scorers, progress=progress, stopped=stopped)
    show(out.errors, found)
