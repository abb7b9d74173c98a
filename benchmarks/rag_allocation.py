"""What a budget of input tokens buys: configurations of DRAG and IterDRAG on a model, the allocation model fitted on them, and its held-out predictions.

    python benchmarks/rag_allocation.py                          # nano: 69 configurations on each of three tasks; about 40 minutes on one core
    python benchmarks/rag_allocation.py --documents 1 --tasks codes-in-book --out /tmp/runs.jsonl --page ""

A task is a few documents with twelve facts each; four are asked for, and the others are for demonstrations. k chunks, m demonstrations and n generations (n - 1
rounds of IterDRAG) are taken from the grid below as far as the budget of the longest context allows. Chains of demonstrations are the model's own, where its
final answer is right, and else direct answers. Runs are kept as lines of JSON; a run that was cut goes on, and `longreach rag --runs FILE` uses the same file.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from random import Random
from typing import Any

from common import ROOT, markdown, read_text, write_section

import longreach
from longreach.apps.rag import AllocationModel, Demonstration, Rag, RagConfig, Run
from longreach.apps.rag.allocation import PAPER, Linear, found_best
from longreach.apps.rag.rag import contains
from longreach.apps.rag.records import read_runs, write_runs
from longreach.evals.samples.fitting import FILLER
from longreach.evals.tasks.niah import CITIES, NOUNS
from longreach.evals.tasks.passkeys import NAMES, WORDING
from longreach.quantities import token_count
from longreach.running.prompts import hide

GRID = [theta for theta in itertools.product((0, 1, 2, 4, 8, 16), (0, 1, 2, 4), (1, 2, 3)) if theta[0] * (theta[1] + 1) <= 48]
TASKS = ("codes-in-book", "keys-in-book", "keys-in-filler")
FACTS, ASKED, CHUNK_WORDS, NEW = 12, 4, 40, 16
Document = tuple[str, list[Demonstration]]


def document(task: str, book: str, words: int, rng: Random) -> Document:
    """A text with facts at even depths, and a question with its answer for each of them."""
    names = [f"{noun} code of {city}" for noun in NOUNS for city in CITIES] if task.startswith("codes") else list(NAMES)
    digits, statement = (7, "The {name} is {key}.") if task.startswith("codes") else (5, WORDING.statement)
    if task.endswith("filler"):
        text = " ".join([FILLER] * (words // len(FILLER.split())))
    else:
        start = book.find(". ", rng.randrange(len(book) // 2)) + 2
        text = " ".join(book[start:].split()[:words])
    asked = []
    for number, name in enumerate(rng.sample(names, FACTS), 1):
        key = str(rng.randrange(10 ** (digits - 1), 10**digits))
        text = hide(text, statement.format(name=name, key=key), number / (FACTS + 1))
        asked.append(Demonstration(f"What is the {name}?", key, lead=f"The {name} is"))
    return text, asked


class Measured:
    """A document under one extension: what is asked of it, and the model's own chains, made once for each k and number of rounds."""

    def __init__(self, model: Any, tokenizer: Any, extension: Any, given: Document, budget: int) -> None:
        self.text, asked = given
        self.asked, self.examples = asked[:ASKED], asked[ASKED:]
        self.how = model, tokenizer, self.text
        self.extension, self.budget = extension, budget
        self.chains: dict[tuple[int, int], list[Demonstration]] = {}

    def rag(self, k: int, n: int, shown: list[Demonstration]) -> Rag:
        config = RagConfig(k, CHUNK_WORDS, rounds=n - 1, budget=self.budget, max_new_tokens=NEW, instruction="")
        return Rag(*self.how, config, demonstrations=shown, extension=self.extension)

    def shown(self, k: int, m: int, n: int) -> list[Demonstration]:
        if n == 1 or not m:
            return self.examples[:m]
        if (k, n) not in self.chains:
            right = {one.question: one for one in self.rag(k, n, []).demonstrate(self.examples, contains)}
            self.chains[k, n] = sorted((right.get(one.question, one) for one in self.examples), key=lambda one: one.question not in right)
        return self.chains[k, n][:m]

    def run(self, k: int, m: int, n: int) -> list[tuple[float, int]]:
        """(score, tokens) of each question. Raises ValueError if its prompt does not fit."""
        rag = self.rag(k, n, self.shown(k, m, n))
        found = [(one, rag.ask(one.question, lead=one.lead)) for one in self.asked]
        return [(float(contains(answer.answer, one.answer)), answer.tokens) for one, answer in found]


