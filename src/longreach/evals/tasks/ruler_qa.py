"""RULER's two question-answering tasks (arXiv 2404.06654): questions of SQuAD and HotpotQA among as many other paragraphs as fit.

The documents around a question are drawn by (seed, length, index); the published generator draws them from one stream, so that its samples
depend on what was made before. The instructions are our own words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, ClassVar

from longreach.evals.samples import data
from longreach.evals.samples.base import Parts, Sample, Settings, Task, generator
from longreach.evals.scores import scorers
from longreach.hf.interfaces import Tokenizer

TOKENS = 32
ASK = "Answer the question from the documents below. Write the answer and nothing else."


@dataclass(frozen=True)
class Question:
    """own are the paragraphs that come with it: the one with the answer first, then others of its subject. They are places in the pool."""

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    own: tuple[int, ...]


@dataclass(frozen=True)
class Pool:
    paragraphs: Sequence[str]
    questions: Sequence[Question]


class RulerQA(Task):
    group = "ruler"
    version = "2"
    license = "Apache-2.0 (generator), CC BY-SA 4.0 (data)"
    needs_data = True
    metric = "string_match"

    origin: ClassVar[data.Source]

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        if not settings.lengths:
            raise ValueError(f"{self.name} needs lengths, such as --lengths 4k,8k: as many documents as fit are put around each question")
        if settings.samples < 0:
            raise ValueError(f"samples must be 0 (all) or more, not {settings.samples}")
        pool = self.pool(data.document(self.origin, settings, self.group))

        @cache
        def tokens(place: int) -> int:
            return len(tokenizer(shown(100, pool.paragraphs[place]), add_special_tokens=False)["input_ids"])

        for length in settings.lengths:
            for index in range(min(settings.samples or len(pool.questions), len(pool.questions))):
                yield self._sample(tokenizer, pool, settings, length, index, tokens)

    def pool(self, content: Any) -> Pool:
        raise NotImplementedError

    def _sample(self, tokenizer: Tokenizer, pool: Pool, settings: Settings, length: int, index: int, tokens: Any) -> Sample:
        question, rng = pool.questions[index], generator(settings, self.name, length, index)
        others, own = list(question.own), set(question.own) | set(question.gold)
        rng.shuffle(others)
        far = rng.sample(range(len(pool.paragraphs)), len(pool.paragraphs))
        places = [*question.gold, *others, *(place for place in far if place not in own)]
        shuffle = rng.random()  # the order of the documents, the same however many they are

        def fitting(count: int) -> Parts | None:
            parts = prompt(question, [pool.paragraphs[place] for place in places[:count]], shuffle)
            return parts if len(tokenizer(parts.text)["input_ids"]) + TOKENS <= length else None

        count = self._estimate(tokenizer, question, places, tokens, length)
        while (parts := fitting(count)) is None and count > len(question.gold):
            count -= 1
        if parts is None:
            raise ValueError(f"{self.name}: question {index} and the paragraph with its answer do not fit into {length} tokens; choose a greater length")
        while count < len(places) and (more := fitting(count + 1)) is not None:
            parts, count = more, count + 1
        meta = {"length_target": length, "seed": settings.seed, "documents": count, "all_documents": count == len(places)}
        return Sample(f"{self.name}:{length}:{index}", parts, question.answers, TOKENS, meta, chat="prefix")

    def _estimate(self, tokenizer: Tokenizer, question: Question, places: Sequence[int], tokens: Any, length: int) -> int:
        """About how many documents fit, by the tokens of each alone: tokenising the whole for every count would cost hours."""
        room = length - TOKENS - len(tokenizer(prompt(question, [], 0.0).text)["input_ids"])
        count = 0
        while count < len(places) and room >= tokens(places[count]):
            room -= tokens(places[count]) + 1
            count += 1
        return max(count, len(question.gold))

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"string_match": scorers.contains_any(scorers.printable(prediction), sample.references)}


def listed(content: Any, source: data.Source) -> list[data.Row]:
    if not isinstance(content, list) or not content:
        raise ValueError(f"this is not the official format of {source.repo}, a list of rows; pass {source.wanted}")
    return [data.checked(row, source.columns, f"row {number}") for number, row in enumerate(content, 1)]


def shown(number: int, paragraph: str) -> str:
    return f"Document {number}:\n{paragraph}"


def prompt(question: Question, paragraphs: Sequence[str], shuffle: float) -> Parts:
    order = list(paragraphs)
    Random(shuffle).shuffle(order)
    return Parts(
        prefix=f"{ASK}\n\nThe documents:\n\n",
        document="\n\n".join(shown(number, paragraph) for number, paragraph in enumerate(order, 1)),
        query=f"\n\n{ASK}\n\nQuestion: {question.text}",
        answer_prefix=" Answer:",
    )


class SQuAD(RulerQA):
    """The answerable questions of SQuAD 2.0, development set, between paragraphs of the same article first."""

    name = "ruler-qa-1"
    source = "arXiv 2404.06654; arXiv 1806.03822, rajpurkar/squad_v2"
    origin = data.Source(
        "rajpurkar/squad_v2",
        ("dev-v2.0.json", "validation*.parquet", "dev-v2.0.jsonl"),
        {"title": str, "context": str, "question": str, "answers": dict},
    )

    def pool(self, content: Any) -> Pool:
        rows = listed(content, self.origin) if isinstance(content, list) else list(_squad(content))
        paragraphs = list(dict.fromkeys(row["context"] for row in rows))
        places = {paragraph: place for place, paragraph in enumerate(paragraphs)}
        articles: dict[str, dict[int, None]] = {}
        for row in rows:
            articles.setdefault(row["title"], {})[places[row["context"]]] = None
        questions = []
        for row in rows:
            if answers := tuple(dict.fromkeys(row["answers"]["text"])):
                gold = places[row["context"]]
                questions.append(Question(row["question"], answers, (gold,), tuple(place for place in articles[row["title"]] if place != gold)))
        return Pool(paragraphs, questions)


def _squad(content: Any) -> Iterator[data.Row]:
    """The rows of the official JSON file: articles of paragraphs of questions."""
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    texts = [] if qa.get("is_impossible") else [str(answer["text"]) for answer in qa["answers"]]
                    yield {"title": article["title"], "context": paragraph["context"], "question": qa["question"], "answers": {"text": texts}}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not SQuAD 2.0's official format ({type(error).__name__}: {error}); pass dev-v2.0.json") from error


class HotpotQA(RulerQA):
    """HotpotQA, development set with distractors: the ten paragraphs that come with a question, then others."""

    name = "ruler-qa-2"
    source = "arXiv 2404.06654; arXiv 1809.09600, hotpotqa/hotpot_qa"
    origin = data.Source(
        "hotpotqa/hotpot_qa",
        ("hotpot_dev_distractor_v1.json", "distractor/validation*.parquet"),
        {"question": str, "answer": str, "context": (list, dict)},
    )

    def pool(self, content: Any) -> Pool:
        places: dict[str, int] = {}
        questions = []
        for number, row in enumerate(listed(content, self.origin), 1):
            given = dict.fromkeys(_paragraphs(row, number))
            own = tuple(places.setdefault(paragraph, len(places)) for paragraph in given)
            questions.append(Question(row["question"], (row["answer"],), own, ()))
        return Pool(list(places), questions)


def _paragraphs(row: data.Row, number: int) -> Iterator[str]:
    """Title, line end, text; from the official lists of pairs or the Hub's two lists."""
    try:
        context = row["context"]
        pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
        for title, sentences in pairs:
            yield f"{title}\n{''.join(sentences)}"
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"row {number} is not in HotpotQA's official format ({error}); pass hotpot_dev_distractor_v1.json") from error
