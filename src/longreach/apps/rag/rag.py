"""Questions about documents, answered from the chunks that are retrieved for them, by a model that may read more than its trained window.

Knows a model, its extension, a tokenizer and the parts of this package; not files, options or terminals.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from longreach import configs
from longreach.apps.rag import retrievers
from longreach.apps.rag.asking import Outcome, Room, drag, iterdrag, most
from longreach.apps.rag.chunks import documents_of, is_text, split
from longreach.apps.rag.config import Passage, RagAnswer, RagConfig
from longreach.apps.rag.prompts import SELF_ASK, Demonstration, Prompts, State, Used, arranged, controls, longest_control
from longreach.hf.checks import find_base, require_in_force
from longreach.hf.extension import Extension
from longreach.hf.interfaces import CausalLM, Tokenizer
from longreach.quantities import CHUNK_SIZE, counted
from longreach.running import generation
from longreach.running.prefix import Prefix
from longreach.running.together import AT_ONCE, Pool, Request

Right = Callable[[str, str], bool]  # (the model's answer, the right one) -> whether it is right


def contains(answer: str, right: str) -> bool:
    """Whether the right answer is among the words of the model's, whatever the case of its letters and its white space."""
    said, wanted = (" ".join(text.casefold().split()) for text in (answer, right))
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", said) is not None


