"""Score functions and informed search, in games whose values are known."""

from __future__ import annotations

import itertools
import math
from random import Random
from statistics import stdev

import pytest

from longreach.apps.attribution.scores import ENSEMBLE, SCORERS, Alone, Coalition, DenoisedShapley, LeaveOneOut, Shapley, named
from longreach.apps.attribution.search import Search, expected, search


def additive(weights):
    return lambda who: sum(weights[i] for i in who)


def some_game(n, seed):
    """Any value for every coalition."""
    return lambda who: Random(f"{seed}:{sorted(who)}").gauss(0, 1) * (1 + len(who))


def shapley(n, v):
    """By its definition: the mean over all orders."""
    found = [0.0] * n
    for order in itertools.permutations(range(n)):
        for place, i in enumerate(order):
            before = Coalition(order[:place])
            found[i] += (v(before | {i}) - v(before)) / math.factorial(n)
    return found


def searched(n, scorer, keep, v):
    """One search alone -> what it found, the coalitions that it asked for and the levels that were scored."""
    one, asked = Search(scorer, n, keep), []

    def values(coalitions):
        asked.append([*coalitions])
        return [v(who) for who in coalitions]

    search([one], values)
    return one, asked


# -- scores -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORERS)
def test_in_an_additive_game_every_score_is_the_weight(name):
    weights = [Random(1).uniform(-3, 3) for _ in range(7)]
    assert named((name,))[0].scores(7, additive(weights)) == pytest.approx(weights)


def test_two_texts_that_say_the_same():
    """An or-game: leave-one-out sees neither, alone sees both, Shapley shares."""
    v = lambda who: float(bool(who & {1, 3}))  # noqa: E731
    assert LeaveOneOut().scores(4, v) == [0, 0, 0, 0]
    assert Alone().scores(4, v) == [0, 1, 0, 1]
    assert shapley(4, v) == pytest.approx([0, 0.5, 0, 0.5])
    assert Shapley(2000).scores(4, v) == pytest.approx([0, 0.5, 0, 0.5], abs=0.05)
    assert DenoisedShapley(50).scores(4, v) == [0, 1, 0, 1]


def test_two_texts_that_are_needed_together():
    """An and-game: alone sees neither, leave-one-out sees both."""
    v = lambda who: float({1, 3} <= who)  # noqa: E731
    assert Alone().scores(4, v) == [0, 0, 0, 0]
    assert LeaveOneOut().scores(4, v) == [0, 1, 0, 1]
    assert DenoisedShapley(50).scores(4, v) == [0, 1, 0, 1]


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_drawn_orders_come_near_to_all_orders(n):
    v, count = some_game(n, 3), 400
    exact = shapley(n, v)
    marginals = Shapley(count, seed=5)._marginals(n, v)
    for i, found in enumerate(Shapley(count, seed=5).scores(n, v)):
        assert abs(found - exact[i]) <= 3.5 * stdev(marginals[i]) / math.sqrt(count) + 1e-9
    assert all(math.isclose(sum(one), v(Coalition(range(n))) - v(Coalition())) for one in zip(*marginals))  # efficiency, in every order


def test_the_largest_marginals_count():
    v = some_game(6, 1)
    marginals = DenoisedShapley(20)._marginals(6, v)
    assert DenoisedShapley(20).scores(6, v) == pytest.approx([sum(sorted(each)[-4:]) / 4 for each in marginals])
    assert DenoisedShapley(5).scores(6, v) == pytest.approx([max(each) for each in DenoisedShapley(5)._marginals(6, v)])
    assert DenoisedShapley(20, share=1.0).scores(6, v) == pytest.approx(Shapley(20).scores(6, v))


def test_which_coalitions_are_asked_for_is_known_beforehand():
    for scorer in named(tuple(SCORERS)):
        asked = {*scorer.coalitions(9)}
        scorer.scores(9, {who: 0.0 for who in asked}.__getitem__)  # no other is looked up
    assert len(Alone().coalitions(9)) == len(LeaveOneOut().coalitions(9)) == 10
    assert Shapley(3).coalitions(9) == Shapley(3).coalitions(9) != Shapley(3, seed=1).coalitions(9)


