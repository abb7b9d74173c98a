"""Numbers of tokens and times as people write them, and numbers of things as people read them. Knows no models and no terminals."""

from __future__ import annotations

import re
from contextlib import suppress
from operator import index

TIMES = {"s": 1, "m": 60, "h": 3600}
MOST_SECONDS = 366 * 24 * 3600
THOUSANDS = {"k": 2**10, "m": 2**20}  # of tokens
CHUNK_SIZE = 512  # tokens of one forward while a text is read, where nothing else is asked for; no result depends on it, only memory and speed
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MOST_BYTES = 2**60
MOST_TOKENS = 2**32  # more than anything reads; beyond it a number is a slip of the keyboard


def require_whole(name: str, value: object, least: int = 1) -> None:
    """Raises ValueError where a value is no whole number, or too small."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def token_count(given: str | int, name: str = "context") -> int:
    """4096, "4096" or "4k" -> 4096; "k" stands for 1024, "m" for 1024 of them.

    Raises ValueError, naming what it is for, where that is no whole number of at least one token.
    """
    found = 0.0
    try:
        if isinstance(given, str):
            text = given.strip().lower()
            unit = next((unit for unit in THOUSANDS if text.endswith(unit)), "")
            found = float(text.removesuffix(unit)) * THOUSANDS.get(unit, 1)
        elif not isinstance(given, bool):
            found = index(given)
    except (ValueError, TypeError):
        pass
    if not 1 <= found <= MOST_TOKENS or found != int(found):
        raise ValueError(f"{name} must be a positive number of tokens, such as 4096, '4k' or '1m', not {given!r}")
    return int(found)


def seconds_of(given: str | float, name: str = "budget") -> float:
    """90, "90", "90s", "10m" or "1.5h" -> seconds.

    Raises ValueError, naming what it is for, where that is no time above 0 of at most a year.
    """
    found = 0.0
    try:
        if isinstance(given, str):
            text = given.strip().lower()
            unit = next((unit for unit in TIMES if text.endswith(unit)), "")
            found = float(text.removesuffix(unit)) * TIMES.get(unit, 1)
        elif not isinstance(given, bool):
            found = float(given)
    except (ValueError, TypeError):
        pass
    if not 0 < found <= MOST_SECONDS:
        raise ValueError(f"{name} must be a time, such as 90s, 10m or 1.5h, not {given!r}")
    return found


def byte_count(given: str | int, name: str) -> int:
    """512, "512", "512MiB" or "1.5 GB" -> bytes; "MiB" stands for 2**20 and "MB" for 10**6.

    Raises ValueError, naming what it is for, where that is no whole number of at least one byte.
    """
    found = 0.0
    if isinstance(given, str) and (match := re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?I?B|)\s*", given.upper())):
        with suppress(ValueError, KeyError):
            found = float(match[1]) * UNITS[match[2] or "B"]
    elif isinstance(given, int) and not isinstance(given, bool):
        found = given
    if not 1 <= found <= MOST_BYTES:
        raise ValueError(f"{name} must be a size, such as 512MiB or 8GiB, not {given!r}")
    return int(found)


def counted(count: int, thing: str) -> str:
    """1, "token" -> "1 token"; 2, "token" -> "2 tokens"; 2, "query" -> "2 queries"."""
    if count == 1:
        return f"1 {thing}"
    return f"{count} {thing[:-1]}ies" if thing.endswith("ry") else f"{count} {thing}s"