class Rag:
    """Documents that are asked about.

        with longreach.extend(model, context=4096) as extension:
            rag = Rag(model, tokenizer, text, RagConfig(chunk_words=60, budget=3500), extension=extension)
            print(rag.ask("What is the pass key?").answer)

    documents       one text, a list of texts, or texts by name.
    demonstrations  shown before every question, each with chunks of its own (DRAG).
    extension       the one in force on the model; None is the stock model, whose prompts stay inside the trained window.
    retriever       instead of that of the configuration: texts -> (query -> one number for each text).
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        documents: str | Sequence[str] | Mapping[str, str],
        config: RagConfig = RagConfig(),  # noqa: B008  frozen
        *,
        demonstrations: Sequence[Demonstration] = (),
        extension: Extension | None = None,
        retriever: retrievers.Retriever | None = None,
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        find = retriever or retrievers.retriever(config.retriever)  # what is not installed is said before the documents are cut
        self.model, self.tokenizer, self.config, self.extension, self.chunk_size = model, tokenizer, config, extension, chunk_size
        self.demonstrations = tuple(demonstrations)
        for number, one in enumerate(self.demonstrations, 1):
            if not all(is_text(part) for part in (one.question, one.answer, one.lead, *(part for step in one.steps for part in (step.question, step.answer)))):
                raise ValueError(f"demonstration {number} is not text; pass strings of Unicode characters")
        self.documents = documents_of(documents)
        self.chunks = split(self.documents, config.chunk_words)
        if config.top_k is not None and config.top_k > len(self.chunks):
            raise ValueError(
                f"top_k={config.top_k} is more than the {counted(len(self.chunks), 'chunk')} of the documents; pass top_k={len(self.chunks)} (--top-k) or "
                "less, or smaller chunks (--chunk-words)"
            )
        self._scores = lru_cache(8)(find([chunk.text for chunk in self.chunks]))  # how many fit is found by trying, each time with the same query
        self._prefix, self._shown = Prefix(), Prefix()  # what the last call has read, and the demonstrations
        self._written: dict[int, Prompts] = {}

    # -- what is retrieved ------------------------------------------------------------------------------------------------------------

    def retrieve(self, query: str, k: int, known: Sequence[Used] = (), number: int = 0) -> tuple[Used, ...]:
        """The k best chunks for a query that are not known yet, best first."""
        taken = {one.chunk.index for one in known}
        best = retrievers.best(self._scores(query), len(self.chunks), min(len(self.chunks), k + len(taken))) if k else []
        return tuple([Used(self.chunks[place], score, number) for place, score in best if place not in taken][:k])

    def state(self, question: str, k: int, steps: Demonstration | None = None) -> State:
        """What is retrieved for a question before it is asked; for the steps of a demonstration, with what is retrieved for them."""
        used = self.retrieve(question, k)
        for number, step in enumerate(steps.steps if steps is not None else (), 1):
            used += self.retrieve(step.question, k, used, number)
        return State(used)

    def prompts(self, k: int) -> Prompts:
        """The prompts with k chunks for a question, and as many for each demonstration."""
        if k not in self._written:
            if len(self._written) > 64:  # of a search for the largest k, once for each question
                self._written.clear()
            config, iterative = self.config, self.config.rounds > 0
            instruction = (SELF_ASK if iterative else "") if config.instruction is None else config.instruction
            shown = tuple((self.state(one.question, k, one if iterative else None), one) for one in self.demonstrations)
            self._written[k] = Prompts(self.tokenizer, self.documents, config.order, instruction, iterative, shown)
        return self._written[k]

    # -- what fits --------------------------------------------------------------------------------------------------------------------

    @property
    def limit(self) -> int | None:
        """Tokens that a prompt and its answer may have: those of the declared context, of the method's reach, or of the trained window; None: any number."""
        if self.extension is None:
            return configs.trained_window(find_base(self.model).config).tokens
        return self.extension.capacity if self.extension.context is None else self.extension.context

    def new_tokens(self, lead: str = "") -> int:
        """That a call may write, its control words included."""
        return self.config.max_new_tokens + (longest_control(self.tokenizer, lead) if self.config.rounds else 0)

    def room(self, lead: str = "") -> Room:
        limit, new = self.limit, self.new_tokens(lead)
        if limit is not None and limit <= new:
            raise ValueError(f"{new} new tokens leave no room for a prompt in a context of {limit}; pass a smaller max_new_tokens, or extend the model")
        return Room(None if limit is None else limit - new, self.config.budget)

    def fitted(self, question: str, lead: str = "") -> tuple[int, Prompts, State]:
        """How many chunks are read for a question, its first prompt, and what that shows. Raises ValueError, with the numbers and the fix, if nothing fits."""
        room, asked = self.room(lead), self.config.top_k
        most_tokens = min(tokens for tokens in (room.prompt, room.total, float("inf")) if tokens is not None)

        def tokens(k: int) -> int:
            return len(self.prompts(k).ids(self.state(question, k), question, lead))

        known = asked is not None and room.fits(tokens(asked))
        k = asked if known else most(len(self.chunks) if asked is None else asked, lambda k: room.fits(tokens(k)))
        if k is None:
            shown = f", the {counted(len(self.demonstrations), 'demonstration')}" if self.demonstrations else ""
            raise ValueError(
                f"the question{shown} and all that stands around them have {counted(tokens(0), 'token')} without any chunk, more than the {most_tokens} that a "
                f"prompt may have; pass {self._fix(tokens(0), lead)}"
            )
        if asked is not None and k < asked:
            raise ValueError(
                f"with {counted(asked, 'chunk')} the prompt has {counted(tokens(asked), 'token')}, more than the {most_tokens} that it may have; pass "
                f"top_k={k} (--top-k), smaller chunks (--chunk-words), or {self._fix(tokens(asked), lead)}"
            )
        if asked is None and k == 0:
            raise ValueError(
                f"not one chunk of {self.config.chunk_words or 'all the'} words fits into a prompt of {most_tokens} tokens beside the question; pass smaller "
                f"chunks (--chunk-words), or {self._fix(tokens(1), lead)}"
            )
        return k, self.prompts(k), self.state(question, k)

    def _fix(self, tokens: int, lead: str) -> str:
        room, fixes = self.room(lead), []
        if room.total is not None and tokens > room.total:
            fixes.append(f"budget={tokens} (--budget)")
        if room.prompt is not None and tokens > room.prompt:
            fixes.append(f"an extension with context={tokens + self.new_tokens(lead)} (--context)")
        return " and ".join(fixes)

    @property
    def reuses(self) -> bool:
        """Whether a call may go on from what an earlier one has read: a method that allows any cut, and evicts nothing, gives the same either way."""
        return self.extension is None or (self.extension.method.cut == 1 and self.extension.method.eviction is None)

    # -- asking -----------------------------------------------------------------------------------------------------------------------

    def ask(self, question: str, *, lead: str = "", progress: Callable[[int], None] = lambda done: None) -> RagAnswer:
        """lead      the beginning of the answer, which is given to the model, such as "The pass key is".
        progress  gets the number of tokens read so far, in all calls.

        Raises ValueError for an empty question and for what does not fit.
        """
        started = time.perf_counter()
        k, reader, state = self._reader(question, lead, progress)
        if self.config.rounds:
            room, longest = self.room(reader.lead), self.new_tokens(reader.lead)
            outcome = iterdrag(reader, state, lambda query, now: self._more(query, now, k), room, self.config.rounds, longest)
        else:
            outcome = drag(reader, state)
        return self._answered(outcome, reader, k, time.perf_counter() - started)

    def ask_all(self, questions: Iterable[str], *, lead: str | Sequence[str] = "", at_once: int = AT_ONCE) -> list[RagAnswer]:
        """The answers that `ask` gives to each, read and written in flat batches. Without an extension, and with rounds, whose prompts depend on the answers
        before, they are asked one after the other.

        lead      one for all, or one for each.
        at_once   questions that hold memory at one time.

        Raises ValueError as `ask` does, and where a flat forward is not exact on this model or method (see `Flat`); ask one by one there.
        """
        if isinstance(questions, str):
            raise ValueError("pass a list of questions, or one to ask()")
        if at_once < 1:
            raise ValueError(f"at_once must be at least 1, not {at_once}")
        questions = [*questions]
        leads = [lead] * len(questions) if isinstance(lead, str) else [*lead]
        if len(leads) != len(questions):
            raise ValueError(f"there are {counted(len(questions), 'question')} and {counted(len(leads), 'lead')}; pass one for each, or one for all")
        if self.extension is None or self.config.rounds:
            return [self.ask(question, lead=own) for question, own in zip(questions, leads)]
        asked: dict[Request, tuple[int, int, _Reader, State]] = {}
        found: dict[int, RagAnswer] = {}
        alike: dict[tuple[int, int], list[Request]] = {}  # with as many chunks they begin with the same demonstrations, which are read once
        for number, (question, own) in enumerate(zip(questions, leads)):
            try:
                k, reader, state = self._reader(question, own)
            except ValueError as error:
                raise ValueError(f"question {number + 1}: {error}") from None
            request = Request(reader.ids(state), self.config.max_new_tokens, stop=generation.ends_with(self.tokenizer, reader.written.stop))
            asked[request] = number, k, reader, state
            alike.setdefault((k, reader.written.opening), []).append(request)
        try:
            pool = Pool(self.extension, at_once=at_once, chunk_size=self.chunk_size, ends=generation.ends_of(self.model, self.tokenizer))
        except ValueError as error:
            raise ValueError(f"{error}; or ask() each question by itself") from None
        for (_, opening), requests in alike.items():
            pool.add(requests, opening)
        started = time.perf_counter()
        while pool.busy:
            for request, generated in pool.step().done.items():
                number, k, reader, state = asked.pop(request)
                text = self.tokenizer.decode(generated.ids, skip_special_tokens=True)
                reader.new = len(generated.ids)
                outcome = Outcome(text[: generation.stop_at(text, reader.written.stop)].strip(), state, (len(request.ids),), "one call")
                found[number] = self._answered(outcome, reader, k, time.perf_counter() - started)
        return [found[number] for number in range(len(found))]

    def _reader(self, question: str, lead: str, progress: Callable[[int], None] = lambda done: None) -> tuple[int, _Reader, State]:
        """How many chunks are read for a question, what reads it, and what is known at first."""
        if self.extension is not None:
            require_in_force(self.extension, self.model)
        if not is_text(question) or not is_text(lead):
            raise ValueError("the question or its lead is not text; pass strings of Unicode characters")
        if not question.strip():
            raise ValueError("the question is empty; pass one")
        k, written, state = self.fitted(question.strip(), lead.strip())
        return k, _Reader(self, written, question.strip(), lead.strip(), progress), state

    def demonstrate(self, examples: Iterable[Demonstration], right: Right = contains) -> tuple[Demonstration, ...]:
        """Examples that the model itself answers in steps, with its steps; those whose final answer is not right are left out, as in the paper."""
        if not self.config.rounds:
            raise ValueError("without rounds nothing is answered in steps; pass rounds (--rounds) of at least 1, or the examples as they are")
        asked = ((example, self.ask(example.question, lead=example.lead)) for example in examples)
        return tuple(replace(example, steps=found.steps) for example, found in asked if right(found.answer, example.answer))

    def _begun(self, ids: list[int], opening: int) -> tuple[Any, int]:
        """-> (a cache to go on from, how many of the ids it holds that were read for an earlier call): of the last call, or a fork of the demonstrations."""
        cache, same = self._prefix.resume(ids[:-1])
        if same >= opening or self.extension is None:
            return cache, same
        known = self._shown.read(self.extension, ids[:opening], chunk_size=self.chunk_size)
        return self.extension.fork(self._shown.cache), known

    def _more(self, query: str, now: State, k: int) -> tuple[Used, ...]:
        return self.retrieve(query, k, now.used, len(now.steps) + 1)

    def _answered(self, outcome: Outcome, reader: _Reader, k: int, seconds: float) -> RagAnswer:
        of = {one.chunk.index: one for one in outcome.state.used}
        shown = [of[chunk.index] for chunk in arranged(outcome.state.used, self.config.order)]
        passages = tuple(
            Passage(self.documents[one.chunk.document].name or one.chunk.document, one.chunk.start, one.chunk.stop, one.score, one.round, one.chunk.text)
            for one in shown
        )
        return RagAnswer(outcome.answer, passages, outcome.state.steps, outcome.ended, outcome.calls, reader.new, reader.reused, k, round(seconds, 4))


