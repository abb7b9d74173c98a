"""`longreach rag`: a question about documents, answered from the chunks that are retrieved for it.

Knows options and the order of the work; retrieving, asking and allocating are done in apps/rag, and reading text elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longreach.cli import common, fitting, profiles, stored, text
from longreach.cli.common import Output
from longreach.quantities import CHUNK_SIZE, counted

if TYPE_CHECKING:
    from longreach.apps.rag import Demonstration, Rag, RagAnswer, RagConfig
    from longreach.hf.extension import Extension

TAKES_METHOD_PARAMETERS = True


def command(
    context: typer.Context,
    model: common.Model = "nano",
    declared: common.Context = None,
    method: common.MethodName = None,
    file: Annotated[
        list[str] | None, typer.Option("--file", "-f", help="A document: a file (.xz and .gz too), - for standard input, or @book. May be given several times.")
    ] = None,
    encoding: common.Encoding = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question.")] = "",
    lead: Annotated[str, typer.Option("--lead", help="The beginning of the answer, which is given to the model, such as 'The pass key is'.")] = "",
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="Chunks that are retrieved for a question; as many as fit if not given.")] = None,
    chunk_words: Annotated[int, typer.Option("--chunk-words", min=0, help="Words of a chunk; 0: every document is one.")] = 300,
    order: Annotated[
        Literal["rank", "position"], typer.Option("--order", help="rank: the best chunk nearest to the question; position: as in the documents.")
    ] = "rank",
    retriever: Annotated[str, typer.Option("--retriever", help="bm25, or the name or folder of a sentence-transformers model.")] = "bm25",
    rounds: Annotated[int | None, typer.Option("--rounds", min=0, help="Sub-questions that the model may ask first (IterDRAG); none if not given.")] = None,
    demonstrations: Annotated[
        Path | None, typer.Option("--demonstrations", help="Questions with their answers to show before: an object with question and answer on each line.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", parser=common.tokens, metavar="TOKENS", help="Tokens that all prompts for the question may have together.")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option("--runs", help="Recorded runs: chunks, demonstrations and rounds that they predict to be best for --budget.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", help="The task in --runs that is most like yours, where there are several.")] = None,
    instruction: Annotated[str | None, typer.Option("--instruction", help="Opens the prompt; with --rounds one is given if you give none.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer of a call, in tokens.")] = 128,
    chunk_size: Annotated[int, typer.Option("--chunk-size", min=1, help="Prompt tokens of one forward.")] = CHUNK_SIZE,
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
    """Answer a question about documents from the chunks that fit it best, in a prompt that may be longer than the trained window.

    Without --budget and --context the prompts stay inside the trained window. Parameters of a method are options too: see `longreach methods`.
    BM25 needs pip install 'longreach\\[rag]'.
    """
    with common.output(as_json, verbose, quiet) as out:
        for option, value in (("--prompt", prompt), ("--lead", lead), ("--instruction", instruction)):
            text.check_argument(option, value)
        if not prompt.strip():
            raise ValueError("there is no question; pass --prompt TEXT")
        chosen = common.method_of(context, method)
        by_profile = profiles.asked(profile, no_profile, chosen, model=model)
        from longreach.apps.rag import RagConfig, records, retrievers
        from longreach.apps.rag.chunks import documents_of, split

        shown = () if demonstrations is None else records.read_demonstrations(demonstrations)
        config = RagConfig(top_k, chunk_words or None, order, rounds or 0, budget, max_new_tokens, retriever, instruction)
        spent = allocated(runs, task, budget, config, len(shown), {"--top-k": top_k, "--rounds": rounds})
        if spent is not None:
            config, shown = spent.config, shown[: spent.demonstrations]
            out.note(spent.said)
        retrievers.retriever(config.retriever)  # a missing package is said before a model is loaded
        documents = read(out, file, encoding)
        if spent is not None and config.top_k is not None and config.top_k > (there := len(split(documents_of(documents), config.chunk_words))):
            out.note(f"the documents have {counted(there, 'chunk')}: all of them are read")
            config = replace(config, top_k=there)
        with common.quiet_transformers(verbose):
            loaded, tokenizer = common.load_model(out, model, dtype, device)
            choice = stored.Choice(chosen, declared, trained_window, chunk_size, by_profile, memory)
            with attached(out, loaded, tokenizer, choice, config, prompt, lead.strip()) as extension:
                stored.announce(out, extension)
                found, rag = ask(out, (loaded, tokenizer, documents, config), shown, extension, chunk_size, prompt, lead)
        result = {
            "model": model, **found.to_json(), "chunks": len(rag.chunks), "demonstrations": len(shown), "config": vars(config),
            "allocation": None if spent is None else spent.facts, "method": extension.report()["method"], "extension": extension.report(),
        }  # fmt: skip
        if not as_json:
            out.write(found.answer + "\n")
            out.aside(table(found, len(rag.chunks)))
        out.finish(result, lambda console: None)


def read(out: Output, given: list[str] | None, encoding: str | None) -> str | dict[str, str]:
    """One document without a name, or several by the names of their files."""
    if not given:
        found = text.read(None, text.LARGEST_FILE, out.note, encoding)
        if not found.strip():
            raise ValueError("there are no documents; pass --file FILE, once for each, or pipe a text in")
        return found
    if len(given) == 1:
        return text.read(given[0], text.LARGEST_FILE, out.note, encoding)
    names = [Path(file).name for file in given]
    names = names if len(set(names)) == len(names) else given
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"--file {twice} is given twice; pass every document once")
    room, found_texts = text.LARGEST_FILE, {}
    for name, file in zip(names, given):
        found_texts[name] = text.read(file, room, out.note, encoding)
        room -= len(found_texts[name].encode())
    return found_texts


@dataclass(frozen=True)
class Spent:
    """How the recorded runs spend the budget: a configuration, and of the demonstrations so many."""

    config: RagConfig
    demonstrations: int
    facts: dict[str, Any]

    @property
    def said(self) -> str:
        facts = self.facts
        return (
            f"by the recorded runs of {facts['task']}: {counted(facts['k'], 'chunk')} of {facts['chunk_words'] or 'all'} words, "
            f"{counted(facts['m'], 'demonstration')}, {counted(facts['n'] - 1, 'round')} (score {facts['predicted']:.2f} predicted, {facts['recorded']:.2f} "
            f"recorded, up to {counted(facts['tokens'], 'token')})"
        )


def allocated(file: Path | None, task: str | None, budget: int | None, config: RagConfig, shown: int, given: dict[str, int | None]) -> Spent | None:
    """What the allocation model chooses for the budget among what was recorded; None where no runs are given."""
    if file is None:
        if task is not None:
            raise ValueError("--task names a task of recorded runs; pass --runs FILE too, or leave it out")
        return None
    from longreach.apps.rag import AllocationModel, records

    if budget is None:
        raise ValueError("--runs says how a budget is best spent; pass --budget TOKENS too, or leave it out")
    if wrong := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"--runs chooses what {' and '.join(wrong)} would say; leave out one of them")
    runs = records.read_runs(file)
    tasks = sorted({run.task for run in runs})
    if task is None and len(tasks) > 1:
        raise ValueError(f"{str(file)!r} has runs of several tasks; pass --task with the one that is most like yours: {', '.join(tasks)}")
    name = task if task is not None else tasks[0] if tasks else ""
    if name not in tasks:
        raise ValueError(f"no recorded run of the task {name!r} is in {str(file)!r}; pass --task with one of {', '.join(tasks) or 'a file of runs'}")
    candidates = [run for run in runs if run.task == name and run.m <= shown]
    fitted = AllocationModel.fit(runs)
    best = fitted.best(name, candidates, budget)
    words = best.chunk_words or config.chunk_words  # a run need not say what its chunks were
    facts = {
        "task": name, "k": best.k, "m": best.m, "n": best.n, "chunk_words": words, "tokens": best.tokens,
        "predicted": fitted.predict(name, best.theta), "recorded": best.score, "r2": fitted.r2,
    }  # fmt: skip
    return Spent(replace(config, top_k=best.k, rounds=best.n - 1, chunk_words=words), best.m, facts)


def attached(out: Output, model: Any, tokenizer: Any, choice: stored.Choice, config: RagConfig, prompt: str, lead: str) -> Extension:
    """The method for the longest prompt that the options allow: that of --context, or of --budget and an answer, or of the trained window."""
    from longreach.apps.rag.prompts import longest_control
    from longreach.running import prompts

    window, limit = fitting.limits(model, choice)
    new = config.max_new_tokens + (longest_control(tokenizer, lead) if config.rounds else 0)
    if config.budget is None and (window if limit is None or choice.context is None else limit) <= new:
        raise ValueError(f"{counted(new, 'new token')} leave no room for a prompt in {choice.context or window}; pass a smaller --max-new-tokens, or --budget")
    tokens = window - new if config.budget is None else config.budget
    if limit is not None and choice.context is None and tokens + new > limit:
        raise ValueError(fitting.too_long(tokens, new, limit, False, choice.method, window, truncate=", or a smaller --budget"))
    return fitting.attached(out, model, choice, window, tokens, max(prompts.encode(tokenizer, prompt), default=0), new)[0]


def ask(
    out: Output, about: tuple[Any, ...], shown: tuple[Demonstration, ...], extension: Extension, chunk_size: int, prompt: str, lead: str
) -> tuple[RagAnswer, Rag]:
    from longreach.apps.rag import Rag

    rag = Rag(*about, demonstrations=shown, extension=extension, chunk_size=chunk_size)
    _, written, state = rag.fitted(prompt.strip(), lead.strip())
    calls = 2 * rag.config.rounds + 1
    tokens = calls * len(written.ids(state, prompt.strip(), lead.strip()))
    with common.progress_bar(out, min(tokens, rag.config.budget or tokens)) as progress:
        return rag.ask(prompt, lead=lead, progress=progress), rag


def table(found: RagAnswer, chunks: int) -> Any:
    """What was read, and what it took."""
    words = {"one call": "in one call", "by itself": "when the model gave it", "rounds": "after all rounds", "budget": "as the budget left no more"}
    rows = [
        ("answer", words.get(found.ended, "after an empty sub-question")),
        ("read", f"{counted(found.tokens, 'token')} in {counted(len(found.calls), 'call')}, {found.reused_tokens} of them read before"),
        ("wrote", counted(found.new_tokens, "token")),
        ("chunks", f"{len(found.passages)} of {chunks}"),
        ("time", f"{found.seconds:.2f} s"),
    ]
    rows += [("sub-question", f"{step.question} {step.answer}") for step in found.steps]
    for one in sorted(found.passages, key=lambda one: (one.round, -one.score))[:10]:
        where = f"{one.document}, " if isinstance(one.document, str) else ""
        rows.append((f"score {one.score:.2f}", f"{where}characters {one.start} to {one.stop}: {' '.join(one.text.split())[:80]}"))
    return common.pairs_table("", rows)
