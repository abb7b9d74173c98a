"""The scheduler of `longreach serve`, without HTTP: tokens per second of 16 clients that decode beside those of one, and a second question about one long text.

    python benchmarks/serving.py                                          # nano, fp32
    python benchmarks/serving.py --model random-0.5B --dtype bf16 --tokens 100,1000
    python benchmarks/serving.py --model SmolLM2-135M-Instruct.Q4_1.gguf --methods stock --tokens 100,1000 --rounds 3 --text 8000

Rounds alternate between one client and 16. Nothing is printed unless every client gets the tokens that it gets alone (in half precision that is said, not
required: two tokens may be as likely as each other).

The text is read once, for the first question. Then 16 clients ask about it at a time: what they hold beside what one holds says that it lies there once. At
last 16 requests have a text of that length each, in memory of their own. `by bytes` is what 16 clients would be beside one if a token cost only what is read
for it from memory: the weights, once for all, and the keys and values of each. Where calls cost more than bytes, as on nano, 16 in one call gain more.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, table
from model import keep, named, opened, options_of

import longreach
from longreach import LMInfinite, SelfExtend, Stock
from longreach.quantities import CHUNK_SIZE
from longreach.serving.jobs import Job
from longreach.serving.scheduler import Scheduler

CLIENTS, NEW = 16, 64
CHECKED = 4  # of the clients with a long text, of which each token takes long
WINDOW = 2**14  # that no warning is of interest here
METHODS = {"stock": Stock(), "selfextend": SelfExtend(16, 64), "lm-infinite": LMInfinite(256, 4)}


def ids(count: int, seed: int, vocabulary: int) -> list[int]:
    return torch.randint(1, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def decoded(scheduler: Scheduler, jobs: list[Job]) -> tuple[float, list[list[int]], int]:
    """Tokens per second of NEW forwards in which all of them decode, the tokens of each, and the bytes that were held then."""
    found: dict[Job, list[int]] = {job: [] for job in jobs}
    seconds, count, held = 0.0, 0, 0
    for job in jobs:
        scheduler.add(job)
    while count < NEW:
        begun = time.perf_counter()
        events = [event for event in scheduler.step() if event.token is not None]
        if len(events) == len(jobs) and all(found.values()):
            seconds, count = seconds + time.perf_counter() - begun, count + 1
        for event in events:
            found[event.job].append(event.token)
    held = scheduler.stats().held
    for job in jobs:
        scheduler.cancel(job)
    return count * len(jobs) / seconds, list(found.values()), held


def same(found: list[list[int]], alone: list[list[int]]) -> bool:
    """Those that were read first have had more tokens when all decoded long enough."""
    return all(one[:NEW] == other[:NEW] for one, other in zip(found, alone))


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


def apart(extension: Any, scheduler: Scheduler, text: list[int], rounds: int) -> tuple[list[float], int]:
    """Tokens per second of 16 requests that have each a text of its own in memory, copies of one, which is read no second time; and the bytes of each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "text"
        scheduler.hold("text", text, folder)
        while scheduler.busy:
            scheduler.step()
        flat = extension.flat()
        snapshots = [flat.load(folder)[0] for _ in range(CLIENTS)]
    requests = [flat.begin(snapshot, snapshot.length) for snapshot in snapshots]
    last, speeds = {request: 1 + number for number, request in enumerate(requests)}, []
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(NEW):
            last = {request: int(logits.argmax()) for request, logits in flat.read({request: [token] for request, token in last.items()}).items()}
        speeds.append(CLIENTS * NEW / (time.perf_counter() - begun))
    return speeds, flat.nbytes // CLIENTS


