"""Informed search: halve groups of parts, score the groups, keep the best, until single parts are left. TracLLM (arXiv 2506.04202), section 4.

    one group with all n parts; repeat: halve each group; where more than `keep` are left, score them in the game among themselves and keep the best.

A group acts as one player, and only groups that are left play. Where values add up, and each of at most `keep` parts outweighs all others together, these are
found; a large part among small ones may lose to two middling ones. Knows no texts and no models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from longreach.apps.attribution.scores import Coalition, Scorer

Values = Callable[[Sequence[Coalition]], Sequence[float]]  # coalitions of parts -> their values, all at once
TOP = 5  # K of the paper
MOST_PARTS = 10_000
HELD = 10**6  # numbers of parts in the sets of one order of the groups: some 400 MB for all scores


class Search:
    """One search, by one score. Groups are ranges of parts, in the order of the text."""

    def __init__(self, scorer: Scorer, n: int, keep: int) -> None:
        self.scorer, self.keep = scorer, keep
        self.groups = [range(n)] if n else []
        self.best: dict[range, float] = {}  # those that were kept when groups were scored last, and their scores

    @property
    def ended(self) -> bool:
        return not self.groups or (bool(self.best) and all(len(group) == 1 for group in self.best))

    def descend(self) -> None:
        """Halve the groups until there are more than are kept, or single ones."""
        while any(len(group) > 1 for group in self.groups):
            self.groups = [half for group in self.groups for half in (group[: len(group) // 2], group[len(group) // 2 :]) if half]
            if len(self.groups) > self.keep:
                return

    def asks(self) -> list[Coalition]:
        return [self._parts(who) for who in self.scorer.coalitions(len(self.groups))]

    def score(self, value: Callable[[Coalition], float]) -> None:
        scores = self.scorer.scores(len(self.groups), lambda who: value(self._parts(who)))
        best = sorted(zip(self.groups, scores), key=lambda each: (-each[1], each[0].start))[: self.keep]
        self.best = dict(sorted(best, key=lambda each: each[0].start))
        self.groups = [*self.best]

    def _parts(self, who: Coalition) -> Coalition:
        return Coalition(part for i in who for part in self.groups[i])


def search(searches: Sequence[Search], values: Values) -> None:
    """Go on with searches to their ends, in step: what all of them ask at a level is one call of `values`. Where it raises, each is as after its last level."""
    while going := [each for each in searches if not each.ended]:
        for each in going:
            each.descend()
        asked = [*dict.fromkeys(who for each in going for who in each.asks())]
        known = dict(zip(asked, values(asked), strict=True))
        for each in going:
            each.score(known.__getitem__)


def require_searchable(count: int, top: int) -> None:
    """Raises ValueError, with the fix, where there are too many parts, or too many are searched for: sets of them have to fit into memory."""
    if top < 1:
        raise ValueError(f"top must be at least 1 part, not {top}")
    if count > MOST_PARTS:
        raise ValueError(f"the text has {count} parts, more than {MOST_PARTS}; cut it into larger ones, such as paragraphs or passages of more words")
    if min(count, 2 * top) * count > HELD:
        raise ValueError(
            f"a search for {top} of {count} parts would hold more sets of them than fit into memory; pass top={HELD // (2 * count)} (--top) or less, or cut "
            "the text into larger parts"
        )


def expected(n: int, scorers: Sequence[Scorer], keep: int) -> int:
    """About how many coalitions the searches will ask for in all."""
    asked: set[Coalition] = set()

    def note(coalitions: Sequence[Coalition]) -> list[float]:
        asked.update(coalitions)
        return [0.0] * len(coalitions)

    search([Search(scorer, n, keep) for scorer in scorers], note)
    return len(asked)
