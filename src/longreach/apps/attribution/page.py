"""An attribution as one HTML page that needs nothing else: the text with its parts marked, light and dark.

Knows results of `attribute` and what page.html shows of them. Text, question and answer are text there, never markup: Jinja escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from longreach.apps.attribution.attribute import Attribution, Scored

TEMPLATE = Path(__file__).with_name("page.html")
LONGEST = 400_000  # characters of a text that is shown whole
AROUND = 1500  # characters shown on both sides of a part, of a longer text
HARDLY = math.log(2)  # nats that make no difference to speak of
LEAST = 0.01  # of the largest score: parts below are not shown
EXCERPT = 180  # characters of a part in a list


@dataclass(frozen=True)
class Piece:
    """A stretch of the text as it is shown. `rank` 0: no part; `left_out`: characters that are not shown in its place."""

    text: str
    rank: int = 0
    share: float = 0.0
    left_out: int = 0


@dataclass(frozen=True)
class Line:
    """A part in the list: its score, as a share of the largest too, and where it lies, in percent of the text."""

    rank: int
    score: float
    share: float
    scores: str
    start: int
    stop: int
    left: float
    width: float
    excerpt: str


def render(found: Attribution, text: str, source: str, model: str) -> str:
    """The page. `source`: what the text is called."""
    marked = [part for part in mattering(found) if part.turn is None]
    most = max((part.score for part in marked), default=1.0)
    lines = [_line(rank, part, part.score / most, len(text)) for rank, part in enumerate(marked, 1)]
    template = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(
        found=found, source=source, model=model, lines=lines, pieces=[*_pieces(text, marked, most)], chances=_chances(found), length=len(text),
        verdict=verdict(found),
    )  # fmt: skip
    return page.encode("utf-8", "replace").decode()  # an answer may hold half a character


def mattering(found: Attribution) -> list[Scored]:
    """The parts that make the answer likelier, the best first, without those whose score is next to nothing."""
    most = max((part.score for part in found.parts), default=0.0)
    return [part for part in found.parts if part.score > max(0.0, LEAST * most)]


def verdict(found: Attribution) -> str:
    """What the evidence says, in a sentence."""
    if found.evidence is None:
        return "The search was stopped: the parts are as fine as it came, and what they do together was not measured."
    if not any(part.score > 0 for part in found.parts):
        return "No part makes the answer likelier: it does not come from the text."
    evidence = found.evidence
    made, lost, missed = (evidence.whole - value for value in (evidence.nothing, evidence.without, evidence.only))
    if made <= -HARDLY:
        return f"The text as a whole makes the answer {times(-made)} less likely than no text does."
    if made < HARDLY:
        return "The model would say nearly the same without the text."
    alone = "alone, they make it about as likely as the whole text does" if missed < max(HARDLY, 0.1 * made) else "alone, they do not explain all of it"
    if lost < max(HARDLY, 0.1 * made):
        return f"Other parts say the same: without these the answer stays about as likely; {alone}."
    return f"Without these parts the answer is {times(lost)} less likely; {alone}."


def excerpt(text: str) -> str:
    """A part on a line: its beginning and its end."""
    line = " ".join(text.split())
    if len(line) <= EXCERPT:
        return line
    head, tail = line[: EXCERPT // 2], line[-EXCERPT // 2 :]
    return f"{head.rpartition(' ')[0] or head} \u2026 {tail.partition(' ')[2] or tail}"


def times(nats: float) -> str:
    """exp(nats), for people."""
    if nats < math.log(1e6):
        return f"{math.exp(nats):.3g} times"
    return f"10^{nats / math.log(10):.0f} times"


def per_token(nats: float, tokens: int) -> float:
    """The mean probability (geometric) of a token of the answer."""
    return math.exp(min(0.0, nats) / tokens)


def _chances(found: Attribution) -> list[tuple[str, float, str, float]]:
    """Label, percentage for people, nats."""
    if found.evidence is None:
        return []
    evidence = found.evidence
    rows = (("whole text", evidence.whole), ("without the parts", evidence.without), ("the parts alone", evidence.only), ("no text", evidence.nothing))
    shares = [(name, 100 * per_token(nats, found.answer_tokens), nats) for name, nats in rows]
    return [(name, share, f"{share:.3g} %" if share >= 0.01 else "< 0.01 %", nats) for name, share, nats in shares]


def _line(rank: int, part: Scored, share: float, length: int) -> Line:
    scores = ", ".join(f"{name} {score:.2f}" for name, score in part.scores.items())
    left = 100 * part.start / length
    return Line(rank, part.score, share, scores, part.start, part.stop, left, 100 * (part.stop - part.start) / length, excerpt(part.text))


def _pieces(text: str, marked: Sequence[Scored], most: float) -> Iterator[Piece]:
    """The text in order, cut where parts begin and end."""
    at, ranks = 0, {id(part): rank for rank, part in enumerate(marked, 1)}
    around = None if len(text) <= LONGEST else AROUND
    ordered = sorted(marked, key=lambda part: part.start)
    for n, part in enumerate(ordered):
        yield from _between(text[at : part.start], around, n > 0, True)
        at = part.start + len(part.text.rstrip())  # the white space behind it is not marked
        yield Piece(text[part.start : at], ranks[id(part)], part.score / most)
    yield from _between(text[at:], around, bool(ordered), False)


def _between(text: str, around: int | None, after: bool, before: bool) -> Iterator[Piece]:
    """What lies between two parts. Of a long text only what is near to one: `after` a part, `before` one."""
    if around is None or len(text) <= around * (after + before):
        if text:
            yield Piece(text)
        return
    head, tail = around * after, around * before
    if head:
        yield Piece(text[:head])
    yield Piece("", left_out=len(text) - head - tail)
    if tail:
        yield Piece(text[-tail:])
