"""One answer: read the prompt in chunks into a cache, then stock `generate`, timed. A conversation hands the cache on.

Knows a model, the extension it may have, Transformers' generate and clocks; not files, options or terminals.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from longreach.hf.cache import cache_bytes
from longreach.hf.checks import require_in_force
from longreach.hf.extension import Extension
from longreach.hf.interfaces import CausalLM, Tokenizer
from longreach.hf.placement import device_of
from longreach.quantities import CHUNK_SIZE
from longreach.running.beginnings import begins_with
from longreach.running.reading import stream
from longreach.running.resuming import Kept
from longreach.running.sampling import GREEDY, Sampling, Sound


@dataclass(frozen=True)
class Answer:
    """prefill_seconds is the time to the first new token; decode_seconds that of all further ones.

    ids are the new tokens; `cache` holds the prompt and all of them but the last. An answer that was interrupted while its prompt was read has none,
    and its cache holds what was read.
    """

    text: str
    ids: list[int]
    finish: Literal["stop", "length", "interrupted"]
    prefill_seconds: float
    decode_seconds: float
    store_bytes: int
    cache: Any

    @property
    def tokens(self) -> int:
        return len(self.ids)


def answer(
    model: CausalLM,
    tokenizer: Tokenizer,
    ids: list[int] | torch.Tensor,
    max_new_tokens: int,
    *,
    extension: Extension | None = None,
    chunk_size: int = CHUNK_SIZE,
    sampling: Sampling = GREEDY,
    cache: Any = None,
    resume: Kept | None = None,
    stop: tuple[str, ...] = (),
    beginnings: Sequence[Sequence[int]] = (),
    write: Callable[[str], None] = lambda text: None,
    progress: Callable[[int], None] = lambda done: None,
    stopped: Callable[[], bool] | None = None,
) -> Answer:
    """Generate after `ids`. `write` gets the text as it comes, `progress` the number of prompt tokens read so far.

    extension  the one in force on the model; None is the stock model, which reads the prompt in one forward. So does a method that allows no cut.
    cache      that of an earlier answer, to go on from: `ids` still is the whole sequence and begins with what the cache holds.
    resume     where the prompt is kept while it is read, and what was read of it before; see `stream`.
    stop       strings that end the answer and are left out of its text. White space before the first word is not searched for them.
    beginnings token ids: the answer begins with one of these.
    stopped    asked between chunks and after each token; once it is true the answer ends there, whole and consistent with its cache.

    Raises ValueError where the model gives NaN or infinity for a token.
    """
    from transformers import DynamicCache, LogitsProcessorList

    if extension is not None:
        require_in_force(extension, model)
    prompt = torch.as_tensor(ids, device=device_of(model))[None]
    config = generation_config(model, tokenizer, max_new_tokens, sampling)
    sound = Sound()
    streamer = _streamer(tokenizer, write, sound)
    started = time.perf_counter()
    cache = resume.cache if resume is not None else DynamicCache() if cache is None else cache
    known = cache.get_seq_length()
    if known >= len(ids):
        raise ValueError(f"the cache holds {known} tokens and the sequence only {len(ids)}; pass the whole sequence with something new at its end")
    early = known if extension is None else extension.method.apart(len(ids))  # the rest is left for generate, which needs the last token's logits
    if extension is not None and early - known >= (extension.method.cut or 1):
        begin = known if resume is None else 0  # `resume` looks at all of it
        cache = cache if resume is None else None
        for chunk in stream(extension, prompt[0, begin:early], chunk_size=chunk_size, losses=False, cache=cache, resume=resume):
            cache = chunk.cache
            progress(min(chunk.start + chunk_size, early))
            if stopped is not None and stopped():
                return Answer("", [], "interrupted", time.perf_counter() - started, 0.0, cache_bytes(cache), cache)
    if extension is not None and (eviction := extension.method.eviction) is not None:
        extension.turn(cache, min(max_new_tokens, eviction.turn))  # the answer, without its last token, and that before it
    criteria = _stopping(tokenizer, len(ids), stop, stopped)
    with torch.no_grad(), own_random_state(sampling.seed, prompt.device):
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            generation_config=config,
            streamer=streamer,
            stopping_criteria=criteria,
            logits_processor=LogitsProcessorList([sound, *begins_with(len(ids), beginnings)]),
            return_dict_in_generate=True,
        )
    ended = time.perf_counter()
    new = output.sequences[0, len(ids) :].tolist()
    cache = output.past_key_values  # a stock Phi-3 goes on with another than it was given where its frequencies switch
    if (held := cache.get_seq_length()) != len(ids) + len(new) - 1:
        raise ValueError(
            f"generate ended with {held} tokens in its cache where {len(ids) + len(new) - 1} were read: this version of Transformers loses the beginning of "
            "a text where Phi-3 switches its frequencies; update Transformers, or extend the model, which fixes them for a sequence"
        )
    first = streamer.first or ended
    text = tokenizer.decode(new, skip_special_tokens=True)
    end = stop_at(text, stop)
    finish: Literal["stop", "length", "interrupted"] = "stop"
    if new[-1] not in _ends(config) and end is None:
        finish = "length" if len(new) >= max_new_tokens else "interrupted" if stopped is not None and stopped() else "stop"
    return Answer(
        text=text[:end],
        ids=new,
        finish=finish,
        prefill_seconds=first - started,
        decode_seconds=ended - first,
        store_bytes=cache_bytes(cache),
        cache=cache,
    )


@contextmanager
def own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the process draws what a generator of this seed draws on the CPU and on the device; afterwards it goes on with what it had.

    Transformers samples from the generators of the process and takes no other. So requests may be nested, or follow each other, but not sample in two
    threads at once.
    """
    own = [(torch.random, torch.device("cpu"), ())]  # type: list[tuple[Any, torch.device, tuple[Any, ...]]]
    if device.type != "cpu":
        own.append((torch.get_device_module(device), device, () if device.type == "mps" else (device,)))
    before = [module.get_rng_state(*where) for module, _, where in own]
    try:
        for module, place, where in own:
            module.set_rng_state(torch.Generator(place).manual_seed(seed).get_state(), *where)
        yield
    finally:
        for (module, _, where), state in zip(own, before):
            module.set_rng_state(state, *where)


