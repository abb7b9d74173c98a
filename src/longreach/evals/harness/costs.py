"""What answers cost: counted work times measured speeds. The estimate before a run and the time left in it are the same sum.

The work is counted exactly, for every method: matrix products grow with the tokens, attention with the pairs of a query and a key that it sees, which is the
square of the length for one method and its window for another. Only the speeds are measured, so that short prompts can speak for long ones.
Knows numbers of tokens and seconds; no prompts, models, tasks or clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from statistics import median

TRUST = 1e-4  # how much the counted FLOP say about the ratio of two speeds, where the times agree on it: nearly nothing
NOISY = 0.03  # the same where they do not: the two are nearly collinear, and a slow probe would be taken for a steep slope
EXACT = 0.02  # relative error up to which times agree


def causal(start: int, stop: int) -> float:
    """Pairs of plain attention: query i sees i + 1 keys."""
    return (stop * (stop + 1) - start * (start + 1)) / 2


@dataclass(frozen=True)
class Load:
    """Work in FLOP, and a number of answers. A sum of loads costs the sum of their seconds.

    read, attended  matrix products and attention of what is read in chunks
    written, seen   those of what goes through the model token by token: the last token of a prompt, and all new ones but the last
    """

    read: float = 0.0
    attended: float = 0.0
    written: float = 0.0
    seen: float = 0.0
    answers: int = 0
    tokens: int = 0  # read in chunks or as the last of a prompt

    def __add__(self, other: Load) -> Load:
        return Load(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Work:
    """What an engine does for a prompt.

    per_token  FLOP of the matrix products of one token. It may be off by a factor: what is measured decides.
    attention  (start, stop) -> FLOP of the attention of the tokens start .. stop to all that they see. The same holds for its factor.
    back       tokens that an engine can go back by to ask about the same document again; None: any number, 0: it reads every prompt anew.
    """

    per_token: float
    attention: Callable[[int, int], float]
    back: int | None = None

    def load(self, tokens: int, shared: int, new: int, held: bool = False) -> Load:
        """A prompt and an answer of at most `new` tokens. `held`: its first `shared` tokens, the document, have been read already."""
        start = min(shared, tokens - 1) if held else 0
        chunked = tokens - 1 - start
        return Load(
            read=chunked * self.per_token, attended=self.attention(start, tokens - 1),
            written=max(1, new) * self.per_token, seen=self.attention(tokens - 1, tokens - 1 + max(1, new)), answers=1, tokens=tokens - start,
        )  # fmt: skip

    def returns(self, tokens: int, shared: int, new: int) -> bool:
        """Whether the engine gets back to the document after this prompt and its answer."""
        return shared > 0 and (self.back is None or tokens - shared + new - 1 <= self.back)


PLAIN = Work(1.0, lambda start, stop: causal(start, stop) / 8192)  # of no model in particular: products outweigh attention up to 16384 tokens


@dataclass(frozen=True)
class Rate:
    """Seconds for one FLOP of matrix products and for one of attention."""

    products: float
    attention: float

    def seconds(self, products: float, attention: float) -> float:
        return self.products * products + self.attention * attention


@dataclass(frozen=True)
class Speed:
    """Of reading in chunks, of writing token by token, and what every answer costs beside: going back to the document, starting to generate.

    `speed.seconds(work.load(tokens, shared, new))` is the cost of a document and its first question, and with `held=True` that of a further one.
    """

    reading: Rate
    writing: Rate
    answer: float = 0.0

    def seconds(self, load: Load) -> float:
        return self.reading.seconds(load.read, load.attended) + self.writing.seconds(load.written, load.seen) + self.answer * load.answers


EVEN = Speed(Rate(1.0, 1.0), Rate(1.0, 1.0))  # before anything was measured: a FLOP is a FLOP. Good for shares of a whole, not for seconds


@dataclass(frozen=True)
class Sight:
    """One answer that was timed: its prompt, what of it was held already, and how many tokens came."""

    tokens: int
    held: int
    new: int
    prefill_seconds: float
    decode_seconds: float


def fit(work: Work, sights: Sequence[Sight]) -> Speed | None:
    """The speeds that explain what was seen, none of them negative. None where nothing took any time, or no document was read.

    Readings tell the reading, decoded tokens the writing, and further questions what an answer costs beside; readings are then corrected for that.
    """
    writing = rate(
        (s.decode_seconds, (s.new - 1) * work.per_token, work.attention(s.tokens, s.tokens + s.new - 1)) for s in sights if s.new > 1
    )  # the first new token belongs to the prefill
    loads = [(s, work.load(s.tokens, s.held, 1, held=s.held > 0)) for s in sights]
    answer = 0.0
    reading: Rate | None = None
    for _ in range(3):  # each corrects the other, by little
        beside = [(s, load, answer + (writing.seconds(load.written, load.seen) if writing else 0.0)) for s, load in loads]
        found = rate((max(s.prefill_seconds - more, 0.1 * s.prefill_seconds), load.read, load.attended) for s, load, more in beside if not s.held)
        if found is None:
            break
        reading = found
        step = writing or reading
        short = [s.prefill_seconds - reading.seconds(load.read, load.attended) - step.seconds(load.written, load.seen) for s, load in loads if s.held]
        answer = max(0.0, median(short)) if short else 0.0
    return None if reading is None else Speed(reading, writing or reading, answer)


def rate(rows: Iterable[tuple[float, float, float]]) -> Rate | None:
    """Rows of (seconds, products, attention) -> the two speeds of least relative error. What the rows leave open is settled by the counted FLOP.

    The ratio of the speeds is believed where at least three different amounts of work agree on it; else it is drawn towards that of the counted FLOP.
    """
    known = [row for row in rows if row[0] > 0 and row[1] + row[2] > 0]
    if not known:
        return None
    found = _solved(known, TRUST)
    agree = all(abs(found.seconds(products, attention) / seconds - 1) <= EXACT for seconds, products, attention in known)
    return found if agree and len({row[1:] for row in known}) > 2 else _solved(known, NOISY)


def _solved(known: Sequence[tuple[float, float, float]], trust: float) -> Rate:
    scale = median(seconds / (products + attention) for seconds, products, attention in known)
    us, vs = [scale * row[1] / row[0] for row in known], [scale * row[2] / row[0] for row in known]
    uu, vv, uv = sum(u * u for u in us) + trust, sum(v * v for v in vs) + trust, sum(u * v for u, v in zip(us, vs)) - trust
    whole = uu * vv - uv * uv
    a, b = (sum(us) * vv - sum(vs) * uv) / whole, (sum(vs) * uu - sum(us) * uv) / whole
    if a < 0:
        a, b = 0.0, sum(vs) / sum(v * v for v in vs)
    elif b < 0:
        a, b = sum(us) / sum(u * u for u in us), 0.0
    return Rate(a * scale, b * scale)
