"""The computation allocation model finds known numbers again, gives the paper's values, chooses within a budget, and reads only what is a record."""

from __future__ import annotations

import itertools
import json
import math
from random import Random

import numpy as np
import pytest

from longreach.apps.rag import AllocationModel, Demonstration, Run, Step
from longreach.apps.rag.allocation import Facts, Linear, Sigmoid, found_best
from longreach.apps.rag.records import read_demonstrations, read_runs, write_runs

A, B, C = (0.325, 0.101, 0.177), (-0.067, -0.008), -0.730  # of the paper, for Gemini 1.5 Flash
GRID = list(itertools.product((0, 1, 2, 5, 10, 20), (0, 1, 2, 4), (1, 2, 3)))


def cost(theta: tuple[int, int, int]) -> int:
    k, m, n = theta
    return 20 + 30 * k * (m + 1) * n + 15 * m


def made(link: Sigmoid | Linear, noise: float = 0.0) -> list[Run]:
    """Runs of three tasks whose standardised scores are those of the model with A, B, C; the gains that go in are those that come out."""
    runs = []
    for task, gains in (("one", (0.9, 0.1)), ("two", (0.2, 0.5)), ("three", (1.4, -0.3))):
        rng = Random(task)
        facts = Facts(0.0, 1.0, *gains)
        for _ in range(40):  # i is read off the scores that it makes: a fixed point
            scores = {theta: link(AllocationModel(A, B, C, link, {}).linear(theta, facts)) for theta in GRID}
            deviation = float(np.std(list(scores.values())))
            new = [(scores[one] - scores[0, 0, 1]) / deviation for one in ((1, 0, 1), (0, 1, 1))]
            facts = Facts(0.0, 1.0, (facts.i_doc + new[0]) / 2, (facts.i_shot + new[1]) / 2)
        runs += [Run(task, *theta, score + rng.gauss(0, noise), cost(theta)) for theta, score in scores.items()]
    return runs


def test_the_values_of_the_paper():
    model = AllocationModel(A, B, C, Sigmoid(), {})
    for theta, linear, score in (((50, 2, 1), 0.5610, 0.6709), ((100, 8, 5), 1.1995, 0.9641)):
        found = model.linear(theta, Facts(0.0, 1.0, 0.2, 0.05))
        assert found == pytest.approx(linear, abs=5e-5) and model.link(found) == pytest.approx(score, abs=5e-5)


def test_known_numbers_are_found_again():
    rng, link = np.random.default_rng(0), Linear()
    facts = {task: Facts(0.0, 1.0, *gains) for task, gains in (("one", (0.9, 0.1)), ("two", (0.2, 0.5)), ("three", (1.4, -0.3)))}
    truth = AllocationModel(A, B, C, link, facts)
    rows = [(task, theta) for task in facts for theta in GRID]
    x = np.array([[*(logs := [math.log(v + 0.01) for v in theta]), facts[t].i_doc * logs[0], facts[t].i_shot * logs[1], 1] for t, theta in rows])
    y = x @ np.array([*A, *B, C])
    assert np.allclose(y, [truth.linear(theta, facts[task]) for task, theta in rows])  # the dense truth of the predictor
    assert np.allclose(np.linalg.lstsq(x, y + rng.normal(0, 1e-9, len(y)), rcond=None)[0], [*A, *B, C], atol=1e-6)


@pytest.mark.parametrize("link", [Linear(), Sigmoid(-1.0, 2.0)])
def test_scores_of_such_a_model_are_predicted(link):
    """Standardising moves and scales each task by numbers of its own, so a and c come back as their multiples; predictions have to be right all the same."""
    runs = made(Linear())
    one = [run for run in runs if run.task == "one"]
    model = AllocationModel.fit(one, Linear())
    assert model.r2 == pytest.approx(1.0, abs=1e-9) and model.mse < 1e-9
    assert all(model.predict("one", run.theta) == pytest.approx(run.score, abs=1e-6) for run in one)
    held = [run for run in one if run.theta not in ((0, 0, 1), (1, 0, 1), (0, 1, 1))][::5]
    rest = AllocationModel.fit([run for run in one if run not in held], Linear())
    assert all(rest.predict("one", run.theta) == pytest.approx(run.score, abs=1e-6) for run in held)
    bent = [Run(run.task, *run.theta, link(run.score), run.tokens) for run in made(Linear(), 0.05)]
    assert all(AllocationModel.fit(bent, None, standard).r2 > 0.9 and AllocationModel.fit(bent, standard=standard).r2 > 0.8 for standard in (True, False))


def test_the_sigmoid_turns_back_and_holds_what_it_is_put_around():
    link = Sigmoid()
    assert all(link.inverse(link(x)) == pytest.approx(x) for x in (-2.0, -0.46, 0.0, 1.2))
    assert link.inverse(9.0) == link.inverse(link.low + (1 - link.edge) * link.height) < math.inf and link(-1e9) == link.low
    around = Sigmoid.around([-1.5, 0.0, 2.5])
    assert around.inverse(2.5) == pytest.approx(around.inverse(9.0)) and around(around.inverse(-1.5)) == pytest.approx(-1.5)


