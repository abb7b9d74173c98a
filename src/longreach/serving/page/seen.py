"""What a method sees, in few enough numbers to draw: effective distances of some queries to stretches of keys.

Knows methods and index arithmetic; not models, requests or HTTP.
"""

from __future__ import annotations

import torch

from longreach.methods.base import Method

ROWS = 48  # of the picture, and columns: queries and stretches of keys
STRIP = 240  # stretches of keys for the last query alone
LOOKED_AT = 16  # keys of a stretch
MOST_TOKENS = 2**27  # an index of fp64 is exact far beyond


def picture(method: Method, tokens: int) -> list[list[float | None]]:
    """[rows][columns]: for some of the queries, the last one last, the distance of every stretch of keys as `stretches` says it. Of at most `ROWS` tokens it is
    the matrix itself."""
    last = _ends(tokens, ROWS) - 1
    return [_numbers(row) for row in stretches(method, last, tokens, ROWS)]


def strip(method: Method, tokens: int) -> list[float | None]:
    """[columns]: the same for the last of the tokens alone, which writes the answer, in finer stretches."""
    return _numbers(stretches(method, torch.tensor([tokens - 1]), tokens, STRIP)[0])


def stretches(method: Method, queries: torch.Tensor, tokens: int, most: int) -> torch.Tensor:
    """queries [Q] -> [Q, columns]: the least distance of a key that the query sees in each of at most `most` equal stretches of the text, NaN where it sees
    none. Of a long stretch `LOOKED_AT` keys are looked at, its first and its last among them."""
    ends = _ends(tokens, most)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    part = torch.linspace(0, 1, LOOKED_AT, dtype=torch.float64)
    keys = (starts[:, None] + (part * (ends - 1 - starts)[:, None]).round().long()).reshape(1, -1)
    found = method.distances(queries[:, None], keys).reshape(len(queries), len(ends), LOOKED_AT)
    least = found.nan_to_num(torch.inf).amin(-1)
    return torch.where(least == torch.inf, torch.nan, least)


def _ends(tokens: int, most: int) -> torch.Tensor:
    """Where each of at most `most` equal stretches ends."""
    count = min(tokens, most)
    return torch.arange(1, count + 1) * tokens // count


def _numbers(row: torch.Tensor) -> list[float | None]:
    return [None if d != d else round(d, 3) for d in row.tolist()]
