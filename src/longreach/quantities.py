"""Numbers of tokens as people write them, and numbers of things as people read them. Knows no models and no terminals."""

from __future__ import annotations

from operator import index

CHUNK_SIZE = 512  # tokens of one forward while a text is read, where nothing else is asked for; no result depends on it, only memory and speed
MOST_TOKENS = 2**32  # more than anything reads; beyond it a number is a slip of the keyboard


def token_count(given: str | int, name: str = "context") -> int:
    """4096, "4096" or "4k" -> 4096; "k" stands for 1024.

    Raises ValueError, naming what it is for, where that is no whole number of at least one token.
    """
    found = 0.0
    try:
        if isinstance(given, str):
            text = given.strip().lower()
            found = float(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)
        elif not isinstance(given, bool):
            found = index(given)
    except (ValueError, TypeError):
        pass
    if not 1 <= found <= MOST_TOKENS or found != int(found):
        raise ValueError(f"{name} must be a positive number of tokens, such as 4096 or '4k', not {given!r}")
    return int(found)


def counted(count: int, thing: str) -> str:
    """1, "token" -> "1 token"; 2, "token" -> "2 tokens"; 2, "query" -> "2 queries"."""
    if count == 1:
        return f"1 {thing}"
    return f"{count} {thing[:-1]}ies" if thing.endswith("ry") else f"{count} {thing}s"
