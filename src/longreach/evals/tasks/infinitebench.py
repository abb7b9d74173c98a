"""InfiniteBench (arXiv 2402.13718): eleven tasks at about 100k to 200k tokens, from the official jsonl files.

Scores are the official ones (compute_scores.py of June 2024), with the rules that look like slips, since published numbers contain them. The
instructions are our own words. Three of the tasks can be generated too, without data: theirs are called "official" here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar

from longreach.evals.samples import data
from longreach.evals.samples.base import Parts, Sample, Settings, Task
from longreach.evals.scores import scorers
from longreach.hf.interfaces import Tokenizer

COLUMNS: data.Columns = {"context": str, "input": str, "answer": (str, list, int, float), "options": (str, list)}
LETTERS = "ABCD"
MARKS = "\n:\"'.,?!{}"  # blanked before an answer is split into words


class InfiniteBench(Task):
    """One data set of InfiniteBench.

    ask    what to do, before the document.
    split  the name of its file.
    """

    group = "infinitebench"
    version = "2"
    license = "see the data card"
    source = "arXiv 2402.13718, xinrongzhang2022/InfiniteBench"
    needs_data = True

    split: ClassVar[str]
    ask: ClassVar[str]
    tokens: ClassVar[int]

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        data.refuse_lengths(self, settings)
        source = data.Source("xinrongzhang2022/InfiniteBench", (f"{self.split}.jsonl",), COLUMNS)
        for number, row in data.pick(list(enumerate(data.rows(source, settings, self.group))), settings, self.name):
            answers, options = data.strings(row["answer"]), tuple(o for o in data.strings(row["options"]) if o)
            parts = Parts(document=row["context"], prefix=f"{self.asked(row['input'])}\n\n", query=f"\n\n{self.question(row['input'], options)}")
            if not answers:
                raise ValueError(f"{self.name}, row {number + 1}: there is no answer; this is not the official format")
            references = self.letter_first(answers, options, f"{self.name}, row {number + 1}") if options else answers
            yield Sample(f"{self.name}:{number}", parts, references, self.tokens, chat="user_turn")

    def asked(self, given: str) -> str:
        return self.ask

    def question(self, given: str, options: Sequence[str]) -> str:
        return given

    def letter_first(self, answers: Sequence[str], options: Sequence[str], where: str) -> tuple[str, ...]:
        """The letter of the right option, then its text: the data hold the text."""
        right = next((option for answer in answers for option in options if option == answer), None)
        if right is None or len(options) > len(LETTERS):
            raise ValueError(f"{where}: the answer {list(answers)} is not one of four options {list(options)}; this is not the official format")
        return LETTERS[options.index(right)], right

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {self.metric: float(self.scored(prediction.strip(), sample.references))}

    def scored(self, answer: str, references: Sequence[str]) -> float:
        """By default: the first number is the right one. Where this is right or wrong, the first reference alone counts."""
        return scorers.first_int(answer) == references[0]


def lettered(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))


def after_lead(answer: str, leads: Sequence[str]) -> str | None:
    """What follows the first of the leads, in their order, that the answer has, without the one character after it. None if it has none of them."""
    lead = next((lead for lead in leads if lead in answer), None)
    return None if lead is None else answer.partition(lead)[2][1:]


def single_spaced(text: str) -> str:
    return re.sub(" {2,}", " ", text)


class Passkey(InfiniteBench):
    name, split, tokens = "infinitebench-official-passkey", "passkey", 6
    ask = "Important information is hidden in a lot of irrelevant text. Find it and remember it. I will ask you about it."


class NumberString(InfiniteBench):
    name, split, tokens = "infinitebench-official-number-string", "number_string", 12
    ask = "Important information is hidden in a lot of irrelevant text. Find it and remember it. I will ask you about it."


class KVRetrieval(InfiniteBench):
    name, split, tokens = "infinitebench-official-kv-retrieval", "kv_retrieval", 50
    ask = "Find in the JSON object below the value that belongs to the key that is asked for."

    def scored(self, answer: str, references: Sequence[str]) -> float:
        return references[0] in scorers.blanked(answer, MARKS).split()


class CodeRun(InfiniteBench):
    name, split, tokens = "infinitebench-code-run", "code_run", 5
    ask = "Here are many Python functions, some of which call others. Work out what a call returns."

    def question(self, given: str, options: Sequence[str]) -> str:
        call = re.search(r"func_\d+\(-?\d+\)", given)
        return f"What does {call[0]} return? Answer with the number alone.\n\nThe return value is:" if call else given

    def scored(self, answer: str, references: Sequence[str]) -> float:
        """The last word is the number."""
        words = scorers.blanked(answer, "\n.`'\":").split()
        found = scorers.whole(words[-1]) if words else None
        return found is not None and found == scorers.whole(references[0])


class CodeDebug(InfiniteBench):
    name, split, tokens, random = "infinitebench-code-debug", "code_debug", 5, 0.25
    ask = "Here is a large code base, in which exactly one of the functions named at the end has a deliberate error."

    def question(self, given: str, options: Sequence[str]) -> str:
        ask = "Which of these functions has the deliberate error?"
        lead = "Answer with the letter of the function and a full stop.\n\nThe function with the error is:"  # the stop, since the score looks for it
        return f"{ask}\n{lettered(options)}\n\n{lead}"

    def scored(self, answer: str, references: Sequence[str]) -> float:
        """The letter with a full stop or a colon at the very beginning, or letter or name right after a lead. A letter alone is wrong, as published."""
        if answer[:2] in (f"{references[0]}.", f"{references[0]}:"):
            return True
        answer = single_spaced(re.sub(r"""[\n`'"*\-]|[Oo]ption""", " ", answer))
        said = after_lead(answer, ("answer is:", "is:", "answer:", "correct option is:"))
        return said is not None and said.startswith(tuple(references))


class MathFind(InfiniteBench):
    name, split, tokens = "infinitebench-math-find", "math_find", 3

    def asked(self, given: str) -> str:
        wanted = re.search(r"The (.+?) of\b", given)
        return f"What is the {wanted[1].lower()} in the following list?" if wanted else given

    def scored(self, answer: str, references: Sequence[str]) -> float:
        """The first number is the right one. It has no sign: the published score reads none."""
        found = re.search(r"\d+(?:\.\d+)?", answer)
        return found is not None and float(found[0]) == float(references[0])


class BookQA(InfiniteBench):
    name, split, tokens, metric = "infinitebench-longbook-qa-eng", "longbook_qa_eng", 40, "f1"
    ask = "Read the book below and answer a question about it. Be very concise."

    def question(self, given: str, options: Sequence[str]) -> str:
        return f"Question: {given}\n\nBe very concise.\n\nAnswer:"

    def scored(self, answer: str, references: Sequence[str]) -> float:
        return scorers.best(scorers.token_f1, answer, references)


class BookQAChinese(BookQA):
    name, split, metric = "infinitebench-longbook-qa-chn", "longbook_qa_chn", "f1"
    ask = "请根据下面这本书回答问题，回答要尽量简短。"

    def question(self, given: str, options: Sequence[str]) -> str:
        return f"问题：{given}\n\n回答要尽量简短。\n\n答案："

    def scored(self, answer: str, references: Sequence[str]) -> float:
        return scorers.best(scorers.character_f1, answer, references)


class BookChoice(InfiniteBench):
    name, split, tokens, random = "infinitebench-longbook-choice-eng", "longbook_choice_eng", 40, 0.25
    ask = "Read the book below and answer a question about it by choosing one of four options."

    def question(self, given: str, options: Sequence[str]) -> str:
        ask = "Only one of these options is right. Answer with its letter, A, B, C or D."
        return f"Question: {given}\n\n{ask}\n{lettered(options)}\n\nThe letter of the right answer is:"

    def scored(self, answer: str, references: Sequence[str]) -> float:
        """The first character, if it is a letter of an option; else the whole answer is the option, or it stands right after a lead; else the first
        word made of those letters in their order, such as B or AB. A letter later in the answer counts in no other way.
        """
        if answer[:1] in tuple(LETTERS):
            return answer[0] in references
        if answer in references:
            return True
        answer = single_spaced(scorers.blanked(answer, MARKS.replace(":", "")))
        said = after_lead(answer, ("answer is:", "answer:", "answer is", "option is"))
        if said is not None:
            return said.startswith(tuple(references))
        return next((word for word in answer.split() if word in LETTERS), None) in references


class BookSummary(InfiniteBench):
    name, split, tokens, metric = "infinitebench-longbook-sum-eng", "longbook_sum_eng", 1200, "rouge_lsum"
    ask = "Read the book below and write a summary of it."

    def question(self, given: str, options: Sequence[str]) -> str:
        return "Summarise the book.\n\nSummary:"

    def scored(self, answer: str, references: Sequence[str]) -> float:
        return max((scorers.rouge_lsum(answer, reference).f for reference in references), default=0.0)  # words are not stemmed, as published


class DialogueQA(InfiniteBench):
    name, split, tokens = "infinitebench-longdialogue-qa-eng", "longdialogue_qa_eng", 40
    ask = 'Here is the script of a dialogue. In one place the name of a character is replaced by "$$MASK$$". Find out whose name it is.'

    def question(self, given: str, options: Sequence[str]) -> str:
        return 'Which name stands at "$$MASK$$" in the script above? Answer with the name alone.\n\nThe name is:'

    def scored(self, answer: str, references: Sequence[str]) -> float:
        """The name is a word of the answer in capitals. One of several words, as an eighth of the data have, is never found, as published."""
        return references[0] in [word.upper() for word in scorers.blanked(answer, MARKS).split()]
