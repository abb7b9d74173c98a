"""Several pass keys in one document, each asked for by its name: what one reading of a long document can tell about recall.

Reading a document takes most of the time of a question about it. Here it holds a key at every depth, and the questions are asked one by one after the
same document, which is read once. A key has to be told from the others, so that this is somewhat harder than one pass key (compare with the ceiling
inside the model's window), and keys of one document are not independent: count documents, not keys, when you look at an interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from longreach.evals.samples import fitting, haystack
from longreach.evals.samples.base import Parts, Sample, Settings, Task, generator
from longreach.evals.samples.budget import token_count
from longreach.evals.samples.fitting import FILLER
from longreach.evals.tasks.passkey import INSTRUCTION, number_tokens
from longreach.hf.interfaces import Tokenizer
from longreach.quantities import counted

NAMES = (
    "pass key,telephone number,locker code,bank account,house price,tower height,train ticket,lottery prize,ship weight,birth year,river depth,garden size,"
    "theatre seat,hotel room,airport gate,library card,engine speed,oven temperature,harvest total,concert score,page count,gold debt,tax bill,lucky figure"
).split(",")  # no two end in the same word: a small model finds a number by the words right before it
WORDING = haystack.Wording("The {name} is {key}. Remember it. {key} is the {name}.", "What is the {name}?", " The {name} is")


class PassKeys(Task):
    """One document for each length and index, with a number of `digits` digits under a name of its own at every depth; as many questions as depths.

    The filler is that of the pass key, or a passage of the user's text, which is followed by the question without the instruction. A sample is named by all
    the depths, for with others the document is another: a run that gets more depths asks everything anew.
    """

    name: ClassVar[str] = "passkeys"
    version: ClassVar[str] = "1"
    license: ClassVar[str] = "generated"
    source: ClassVar[str] = "the wording of arXiv 2305.16300, with a name for each key"
    options: ClassVar[Mapping[str, Any]] = {"digits": 5}

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        self.check(settings)
        digits = fitting.whole_number(self, settings, "digits")
        if digits > 100:
            raise ValueError(f"digits must be a whole number of 1 to 100, not {digits}")
        if len(settings.depths) > len(NAMES):
            raise ValueError(f"{self.name} has names for {len(NAMES)} keys in a document, not for {len(settings.depths)}; pass fewer depths")
        if len(settings.depths) > 9 * 10 ** (digits - 1):
            raise ValueError(f"there are no {len(settings.depths)} different numbers of {counted(digits, 'digit')}; pass --option digits={digits + 1}")
        return self._samples(tokenizer, settings, digits)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": float(haystack.number_in(prediction) == sample.references[0])}

    def _samples(self, tokenizer: Tokenizer, settings: Settings, digits: int) -> Iterator[Sample]:
        answer_tokens = max(12, number_tokens(tokenizer, digits) + 3)
        for length in settings.lengths:
            for index in range(settings.samples):
                rng = generator(settings, self.name, length, index)
                keys: dict[str, str] = {}
                for name in rng.sample(NAMES, len(settings.depths)):
                    keys[name] = fitting.fresh(lambda r: str(r.randrange(10 ** (digits - 1), 10**digits)), rng, set(keys.values()), settings.text or "")
                facts = [(depth, WORDING.statement.format(name=name, key=key)) for depth, (name, key) in zip(settings.depths, keys.items())]
                longest = max(keys, key=lambda name: token_count(tokenizer, Sample("", asked(Parts(""), name), ("",), 1, chat="prefix")))
                document = self._document(tokenizer, settings, facts, length, answer_tokens, longest, rng.random())
                one = f"{self.name}/{length}/{'-'.join(f'{depth:g}' for depth in settings.depths)}/{index}"  # other depths are another document
                for (depth, fact), (name, key) in zip(facts, keys.items()):
                    meta = {
                        "length_target": length, "depth": depth, "depth_actual": fitting.depth_of(document.document, fact), "seed": settings.seed,
                        "index": index, "name": name, "keys": len(keys),
                    }  # fmt: skip
                    yield Sample(f"{one}/{depth:g}", asked(document, name), (key,), answer_tokens, meta, chat="prefix")

    def _document(
        self, tokenizer: Tokenizer, settings: Settings, facts: list[tuple[float, str]], length: int, answer_tokens: int, longest: str, where: float
    ) -> Parts:
        """The document with all keys, as long as a question with the name `longest` leaves room for."""

        def sample(units: list[str], around: Parts) -> Sample:
            parts = replace(around, document=fitting.insert(units, facts, " "))
            return Sample(f"{self.name}/{length}", asked(parts, longest), ("",), answer_tokens, chat="prefix")

        if settings.text is None:
            around = Parts("", " ", f"{INSTRUCTION} ")
            return replace(fitting.fill(tokenizer, lambda slots: sample([FILLER] * slots, around), length).parts, query=" ", answer_prefix="")
        text = fitting.haystack_text(settings)
        passage = fitting.Passage(text, length, haystack.sentence_start(text, where))
        around = Parts("", "\n\n")
        found = fitting.fill(tokenizer, lambda pieces: sample(passage.sentences(pieces), around), length, most=passage.size)
        return replace(found.parts, query="\n\n", answer_prefix="")


def asked(document: Parts, name: str) -> Parts:
    """The document, with the question for one name after it. `query` of the document is what stands between the two."""
    return replace(document, query=document.query + WORDING.question.format(name=name), answer_prefix=WORDING.lead.format(name=name))

