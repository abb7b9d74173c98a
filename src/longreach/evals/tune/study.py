"""The bench of a model: candidates attached one after the other, documents answered by the harness, losses, and the ceiling inside the window.

Knows models, tasks and the harness; not the schedule, the decision or terminals. Everything that is measured is written at once, see workplace.py.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch

from longreach import configs
from longreach.evals.harness import environment, estimates, perplexity, runner
from longreach.evals.harness.environment import now
from longreach.evals.harness.items import Item
from longreach.evals.harness.model_engine import ModelEngine, attached
from longreach.evals.harness.results import Folder
from longreach.evals.samples import haystack
from longreach.evals.samples.base import Settings, Task
from longreach.evals.samples.budget import ChatMode
from longreach.evals.tune import workplace
from longreach.evals.tune.bench import Answers, Loss, Part, Refused
from longreach.evals.tune.candidates import Candidate, propose
from longreach.evals.tune.workplace import Workplace
from longreach.hf.checks import find_base
from longreach.hf.fingerprint import checkpoint_fingerprint
from longreach.methods.base import Method
from longreach.methods.stock import Stock
from longreach.quantities import CHUNK_SIZE, counted
from longreach.running import prompts
from longreach.running.loading import shipped_book
from longreach.version import __version__

KEYS = 5  # in a document, where a task has depths: with more, a small model mistakes one for another
DEPTHS = tuple((2 * n + 1) / (2 * KEYS) for n in range(KEYS))
BEYOND = "beyond"  # the name of the loss beyond the window
INSIDE = {"0.5x": (0.25, 0.5), "1x": (0.5, 1.0)}  # the part of the window whose loss is taken, and up to where it is read


@dataclass(frozen=True)
class Asked:
    """What is to be measured: tasks at a context, with a text to hide facts in and to predict (None: the tasks' own filler, and the shipped book)."""

    context: int
    tasks: tuple[Task, ...]
    text: str | None = None
    seed: int = 0
    chat: ChatMode = "auto"
    trained_window: int | None = None
    chunk_size: int = CHUNK_SIZE


@dataclass(frozen=True)
class Inside:
    """A part of the ceiling: plain attention at `length` tokens. Either answers or a loss."""

    length: int
    chat: bool
    answers: Answers | None = None
    loss: Loss | None = None


class ModelBench:
    """`Bench` of a model, in a folder. `inside` is the ceiling as far as it was measured; `notes` what people should know of the measurements."""

    def __init__(self, model: Any, tokenizer: Any, name: str, asked: Asked, work: Path | None = None) -> None:
        self.model, self.tokenizer, self.name, self.asked, self.work = model, tokenizer, name, asked, work
        self.base = find_base(model)
        self.window = configs.trained_window(self.base.config, asked.trained_window)
        self.proposal = propose(self.window, asked.context, self.refuses)
        if needing := [task.name for task in asked.tasks if task.needs_data]:
            raise ValueError(f"{needing[0]} needs official data, which has lengths of its own; tune with tasks that make their samples, such as passkeys")
        self.notes: list[str] = []
        self.fingerprint = checkpoint_fingerprint(self.base)
        self.passage = self._passage()
        self._documents: list[list[Item]] = []
        self._end: int | None = None  # so many documents there are, once that is known
        self.document(0)  # what cannot be made is said before anything is measured
        self._work = self._settings_of(asked.context, 1)
        self.inside: dict[str, Inside] = {}
        self._parts = {found[0].name: found for found in self._ceiling()}

    @cached_property
    def place(self) -> Workplace:
        """The folder, which is made, or found to be ours, when it is first asked for. Raises ValueError where it is not."""
        return Workplace.open(self.work, self._settings(), self.name)

    # -- what is asked -----------------------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What decides every answer and loss, beside the candidate."""
        text = self.asked.text
        return {
            "longreach": __version__,
            "fingerprint": self.fingerprint,
            "trained_window": self.window.tokens,
            "tuned_context": self.asked.context,
            "tuned_tasks": [task.name for task in self.asked.tasks],
            "seed": self.asked.seed,
            "text": None if text is None else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            "chat": self.asked.chat,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "chunk_size": self.asked.chunk_size,
        }

    def _settings_of(self, length: int, samples: int) -> dict[Task, Settings]:
        asked = Settings(lengths=(length,), depths=DEPTHS, samples=samples, seed=self.asked.seed, text=self.asked.text)
        return {task: asked for task in self.asked.tasks}

    def document(self, number: int) -> list[Item]:
        """The questions of the n-th document, of every task; a document is what one sample of every depth makes where a task has no document of several.

        Raises ValueError where the tasks do not make so many.
        """
        if number >= len(self._documents):
            twice = max(number + 1, 2 * len(self._documents))
            try:
                self._documents = self._made(twice)
            except ValueError:
                if twice == number + 1:
                    raise
                self._documents = self._made(number + 1)  # a later one may be the only one that cannot be made
        return self._documents[number]

    def _made(self, count: int) -> list[list[Item]]:
        found = _documents(runner.plan(self._settings_of(self.asked.context, count), self.tokenizer, self.asked.chat))
        if len(found) < count:
            raise ValueError(f"the tasks make {counted(len(found), 'document')}, fewer than the {count} asked for; choose a task with more samples")
        return found

    def has(self, document: int) -> bool:
        """Whether the tasks make so many documents: a sample may not fit into the context, or a task may have few. The end is noted once."""
        if self._end is None:
            try:
                self.document(document)
                return True
            except ValueError as error:
                self._end = document
                self.notes.append(f"the tasks make no more than {counted(document, 'document')}, so that no candidate could read another: {one_line(error)}")
        return document < self._end

    def _passage(self) -> torch.Tensor:
        """[context] ids of one passage of the text."""
        for text in [shipped_book()] if self.asked.text is None else [self.asked.text, shipped_book()]:
            begin = haystack.sentence_start(text, Random(f"{self.asked.seed}:loss").random())
            for piece in (text[begin:], text):
                ids = perplexity.document(self.tokenizer, piece[: 32 * self.asked.context]).ids[: self.asked.context]
                if len(ids) == self.asked.context:
                    return ids
            if self.asked.text is not None and not self.notes:
                self.notes.append(f"the text has {len(ids)} tokens, fewer than the context, so that the loss is that of the book that comes with longreach")
        raise ValueError(f"no text has {self.asked.context} tokens to measure a loss on; pass a longer one with --text")

    def refuses(self, method: Method) -> str | None:
        """What is known of this model without attaching anything."""
        kind = configs.scaling(self.base.config).kind
        return f"the rotary of this model is scaled already ({kind}), and {method.name} would scale it again" if method.rescales and kind != "default" else None

    def estimate(self) -> float | None:
        """Seconds of one document under the first candidate that can be attached, from short beginnings of the document; None if there is none."""
        items = self.document(0)
        for candidate in self.proposal.candidates:
            try:
                with self._attached(candidate.method, self.asked.context) as engine:
                    work = engine.work
                    speed = estimates.measure(items, engine, self.tokenizer, work, self.asked.chat, engine.several.size)
            except Refused:
                continue
            return estimates.estimate(items, work, speed).seconds
        return None

    # -- candidates --------------------------------------------------------------------------------------------------------------------

    def known(self, candidate: Candidate, document: int) -> Answers | None:
        config, folder = self.place.config(candidate.method), self._folder(candidate)
        if document >= len(self._documents) and str(document) not in workplace.units(folder):
            return None  # it need not be made to know that nobody has read it
        return self._known(folder, config, self.document(document), str(document))

    def read(self, candidate: Candidate, document: int) -> Answers:
        config = self.place.config(candidate.method)
        return self._answer(self._folder(candidate), config, candidate.method, self.asked.context, self.document(document), str(document), self.asked.chat)

    def known_loss(self, candidate: Candidate) -> Loss | None:
        return workplace.loss(self._folder(candidate, workplace.LOSSES), self.place.config(candidate.method)).get(BEYOND)

    def loss(self, candidate: Candidate) -> Loss:
        """Of the tokens beyond the window, or of the last quarter where those are fewer."""
        count = max(self.asked.context - self.window.tokens, self.asked.context // 4)
        config, folder = self.place.config(candidate.method), self._folder(candidate, workplace.LOSSES)
        started = time.perf_counter()
        with self._attached(candidate.method, self.asked.context) as engine:
            self._start(folder, config, {}, engine)
            try:
                found = perplexity.last_losses(engine.extension, self.passage, count, self.asked.chunk_size)
            except (ValueError, RuntimeError, MemoryError) as error:  # logits that are not finite, or too little memory for a method that reads in one forward
                raise Refused(f"its loss cannot be measured ({one_line(error)})") from error
        measured = workplace.losses_of(found[~found.isnan()].tolist(), time.perf_counter() - started)
        workplace.keep_losses(folder, {BEYOND: (self.asked.context, measured)}, now())
        return measured

    def _folder(self, candidate: Candidate, kind: str = workplace.ANSWERS) -> Folder:
        name = workplace.slug(candidate.method)
        return self.place.folder(kind, f"loss-{name}" if kind == workplace.LOSSES else name)  # a report of all of them tells them apart

    # -- the ceiling -------------------------------------------------------------------------------------------------------------------

    @property
    def parts(self) -> Sequence[Part]:
        return [found[0] for found in self._parts.values()]

    def _ceiling(self) -> Iterator[tuple[Part, int, bool, list[Item]]]:
        """(part, length, whether with the chat template, questions): as the candidates are asked first, at the whole window first; [] is the loss."""
        window, template = self.window.tokens, prompts.has_template(self.tokenizer)
        used = template and self.asked.chat == "auto"
        for chat in (used, not used) if template else (False,):
            for name, length in (("1x", window), ("0.5x", window // 2)):
                try:
                    items = _documents(runner.plan(self._settings_of(length, 1), self.tokenizer, "auto" if chat else "off"))[0]
                except ValueError as error:
                    self.notes.append(f"the ceiling was not measured at {length} tokens: {error}")
                    continue
                how = "with the chat template" if chat else "raw" if template else "plain attention"
                yield Part(f"recall at {name} of the window, {how}", length / self.asked.context), length, chat, items
            if chat == used:
                yield Part("loss inside the window", window / self.asked.context), window, False, []

    def known_part(self, part: Part) -> float | None:
        _, length, chat, items = self._parts[part.name]
        if not items:
            found = workplace.loss(self._loss_inside(), self.place.config(Stock()))
            for name in INSIDE if set(INSIDE) <= set(found) else ():
                self.inside[f"{part.name}, {name}"] = Inside(round(INSIDE[name][1] * length), False, loss=found[name])
            return found["1x"].seconds if set(INSIDE) <= set(found) else None
        answers = self._known(self._inside(chat), self.place.config(Stock(), chat=mode(chat)), items, str(length))
        if answers is None:
            return None
        self.inside[part.name] = Inside(length, chat, answers)
        return answers.seconds

    def ceiling(self, part: Part) -> float:
        _, length, chat, items = self._parts[part.name]
        try:
            if items:
                config = self.place.config(Stock(), chat=mode(chat))
                self._answer(self._inside(chat), config, Stock(), self.window.tokens, items, str(length), mode(chat))
            else:
                self._measure_loss_inside()
        except Refused as refused:
            self.notes.append(f"the ceiling was not measured ({part.name}): {refused}")
        return self.known_part(part) or 0.0

    def _measure_loss_inside(self) -> None:
        window, folder, started = self.window.tokens, self._loss_inside(), time.perf_counter()
        with self._attached(Stock(), window) as engine:
            self._start(folder, self.place.config(Stock()), {}, engine)
            try:
                found = perplexity.losses(engine.extension, self.passage[:window], self.asked.chunk_size).double()
            except (ValueError, RuntimeError, MemoryError) as error:  # as in `loss`
                raise Refused(one_line(error)) from error
        seconds = time.perf_counter() - started
        ends = {name: (round(first * window), round(last * window)) for name, (first, last) in INSIDE.items()}
        parts = {name: (last, workplace.losses_of([x for x in found[first:last].tolist() if x == x], seconds)) for name, (first, last) in ends.items()}
        workplace.keep_losses(folder, parts, now())

    def _inside(self, chat: bool) -> Folder:
        return self.place.folder(workplace.CEILING, "chat" if chat else "raw")

    def _loss_inside(self) -> Folder:
        return self.place.folder(workplace.CEILING, "loss")

    # -- asking ------------------------------------------------------------------------------------------------------------------------

    def _known(self, folder: Folder, config: Mapping[str, Any], items: Sequence[Item], unit: str) -> Answers | None:
        return workplace.answers(folder, config, items, self._hashes(config), unit)

    def _hashes(self, config: Mapping[str, Any]) -> dict[str, str]:
        return {name: facts["config_hash"] for name, facts in runner.describe(self._work, config).items()}

    def _answer(self, folder: Folder, config: Mapping[str, Any], method: Method, context: int, items: list[Item], unit: str, chat: ChatMode) -> Answers:
        started = time.perf_counter()
        with self._attached(method, context) as engine:
            self._start(folder, config, runner.describe(self._work, config), engine)
            outcome = runner.run(items, engine, self.tokenizer, folder, self._hashes(config), chat=chat)
            said = {note.partition(":")[0] for note in self.notes}  # the bytes that are free are other ones each time
            self.notes.extend(note for note in engine.alone if note.partition(":")[0] not in said)
        folder.finish(now())
        if outcome.failed:
            keys = {(item.task.name, item.sample.id) for item in items}
            raise Refused(next(str(record.error) for record in folder.records() if record.key in keys and record.error)[:500])
        workplace.note_seconds(folder, unit, time.perf_counter() - started)
        answers = self._known(folder, config, items, unit)
        assert answers is not None
        return answers

    @contextmanager
    def _attached(self, method: Method, context: int) -> Iterator[ModelEngine]:
        """Raises Refused where the model cannot have the method."""
        with ExitStack() as stack:
            try:
                window, chunk = self.asked.trained_window, self.asked.chunk_size
                how = attached(self.model, self.tokenizer, method, context, trained_window=window, chunk_size=chunk, batch_size=None)
                engine = stack.enter_context(how)
            except ValueError as error:
                raise Refused(one_line(error)) from error
            yield engine

    def _start(self, folder: Folder, config: Mapping[str, Any], tasks: Mapping[str, Any], engine: ModelEngine) -> None:
        assert engine.extension is not None
        made = {"environment": environment.describe(self.model.device), "extension": engine.extension.report(), "started": now(), "ended": None}
        folder.start({"config": dict(config), "tasks": tasks, "units": workplace.units(folder), **made})


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def mode(chat: bool) -> ChatMode:
    return "auto" if chat else "off"


def _documents(items: Sequence[Item]) -> list[list[Item]]:
    """The questions of the n-th document of every task together. Samples of one index belong together, such as those of every depth; else documents do."""
    of_task: dict[str, dict[Any, list[Item]]] = {}
    for item in items:
        index = item.sample.meta.get("index", item.document)
        of_task.setdefault(item.task.name, {}).setdefault(index, []).append(item)
    columns = [list(found.values()) for found in of_task.values()]
    return [[item for column in columns for item in column[n]] for n in range(min(map(len, columns)))]
