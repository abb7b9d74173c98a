"""What a benchmark task is: samples made of prompt parts, a score, and rows of results.

Knows tokenizers, texts and random numbers; not models, methods, runners or files of results. A sample is a function of
(seed, length, index) alone, so that any order and any sharding gives the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, Literal

from longreach.hf.interfaces import Tokenizer

Chat = Literal["off", "user_turn", "prefix"]


@dataclass(frozen=True)
class Parts:
    """The four parts of a prompt. Only `document` may be cut; `answer_prefix` is the beginning of the answer, given to the model."""

    document: str
    query: str = ""
    prefix: str = ""
    answer_prefix: str = ""

    @property
    def text(self) -> str:
        return self.prefix + self.document + self.query + self.answer_prefix


@dataclass(frozen=True)
class Sample:
    """One prompt with its accepted answers.

    meta  plain data that results are grouped by: length_target, depth (0 to 1), depth_actual, seed, ...
    stop  strings that end an answer; "\\n" for tasks that want one line.
    chat  how the chat template of a model that has one applies: "off" not at all; "user_turn" the whole prompt is the user's turn;
          "prefix" so is all but `answer_prefix`, which begins the assistant's answer.
    """

    id: str
    parts: Parts
    references: tuple[str, ...]
    max_new_tokens: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    chat: Chat = "off"


@dataclass(frozen=True)
class Settings:
    """What a user chooses for a task.

    lengths  total tokens of prompt and answer, one set of samples for each; () for tasks whose data have their own lengths.
    depths   where in the document a fact lies, 0 to 1; for tasks that have a depth.
    samples  per length (and per depth, where a task has depths).
    text     text of the user to hide facts in; None for the task's own filler or the shipped book.
    data     file or folder of the official data, for tasks that need it.
    options  what only one task knows, by its own names; a task refuses a name that it does not know.
    """

    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 5
    seed: int = 0
    text: str | None = None
    data: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


class Task:
    """A benchmark task: one class, one file in `evals/tasks/`. Subclasses set the class variables and define `samples` and `score`.

    metric   the name of the main metric, a key of what `score` returns.
    random   the score of guessing, in 0..1, where it is defined.
    """

    name: ClassVar[str]  # kebab-case, as on the command line
    group: ClassVar[str] = ""  # the benchmark it belongs to, such as "ruler"; "" for a task of its own
    version: ClassVar[str] = "1"
    license: ClassVar[str] = ""
    source: ClassVar[str] = ""  # paper or repository
    needs_data: ClassVar[bool] = False
    metric: ClassVar[str] = "accuracy"
    random: ClassVar[float | None] = None
    options: ClassVar[Mapping[str, Any]] = {}  # known options and their defaults

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        raise NotImplementedError

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        """Metrics of one answer, each in 0..1. Never raises on any string."""
        raise NotImplementedError

    def check(self, settings: Settings) -> None:
        """Raises ValueError for an option that the task does not have, and for a depth that is none."""
        if unknown := set(settings.options) - set(self.options):
            raise ValueError(f"{self.name} has no option {', '.join(sorted(unknown))}; it knows {', '.join(self.options) or 'none'}")
        if wrong := [depth for depth in settings.depths if not 0 <= depth <= 1]:
            raise ValueError(f"depths are fractions of the document, 0 to 1, not {wrong[0]:g}; divide percentages by 100")

    def option(self, settings: Settings, name: str) -> Any:
        self.check(settings)
        return settings.options.get(name, self.options[name])


def generator(settings: Settings, *key: Any) -> Random:
    """The random numbers of one sample: a function of the seed and of what names the sample (task, length, depth, index)."""
    return Random(":".join(map(str, (settings.seed, *key))))