@dataclass
class _Reader:
    """Reads the prompts of one question, and writes what follows them. What two calls begin with is read once, where the method allows it."""

    rag: Rag
    written: Prompts
    question: str
    lead: str
    progress: Callable[[int], None]
    new: int = 0
    reused: int = 0
    read: int = 0
    _ids: dict[State, list[int]] = field(default_factory=dict)

    def ids(self, state: State) -> list[int]:
        if state not in self._ids:
            self._ids[state] = self.written.ids(state, self.question, self.lead)
        return self._ids[state]

    def count(self, state: State) -> int:
        return len(self.ids(state))

    def ask(self, state: State, beginnings: Sequence[str]) -> tuple[str, str]:
        rag, ids = self.rag, self.ids(state)
        begin = {word: tokens for word, tokens in controls(rag.tokenizer, self.lead).items() if word in beginnings}
        cache, reused = rag._begun(ids, self.written.opening) if rag.reuses else (None, 0)
        before = self.read
        found = generation.answer(
            rag.model,
            rag.tokenizer,
            ids,
            rag.config.max_new_tokens + max(map(len, begin.values()), default=0),
            extension=rag.extension,
            chunk_size=rag.chunk_size,
            cache=cache,
            beginnings=list(begin.values()),
            stop=self.written.stop,
            progress=lambda done: self.progress(before + done),
        )
        if rag.reuses:
            rag._prefix.keep(found.cache, ids + found.ids)
        self.new, self.reused, self.read = self.new + found.tokens, self.reused + reused, self.read + len(ids)
        word = next((word for word, tokens in begin.items() if found.ids[: len(tokens)] == tokens), "")
        if not word:
            return "", found.text.strip()
        rest = rag.tokenizer.decode(found.ids[len(begin[word]) :], skip_special_tokens=True)
        return word, rest.partition("\n")[0].strip()