def test_a_larger_budget_never_chooses_a_lower_prediction_and_never_overspends():
    runs = made(Linear(), 0.2)
    model = AllocationModel.fit(runs)
    before = -math.inf
    for budget in (20, 60, 200, 700, 2000, 10_000):
        best, found = model.best("one", runs[: len(GRID)], budget), found_best(runs[: len(GRID)], budget)
        assert max(best.tokens, found.tokens) <= budget and found.score >= best.score
        assert model.predict("one", best.theta) >= before
        before = model.predict("one", best.theta)
    with pytest.raises(ValueError, match="no recorded run fits into a budget of 19 tokens, and the cheapest has 20"):
        model.best("one", runs, 19)


@pytest.mark.parametrize(
    ("runs", "says"),
    [
        ([], "there are no runs to fit"),
        ([Run("t", 0, 0, 1, 0.5, 9), Run("t", 1, 0, 1, 0.7, 9)], r"lack \(k, m, n\) = \(0, 1, 1\)"),
        ([Run("t", *theta, 0.5, 9) for theta in ((0, 0, 1), (1, 0, 1), (0, 1, 1))], "all runs of 't' have the score 0.5"),
    ],
)
def test_what_cannot_be_fitted_is_refused(runs, says):
    with pytest.raises(ValueError, match=says):
        AllocationModel.fit(runs)
    with pytest.raises(ValueError, match="no run of the task 'other' was fitted; choose one of one, three, two"):
        AllocationModel.fit(made(Linear())).predict("other", (1, 1, 1))


def test_runs_come_back_from_their_file_and_the_last_of_two_counts(tmp_path):
    runs = made(Linear())[:5]
    write_runs(tmp_path / "runs.jsonl", [*runs, Run("one", *runs[0].theta, 0.123, 7)])
    found = read_runs(tmp_path / "runs.jsonl")
    assert found[1:] == runs[1:] and found[0].score == 0.123 and len(found) == 5


RUN = {"task": "t", "k": 1, "m": 0, "n": 1, "score": 0.5, "tokens": 10}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 of .* does not belong into a file of recorded runs"),
        ("[1]", "it is no object"),
        (json.dumps({**RUN, "n": 0}), "n must be a whole number from 1"),
        (json.dumps({**RUN, "k": True}), "k must be"),
        (json.dumps({**RUN, "score": math.nan}), "score must be a number from .*, not nan"),
        (json.dumps({**RUN, "score": 1e308}), "score must be a number from .*, not 1e"),  # its square has no place in a float
        (json.dumps({**RUN, "tokens": 10**30}), "tokens must be"),
        (json.dumps({**RUN, "task": ""}), "task must be a name"),
        (json.dumps({**RUN, "evil": 1}), "a run has no evil"),
        (json.dumps({"task": "t"}), "does not belong"),
        ("[" * 100_000, "does not belong"),
        ('{"k": ' + "9" * 5000 + "}", "does not belong"),
    ],
)
def test_a_line_that_is_no_run_is_named(tmp_path, line, says):
    (tmp_path / "r.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=says):
        read_runs(tmp_path / "r.jsonl")


def test_demonstrations_are_read_and_what_is_none_is_named(tmp_path):
    file = tmp_path / "d.jsonl"
    steps = '[["S?", "s"], {"question": "T?", "answer": "t"}]'
    file.write_text('{"question": " Q? ", "answer": "a", "lead": "It is", "steps": ' + steps + '}\n\n{"question": "R?", "answer": "r"}')
    assert read_demonstrations(file) == (Demonstration("Q?", "a", (Step("S?", "s"), Step("T?", "t")), "It is"), Demonstration("R?", "r"))
    for line, says in (
        ("", "has no demonstrations"),
        ('{"question": "Q?"}', "it must have texts"),
        ('{"question": "Q?", "answer": " "}', "is empty"),
        ('{"question": "Q?", "answer": "a", "steps": [["one"]]}', "pairs of texts"),
        ('{"question": "Q?", "answer": "a", "steps": [["o", "b\\nc"]]}', "a step must be one line"),
        ('{"question": "Q?", "answer": "a", "steps": 5}', "does not belong"),
        ('{"question": "Q?", "answer": "a", "steps": ["ab"]}', "pairs of texts"),
        ('{"question": "Q\\ud800?", "answer": "a"}', "it must have texts of Unicode"),
        ('{"question": "Q?", "answer": "a", "more": 5}', "a demonstration has no more"),
    ):
        file.write_text(line)
        with pytest.raises(ValueError, match=says):
            read_demonstrations(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        read_demonstrations(file)
    with pytest.raises(ValueError, match="there is no file of demonstrations"):
        read_demonstrations(tmp_path)
