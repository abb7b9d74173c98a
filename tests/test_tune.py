"""Tuning without a model: candidates, the division of a budget, halving, statistics of clustered answers, and the choice."""

from __future__ import annotations

import math
import re
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fake_bench import KEYS, Clock, FakeBench
from longreach import Combined, InfLLM, LongHeads, Quest, YaRN
from longreach.cli import check_recall
from longreach.cli.tune import found_of, ladder, show, use
from longreach.configs import Window
from longreach.evals.scores import clusters, statistics
from longreach.evals.tune import halving, outcome
from longreach.evals.tune.bench import Answers, Loss
from longreach.evals.tune.candidates import DIAL, PLAIN, Candidate, grouped, propose
from longreach.evals.tune.decision import SURE, decide, name, paired
from longreach.evals.tune.halving import CONTROL_DOCUMENTS, NO_TIME, Entry, search
from longreach.evals.tune.plan import NOTHING_NEW, Cost, Plan, Rung, divide
from longreach.methods import registry
from longreach.methods.rerope import ReRoPE
from longreach.methods.selfextend import SelfExtend
from longreach.methods.stock import Stock
from longreach.planning import dial
from longreach.planning.profile import Profile, Tuned, default_path
from longreach.quantities import seconds_of

WINDOW, CONTEXT = Window(8192, "stated"), 12288


# -- candidates ------------------------------------------------------------------------------------------------------------------------


def test_the_candidates_of_a_window_and_a_context():
    proposal = propose(WINDOW, CONTEXT)
    assert proposal == propose(WINDOW, CONTEXT)
    labels, methods = [c.label for c in proposal.candidates], [c.method for c in proposal.candidates]
    assert labels[:5] == ["SelfExtend(12, 252)", DIAL, "ReRoPE(512)", "SelfExtend(16, 512)", "SelfExtend(8, 256)"]
    assert len(set(methods)) == len(methods) == len(set(labels)) > 25
    assert methods[labels.index(DIAL)] == dial.choose(WINDOW, CONTEXT).method
    assert [c.label for c in proposal.candidates if c.control] == [PLAIN]
    assert {"ReRoPE(256)", "ReRoPE(1024)", "YaRN(factor=1.5)", "LMInfinite(n_local=8192)", "ReRoPE(512, log scale)"} <= set(labels)
    chooses = {c.method: c.why for c in proposal.candidates if c.method.choice is not None}
    assert chooses[InfLLM(4096)] == chooses[LongHeads(4096)] == "as its authors recommend"
    assert chooses[Combined(YaRN(2.0), Quest())] == "as its authors recommend, at frequencies that reach so far" and Quest() not in methods
    for candidate in proposal.candidates:
        reach = candidate.method.capacity(WINDOW.tokens)
        assert candidate.control or candidate.method.needs_context or reach is None or reach >= CONTEXT, candidate
        if isinstance(candidate.method, SelfExtend) and candidate.label != DIAL:
            assert candidate.method.largest_distance(CONTEXT) <= 0.7 * WINDOW.tokens
    reasons = {out.label: out.reason for out in proposal.left_out}
    assert "no recommended setting" in reasons["combined"] and any("reaches 10794 tokens" in reason for reason in reasons.values())


def test_a_group_is_the_smallest_usual_one_that_keeps_the_distance():
    assert grouped(8192, 16384, 32, (1, 6)) == SelfExtend(16, 256)
    assert grouped(8192, 12288, 16, (1, 4)) == SelfExtend(8, 512)
    assert grouped(8192, 12288, 16, (1, 4), 8192) == SelfExtend(8, 512, log_scale=8192)
    assert grouped(8192, 12288, 8, (1, 8)) is None  # no room beside the neighbour window
    assert grouped(512, 131072, 32, (1, 6)) is None  # no usual group reaches it


def test_what_a_model_cannot_have_is_left_out_with_the_reason():
    proposal = propose(WINDOW, CONTEXT, lambda method: "scaled already" if method.rescales else None)
    assert not any(c.method.rescales for c in proposal.candidates)
    assert {out.label: out.reason for out in proposal.left_out}["YaRN(factor=1.5)"] == "scaled already"


def test_the_dials_rule_keeps_its_name_where_the_grid_has_it_too(monkeypatch):
    monkeypatch.setattr(dial, "choose", lambda window, context: dial.Choice(SelfExtend(12, 252), context, window, "a rule"))
    labels = [c.label for c in propose(WINDOW, CONTEXT).candidates]
    assert labels[0] == DIAL and labels.count(DIAL) == 1 and "SelfExtend(12, 252)" not in labels


def test_labels_are_short_and_say_what_was_tried():
    for window, context in ((WINDOW, CONTEXT), (Window(512, "stated"), 1024)):
        found = propose(window, context).candidates
        assert all(len(candidate.label) <= 34 for candidate in found) and len({candidate.label for candidate in found}) == len(found)
    by = {candidate.label: candidate for candidate in found}
    assert name(by["InfiniteHiP as recommended"]).startswith("InfiniteHiP as recommended (InfiniteHiP(window=128, ")
    assert by["Quest as recommended"].method == Combined(YaRN(2.0), Quest()) and name(by["YaRN(factor=2.0)"]) == "YaRN(factor=2.0)"


