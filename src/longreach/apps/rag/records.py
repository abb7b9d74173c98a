"""Lines of JSON in files: recorded runs (which configuration scored what on a task, and how much it read), and demonstrations.

Knows files, numbers and texts; not models, tasks or what is made of them. The files may be hostile.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from longreach import files
from longreach.apps.rag.chunks import is_text
from longreach.apps.rag.prompts import Demonstration, Step
from longreach.quantities import MOST_TOKENS

LARGEST_FILE = 16 * 2**20  # bytes
MOST_SCORE = 1e9  # far from where squares overflow
RUNS, DEMONSTRATIONS = "file of recorded runs", "file of demonstrations"
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """k chunks, m demonstrations, n generations towards the answer: 1, or 1 and the rounds.

    score    the mean over samples.
    tokens   the effective context length of the sample that read most: the least budget into which this configuration fits.
    seconds  for all samples.
    """

    task: str
    k: int
    m: int
    n: int
    score: float
    tokens: int
    samples: int = 1
    seconds: float = 0.0
    chunk_words: int | None = None

    @property
    def theta(self) -> tuple[int, int, int]:
        return self.k, self.m, self.n

    def __post_init__(self) -> None:
        if not isinstance(self.task, str) or not self.task:
            raise ValueError(f"task must be a name, not {self.task!r}")
        for name, least in (("k", 0), ("m", 0), ("n", 1), ("tokens", 1), ("samples", 1), ("chunk_words", 1)):
            value = getattr(self, name)
            if name == "chunk_words" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST_TOKENS:
                raise ValueError(f"{name} must be a whole number from {least} to {MOST_TOKENS}, not {value!r}")
        for name in ("score", "seconds"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MOST_SCORE:
                raise ValueError(f"{name} must be a number from {-MOST_SCORE:g} to {MOST_SCORE:g}, not {value!r}")


def read_runs(file: str | Path) -> list[Run]:
    """Every line is an object with the fields of `Run`; of several with the same task and configuration the last counts."""

    def run(row: dict[str, Any]) -> Run:
        if unknown := set(row) - {field.name for field in fields(Run)}:
            raise ValueError(f"a run has no {', '.join(sorted(unknown))}")
        return Run(**row)

    return list({(one.task, one.theta): one for one in _lines(file, RUNS, run)}.values())


def write_runs(file: str | Path, runs: Sequence[Run]) -> None:
    """All of them, in one step: a file that is written after every run is whole whenever the work is cut."""
    files.write(file, "".join(json.dumps(asdict(run)) + "\n" for run in runs), RUNS)


def read_demonstrations(file: str | Path) -> tuple[Demonstration, ...]:
    """Every line is an object with `question`, `answer` and, where wanted, `lead` and `steps`, a list of pairs [sub-question, intermediate answer]."""

    def demonstration(row: dict[str, Any]) -> Demonstration:
        if unknown := set(row) - {"question", "answer", "lead", "steps"}:
            raise ValueError(f"a demonstration has no {', '.join(sorted(unknown))}")
        steps = [[step["question"], step["answer"]] if isinstance(step, dict) else step for step in row.get("steps", ())]
        if not all(isinstance(step, list) and len(step) == 2 for step in steps):  # a text of two letters is no pair
            raise ValueError("its steps must be pairs of texts, [sub-question, intermediate answer]")
        texts = [row.get("question"), row.get("answer"), row.get("lead", ""), *(text for step in steps for text in step)]
        if not all(is_text(text) for text in texts):
            raise ValueError("it must have texts of Unicode characters for question and answer, and pairs of them for steps")
        if not row["question"].strip() or not row["answer"].strip():
            raise ValueError("its question or its answer is empty")
        if any("\n" in text for step in steps for text in step):
            raise ValueError("a step must be one line")
        return Demonstration(row["question"].strip(), row["answer"].strip(), tuple(Step(*step) for step in steps), row.get("lead", "").strip())

    found = tuple(_lines(file, DEMONSTRATIONS, demonstration))
    if not found:
        raise ValueError(f"{str(file)!r} has no demonstrations; leave it out, or write one object with question and answer on each line")
    return found


def _lines(file: str | Path, what: str, make: Callable[[dict[str, Any]], T]) -> list[T]:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"there is no {what} {str(file)!r}; pass one with an object of JSON on each line")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{str(file)!r} has more than {LARGEST_FILE} bytes; pass a smaller {what}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"{str(file)!r} is not UTF-8 text; pass a {what}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no object")
            found.append(make(row))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"line {number} of {str(file)!r} does not belong into a {what} ({error}); correct or remove it") from None
    return found