def generation_config(model: CausalLM, tokenizer: Tokenizer, max_new_tokens: int, sampling: Sampling) -> Any:
    """The checkpoint's own settings with ours over them: greedy unless a temperature was asked for, one beam, our cache."""
    config = copy.deepcopy(model.generation_config)
    config.max_length = None
    config.max_new_tokens = max_new_tokens
    config.num_beams, config.use_cache, config.cache_implementation = 1, True, None
    config.do_sample = sampling.temperature is not None
    config.temperature = sampling.temperature
    config.top_p = sampling.top_p
    if sampling.temperature is None:
        config.top_k = None
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(_ends(config)), None)
    return config


def stop_at(text: str, stop: tuple[str, ...]) -> int | None:
    """Where the first of the strings begins, after the white space that the text may begin with."""
    begins = len(text) - len(text.lstrip())
    return min((at for end in stop if (at := text.find(end, begins)) >= 0), default=None)


def ends_with(tokenizer: Tokenizer, stop: tuple[str, ...]) -> Callable[[list[int]], bool]:
    """Whether new tokens write one of the strings, wherever the tokens that write it are cut. Such answers are short: decoding them anew is cheap."""
    return lambda new: bool(stop) and stop_at(tokenizer.decode(new, skip_special_tokens=True), stop) is not None


def _stopping(tokenizer: Tokenizer, prompt: int, stop: tuple[str, ...], stopped: Callable[[], bool] | None) -> Any:
    """Ends when it is told to, or at a stop string."""
    if not stop and stopped is None:
        return None
    ended = ends_with(tokenizer, stop)
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Stop(StoppingCriteria):  # type: ignore[misc,unused-ignore]
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            told = stopped is not None and stopped()
            return torch.tensor([told or ended(row[prompt:].tolist()) for row in input_ids], device=input_ids.device)

    return StoppingCriteriaList([Stop()])


def ends_of(model: CausalLM, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer: the checkpoint's, or else the tokenizer's."""
    return _ends(generation_config(model, tokenizer, 1, GREEDY))


def _ends(config: Any) -> list[int]:
    end = config.eos_token_id
    return [] if end is None else list(end) if isinstance(end, (list, tuple)) else [int(end)]


def _streamer(tokenizer: Tokenizer, write: Callable[[str], None], sound: Sound) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc,unused-ignore]
        """Hands on the text of sound tokens and notes when the first new one came; the first `put` is the prompt."""

        first: float | None = None
        puts = 0

        def put(self, value: torch.Tensor) -> None:
            self.puts += 1
            sound.require()
            if self.puts == 2:
                self.first = time.perf_counter()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
