"""What is worth trying for a window and a context: methods with their settings, the most promising first, because time may end early.

Knows the methods and their parameters; no models and no measurements. Pure: the same arguments give the same list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from longreach.configs import Window
from longreach.methods import registry
from longreach.methods.base import Method
from longreach.methods.leaky_rerope import LeakyReRoPE
from longreach.methods.rerope import ReRoPE
from longreach.methods.selfextend import SelfExtend
from longreach.methods.stock import Stock
from longreach.planning import dial, offers

NEIGHBOURS = (32, 16, 64, 8)  # the neighbour window is the trained one divided by these; small ones found most on the first real models
SHARES = ((1, 6), (1, 4), (1, 3), (2, 3))  # of the trained window that the largest distance is to be about
GROUPS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
FIRST = ("logistic-selfextend", "dual-chunk", "yarn", "lm-infinite", "infllm", "quest", "longheads")  # of what others recommend; then by name
BY_HAND = ("selfextend", "rerope", "leaky-rerope", "stock")  # whose settings are drawn up here
DIAL, PLAIN, RECOMMENDED = "the dial's rule", "plain attention", " as recommended"
LONGEST = 30  # characters of a label: longer ones fill a table, and there is one setting that the authors of a method recommend


@dataclass(frozen=True)
class Candidate:
    """A setting to be tried. `control`: it is measured to be compared with and cannot be chosen."""

    label: str
    method: Method
    why: str
    control: bool = False

    @property
    def parameters(self) -> int:
        """How many were given: fewer is simpler."""
        return max(0, len(self.method.options()) - 1) // 2


def label(method: Method) -> str:
    """Short, for tables: SelfExtend(16, 256), ReRoPE(512, log scale)."""
    if not isinstance(method, SelfExtend | ReRoPE | LeakyReRoPE):
        return method.brief()
    numbers: list[float] = [method.group_size, method.window] if isinstance(method, SelfExtend) else [method.window]
    if isinstance(method, LeakyReRoPE):
        numbers.append(method.factor)
    return f"{type(method).__name__}({', '.join([*(f'{n:g}' for n in numbers), *(['log scale'] if method.log_scale else [])])})"


@dataclass(frozen=True)
class LeftOut:
    """What cannot be tried, and why."""

    label: str
    reason: str


@dataclass(frozen=True)
class Proposal:
    candidates: tuple[Candidate, ...]
    left_out: tuple[LeftOut, ...]


def propose(window: Window, context: int, refuses: Callable[[Method], str | None] = lambda method: None) -> Proposal:
    """Candidates for `context` tokens on a trained window, in the order in which they are tried, each method once.

    refuses  why this model cannot have a method, None where it can.

    Raises ValueError where the context fits the trained window.
    """
    if context <= window.tokens:
        raise ValueError(
            f"{context} tokens fit the trained window of {window.tokens} ({window.reason}), where plain attention is used and nothing is to be chosen; "
            f"pass a --context beyond it, or --trained-window N if you know that the model was trained on less"
        )
    found: dict[Method, Candidate] = {}
    out: list[LeftOut] = []
    dials = _dial(window, context)
    for each in _drawn_up(window, context):
        if isinstance(each, LeftOut):
            out.append(each)
        elif each.method in found:
            continue
        elif (reason := _unfit(each, window.tokens, context) or refuses(each.method)) is not None:
            out.append(LeftOut(each.label, reason))
        else:
            found[each.method] = dials if isinstance(dials, Candidate) and dials.method == each.method else each  # under its own name, wherever it comes
    return Proposal(tuple(found.values()), tuple(out))


def _unfit(candidate: Candidate, window: int, context: int) -> str | None:
    method = candidate.method
    if candidate.control or method.needs_context:
        return None
    reach = method.capacity(window)
    return None if reach is None or reach >= context else f"reaches {reach} tokens"


def _drawn_up(window: Window, context: int) -> Iterator[Candidate | LeftOut]:
    """The best known first, then kinds mixed, so that whenever time ends several kinds have been tried."""
    length = window.tokens
    grid, others = _grid(length, context), _recommended(length, context)
    rerope = [_rerope(length, share) for share in (16, 32, 8)]
    yield from _next(grid, 1)
    yield _dial(window, context)  # among the first two: whatever else is found is compared with it
    yield rerope[0]
    yield from _next(grid, 2)
    yield from _next(others, 1)
    yield Candidate(PLAIN, Stock(), "what the model does by itself beyond its window, to compare with", control=True)
    yield _leaky(length, context)
    yield rerope[1]
    yield from _sharpened(length, context)
    yield from _next(grid, 3)
    yield rerope[2]
    yield from others
    yield from grid


def _next(rest: Iterator[Candidate | LeftOut], count: int) -> Iterator[Candidate | LeftOut]:
    for _, each in zip(range(count), rest):
        yield each


def _dial(window: Window, context: int) -> Candidate | LeftOut:
    try:
        return Candidate(DIAL, dial.choose(window, context).method, "what `--context` chooses without a profile")
    except ValueError as error:
        return LeftOut(DIAL, str(error))


def _grid(length: int, context: int) -> Iterator[Candidate | LeftOut]:
    """SelfExtend: neighbour windows by largest distances. The two small windows first, each with the small distances first."""
    for divisors in (NEIGHBOURS[:2], NEIGHBOURS[2:]):
        for share in SHARES:
            for divisor in divisors:
                if (method := grouped(length, context, divisor, share)) is not None:
                    yield Candidate(label(method), method, f"neighbour window of 1/{divisor}, largest distance about {share[0]}/{share[1]} of the trained one")


def grouped(length: int, context: int, divisor: int, share: tuple[int, int], log_scale: int | None = None) -> SelfExtend | None:
    """SelfExtend whose neighbour window is length / divisor and whose largest distance is at most about a share of the length; None if there is none.

    The smallest usual group size g with w + (N - w) / g <= share L, and w rounded to a multiple of it, so that far keys begin at distance w.
    """
    near, far = length / divisor, length * share[0] / share[1]
    if far <= near or near < 1:
        return None
    wanted = (context - near) / (far - near)
    group = next((g for g in GROUPS if g >= wanted), None)
    return None if group is None else SelfExtend(group, dial.neighbours(length, divisor, group), log_scale=log_scale)


def _sharpened(length: int, context: int) -> Iterator[Candidate]:
    """The first SelfExtend and the first ReRoPE again with the log scale."""
    if length > 1 and (method := grouped(length, context, NEIGHBOURS[0], SHARES[0], length)) is not None:
        yield Candidate(label(method), method, "the first of them with the log scale")
    if length > 1:
        sharp = ReRoPE(max(1, length // 16), log_scale=length)
        yield Candidate(label(sharp), sharp, "ReRoPE with the log scale")


def _rerope(length: int, divisor: int) -> Candidate:
    method = ReRoPE(max(1, length // divisor))
    return Candidate(label(method), method, f"everything beyond 1/{divisor} of the trained window at one distance")


def _leaky(length: int, context: int) -> Candidate:
    """Distances grow to about a third of the trained window."""
    near, far = max(1, length // 16), max(2, length // 3)
    factor = float(max(1, math.ceil((context - 1 - near) / max(1, far - near))))
    method = LeakyReRoPE(near, factor)
    return Candidate(label(method), method, "order kept at every distance, largest about 1/3 of the trained window")


def _recommended(length: int, context: int) -> Iterator[Candidate | LeftOut]:
    """What the authors of every other method recommend. A new method is found by itself."""
    known = registry()
    names = [*(name for name in FIRST if name in known), *(name for name in known if name not in FIRST)]
    for name in names:
        if name in BY_HAND:
            continue
        try:
            method = known[name].recommended(length, context)
        except ValueError as error:
            yield LeftOut(name, str(error))
            continue
        why = "as its authors recommend"
        if (chooses := offers.retrieving(known[name], length, context)) not in (None, method):
            method, why = chooses, f"{why}, at frequencies that reach so far"
        named = label(method)
        yield Candidate(named if len(named) <= LONGEST else f"{known[name].__name__}{RECOMMENDED}", method, why)
