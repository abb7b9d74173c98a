"""Offers: methods that keep everything and choose what a token reads of it, where memory or time binds; with what is known of their recall.

Knows methods and what tiers make of them; chooses nothing: that a method finds less than one that attends to everything is for the user to accept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longreach.memory.budgets import size_text
from longreach.methods import registry
from longreach.methods.base import Method
from longreach.methods.combined import Combined
from longreach.methods.yarn import YaRN
from longreach.planning.tiers import InTiers


def retrieving(kind: type[Method], window: int, context: int) -> Method | None:
    """The recommended setting of a method that chooses keys by their content, if it reaches the context; of one that keeps true distances, within frequencies
    of YaRN that do. None for all others."""
    try:
        method = kind.recommended(window, context)
    except ValueError:
        return None
    if method.choice is None:
        return None
    reach = method.capacity(window)
    if reach is None or reach >= context:
        return method
    return Combined(YaRN(float(-(-context // window))), method) if reach == window and not method.rescales else None


def known(window: int, context: int) -> Iterator[Method]:
    """Every method that chooses, at a setting that reaches the context. A new one is found by itself."""
    for kind in registry().values():
        if (method := retrieving(kind, window, context)) is not None:
            yield method


@dataclass(frozen=True)
class Offer:
    """A method that a token reads less of than of another, and what it costs in recall. `moved`: bytes that a token brings to the device from other tiers, at
    most."""

    method: Method
    moved: int

    def __str__(self) -> str:
        brings = f"at most {size_text(self.moved)}" if self.moved else "nothing"
        return f"{self.method.brief()} would bring {brings}, and recalls {self.method.known}"


def cheapest(budget: InTiers, window: int, context: int, than: int) -> Offer | None:
    """The one that fits and whose tokens bring the fewest bytes: at most half of `than`, for less is not worth what a choice may miss. None where every token
    of a prompt chooses apart: reading would take many times as long."""
    found = []
    for method in known(window, context) if than else ():
        choice = method.choice
        if choice is None or (choice.who == "every" and choice.queries == 1) or not budget.fits(method, context):
            continue
        if 2 * (moved := budget.spread(method, context).moved) <= than:
            found.append(Offer(method, moved))
    return min(found, key=lambda offer: offer.moved, default=None)
