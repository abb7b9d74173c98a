"""A conversation over a document: what has been read stays in the cache, a question costs only its own tokens.

Knows what was said; not how ids are made of it, what a cache holds, or terminals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from longreach.hf.extension import Extension
from longreach.hf.interfaces import CausalLM, Tokenizer
from longreach.quantities import CHUNK_SIZE
from longreach.running import generation, prompts
from longreach.running.prefix import Prefix, common
from longreach.running.sampling import GREEDY, Sampling


@dataclass
class Conversation:
    """A document and the turns about it.

    With a chat template the document opens the first user message. Without one the sequence is the document, then questions and
    answers between empty lines, exactly as the model has read and written them.

    system      a system message; needs a chat template.
    limit       tokens that the whole sequence may have, the answer included; None: no limit but the method's own.
    extension   the one in force on the model; None is the stock model.
    """

    model: CausalLM
    tokenizer: Tokenizer
    document: str = ""
    system: str | None = None
    limit: int | None = None
    extension: Extension | None = None
    chunk_size: int = CHUNK_SIZE
    turns: list[tuple[str, generation.Answer]] = field(default_factory=list)
    prefix: Prefix = field(default_factory=Prefix)

    def __post_init__(self) -> None:
        if self.system is not None and not prompts.has_template(self.tokenizer):
            raise ValueError("this model has no chat template, so there is no place for a system message; put its words into the document or the question")

    def read(self, progress: Callable[[int], None] = lambda done: None) -> int:
        """Read the document now, so that the first question is quick -> the number of its tokens.

        A method that allows no cut of a prompt reads it together with the first question instead.
        """
        ids = self._opening()
        if self.extension is None or not (early := self.extension.method.apart(len(ids) + 1)):
            return len(ids)
        self.prefix.read(self.extension, ids[:early], chunk_size=self.chunk_size, progress=progress)
        return len(ids)

    @property
    def known(self) -> int:
        """Tokens that the cache holds."""
        return len(self.prefix.ids)

    def needs(self, question: str, max_new_tokens: int) -> int:
        """Tokens of the whole sequence with this question and its longest answer."""
        return len(self.sequence(question)) + max_new_tokens

    def attach(self, extension: Extension, limit: int | None) -> None:
        """Go on under another extension. A method is fixed for a whole sequence, so everything is read again with the next question."""
        self.extension, self.limit = extension, limit
        self.prefix.forget()

    def save(self, file: str | Path) -> None:
        """Write the document and the turns as they were read, so that `open` can go on from there without reading them."""
        if self.extension is None:
            raise ValueError("only an extended model can save what it has read; pass extension=longreach.extend(model, ...)")
        if self.extension.method.cut is None:
            raise ValueError(
                f"the result of {self.extension.method.brief()} depends on how a prompt is cut, so a document cannot be read apart from its question; "
                "use a method or an option that does not (longreach methods), or ask without saving"
            )
        if not self.known:
            raise ValueError("nothing has been read yet, so there is nothing to save; call read() first, or ask a question")
        notes = {"document": self.document} | ({} if self.system is None else {"system": self.system})
        if self.turns:
            notes["turns"] = json.dumps([[question, answer.text, answer.ids, answer.finish] for question, answer in self.turns])
        self.extension.save(self.prefix.cache, file, self.prefix.ids, notes=notes)

    @classmethod
    def open(
        cls, model: CausalLM, tokenizer: Tokenizer, extension: Extension, file: str | Path, *, limit: int | None = None, chunk_size: int = CHUNK_SIZE
    ) -> Conversation:
        """The conversation that `save` wrote. Raises ValueError if it belongs to another model, method, context or tokenizer."""
        found = extension.load(file)
        if "document" not in found.notes or found.ids is None or found.ids.shape[0] != 1:
            raise ValueError(f"{str(file)!r} holds a cache without its text; use extension.load(file), or save one with Conversation.save or --save-document")
        talk = cls(model, tokenizer, found.notes["document"], found.notes.get("system"), limit, extension, chunk_size)
        talk.prefix.keep(found.cache, found.ids[0].tolist())
        if "turns" in found.notes:
            talk.turns = _turns(found.notes["turns"], model.get_input_embeddings().weight.shape[0], str(file))
        opening = talk._opening()
        same = common(talk.prefix.ids, opening) == min(talk.known, len(opening))
        if not same or any(tokenizer.decode(answer.ids, skip_special_tokens=True) != answer.text for _, answer in talk.turns):
            raise ValueError(f"the tokenizer of this model makes other tokens of the text in {str(file)!r}; load the tokenizer that it was read with")
        return talk

    def ask(
        self,
        question: str,
        max_new_tokens: int = 128,
        *,
        sampling: Sampling = GREEDY,
        write: Callable[[str], None] = lambda text: None,
        progress: Callable[[int], None] = lambda done: None,
        stopped: Callable[[], bool] | None = None,
    ) -> generation.Answer:
        """The answer to a question, which becomes a turn. Raises ValueError if it does not fit any more.

        Once `stopped` is true the answer ends where it is and stays a turn; one that has no word yet does not become a turn.
        """
        ids = self.sequence(question)
        if self.limit is not None and len(ids) + max_new_tokens > self.limit:
            shorter = "forget the earlier turns (/reset), " if self.turns else ""
            raise ValueError(
                f"with this question and {max_new_tokens} new tokens the conversation needs {len(ids) + max_new_tokens} tokens, more than its context of "
                f"{self.limit}; {shorter}declare a larger context, or ask for fewer new tokens"
            )
        least = 1 if self.extension is None else self.extension.method.cut or 1  # tokens that are left to be read
        cache, _ = self.prefix.resume(ids[:-least])  # a template may write an earlier answer differently than the model did
        found = generation.answer(
            self.model,
            self.tokenizer,
            ids,
            max_new_tokens,
            extension=self.extension,
            chunk_size=self.chunk_size,
            sampling=sampling,
            cache=cache,
            write=write,
            progress=progress,
            stopped=stopped,
        )
        self.prefix.keep(found.cache, ids + found.ids)
        if found.ids:
            self.turns.append((question, replace(found, cache=None)))  # a turn must not keep a store alive that is not in use any more
        return found

    def reset(self) -> None:
        """Forget the turns and keep the document, which is read again with the next question."""
        self.turns.clear()
        self.prefix.forget()

    def sequence(self, question: str) -> list[int]:
        """The ids of everything so far and the question."""
        if prompts.has_template(self.tokenizer):
            return self._rendered(question, self.turns)
        ids, between = self._opening(), prompts.BETWEEN if self.document else ""
        for asked, answer in self.turns:
            ids, between = ids + self._encode(between + asked) + answer.ids, prompts.BETWEEN
        return ids + self._encode(between + question)

    def _opening(self) -> list[int]:
        """What every sequence begins with, whatever is asked: the ids up to the end of the document."""
        if not prompts.has_template(self.tokenizer):
            return prompts.encode(self.tokenizer, self.document)
        one, other = self._rendered("a"), self._rendered("Why?")
        return one[: common(one, other)] if self.document else []

    def _encode(self, text: str) -> list[int]:
        return prompts.encode(self.tokenizer, text, special=False)

    def _rendered(self, question: str, turns: Sequence[tuple[str, generation.Answer]] = ()) -> list[int]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        document = self.document
        for asked, answer in turns:
            messages += [{"role": "user", "content": prompts.about(document, asked)}, {"role": "assistant", "content": answer.text}]
            document = ""  # it opens the first message only
        messages.append({"role": "user", "content": prompts.about(document, question)})
        return self._encode(prompts.render(self.tokenizer, messages, "leave out the system message"))


def _turns(text: str, vocabulary: int, file: str) -> list[tuple[str, generation.Answer]]:
    """What `save` noted of the turns. The file may be hostile."""
    try:
        found = json.loads(text)
        fine = all(
            (question + answer).encode() is not None
            and finish in ("stop", "length", "interrupted")
            and all(type(i) is int and 0 <= i < vocabulary for i in ids)
            for question, answer, ids, finish in found
        )
    except (ValueError, TypeError, AttributeError, RecursionError):
        fine = False
    if not fine:
        raise ValueError(f"the turns of the conversation in {file!r} are damaged or forged; read the document again and save it")
    return [(question, generation.Answer(answer, ids, finish, 0.0, 0.0, 0, None)) for question, answer, ids, finish in found]
