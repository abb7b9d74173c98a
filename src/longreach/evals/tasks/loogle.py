"""LooGLE (arXiv 2311.04939): its automatic scores ROUGE-L, token F1 and cloze matches. Those that need another model as a judge are left out.

The prompts are our own words. The official script decodes with a repetition penalty of 2, which harms the copying of long names; ours is greedy.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from longreach.evals.samples import data
from longreach.evals.samples.base import Parts, Sample, Settings, Task
from longreach.evals.scores import scorers
from longreach.hf.interfaces import Tokenizer

COLUMNS: data.Columns = {"input": str, "qa_pairs": (str, list), "output": (str, list)}
MASK = re.compile(r"<mask-\d+>")


class LooGLE(Task):
    """One data set of LooGLE. Its rows are documents with many questions each."""

    group = "loogle"
    version = "2"
    license = "MIT (code); the texts have licences of their own"
    source = "arXiv 2311.04939, bigainlco/LooGLE"
    needs_data = True
    metric = "rouge_l_recall"

    config: ClassVar[str]
    tokens: ClassVar[int]
    ask: ClassVar[str] = "Read the text below and answer a question about it."

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        data.refuse_lengths(self, settings)
        config = self.config
        source = data.Source("bigainlco/LooGLE", (f"{config}.jsonl", f"{config}/test*.parquet", f"{config}*.parquet"), COLUMNS)
        asked = []
        for number, row in enumerate(data.rows(source, settings, self.group)):
            asked += [(number, index, row["input"], *rest) for index, rest in enumerate(self.questions(row, f"{self.name}, row {number + 1}"))]
        for number, index, document, question, references, meta in data.pick(asked, settings, self.name):
            parts = Parts(document, f"\n\n{question}", f"{self.ask}\n\n")
            yield Sample(f"{self.name}:{number}:{index}", parts, references, self.tokens, {"document": number, **meta}, chat="user_turn")

    def questions(self, row: data.Row, where: str) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
        """-> (question, references, meta)"""
        for pair in pairs(row, where):
            meta = {"type": pair["type"]} if isinstance(pair.get("type"), str) else {}
            yield f"Question: {pair['Q']}\nAnswer:", data.strings(pair["A"]), meta

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        said = prediction or "None"  # as published
        found = [scorers.rouge_l_set(said, reference) for reference in sample.references]
        return {
            "rouge_l_recall": max((r.recall for r in found), default=0.0),
            "rouge_l": max((r.f for r in found), default=0.0),
            "f1": scorers.best(scorers.token_f1, prediction, sample.references),
        }


def pairs(row: data.Row, where: str) -> list[Mapping[str, Any]]:
    """The questions of a row. In the official files they are a list written as text."""
    found = data.literal(row["qa_pairs"], where)
    if not isinstance(found, list) or not all(isinstance(pair, dict) and isinstance(pair.get("Q"), str) and "A" in pair for pair in found):
        raise ValueError(f"{where}: qa_pairs is not a list of questions Q with answers A; this is not the official format")
    return found


class ShortQA(LooGLE):
    name, config, tokens = "loogle-shortdep-qa", "shortdep_qa", 300


class LongQA(LooGLE):
    name, config, tokens = "loogle-longdep-qa", "longdep_qa", 500


class Summarization(LooGLE):
    name, config, tokens = "loogle-longdep-summarization", "longdep_summarization", 500
    ask = "Write a summary of the text below."

    def questions(self, row: data.Row, where: str) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
        yield "Summary:", data.strings(row["output"]), {}


class Cloze(LooGLE):
    """Names are masked in a passage about the document. `exact` and `partial` are shares of the masks of a question; the published numbers weigh
    questions by their masks, which are in the meta for that. An answer counts if all of it is a dictionary as Python writes it; exactly right is the
    same string, right in part a word in common.
    """

    name, config, tokens, metric = "loogle-shortdep-cloze", "shortdep_cloze", 50, "exact"
    ask = "Read the text below. Then fill in what is masked in a passage about it."

    def questions(self, row: data.Row, where: str) -> Iterator[tuple[str, tuple[str, ...], dict[str, Any]]]:
        for pair in pairs(row, where):
            names = data.literal(pair["A"], where)
            if not isinstance(names, dict) or not names or not all(isinstance(mask, str) and MASK.fullmatch(mask.strip()) for mask in names):
                raise ValueError(f"{where}: the answer of a cloze question is not a mapping of <mask-n> to names; this is not the official format")
            names = {mask: str(name) for mask, name in names.items()}
            ask = 'Which names are masked? Answer in the form {"<mask-0>": "name"}, with an entry for every mask.'
            yield f"Passage: {pair['Q']}\n\n{ask}\nAnswer:", tuple(names.values()), {"masks": list(names)}

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        filled = filled_in(prediction)
        pairs = [(filled.get(mask), name) for mask, name in zip(sample.meta["masks"], sample.references)]
        exact = sum(given == name for given, name in pairs)
        partial = sum(isinstance(given, str) and not set(given.split()).isdisjoint(name.split()) for given, name in pairs)
        return {"exact": exact / len(pairs), "partial": partial / len(pairs)}


def filled_in(answer: str) -> dict[Any, Any]:
    """The dictionary that an answer is; {} if it is something else. The published script runs the answer, here only literals are read."""
    try:
        found = ast.literal_eval(answer)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
