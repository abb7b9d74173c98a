"""The pass key: a number hidden in text that repeats itself, and asked back. Our protocol, and the four published ones.

The text of the prompt is that of Mohtashami and Jaggi (arXiv 2305.16300), which all of them share; they differ in how it is filled up, which
numbers are hidden, where, and what counts as an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from longreach.evals.samples import fitting, haystack
from longreach.evals.samples.base import Parts, Sample, Settings, Task, generator
from longreach.evals.samples.fitting import FILLER
from longreach.evals.scores import scorers
from longreach.hf.interfaces import Tokenizer

INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important information there."
)
STATEMENT, QUESTION, LEAD = haystack.PASS_KEY.statement, haystack.PASS_KEY.question, haystack.PASS_KEY.lead


class PassKey(Task):
    """`style` chooses the protocol.

    longreach      depths are shares of the filler's slots, a key of `digits` digits without leading zero, prompt and answer fit the length.
                   With a text of the user, the key is hidden in a passage of it instead of the filler.
    lm-infinite    LM-Infinite's script: numpy's generator seeded with the length, a number below 10^7 at a random place, and its count of filler,
                   which leaves the instruction out, so that prompts are somewhat longer than the length. Seven new tokens, compared as a number.
    selfextend     keys of `digits` digits at each depth, found if they are anywhere in the answer; with `data`, the rows of SelfExtend's file.
    yarn           filler cut at any character, a number of 1 to 50000 at a random place, ten new tokens, compared as a number.
    infinitebench  lines of filler, a key of five digits at each depth, six new tokens.
    """

    name: ClassVar[str] = "passkey"
    version: ClassVar[str] = "2"
    license: ClassVar[str] = "generated"
    source: ClassVar[str] = "arXiv 2305.16300, 2308.16137, 2401.01325, 2309.00071, 2402.13718"
    options: ClassVar[dict[str, Any]] = {"style": "longreach", "digits": 5}

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        styles: dict[str, Callable[[Any, Settings], Iterator[Sample]]] = {
            "longreach": self._own,
            "lm-infinite": self._lm_infinite,
            "selfextend": self._selfextend,
            "yarn": self._yarn,
            "infinitebench": self._infinitebench,
        }
        self.check(settings)
        style, digits = self.option(settings, "style"), self.option(settings, "digits")
        if style not in styles:
            raise ValueError(f"passkey has no style {style!r}; choose one of {', '.join(styles)}")
        if not isinstance(digits, int) or not 1 <= digits <= 100:
            raise ValueError(f"digits must be a whole number of 1 to 100, not {digits!r}")
        if settings.text is not None and style != "longreach":
            raise ValueError(f"the style {style} has a filler of its own; leave out the text, or use the style longreach")
        return styles[style](tokenizer, settings)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        wanted, style = sample.references[0], sample.meta["style"]
        if style == "selfextend":
            return {"accuracy": float(wanted in prediction)}
        if style == "infinitebench":  # the digits of ASCII alone
            return {"accuracy": float(scorers.first_int(prediction) == wanted)}
        found = haystack.number_in(scorers.first_line(prediction) if style == "lm-infinite" else prediction)
        if style in ("lm-infinite", "yarn"):  # a number and not a word: zeros before it do not count
            return {"accuracy": float(found is not None and scorers.whole(found) == int(wanted))}
        return {"accuracy": float(found == wanted)}

    def _own(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        digits = self.option(settings, "digits")
        answer_tokens = max(12, number_tokens(tokenizer, digits) + 3)
        for length, depth, index in grid(settings):
            rng = generator(settings, self.name, length, depth, index)
            key = str(rng.randrange(10 ** (digits - 1), 10**digits))
            if settings.text is None:
                yield self._among_slots(tokenizer, frame(" "), " ", key, answer_tokens, settings, length, depth, index, "longreach")
            else:
                yield self._in_passage(tokenizer, settings.text, key, answer_tokens, settings, length, depth, index, rng.random())

    def _lm_infinite(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        for length in settings.lengths:
            for index, (key, position, slots) in enumerate(lm_infinite_draws(tokenizer, length, settings.samples, settings.seed)):
                document = " ".join([FILLER] * position + [STATEMENT.format(key=key)] + [FILLER] * (slots - position))
                parts = replace(frame(" "), document=document, answer_prefix=f"{LEAD} ")
                yield self._sample(parts, key, 7, settings, length, None, index, "lm-infinite")

    def _selfextend(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        if settings.data is not None:
            yield from self._selfextend_rows(tokenizer, settings)
            return
        digits = self.option(settings, "digits")
        answer_tokens = number_tokens(tokenizer, digits)
        for length, depth, index in grid(settings):
            key = str(generator(settings, self.name, "selfextend", length, depth, index).randrange(10 ** (digits - 1), 10**digits))
            yield self._among_slots(tokenizer, frame("\n"), "\n", key, answer_tokens, settings, length, depth, index, "selfextend")

    def _selfextend_rows(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        assert settings.data is not None
        path = Path(settings.data).expanduser()
        if not path.is_file():
            raise ValueError(f"there is no file {settings.data!r}; pass the jsonl file with the fields input and target")
        for index, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            row = json.loads(line)
            if not {"input", "target"} <= row.keys():
                raise ValueError(f"line {index + 1} of {settings.data!r} lacks the fields input and target; pass SelfExtend's file of pass keys")
            key = str(row["target"])
            count = len(tokenizer(key, add_special_tokens=False)["input_ids"])
            meta = {"style": "selfextend", "passkey_position": row.get("passkey_position")}
            yield Sample(f"{self.name}/selfextend/row{index}", Parts(row["input"]), (key,), count, meta)

    def _yarn(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        for length in settings.lengths:
            for index in range(settings.samples):
                rng = generator(settings, self.name, "yarn", length, index)
                key, where = str(rng.randint(1, 50000)), rng.random()
                yield fitting.fill(tokenizer, partial(self._garbage, key, where, settings, length, index), length)

    def _garbage(self, key: str, where: float, settings: Settings, length: int, index: int, characters: int) -> Sample:
        garbage = " ".join([FILLER] * (characters // len(FILLER) + 1))
        before = round(where * characters)
        document = f"{garbage[:before]}\n{STATEMENT.format(key=key)}\n{garbage[: characters - before]}"
        return self._sample(replace(frame("\n"), document=document), key, 10, settings, length, None, index, "yarn")

    def _infinitebench(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        for length, depth, index in grid(settings):
            key = str(generator(settings, self.name, "infinitebench", length, depth, index).randrange(10**4, 10**5))
            yield self._among_slots(tokenizer, frame("\n\n"), "\n", key, 6, settings, length, depth, index, "infinitebench")

    def _among_slots(
        self, tokenizer: Tokenizer, around: Parts, joint: str, key: str, new: int, settings: Settings, length: int, depth: float, index: int, style: str
    ) -> Sample:
        """As much filler as fits, with the statement after the share `depth` of its slots."""

        def build(slots: int) -> Sample:
            before = round(depth * slots)
            document = joint.join([FILLER] * before + [STATEMENT.format(key=key)] + [FILLER] * (slots - before))
            return self._sample(replace(around, document=document), key, new, settings, length, depth, index, style)

        return fitting.fill(tokenizer, build, length)

    def _in_passage(
        self, tokenizer: Tokenizer, text: str, key: str, new: int, settings: Settings, length: int, depth: float, index: int, where: float
    ) -> Sample:
        """The statement in a passage of a text that the user gave, asked for as the demonstration does."""

        def build(document: str) -> Sample:
            return self._sample(Parts(document, f"\n\n{QUESTION}", "", LEAD), key, new, settings, length, depth, index, "longreach")

        return haystack.passage_with(tokenizer, text, haystack.sentence_start(text, where), STATEMENT.format(key=key), depth, length, build)

    def _sample(self, parts: Parts, key: str, new: int, settings: Settings, length: int, depth: float | None, index: int, style: str) -> Sample:
        where = "" if depth is None else f"/{depth:g}"
        actual = fitting.depth_of(parts.document, STATEMENT.format(key=key))
        meta = {"length_target": length, "depth": depth, "depth_actual": actual, "seed": settings.seed, "index": index, "style": style}
        return Sample(f"{self.name}/{style}/{length}{where}/{index}", parts, (key,), new, meta, chat="prefix")


def frame(joint: str) -> Parts:
    """The prompt around the document."""
    return Parts("", joint + QUESTION, INSTRUCTION + joint, LEAD)


def grid(settings: Settings) -> Iterator[tuple[int, float, int]]:
    """(length, depth, index) of every sample."""
    for length in settings.lengths:
        for depth in settings.depths:
            for index in range(settings.samples):
                yield length, depth, index


def number_tokens(tokenizer: Tokenizer, digits: int) -> int:
    """The tokens of a number with so many digits; the greater of a repetitive and of an irregular one."""
    return max(len(tokenizer(" " + (pattern * digits)[:digits], add_special_tokens=False)["input_ids"]) for pattern in ("8", "7293046158"))


def lm_infinite_draws(tokenizer: Tokenizer, length: int, samples: int, seed: int = 0) -> Iterator[tuple[str, int, int]]:
    """(key, number of filler sentences before it, in all) as LM-Infinite's script draws them; seed 0 is the script's own."""
    from numpy.random import RandomState

    rng = RandomState(length + seed)
    filler = len(tokenizer(FILLER, add_special_tokens=False)["input_ids"])
    for _ in range(samples):
        key = str(rng.randint(1, 10**7))
        statement = len(tokenizer(STATEMENT.format(key=key), add_special_tokens=False)["input_ids"])
        slots = (length - statement - 2) // filler  # the script takes the length of the tokenizer's dictionary, 2, for that of the instruction
        if slots < 1:
            raise ValueError(f"no filler fits beside the pass key into {length} tokens with this tokenizer; choose a greater length")
        yield key, int(rng.randint(0, slots)), slots
