"""Which layer of a model to look at: facts are hidden in chunks of a book, and every layer says how much of a chunk it puts before the sentence that answers.

The paper looks at the last layer. In a small model others may know better. Knows one chunk at a time; not long texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from longreach.apps.infiniretri import scores
from longreach.apps.infiniretri.prompt import Frame, Prompt, build
from longreach.apps.infiniretri.reading import InfiniRetri, paid_by
from longreach.apps.infiniretri.sentences import chunks
from longreach.evals.samples import haystack, words
from longreach.running import prompts
from longreach.running.loading import shipped_book

QUESTION = "What is the {name}?"


@dataclass(frozen=True)
class Calibration:
    """What was found.

    layer   the best one; of equals the last.
    needed  layer -> tokens of a chunk that have to be kept for the answer to be among them, on average.
    """

    layer: int
    needed: Mapping[int, float]


def calibrate(asking: InfiniRetri, text: str | None = None, samples: int = 8, seed: int = 0) -> Calibration:
    """Reads one chunk for every sample, with a fact of its own at a drawn place. `text`: to hide them in; the book in the package if not given.

    Raises ValueError for fewer than one sample, and for a text shorter than a chunk.
    """
    if samples < 1:
        raise ValueError(f"at least one sample is needed to compare layers, not {samples}")
    book, needed = shipped_book() if text is None else text, Counter[int]()
    lead = "" if prompts.has_template(asking.tokenizer) else " The {name} is"
    with asking.attached() as extension:
        for number in range(samples):
            rng = Random(f"{seed}:{number}")
            name, key = f"{rng.choice(words.NOUNS)} code of {words.two_words(rng)}", words.number(rng)
            frame = Frame.of(asking.tokenizer, (QUESTION + lead).format(name=name), asking.system)
            sizes = asking.sizes(extension, [frame], 16)
            passage = haystack.first_tokens(asking.tokenizer, book, haystack.sentence_start(book, rng.random()), sizes.chunk - 32)
            hidden = prompts.hide(passage, f"The {name} is {key}.", rng.random())
            chunk, _ = next(iter(chunks(asking.tokenizer, [hidden], sizes.chunk + sizes.memory, sizes.sentence)))
            prompt = build(asking.tokenizer, frame, chunk)
            [paid] = paid_by(extension, None, [prompt], 0)
            for layer, own in paid.items():
                found = scores.token_scores(own, prompt.question, prompt.context, asking.phrase)
                needed[layer] += before(prompt, scores.best(found, prompt.owners, len(found)), key)
    return Calibration(min(needed, key=lambda layer: (needed[layer], -layer)), {layer: total / samples for layer, total in sorted(needed.items())})


def before(prompt: Prompt, best: list[int], key: str) -> int:
    """Tokens of the best sentences, up to the first that has the key."""
    tokens, count = Counter(prompt.owners), 0
    for number in best:
        count += tokens[number]
        if key in prompt.sentences[number].text:
            break
    return count
