"""What answers a prompt: the small interface that the runner needs. `model_engine.py` has the real one; tests plug in others.

Knows prompts and answers; no models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from longreach.evals.samples.budget import Prompt


@dataclass(frozen=True)
class Reply:
    """One answer. `reused` are prompt tokens that were in the cache already, from a question about the same document."""

    text: str
    tokens: int
    finish: str  # "stop" or "length"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    reused: int = 0
    peak_memory: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of decoding: the first new token belongs to the prefill."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 and self.decode_seconds > 0 else None


class Engine(Protocol):
    """Answers a prompt with at most `prompt.sample.max_new_tokens` tokens, greedily, up to the first of `prompt.sample.stop`."""

    def answer(self, prompt: Prompt) -> Reply: ...
