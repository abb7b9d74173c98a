"""What the model reads: demonstrations, the chunks of a question, the question, and the answer that was begun. All of it is counted in tokens.

Knows chunks, texts, the chat template and tokens; not retrieval, models or who decides what is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from longreach.apps.rag.chunks import Chunk, Document, passages
from longreach.hf.interfaces import Tokenizer
from longreach.running import prompts
from longreach.running.prefix import common

Order = Literal["rank", "position"]
FOLLOW_UP, INTERMEDIATE, FINAL = "Follow up:", "Intermediate answer:", "So the final answer is:"  # the control words of Self-Ask (arXiv 2210.03350)
SELF_ASK = (
    f"Answer the question at the end from the texts before it. If a part of it has to be looked up first, write '{FOLLOW_UP}' and a question about that part; "
    f"then '{INTERMEDIATE}' and its answer. When nothing is missing, write '{FINAL}' and the answer."
)


@dataclass(frozen=True)
class Step:
    """A sub-question and its intermediate answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Demonstration:
    """A question with its right answer, shown before the question that is asked.

    steps  how it is answered in parts, for IterDRAG; `Rag.demonstrate` makes them.
    lead   how the answer begins, where the questions that are asked have a lead too.
    """

    question: str
    answer: str
    steps: tuple[Step, ...] = ()
    lead: str = ""


@dataclass(frozen=True)
class Used:
    """A chunk in a prompt, its score, and the round whose query it was retrieved for; 0 is the question itself."""

    chunk: Chunk
    score: float
    round: int = 0


@dataclass(frozen=True)
class State:
    """What is known of a question: the chunks retrieved so far, the steps, and a sub-question that has no answer yet."""

    used: tuple[Used, ...] = ()
    steps: tuple[Step, ...] = ()
    open: str | None = None


def arranged(used: Sequence[Used], order: Order) -> list[Chunk]:
    """Chunks as they are read. "rank" (DRAG): what was retrieved earlier first, and of one retrieval the best last, nearest to the question. "position":
    as they follow each other in the documents, so that all chunks are the documents again."""
    if order == "position":
        return sorted((one.chunk for one in used), key=lambda chunk: chunk.index)
    return [one.chunk for one in sorted(reversed(used), key=lambda one: one.round)]


def chain(steps: Sequence[Step], question: str | None = None) -> str:
    """The lines of the steps, and that of a sub-question that has no answer yet."""
    lines = [f"{FOLLOW_UP} {step.question}\n{INTERMEDIATE} {step.answer}\n" for step in steps]
    return "".join(lines) + (f"{FOLLOW_UP} {question}\n" if question is not None else "")


def words(*parts: str) -> str:
    """Those that are not empty, with a space between them."""
    return " ".join(part for part in parts if part)


def controls(tokenizer: Tokenizer, lead: str = "") -> dict[str, list[int]]:
    """The tokens of each control word; those of the final answer include its `lead`."""
    return {word: prompts.encode(tokenizer, words(word, lead if word == FINAL else ""), special=False) for word in (FOLLOW_UP, INTERMEDIATE, FINAL)}


def longest_control(tokenizer: Tokenizer, lead: str = "") -> int:
    return max(map(len, controls(tokenizer, lead).values()))


@dataclass(frozen=True)
class Prompts:
    """Writes prompts about some documents.

    With a chat template every demonstration is a turn of the user and one of the model, and what is begun begins the model's last turn. Without one they
    follow each other between empty lines.

    instruction  opens the prompt; "" for none.
    iterative    answers are chains of Self-Ask: so are those of the demonstrations.
    shown        the demonstrations, each with its own chunks.
    """

    tokenizer: Tokenizer
    documents: tuple[Document, ...]
    order: Order
    instruction: str
    iterative: bool
    shown: tuple[tuple[State, Demonstration], ...] = ()

    @property
    def stop(self) -> tuple[str, ...]:
        """What ends an answer beside the model's own end: a chain is lines, and without turns an empty line ends a text."""
        return ("\n",) if self.iterative else () if prompts.has_template(self.tokenizer) else (prompts.BETWEEN,)

    @cached_property
    def opening(self) -> int:
        """Tokens that every prompt begins with: of the demonstrations."""
        return common(self.ids(State(), "a"), self.ids(State(), "Why?")) if self.shown else 0

    def asked(self, state: State, question: str) -> str:
        """The chunks and the question. Chunks that follow each other are one passage; white space around a passage is left out."""
        texts = []
        for together in passages(arranged(state.used, self.order)):
            document = self.documents[together[0].document]
            passage = document.text[together[0].start : together[-1].stop].strip()
            texts.append(f"[{document.name}]\n{passage}" if document.name else passage)
        return prompts.about(prompts.BETWEEN.join(text for text in texts if text), question)

    def begun(self, state: State, lead: str) -> str:
        """What of the answer is there already."""
        return chain(state.steps, state.open) if self.iterative else lead

    def reply(self, demonstration: Demonstration) -> str:
        closing = words(FINAL if self.iterative else "", demonstration.lead, demonstration.answer)
        return (chain(demonstration.steps) if self.iterative else "") + closing

    def ids(self, state: State, question: str, lead: str = "") -> list[int]:
        """The tokens of the whole prompt, special ones included."""
        turns = [(self.asked(own, shown.question), self.reply(shown)) for own, shown in self.shown]
        turns.append((self.asked(state, question), self.begun(state, lead)))
        first, answer = turns[0]
        turns[0] = prompts.about(self.instruction, first), answer
        if not prompts.has_template(self.tokenizer):
            between = "\n" if self.iterative else " "
            text = prompts.BETWEEN.join(between.join(turn) if turn[1] or self.iterative else turn[0] for turn in turns)
            return prompts.encode(self.tokenizer, text)
        messages = [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn)][:-1]
        text = prompts.render(self.tokenizer, messages, "ask without demonstrations") + turns[-1][1]
        return prompts.encode(self.tokenizer, text, special=False)
