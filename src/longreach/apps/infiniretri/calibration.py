"""Which layer of a model to look at: facts are hidden in chunks of a book, and every layer says how much of a chunk it puts before the sentence that answers.

The paper looks at the last layer. In a small model others may know better, and need less of it to be computed. Knows one chunk at a time; not long texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from random import Random

from longreach.apps.infiniretri import scores
from longreach.apps.infiniretri.paid import paid_by
from longreach.apps.infiniretri.prompt import Frame, Prompt, build
from longreach.apps.infiniretri.sentences import chunks
from longreach.apps.infiniretri.sizes import Sizes
from longreach.evals.samples import haystack, words
from longreach.hf.extension import Extension
from longreach.hf.interfaces import Tokenizer
from longreach.running import prompts
from longreach.running.loading import shipped_book

QUESTION = "What is the {name}?"
NEW = 16  # tokens that an answer would have
SLACK = 1.25  # of what the best layer needs


@dataclass(frozen=True)
class Calibration:
    """What was found.

    layer   the first that needs at most a quarter more than the best, for a forward ends there.
    needed  layer -> tokens of a chunk that have to be kept for the answer to be among them, on average.
    """

    layer: int
    needed: Mapping[int, float]


def calibrate(
    extension: Extension, tokenizer: Tokenizer, sizes: Callable[[Frame], Sizes], layers: Collection[int], phrase: int, system: str | None = None,
    text: str | None = None, samples: int = 8, seed: int = 0,
) -> Calibration:  # fmt: skip
    """Reads one chunk for every sample, with a fact of its own at a drawn place. `text`: to hide them in; the book in the package if not given.

    Raises ValueError for fewer than one sample, and for a text shorter than a chunk.
    """
    if samples < 1:
        raise ValueError(f"at least one sample is needed to compare layers, not {samples}")
    book, needed = shipped_book() if text is None else text, Counter[int]()
    lead = "" if prompts.has_template(tokenizer) else " The {name} is"
    for number in range(samples):
        rng = Random(f"{seed}:{number}")
        name, key = f"{rng.choice(words.NOUNS)} code of {words.two_words(rng)}", words.number(rng)
        frame = Frame.of(tokenizer, QUESTION.format(name=name), system, lead.format(name=name))
        size = sizes(frame)
        passage = haystack.first_tokens(tokenizer, book, haystack.sentence_start(book, rng.random()), max(size.chunk - 32, size.chunk // 2))
        hidden = prompts.hide(passage, f"The {name} is {key}.", rng.random())
        chunk, _ = next(iter(chunks(tokenizer, [hidden], size.chunk + size.memory, size.sentence)))
        prompt = build(tokenizer, frame, chunk)
        [paid] = paid_by(extension, layers, [prompt], 0)
        for layer, own in paid.items():
            found = scores.token_scores(own, prompt.question, prompt.context, phrase)
            needed[layer] += before(prompt, scores.best(found, prompt.owners, len(found)), key)
    enough = SLACK * min(needed.values())
    return Calibration(min(layer for layer, total in needed.items() if total <= enough), {layer: total / samples for layer, total in sorted(needed.items())})


def before(prompt: Prompt, best: list[int], key: str) -> int:
    """Tokens of the best sentences, up to the first that has the key."""
    tokens, count = Counter(prompt.owners), 0
    for number in best:
        count += tokens[number]
        if key in prompt.sentences[number].text:
            break
    return count