def by_bytes(model: Any, held: int) -> float:
    """What 16 would be beside one where each holds so many bytes, if only reading them cost time."""
    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    if not model.config.tie_word_embeddings:
        weights.pop(model.get_input_embeddings().weight.data_ptr())  # of which a token reads a line
    return CLIENTS * (sum(weights.values()) + held) / (sum(weights.values()) + CLIENTS * held)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--tokens", default="100,400,1000", help="of the prompts")
    parser.add_argument("--text", type=int, default=8000, help="tokens of the long text")
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    model = opened(options)
    vocabulary = model.config.vocab_size
    exact, measured = DTYPES[options.dtype] == DTYPES["fp32"], {}
    rows: list[list[str]] = []
    questions: list[list[str]] = []
    texts: list[list[str]] = []

    def compared(what: str, found: list[list[int]], alone: list[list[int]]) -> bool:
        if exact and not same(found, alone):
            raise SystemExit(f"{what} do not get what each gets alone; nothing is printed")
        return same(found, alone)

    for method in (METHODS[name] for name in options.methods.split(",")):
        with longreach.extend(model, method, trained_window=WINDOW) as extension:
            for tokens in map(int, options.tokens.split(",")):
                new = NEW + CLIENTS * (tokens // CHUNK_SIZE + 3)  # the first decodes while the last is read
                jobs = [Job(ids(tokens + 3 * n, n, vocabulary), new, ends=()) for n in range(CLIENTS)]
                many, one, agree = [], [], True

                def fresh() -> Scheduler:
                    return Scheduler(extension, prefixes=0, step_ms=1e9)

                alone = [decoded(fresh(), [job])[1][0] for job in jobs]
                for _ in range(options.rounds):
                    speed, _, held = decoded(fresh(), jobs[:1])
                    one.append(speed)
                    speed, found, _ = decoded(fresh(), jobs)
                    many.append(speed)
                    agree = agree and compared(f"{method.brief()}: clients of {tokens} tokens", found, alone)
                ratio, most = statistics.median(many) / statistics.median(one), by_bytes(model, held)
                speeds = (f"{statistics.median(each):.1f}" for each in (one, many))
                rows.append([method.brief(), f"{tokens}", *speeds, f"{ratio:.1f}", f"{most:.1f}", "yes" if agree else "no"])
                measured[f"{method.brief()} {tokens}"] = {"one": one, "clients": many, "ratio": ratio, "by bytes": most, "same": agree}
            if not options.text:
                continue
            text = ids(options.text, 1, vocabulary)
            scheduler = Scheduler(extension)
            first, second = (asked(scheduler, Job(text + ids(20, seed, vocabulary), 4, ends=(), shared=len(text))) for seed in (2, 3))
            questions.append([method.brief(), f"{first[0]:.2f}", f"{second[0]:.3f}", f"{first[0] / second[0]:.0f}", f"{second[1]}"])
            measured[method.brief()] = {"first": first[0], "second": second[0], "cached": second[1]}
            jobs = [Job(text + ids(20, 9 + n, vocabulary), 2 * NEW, ends=(), shared=len(text)) for n in range(CLIENTS)]
            alone = [decoded(scheduler, [job])[1][0] for job in jobs[:CHECKED]]
            one, forks, agree = [], [], True
            for _ in range(options.rounds):
                speed, _, held = decoded(scheduler, jobs[:1])
                one.append(speed)
                speed, found, together = decoded(scheduler, jobs)
                forks.append(speed)
                agree = agree and compared(f"{method.brief()}: clients of one text of {options.text} tokens", found[:CHECKED], alone)
            own, each_holds = apart(extension, scheduler, text, options.rounds)
            most = by_bytes(model, each_holds)
            medians = [statistics.median(each) for each in (one, forks, own)]
            ratios = (f"{each / medians[0]:.1f}" for each in medians[1:])
            speeds, sizes = (f"{each:.1f}" for each in medians), (f"{each / 2**20:.0f}" for each in (held, together))
            texts.append([method.brief(), *speeds, *ratios, f"{most:.1f}", *sizes, "yes" if agree else "no"])
            measured[f"{method.brief()} text"] = {"one": one, "forks": forks, "own": own, "by bytes": most, "held": [held, together], "same": agree}
    title = f"{named(options.model)}, {options.dtype}: tokens per second, of one client and of {CLIENTS}"
    print(table(title, ["method", "prompt", "1", f"{CLIENTS}", "ratio", "by bytes", "same"], rows))
    head = ["method", "first question", "second", "ratio", "cached"]
    print(table(f"seconds to the first token, of a text of {options.text} tokens", head, questions))
    head = ["method", "1", f"{CLIENTS} of one text", f"{CLIENTS} of their own", "ratio", "of their own", "by bytes", "MiB of 1", f"of {CLIENTS}", "same"]
    print(table(f"tokens per second at the end of a text of {options.text} tokens", head, texts))
    keep(options, "serving", {"measured": measured})


if __name__ == "__main__":
    main()
