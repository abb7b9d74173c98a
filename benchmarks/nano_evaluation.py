"""nano's own page of the evaluation harness: `longreach eval` on offline tasks, every method, 1 to 16 trained windows.

    python benchmarks/nano_evaluation.py                        # results/nano-evaluation/<method>, docs/nano-evaluation and its report.html
    python benchmarks/nano_evaluation.py --methods yarn pi &    # several processes share the work; the last command writes the page
    python benchmarks/nano_evaluation.py

Only calls the command line, as a user would; a run that was cut goes on. Every method has the parameters that `longreach.auto.recommended` gives it for the
longest text and keeps them at all lengths. Two runs more ask for every offline task once: what nano can do in its window, and with SelfExtend in a longer one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import ROOT

from longreach import auto
from longreach.cli import main as longreach
from longreach.evals.base import tasks
from longreach.methods import registry

WINDOW = auto.Window(512, "nano")
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
    return ["--method", *auto.recommended(kind, WINDOW, context).options(), *(["--context", context] if kind.needs_context else [])]


def measurable() -> list[str]:
    """The methods that have a setting for the longest text; LongRoPE without searched lists and a combination have none."""
    found = []
    for name, kind in registry().items():
        try:
            auto.recommended(kind, WINDOW, LENGTHS[-1])
        except ValueError as error:
            print(f"{name} is left out: {error}")
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
    from longreach.evals.base import Settings

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
    folders = [path for kind in ("", "-ppl") for name in measurable() if (path := args.out / f"{name}{kind}").exists()]
    call("eval", "report", *folders, "--html", args.page / "report.html", "--figures", args.page / "figures", "--markdown", args.page / "results.md")
    inside = everything(args.out)
    call("eval", "report", *inside, "--html", args.page / "all-tasks.html", "--figures", args.page / "all-tasks", "--markdown", args.page / "all-tasks.md")
    sizes = {str(path.relative_to(args.page)): path.stat().st_size for path in sorted(args.page.rglob("*")) if path.is_file()}
    print(json.dumps(sizes, indent=1))


if __name__ == "__main__":
    main()
