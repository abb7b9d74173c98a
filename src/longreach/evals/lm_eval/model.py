"""An extended model as lm-evaluation-harness sees one: nothing is cut silently, prompts are read in chunks, few logits exist at a time.

Knows lm-eval's HFLM, a model and its extension; needs lm_eval to be imported. `harness.py` is the way in. HFLM alone would cut every prompt
to the window in the model's configuration, from the left, with no more than a log line; and hold float32 logits of a whole sequence.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from longreach import configs
from longreach.hf.checks import require_in_force
from longreach.hf.extension import Extension
from longreach.hf.interfaces import CausalLM, Tokenizer
from longreach.quantities import CHUNK_SIZE
from longreach.running.prefix import Prefix
from longreach.running.prompts import keep_ids, shrink
from longreach.running.reading import require_finite, stream

Overflow = Literal["refuse", "middle", "left"]
OVERFLOWS = ("refuse", "middle", "left")


class LongContextLM(HFLM):
    """One sequence at a time: rows padded on the left would be right, but take a call each.

    extension   the one in force on the model; None for the stock model, which reads every prompt in one forward.
    max_length  tokens of a prompt and its answer; None is the declared context, or else the capacity of the method or the trained window.
    overflow    what becomes of a longer request: "refuse" raises before any of them is run; "middle" and "left" leave tokens of the prompt out there,
                which is counted in `report()`. "left" is what lm-eval does by itself.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        extension: Extension | None = None,
        max_length: int | None = None,
        overflow: Overflow = "refuse",
        chunk_size: int = CHUNK_SIZE,
    ) -> None:
        if overflow not in OVERFLOWS:
            raise ValueError(f"there is no overflow {overflow!r}; choose one of {', '.join(OVERFLOWS)}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
        if extension is not None:  # without this the stock model would be evaluated under the method's name
            require_in_force(extension, model)
        self.extension, self.overflow, self.chunk_size = extension, overflow, chunk_size
        self.requests = self.shortened = self.left_out = 0
        self._prefix = Prefix()
        super().__init__(  # the tokenizer is a copy because lm-eval gives it a padding token
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            max_length=window(model, extension, max_length),
            batch_size=1,
            truncation=False,
        )

    @property
    def chunked(self) -> bool:
        return self.extension is not None and self.extension.method.cut == 1

    def report(self) -> dict[str, Any]:
        """What a reader of the scores has to know, as plain data."""
        return {
            "method": self.extension.method.to_json() if self.extension is not None else {"method": "none"},
            "max_length": self.max_length,
            "overflow": self.overflow,
            "requests": self.requests,
            "shortened_requests": self.shortened,
            "tokens_left_out": self.left_out,
        }

    # -- log-likelihoods ------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, override_bs: int | None = None) -> list[tuple[float, bool]]:
        """requests: (key of the cache or None, ids of the context, ids of the continuation)"""
        self._refuse([len(context) + len(continuation) - 1 for _, context, continuation in requests])
        work = [(self._shorter(context, self.max_length + 1 - len(continuation)), continuation) for _, context, continuation in requests]
        self.requests += len(work)
        order = sorted(range(len(work)), key=lambda i: (-len(work[i][0]), work[i][0], work[i][1]))  # one context after another, the longest first
        found: list[tuple[float, bool]] = [(0.0, False)] * len(work)
        for i in tqdm(order, disable=disable_tqdm or len(order) < 2, desc="Running loglikelihood requests"):
            found[i] = self._score(*work[i])
            if requests[i][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        self._prefix.forget()
        return found

    @torch.no_grad()
    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """-> (log-probability of the continuation, whether it is the greedy one)"""
        total, greedy, done = 0.0, True, 0
        for logits in self._logits((context + continuation)[:-1], len(context) - 1):
            wanted = torch.tensor(continuation[done : done + len(logits)], device=logits.device)
            likelihoods = logits.float().log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
            require_finite(likelihoods.masked_fill(likelihoods.isneginf(), 0.0))  # a token that a model rules out has no probability, which is an answer
            total += likelihoods.sum().item()
            greedy = greedy and bool((logits.argmax(-1) == wanted).all())
            done += len(wanted)
        assert done == len(continuation)
        return total, greedy

    def _logits(self, ids: list[int], first: int) -> Iterator[torch.Tensor]:
        """Logits [n, V] after every token from `first` on, no more than a chunk of them at a time where the method can read in chunks."""
        cache, start = self._prefix.resume(ids[:first]) if self.chunked else (None, 0)
        step = self.chunk_size if self.chunked else len(ids)
        while start < len(ids):
            stop = min(start + step, len(ids))
            wanted = max(0, stop - max(first, start))
            tokens = torch.tensor([ids[start:stop]], device=self.device)
            logits = self.model(input_ids=tokens, past_key_values=cache, use_cache=self.chunked, logits_to_keep=max(1, wanted)).logits[0]
            if wanted:
                yield from logits.split(self.chunk_size)
            start = stop
        if self.chunked:
            self._prefix.keep(cache, ids)

    # -- answers --------------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        rooms = [self.max_length - normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"] for request in requests]
        if min(rooms, default=1) < 1:
            raise ValueError(f"an answer of {self.max_length - min(rooms)} tokens does not fit into {self.max_length}; pass gen_kwargs max_gen_toks")
        self._refuse([length + self.max_length - room for length, room in zip(lengths, rooms)])
        self.requests += len(requests)
        fitting = [r if length <= room else self._shorter_request(r, room) for r, length, room in zip(requests, lengths, rooms)]
        return list(super().generate_until(fitting, disable_tqdm))

    def _shorter_request(self, request: Any, room: int) -> Any:
        ids = self.tok_encode(request.args[0])

        def make(keep: int) -> tuple[tuple[str, int], int]:
            assert self.overflow != "refuse"
            text = self.tokenizer.decode(keep_ids(ids, keep, self.overflow), skip_special_tokens=False)
            return (text, keep), len(self.tok_encode(text)) - room

        text, keep = shrink(room, make) or ("", 0)
        self.shortened += 1
        self.left_out += len(ids) - keep
        request = copy.copy(request)
        request.arguments = (text, *request.args[1:])
        return request

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> torch.Tensor:
        early = 0 if self.extension is None else self.extension.method.apart(context.shape[1])  # the rest is left for generate, which needs its logits
        if self.extension is not None and early:
            *_, last = stream(self.extension, context[0, :early], chunk_size=self.chunk_size, losses=False)
            generation_kwargs["past_key_values"] = last.cache
        return super()._model_generate(context, max_length, stop, **generation_kwargs)

    # -- lengths --------------------------------------------------------------------------------------------------------------

    def _refuse(self, lengths: Sequence[int]) -> None:
        long = [length for length in lengths if length > self.max_length]
        if long and self.overflow == "refuse":
            raise ValueError(
                f"{len(long)} of {len(lengths)} requests need more than {self.max_length} tokens with their answers, the longest {max(long)}; declare a "
                f"context of {max(long)}, or pass overflow='middle' (or 'left', as lm-eval does), which shortens prompts and counts them"
            )

    def _shorter(self, context: list[int], room: int) -> list[int]:
        if len(context) <= room:
            return context
        if room < 1:
            raise ValueError(f"a continuation of {self.max_length + 1 - room} tokens does not fit into {self.max_length}; declare a larger context")
        assert self.overflow != "refuse"
        self.shortened += 1
        self.left_out += len(context) - room
        return keep_ids(context, room, self.overflow)


def window(model: CausalLM, extension: Extension | None, max_length: int | None) -> int:
    """Tokens that a request may have: what was asked for, else what the model reaches."""
    declared = extension.context if extension is not None else None
    reach = extension.capacity if extension is not None else configs.trained_window(model.config).tokens
    if max_length is None:
        found = declared if declared is not None else reach
        if found is None:
            raise ValueError(f"{extension} has no limit of its own; pass max_length=N (--context N), the tokens of a prompt and its answer")
        return found
    if max_length < 2 or (declared is not None and max_length > declared):
        raise ValueError(f"max_length={max_length} is not within the declared context of {declared}; choose less, or extend(model, context={max_length})")
    if reach is not None and max_length > reach:  # a baseline beyond its window is a fair question
        warnings.warn(f"max_length={max_length} is beyond the {reach} tokens that the model reaches as it is; scores there show what is lost", stacklevel=3)
    return max_length
