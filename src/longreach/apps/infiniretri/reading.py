"""InfiniRetri: questions about a text of any length, which is read chunk by chunk; what is remembered are sentences.

Every chunk is one forward of what is remembered, the chunk and the question. The question's rows in one layer say which sentences it attends to (`scores.py`);
those are remembered for the next chunk, and keys and values are dropped. The answer is generated from what is remembered in the end. Needs the memory of one
forward, whatever the length of the text. Knows models, extensions and generation; not files, options or terminals.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from longreach.apps.infiniretri import calibration, scores
from longreach.apps.infiniretri.calibration import Calibration
from longreach.apps.infiniretri.paid import paid_by
from longreach.apps.infiniretri.prompt import Frame, Prompt, build
from longreach.apps.infiniretri.sentences import Sentence, chunks
from longreach.apps.infiniretri.sizes import LEAST, NoRoom, Sizes, whole
from longreach.hf.checks import require_in_force
from longreach.hf.extension import Extension, extend
from longreach.hf.interfaces import CausalLM, Tokenizer
from longreach.methods.stock import Stock
from longreach.quantities import require_whole
from longreach.running import generation
from longreach.running.sampling import GREEDY, Sampling


@dataclass(frozen=True)
class Retrieved:
    """What was found for one question.

    sentences  what the answer was made from, in their order, each with its place in the text.
    chunks     in which the text was read, of `tokens` tokens in all.
    seconds    the reading of the text, for all questions that were asked together, and this answer.
    layer      that was looked at; sizes: what the parameters came to.
    """

    question: str
    answer: str
    finish: str
    sentences: tuple[Sentence, ...]
    chunks: int
    tokens: int
    new_tokens: int
    reading_seconds: float
    answer_seconds: float
    layer: int
    sizes: Sizes

    @property
    def seconds(self) -> float:
        return self.reading_seconds + self.answer_seconds

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        sentences = [{"start": sentence.start, "stop": sentence.stop, "text": sentence.text} for sentence in self.sentences]
        sizes = {"chunk_tokens": self.sizes.chunk, "memory_tokens": self.sizes.memory, "prompt_tokens": self.sizes.limit, "layer": self.layer}
        counts = {"chunks": self.chunks, "text_tokens": self.tokens, "new_tokens": self.new_tokens}
        seconds = {"reading_seconds": round(self.reading_seconds, 4), "answer_seconds": round(self.answer_seconds, 4)}
        return {"question": self.question, "answer": self.answer, "finish": self.finish, "sentences": sentences, **counts, **seconds, **sizes}


@dataclass(frozen=True)
class Read:
    """What the first `stop` characters of a text left for each question: sentences, those that score best first."""

    memories: tuple[tuple[Sentence, ...], ...]
    chunks: int = 0
    tokens: int = 0
    stop: int = 0


@dataclass(frozen=True, eq=False)
class InfiniRetri:
    """Asks a model about texts of any length.

        found = InfiniRetri(model, tokenizer).ask(text, "Who is the captain?")
        found.answer, [(sentence.start, sentence.text) for sentence in found.sentences]

    model          or its extension: chunks are then read under its method, and may be as long as that reaches.
    chunk_tokens   of the text in one forward; 1024 if not given, or less where the window has no room for them.
    memory_tokens  that are remembered at most; half of a chunk if not given.
    top_k          the sentences of so many tokens are kept, as long as there is room.
    phrase         tokens whose scores are added up.
    layer          whose attention is looked at: a number; "last", as in the paper, of those that see a whole prompt; or "auto", the first that is about as
                   good as the best of these (`calibrate`, once, before the first chunk). A chunk is read up to this layer only.
    order          of the sentences that the answer is made from: "rank", the best last, nearest to the question; or "text", as in the paper.
    system         a system message; needs a chat template.

    Raises ValueError for sizes that are none, or that the window has no room for, and for a tokenizer that cannot say where its tokens lie.
    """

    model: CausalLM | Extension
    tokenizer: Tokenizer
    chunk_tokens: int | None = None
    memory_tokens: int | None = None
    top_k: int = 300
    phrase: int = 8
    layer: int | Literal["auto", "last"] = "auto"
    order: Literal["rank", "text"] = "rank"
    system: str | None = None
    _calibrated: list[int] = field(default_factory=list, init=False, repr=False)  # the layer that "auto" has come to

    def __post_init__(self) -> None:
        for name, least in (("chunk_tokens", LEAST), ("memory_tokens", LEAST), ("top_k", 1), ("phrase", 1)):
            if (value := getattr(self, name)) is not None:
                require_whole(name, value, least)
        if self.order not in ("rank", "text"):
            raise ValueError(f'order must be "rank" or "text", not {self.order!r}')
        if self.layer not in ("auto", "last") and (not isinstance(self.layer, int) or isinstance(self.layer, bool) or self.layer < 0):
            raise ValueError(f'layer must be a whole number of at least 0, "last" or "auto", not {self.layer!r}')

    def to_json(self) -> dict[str, Any]:
        """The parameters, as they were given."""
        names = ("chunk_tokens", "memory_tokens", "top_k", "phrase", "layer", "order")
        return {"strategy": "infiniretri", **{name: getattr(self, name) for name in names}}

    def ask(self, text: str | Iterable[str], question: str, **how: Any) -> Retrieved:
        """One question; `how` as in `ask_all`."""
        return self.ask_all(text, [question], **how)[0]

    def ask_all(
        self,
        text: str | Iterable[str],
        questions: Iterable[str],
        max_new_tokens: int = 128,
        *,
        sampling: Sampling = GREEDY,
        write: Callable[[str], None] = lambda text: None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Retrieved]:
        """Questions about one text, which is read once for all of them; each remembers what it attends to. The answers are those of single calls with the same
        `chunk_tokens` and `memory_tokens`; where these are not given, the longest question decides them for all.

        text      or its pieces, such as an open file, which need not be in memory.
        write     gets the answers as they come, one after the other.
        progress  gets the number of characters that were read so far.
        """
        questions = [] if isinstance(questions, str) else [*questions]
        if not questions:
            raise ValueError("pass a list of at least one question, or one to ask()")
        require_whole("max_new_tokens", max_new_tokens)
        frames = [Frame.of(self.tokenizer, question, self.system) for question in questions]
        found = []
        with self.attached() as extension:
            started = time.perf_counter()
            sizes = self.sizes(extension, frames, max_new_tokens)
            read = self.read(extension, text, frames, sizes, progress)
            reading, layer = time.perf_counter() - started, self.tapped(extension)
            for question, frame, memory in zip(questions, frames, read.memories, strict=True):
                answer, sentences = self.answer(extension, frame, memory, sizes, max_new_tokens, sampling=sampling, write=write)
                found.append(
                    Retrieved(
                        question=question,
                        answer=answer.text,
                        finish=answer.finish,
                        sentences=sentences,
                        chunks=read.chunks,
                        tokens=read.tokens,
                        new_tokens=answer.tokens,
                        reading_seconds=reading,
                        answer_seconds=answer.prefill_seconds + answer.decode_seconds,
                        layer=layer,
                        sizes=sizes,
                    )
                )
        return found

    @contextmanager
    def attached(self) -> Iterator[Extension]:
        """The extension that was given, or plain attention on our engine, which is taken off again."""
        if isinstance(self.model, Extension):
            yield self.model
            return
        model: Any = self.model
        with extend(model, Stock()) as extension:
            yield extension

    def steps(self, extension: Extension, text: str | Iterable[str], frames: Sequence[Frame], sizes: Sizes, read: Read | None = None) -> Iterator[Read]:
        """What is remembered after every chunk. `read`: where an earlier reading of the same text stood, to go on from there."""
        read = Read(((),) * len(frames)) if read is None else read
        texts: Iterable[str] = [text] if isinstance(text, str) or not isinstance(text, Iterable) else text
        for chunk, size in chunks(self.tokenizer, texts, sizes.chunk, sizes.sentence, read.stop):
            if not read.chunks and all(sentence.text.isspace() for sentence in chunk):  # white space that a text begins with
                continue
            asked = [self.fitted(frame, memory, chunk, sizes) for frame, memory in zip(frames, read.memories)]
            layer, memories = self.tapped(extension), []
            for prompt, paid in zip(asked, paid_by(extension, [layer], asked, self.tokenizer.pad_token_id or 0)):
                found = scores.token_scores(paid[layer], prompt.question, prompt.context, self.phrase)
                memories.append(_remembered(scores.best(found, prompt.owners, self.top_k), prompt, sizes.memory))
            read = Read(tuple(memories), read.chunks + 1, read.tokens + size, chunk[-1].stop)
            yield read

    def read(
        self, extension: Extension, text: str | Iterable[str], frames: Sequence[Frame], sizes: Sizes, progress: Callable[[int], None] = lambda done: None
    ) -> Read:
        """The last of the steps. Raises ValueError for a text without words."""
        read = None
        for read in self.steps(extension, text, frames, sizes):
            progress(read.stop)
        if read is None:
            raise ValueError("the text is empty; pass one with words")
        return read

    def answer(
        self, extension: Extension, frame: Frame, memory: Sequence[Sentence], sizes: Sizes, max_new_tokens: int, **how: Any
    ) -> tuple[generation.Answer, tuple[Sentence, ...]]:
        """From what is remembered -> the answer, and the sentences that it was made from, as they stand in the text."""
        prompt = self.fitted(frame, memory, (), replace(sizes, limit=sizes.limit - max_new_tokens), self.order)
        kept = tuple(sorted(prompt.sentences, key=lambda sentence: sentence.start))
        return generation.answer(extension.model, self.tokenizer, prompt.ids, max_new_tokens, extension=extension, **how), kept

    def sizes(self, extension: Extension, frames: Sequence[Frame], max_new_tokens: int) -> Sizes:
        """Raises ValueError, with the numbers, where the window has no room for them."""
        around = max(len(build(self.tokenizer, frame, []).ids) for frame in frames)
        layer = self.layer if isinstance(self.layer, int) else whole(extension)[-1]
        return Sizes.of(extension, self._existing(extension, layer), around, max_new_tokens, self.chunk_tokens, self.memory_tokens)

    def calibrate(self, text: str | None = None, samples: int = 8, seed: int = 0) -> Calibration:
        """How much of a chunk each layer puts before the sentence that answers; see `calibration.calibrate`. `replace(asking, layer=...)` looks there."""
        with self.attached() as extension:
            return self._compared(extension, text, samples, seed)

    def _compared(self, extension: Extension, text: str | None = None, samples: int = 8, seed: int = 0) -> Calibration:
        def size(frame: Frame) -> Sizes:
            """Its own question is not the one that is asked, so sizes that were given for that one are no more than a limit."""
            found = free.sizes(extension, [frame], calibration.NEW)
            return replace(found, chunk=min(found.chunk, self.chunk_tokens or found.chunk), memory=min(found.memory, self.memory_tokens or found.memory))

        free = replace(self, layer="last", chunk_tokens=None, memory_tokens=None)
        try:
            return calibration.calibrate(extension, self.tokenizer, size, whole(extension), self.phrase, self.system, text, samples, seed)
        except NoRoom as error:
            raise ValueError(f'the layers cannot be compared here: {error}; or pass layer="last" (--layer last) or a number, which compares none') from None

    def tapped(self, extension: Extension) -> int:
        """The layer that is looked at. Reads the chunks of a calibration, where that is to find it and has not yet."""
        layers = whole(extension)
        if self.layer == "auto" and len(layers) > 1:
            if not self._calibrated:
                self._calibrated.append(self._compared(extension).layer)
            return self._existing(extension, self._calibrated[0])
        return self._existing(extension, self.layer if isinstance(self.layer, int) else layers[-1])

    @staticmethod
    def _existing(extension: Extension, layer: int) -> int:
        require_in_force(extension)
        count = len(extension.layers)
        if layer >= count:
            raise ValueError(f"layer must be one of the {count} of this model, 0 to {count - 1}, not {layer}")
        return layer

    def fitted(
        self, frame: Frame, memory: Sequence[Sentence], chunk: Sequence[Sentence], sizes: Sizes, order: Literal["rank", "text"] = "text"
    ) -> Prompt:
        """The prompt with as much of what is remembered, the best first, as there is room for."""
        while True:
            placed = reversed(memory) if order == "rank" else sorted(memory, key=lambda sentence: sentence.start)
            prompt = build(self.tokenizer, frame, [*placed, *chunk])
            held = bisect_left(prompt.owners, len(memory))
            if not memory or (len(prompt.ids) <= sizes.limit and held <= sizes.memory):
                return prompt
            memory = memory[:-1]


def _remembered(best: Sequence[int], prompt: Prompt, room: int) -> tuple[Sentence, ...]:
    """Of the sentences of a prompt those that are best, by their numbers, as long as there is room for their tokens."""
    tokens, kept = Counter(prompt.owners), []
    for number in best:
        if tokens[number] <= room:
            kept.append(prompt.sentences[number])
            room -= tokens[number]
    return tuple(kept)
