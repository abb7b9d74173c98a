"""What the commands of `longreach eval` share: their options, what those ask for, and what is said and kept of how a run was made.

Knows options, the registry of tasks, and what an extension reports; no tables.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longreach.cli import text as texts
from longreach.cli.common import Output, tokens

if TYPE_CHECKING:
    from longreach.evals.samples.base import Settings, Task
    from longreach.hf.extension import Extension

Cut = Literal["middle", "left", "right", "right-words", "middle-reencode", "suffix-with-head"]
Names = Annotated[list[str], typer.Argument(metavar="TASK...", help="Tasks, or benchmarks for all their tasks; see `longreach eval list`.")]
Lengths = Annotated[str | None, typer.Option("--lengths", help="Tokens of prompt and answer, such as 512,1k,2k. If not given: 1, 2 and 4 trained windows.")]
Depths = Annotated[str, typer.Option("--depths", help="Where facts lie: 0,0.5,1 or from:to:step, such as 0:1:0.1; above 1 they are percents.")]
Samples = Annotated[int, typer.Option("--samples", min=0, help="Samples for every length (and depth); of a benchmark's data 0 stands for all.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the samples.")]
Text = Annotated[str | None, typer.Option("--text", help="Text to hide facts in: a file (.xz and .gz too) or @book. A task's own filler if not given.")]
Data = Annotated[str | None, typer.Option("--data", help="File or folder of a benchmark's official data.")]
Options = Annotated[list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="An option of a task, such as style=yarn. May be repeated.")]
Truncate = Annotated[Cut | None, typer.Option("--truncate", help="What to leave out of too long prompts, and count. Without it, too long is an error.")]
Chat = Annotated[Literal["auto", "off"], typer.Option("--chat", help="off: never use the model's chat template; auto: where the task says so.")]
ChunkSize = Annotated[int, typer.Option("--chunk-size", parser=tokens, metavar="TOKENS", help="Prompt tokens of one forward.")]

BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Samples read together; 1: one by one. If not given: as many as fit, up to 16.")]


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
    out: Output, names: list[str], lengths: str | None, depths: str, samples: int, seed: int,
    text: str | None, data: str | None, options: list[str] | None, encoding: str | None = None,
) -> Wanted:  # fmt: skip
    """Whatever is wrong with the options is said here, before a model is loaded."""
    from longreach.evals.samples.base import Settings

    tasks = find_tasks(names)
    chosen = parse_options(options or [], tasks)
    listed = None if lengths is None else parse_lengths(lengths)
    if samples == 0 and (made := [task.name for task in tasks if not task.needs_data]):
        raise ValueError(f"--samples 0 means all rows of official data, and {', '.join(made)} makes its samples; pass --samples 5 or more")
    if data is not None and not any(task.needs_data for task in tasks):
        raise ValueError(f"--data is for benchmarks with official data, and {', '.join(task.name for task in tasks)} makes its samples; leave it out")
    passage = None if text is None else texts.read(text, texts.LARGEST_FILE, out.note, encoding)
    return Wanted(tasks, Settings(depths=parse_depths(depths), samples=samples, seed=seed, text=passage, data=data), listed, chosen)


def window_of(model: Any, given: int | None) -> int:
    """In tokens: as given, or as the configuration of the model states it."""
    from longreach import configs
    from longreach.hf.checks import find_base

    return configs.trained_window(find_base(model).config, given).tokens


def announce(out: Output, extension: Extension) -> dict[str, Any]:
    """Say which method runs, and what it warns of -> what the extension reports."""
    facts = extension.report()
    out.note(f"method: {extension.method} ({facts['reason']})")
    if facts["warning"]:
        out.warn(facts["warning"])
    return facts


def made_with(device: Any, facts: Mapping[str, Any], started: str, ended: str | None) -> dict[str, Any]:
    """What a run keeps of how it was made."""
    from longreach.evals.harness import environment

    return {
        "environment": environment.describe(device), "extension": facts, "command": ["longreach", *sys.argv[1:]], "started": started, "ended": ended,
    }  # fmt: skip


def take_method_options(context: typer.Context, words: list[str]) -> list[str]:
    """-> the names of tasks among the words. A list of names swallows options that Typer does not know, those of a method: they go to where
    `method_of` looks for them, each with the word that follows it, unless that is a task."""
    from longreach.evals import tasks as registry

    known = registry.tasks()
    tasks = {*known, *(task.group for task in known.values() if task.group)}
    names: list[str] = []
    waiting = False  # for the value of an option
    for word in words:
        if word.startswith("--"):
            context.args.append(word)
            waiting = "=" not in word
        elif waiting and word not in tasks:
            context.args.append(word)
            waiting = False
        else:
            names.append(word)
            waiting = False
    if not names:
        raise ValueError(f"name a task, or a benchmark for all of its tasks: {', '.join(sorted(tasks))}")
    return names


def find_tasks(names: list[str]) -> list[Task]:
    """Tasks by their names, or all of a benchmark by its name; each once."""
    from longreach.evals import tasks as registry

    known = registry.tasks()
    found: dict[str, Task] = {}
    for name in names:
        members = [task for task in known.values() if name and task.group == name] or [registry.task(name)]
        found |= {task.name: task for task in members}
    return list(found.values())


def parse_options(given: list[str], tasks: list[Task]) -> dict[str, dict[str, Any]]:
    """NAME=VALUE for every task that knows the name; numbers, true and false are read as such."""
    found: dict[str, dict[str, Any]] = {task.name: {} for task in tasks}
    for option in given:
        name, value = read_pair("--option", option)
        owners = [task for task in tasks if name in task.options]
        if not owners:
            known = sorted({known for task in tasks for known in task.options})
            raise ValueError(f"--option {option!r} has a name that the tasks do not know; they know {', '.join(known) or 'none'}")
        for task in owners:
            found[task.name][name] = value
    return found


def read_pair(option: str, given: str) -> tuple[str, Any]:
    """NAME=VALUE: numbers, true, false and lists as JSON has them; anything else is a word."""
    name, equals, value = given.partition("=")
    if not (name and equals):
        raise ValueError(f"{option} must be NAME=VALUE, not {given!r}; repeat the option for several")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse_lengths(listed: str) -> tuple[int, ...]:
    """ "512,1k,2k" -> (512, 1024, 2048)."""
    try:
        return tuple(sorted({tokens(part) for part in listed.split(",")}))
    except typer.BadParameter:
        raise ValueError(f"--lengths must be numbers of tokens with commas between them, such as 512,1k,2k, not {listed!r}") from None


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
