"""The scheduler of `longreach serve`, without HTTP: tokens per second of 16 clients that decode beside those of one, and a second question about one long text.

    python benchmarks/serving.py                                          # nano, fp32
    python benchmarks/serving.py --model random-0.5B --dtype bf16 --tokens 100,1000

Rounds alternate between one client and 16. Nothing is printed unless every client gets the tokens that it gets alone (in half precision that is said, not
required: two tokens may be as likely as each other).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from common import DTYPES, table
from model import keep, opened, options_of

import longreach
from longreach import LMInfinite, SelfExtend, Stock
from longreach.serving.jobs import Job
from longreach.serving.scheduler import Scheduler

CLIENTS, NEW, TIMES = 16, 64, 16


def ids(count: int, seed: int, vocabulary: int) -> list[int]:
    return torch.randint(1, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def decoded(extension: Any, jobs: list[Job]) -> tuple[float, list[list[int]]]:
    """Tokens per second while all of them decode, and the tokens of each."""
    scheduler, found, seconds, count = Scheduler(extension, prefixes=0), {job: [] for job in jobs}, 0.0, 0
    for job in jobs:
        scheduler.add(job)
    while scheduler.busy:
        begun = time.perf_counter()
        events = [event for event in scheduler.step() if event.token is not None]
        if len(events) == len(jobs) and all(found[job] for job in jobs):
            seconds, count = seconds + time.perf_counter() - begun, count + len(events)
        for event in events:
            found[event.job].append(event.token)
    return count / seconds, list(found.values())


def asked(scheduler: Scheduler, job: Job) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens of the prompt were read before."""
    begun = time.perf_counter()
    scheduler.add(job)
    events = scheduler.step()
    while events[-1].token is None:
        events = scheduler.step()
    took = time.perf_counter() - begun
    while scheduler.busy:
        scheduler.step()
    return took, events[0].cached


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--tokens", default="100,400,1000", help="of the prompts")
    options = parser.parse_args()
    model = opened(options)
    vocabulary = model.config.vocab_size
    exact, rows, questions, measured = DTYPES[options.dtype] == DTYPES["fp32"], [], [], {}
    for method in (Stock(), SelfExtend(16, 64), LMInfinite(256, 4)):
        with longreach.extend(model, method, trained_window=8192) as extension:
            for tokens in map(int, options.tokens.split(",")):
                jobs = [Job(ids(tokens + 3 * n, n, vocabulary), NEW, ends=()) for n in range(CLIENTS)]
                alone = [decoded(extension, [job])[1][0] for job in jobs]
                one, many, same = [], [], True
                for _ in range(options.rounds):
                    one.append(decoded(extension, jobs[:1])[0])
                    speed, found = decoded(extension, jobs)
                    many.append(speed)
                    same = same and found == alone
                if exact and not same:
                    raise SystemExit(f"{method}: clients of {tokens} tokens do not get what each gets alone; nothing is printed")
                ratio = statistics.median(many) / statistics.median(one)
                speeds = (f"{statistics.median(each):.1f}" for each in (one, many))
                rows.append([method.brief(), f"{tokens}", *speeds, f"{ratio:.1f}", "yes" if same else "no"])
                measured[f"{method.brief()} {tokens}"] = {"one": one, "clients": many, "ratio": ratio, "same": same}
            text = ids(TIMES * 512, 1, vocabulary)
            scheduler = Scheduler(extension)
            first, second = (asked(scheduler, Job(text + ids(20, seed, vocabulary), 4, ends=(), shared=len(text))) for seed in (2, 3))
            questions.append([method.brief(), f"{first[0]:.2f}", f"{second[0]:.3f}", f"{first[0] / second[0]:.0f}", f"{second[1]}"])
            measured[method.brief()] = {"first": first[0], "second": second[0], "cached": second[1]}
    title = f"{options.model}, {options.dtype}: tokens per second, of one client and of {CLIENTS}"
    print(table(title, ["method", "prompt", "1", f"{CLIENTS}", "ratio", "same"], rows))
    print(table(f"seconds to the first token, of a text of {TIMES * 512} tokens", ["method", "first question", "second", "ratio", "cached"], questions))
    keep(options, "serving", {"measured": measured})


if __name__ == "__main__":
    main()
