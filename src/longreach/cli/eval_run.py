"""`longreach eval run` and `longreach eval estimate`: tasks on a model under a method, into a folder.

Knows options and what is said while it runs; the work is done in `longreach.evals`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longreach.cli import text as texts
from longreach.cli.common import (
    Context,
    Device,
    Dtype,
    Json,
    MethodName,
    Model,
    Output,
    TrainedWindow,
    Verbose,
    load_model,
    method_of,
    output,
    quiet_transformers,
)

if TYPE_CHECKING:
    from rich.console import Console

    from longreach.evals.base import Settings, Task
    from longreach.evals.budget import ChatMode
    from longreach.evals.model_engine import Span
    from longreach.evals.results import Row
    from longreach.evals.runner import Item, Outcome, Progress, Step
    from longreach.methods.base import Method
    from longreach.seam.extend import Extension

FAILED = 1
NOTE_EVERY = 20.0  # seconds between lines where there is no terminal

Cut = Literal["middle", "left", "right", "right-words", "middle-reencode", "suffix-with-head"]
Names = Annotated[list[str], typer.Argument(metavar="TASK...", help="Tasks, or benchmarks for all their tasks; see `longreach eval list`.")]
Lengths = Annotated[str | None, typer.Option("--lengths", help="Tokens of prompt and answer, such as 512,1k,2k. If not given: 1, 2 and 4 trained windows.")]
Depths = Annotated[str, typer.Option("--depths", help="Where facts lie: 0,0.5,1 or from:to:step, such as 0:1:0.1; above 1 they are percents.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Samples for every length (and depth).")]
Seed = Annotated[int, typer.Option("--seed", help="Of the samples.")]
Text = Annotated[str | None, typer.Option("--text", help="Text to hide facts in: a UTF-8 file (.xz and .gz too) or @book. A task's own filler if not given.")]
Data = Annotated[str | None, typer.Option("--data", help="File or folder of a benchmark's official data.")]
Options = Annotated[list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="An option of a task, such as style=yarn. May be repeated.")]
Truncate = Annotated[Cut | None, typer.Option("--truncate", help="What to leave out of too long prompts, and count. Without it, too long is an error.")]
Chat = Annotated[Literal["auto", "off"], typer.Option("--chat", help="off: never use the model's chat template; auto: where the task says so.")]
ChunkSize = Annotated[int, typer.Option("--chunk-size", min=1, help="Prompt tokens of one forward.")]


def command(
    context: typer.Context,
    names: Names,
    out_folder: Annotated[Path, typer.Option("--out", "-o", help="Folder of the results. A run that was stopped goes on from what is there.")],
    model: Model = "nano",
    declared: Context = None,
    method: MethodName = None,
    lengths: Lengths = None,
    depths: Depths = "0,0.25,0.5,0.75,1",
    samples: Samples = 5,
    seed: Seed = 0,
    text: Text = None,
    data: Data = None,
    options: Options = None,
    truncate: Truncate = None,
    chat: Chat = "auto",
    shard: Annotated[str, typer.Option("--shard", help="i/n: run only every n-th sample, from the i-th (counted from 0); all shards share a folder.")] = "0/1",
    save_prompts: Annotated[bool, typer.Option("--save-prompts", help="Keep the prompts in the results, not only their hashes.")] = False,
    chunk_size: ChunkSize = 512,
    dtype: Dtype = None,
    device: Device = None,
    trained_window: TrainedWindow = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run tasks and write run.json, samples.jsonl and metrics.json. Exits with 1 if a sample failed.

    Parameters of a method (--group-size, --window, --n-local, ...) are options too: see `longreach methods`.
    """
    started = now()
    with output(as_json, verbose) as out:
        chosen = method_of(context, method)
        part = parse_shard(shard)
        asked = wanted(out, names, lengths, depths, samples, seed, text, data, options)
        with quiet_transformers(verbose):
            loaded, tokenizer = load_model(out, model, dtype, device)
            job = prepare(loaded, tokenizer, asked, chosen, declared, truncate, chat, trained_window)
            from longreach.evals import environment, runner
            from longreach.evals.model_engine import attached
            from longreach.evals.results import Folder

            with attached(job.model, job.tokenizer, chosen, job.span.context, trained_window=trained_window, chunk_size=chunk_size) as engine:
                assert engine.extension is not None
                announce(out, job, engine.extension)
                config = configuration(model, job, engine.extension, truncate, chat, chunk_size)
                tasks = runner.describe(job.work, config)
                folder = Folder(out_folder, part)
                folder.start({
                    "config": config, "tasks": tasks, "samples": len(job.items), "environment": environment.describe(job.model.device),
                    "extension": engine.extension.report(), "command": ["longreach", *sys.argv[1:]], "started": started, "ended": None,
                })  # fmt: skip
                with progress_of(out) as progress:
                    outcome = runner.run(
                        job.items,
                        engine,
                        job.tokenizer,
                        folder,
                        {name: facts["config_hash"] for name, facts in tasks.items()},
                        limit=job.span.limit,
                        truncate=truncate,
                        chat=chat,
                        shard=part,
                        save_prompts=save_prompts,
                        progress=progress,
                    )
        rows = folder.finish(now())
        summary(out, outcome, folder.file)
        result = {
            "out": str(out_folder), "method": config["method"], "context": config["context"], **dataclasses.asdict(outcome),
            "metrics": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip
        out.finish(result, lambda console: show(console, rows, {name: facts["metric"] for name, facts in tasks.items()}))
        if outcome.failed:
            raise typer.Exit(FAILED)


def estimate(
    context: typer.Context,
    names: Names,
    model: Model = "nano",
    declared: Context = None,
    method: MethodName = None,
    lengths: Lengths = None,
    depths: Depths = "0,0.25,0.5,0.75,1",
    samples: Samples = 5,
    seed: Seed = 0,
    text: Text = None,
    data: Data = None,
    options: Options = None,
    chat: Chat = "auto",
    chunk_size: ChunkSize = 512,
    dtype: Dtype = None,
    device: Device = None,
    trained_window: TrainedWindow = None,
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Time two short prompts to say how long it will take.")] = True,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """How many samples and tokens a run has, and how long it will take, before it starts. Takes the options of `eval run`."""
    with output(as_json, verbose) as out:
        chosen = method_of(context, method)
        asked = wanted(out, names, lengths, depths, samples, seed, text, data, options)
        with quiet_transformers(verbose):
            loaded, tokenizer = load_model(out, model, dtype, device)
            job = prepare(loaded, tokenizer, asked, chosen, declared, None, chat, trained_window)
            from longreach.evals import runner
            from longreach.evals.model_engine import attached

            if measure:
                with attached(job.model, job.tokenizer, chosen, job.span.context, trained_window=trained_window, chunk_size=chunk_size) as engine:
                    speed = runner.measure(job.items, engine, job.tokenizer, chat)
            else:
                speed = None
        every = runner.estimate(job.items, speed)
        parts = [{"task": task, "length": length, **dataclasses.asdict(runner.estimate(items, speed))} for task, length, items in runner.by_length(job.items)]
        result = {**dataclasses.asdict(every), "context": job.span.context, "parts": parts}
        out.finish(result, lambda console: show_estimate(console, result))


@dataclass(frozen=True)
class Wanted:
    """What the options ask for; `lengths` None leaves them to the trained window of the model."""

    tasks: list[Task]
    settings: Settings
    lengths: tuple[int, ...] | None
    options: Mapping[str, dict[str, Any]]

    def work(self, window: int) -> dict[Task, Settings]:
        """The settings of every task. Data have lengths of their own, unless some are asked for."""
        default = (window, 2 * window, 4 * window)
        return {
            task: dataclasses.replace(
                self.settings,
                lengths=self.lengths if self.lengths is not None else () if task.needs_data else default,
                options=self.options[task.name],
            )
            for task in self.tasks
        }


def wanted(
    out: Output,
    names: list[str],
    lengths: str | None,
    depths: str,
    samples: int,
    seed: int,
    text: str | None,
    data: str | None,
    options: list[str] | None,
) -> Wanted:
    """Whatever is wrong with the options is said here, before a model is loaded."""
    from longreach.evals.base import Settings

    tasks = find_tasks(names)
    chosen = parse_options(options or [], tasks)
    listed = None if lengths is None else parse_lengths(lengths)
    passage = None if text is None else texts.read(text, texts.LARGEST_FILE, out.note)
    return Wanted(tasks, Settings(depths=parse_depths(depths), samples=samples, seed=seed, text=passage, data=data), listed, chosen)


@dataclass(frozen=True)
class Job:
    """A model, what is to be run on it, and how long its prompts may be."""

    model: Any
    tokenizer: Any
    work: Mapping[Task, Settings]
    items: list[Item]
    span: Span


def prepare(
    model: Any, tokenizer: Any, wanted: Wanted, method: Method | None, declared: int | None, truncate: str | None, chat: ChatMode, trained_window: int | None
) -> Job:
    """Make the samples, and see how long they are."""
    from longreach import auto
    from longreach.evals import runner
    from longreach.evals.model_engine import span
    from longreach.seam.extend import find_base

    window = auto.trained_window(find_base(model).config).tokens if trained_window is None else trained_window
    work = wanted.work(window)
    items = runner.plan(work, tokenizer, chat)
    found = span(method, window, declared, max(item.needs for item in items))
    if truncate is None and (sentence := runner.overflowing(items, found.limit)):
        raise ValueError(sentence)
    if truncate is not None and found.limit is None:
        raise ValueError("--truncate needs to know for what length; pass --context N too")
    return Job(model, tokenizer, work, items, found)


def find_tasks(names: list[str]) -> list[Task]:
    """Tasks by their names, or all of a benchmark by its name; each once."""
    from longreach.evals import base

    known = base.tasks()
    found: dict[str, Task] = {}
    for name in names:
        members = [task for task in known.values() if task.group == name] or [base.task(name)]
        found |= {task.name: task for task in members}
    return list(found.values())


def parse_options(given: list[str], tasks: list[Task]) -> dict[str, dict[str, Any]]:
    """NAME=VALUE for every task that knows the name; numbers, true and false are read as such."""
    found: dict[str, dict[str, Any]] = {task.name: {} for task in tasks}
    for option in given:
        name, equals, value = option.partition("=")
        owners = [task for task in tasks if name in task.options]
        if not equals or not owners:
            known = sorted({known for task in tasks for known in task.options})
            raise ValueError(f"--option {option!r} is not NAME=VALUE with a name that the tasks know; they know {', '.join(known) or 'none'}")
        for task in owners:
            found[task.name][name] = _value(value)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_lengths(listed: str) -> tuple[int, ...]:
    """ "512,1k,2k" -> (512, 1024, 2048)."""
    found = []
    for part in listed.split(","):
        number, thousands = part.strip().lower(), 1
        if number.endswith("k"):
            number, thousands = number[:-1], 1024
        try:
            length = int(float(number) * thousands)
        except (ValueError, OverflowError):
            length = 0
        if length < 1:
            raise ValueError(f"--lengths must be numbers of tokens with commas between them, such as 512,1k,2k, not {listed!r}")
        found.append(length)
    return tuple(sorted(set(found)))


def parse_depths(listed: str) -> tuple[float, ...]:
    """ "0,0.5,1", "0:1:0.1" or "0:100:10" -> shares of the document."""
    sentence = f"--depths must be 0,0.5,1 or from:to:step, such as 0:1:0.1 or 0:100:10, not {listed!r}"
    try:
        if ":" in listed:
            first, last, step = (float(part) for part in listed.split(":"))
            if step <= 0 or (last - first) / step > 1000:
                raise ValueError
            found = [first + n * step for n in range(int((last - first) / step + 1e-9) + 1)]
        else:
            found = [float(part) for part in listed.split(",")]
    except ValueError:
        raise ValueError(sentence) from None
    if not found or not all(0 <= depth <= 100 for depth in found):
        raise ValueError(sentence)
    percent = max(found) > 1
    return tuple(sorted({round(depth / 100 if percent else depth, 6) for depth in found}))


def parse_shard(text: str) -> tuple[int, int]:
    index, _, world = text.partition("/")
    if not (index.isdigit() and world.isdigit() and int(index) < int(world)):
        raise ValueError(f"--shard must be i/n with i from 0 to n - 1, such as 0/2, not {text!r}")
    return int(index), int(world)


def configuration(model: str, job: Job, extension: Extension, truncate: str | None, chat: str, chunk_size: int) -> dict[str, Any]:
    """What decides an answer, beside the task."""
    return {
        "model": model,
        "revision": getattr(job.model.config, "_commit_hash", None),
        "method": extension.method.to_json(),
        "method_text": extension.method.brief(),
        "context": extension.context,
        "trained_window": extension.window.tokens,
        "dtype": str(job.model.dtype).removeprefix("torch."),
        "device": job.model.device.type,
        "truncate": truncate,
        "limit": job.span.limit,
        "chat": chat,
        "chunk_size": chunk_size,
    }


def announce(out: Output, job: Job, extension: Extension) -> None:
    facts = extension.report()
    out.note(f"method: {extension.method} ({facts['reason']})")
    if facts["warning"]:
        out.warn(facts["warning"])
    beyond = extension.context is None and extension.capacity is not None and job.span.context > extension.capacity
    if beyond:
        out.warn(f"up to {job.span.context} tokens, beyond the capacity of {extension.capacity}: distances that were never trained, for comparison only")
    tokens = sum(item.tokens for item in job.items)
    out.note(f"{len(job.items)} samples, {tokens} tokens of prompts, the longest sequence {max(item.needs for item in job.items)}")


@contextmanager
def progress_of(out: Output) -> Iterator[Progress]:
    """A bar with the time left, on standard error; a line now and then where there is no terminal."""
    if not out.errors.is_terminal:
        last = [time.monotonic()]

        def line(step: Step) -> None:
            if time.monotonic() - last[0] >= NOTE_EVERY:
                last[0] = time.monotonic()
                left = "" if step.seconds_left is None else f", about {duration(step.seconds_left)} left"
                out.note(f"{step.done} of {step.total} samples{left}" + (f", {step.errors} failed" if step.errors else ""))

        yield line
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = BarColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}")
    with Progress(*columns, console=out.errors, transient=True, redirect_stdout=False) as bar:
        shown = bar.add_task("starting", total=None)

        def update(step: Step) -> None:
            left = "" if step.seconds_left is None else f"{duration(step.seconds_left)} left, "
            bar.update(shown, completed=step.done, total=step.total, description=f"{left}{step.what}" + (f", {step.errors} failed" if step.errors else ""))

        yield update


def summary(out: Output, outcome: Outcome, file: Path) -> None:
    out.note(f"{outcome.answered} samples answered, {outcome.known} known before, {outcome.failed} failed")
    if outcome.truncated:
        out.warn(f"{outcome.truncated} prompts were cut; their lengths are in {file} as truncated_tokens")
    if outcome.failed:
        out.warn(f"{outcome.failed} samples failed; {file} says why, and the same command tries them again")


def show(console: Console, rows: list[Row], metrics: dict[str, str]) -> None:
    from longreach.cli.eval import plain_table

    chosen = [row for row in rows if row.depth is None and row.value is not None and metrics.get(row.task, row.metric) == row.metric]
    table = plain_table("task", "metric", "length", "score (%)", "95 % interval", "n", "failed", "cut")
    for row in chosen:
        length = "all" if row.length is None else str(row.length)
        troubles = (str(count or "") for count in (row.n_errors, row.n_truncated))
        table.add_row(row.task, row.metric, length, f"{row.value:.1f}", f"{row.ci_low:.1f} to {row.ci_high:.1f}", str(row.n), *troubles)
    console.print(table)


def show_estimate(console: Console, result: dict[str, Any]) -> None:
    from longreach.cli.eval import plain_table

    table = plain_table("task", "length", "samples", "prompt tokens", "longest", "time at most")
    for part in [*result["parts"], {**result, "task": "all", "length": None}]:
        length = "" if part["length"] is None else str(part["length"])
        counts = (str(part[name]) for name in ("samples", "prompt_tokens", "longest"))
        table.add_row(part["task"], length, *counts, "" if part["seconds"] is None else duration(part["seconds"]))
    console.print(table)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