def test_a_new_method_is_a_candidate_by_its_recommendation(monkeypatch):
    class Mine(YaRN):
        name = "mine"

        @classmethod
        def recommended(cls, window, context):
            return cls(7.0)

    from longreach.evals.tune import candidates

    monkeypatch.setattr(candidates, "registry", lambda: {**registry(), "mine": Mine})
    assert "Mine(factor=7.0)" in [c.label for c in propose(WINDOW, CONTEXT).candidates]


def test_inside_the_window_there_is_nothing_to_choose():
    with pytest.raises(ValueError, match=r"4096 tokens fit the trained window of 8192.*--trained-window"):
        propose(WINDOW, 4096)


# -- statistics ------------------------------------------------------------------------------------------------------------------------


def test_answers_that_agree_inside_documents_tell_less():
    apart, alike = [[1.0, 0.0] * 4] * 4, [[1.0] * 8, [0.0] * 8] * 2
    wide, narrow = clusters.share(alike), clusters.share(apart)
    assert (wide.value, wide.found, wide.n, wide.documents) == (0.5, 16, 32, 4) and narrow.value == 0.5
    # rho 1 and 0 (clipped) of four documents, averaged with the prior of 0.2 that weighs as much as four: (0.8 + 3) / 7 and 0.8 / 7
    assert clusters.correlation(alike) == pytest.approx(3.8 / 7) and clusters.correlation(apart) == pytest.approx(0.8 / 7)
    assert (wide.low, wide.high) == pytest.approx(statistics.wilson(0.5 * 32 / (1 + 7 * 3.8 / 7), 32 / (1 + 7 * 3.8 / 7)))
    assert wide.low < narrow.low < 0.5 < narrow.high < wide.high
    one = clusters.share([[1.0] * 8])
    assert one.high == 1 and one.low == pytest.approx(statistics.wilson(8 / 2.4, 8 / 2.4)[0]) and one.low < statistics.wilson(8, 8)[0]
    with pytest.raises(ValueError, match="no answers"):
        clusters.share([])


def test_one_document_alone_tells_nothing_apart_and_four_do():
    none, every = [0.0] * 8, [1.0] * 8
    assert clusters.compare([none], [every]).p == statistics.mcnemar(0, 3) == 0.25  # 8 / 2.4
    four = clusters.compare([none] * 4, [every] * 4)
    assert (four.difference, four.only_a, four.only_b, four.documents) == (1, 0, 32, 4) and four.p < 1e-3
    same = clusters.compare([every, none], [every, none])
    assert (same.difference, same.p) == (0, 1)
    with pytest.raises(ValueError, match="same questions"):
        clusters.compare([none], [none, none])


def test_answers_that_count_more_make_the_others_tell_less():
    groups, weights = [[1.0] * 5 + [0.0]] * 4, [[0.2] * 5 + [1.0]] * 4
    found = clusters.share(groups, weights)
    assert (found.value, found.found, found.n) == (pytest.approx(0.5), 20, 24)
    effective = 24 / (clusters.design_effect(groups) * 1.8)  # n sum(w^2) / (sum w)^2 = 6 (5 / 25 + 1) / 4
    assert (found.low, found.high) == pytest.approx(statistics.wilson(0.5 * effective, effective))
    assert clusters.share(groups, [[3.0] * 6] * 4) == clusters.share(groups)
    none = [[0.0] * 6] * 4
    assert clusters.compare(none, groups, weights).difference == pytest.approx(0.5) and clusters.compare(none, groups).difference == pytest.approx(5 / 6)
    assert clusters.compare(none, groups, weights).p > clusters.compare(none, groups).p


def test_every_task_counts_the_same_and_is_shown_by_itself():
    """Five keys and one chain of facts: recall used to be five sixths pass keys."""
    tasks = ("passkeys",) * 5 + ("ruler-vt",)
    keys = Entry(Candidate("keys", SelfExtend(4, 64), ""), [Answers((1.0,) * 5 + (0.0,), 1.0, 1.0, tasks)] * 2, Loss(3.5, 3.5, 3.5, (3.5,), 1.0))
    both = Entry(Candidate("both", ReRoPE(64), ""), [Answers((1.0,) * 3 + (0.0,) * 2 + (1.0,), 1.0, 1.0, tasks)] * 2, Loss(3.5, 3.5, 3.5, (3.5,), 1.0))
    assert keys.share.value == pytest.approx(0.5) and both.share.value == pytest.approx(0.8)
    assert chosen(keys, both) == "both" and keys.share.found == 10 > both.share.found == 8
    row = outcome.row(keys, False)
    assert row["by_task"] == {"passkeys": {"found": 10, "of": 10, "recall": 1}, "ruler-vt": {"found": 0, "of": 2, "recall": 0}} and row["recall"] == 0.5
    assert found_of(row) == "passkeys 10 of 10, ruler-vt 0 of 2"
    one = outcome.row(entry("a", [8], 3.5), False)
    assert "by_task" not in one and found_of(one) == "8 of 8"
    said = StringIO()
    nothing = SimpleNamespace(decision=decide([keys, both]), search=SimpleNamespace(entries=[]), bench=SimpleNamespace(notes=[]))
    show(Console(file=said, width=300), nothing, {"candidates": [row], "ceiling": [], "tasks": ["passkeys", "ruler-vt"]})  # type: ignore[arg-type]
    assert "passkeys 10 of 10, ruler-vt 0 of 2" in said.getvalue() and "recall is the mean over the tasks" in said.getvalue()


