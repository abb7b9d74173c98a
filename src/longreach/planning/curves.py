"""Cost against length: the rows of a plan at other lengths. Knows plans; draws nothing."""

from __future__ import annotations

from dataclasses import replace

from longreach.methods.base import Method
from longreach.planning.sizing import Plan, Row, candidates, row_of


def curves(found: Plan, lengths: list[int], given: Method | None = None) -> dict[str, dict[int, Row]]:
    """The rows of every method at other lengths; what does not reach a length has no row there."""
    rows: dict[str, dict[int, Row]] = {}
    for n in lengths:
        request = replace(found.request, context=n, new_tokens=min(found.request.new_tokens, n - 1))
        methods = candidates(request.window, n)[0] if given is None else [(given, True)]
        for method, chosen in methods:
            rows.setdefault(method.name, {})[n] = row_of(request, method, chosen)
    return rows


def lengths_around(context: int, new_tokens: int, points: int = 25) -> list[int]:
    """For a picture: from a thirty-second of the context to four times it, evenly in the logarithm, the context among them."""
    first, last = max(new_tokens + 1, context // 32, 2), 4 * context
    steps = {round(first * (last / first) ** (k / (points - 1))) for k in range(points)}
    return sorted({*steps, context})
