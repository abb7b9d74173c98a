"""The choice: the highest recall at a stated price in loss, and in words what can and cannot be told apart.

Knows entries with answers and losses; not models, files or terminals. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from longreach.evals.scores import clusters
from longreach.evals.scores.clusters import Paired, Share
from longreach.evals.tune.bench import recall
from longreach.evals.tune.candidates import DIAL, RECOMMENDED, Candidate
from longreach.evals.tune.halving import NO_TIME, Entry
from longreach.evals.tune.plan import Cost, two_documents
from longreach.quantities import counted

PRICE = 0.25  # nats per token: docs/tune.md argues it
SURE = 0.05  # p below which two are told apart
MARGIN = 0.05  # recall below the best at which one that is not told apart may still be preferred: few documents tell nothing apart
SAME_LOSS = 0.01  # nats
LOW_CEILING = 0.5
FEW = 3  # documents: fewer tell nothing apart, whatever was found in them


@dataclass(frozen=True)
class Decision:
    """`chosen` None: nothing that was measured can be chosen, or too little was. `beaten`: the dial's rule is told apart from the choice, and worse; None: not
    compared."""

    chosen: Entry | None
    beaten: bool | None
    sentences: tuple[str, ...]


def decide(entries: Sequence[Entry], price: float = PRICE, ceiling: Share | None = None) -> Decision:
    """The highest recall (by the lower end of its interval, so that more documents count) among those whose loss is at most `price` above the lowest.

    Of those with as many documents that are not told apart from it and at most MARGIN below, the lowest loss; of those with about the same loss the fewest
    parameters. One whose loss was not measured cannot be chosen, unless none that can be chosen has a loss: then all count.

    Nothing is chosen where the dial's rule was not compared with it, or where one document is all that both have read and the dial's rule (or, where that is
    the choice, another) found as much in it: other commands would follow a choice that rests on nothing.

    The choice is the best of many, so that the dial's rule is beaten only where p times the number of tried ones that can be chosen is below SURE (Bonferroni).

    ceiling  recall of plain attention at the length of its window.
    """
    tried = [entry for entry in entries if entry.answers and entry.reason is None]
    able = [entry for entry in tried if not entry.candidate.control]
    if not able:
        return Decision(None, None, ("nothing was measured that could be chosen",))
    if len(able) == 1 and sum(not entry.candidate.control for entry in entries) > 1:
        only = f"only {name(able[0].candidate)} was measured, it found {found(able[0])}: there is nothing to choose between"
        return Decision(None, None, (f"{only}; pass a larger --budget, which goes on from what was measured",))
    measured = [entry for entry in tried if entry.loss is not None]
    lowest = min((loss(entry) for entry in measured), default=0.0)
    priced = [entry for entry in able if entry.loss is not None] or able
    eligible = [entry for entry in priced if loss(entry) <= lowest + price] or priced
    order = {id(entry): place for place, entry in enumerate(entries)}
    best = min(eligible, key=lambda e: (-e.share.low, -e.share.value, loss(e), order[id(e)]))
    alike = [e for e in eligible if e is best or (len(e.answers) >= len(best.answers) and e.share.value >= best.share.value - MARGIN and not told(e, best))]
    cheapest = min(loss(e) for e in alike)
    chosen = min((e for e in alike if loss(e) <= cheapest + SAME_LOSS), key=lambda e: (e.candidate.parameters, -e.share.value, order[id(e)]))
    dial = next((entry for entry in entries if entry.candidate.label == DIAL and entry.reason in (None, NO_TIME)), None)
    if too_little := _too_little(chosen, able, dial):
        return Decision(None, None, (f"{too_little}, so nothing is chosen; pass --budget {enough(able)} or more, which goes on from what was measured",))
    beaten = None if dial is None else dial is not chosen and worse(dial, chosen, len(able))
    said = [*_chosen(chosen, measured, lowest), *_others(chosen, eligible, measured, tried, lowest, price)]
    return Decision(chosen, beaten, (*said, *_dial(chosen, dial, len(able)), *_frankly(chosen, tried, ceiling)))


def _too_little(chosen: Entry, able: Sequence[Entry], dial: Entry | None) -> str | None:
    """Why a choice rests on too little; None where it does not. `dial` None: it cannot be had here."""
    if dial is not None and not dial.answers:
        return f"{name(dial.candidate)} was not measured"
    if dial is not None and dial.loss is None and chosen.loss is not None:
        return f"{name(chosen.candidate)} found {found(chosen)}, but the loss of {name(dial.candidate)}, with which it is compared, was not measured"
    rivals = [entry for entry in able if entry is not chosen] if dial is None or dial is chosen else [dial]
    equal = next((entry for entry in rivals if recall(entry.answers[:1]).value >= recall(chosen.answers[:1]).value), None)
    if equal is None or max(min(len(entry.answers), len(chosen.answers)) for entry in rivals) > 1:
        return None
    return f"{name(chosen.candidate)} found {found(chosen)}, and {name(equal.candidate)} found {found(equal)}: one document tells them not apart"


def enough(able: Sequence[Entry]) -> str:
    """The budget that would do, by the slowest reading and by what was spent."""
    document = max(entry.seconds or 0.0 for entry in able)
    losses = [entry.loss.seconds for entry in able if entry.loss is not None]
    spent = math.fsum(answers.seconds for entry in able for answers in entry.answers) + math.fsum(losses)
    return two_documents(Cost(document, max([document, *losses]), ()), spent)


def loss(entry: Entry) -> float:
    return 0.0 if entry.loss is None else entry.loss.nats


def paired(a: Entry, b: Entry) -> Paired:
    """On the documents that both have read."""
    common = min(len(a.answers), len(b.answers))
    return clusters.compare(a.groups[:common], b.groups[:common], [answers.weights for answers in a.answers[:common]])


def told(a: Entry, b: Entry) -> bool:
    return paired(a, b).p < SURE


def worse(a: Entry, b: Entry, best_of: int = 1) -> bool:
    """`best_of`: b is the best of so many."""
    found = paired(a, b)
    return found.p * best_of < SURE and found.difference > 0


def found(entry: Entry) -> str:
    """ "30 of 32 in 4 documents"."""
    share = entry.share
    return f"{share.found:.4g} of {share.n} in {counted(share.documents, 'document')}"


def interval(share: Share) -> str:
    return f"{100 * share.value:.0f} %, {100 * share.low:.0f} to {100 * share.high:.0f}"


def _chosen(chosen: Entry, measured: Sequence[Entry], lowest: float) -> Iterator[str]:
    if chosen.loss is None:
        price = "its loss was not measured"
    elif loss(chosen) == lowest:
        price = f"loss {lowest:.3f}, the lowest" + (f" of {len(measured)}" if len(measured) > 1 else " and only one measured")
    else:
        cheap = next(entry for entry in measured if loss(entry) == lowest)
        price = f"loss {loss(chosen):.3f}, {loss(chosen) - lowest:.3f} above the lowest, of {name(cheap.candidate)}"
    yield f"{name(chosen.candidate)} is chosen: it found {found(chosen)} ({interval(chosen.share)}); {price}"


def name(candidate: Candidate) -> str:
    """With its parameters, where the label does not have them."""
    return f"{candidate.label} ({candidate.method.brief()})" if candidate.label == DIAL or candidate.label.endswith(RECOMMENDED) else candidate.label


def _others(
    chosen: Entry, eligible: Sequence[Entry], measured: Sequence[Entry], tried: Sequence[Entry], lowest: float, price: float
) -> Iterator[str]:  # fmt: skip
    """One sentence for all of whom the same is to be said."""
    same: dict[str, list[str]] = {}
    for entry in sorted((e for e in tried if e is not chosen and e.candidate.label != DIAL), key=lambda e: -e.share.value):
        what = entry.candidate.label
        if entry in measured and entry not in eligible and entry.share.value > chosen.share.value:
            over = loss(entry) - lowest
            fix = f"--price {math.ceil(100 * over + 1e-6) / 100:g} admits it"
            yield f"{what} found {found(entry)}, but its loss is {over:.3f} above the lowest, more than the price of {price:g}; {fix}"
            continue
        same.setdefault(f"found {found(entry)}: {compared(entry, chosen)}{_price(entry, chosen)}", []).append(what)
    for said, names in same.items():
        yield f"{listed(names)}{' each' if len(names) > 1 else ''} {said}"


def listed(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def compared(entry: Entry, chosen: Entry, best_of: int = 1) -> str:
    """How an entry stands to the choice, which is the best of so many, on the documents that both have read."""
    pair = paired(entry, chosen)
    p = f"p = {min(1.0, pair.p * best_of):.2g}" + (f", against the best of {best_of}" if best_of > 1 else "")
    if pair.p * best_of >= SURE:
        return f"not to be told apart with {counted(pair.documents, 'document')} ({p})"
    return f"{'worse' if pair.difference > 0 else 'better'}, {p}"


def _price(entry: Entry, chosen: Entry) -> str:
    """Without a loss an entry can be chosen only if the choice has none either. More time measures it only where it found as much (halving.py)."""
    if entry.loss is not None:
        return f"; loss {loss(entry):.3f}"
    if entry.candidate.control or chosen.loss is None:
        return ""
    fix = ": a larger --budget measures it" if entry.share.value >= chosen.share.value else ""
    return f"; its loss was not measured, so it cannot be chosen{fix}"


def _dial(chosen: Entry, dial: Entry | None, best_of: int) -> Iterator[str]:
    if dial is None:
        yield f"{DIAL} was not measured, so it is not known whether it is beaten"
    elif dial is chosen:
        yield f"{DIAL} is the choice: a profile changes nothing at this length"
    else:
        beaten = "is beaten" if worse(dial, chosen, best_of) else "is not shown to be beaten"
        yield f"{name(dial.candidate)} {beaten}: it found {found(dial)}: {compared(dial, chosen, best_of)}{_price(dial, chosen)}"


def _frankly(chosen: Entry, tried: Sequence[Entry], ceiling: Share | None) -> Iterator[str]:
    """What a number alone does not say."""
    plain = next((entry for entry in tried if entry.candidate.control), None)
    if plain is not None and worse(chosen, plain):
        yield (
            f"plain attention beyond its window finds more than the choice ({found(plain)}): the model was probably trained on more than is stated; "
            "pass --trained-window"
        )
    elif plain is not None and not worse(plain, chosen):
        if len(plain.answers) < FEW:
            yield f"plain attention beyond its window found {found(plain)}: too few to tell whether anything here beats it"
        else:
            yield f"nothing here is shown to beat plain attention beyond its window, which found {found(plain)}"
    if ceiling is not None and ceiling.value < LOW_CEILING and chosen.share.value <= ceiling.value:
        inside = f"inside its window the model itself finds {ceiling.found:.4g} of {ceiling.n} ({interval(ceiling)})"
        if ceiling.high < LOW_CEILING:
            yield f"the ceiling is low: {inside}, and no setting can be expected to find more beyond it"
        else:
            yield f"the ceiling may be low: {inside}; so few answers do not tell"
    if max(entry.share.found for entry in tried) == 0:
        yield "no candidate found anything: this model cannot do the task at this length, and the choice rests on loss alone"