def record(model: Any, tokenizer: Any, args: argparse.Namespace, book: str) -> list[Run]:
    runs, budget = read_runs(args.out) if args.out.exists() else [], token_count(args.context, "--context")
    done = {(run.task, run.theta) for run in runs}
    with longreach.extend(model, context=budget + 64) as extension:
        for task in args.tasks:
            rng = Random(f"{task}:1")
            measured = [Measured(model, tokenizer, extension, document(task, book, args.words, rng), budget) for _ in range(args.documents)]
            for theta in GRID:
                if (task, theta) in done:
                    continue
                started = time.perf_counter()
                try:
                    found = [pair for one in measured for pair in one.run(*theta)]
                except ValueError as refused:
                    print(f"{task} {theta} is left out: {refused}", flush=True)
                    continue
                score, tokens = sum(score for score, _ in found) / len(found), max(tokens for _, tokens in found)
                runs.append(Run(task, *theta, score, tokens, len(found), round(time.perf_counter() - started, 2), CHUNK_WORDS))
                write_runs(args.out, runs)
                print(f"{task:<16} {theta!s:<12} {100 * score:5.1f} %  up to {tokens} tokens  {runs[-1].seconds:.1f} s", flush=True)
    return runs


def fits(runs: list[Run]) -> str:
    """The paper's ablation on our runs: how well each form of the model fits, and what it says of a fourth of the configurations that it has not seen."""
    named = {"the paper's sigmoid": PAPER, "a sigmoid around the scores": None, "no link": Linear()}
    needed = {(0, 0, 1), (1, 0, 1), (0, 1, 1)}
    places = [n for n, run in enumerate(runs) if run.theta not in needed]
    Random(0).shuffle(places)
    held = {n for n in places[: len(runs) // 4]}
    body = []
    for name, link in named.items():
        for standard in (True, False):
            whole = AllocationModel.fit(runs, link, standard)
            part = AllocationModel.fit([run for n, run in enumerate(runs) if n not in held], link, standard)
            errors = [part.predict(runs[n].task, runs[n].theta) - runs[n].score for n in held]
            mean = {task: sum(run.score for run in runs if run.task == task) / sum(run.task == task for run in runs) for task in part.tasks}
            spread = sum((runs[n].score - mean[runs[n].task]) ** 2 for n in held)
            outside = 1 - sum(error**2 for error in errors) / spread if spread else float("nan")
            absolute = 100 * sum(map(abs, errors)) / len(errors)
            numbers = ", ".join(f"{value:.3f}" for value in (*whole.a, *whole.b, whole.c))
            body.append([name, "standardised" if standard else "raw", numbers, f"{whole.r2:.3f}", f"{whole.mse:.3f}", f"{outside:.3f}", f"{absolute:.1f}"])
    return markdown(["link", "i of", "a, b, c", "R²", "MSE", "R² of held-out configurations", "mean error, points"], body)


def budgets(runs: list[Run]) -> str:
    """Fitted on what fits into a budget, the model chooses for budgets that it has not seen: what its choice scored, beside the best that was found."""
    body = []
    for task in dict.fromkeys(run.task for run in runs):
        own = [run for run in runs if run.task == task]
        steps = [budget for budget in (256, 512, 1024, 2048, 4096, 8192) if min(run.tokens for run in own) < budget < 2 * max(run.tokens for run in own)]
        for seen, budget in itertools.pairwise(steps):
            small = [run for run in runs if run.tokens <= seen]
            known = [run for run in small if run.task == task]
            if not {(0, 0, 1), (1, 0, 1), (0, 1, 1)} <= {run.theta for run in known} or len({run.score for run in known}) < 2:
                continue
            fitted = AllocationModel.fit(known)
            chosen, best = fitted.best(task, own, budget), found_best(own, budget)
            body.append([
                task, str(seen), str(len(known)), str(budget), f"{chosen.theta}", f"{100 * fitted.predict(task, chosen.theta):.0f} %",
                f"{100 * chosen.score:.0f} %", f"{best.theta}", f"{100 * best.score:.0f} %",
            ])  # fmt: skip
    header = ["task", "fitted up to", "runs", "budget", "its choice (k, m, n)", "predicted", "scored", "best found", "scored"]
    return markdown(header, body)


def page(runs: list[Run]) -> str:
    fitted = [run for run in runs if len({other.score for other in runs if other.task == run.task}) > 1]  # a task with one score has nothing to predict
    gains = AllocationModel.fit(fitted).tasks
    body = [[name, f"{100 * of.mean:.0f} %", f"{of.i_doc:.2f}", f"{of.i_shot:.2f}", str(sum(run.task == name for run in runs))] for name, of in gains.items()]
    tasks = markdown(["task", "mean score", "i_doc", "i_shot", "configurations"], body)
    return f"{tasks}\n\n{fits(fitted)}\n\n{budgets(fitted)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--documents", type=int, default=3, help="of each task; four questions are asked of each")
    parser.add_argument("--words", type=int, default=2000, help="of a document")
    parser.add_argument("--context", default="8k", help="tokens of all prompts for a question: the largest budget")
    parser.add_argument("--text", type=Path, help="the book; the shipped one if not given")
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/rag-allocation.jsonl")
    parser.add_argument("--page", default=str(ROOT / "docs/rag.md"), help='where the tables go; "" for nowhere')
    args = parser.parse_args()
    model, tokenizer = longreach.load(args.model, dtype=args.dtype)
    runs = record(model, tokenizer, args, longreach.shipped_book() if args.text is None else read_text(args.text))
    print(page(runs))
    if args.page:
        write_section(Path(args.page), "allocation", page(runs))


if __name__ == "__main__":
    main()
