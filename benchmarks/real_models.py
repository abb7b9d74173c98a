"""A real pretrained model, inside its window and beyond it: keys found, loss, seconds and bytes, by method.

    python benchmarks/real_models.py smollm2-135m-instruct --model FILE.gguf                  # goes on where it was stopped
    python benchmarks/real_models.py smollm2-135m-instruct --model FILE.gguf --minutes 60     # stops after the reading that is under way
    python benchmarks/real_models.py smollm2-135m-instruct --list                             # what is measured and what is left
    python benchmarks/real_models.py --page                                                   # docs/real-models.md and README's table, from the results

Work is cut into readings: one document, read once under one setting, and its five questions; or one book, read for its loss. Each is a line of
results/real-models/NAME.jsonl as soon as it is done. Lines of other weights are refused; a line of another setting or document is not used. The most
telling readings come first, so that a run that was stopped is still a result. Several processes may share the work: --shard 0/2 and --shard 1/2.

The documents are those of the task `passkeys`: five keys with a name each at depths 0.1 to 0.9, the same for every setting: filler with the raw prompt,
filler with the model's chat template, and a passage of a novel with the raw prompt. The settings follow rules and no search, except for `tuned`, which is
what `longreach tune` wrote into results/real-models/NAME-profile.json from documents of other seeds (`tuned before`: what an earlier version of it chose).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from common import ROOT, device_of, facts
from real_models_page import CORE, PAST, write_page

import longreach
from longreach import configs
from longreach.evals import tasks
from longreach.evals.harness import perplexity
from longreach.evals.harness.model_engine import ModelEngine
from longreach.evals.samples import budget
from longreach.evals.samples.base import Sample, Settings
from longreach.hf.cache import cache_bytes
from longreach.hf.checks import find_base
from longreach.hf.fingerprint import fingerprint
from longreach.methods import registry
from longreach.methods.base import Method
from longreach.methods.longheads import LongHeads
from longreach.methods.selfextend import SelfExtend
from longreach.methods.stock import Stock
from longreach.planning import dial
from longreach.planning.profile import Profile

RESULTS = ROOT / "benchmarks/results/real-models"
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
DOCUMENTS = 4
BOOKS = 2
SEGMENT = 1024  # tokens that a loss is averaged over
CHUNK = 1024
Form = Literal["raw", "chat", "novel"]
KEYS = "passkeys"
SLOW = ("longheads", "infllm")  # several minutes a document: they choose for each query, or look at all attention twice
TOGETHER = 256  # queries that choose together in LongHeads; one each, as in the paper, takes half an hour a document


@dataclass(frozen=True)
class Reading:
    """One document (or book) under one setting. `windows`: its length in trained windows."""

    setting: str
    windows: float
    task: str  # a task of the registry, or "loss"
    form: Form
    document: int

    @property
    def what(self) -> str:
        return f"{self.setting}, {self.windows:g} windows, {self.task} {self.form}, document {self.document}"


def everything() -> Iterator[Reading]:
    """What is measured, the most telling first: the ceiling and the core document by document, losses, the other methods, other tasks, four windows."""

    def recall(documents: Iterable[int], settings: tuple[str, ...], windows: tuple[float, ...], forms: tuple[Form, ...], task: str = KEYS) -> Iterator[Reading]:
        for document in documents:
            for w in windows:
                for form in forms:
                    yield from (Reading(name, w, task, form, document) for name in settings)

    measured = tuple(name for name in CORE if name not in PAST)
    every, others = range(DOCUMENTS), tuple(name for name in sorted(registry()) if name not in (*CORE, "selfextend"))
    for document in every:
        yield from recall([document], ("stock",), (1.0, 0.5), ("chat", "raw"))
        yield from recall([document], ("dial", "old rule", "tuned", "rerope", "stock"), (1.5,), ("chat", "raw"))
    yield from recall(every, ("yarn", "lm-infinite"), (1.5,), ("chat", "raw"))
    yield from (Reading(name, w, "loss", "novel", book) for w in (2.0, 1.5) for book in range(BOOKS) for name in measured)
    yield from recall(every, (*measured, "second rule"), (2.0,), ("chat", "raw"))  # which is the dial's elsewhere
    yield from recall(every, ("stock",), (0.5, 1.0), ("novel",))
    yield from recall(every, measured, (1.5,), ("novel",))
    yield from recall(every, tuple(name for name in others if name not in SLOW), (1.5,), ("chat", "raw"))
    for task in ("ruler-vt", "infinitebench-kv-retrieval"):
        yield from recall(every, ("stock",), (0.5, 1.0), ("raw",), task)
        yield from recall(every, ("dial", "tuned", "stock"), (1.5,), ("raw",), task)
    yield from recall(every, measured, (2.0,), ("novel",))
    yield from recall(every, ("dial", "rerope", "lm-infinite"), (4.0,), ("chat", "raw"))
    yield from recall(every, ("rerope", "yarn", "lm-infinite"), (0.5, 1.0), ("chat", "raw", "novel"))
    yield from recall(every, SLOW, (1.5,), ("chat", "raw"))


def old_rule(window: int, context: int) -> Method:
    """What the dial chose before it was revised by these measurements: neighbour window L / 8, the smallest group size whose largest distance is within
    two thirds of L, and the log scale."""
    for group in range(2, 65):
        near = max(1, round(window / 8 / group)) * group
        if near + (context - near) / group <= window * 2 // 3:
            return SelfExtend(group, near, log_scale=window)
    raise ValueError(f"the old rule has no setting for {context} tokens on a window of {window}")


def second_rule(window: int, context: int) -> Method:
    """What it chose next, up to one and a half windows still does: neighbour window L / 32, the largest distance within L / 8, no log scale."""
    for group in range(2, 257):
        near = max(1, round(window / 32 / group)) * group
        if near + (context - near) / group <= window // 8:
            return SelfExtend(group, near)
    raise ValueError(f"the second rule has no setting for {context} tokens on a window of {window}")


@dataclass
class Bench:
    name: str
    model: Any
    tokenizer: Any

    @cached_property
    def window(self) -> configs.Window:
        return configs.trained_window(find_base(self.model).config)

    @cached_property
    def mark(self) -> str:
        return fingerprint(self.model)

    @cached_property
    def novel(self) -> str:
        return longreach.shipped_book()

    def length(self, reading: Reading) -> int:
        return int(reading.windows * self.window.tokens)

    def method(self, reading: Reading) -> Method | None:
        """None: this setting has no parameters for the length."""
        length = self.length(reading)
        try:
            if reading.setting == "old rule":
                return Stock() if length <= self.window.tokens else old_rule(self.window.tokens, length)
            if reading.setting == "second rule":
                return Stock() if length <= self.window.tokens else second_rule(self.window.tokens, length)
            if reading.setting == "dial":
                return dial.choose(self.window, length).method
            if reading.setting == "tuned":
                path = RESULTS / f"{self.name}-profile.json"
                return Profile.read(path).choose(length).method if path.exists() else None
            method = dial.recommended(registry()[reading.setting], self.window, length)
            return replace(method, together=TOGETHER) if isinstance(method, LongHeads) else method
        except ValueError as error:
            print(f"left out: {reading.what}: {error}", flush=True)
            return None

    def questions(self, reading: Reading) -> list[Sample]:
        task, alone = tasks.task(reading.task), reading.task != KEYS  # a task without several questions on a document: five documents of one each
        count = len(DEPTHS) * DOCUMENTS if alone else DOCUMENTS
        text = self.novel if reading.form == "novel" else None
        found = list(task.samples(self.tokenizer, Settings(lengths=(self.length(reading),), depths=DEPTHS, samples=count, text=text)))
        if alone:
            return found[reading.document :: DOCUMENTS][: len(DEPTHS)]
        return [sample for sample in found if sample.meta["index"] == reading.document]

    # -- one reading ---------------------------------------------------------------------------------------------------------------

    def identity(self, reading: Reading, method: Method) -> dict[str, Any]:
        return {
            "setting": reading.setting, "method": method.to_json(), "length": self.length(reading), "task": reading.task, "form": reading.form,
            "document": reading.document,
        }  # fmt: skip

    def measure(self, reading: Reading, method: Method) -> dict[str, Any]:
        length, started = self.length(reading), time.perf_counter()
        capacity = None if method.needs_context else method.capacity(self.window.tokens)
        beyond = capacity is not None and capacity < length
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a method beyond its reach is measured, and the page says so
            with longreach.extend(self.model, method, context=None if beyond else length) as extension:
                engine = ModelEngine(self.model, self.tokenizer, extension, CHUNK)
                found = self._losses(engine, reading) if reading.task == "loss" else self._answers(engine, reading)
        return {
            **self.identity(reading, method), "parameters": method.brief(), "windows": reading.windows, "beyond_reach": beyond, **found,
            "seconds": round(time.perf_counter() - started, 1), "mark": self.mark, "facts": facts(device_of("cpu")), "dtype": str(self.model.dtype),
        }  # fmt: skip

    def _answers(self, engine: ModelEngine, reading: Reading) -> dict[str, Any]:
        task, rows, reads = tasks.task(reading.task), [], 0.0
        for sample in self.questions(reading):
            reply = engine.answer(budget.encode(self.tokenizer, sample, "auto" if reading.form == "chat" else "off"))
            score = task.score(sample, reply.text)[task.metric]
            rows.append({"id": sample.id, "depth": sample.meta.get("depth"), "score": score, "answer": reply.text})
            reads = max(reads, reply.prefill_seconds)
        cache = engine._prefix.cache
        return {"questions": rows, "prefill_seconds": round(reads, 2), "bytes": None if cache is None else cache_bytes(cache)}

    def _losses(self, engine: ModelEngine, reading: Reading) -> dict[str, Any]:
        text = self.novel
        begin = text.find(". ", len(text) * (1 + 2 * reading.document) // (2 * BOOKS)) + 2
        length = self.length(reading)
        ids = perplexity.document(self.tokenizer, text[begin : begin + 16 * length]).ids[:length]
        losses = perplexity.losses(engine.extension, ids, CHUNK)
        parts = [float(part.double().nanmean()) for part in losses.split(SEGMENT)]
        return {"losses": [round(part, 4) for part in parts], "segment": SEGMENT}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The last line may be torn, where a run was killed while it wrote."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def keep(path: Path, row: dict[str, Any]) -> None:
    """Append a line, after the end of one that was torn."""
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(row) + "\n")


def key(row: dict[str, Any]) -> str:
    return json.dumps([row["setting"], row["method"], row["length"], row["task"], row["form"], row["document"]], sort_keys=True)


def work(bench: Bench, path: Path, minutes: float | None, shard: tuple[int, int], only: set[str] | None) -> None:
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    before = read_lines(path)
    if strange := {row["mark"] for row in before} - {bench.mark}:
        raise SystemExit(f"{path.name} holds results of other weights ({sorted(strange)[0][:12]}); choose another name for this model")
    done = {key(row) for row in before}
    plan = [reading for reading in everything() if only is None or reading.setting in only]
    for number, reading in enumerate(plan):
        if number % shard[1] != shard[0]:
            continue
        if (method := bench.method(reading)) is None:
            continue
        if key(bench.identity(reading, method)) in done:
            continue
        if ends is not None and time.monotonic() > ends:
            return
        row = bench.measure(reading, method)
        keep(path, row)
        shown = "".join("x" if q["score"] == 1 else "." for q in row["questions"]) if "questions" in row else f"{row['losses'][-1]:.3f}"
        print(f"{number + 1}/{len(plan)} {reading.what}: {row['parameters']}: {shown}, {row['seconds']:.0f} s", flush=True)


def listed(bench: Bench, path: Path) -> None:
    done = {key(row) for row in read_lines(path)}
    for reading in everything():
        method = bench.method(reading)
        state = "none" if method is None else "done" if key(bench.identity(reading, method)) in done else "open"
        print(f"{state}  {reading.what}{'' if method is None else ': ' + method.brief()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("name", nargs="?", help="of the model, for files and tables")
    parser.add_argument("--model", help="a folder, a GGUF file, or an id on the Hugging Face Hub")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--minutes", type=float, help="start no reading after so many")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th reading, from the i-th")
    parser.add_argument("--settings", nargs="+", help="these only")
    parser.add_argument("--list", action="store_true", help="say what is done and what is open")
    parser.add_argument("--page", action="store_true", help="write the page only")
    args = parser.parse_args()
    if not args.page:
        if args.name is None or args.model is None:
            parser.error("name the model, and pass --model")
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{args.name}.jsonl"
        bench = Bench(args.name, *longreach.load(args.model, dtype=args.dtype))
        if args.list:
            listed(bench, path)
            return
        index, _, count = args.shard.partition("/")
        with torch.no_grad():
            work(bench, path, args.minutes, (int(index), int(count)), None if args.settings is None else set(args.settings))
    write_page({path.stem: read_lines(path) for path in sorted(RESULTS.glob("*.jsonl"))})


if __name__ == "__main__":
    main()
