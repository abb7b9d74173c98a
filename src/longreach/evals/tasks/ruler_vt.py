"""RULER's variable tracking: a value handed from variable to variable, among noise; which variables hold it?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_uppercase
from typing import Any, ClassVar

from longreach.evals.samples import fitting
from longreach.evals.samples.base import Parts, Sample, Settings, generator
from longreach.evals.tasks.ruler import Ruler
from longreach.hf.interfaces import Tokenizer

ANNOUNCED = "Keep track of the variables that get a value in the text below.\n\n"
EXAMPLE_TOKENS = 500
NOISE_SENTENCES = [f"{sentence.rstrip('.')}.\n" for sentence in fitting.FILLER.split(". ")]


@dataclass(frozen=True)
class Puzzle:
    """Statements in the order in which they are hidden, a value, and the variables that hold it. spread: the seed of the hiding places."""

    statements: tuple[str, ...]
    value: str
    references: tuple[str, ...]
    spread: int

    def document(self, lines: list[str]) -> str:
        """The lines with the statements at drawn places; there must be as many lines at least."""
        lines = list(lines)
        for j, place in enumerate(sorted(Random(self.spread).sample(range(len(lines)), len(self.statements)))):
            lines.insert(place + j, self.statements[j])
        return " ".join(lines).replace(". \n", ".\n")

    def parts(self, lines: list[str], example: str) -> Parts:
        query = f"\nQuestion: Which variables of the text above hold the value {self.value}?"
        begun = f" Answer: {len(self.references)} variables of the text above hold the value {self.value}. They are:"
        return Parts(self.document(lines), query, example + ANNOUNCED, begun)


class VariableTracking(Ruler):
    """One worked example of at most 500 tokens (a quarter of the length where that is less), the same for all samples of a length, then the task.

    chains  of variables; the first is asked for, the others distract.
    hops    from the first variable of a chain to its last.

    Noise is one line repeated, or the sentences of the user's text.
    """

    name: ClassVar[str] = "ruler-vt"
    options: ClassVar[dict[str, Any]] = {"chains": 1, "hops": 4}
    new_tokens: ClassVar[int] = 30

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        self.check(settings)
        text = fitting.haystack_text(settings) if settings.text is not None else ""
        for length in settings.lengths:
            example = self._example(tokenizer, settings, length)
            noise = fitting.Passage(text, length).sentences() if text else None
            for index in range(settings.samples):
                yield self._sample(tokenizer, settings, text, noise, length, index, example)

    def _example(self, tokenizer: Tokenizer, settings: Settings, length: int) -> str:
        puzzle = self._puzzle(settings, generator(settings, self.name, "example"), 3, "")
        solved = f" {', '.join(puzzle.references)}\n\n"

        def build(n: int) -> Sample:
            parts = puzzle.parts(noise_lines(n, len(puzzle.statements)), "")
            return Sample(f"{self.name}/example", Parts(parts.text + solved), puzzle.references, 0)

        least = fewest_lines(puzzle)
        wanted = min(EXAMPLE_TOKENS, length // 4)
        return fitting.fill(tokenizer, build, max(wanted, fitting.needs(tokenizer, build(least))), least).parts.document

    def _sample(self, tokenizer: Tokenizer, settings: Settings, text: str, noise: list[str] | None, length: int, index: int, example: str) -> Sample:
        puzzle = self._puzzle(settings, generator(settings, self.name, length, index), 5, text + example)
        new_tokens = fitting.answer_tokens(tokenizer, f" {', '.join(puzzle.references)}", self.new_tokens)
        id = f"{self.name}/{length}/{index}"

        def build(n: int) -> Sample:
            lines = noise_lines(n, len(puzzle.statements)) if noise is None else [f"{line}\n" for line in noise[:n]]
            parts = puzzle.parts(lines, example)
            actual = [fitting.depth_of(parts.document, f"VAR {name} =") for name in puzzle.references]
            meta = {"length_target": length, "seed": settings.seed, "index": index, "depths_actual": actual}
            return Sample(id, parts, puzzle.references, new_tokens, meta, chat="prefix")

        if noise is None:
            return fitting.fill(tokenizer, build, length, fewest_lines(puzzle))
        if len(noise) < len(puzzle.statements):
            raise ValueError(f"{id}: the text has fewer sentences than there are statements, {len(puzzle.statements)}; choose a greater length or fewer hops")
        return fitting.fill(tokenizer, build, length, len(puzzle.statements), len(noise))

    def _puzzle(self, settings: Settings, rng: Random, letters: int, text: str) -> Puzzle:
        """Chains of hops + 1 variables, mixed, each chain in its order; no value and no variable twice, none of them in the text."""
        chains, hops = (fitting.whole_number(self, settings, option) for option in ("chains", "hops"))
        values: list[str] = []
        names: list[str] = []
        for _ in range(chains):
            values.append(fitting.fresh(lambda rng: str(rng.randrange(10_000, 99_999)), rng, values, text))
        for _ in range(chains * (hops + 1)):
            names.append(fitting.fresh(lambda rng: "".join(rng.choices(ascii_uppercase, k=letters)), rng, [*names, "VAR"], text))
        owned = [names[i : i + hops + 1] for i in range(0, len(names), hops + 1)]
        waiting = [
            [f"VAR {chain[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in pairwise(chain))]  # the blank at the end as published
            for value, chain in zip(values, owned)
        ]
        turns = [i for i, statements in enumerate(waiting) for _ in statements]
        rng.shuffle(turns)
        return Puzzle(tuple(waiting[i].pop(0) for i in turns), values[0], tuple(owned[0]), rng.getrandbits(64))


def noise_lines(n: int, statements: int) -> list[str]:
    """n times the noise, in its sentences if there are not more lines than statements."""
    return NOISE_SENTENCES * n if n <= statements else [f"{fitting.FILLER}\n"] * n


def fewest_lines(puzzle: Puzzle) -> int:
    return -(-len(puzzle.statements) // len(NOISE_SENTENCES))