def test_what_is_refused():
    for wrong, says in ((("loo",), "no score 'loo'"), ((), "at least one"), (("alone", "alone"), "each once")):
        with pytest.raises(ValueError, match=says):
            named(wrong)
    with pytest.raises(ValueError, match="permutations"):
        named(permutations=0)
    with pytest.raises(ValueError, match="share"):
        DenoisedShapley(share=0.0)


# -- search -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", [Alone(), LeaveOneOut(), Shapley(2), DenoisedShapley(3)], ids=lambda scorer: scorer.name)
@pytest.mark.parametrize("n,keep", [(1, 5), (4, 5), (5, 5), (6, 5), (37, 5), (64, 1), (100, 3), (333, 8)])
def test_the_best_parts_of_an_additive_game_are_found(scorer, n, keep):
    """Each of them outweighs all others together, so that a group with one of them is worth more than one without."""
    rng = Random(n)
    best = rng.sample(range(n), min(n, keep))
    weights = [1000.0 + rng.random() * 1000 if i in best else rng.random() / n for i in range(n)]
    found, _ = searched(n, scorer, keep, additive(weights))
    assert {group.start for group in found.best} == {*best}
    assert all(len(group) == 1 and math.isclose(score, weights[group.start], abs_tol=1e-6) for group, score in found.best.items())


def test_two_middling_parts_may_hide_the_best_one():
    """Values that add up are not enough: what the paper's theorem needs is stated in search.py."""
    assert searched(4, LeaveOneOut(), 1, additive([3, 0, 2, 2]))[0].best == {range(2, 3): 2}


@pytest.mark.parametrize("n,levels", [(100, 5), (320, 7), (1000, 8)])
def test_it_costs_what_the_paper_says(n, levels):
    """Five groups are kept, so ten are scored at a level: 53, 75 and 86 evaluations of the single scores, where the groups that are kept can all be halved."""
    most = 9 + 11 * (levels - 1)
    for scorer in (Alone(), LeaveOneOut()):
        longest = lambda who: sum(1.0 for i in who)  # noqa: E731  the longest groups win, so that they can be halved
        _, asked = searched(n, scorer, 5, longest)
        assert len(asked) == levels and most - 5 <= sum(map(len, asked)) <= most
    _, asked = searched(1024, LeaveOneOut(), 5, lambda who: 0.0)
    assert [*map(len, asked)] == [9, *[11] * 7]  # 8 groups, then 10 at every level


def test_searches_go_in_step_and_share_what_they_ask():
    calls = []

    def values(coalitions):
        assert len({*coalitions}) == len(coalitions)
        calls.append(len(coalitions))
        return [float(40 in who) + float(7 in who) for who in coalitions]

    searches = [Search(scorer, 100, 5) for scorer in named()]
    search(searches, values)
    assert len(calls) <= 6
    for each in searches:
        assert each.ended and {range(40, 41), range(7, 8)} <= each.best.keys()
    alone = sum(sum(map(len, searched(100, scorer, 5, lambda who: 0.0)[1])) for scorer in named())
    assert 0.5 * alone < expected(100, named(), 5) < alone


def test_a_search_that_breaks_off_keeps_its_last_level():
    levels = itertools.count()

    def values(coalitions):
        if next(levels) == 2:
            raise InterruptedError
        return [float(40 in who) for who in coalitions]

    one = Search(LeaveOneOut(), 100, 2)
    with pytest.raises(InterruptedError):
        search([one], values)
    assert not one.ended and len(one.best) == 2
    [best] = [group for group, score in one.best.items() if score == 1.0]
    assert 40 in best and 1 < len(best) < 50


def test_a_search_among_nothing_ends():
    assert expected(0, named(), 5) == 0 and Search(Alone(), 0, 5).ended


def test_the_ensemble_of_the_paper():
    assert ENSEMBLE == ("alone", "leave-one-out", "denoised-shapley")
    assert [scorer.weight for scorer in named()] == [1, 2, 1]
