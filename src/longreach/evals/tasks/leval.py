"""L-Eval (arXiv 2307.11088): the six closed-ended tasks and topic retrieval, scored by exact match as described in the paper.

Written from the description alone: the prompts and the code that reads answers are our own. One prompt for each question; greedy, 512 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

from longreach.evals.samples import data
from longreach.evals.samples.base import Parts, Sample, Settings, Task
from longreach.hf.interfaces import Tokenizer

COLUMNS: data.Columns = {"instructions": (list, str), "outputs": (list, str), "input": str}
TOKENS = 512


class LEval(Task):
    """One file of L-Eval. Its rows are documents with several questions each.

    system  what to do, before everything else.
    exam    the document is announced and the question followed by a cue; else document, blank line, instruction.
    """

    group = "leval"
    license = "GPL-3.0 (repository; nothing of it is used here); the texts have licences of their own"
    source = "arXiv 2307.11088, L4NLP/LEval"
    needs_data = True

    file: ClassVar[str]
    system: ClassVar[str]
    exam: ClassVar[bool] = True

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        data.refuse_lengths(self, settings)
        questions = []
        for number, row in enumerate(data.rows(data.Source("L4NLP/LEval", (f"{self.file}.jsonl",), COLUMNS), settings, self.group)):
            asked, answers = data.strings(row["instructions"]), data.strings(row["outputs"])
            if len(asked) != len(answers):
                raise ValueError(f"{self.name}, row {number + 1}: {len(asked)} questions and {len(answers)} answers; this is not the official format")
            questions += [(number, index, row["input"], *pair) for index, pair in enumerate(zip(asked, answers))]
        for number, index, document, question, answer in data.pick(questions, settings, self.name):
            yield from self.prompts(f"{self.name}:{number}:{index}", document, question, answer, {"document": number})

    def prompts(self, name: str, document: str, question: str, answer: str, meta: dict[str, Any]) -> Iterator[Sample]:
        before = f"{self.system}\n\n" + ("Document is as follows.\n" if self.exam else "")
        after = f"\n\nQuestion: {question}\nAnswer:" if self.exam else f"\n\n{question}"
        yield Sample(name, Parts(document, after, before), (answer,), TOKENS, meta, chat="user_turn")

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {self.metric: float(self.scored(prediction, sample.references[0]))}

    def scored(self, answer: str, reference: str) -> float:
        """By default: the first letter from A to D; an answer without one is taken for A, as published."""
        return first_letter(answer) == first_letter(reference)


def first_letter(text: str) -> str:
    found = re.search("[A-D]", text)
    return found[0] if found else "A"


def compact(text: str) -> str:
    """Lower case without white space."""
    return "".join(text.lower().split())


class Coursera(LEval):
    name, file = "leval-coursera", "coursera"
    system = (
        "Answer the multiple-choice question about the lecture. More than one option may be right: write the letters of all that are, such as BC, and "
        "nothing else."
    )

    def scored(self, answer: str, reference: str) -> float:
        chosen, right = set(re.findall("[A-D]", answer)) or {"A"}, set(re.findall("[A-D]", reference))
        return 1.0 if chosen == right else 0.25 if chosen < right else 0.0


class Quality(LEval):
    name, file, random = "leval-quality", "quality", 0.25
    system = "Answer the multiple-choice question about the document. Write the letter of the right option and nothing else."


class TOEFL(LEval):
    name, file, random = "leval-tpo", "tpo", 0.25
    system = "Answer the multiple-choice question about the lecture. Write the letter of the right option and nothing else."


class GSM(LEval):
    name, file, exam, version = "leval-gsm100", "gsm100", False, "2"
    system = "Solve the last problem step by step, like the examples before it. End with: The answer is, and the number."

    def scored(self, answer: str, reference: str) -> float:
        found, right = final_number(answer), final_number(reference)
        return found is not None and found == right


def final_number(text: str) -> float | None:
    """The number after "The answer is"; else the last one of the first paragraph. Of a number its digits up to the point count, without a sign."""
    number = r"(\d[\d,]*)(?:\.\d+)?"
    said = re.search(rf"The answer is\D{{0,20}}?{number}", text)
    numbers = [said[1]] if said else re.findall(number, text.strip().split("\n\n", 1)[0])
    return float(numbers[-1].replace(",", "")) if numbers else None


class CodeU(LEval):
    """Its questions are about code at the end of the document: what is too long should lose its beginning (--truncate left)."""

    name, file, exam = "leval-codeu", "codeU", False
    system = "Infer what the program at the end prints. Write the output and nothing else."

    def scored(self, answer: str, reference: str) -> float:
        right = tidy(reference)
        tail = " ".join(tidy(answer).split()[-(len(right.split()) + 3) :])
        return bool(right) and right in tail


def tidy(text: str) -> str:
    """One kind of quotes, no spaces at brackets and commas."""
    text = " ".join(re.sub("""["`“”‘’]""", "'", text).split())
    return re.sub(r" ?([\[\](){},:]) ?", r"\1", text)


class SciFi(LEval):
    """Is a statement true in the story, and is it true in the world? Two prompts, the second without the story; the score is the mean of both."""

    name, file = "leval-sci-fi", "sci_fi"
    system = "Is the statement true by the document, whatever you know about the world? Write True or False and nothing else."
    world = "Is the statement true in the real world? Write True or False and nothing else."

    def prompts(self, name: str, document: str, question: str, answer: str, meta: dict[str, Any]) -> Iterator[Sample]:
        told, _, fact = answer.partition("[fact:")
        yield from super().prompts(f"{name}:story", document, question, told, {**meta, "of": "story"})
        parts = Parts(document="", prefix=f"{self.world}\n\n", query=f"Question: {question}\nAnswer:")
        yield Sample(f"{name}:world", parts, (fact.rstrip(" ]") or told,), TOKENS, {**meta, "of": "world"}, chat="user_turn")

    def scored(self, answer: str, reference: str) -> float:
        found, right = (re.search("true|false", text.lower()) for text in (answer, reference))
        return found is not None and right is not None and found[0] == right[0]


class TopicRetrieval(LEval):
    """Three questions about each conversation; the mean over questions is the mean over conversations."""

    name, file, exam, version = "leval-topic-retrieval", "topic_retrieval_longchat", False, "2"
    system = "Below is a record of a conversation about several topics. Answer the question at the end with the name of the topic and nothing else."

    def scored(self, answer: str, reference: str) -> float:
        right = compact(reference)
        return bool(right) and right in compact(answer)
