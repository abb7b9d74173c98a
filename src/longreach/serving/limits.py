"""How much clients may ask for. Plain numbers; knows nothing."""

from __future__ import annotations

from dataclasses import dataclass

LOCAL = ("localhost", "127.0.0.1", "::1")  # the names of this machine


@dataclass(frozen=True)
class Limits:
    """What a server bears. More than `waiting` gets 429, a larger body 413, and what takes longer 408.

    body          bytes of a request.
    waiting       answers that may be on their way at a time, those that are computed among them.
    seconds       that an answer may take.
    body_seconds  that a client may take to send its request.
    documents     that are kept at most.
    answer        new tokens of a chat answer where the request names none.
    """

    body: int = 16 * 2**20
    waiting: int = 64
    seconds: float = 600.0
    body_seconds: float = 60.0
    documents: int = 100
    answer: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