def test_rounding_to_whole_answers_makes_nobody_surer():
    a, b = [[1.0, 0, 0, 0, 0], [0.0] * 5, [0.0] * 5], [[0.0, 1, 1, 1, 0], [1.0, 1, 1, 1, 0], [1.0, 1, 1, 1, 0]]
    found = clusters.compare(a, b)
    differences = [[y - x for x, y in zip(one, other)] for one, other in zip(a, b)]
    effect = clusters.design_effect(differences)
    assert (found.only_a, found.only_b) == (1, 11) and effect > 1
    assert found.p == statistics.mcnemar(1, math.floor(11 / effect)) > statistics.mcnemar(0, math.floor(11 / effect))
    assert clusters.compare(b, a).p == found.p


# -- the plan --------------------------------------------------------------------------------------------------------------------------


def test_how_a_budget_is_divided():
    cost = Cost(10.0, 8.0, (5.0, 5.0))
    assert divide(30, 150, cost) == Plan((Rung(6, 1), Rung(3, 2)), 4, 2, 132.0)
    assert divide(30, 50, cost) == Plan((Rung(2, 1),), 3, 0, 44.0)  # no time for the ceiling
    for budget in (60, 100, 200, 400, 900, 5000):
        plan = divide(30, budget, cost)
        assert plan.seconds <= budget and plan.rungs[-1].candidates >= 2 and sum(cost.ceiling[: plan.ceiling]) <= 0.2 * budget
        for before, after in zip(plan.rungs, plan.rungs[1:]):
            assert after.documents == 2 * before.documents and after.candidates == max(2, -(-before.candidates // 2))
    assert divide(30, 1e6, cost).rungs == (Rung(30, 1), Rung(15, 2), Rung(8, 4), Rung(4, 8), Rung(2, 16))
    assert divide(30, 1e6, cost, most=2).rungs == (Rung(30, 1), Rung(15, 2))


def test_a_budget_too_small_for_two_is_refused_with_the_one_that_is_needed():
    with pytest.raises(ValueError, match=r"about 44 s, more than the budget of 43 s; pass --budget 49s or more"):
        divide(30, 43.9, Cost(10.0, 8.0, (5.0,)))
    with pytest.raises(ValueError, match="--budget 9m"):
        divide(30, 60, Cost(100.0, 90.0, ()))


# -- halving ---------------------------------------------------------------------------------------------------------------------------


def likes(best: str, second: str = "ReRoPE(512)") -> FakeBench:
    """A model that finds most under `best`, as SmolLM2 does, and pays for it in loss."""
    found = {best: 0.95, second: 0.8}
    return FakeBench(Clock(), lambda c: found.get(c.label, 0.15), lambda c: 3.63 if c.label in found else 3.45)


def run(bench: FakeBench, budget: float, **more):
    return search(propose(WINDOW, CONTEXT).candidates, bench, budget, clock=bench.clock, **more)


@pytest.mark.parametrize("budget", [100, 200, 300, 600, 1200])
def test_the_best_is_found_and_the_budget_is_kept(budget):
    bench = likes("SelfExtend(12, 252)")
    plans = []
    found = run(bench, budget, said=lambda plan, cost: plans.append((plan, cost)))
    assert bench.clock.now <= budget + 10 and found.spent == bench.clock.now
    assert plans[0][1] == Cost(10.0, 10.0, (5.0, 5.0)) and plans[0][0].seconds <= budget
    decision = decide(found.entries)
    assert decision.chosen is not None and decision.chosen.candidate.label == "SelfExtend(12, 252)"
    assert decision.chosen.loss is not None and any(e.candidate.label == DIAL and e.loss is not None for e in found.tried)
    waiting = [e.candidate.label for e in found.entries if e.reason == NO_TIME]
    assert waiting == [e.candidate.label for e in found.entries if not e.answers] and len(waiting) + len(found.tried) == len(found.entries)
    said = list(halving.tried(found.entries))
    assert all(label in said[0] for label in waiting) if waiting else not said
    assert all(d == n for e in found.tried for n, d in enumerate(sorted(d for label, d in bench.asked if label == e.candidate.label and d != "loss")))


def test_a_setting_far_down_the_list_is_found_with_time():
    decision = decide(run(likes("SelfExtend(3, 129)"), 2000).entries)
    assert decision.chosen is not None and decision.chosen.candidate.label == "SelfExtend(3, 129)" and decision.beaten


def test_the_same_budget_again_measures_nothing_and_a_larger_one_goes_on():
    first = likes("SelfExtend(12, 252)")
    before = run(first, 200)
    again = first.again()
    after = run(again, 200)
    assert again.asked == [] and after.spent == pytest.approx(before.spent)
    assert [(e.candidate.label, e.groups) for e in after.tried] == [(e.candidate.label, e.groups) for e in before.tried]
    larger = first.again()
    more = run(larger, 400)
    assert larger.asked and not set(larger.asked) & set(first.asked) and len(more.tried) > len(before.tried)
    assert more.spent <= 410 and larger.clock.now <= 210


@pytest.mark.parametrize("budget", [20, 60, 100, 600])
def test_a_smaller_budget_decides_on_all_that_is_known(budget):
    """A tune of 8 s after one of 60 s used to forget most of it, and said that candidates were not tried which had been."""
    first = likes("SelfExtend(12, 252)")
    before = run(first, 900)
    again = first.again()
    after = run(again, budget)
    assert after.plan == NOTHING_NEW if budget == 20 else after.plan.rungs
    if budget < 100:  # a larger one may ask for what was not, within its time
        assert again.asked == []
    for old, new in zip(before.entries, after.entries):
        assert new.groups[: len(old.groups)] == old.groups and (new.loss == old.loss or old.loss is None) and (new.reason is None) >= (old.reason is None)
    assert after.spent >= before.spent and set(after.parts) >= set(before.parts)
    assert decide(after.entries).chosen.candidate.label == "SelfExtend(12, 252)"
    assert ladder(outcome.plan_row(NOTHING_NEW)) == "nothing new, because more is known already than it buys"


@pytest.mark.parametrize("budget", [200, 300, 400])
def test_time_that_is_left_goes_to_those_between_which_the_choice_lies(budget):
    """The first document was slow, so that the plan was cautious: the two best and the dial's rule read on, all of them or none."""
    bench = likes("SelfExtend(12, 252)", "ReRoPE(512)")
    bench.seconds = lambda candidate: 10.0 if bench.asked else 20.0
    found = run(bench, budget)
    documents = {e.candidate.label: len(e.answers) for e in found.tried}
    planned = found.plan.rungs[-1].documents
    assert documents["SelfExtend(12, 252)"] == documents["ReRoPE(512)"] == documents[DIAL] > planned
    assert max(documents.values()) == documents[DIAL] and budget - 30 < found.spent <= budget


def test_an_interrupted_tune_goes_on_without_repeating():
    class Stop(Exception):
        pass

    whole, broken = likes("SelfExtend(12, 252)"), likes("SelfExtend(12, 252)")
    run(whole, 200)

    def stop(step):
        if len(broken.asked) == 5:
            raise Stop

    with pytest.raises(Stop):
        run(broken, 200, progress=stop)
    rest = broken.again()
    run(rest, 200)
    assert broken.asked + rest.asked == whole.asked


def test_slow_candidates_end_a_search_early_and_within_a_reading_of_the_budget():
    bench = likes("ReRoPE(512)")
    bench.seconds = lambda candidate: 10.0 if candidate.label == "SelfExtend(12, 252)" else 30.0
    found = run(bench, 200)
    assert bench.clock.now <= 200 + 30 and sum(bool(e.answers) for e in found.entries) < found.plan.rungs[0].candidates
    assert decide(found.entries).chosen.candidate.label == "ReRoPE(512)"


def test_a_document_that_cannot_be_made_ends_the_documents_and_not_the_tune():
    bench = likes("SelfExtend(12, 252)")
    bench.documents = 3
    found = run(bench, 600)
    assert found.plan.rungs[-1].documents > 3 and max(len(e.answers) for e in found.tried) == 3
    decision = decide(found.entries)
    assert decision.chosen is not None and decision.chosen.candidate.label == "SelfExtend(12, 252)" and len(decision.chosen.answers) == 3


def test_what_the_model_refuses_gives_its_place_to_the_next():
    bench = likes("ReRoPE(512)")
    bench.refuses = ("SelfExtend(12, 252)", "SelfExtend(16, 512)")
    found = run(bench, 150)
    assert len(found.tried) == found.plan.rungs[0].candidates
    assert found.entries[0].reason == "it cannot be attached to this model" and not found.entries[0].answers
    assert "SelfExtend(12, 252) cannot be used here: it cannot be attached to this model" in halving.tried(found.entries)
    bench.refuses = tuple(c.label for c in propose(WINDOW, CONTEXT).candidates)
    bench.done.clear()
    with pytest.raises(ValueError, match="no candidate can be measured"):
        run(bench, 150)


def test_two_candidates_come_before_the_ceiling_and_one_alone_is_no_choice():
    bench = likes("SelfExtend(12, 252)")
    found = run(bench, 60)
    assert [what for what in bench.asked][:2] == [("SelfExtend(12, 252)", 0), (DIAL, 0)] and len(found.tried) == 2
    slow = likes("SelfExtend(12, 252)")  # the machine has something else to do after the first document
    slow.seconds = lambda candidate: 10.0 if not slow.asked else 100.0
    decision = decide(run(slow, 60).entries)
    assert decision.chosen is not None and len(slow.asked) == 2 and slow.clock.now == 110  # one reading beyond the budget, and no more
    assert decision.chosen.loss is None
    alone = decide([entry("a", [8], 3.5), entry("b", [])])
    assert alone.chosen is None and "only a was measured, it found 8 of 8 in 1 document: there is nothing to choose between" in alone.sentences[0]


def test_nothing_is_chosen_where_the_dials_rule_was_not_compared():
    """A profile of two candidates with 4 of 5 keys each, of which one had a loss, was written, and other commands followed it."""
    unread, priceless, good = entry(DIAL, []), entry(DIAL, [1, 1, 1]), entry("good", [8, 8, 8], 3.5)
    unread.reason = NO_TIME
    cases = (unread, 17, "(SelfExtend(group_size=4, window=64)) was not measured, so nothing"), (priceless, 21, "but the loss of the dial's rule (")
    for rule, seconds, says in cases:  # a second for each of 8 or 11 readings, and 4 more; a fifth for the ceiling, and a tenth to spare
        decision = decide([rule, good, entry("other", [8, 8, 8], 3.6)])
        assert (decision.chosen, decision.beaten) == (None, None) and len(decision.sentences) == 1 and says in decision.sentences[0]
        assert decision.sentences[0].endswith(f"so nothing is chosen; pass --budget {seconds}s or more, which goes on from what was measured")
    refused = entry(DIAL, [])
    refused.reason = "it cannot be attached"
    assert chosen(refused, good, entry("other", [8, 8, 8], 3.6)) == "good"  # it cannot be had here
    assert chosen(entry(DIAL, [1, 1, 1]), entry("a", [8, 8, 8]), entry("b", [2, 2, 2])) == "a"  # nothing has a loss


def test_one_document_in_which_as_much_was_found_chooses_nothing():
    rule, good = entry(DIAL, [7], 3.5), entry("good", [7], 3.4)
    says = decide([rule, good]).sentences[0]
    assert decide([rule, good]).chosen is None
    assert says.startswith(
        "good found 7 of 8 in 1 document, and the dial's rule (SelfExtend(group_size=4, window=64)) found 7 of 8 in 1 document: one document"
    )
    assert decide([entry(DIAL, [7], 3.4), good]).chosen is None  # a profile of the dial's rule would change what shorter contexts have
    assert chosen(rule, entry("good", [8], 3.4)) == "good" and chosen(entry(DIAL, [8], 3.4), good) == DIAL
    assert decide([rule, entry("good", [7, 7], 3.4)]).chosen is None  # only one document was read by both
    assert decide([entry(DIAL, [7, 7], 3.4), good]).chosen is None
    assert chosen(entry(DIAL, [7, 7], 3.5), entry("good", [7, 7], 3.4)) == "good"
    assert chosen(entry(DIAL, [7, 7], 3.4), good, entry("other", [6, 6], 3.4)) == DIAL  # it was compared in two


def test_the_budget_that_would_do_does():
    bench = likes("SelfExtend(12, 252)")
    bench.recall = lambda candidate: 1.0
    nothing = decide(run(bench, 60).entries)
    assert nothing.chosen is None and "found 8 of 8 in 1 document: one document" in nothing.sentences[0]
    budget = seconds_of(re.search(r"--budget (\w+) or more", nothing.sentences[0])[1])
    assert budget > 60 and decide(run(bench.again(), budget).entries).chosen is not None


def test_what_is_kept_for_the_losses_is_what_they_take():
    """Reading alone is not all of it: a loss also needs its candidate attached, and logits."""
    bench = likes("SelfExtend(12, 252)")
    bench.losses = lambda candidate: 10.0
    for budget in (60, 100, 200):
        found = run(bench.again(), budget)
        assert all(entry.loss is not None for entry in found.entries if entry.candidate.label in ("SelfExtend(12, 252)", DIAL)), budget


def test_plain_attention_is_read_before_the_best_read_much_more():
    bench = likes("SelfExtend(12, 252)")
    found = run(bench, 1200)
    assert found.plan.rungs[-1].documents > CONTROL_DOCUMENTS
    assert bench.asked.index((PLAIN, CONTROL_DOCUMENTS - 1)) < bench.asked.index(("SelfExtend(12, 252)", CONTROL_DOCUMENTS))
    poor = entry("poor", [1, 1, 1, 1], 3.5)
    for count, says in (
        (1, "found 1 of 8 in 1 document: too few to tell whether anything here beats it"),
        (3, "nothing here is shown to beat plain attention"),
    ):
        plain = entry(PLAIN, [1] * count, method=Stock(), control=True)
        assert any(says in s for s in decide([poor, plain]).sentences), count


def test_too_small_a_budget_costs_one_document():
    bench = likes("ReRoPE(512)")
    with pytest.raises(ValueError, match=r"two candidates.*need about 50 s"):
        run(bench, 20)
    assert bench.asked == [("SelfExtend(12, 252)", 0)]


def test_progress_counts_readings_and_the_time_left():
    steps = []
    bench = likes("SelfExtend(12, 252)")
    found = run(bench, 200, progress=steps.append)
    assert steps[0].what == "SelfExtend(12, 252) reads document 1" and steps[0].seconds_left is None
    assert [s.done for s in steps] == sorted(s.done for s in steps) and all(s.done <= s.total for s in steps)
    assert steps[1].seconds_left == pytest.approx(min(200 - 10, found.plan.seconds * (1 - 1 / found.plan.readings)))
    assert (steps[-1].what, steps[-1].seconds_left, steps[-1].done) == ("done", 0.0, len(bench.asked))


# -- the choice ------------------------------------------------------------------------------------------------------------------------


def entry(label: str, found: list[int], nats: float | None = None, method=None, control=False) -> Entry:
    """`found`: keys of eight, for every document; the first ones, so that who finds more finds the same and more."""
    answers = [Answers(tuple(float(n < count) for n in range(KEYS)), 1.0, 1.0) for count in found]
    loss = None if nats is None else Loss(nats, nats, nats, (nats,), 1.0)
    return Entry(Candidate(label, method or SelfExtend(4, 64), "", control), answers, loss)


def chosen(*entries: Entry, price: float = 0.25, **more) -> str:
    found = decide(entries, price, **more).chosen
    assert found is not None
    return found.candidate.label


def test_recall_at_a_price():
    rule, good, dear = entry(DIAL, [1, 1, 2, 2], 3.45), entry("good", [8, 8, 7, 8], 3.63), entry("dear", [8, 8, 8, 8], 3.75)
    assert chosen(rule, good, dear) == "good"
    assert chosen(rule, good, dear, price=0.1) == DIAL
    assert chosen(rule, good, dear, price=0.3) == "good"  # dear is not told apart from it and costs more
    words = " | ".join(decide([rule, good, dear]).sentences)
    assert "good is chosen: it found 31 of 32 in 4 documents" in words and "0.180 above the lowest, of the dial's rule" in words
    assert "dear found 32 of 32 in 4 documents, but its loss is 0.300 above the lowest, more than the price of 0.25; --price 0.31 admits it" in words
    assert "is beaten: it found 6 of 32 in 4 documents: worse, p = " in words


def test_what_cannot_be_told_apart_is_chosen_by_loss_and_then_by_simplicity():
    a, b = entry("a", [8, 7, 8, 7], 3.60), entry("b", [7, 8, 7, 7], 3.50)
    assert chosen(a, b) == "b"
    assert "a found 30 of 32 in 4 documents: not to be told apart with 4 documents (p = 1); loss 3.600" in decide([a, b]).sentences
    far = entry("far", [6, 6, 6, 6], 3.40)  # 19 points below the best: not told apart is not the same as alike
    assert chosen(a, b, far) == "b"
    simple = entry("simple", [8, 7, 8, 7], 3.605, ReRoPE(300))
    assert chosen(a, simple) == "simple"
    assert chosen(entry("few", [8], 3.3), entry("many", [8, 7, 8, 8], 3.5), entry("other", [8, 5, 6, 6], 3.5)) == "many"  # more documents are better evidence


def test_what_is_alike_is_said_once():
    good, others = entry("good", [8, 8], 3.5), [entry(label, [1], 3.5) for label in ("a", "b", "c")]
    words = decide([good, *others, entry("d", [2], 3.5)]).sentences
    alike = [s for s in words if "found 1 of 8 in 1 document" in s]
    assert len(alike) == 1 and alike[0].startswith("a, b and c each found 1 of 8 in 1 document: not to be told apart with 1 document (p = 0.5); loss 3.500")
    assert [s for s in words if s.startswith("d found 2 of 8")]


def test_a_table_in_a_file_is_not_folded():
    rows = [outcome.row(entry(label, [8], 3.5), False) for label in ("LogisticSelfExtend as recommended", "InfiniteHiP as recommended")]
    said = StringIO()
    nothing = SimpleNamespace(decision=decide([entry("a", [8])]), search=SimpleNamespace(entries=[]), bench=SimpleNamespace(notes=[]))
    show(Console(file=said, width=80), nothing, {"candidates": rows, "ceiling": [], "tasks": ["passkeys"]})  # type: ignore[arg-type]
    line = next(line for line in said.getvalue().splitlines() if "LogisticSelfExtend as recommended" in line)
    assert line.split()[-2:] == ["3.500", "1"] and "8 of 8" in line
    assert max(map(len, said.getvalue().splitlines()[:4])) < 130


def test_whether_the_dials_rule_is_beaten():
    good = entry("good", [8, 8, 8, 8], 3.5)
    assert decide([good, entry(DIAL, [1, 1, 1, 1], 3.5)]).beaten is True
    assert decide([good, entry(DIAL, [1], 3.6)]).beaten is False  # one document shows nothing
    assert decide([good, entry(DIAL, [8, 8, 8, 8], 3.4)]).beaten is False
    assert decide([good]).beaten is None and "not known whether it is beaten" in decide([good]).sentences[1]


def test_the_best_of_many_must_beat_the_dials_rule_by_more():
    good, rule = entry("good", [8, 8, 8, 8], 3.5), entry(DIAL, [4, 5, 4, 5], 3.5)
    p = paired(rule, good).p
    enough = math.ceil(SURE / p)
    assert 2 * p < SURE and enough > 2
    others = [entry(f"other {n}", [0], 3.5) for n in range(enough - 2)]
    few, many = decide([good, rule, *others[:-1]]), decide([good, rule, *others])
    assert few.beaten is True and many.beaten is False
    assert any(f"is not shown to be beaten: it found 18 of 32 in 4 documents: not to be told apart with 4 documents (p = {enough * p:.2g}, against the best of "
               f"{enough})" in s for s in many.sentences)  # fmt: skip
    plain = entry(PLAIN, [0], method=Stock(), control=True)
    assert decide([good, rule, *others[:-1], plain]).beaten is True  # a control is not one of those that it was the best of
    assert any(s.startswith("other 0") and "found 0 of 8 in 1 document: not to be told apart with 1 document (p = 0.25)" in s for s in many.sentences)


def test_without_a_loss_beside_others_that_have_one_nothing_is_chosen():
    good, unknown, less = entry("good", [6, 6], 3.5), entry("unknown", [8, 8]), entry("less", [1, 1])
    words = decide([good, unknown, less]).sentences
    assert chosen(good, unknown, less) == "good"
    unmeasured = "; its loss was not measured, so it cannot be chosen"
    assert any(s.startswith("unknown found 16") and s.endswith(f"{unmeasured}: a larger --budget measures it") for s in words)
    assert any(s.startswith("less found 2") and s.endswith(unmeasured) for s in words)  # more time goes elsewhere
    cheap = entry(DIAL, [0, 0], 3.0)
    assert chosen(cheap, good, unknown) == DIAL and "more than the price of 0.25" in " ".join(decide([cheap, good, unknown]).sentences)


def test_plain_attention_is_nothing_to_choose_between():
    plain = entry(PLAIN, [1], method=Stock(), control=True)
    alone = decide([entry("a", [8], 3.5), plain, entry("b", [])])
    assert alone.chosen is None and alone.sentences[0].startswith("only a was measured, it found 8 of 8 in 1 document")
    assert chosen(entry("a", [8], 3.5), plain) == "a"  # nothing else was proposed
    said = StringIO()
    found = SimpleNamespace(decision=alone, search=SimpleNamespace(entries=[]), bench=SimpleNamespace(notes=[]))
    show(Console(file=said, width=300), found, {"candidates": [], "ceiling": [], "tasks": ["passkeys"]})  # type: ignore[arg-type]
    assert said.getvalue().splitlines()[-1].startswith("no profile was written: only a was measured, it found 8 of 8 in 1 document: there is nothing to choose")


def test_what_a_number_alone_does_not_say():
    plain = entry(PLAIN, [1, 1, 1, 1], method=Stock(), control=True)
    good = entry("good", [8, 8, 8, 8], 3.5)
    assert not any("plain attention beyond its window" in s for s in decide([good, plain]).sentences[2:])
    better = entry(PLAIN, [8, 8, 8, 8], method=Stock(), control=True)
    poor = entry("poor", [1, 1, 1, 1], 3.5)
    assert chosen(poor, better) == "poor"  # a control cannot be chosen
    assert any("finds more than the choice" in s and "--trained-window" in s for s in decide([poor, better]).sentences)
    assert any("nothing here is shown to beat plain attention" in s for s in decide([poor, plain]).sentences)
    few, low = clusters.share([[1.0, 1.0, 0, 0, 0, 0, 0, 0]]), clusters.share([[1.0, 0, 0, 0, 0, 0, 0, 0]] * 8)
    assert few.high > 0.5 > low.high
    assert not any("ceiling" in s for s in decide([good], ceiling=few).sentences)  # a choice that finds more refutes it
    assert any(
        "the ceiling may be low: inside its window the model itself finds 2 of 8" in s and "do not tell" in s for s in decide([poor], ceiling=few).sentences
    )
    assert any("the ceiling is low: inside its window the model itself finds 8 of 64" in s for s in decide([poor], ceiling=low).sentences)
    assert not any("ceiling" in s for s in decide([good], ceiling=clusters.share([[1.0] * 8])).sentences)
    assert any("no candidate found anything" in s for s in decide([entry("blind", [0, 0], 3.4)]).sentences)


def test_without_losses_all_count_and_without_answers_nothing_does():
    assert chosen(entry("a", [8, 8]), entry("b", [2, 2])) == "a"
    assert "its loss was not measured" in decide([entry("a", [8]), entry("b", [2])]).sentences[0]
    assert decide([entry("a", [])]).chosen is None
    refused = entry("a", [8, 8], 3.4)
    refused.reason = "too little memory"
    assert decide([refused]).chosen is None


# -- the profile -----------------------------------------------------------------------------------------------------------------------


def test_what_lies_in_the_cache_does_not_block_a_tune(tmp_path):
    bench = SimpleNamespace(place=SimpleNamespace(model="mine"), fingerprint="a" * 64, window=WINDOW)
    path = default_path(bench.fingerprint)
    path.parent.mkdir(parents=True, exist_ok=True)
    empty = Profile("mine", bench.fingerprint, WINDOW.tokens)
    other = Profile("other", "b" * 64, WINDOW.tokens, (Tuned(CONTEXT, ReRoPE(512), "found"),))
    try:
        assert outcome.before(bench, None) == (empty, None)
        for write, says in ((lambda: path.write_text("{junk"), "it is no JSON"), (lambda: other.write(path), "is the profile of other weights (other)")):
            write()
            profile, remark = outcome.before(bench, None)
            assert profile == empty and says in remark and remark.endswith("; it will be replaced") and "--out" not in remark
            with pytest.raises(ValueError):  # a file that somebody named is theirs
                outcome.before(bench, path)
        path.unlink()
        path.mkdir()
        with pytest.raises(ValueError, match="is a folder; name a file with --out"):  # before anything is measured, not after it
            outcome.before(bench, None)
        path.rmdir()
    finally:
        path.unlink(missing_ok=True)


def test_the_entry_that_gives_way_is_named(tmp_path):
    asked = {"tasks": ["passkeys"], "price": 0.25}
    reason = "ReRoPE(512) is chosen: it found 76 of 80 in 16 documents (95 %, 88 to 98); loss 4.036; the dial's rule is beaten"
    entry = Tuned(CONTEXT, ReRoPE(512), reason, {**asked, "date": "2026-05-04"})
    said = outcome.replaced(entry, asked, tmp_path / "p.json")
    assert said == (
        f"{tmp_path / 'p.json'} has an entry for 12288 tokens of 2026-05-04, for passkeys: ReRoPE(512) is chosen: it found 76 of 80 in 16 documents "
        "(95 %, 88 to 98). A new choice replaces it; --out FILE keeps both"
    )
    other = outcome.replaced(entry, {"tasks": ["ruler-vt"], "price": 0.05}, tmp_path / "p.json")
    assert 'tuned with other settings (price: 0.25 there, 0.05 now; tasks: ["passkeys"] there, ["ruler-vt"] now)' in other
    hostile = Tuned(CONTEXT, ReRoPE(512), reason, {"tasks": "\x1b[2J" * 1000})
    said = outcome.replaced(hostile, asked, tmp_path / "p.json")
    assert said.isprintable() and len(said) < 1000


def test_an_entry_says_nothing_that_is_not_true_of_shorter_contexts():
    """ "A profile changes nothing at this length" stood in the reason of every context that the entry serves, and was false there."""
    bench = SimpleNamespace(
        model=SimpleNamespace(device=torch.device("cpu")), fingerprint="a" * 64, window=WINDOW, inside={}, notes=[], proposal=SimpleNamespace(left_out=()),
        asked=SimpleNamespace(context=CONTEXT, tasks=(), seed=0, chat="auto"),
        place=SimpleNamespace(model="mine", path=Path("work"), settings={"text": None, "dtype": "float32", "device": "cpu"}),
    )  # fmt: skip
    rule, good = entry(DIAL, [8, 8], 3.4), entry("good", [1, 1], 3.5)
    for entries, says in (((rule, good), False), ((good, entry(DIAL, [1, 1], 3.9)), True)):
        found = outcome.Outcome(bench, halving.Search(entries, (), NOTHING_NEW, 1.0), decide(entries), 60.0, 0.25)  # type: ignore[arg-type]
        tuned = found.entry()
        assert "is chosen: it found" in tuned.reason and "a profile changes nothing" not in tuned.reason
        assert ("the dial's rule" in tuned.reason.split("; ", 1)[1]) == says
        assert tuned.evidence["dial"] == SelfExtend(4, 64).to_json() and tuned.dial == SelfExtend(4, 64)
    assert "the dial's rule is the choice: a profile changes nothing at this length" in decide([rule, good]).sentences


def test_commands_to_copy_state_the_window_and_quote_the_model():
    assert use("my models/a", 900, None, None) == """longreach run --model 'my models/a' --context 900 --file FILE --prompt "...\""""
    assert use("nano", 900, Path("p.json"), 400).startswith("longreach run --model nano --context 900 --trained-window 400 --profile p.json --file")
    row = {"length": 900, "method": Stock().to_json(), "found": 1, "keys": 5, "low": 0, "high": 1, "seconds": 1}
    said = StringIO()
    seen = {"model": "my models/[a]", "trained_window": 400, "recall": {"here": row, "inside": row}}
    check_recall.show(Console(file=said, width=200), seen, 400)
    assert "longreach tune --model 'my models/[a]' --context 900 --trained-window 400 measures" in said.getvalue()
    check_recall.show(Console(file=said, width=200), {**seen, "model": "nano"}, None)
    assert "longreach tune --model nano --context 900 measures" in said.getvalue()
    said.truncate(0)
    check_recall.show(Console(file=said, width=200), {**seen, "trained_window": 900}, None)
    assert said.getvalue().endswith("a look, not a measurement\n")  # what tune would refuse is not advised
