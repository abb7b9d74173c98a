"""The engine of an evaluation: a model under a method, which reads a document once for all questions about it.

Knows prompts, the library's generation and caches; not tasks, scores or files.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from longreach import configs
from longreach.core.segments import Layout
from longreach.evals.harness.costs import Work
from longreach.evals.harness.engine import Reply, one_by_one
from longreach.evals.harness.together import ONE, Answering, Several, several
from longreach.evals.samples.budget import Prompt
from longreach.hf.checks import find_base
from longreach.hf.extension import Extension, extend
from longreach.hf.interfaces import CausalLM, Tokenizer
from longreach.memory.budgets import Tiered
from longreach.memory.placement import ROLLBACK
from longreach.methods.base import Method
from longreach.planning import dial, machine
from longreach.planning.profile import Profile
from longreach.planning.work import count, ramp
from longreach.quantities import CHUNK_SIZE
from longreach.running import generation
from longreach.running.prefix import Prefix

WARM_UP = 64  # tokens of the prompt that is answered first and not timed


@dataclass
class ModelEngine:
    """A model under an extension (None: the stock model, which reads every prompt in one forward).

    A document that several prompts share is read once, if the method allows to cut a prompt there; between questions the
    cache is cropped to the end of the document. Where the store cannot go back so far (bounded methods keep 128 tokens), it is read again.
    Prompts are cut at the end of their document in both cases, so that an answer does not depend on what was asked before.

    several  how many prompts `answers` reads together, in flat forwards; their document is then read once and forked.
    """

    model: CausalLM
    tokenizer: Tokenizer
    extension: Extension | None = None
    chunk_size: int = CHUNK_SIZE
    several: Several = ONE
    failures: list[str] = field(default_factory=list)  # why some were not read together after all
    _prefix: Prefix = field(default_factory=Prefix, repr=False)
    _warm: bool = False

    @property
    def reuses(self) -> bool:
        return self.extension is not None and self.extension.method.cut is not None

    @property
    def alone(self) -> list[str]:
        """Why samples were read one by one although nobody asked for it."""
        return [*([] if self.several.size > 1 or self.several == ONE else [f"samples are read one by one: {self.several.reason}"]), *self.failures]

    @property
    def work(self) -> Work:
        """What reading a prompt costs, counted from the layouts that the executor follows."""
        found = work_of(self.model, self.extension, shares=self.reuses)
        return replace(found, back=None) if self.reuses and self.several.size > 1 else found

    def answers(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Reply | Exception]]:
        """Several at a time, or one after the other. An answer is the same either way."""
        if self.extension is None or self.several.size == 1:
            yield from one_by_one(self, prompts)
            return
        device = self._prepared(WARM_UP * [1])
        how = self.model, self.tokenizer, self.extension, self.several.size, self.chunk_size
        self._prefix.forget()
        yield from Answering(*how, self.reuses, self.answer, lambda: peak_memory(device), self.failures).answers(prompts)

    def _prepared(self, ids: list[int]) -> torch.device:
        """Something has been read, which is not timed, and the peak of memory counts from now on."""
        if not self._warm:
            with suppress(ValueError):  # whatever is wrong with the model is said of its samples
                generation.answer(self.model, self.tokenizer, ids[:WARM_UP], 2, extension=self.extension, chunk_size=self.chunk_size)
            self._warm = True
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        return device

    def answer(self, prompt: Prompt) -> Reply:
        device = self._prepared(prompt.ids)
        started = time.perf_counter()
        cache, reused = self._read(prompt)
        reading = time.perf_counter() - started
        found = generation.answer(
            self.model,
            self.tokenizer,
            prompt.ids,
            prompt.sample.max_new_tokens,
            extension=self.extension,
            chunk_size=self.chunk_size,
            cache=cache,
            stop=prompt.sample.stop,
        )
        if cache is not None:
            self._prefix.keep(found.cache, prompt.ids + found.ids)
        return Reply(found.text, found.tokens, found.finish, reading + found.prefill_seconds, found.decode_seconds, reused, peak_memory(device))

    def _read(self, prompt: Prompt) -> tuple[Any, int]:
        """-> (a cache that holds the document of the prompt, how many of its tokens it held already); None where nothing is to be used again."""
        document: list[int] = []
        if self.extension is not None and (cut := self.extension.method.cut) is not None:
            document = prompt.ids[: self.extension.method.apart(min(prompt.shared + cut, len(prompt.ids)))]
        if not document or self._prefix.ids[: len(document)] != document:  # what another document begins with is read again: reuse is all or nothing
            self._prefix.forget()
        if not document:
            return None, 0
        assert self.extension is not None
        reused = self._prefix.read(self.extension, document, chunk_size=self.chunk_size)
        return self._prefix.resume(document)[0], reused


def work_of(model: Any, extension: Extension | None, *, shares: bool) -> Work:
    """`shares`: questions about a document read it once. A pair of a query and a key is taken for 4 FLOP per hidden element; weights of experts that a token
    does not meet are counted too. Measured speeds make up for such factors."""
    tables = [module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    met = sum(p.numel() for p in model.parameters() if p.dim() > 1 and all(p is not table for table in tables))
    layouts: Counter[Layout | None]  # None: the dense truth
    if extension is None:
        layouts = Counter(own.layout(index) for index, own in enumerate(configs.trained_layers(find_base(model).config)))
    else:
        layouts = Counter(None if layer.dense else layer.layout for layer in extension.layers)
    width = 4.0 * tables[0].shape[-1]

    def attention(start: int, stop: int) -> float:
        return width * sum(times * pairs(layout, start, stop) for layout, times in layouts.items())

    bounded = extension is not None and any(kept.tail is not None for layer in extension.layers for kept in layer.forms.values())
    return Work(2.0 * met, attention, (ROLLBACK if bounded else None) if shares else 0)


def pairs(layout: Layout | None, start: int, stop: int) -> float:
    """Of queries start .. stop and the keys that they see; where a key is only scored, half of one."""
    if layout is None:
        return ramp(stop) - ramp(start)
    found = count(layout, start, stop)
    return found.pairs + found.scored / 2


@dataclass(frozen=True)
class Span:
    """limit    tokens that a prompt and its answer may have; None: no limit.
    context  what is declared to the method."""

    limit: int | None
    context: int


def span(method: Method | None, window: int, declared: int | None, needed: int) -> Span:
    """How long prompts may be under a method, where the longest needs so many tokens. Stock may go beyond its window, for comparison."""
    if declared is not None:
        return Span(declared, declared)
    capacity = None if method is not None and method.needs_context else dial.limit(method, window)
    return Span(capacity, needed if capacity is None else min(needed, capacity))


@contextmanager
def attached(
    model: CausalLM, tokenizer: Tokenizer, method: Method | None, context: int, *,
    trained_window: int | None = None, profile: Profile | None = None, chunk_size: int = CHUNK_SIZE, batch_size: int | None = 1,
    memory: Tiered | None = None,
) -> Iterator[ModelEngine]:  # fmt: skip
    """The model under the method, or under what the dial chooses for the context, by the profile if there is one. `batch_size`: samples that are read
    together; None: as many samples of the whole context as there is memory for."""
    window = configs.trained_window(find_base(model).config, trained_window).tokens
    declared = dial.declare(method, window, context)[0]
    with extend(model, method, context=declared, trained_window=trained_window, profile=profile, memory=memory) as extension:
        yield ModelEngine(model, tokenizer, extension, chunk_size, several(extension, batch_size, context, 1, chunk_size))


def peak_memory(device: torch.device) -> int | None:
    """Bytes: on the device since the last reset; on the CPU the largest resident size of the process so far, None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return machine.peak_memory()
