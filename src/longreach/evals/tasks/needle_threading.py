"""Needle Threading: values of UUID keys in a JSON object, single or several, and values that are keys in turn.

Definitions: Roberts et al. 2024, arXiv 2411.05000. The haystack generator is the published one; what is asked of it is drawn here, per sample,
since the release is data. The branched family is not in the release, and this variant of it is our own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from random import Random
from typing import Any, ClassVar
from uuid import UUID

from longreach.evals.samples import fitting
from longreach.evals.samples.base import Parts, Sample, Settings, Task, generator
from longreach.hf.interfaces import Tokenizer

DIRECTIONS = ("forward", "backward", "random")
_UUID = re.compile(r"(?<![0-9a-f])[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}(?![0-9a-f])")


@dataclass
class Pairs:
    """A haystack: keys and values in the order of the JSON object."""

    keys: list[str]
    values: list[str]

    @property
    def text(self) -> str:
        return json.dumps(dict(zip(self.keys, self.values)))


@dataclass
class Stream:
    """The pairs of one random stream, as many as are asked for: a short haystack is the beginning of a long one."""

    rng: Random

    def __post_init__(self) -> None:
        self._drawn: list[tuple[str, str]] = []

    def pairs(self, count: int) -> Pairs:
        while len(self._drawn) < count:
            key, value = (str(UUID(int=self.rng.getrandbits(128))) for _ in range(2))
            self._drawn.append((key, value))
        return Pairs([key for key, _ in self._drawn[:count]], [value for _, value in self._drawn[:count]])


def stream(settings: Settings, index: int) -> Stream:
    """The haystack of a repeat, the same for every length, depth and family. The first one of seed 0 is the published stream."""
    return Stream(Random(settings.seed) if index == 0 else generator(settings, "needle-threading", index))


@dataclass(frozen=True)
class Asked:
    """A question about a haystack. places are the pairs that hold its answer, as fractions of the haystack, in the order of the thread or of the keys."""

    question: str
    references: tuple[str, ...]
    places: tuple[float, ...]


class NeedleThreading(Task):
    group: ClassVar[str] = "needle-threading"
    license: ClassVar[str] = "generated; needs no data"
    source: ClassVar[str] = "arXiv 2411.05000"
    metric: ClassVar[str] = "accuracy"
    instruction: ClassVar[str]
    answers: ClassVar[str] = "value"  # or "values", written as a list

    def pairs_needed(self, settings: Settings) -> int:
        """Also checks the options."""
        raise NotImplementedError

    def ask(self, pairs: Pairs, rng: Random, settings: Settings, depth: float | None) -> Asked:
        """Writes the needles into the pairs."""
        raise NotImplementedError

    def depths(self, settings: Settings) -> tuple[float | None, ...]:
        return (None,)

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        self.check(settings)
        least = self.pairs_needed(settings)
        for length in settings.lengths:
            for index in range(settings.samples):
                haystack = stream(settings, index)
                for depth in self.depths(settings):
                    yield self._sample(tokenizer, settings, haystack, least, length, depth, index)

    def _sample(self, tokenizer: Tokenizer, settings: Settings, haystack: Stream, least: int, length: int, depth: float | None, index: int) -> Sample:
        key = (self.name, length, index) if depth is None else (self.name, length, depth, index)
        id = "/".join(f"{part:g}" if isinstance(part, float) else str(part) for part in key)

        def build(n: int) -> Sample:
            pairs = haystack.pairs(n)
            asked = self.ask(pairs, generator(settings, *key), settings, depth)
            many = self.answers == "values"
            cue = "The values, in brackets and in order, are:" if many else "The value is:"
            answer = f" [{', '.join(asked.references)}]" if many else f" {asked.references[0]}"
            parts = Parts(pairs.text, f"\n\n{asked.question} {cue}", f"{self.instruction}\n\n")
            meta: dict[str, Any] = {"length_target": length, "seed": settings.seed, "index": index, "pairs": n}
            if depth is not None:
                meta |= {"depth": depth, "depth_actual": asked.places[0]}
            else:
                meta["depths_actual"] = list(asked.places)
            return Sample(id, parts, asked.references, fitting.answer_tokens(tokenizer, answer, 100), meta, chat="user_turn")

        return fitting.fill(tokenizer, build, length, least)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        found = _UUID.findall(prediction.lower())
        if self.answers == "value":
            return {"accuracy": float(found[:1] == [sample.references[0]])}
        found = list(dict.fromkeys(found))
        right = len(set(found) & set(sample.references))
        precision, recall = right / len(found) if found else 0.0, right / len(sample.references)
        return {
            "accuracy": float(set(found) == set(sample.references)),
            "order": float(found == list(sample.references)),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall) if right else 0.0,
        }


class SingleNeedle(NeedleThreading):
    """The value of one key."""

    name: ClassVar[str] = "needle-threading-single"
    instruction: ClassVar[str] = "Find the value of one key in the JSON object below. Answer with the value only."

    def pairs_needed(self, settings: Settings) -> int:
        return 1

    def depths(self, settings: Settings) -> tuple[float | None, ...]:
        return settings.depths

    def ask(self, pairs: Pairs, rng: Random, settings: Settings, depth: float | None) -> Asked:
        at = floor((depth or 0.0) * (len(pairs.keys) - 1))
        return Asked(f'The key is "{pairs.keys[at]}".', (pairs.values[at],), fractions(pairs, [at]))


class MultipleNeedles(NeedleThreading):
    """The values of `needles` keys, in the order of the keys. placement: "random", or "clustered" next to each other."""

    name: ClassVar[str] = "needle-threading-multiple"
    options: ClassVar[dict[str, Any]] = {"needles": 5, "placement": "random"}
    instruction: ClassVar[str] = "Find the values of several keys in the JSON object below. Answer with a list of the values only, in the order of the keys."
    answers: ClassVar[str] = "values"

    def pairs_needed(self, settings: Settings) -> int:
        fitting.one_of(self, settings, "placement", ("random", "clustered"))
        return fitting.whole_number(self, settings, "needles")

    def ask(self, pairs: Pairs, rng: Random, settings: Settings, depth: float | None) -> Asked:
        count, n = self.pairs_needed(settings), len(pairs.keys)
        if self.option(settings, "placement") == "clustered":
            first = floor(rng.random() * (n - count + 1))
            at = list(range(first, first + count))
            rng.shuffle(at)
        else:
            at = rng.sample(range(n), count)
        named = ", ".join(f'"{pairs.keys[i]}"' for i in at)
        return Asked(f"The keys are {named}.", tuple(pairs.values[i] for i in at), fractions(pairs, at))


class ConditionalNeedles(NeedleThreading):
    """The values of all keys that hold a character; `needles` keys were given it, within them."""

    name: ClassVar[str] = "needle-threading-conditional"
    options: ClassVar[dict[str, Any]] = {"needles": 5, "character": "*"}
    instruction: ClassVar[str] = "Find the values of all keys with a special character in the JSON object below. Answer with a list of the values only."
    answers: ClassVar[str] = "values"

    def pairs_needed(self, settings: Settings) -> int:
        character = self.option(settings, "character")
        if not isinstance(character, str) or len(character) != 1 or character in '0123456789abcdef-"\\':
            raise ValueError(f"{self.name} needs one character that no UUID has and JSON does not escape, such as '*', not {character!r}")
        return fitting.whole_number(self, settings, "needles")

    def ask(self, pairs: Pairs, rng: Random, settings: Settings, depth: float | None) -> Asked:
        character = self.option(settings, "character")
        at = sorted(rng.sample(range(len(pairs.keys)), self.pairs_needed(settings)))
        for i in at:
            cut = rng.randrange(1, len(pairs.keys[i]))
            pairs.keys[i] = pairs.keys[i][:cut] + character + pairs.keys[i][cut:]
        return Asked(f'The keys are those that contain the character "{character}".', tuple(pairs.values[i] for i in at), fractions(pairs, at))


class Thread(NeedleThreading):
    """The value of a key is a key again, for `steps` times; what is the last value? direction: the next key lies "forward", "backward" or at "random"."""

    name: ClassVar[str] = "needle-threading-thread"
    options: ClassVar[dict[str, Any]] = {"steps": 5, "direction": "forward"}
    instruction: ClassVar[str] = (
        "The value of a key in the JSON object below can be another key of it. Go from the given key to its value, from there on to its value, "
        "and so on until a value is no key. Answer with this last value only."
    )

    def pairs_needed(self, settings: Settings) -> int:
        fitting.one_of(self, settings, "direction", DIRECTIONS)
        return fitting.whole_number(self, settings, "steps") + 1

    def ask(self, pairs: Pairs, rng: Random, settings: Settings, depth: float | None) -> Asked:
        at = thread(pairs, rng.sample(range(len(pairs.keys)), self.pairs_needed(settings)), self.option(settings, "direction"))
        return Asked(f'The given key is "{pairs.keys[at[0]]}".', (pairs.values[at[-1]],), fractions(pairs, at))


class MultiThread(NeedleThreading):
    """Several threads that have no pair in common; the last value of each."""

    name: ClassVar[str] = "needle-threading-multi-thread"
    options: ClassVar[dict[str, Any]] = {"threads": 2, "steps": 4, "direction": "forward"}
    instruction: ClassVar[str] = Thread.instruction.replace("the given key", "each given key").replace("this last value only", "a list of the last values only")
    answers: ClassVar[str] = "values"

    def pairs_needed(self, settings: Settings) -> int:
        fitting.one_of(self, settings, "direction", DIRECTIONS)
        return fitting.whole_number(self, settings, "threads") * (fitting.whole_number(self, settings, "steps") + 1)

    def ask(self, pairs: Pairs, rng: Random, settings: Settings, depth: float | None) -> Asked:
        drawn, each = rng.sample(range(len(pairs.keys)), self.pairs_needed(settings)), self.option(settings, "steps") + 1
        threads = [thread(pairs, drawn[i : i + each], self.option(settings, "direction")) for i in range(0, len(drawn), each)]
        named = ", ".join(f'"{pairs.keys[at[0]]}"' for at in threads)
        return Asked(f"The given keys are {named}.", tuple(pairs.values[at[-1]] for at in threads), fractions(pairs, [i for at in threads for i in at]))


class BranchedThread(NeedleThreading):
    """A thread whose keys name `branches` further keys each, "k1, k2"; one way alone is the longest, with `steps` steps. What is its last value?

    A side way ends at least one step earlier, so the last step of the main way has none.
    """

    name: ClassVar[str] = "needle-threading-branched"
    options: ClassVar[dict[str, Any]] = {"steps": 3, "branches": 2}
    instruction: ClassVar[str] = (
        "The value of a key in the JSON object below can be another key of it, or several, with commas between them. Start at the given key and follow "
        "every way, from key to key, until a value is no key. One way takes the most steps. Answer with the value at its end only."
    )

    def pairs_needed(self, settings: Settings) -> int:
        """For side ways as long as they can be."""
        steps, branches = (fitting.whole_number(self, settings, option) for option in ("steps", "branches"))
        return steps + 1 + (branches - 1) * sum(range(1, steps))

    def ask(self, pairs: Pairs, rng: Random, settings: Settings, depth: float | None) -> Asked:
        free = rng.sample(range(len(pairs.keys)), self.pairs_needed(settings))
        steps, branches = self.option(settings, "steps"), self.option(settings, "branches")
        main, free = free[: steps + 1], free[steps + 1 :]
        for step, (here, following) in enumerate(pairwise(main)):
            ways = [following]
            remaining = steps - step
            for _ in range(branches - 1 if remaining > 1 else 0):
                side = rng.randint(1, remaining - 1)
                ways.append(thread(pairs, free[:side], "random")[0])
                free = free[side:]
            rng.shuffle(ways)
            pairs.values[here] = ", ".join(pairs.keys[i] for i in ways)
        return Asked(f'The given key is "{pairs.keys[main[0]]}".', (pairs.values[main[-1]],), fractions(pairs, main))


def thread(pairs: Pairs, at: list[int], direction: str) -> list[int]:
    """Make the value of each place the key of the next one; the last keeps its value. -> the places in the order of the thread."""
    if direction != "random":
        at = sorted(at, reverse=direction == "backward")
    for here, following in pairwise(at):
        pairs.values[here] = pairs.keys[following]
    return at


def fractions(pairs: Pairs, at: list[int]) -> tuple[float, ...]:
    return tuple(round(i / max(1, len(pairs.keys) - 1), 4) for i in at)
