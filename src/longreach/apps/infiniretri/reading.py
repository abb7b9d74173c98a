"""InfiniRetri: questions about a text of any length, which is read chunk by chunk; what is remembered are sentences.

Every chunk is one forward of what is remembered, the chunk and the question. The question's rows in one layer say which sentences it attends to (`scores.py`);
those are remembered for the next chunk, and keys and values are dropped. The answer is generated from what is remembered in the end. Needs the memory of one
forward, whatever the length of the text. Knows models, extensions and generation; not files, options or terminals.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from longreach.apps.infiniretri import scores
from longreach.apps.infiniretri.prompt import Frame, Prompt, build
from longreach.apps.infiniretri.sentences import Sentence, chunks
from longreach.engine.layer import Layer
from longreach.hf.extension import Extension, extend
from longreach.hf.interfaces import CausalLM, Tokenizer
from longreach.hf.placement import device_of
from longreach.methods.stock import Stock
from longreach.quantities import counted
from longreach.running import generation
from longreach.running.sampling import GREEDY, Sampling

CHUNK = 1024  # tokens of a chunk, where the window has room for them
LEAST = 32  # tokens of a chunk, and of what is remembered
LONGEST = 128  # tokens of a sentence
SPARE = 16  # tokens of a prompt: where texts meet, a tokenizer may make a few more
TOKENS_AT_ONCE = 2**14  # of the questions that are asked in one forward


@dataclass(frozen=True)
class Sizes:
    """Tokens: of a chunk, of what is remembered, of a sentence, and of the largest prompt."""

    chunk: int
    memory: int
    sentence: int
    limit: int


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
    layer          whose attention is looked at; if not given, the last one that sees a whole prompt. `calibration.calibrate` finds a better one.
    system         a system message; needs a chat template.

    Raises ValueError for sizes that are none, or that the window has no room for, and for a tokenizer that cannot say where its tokens lie.
    """

    model: CausalLM | Extension
    tokenizer: Tokenizer
    chunk_tokens: int | None = None
    memory_tokens: int | None = None
    top_k: int = 300
    phrase: int = 8
    layer: int | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("chunk_tokens", LEAST), ("memory_tokens", LEAST), ("top_k", 1), ("phrase", 1), ("layer", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")

    def to_json(self) -> dict[str, Any]:
        """The parameters, as they were given."""
        names = ("chunk_tokens", "memory_tokens", "top_k", "phrase", "layer")
        return {"strategy": "infiniretri", **{name: getattr(self, name) for name in names}}

    def ask(self, text: str | Iterable[str], question: str, **how: Any) -> Retrieved:
        """One question; `how` as in `ask_all`."""
        return self.ask_all(text, [question], **how)[0]

    def ask_all(
        self,
        text: str | Iterable[str],
        questions: Sequence[str],
        max_new_tokens: int = 128,
        *,
        sampling: Sampling = GREEDY,
        write: Callable[[str], None] = lambda text: None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Retrieved]:
        """Questions about one text, which is read once for all of them; each remembers what it attends to.

        text      or its pieces, such as an open file, which need not be in memory.
        write     gets the answers as they come, one after the other.
        progress  gets the number of characters that were read so far.
        """
        if isinstance(questions, str) or not questions:
            raise ValueError("pass a list of at least one question, or one to ask()")
        frames = [Frame.of(self.tokenizer, question, self.system) for question in questions]
        found = []
        with self.attached() as extension:
            started = time.perf_counter()
            sizes, layer = self.sizes(extension, frames, max_new_tokens), self.tapped(extension)
            read = self.read(extension, text, frames, sizes, progress)
            reading = time.perf_counter() - started
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
        read, layer = Read(((),) * len(frames)) if read is None else read, self.tapped(extension)
        for chunk, size in chunks(self.tokenizer, [text] if isinstance(text, str) else text, sizes.chunk, sizes.sentence, read.stop):
            if not read.chunks and all(sentence.text.isspace() for sentence in chunk):  # white space that a text begins with
                continue
            asked = [self.fitted(frame, memory, chunk, sizes) for frame, memory in zip(frames, read.memories)]
            memories = []
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
        """From what is remembered -> the answer, and the sentences that it was made from."""
        prompt = self.fitted(frame, memory, (), replace(sizes, limit=sizes.limit - max_new_tokens))
        return generation.answer(extension.model, self.tokenizer, prompt.ids, max_new_tokens, extension=extension, **how), prompt.sentences

    def sizes(self, extension: Extension, frames: Sequence[Frame], max_new_tokens: int) -> Sizes:
        """Raises ValueError, with the numbers, where the window has no room for them."""
        limit = _limit(extension, self.tapped(extension))
        around = max(len(build(self.tokenizer, frame, []).ids) for frame in frames)
        room = limit - around - SPARE
        chunk = self.chunk_tokens or min(CHUNK, room * 2 // 3 if self.memory_tokens is None else room - self.memory_tokens)
        memory = self.memory_tokens or min(chunk // 2, room - max(chunk, max_new_tokens))
        if chunk < LEAST or memory < LEAST or chunk + memory > room or memory + max_new_tokens > room:
            raise ValueError(
                f"a prompt may have {counted(limit, 'token')} here ({extension.method.brief()}), of which question and template take {around + SPARE}; there "
                f"is no room for chunks of {max(chunk, LEAST)} and an answer of {max_new_tokens}, each beside {max(memory, LEAST)} that are remembered; "
                "shorten the question, pass smaller chunk_tokens, memory_tokens or max_new_tokens, or extend the model to a longer context"
            )
        return Sizes(chunk, memory, min(LONGEST, memory // 2, chunk // 2), limit)

    def tapped(self, extension: Extension) -> int:
        """The layer that is looked at."""
        if not extension.attached:
            raise ValueError("this extension was removed from its model; extend() it again, or pass the model alone")
        count = len(extension.layers)
        if self.layer is not None and self.layer >= count:
            raise ValueError(f"layer must be one of the {count} of this model, 0 to {count - 1}, not {self.layer}")
        whole = [layer.index for layer in extension.layers if _reach(layer) is None]
        return self.layer if self.layer is not None else whole[-1] if whole else count - 1

    def fitted(self, frame: Frame, memory: Sequence[Sentence], chunk: Sequence[Sentence], sizes: Sizes) -> Prompt:
        """The prompt with as much of what is remembered, the best first, as there is room for."""
        while True:
            prompt = build(self.tokenizer, frame, [*sorted(memory, key=lambda sentence: sentence.start), *chunk])
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


def paid_by(extension: Extension, layers: Collection[int] | None, asked: Sequence[Prompt], pad: int) -> Iterator[dict[int, torch.Tensor]]:
    """Of each prompt, layer -> [T, N]: what its tokens from the first of the question on pay, heads added up. Some are read together, with pads behind."""
    together = max(1, TOKENS_AT_ONCE // max(len(prompt.ids) for prompt in asked))
    device = device_of(extension.model)
    for first in range(0, len(asked), together):
        some = asked[first : first + together]
        longest = max(len(prompt.ids) for prompt in some)
        ids = torch.tensor([prompt.ids + [pad] * (longest - len(prompt.ids)) for prompt in some], device=device)
        mask = torch.tensor([[1] * len(prompt.ids) + [0] * (longest - len(prompt.ids)) for prompt in some], device=device)
        with torch.no_grad(), extension.watching_probabilities([prompt.question.start for prompt in some], layers) as watch:
            extension.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        for row, prompt in enumerate(some):
            tokens = len(prompt.ids)
            yield {layer: paid[row, : tokens - prompt.question.start, :tokens] for layer, paid in watch.paid.items()}


def _limit(extension: Extension, layer: int) -> int:
    """Tokens that a prompt may have: so many that the layer sees the whole from its end."""
    known = (extension.context, extension.capacity, _reach(extension.layers[layer]))
    return min((tokens for tokens in known if tokens is not None), default=extension.window.tokens)


def _reach(layer: Layer) -> int | None:
    """How far back a layer looks; None: to the first token."""
    reaches = [segment.visible.reach for segment in layer.layout.segments if segment.visible.last_key is None]
    known = [reach for reach in reaches if reach is not None]
    return None if len(known) < len(reaches) else max(known, default=None)
