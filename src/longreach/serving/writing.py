"""From pieces to answers: what one token has added, in the words of completions and of chat completions, as it comes or all at once.

Knows pieces and the shapes of replies; not requests, threads or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from longreach.serving import replies
from longreach.serving.worker import Piece

LEAST = -9999.0  # stands for a probability of 0, which JSON has no logarithm of
Spell = Callable[[int], tuple[str, list[int] | None]]


class Shape(Protocol):
    """One of the two kinds of completion."""

    prefix: str  # of ids
    whole: str  # `object` of an answer
    part: str  # `object` of a chunk
    logprobs: int | None  # how many of the best are told of every token

    def begin(self, index: int) -> dict[str, Any] | None:
        """The choice of the first chunk, which comes before any text."""

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """The choice of a chunk."""

    def answer(self, head: dict[str, Any], pieces: Sequence[Sequence[Piece]], usage: replies.Usage) -> replies.Head:
        """The answer as a whole; `pieces` of each choice."""


class Chat:
    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, spell: Spell, logprobs: int | None) -> None:
        self.spell, self.logprobs = spell, logprobs

    def begin(self, index: int) -> dict[str, Any]:
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text or piece.finish is None else {}
        found = self._logprobs([piece])
        return {"index": piece.index, "delta": delta, "logprobs": found and found.model_dump(), "finish_reason": piece.finish}

    def answer(self, head: dict[str, Any], pieces: Sequence[Sequence[Piece]], usage: replies.Usage) -> replies.Head:
        choices = [
            replies.ChatChoice(
                index=index, message=replies.AnswerMessage(content="".join(one.text for one in own)), finish_reason=_finish(own), logprobs=self._logprobs(own)
            )
            for index, own in enumerate(pieces)
        ]
        return replies.ChatCompletion(**head, choices=choices, usage=usage)

    def _logprobs(self, pieces: Sequence[Piece]) -> replies.ChatLogprobs | None:
        if self.logprobs is None:
            return None
        return replies.ChatLogprobs(
            content=[
                replies.TokenLogprob(**self._one(one.token, one.logprob), top_logprobs=[replies.TopLogprob(**self._one(*best)) for best in one.best])
                for one in pieces
                if one.token is not None
            ]
        )

    def _one(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, data = self.spell(token)
        return {"token": text, "logprob": _finite(logprob), "bytes": data}


class Plain:
    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def __init__(self, spell: Spell, logprobs: int | None, choices: int) -> None:
        self.spell, self.logprobs = spell, logprobs
        self._offsets = [0] * choices

    def begin(self, index: int) -> None:
        return None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        found = self._logprobs([piece])
        return {"index": piece.index, "text": piece.text, "logprobs": found and found.model_dump(), "finish_reason": piece.finish}

    def answer(self, head: dict[str, Any], pieces: Sequence[Sequence[Piece]], usage: replies.Usage) -> replies.Head:
        choices = [
            replies.TextChoice(index=index, text="".join(one.text for one in own), finish_reason=_finish(own), logprobs=self._logprobs(own))
            for index, own in enumerate(pieces)
        ]
        return replies.Completion(**head, choices=choices, usage=usage)

    def _logprobs(self, pieces: Sequence[Piece]) -> replies.TextLogprobs | None:
        if self.logprobs is None:
            return None
        found = replies.TextLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for one in pieces:
            if one.token is not None:
                text, _ = self.spell(one.token)
                found.tokens.append(text)
                found.token_logprobs.append(_finite(one.logprob))
                found.top_logprobs.append({self.spell(token)[0]: _finite(logprob) for token, logprob in one.best})
                found.text_offset.append(self._offsets[one.index])
                self._offsets[one.index] += len(text)
        return found


def event(data: dict[str, Any] | str) -> bytes:
    """One event of a stream, in ASCII: a line end of any alphabet would break it."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, allow_nan=False)}\n\n".encode()


def _finish(pieces: Sequence[Piece]) -> replies.Finish:
    return "length" if pieces[-1].finish == "length" else "stop"


def _finite(logprob: float | None) -> float:
    return LEAST if logprob is None or logprob < LEAST else logprob
