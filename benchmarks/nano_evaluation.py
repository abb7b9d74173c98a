"""nano's own page of the evaluation harness: `longreach eval` on offline tasks, every method, 1 to 16 trained windows.

    python benchmarks/nano_evaluation.py                        # results/nano-evaluation/<method>, and the tables and report.html of docs/nano-evaluation
    python benchmarks/nano_evaluation.py --methods yarn pi &    # several processes share the work; the last command writes the page
    python benchmarks/nano_evaluation.py

Only calls the command line, as a user would; a run that was cut goes on. Every method has the parameters that
`longreach.planning.dial.recommended` gives it for the longest text and keeps them at all lengths. Two runs more ask for every offline task
once: what nano can do in its window, and with SelfExtend in a longer one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import ROOT, markdown, write_section

from longreach import configs
from longreach.cli import main as longreach
from longreach.evals.tasks import tasks
from longreach.methods import registry
from longreach.planning import dial

WINDOW = configs.Window(512, "nano")
LENGTHS = (512, 1024, 2048, 4096, 8192)
BY_DEPTH = ("passkey", "niah", "infinitebench-number-string", "infinitebench-kv-retrieval")
OTHERS = ("ruler-niah-multikey-1", "ruler-niah-multivalue", "ruler-vt")
IN_WHOLE = ("stock", "selfextend", "lm-infinite", "streaming-llm", "rerope", "dual-chunk", "yarn")  # the rest: the first two tasks, and perplexity
DEPTHS = "0,0.5,1"


def call(*words: object) -> None:
    arguments = [str(word) for word in words]
    print("longreach", *arguments, flush=True)
    if longreach(arguments) not in (None, 0):
        raise SystemExit(f"longreach {' '.join(arguments)} failed")


def options(name: str, context: int = LENGTHS[-1]) -> list[object]:
    kind = registry()[name]
    return ["--method", *dial.recommended(kind, WINDOW, context).options(), *(["--context", context] if kind.needs_context else [])]


def measurable() -> list[str]:
    """The methods that have a setting that reaches the longest text; LongRoPE without searched lists and a combination have none."""
    found = []
    for name, kind in registry().items():
        try:
            method = dial.recommended(kind, WINDOW, LENGTHS[-1])
        except ValueError as error:
            print(f"{name} is left out: {error}")
            continue
        capacity = None if kind.needs_context else method.capacity(WINDOW.tokens)
        if capacity is not None and capacity < LENGTHS[-1] and name != "stock":
            print(f"{name} is left out: it reaches {capacity} tokens")
            continue
        found.append(name)
    return ["stock", *(name for name in found if name != "stock")]


def measure(name: str, out: Path) -> None:
    lengths = ",".join(map(str, LENGTHS))
    by_depth = BY_DEPTH if name in IN_WHOLE else BY_DEPTH[:2]
    call("eval", "run", *by_depth, *options(name), "--lengths", lengths, "--depths", DEPTHS, "--samples", 2, "--out", out / name)
    if name in IN_WHOLE:
        call("eval", "run", *OTHERS, *options(name), "--lengths", lengths, "--samples", 6, "--out", out / name)
    call("eval", "ppl", *options(name), "--lengths", lengths, "--out", out / f"{name}-ppl")


def everything(out: Path) -> list[Path]:
    """Every offline task once: those that fit into the window there, all of them at four windows."""
    offline, fitting = [name for name, task in tasks().items() if not task.needs_data], []
    from longreach import load
    from longreach.evals.samples.base import Settings

    tokenizer = load("nano")[1]
    for name in offline:
        try:
            next(iter(tasks()[name].samples(tokenizer, Settings(lengths=(512,), samples=1, depths=(0.5,)))))
        except ValueError:
            continue
        fitting.append(name)
    inside, longer = out / "all-tasks-1x", out / "all-tasks-4x"
    call("eval", "run", *fitting, "--method", "stock", "--lengths", 512, "--depths", DEPTHS, "--samples", 5, "--out", inside)
    call("eval", "run", *offline, *options("selfextend", 2048), "--lengths", 2048, "--depths", "0,0.5,1", "--samples", 4, "--out", longer)
    return [inside, longer]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics that are not of one depth: only the main metric of a task, and of perplexity the loss."""
    run, rows = json.loads((folder / "run.json").read_text()), json.loads((folder / "metrics.json").read_text())
    wanted = {name: facts["metric"] for name, facts in run["tasks"].items()} | {"truncated": "nll"}
    return [row for row in rows if row["depth"] is None and row["value"] is not None and row["metric"] == wanted.get(row["task"])]


def tables(out: Path) -> str:
    """A table for each task: methods by lengths."""
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for name in measurable():
        for folder in (path for kind in ("", "-ppl") if (path := out / f"{name}{kind}").exists()):
            for row in rows_of(folder):
                if row["length"] is not None:
                    found.setdefault(row["task"], {}).setdefault(name, {})[row["length"]] = row
    parts = []
    for task in (*BY_DEPTH, *OTHERS, "truncated"):
        lines, loss = found.get(task, {}), task == "truncated"
        form = "{:.2f}" if loss else "{:.0f}"
        body = [[name, *(form.format(cells[n]["value"]) if n in cells else "" for n in LENGTHS)] for name, cells in lines.items()]
        samples = sorted({row["n"] for cells in lines.values() for row in cells.values()})
        title = "Loss, nats per token, over the whole of a text of this length" if loss else f"{task}, % of {' or '.join(map(str, samples))} samples"
        parts.append(f"### {title}\n\n{markdown(['method', *(f'{n} ({n // WINDOW.tokens}x)' for n in LENGTHS)], body)}")
    return "\n\n".join(parts)


def all_tasks(out: Path) -> str:
    """Every offline task: in the window with plain attention, and at four windows with SelfExtend."""
    inside, longer = ({row["task"]: row for row in rows_of(out / f"all-tasks-{n}x") if row["length"] is None} for n in (1, 4))

    def cell(row: dict[str, Any] | None) -> str:
        return "its shortest prompt is longer" if row is None else f"{row['value']:.0f} % of {row['n']}"

    body = [[name, cell(inside.get(name)), cell(longer.get(name))] for name in sorted(longer)]
    return markdown(["task", "512 tokens, plain attention", "2048 tokens, SelfExtend"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(registry()), metavar="NAME", help="measure these only, and write no page")
    parser.add_argument("--all-tasks", action="store_true", help="run every offline task only, and write no page")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/nano-evaluation")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/nano-evaluation")
    args = parser.parse_args()
    if args.all_tasks:
        everything(args.out)
        return
    for name in args.methods or measurable():
        measure(name, args.out)
    if args.methods:
        return
    args.page.mkdir(parents=True, exist_ok=True)
    write_section(args.page / "README.md", "results", tables(args.out))
    folders = [path for kind in ("", "-ppl") for name in measurable() if (path := args.out / f"{name}{kind}").exists()]
    call("eval", "report", *folders, "--html", args.page / "report.html", "--figures", args.page / "figures")
    everything(args.out)
    write_section(args.page / "README.md", "all-tasks", all_tasks(args.out))
    sizes = {str(path.relative_to(args.page)): path.stat().st_size for path in sorted(args.page.rglob("*")) if path.is_file()}
    print(json.dumps(sizes, indent=1))


if __name__ == "__main__":
    main()
