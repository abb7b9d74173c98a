"""nano's own page of the evaluation harness: `longreach eval` on every offline task that fits its window, method by method.

    python benchmarks/nano_evaluation.py     # results/nano-evaluation/<method> and docs/nano-evaluation/report.html

Only calls the command line, as a user would; a run that was cut goes on. SelfExtend has the dial's parameters for the longest text, the others
what `longreach.auto.recommended` says for it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from common import ROOT

from longreach import auto
from longreach.cli import main as longreach
from longreach.methods import registry

WINDOW = auto.Window(512, "nano")
METHODS = ("stock", "selfextend", "lm-infinite", "streaming-llm", "rerope", "dual-chunk", "yarn")
# Tasks that fit 512 tokens of nano's tokenizer, which has a token for every digit.
TASKS = (
    "passkey", "niah", "ruler-niah-single-1", "ruler-niah-single-2", "ruler-niah-multikey-1", "ruler-vt", "infinitebench-kv-retrieval",
    "infinitebench-number-string", "needle-threading-single", "needlebench-single-retrieval",
)  # fmt: skip


def call(*words: object) -> None:
    arguments = [str(word) for word in words]
    print("longreach", *arguments, flush=True)
    if longreach(arguments) not in (None, 0):
        raise SystemExit(f"longreach {' '.join(arguments)} failed")


def chosen(name: str, context: int) -> list[str]:
    return auto.recommended(registry()[name], WINDOW, context).options()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(registry()), metavar="NAME")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--samples", type=int, default=2, help="for every length and depth")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/nano-evaluation")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/nano-evaluation")
    args = parser.parse_args()
    context, lengths, folders = max(args.lengths), ",".join(map(str, args.lengths)), []
    args.page.mkdir(parents=True, exist_ok=True)
    for name in args.methods:
        method = ["--method", *chosen(name, context), *(["--context", context] if registry()[name].needs_context else [])]
        recall, fluency = args.out / name, args.out / f"{name}-ppl"
        call("eval", "run", *args.tasks, *method, "--lengths", lengths, "--samples", args.samples, "--out", recall)
        call("eval", "ppl", *method, "--lengths", lengths, "--out", fluency)
        folders += [recall, fluency]
    call("eval", "report", *folders, "--html", args.page / "report.html", "--figures", args.page / "figures", "--markdown", args.page / "README.md")


if __name__ == "__main__":
    main()
