"""Longest common subsequences, fast: a row of the table is one large integer, a bit for every step by which its values rise.

Knows sequences of hashable things; not texts or scores. RapidFuzz finds the same lengths, but of several longest subsequences another one, and the
published scores depend on which.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence


def length(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """The length of a longest common subsequence."""
    if len(a) > len(b):
        a, b = b, a
    rises = 0
    for rises in _rows(a, b):  # noqa: B007
        pass
    return rises.bit_count()


def pairs(rows: Sequence[Hashable], columns: Sequence[Hashable]) -> list[tuple[int, int]]:
    """The places (i, j) of one longest common subsequence."""
    return walk(rows, columns)[0]


def walk(rows: Sequence[Hashable], columns: Sequence[Hashable]) -> tuple[list[tuple[int, int]], int]:
    """The places (i, j) of one longest common subsequence, read from the ends, and the steps until either side is used up.

    Where rows[i] and columns[j] differ, the way goes to the row above if only that one has the full value, else to the column before.
    Published scores depend on this rule wherever there is more than one longest subsequence.
    """
    table = list(_rows(rows, columns))
    found: list[tuple[int, int]] = []
    i, j = len(rows) - 1, len(columns) - 1
    while i >= 0 and j >= 0:
        if rows[i] == columns[j]:
            found.append((i, j))
            i, j = i - 1, j - 1
        elif table[i] >> j & 1:  # the value rises at j, so the column before is less; of two unequal ends one neighbour has the full value
            i -= 1
        else:
            j -= 1
    return found[::-1], len(rows) + len(columns) - (i + 1) - (j + 1) - len(found)


def _rows(a: Sequence[Hashable], b: Sequence[Hashable]) -> Iterator[int]:
    """Row by row of a, the integer whose bit j says that the value of column j is one more than that of column j - 1."""
    matches = _matches(a, b)
    flat = full = (1 << len(b)) - 1  # bits of columns that do not rise
    rises = 0
    for item in a:
        if at := matches.get(item):
            flat = ((flat + (flat & at)) | (flat & ~at)) & full
            rises = full ^ flat
        yield rises


def _matches(a: Sequence[Hashable], b: Sequence[Hashable]) -> dict[Hashable, int]:
    """For everything in both, the columns of b where it stands. Bytes are set and turned into integers once: shifting bit by bit is quadratic."""
    wanted = set(a)
    places: dict[Hashable, bytearray] = {}
    for j, item in enumerate(b):
        if item in wanted:
            if item not in places:
                places[item] = bytearray(len(b) // 8 + 1)
            places[item][j >> 3] |= 1 << (j & 7)
    return {item: int.from_bytes(bits, "little") for item, bits in places.items()}
