"""`longreach eval lm-eval`: tasks of lm-evaluation-harness on a model under a method.

Knows options, tables and the file of results; the work is done in `longreach.evals.lm_eval.harness`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from longreach.cli import common, profiles, targets
from longreach.cli.eval_options import ChunkSize, announce, made_with, read_pair, window_of
from longreach.evals.harness.environment import now
from longreach.quantities import CHUNK_SIZE, counted

if TYPE_CHECKING:
    from rich.console import Console

    from longreach.hf.extension import Extension
    from longreach.methods.base import Method

Pairs = list[str] | None
KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "config", "configs")  # of what lm-eval returns


def command(
    context: typer.Context,
    tasks: Annotated[str, typer.Option("--tasks", metavar="NAME,...", help="lm-eval's tasks and groups, mmlu_* for several; see `lm-eval ls tasks`.")],
    model: common.Model = "nano",
    declared: common.Context = None,
    method: common.MethodName = None,
    limit: Annotated[float | None, typer.Option("--limit", help="Documents of each task; below 1, a share of them. All if not given.")] = None,
    few_shots: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, metavar="N", help="Worked examples in a prompt; the task's own number if not given.")
    ] = None,
    overflow: Annotated[
        Literal["refuse", "middle", "left"],
        typer.Option("--overflow", metavar="HOW", help="Requests too long for the context: refuse them, or leave tokens out (middle, left)."),
    ] = "refuse",
    chat: Annotated[bool, typer.Option("--apply-chat-template", help="Use the model's chat template, for all tasks.")] = False,
    generation: Annotated[Pairs, typer.Option("--gen-kwargs", metavar="NAME=VALUE", help="For answers, such as max_gen_toks=64. May be repeated.")] = None,
    metadata: Annotated[Pairs, typer.Option("--metadata", metavar="NAME=VALUE", help="For tasks, such as max_seq_lengths=[4096]. May be repeated.")] = None,
    include: Annotated[Path | None, typer.Option("--include-path", help="Folder with task files (YAML) of your own.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of whatever lm-eval draws, such as the worked examples.")] = 0,
    unsafe: Annotated[bool, typer.Option("--confirm-run-unsafe-code", help="Allow tasks that run code which the model wrote.")] = False,
    out_file: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for the results and what they were made with.")] = None,
    chunk_size: ChunkSize = CHUNK_SIZE,
    dtype: common.Dtype = None,
    device: common.Device = None,
    trained_window: common.TrainedWindow = None,
    profile: common.ProfileFile = None,
    no_profile: common.NoProfile = False,
    force: common.Force = False,
    as_json: common.Json = False,
    quiet: common.Quiet = False,
    verbose: common.Verbose = False,
) -> None:
    """Run tasks of lm-evaluation-harness, such as mmlu, to see that a method does no harm. Needs lm_eval: pip install 'longreach\\[eval]'.

    Parameters of a method (--group-size, --window, --n-local, ...) are options too: see `longreach methods`. Without a method, the dial chooses
    for --context; without both, for the trained window.
    """
    started = now()
    with common.output(as_json, verbose, quiet) as out:
        from longreach.evals.lm_eval import harness
        from longreach.planning import dial

        chosen = common.method_of(context, method)
        by_profile = profiles.asked(profile, no_profile, chosen, model=model)
        names = parse_names(tasks)
        documents = parse_limit(limit)
        answers = dict(read_pair("--gen-kwargs", pair) for pair in generation or [])
        given = dict(read_pair("--metadata", pair) for pair in metadata or [])
        if out_file is not None:
            targets.check(out, out_file, targets.RESULT, force)
        if include is not None and not include.is_dir():
            raise ValueError(f"there is no folder {str(include)!r}; --include-path takes the folder of the task files")
        harness.require()
        harness.refuse_broken(names)
        with common.quiet_transformers(verbose):
            loaded, tokenizer = common.load_model(out, model, dtype, device)
            with attached(out, loaded, chosen, declared, trained_window, by_profile) as extension, out.bars():
                facts = announce(out, extension)
                if warning := dial.declare(extension.method, extension.window.tokens, declared)[1]:
                    out.warn(warning)
                found = harness.evaluate(
                    loaded, tokenizer, names, extension=extension, max_length=declared if extension.context is None else None,
                    overflow=overflow, chunk_size=chunk_size, num_fewshot=few_shots, limit=documents, apply_chat_template=chat,
                    gen_kwargs=answers or None, include_path=None if include is None else str(include), metadata=given or None,
                    seed=seed, confirm_run_unsafe_code=unsafe,
                )  # fmt: skip
        rows, report = harness.scores(found), found["longreach"]
        if report["shortened_requests"]:
            out.warn(
                f"{report['shortened_requests']} of {counted(report['requests'], 'request')} were longer than {report['max_length']} tokens and lost "
                f"{report['tokens_left_out']} of their tokens; their scores are not those of the whole prompts"
            )
        result = {"model": model, "context": extension.context, **report, "limit": documents, "seed": seed, "out": out_file and str(out_file), "scores": rows}
        if out_file is not None:
            write(out_file, found, {**result, **made_with(loaded.device, facts, started, now())})
        out.finish(result, lambda console: show(console, rows))


@contextmanager
def attached(
    out: common.Output, model: Any, method: Method | None, declared: int | None, trained_window: int | None, by_profile: profiles.Asked
) -> Iterator[Extension]:
    """The model under the method, or under what the dial chooses. Stock may go beyond its window, for comparison."""
    from longreach.hf.extension import extend
    from longreach.planning import dial

    window = window_of(model, trained_window)
    context, _ = dial.declare(method, window, window if declared is None and method is None else declared)
    profile = profiles.find(out, by_profile, model, method, context, trained_window)
    with extend(model, method, context=context, trained_window=trained_window, profile=profile) as extension:
        yield extension


def parse_names(listed: str) -> list[str]:
    names = [name.strip() for name in listed.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks needs names with commas between them, such as mmlu,gsm8k; `lm-eval ls tasks` lists them")
    return list(dict.fromkeys(names))


def parse_limit(limit: float | None) -> int | float | None:
    """A number of documents, or a share of them below 1."""
    if limit is None or 0 < limit < 1:
        return limit
    if not (1 <= limit < math.inf) or limit != int(limit):
        raise ValueError(f"--limit must be a number of documents, such as 50, or a share of them, such as 0.1, not {limit:g}")
    return int(limit)


def write(path: Path, found: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """lm-eval's results in its own shape, with "longreach": the model, the method and what else they were made with."""
    from longreach.evals.harness.results import write_json

    whole = {**{name: found[name] for name in KEPT if name in found}, "longreach": result}
    write_json(path, json.loads(json.dumps(plain(whole), default=str)))  # configurations of tasks may hold functions, which are named


def plain(value: Any) -> Any:
    """Without the numbers that JSON does not have; lm-eval has NaN where a spread is not defined."""
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    table = common.plain_table("task", "metric", "filter", "value", "standard error", "n")
    for row in rows:
        numbers = ("" if row[name] is None else f"{row[name]:.4g}" for name in ("value", "stderr"))
        table.add_row(row["task"], row["metric"], row["filter"], *numbers, "" if row["n"] is None else str(row["n"]))
    console.print(table)
    console.print("Short tasks show that a method does no harm, not what it reaches; run `longreach eval run passkey` too.")
