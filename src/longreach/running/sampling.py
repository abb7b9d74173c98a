"""Which token comes next: what stock `generate` does to logits under the checkpoint's own settings, and a random stream for each request.

Knows generation settings and Transformers' logits processors; not models, memory or text.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

OTHERS: dict[str, tuple[Any, ...]] = {  # settings of a checkpoint that would change a token, and what they are where they do nothing
    "no_repeat_ngram_size": (None, 0), "encoder_no_repeat_ngram_size": (None, 0), "bad_words_ids": (None,), "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,), "suppress_tokens": (None, []), "begin_suppress_tokens": (None, []), "sequence_bias": (None,), "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0), "guidance_scale": (None, 1, 1.0), "min_length": (None, 0), "min_new_tokens": (None, 0),
    "exponential_decay_length_penalty": (None,), "watermarking_config": (None,), "encoder_repetition_penalty": (None, 1.0),
    "num_beams": (None, 1), "constraints": (None,), "force_words_ids": (None,), "penalty_alpha": (None, 0, 0.0), "dola_layers": (None,), "top_h": (None,),
    "stop_strings": (None, []), "max_time": (None,), "token_healing": (None, False), "assistant_ensemble_weight": (None,), "is_assistant": (None, False),
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """temperature None is greedy. Whatever else the checkpoint's own generation settings say of tokens stays in force, or is refused (`OTHERS`)."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"the seed must be a whole number of at most 63 bits, not {self.seed}; pass a smaller one")
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"the temperature must be a number above 0, not {self.temperature}; pass None for greedy tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}; leave it out for all tokens")


GREEDY = Sampling()


class Sampler:
    """Draws the tokens of one request, from a generator of its own, so that they do not depend on who else is served.

    Raises ValueError for settings of the checkpoint that are not honoured here.
    """

    def __init__(self, config: Any, sampling: Sampling) -> None:
        self._processors = _processors(config, sampling)
        self._generator = None if sampling.temperature is None else torch.Generator().manual_seed(sampling.seed % 2**63)

    @property
    def plain(self) -> bool:
        """Whether it takes the largest logit, as it comes."""
        return self._generator is None and not self._processors

    def token(self, ids: list[int], logits: torch.Tensor) -> int:
        """The token behind `ids`; logits [V]. Raises ValueError where the model gives NaN or infinity."""
        scores = logits.float()[None]
        if (problem := refusal(scores.max().item())) is not None:
            raise problem
        if self._processors:
            scores = self._processors(torch.tensor([ids], device=scores.device), scores)
        return int(scores.argmax(-1) if self._generator is None else torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self._generator))


class Sound:
    """A logits processor for `generate`, the first of its list: it notes the largest logit of every row where it lies, so that a card is waited for once in a
    token, when that is read. Rows without a token become zeros, which may be drawn from: what comes of it is refused by `require` before anybody sees it.
    """

    def __init__(self) -> None:
        self._best: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._best = scores.amax(-1)
        return scores.masked_fill(~self._best.isfinite()[:, None], 0.0)

    def require(self) -> None:
        """Raises ValueError where the model gave NaN or infinity for the token that has just been read."""
        for best in () if self._best is None else self._best.tolist():
            if (problem := refusal(best)) is not None:
                raise problem


def refusal(best: float) -> ValueError | None:
    """Why there is no next token where `best` is the largest logit, and NaN is larger than any; None: there is one."""
    if math.isfinite(best):
        return None
    return ValueError(
        "the model gives NaN or infinity for the next token; load it in another dtype (float32, or bfloat16 where float16 overflows), choose another method or "
        "other parameters if it is extended, or check its weights"
    )


def ends_of(config: Any) -> Collection[int]:
    """The tokens that end an answer, by the checkpoint's generation settings."""
    own = config.eos_token_id
    return frozenset(() if own is None else (own,) if isinstance(own, int) else own)


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
