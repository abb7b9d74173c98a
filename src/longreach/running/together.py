"""Many prompts, generated for together: every forward decodes a token of each request that has begun and reads a chunk of those that are still reading.

Knows an extension's flat forwards and logits processors; not text, files or clocks. Waiting requests take the places of those that are done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from longreach.hf.extension import Extension
from longreach.hf.flat import Flat
from longreach.methods.base import Method
from longreach.quantities import CHUNK_SIZE
from longreach.running.generation import GREEDY, Sampling

AT_ONCE = 16
OTHERS: dict[str, tuple[Any, ...]] = {  # settings of a checkpoint that would change a token, and what they are where they do nothing
    "no_repeat_ngram_size": (None, 0), "encoder_no_repeat_ngram_size": (None, 0), "bad_words_ids": (None,), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,), "suppress_tokens": (None, []), "begin_suppress_tokens": (None, []), "sequence_bias": (None,), "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0), "guidance_scale": (None, 1, 1.0), "min_length": (None, 0), "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,), "watermarking_config": (None,), "encoder_repetition_penalty": (None, 1.0),
}  # fmt: skip


@dataclass(frozen=True)
class Generated:
    """ids are the new tokens. `finish`: "stop" at one of the model's end tokens, which is among them, or "length"."""

    ids: list[int]
    finish: Literal["stop", "length"]


@dataclass(eq=False)
class _Request:
    """A prompt on its way. `name` is its request of the flat forwards, None before it has begun."""

    number: int
    ids: list[int]
    generator: torch.Generator
    name: int | None = None
    read: int = 0
    new: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Tokens that are known and not read."""
        return len(self.ids) + len(self.new) - self.read


def generate(
    extension: Extension,
    prompts: Sequence[Sequence[int] | torch.Tensor],
    max_new_tokens: int = 128,
    *,
    sampling: Sampling = GREEDY,
    at_once: int = AT_ONCE,
    chunk_size: int = CHUNK_SIZE,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Generated]:
    """New tokens for every prompt, the same as for each of them alone, in flat batches.

    prompts     token ids, one list each; `tokenizer(text)["input_ids"]`.
    sampling    greedy, or with a temperature; a prompt draws from a generator of its own, seeded by `sampling.seed` and its place in the list.
    at_once     requests that hold memory at one time.
    chunk_size  prompt tokens of one forward, of all requests together. A method that allows no cut reads a prompt whole.
    progress    gets the number of prompts that are done.

    Raises ValueError for an empty prompt or one that does not fit the declared context, and where a flat forward is not exact on this model (see `Flat`).
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("at_once", at_once), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    texts = [torch.as_tensor(prompt).reshape(-1).tolist() for prompt in prompts]
    for number, text in enumerate(texts):
        if not text:
            raise ValueError(f"prompt {number} is empty; pass at least one token, such as the tokenizer's bos_token_id")
        if extension.context is not None and len(text) + max_new_tokens > extension.context:
            raise ValueError(
                f"prompt {number} has {len(text)} tokens, and with {max_new_tokens} new ones it exceeds the declared context of {extension.context}; "
                f"shorten it, or extend(model, context={len(text) + max_new_tokens})"
            )
    model: Any = extension.model
    config = model.generation_config
    end = config.eos_token_id
    ends = set() if end is None else {end} if isinstance(end, int) else set(end)
    processors = _processors(config, sampling)
    flat = extension.flat()
    waiting = [_Request(n, text, torch.Generator().manual_seed((sampling.seed + n) % 2**63)) for n, text in enumerate(texts)]
    active: list[_Request] = []
    found: dict[int, Generated] = {}
    while waiting or active:
        while waiting and len(active) < at_once:
            active.append(waiting.pop(0))
            active[-1].name = flat.join()
        for request in _step(flat, active, chunk_size, extension.method, processors, sampling.temperature is not None):
            stopped = request.new[-1] in ends
            if stopped or len(request.new) >= max_new_tokens:
                found[request.number] = Generated(request.new, "stop" if stopped else "length")
                assert request.name is not None
                flat.leave(request.name)
                active.remove(request)
                progress(len(found))
    return [found[n] for n in range(len(texts))]


def _step(flat: Flat, active: list[_Request], chunk_size: int, method: Method, processors: Any, draw: bool) -> list[_Request]:
    """One forward -> the requests that have one more token."""
    new: dict[int, list[int]] = {}
    budget = max(chunk_size, method.cut or 1)
    for request in active:
        assert request.name is not None
        if request.new:
            count = request.left
        else:
            count = _next(method, request.read, len(request.ids), budget)
            budget -= count
        if count > 0:
            known = request.ids + request.new
            new[request.name] = known[request.read : request.read + count]
            request.read += count
    logits = flat.read(new)
    advanced = []
    for request in active:
        if request.left or request.name not in new:  # more of its prompt is to be read
            continue
        scores = logits[request.name].float()[None]
        scores = processors(torch.tensor([request.ids + request.new], device=scores.device), scores)
        token = torch.multinomial(scores.softmax(-1).cpu(), 1, generator=request.generator) if draw else scores.argmax(-1)
        request.new.append(int(token))
        advanced.append(request)
    return advanced


def _next(method: Method, read: int, prompt: int, budget: int) -> int:
    """How many more tokens of a prompt to read, of which `budget` are to be read at most, where the method allows to cut it there."""
    if budget < (method.cut or 1):
        return 0
    if method.cut is None or prompt - read <= budget:
        return prompt - read
    last = min((read + budget) // method.cut * method.cut, method.apart(prompt))
    return last - read if last > read else prompt - read


def _processors(config: Any, sampling: Sampling) -> Any:
    """What stock `generate` does to logits under the checkpoint's own settings with ours over them. Raises ValueError for those that are not honoured here."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    for name, idle in OTHERS.items():
        if (value := getattr(config, name, None)) not in idle:
            raise ValueError(
                f"the checkpoint's generation settings have {name}={value}, which is not honoured here; set model.generation_config.{name} = None, or use "
                "model.generate for each prompt"
            )
    found = LogitsProcessorList()
    if config.repetition_penalty not in (None, 1.0):
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if sampling.temperature is not None:
        if sampling.temperature != 1.0:
            found.append(TemperatureLogitsWarper(sampling.temperature))
        if config.top_k:
            found.append(TopKLogitsWarper(config.top_k))
        if sampling.top_p is not None and sampling.top_p < 1.0:
            found.append(TopPLogitsWarper(sampling.top_p))
        if config.min_p is not None:
            found.append(MinPLogitsWarper(config.min_p))
    return found
