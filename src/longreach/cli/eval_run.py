"""`longreach eval run` and `longreach eval estimate`: tasks on a model under a method, into a folder.

Knows options and what is said while it runs; the work is done in `longreach.evals`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from longreach.cli import common, eval_options, profiles, strategies
from longreach.cli.common import Output
from longreach.cli.console import Pace, duration
from longreach.evals.harness.environment import now
from longreach.quantities import CHUNK_SIZE, counted

if TYPE_CHECKING:
    from rich.console import Console

    from longreach.evals.harness.engine import Engine
    from longreach.evals.harness.estimates import Step
    from longreach.evals.harness.items import Item
    from longreach.evals.harness.model_engine import ModelEngine, Span
    from longreach.evals.harness.results import Row
    from longreach.evals.harness.runner import Outcome, Progress
    from longreach.evals.samples.base import Settings, Task
    from longreach.evals.samples.budget import ChatMode
    from longreach.hf.extension import Extension
    from longreach.hf.interfaces import Tokenizer
    from longreach.methods.base import Method

FAILED = 1


def command(
    context: typer.Context,
    names: eval_options.Names,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results. A run that was stopped goes on from what is there.")],
    model: common.Model = "nano",
    declared: common.Context = None,
    method: common.MethodName = None,
    lengths: eval_options.Lengths = None,
    depths: eval_options.Depths = "0,0.25,0.5,0.75,1",
    samples: eval_options.Samples = 5,
    seed: eval_options.Seed = 0,
    text: eval_options.Text = None,
    encoding: common.Encoding = None,
    data: eval_options.Data = None,
    options: eval_options.Options = None,
    truncate: eval_options.Truncate = None,
    chat: eval_options.Chat = "auto",
    shard: Annotated[str, typer.Option("--shard", help="i/n: run only every n-th sample, from the i-th (counted from 0); all shards share a folder.")] = "0/1",
    save_prompts: Annotated[bool, typer.Option("--save-prompts", help="Keep the prompts in the results, not only their hashes.")] = False,
    chunk_size: eval_options.ChunkSize = CHUNK_SIZE,
    batch_size: eval_options.BatchSize = None,
    strategy: strategies.Strategy = None,
    chunk_tokens: strategies.ChunkTokens = None,
    memory_tokens: strategies.MemoryTokens = None,
    layer: strategies.Layer = None,
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
    """Run tasks and write run.json, samples.jsonl and metrics.json. Exits with 1 if a sample failed.

    Parameters of a method (--group-size, --window, --n-local, ...) are options too: see `longreach methods`.
    """
    started = now()
    with common.output(as_json, verbose, quiet) as out:
        from longreach.evals.harness.results import Folder

        names = eval_options.take_method_options(context, names)
        chosen = common.method_of(context, method)
        by_profile = profiles.asked(profile, no_profile, chosen, model=model)
        reading = strategies.Given(strategy, chunk_tokens, memory_tokens, layer)
        reading.check(truncate=truncate, batch_size=batch_size, chunk_size=chunk_size)
        part = eval_options.parse_shard(shard)
        folder = Folder(out_folder, part)
        folder.check()
        if before := len(folder.records()):
            out.kept = f"the {counted(before, 'sample')} in {out_folder} are as they were, and the same command goes on from there"
        asked = eval_options.wanted(out, names, lengths, depths, samples, seed, text, data, options, encoding)
        with common.quiet_transformers(verbose):
            loaded, tokenizer = common.load_model(out, model, dtype, device)
            job = prepare(loaded, tokenizer, asked, chosen, declared, truncate, chat, trained_window, any_length=strategy is not None)
            from longreach.evals.harness import runner
            from longreach.evals.harness.model_engine import attached

            found = profiles.find(out, by_profile, job.model, chosen, job.span.context, trained_window)
            with attached(
                job.model, job.tokenizer, chosen, job.span.context, trained_window=trained_window, profile=found, chunk_size=chunk_size, memory=memory
            ) as engine:
                assert engine.extension is not None
                facts = begin(out, job, engine.extension)
                config: dict[str, Any] = configuration(model, job, engine.extension, truncate, chat, chunk_size)
                answering: Engine = engine
                if strategy is None:
                    read_together(out, job, engine, batch_size)
                else:
                    answering, config["strategy"] = reading.engine(out, engine)
                tasks = runner.describe(job.work, config)
                origin = eval_options.made_with(job.model.device, facts, started, None)
                folder.start({"config": config, "tasks": tasks, "samples": len(job.items), **origin, **together(engine)})
                with progress_of(out, out_folder) as progress:
                    outcome = runner.run(
                        job.items, answering, job.tokenizer, folder, {name: facts["config_hash"] for name, facts in tasks.items()},
                        limit=job.span.limit, truncate=truncate, chat=chat, shard=part, save_prompts=save_prompts, work=engine.work, progress=progress,
                    )  # fmt: skip
        for failure in engine.failures:
            out.warn(failure)
        rows = folder.finish(now(), together(engine))
        summary(out, outcome, folder.file)
        result = {
            "out": str(out_folder), "method": config["method"], "context": config["context"], **dataclasses.asdict(outcome), **together(engine),
            "metrics": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip
        out.finish(result, lambda console: show(console, rows, {name: facts["metric"] for name, facts in tasks.items()}))
        if outcome.failed:
            raise typer.Exit(FAILED)


def estimate(
    context: typer.Context,
    names: eval_options.Names,
    model: common.Model = "nano",
    declared: common.Context = None,
    method: common.MethodName = None,
    lengths: eval_options.Lengths = None,
    depths: eval_options.Depths = "0,0.25,0.5,0.75,1",
    samples: eval_options.Samples = 5,
    seed: eval_options.Seed = 0,
    text: eval_options.Text = None,
    encoding: common.Encoding = None,
    data: eval_options.Data = None,
    options: eval_options.Options = None,
    chat: eval_options.Chat = "auto",
    chunk_size: eval_options.ChunkSize = CHUNK_SIZE,
    batch_size: eval_options.BatchSize = None,
    dtype: common.Dtype = None,
    device: common.Device = None,
    trained_window: common.TrainedWindow = None,
    profile: common.ProfileFile = None,
    no_profile: common.NoProfile = False,
    memory: common.Memory = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time short prompts to say how long it will take.")] = True,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """How many samples and tokens a run has, and how long it will take, before it starts. Takes the options of `eval run`."""
    with common.output(as_json, verbose, quiet) as out:
        names = eval_options.take_method_options(context, names)
        chosen = common.method_of(context, method)
        by_profile = profiles.asked(profile, no_profile, chosen, model=model)
        asked = eval_options.wanted(out, names, lengths, depths, samples, seed, text, data, options, encoding)
        with common.quiet_transformers(verbose):
            loaded, tokenizer = common.load_model(out, model, dtype, device)
            job = prepare(loaded, tokenizer, asked, chosen, declared, None, chat, trained_window)
            from longreach.evals.harness import estimates
            from longreach.evals.harness.items import by_length
            from longreach.evals.harness.model_engine import attached

            found = profiles.find(out, by_profile, job.model, chosen, job.span.context, trained_window)
            with attached(
                job.model, job.tokenizer, chosen, job.span.context, trained_window=trained_window, profile=found, chunk_size=chunk_size, memory=memory
            ) as engine:
                read_together(out, job, engine, batch_size)
                work = engine.work
                speed = estimates.measure(job.items, engine, job.tokenizer, work, chat, engine.several.size) if measure else None
        every = estimates.estimate(job.items, work, speed)
        groups = [(task, length, estimates.estimate(items, work, speed)) for task, length, items in by_length(job.items)]
        parts = [{"task": task, "length": length, **dataclasses.asdict(part)} for task, length, part in groups]
        result = {**dataclasses.asdict(every), "context": job.span.context, **together(engine), "parts": parts}
        out.finish(result, lambda console: show_estimate(console, result))


@dataclass(frozen=True)
class Job:
    """A model, what is to be run on it, and how long its prompts may be."""

    model: Any
    tokenizer: Tokenizer
    work: Mapping[Task, Settings]
    items: list[Item]
    span: Span


def prepare(
    model: Any, tokenizer: Tokenizer, wanted: eval_options.Wanted, method: Method | None,
    declared: int | None, truncate: str | None, chat: ChatMode, trained_window: int | None, any_length: bool = False,
) -> Job:  # fmt: skip
    """Make the samples, and see how long they are. `any_length`: they are read by a strategy, and need not fit."""
    from longreach.evals.harness import runner
    from longreach.evals.harness.model_engine import Span, span

    window = eval_options.window_of(model, trained_window)
    work = wanted.work(window)
    items = runner.plan(work, tokenizer, chat)
    if any_length:
        return Job(model, tokenizer, work, items, Span(None, declared or window))
    found = span(method, window, declared, max(item.needs for item in items))
    if truncate is None and (sentence := runner.overflowing(items, found.limit)):
        raise ValueError(sentence)
    if truncate is not None and found.limit is None:
        raise ValueError("--truncate needs to know for what length; pass --context N too")
    return Job(model, tokenizer, work, items, found)


def configuration(model: str, job: Job, extension: Extension, truncate: str | None, chat: str, chunk_size: int) -> dict[str, Any]:
    """What decides an answer, beside the task. The context does so only through the method and the frequencies that were fixed with it."""
    from longreach.evals.harness.results import digest

    rotaries = (layer.rotary for layer in extension.layers)
    return {
        "model": model,
        "revision": getattr(job.model.config, "_commit_hash", None),
        "method": extension.method.to_json(),
        "method_text": extension.method.brief(),
        "context": extension.context,
        "frequencies": digest([None if r is None else [*r.inverse_frequencies.tolist(), r.scaling] for r in rotaries]),
        "trained_window": extension.window.tokens,
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "device": job.model.device.type,
        "truncate": truncate,
        "limit": job.span.limit,
        "chat": chat,
        "chunk_size": chunk_size,
    }


def begin(out: Output, job: Job, extension: Extension) -> dict[str, Any]:
    """Say what will be run -> what the extension reports."""
    from longreach.planning import dial

    facts = eval_options.announce(out, extension)
    if warning := dial.declare(extension.method, extension.window.tokens, job.span.context)[1]:
        out.warn(warning)
    tokens = sum(item.tokens for item in job.items)
    out.note(f"{counted(len(job.items), 'sample')}, {counted(tokens, 'token')} of prompts, the longest sequence {max(item.needs for item in job.items)}")
    return facts


def read_together(out: Output, job: Job, engine: ModelEngine, asked: int | None) -> None:
    """Choose how many samples are read in one forward, and say so."""
    from longreach.evals.harness.together import several

    longest = max(item.needs for item in job.items)
    new = max(item.sample.max_new_tokens for item in job.items)
    engine.several = several(engine.extension, asked, longest if job.span.limit is None else min(longest, job.span.limit), new, engine.chunk_size)
    found = engine.several
    if found.size > 1:
        out.note(f"up to {found.size} samples are read together ({found.reason})")
    elif asked == 1:
        out.note("samples are read one by one")
    else:
        out.warn(f"samples are read one by one: {found.reason}")


def together(engine: ModelEngine) -> dict[str, Any]:
    """The same as plain data."""
    return {"together": {"batch_size": engine.several.size, "reason": engine.several.reason, "failures": [*engine.failures]}}


@contextmanager
def progress_of(out: Output, folder: Path, thing: str = "sample") -> Iterator[Progress]:
    """A bar with the time left, on standard error; a line at once and now and then where there is no terminal. `thing`: what is counted."""
    if out.quiet or not out.errors.is_terminal:
        pace = Pace(at_once=True)

        def line(step: Step) -> None:
            keep(out, step, folder, thing)
            if pace.due():
                left = "" if step.seconds_left is None else f", about {duration(step.seconds_left)} left"
                out.note(f"{step.what}{left}" + (f", {step.errors} failed" if step.errors else ""))

        yield line
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = BarColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}")
    with Progress(*columns, console=out.errors, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        shown = bar.add_task("starting", total=None)

        def update(step: Step) -> None:
            keep(out, step, folder, thing)
            left = "" if step.seconds_left is None else f"{duration(step.seconds_left)} left, "
            bar.update(shown, completed=step.done, total=step.total, description=f"{left}{step.what}" + (f", {step.errors} failed" if step.errors else ""))

        yield update


def keep(out: Output, step: Step, folder: Path, thing: str) -> None:
    """What an interrupt leaves."""
    out.kept = f"{step.done} of {counted(step.total, thing)} kept in {folder}, and the same command goes on from there"


def summary(out: Output, outcome: Outcome, file: Path) -> None:
    out.note(f"{counted(outcome.answered, 'sample')} answered, {outcome.known} known before, {outcome.failed} failed")
    if outcome.truncated:
        out.warn(f"{counted(outcome.truncated, 'prompt')} cut; {file} holds the number of tokens that each lost, as truncated_tokens")
    if outcome.failed:
        out.warn(f"{counted(outcome.failed, 'sample')} failed; {file} says why, and the same command tries again")


def show(console: Console, rows: list[Row], metrics: dict[str, str]) -> None:
    chosen = [row for row in rows if row.depth is None and row.value is not None and metrics.get(row.task, row.metric) == row.metric]
    documents = ["documents"] if any(row.documents != row.n for row in chosen) else []
    table = common.plain_table("task", "metric", "length", "score (%)", "95 % interval", "n", *documents, "failed", "cut")
    for row in chosen:
        length = "all" if row.length is None else str(row.length)
        troubles = (str(count or "") for count in (row.n_errors, row.n_truncated))
        size = (str(row.n), str(row.documents)) if documents else (str(row.n),)
        table.add_row(row.task, row.metric, length, f"{row.value:.1f}", f"{row.ci_low:.1f} to {row.ci_high:.1f}", *size, *troubles)
    console.print(table)


def show_estimate(console: Console, result: dict[str, Any]) -> None:
    table = common.plain_table("task", "length", "samples", "prompt tokens", "to read", "longest", "time at most")
    for part in [*result["parts"], {**result, "task": "all", "length": None}]:
        length = "" if part["length"] is None else str(part["length"])
        counts = (str(part[name]) for name in ("samples", "prompt_tokens", "read_tokens", "longest"))
        table.add_row(part["task"], length, *counts, "" if part["seconds"] is None else duration(part["seconds"]))
    console.print(table)
