"""RULER's variable tracking: a value handed from variable to variable, among noise; which variables hold it?"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from random import Random
from string import ascii_uppercase
from typing import Any, ClassVar

from longreach.evals import fitting
from longreach.evals.base import Parts, Sample, Settings, generator
from longreach.evals.tasks.ruler import Ruler

ANNOUNCED = "Keep track of the variables that get a value in the text below.\n\n"
EXAMPLE_TOKENS = 500
Chain = tuple[str, list[str]]  # a value and the variables that hold it


class VariableTracking(Ruler):
    """One worked example of at most 500 tokens (a quarter of the length where that is less), the same for all samples of a length, then the task.

    chains  of variables; the first is asked for, the others distract.
    hops    from the first variable of a chain to its last.

    Noise is one line repeated, or the sentences of the user's text.
    """

    name: ClassVar[str] = "ruler-vt"
    options: ClassVar[dict[str, Any]] = {"chains": 1, "hops": 4}
    new_tokens: ClassVar[int] = 30

    def samples(self, tokenizer: Any, settings: Settings) -> Iterator[Sample]:
        fitting.check_options(self, settings)
        text = fitting.haystack_text(settings) if settings.text is not None else ""
        for length in settings.lengths:
            example = self._example(tokenizer, settings, length)
            noise = fitting.Passage(text, length).sentences() if text else None
            for index in range(settings.samples):
                rng = generator(settings, self.name, length, index)
                yield self._sample(tokenizer, settings, f"{self.name}/{length}/{index}", rng, 5, text, noise, length, example, {"index": index})

    def _example(self, tokenizer: Any, settings: Settings, length: int) -> str:
        rng = generator(settings, self.name, "example")
        wanted = min(EXAMPLE_TOKENS, length // 4)
        sample = self._sample(tokenizer, settings, f"{self.name}/example", rng, 3, "", None, wanted, None, {})
        return f"{sample.parts.text} {', '.join(sample.references)}\n\n"

    def _sample(
        self,
        tokenizer: Any,
        settings: Settings,
        id: str,
        rng: Random,
        letters: int,
        text: str,
        noise: list[str] | None,
        length: int,
        example: str | None,
        meta: dict[str, Any],
    ) -> Sample:
        """A sample, or without an `example` the example itself, which may be longer than `length` if even the shortest one is."""
        count, hops = (fitting.whole_number(self, settings, option) for option in ("chains", "hops"))
        chains = draw_chains(rng, count, hops, letters, text + (example or ""))
        statements = interleave(rng, chains)
        value, references = chains[0][0], tuple(chains[0][1])
        query = f"\nQuestion: Which variables of the text above hold the value {value}?"
        begun = f" Answer: {len(references)} variables of the text above hold the value {value}. They are:"
        spread = rng.getrandbits(64)
        new_tokens = fitting.answer_tokens(tokenizer, f" {', '.join(references)}", self.new_tokens)

        def build(n: int) -> Sample:
            lines = [f"{line}\n" for line in (noise[:n] if noise is not None else [fitting.NOISE] * n)]
            if len(lines) <= len(statements) and noise is None:
                lines = [f"{sentence.rstrip('.')}.\n" for line in lines for sentence in line.strip().split(". ")]
            for j, place in enumerate(sorted(Random(spread).sample(range(len(lines)), len(statements)))):
                lines.insert(place + j, statements[j])
            document = " ".join(lines).replace(". \n", ".\n")
            actual = [fitting.depth_of(document, f"VAR {name} =") for name in references]
            found = {"length_target": length, "seed": settings.seed, "depths_actual": actual} | meta
            return Sample(id, Parts(document, query, (example or "") + ANNOUNCED, begun), references, new_tokens, found, chat="prefix")

        least = len(statements) if noise is not None else -(-len(statements) // 5)  # the noise has five sentences
        if noise is not None and len(noise) < least:
            raise ValueError(f"{id}: the text has fewer sentences than there are statements, {least}; pass a longer text")
        if example is None:
            shortest = build(least)
            length = max(length, fitting.token_count(tokenizer, shortest) + shortest.max_new_tokens)
        return fitting.fill(tokenizer, build, length, least, None if noise is None else len(noise))


def draw_chains(rng: Random, count: int, hops: int, letters: int, text: str = "") -> list[Chain]:
    """Chains of hops + 1 variables each; no value and no variable twice, none of them in the text."""
    values: list[str] = []
    names: list[str] = []
    for _ in range(count):
        values.append(fitting.fresh(lambda rng: str(rng.randrange(10_000, 99_999)), rng, values, text))
        for _ in range(hops + 1):
            names.append(fitting.fresh(lambda rng: "".join(rng.choices(ascii_uppercase, k=letters)), rng, [*names, "VAR"], text))
    return [(value, names[i * (hops + 1) : (i + 1) * (hops + 1)]) for i, value in enumerate(values)]


def interleave(rng: Random, chains: list[Chain]) -> list[str]:
    """The statements of all chains, mixed, each chain in its order."""
    waiting = [
        [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in pairwise(names))]  # the blank at the end as published
        for value, names in chains
    ]
    turns = [i for i, statements in enumerate(waiting) for _ in statements]
    rng.shuffle(turns)
    return [waiting[i].pop(0) for i in turns]
