"""How much of a prompt a forward reads: learnt from the seconds that forwards took, on a clock of the test."""

from __future__ import annotations

import random

import pytest

import longreach
from families import build, tokens
from longreach import InfLLM, LMInfinite, Stock
from longreach.hf.flat import Flat
from longreach.serving.jobs import Job
from longreach.serving.pace import FIRST, LEAST, Pace
from longreach.serving.scheduler import READERS, Scheduler


def test_nothing_is_known_at_first():
    pace = Pace(0.5)
    assert (pace.rate(0), pace.tokens(0, 0.5), pace.tokens(10_000, 0.5)) == (None, FIRST, FIRST)
    pace.learn(0.064, [(0, 32)], 0)
    assert pace.rate(16) == pytest.approx(0.002) and pace.rate(16 + 256) == pytest.approx(0.004)
    assert pace.tokens(0, 0.5) == 130  # 250 would go to a depth of 250, where a token may cost nearly twice as much


def test_deeper_tokens_are_taken_to_cost_as_much_more_as_they_are_deeper():
    pace = Pace(0.5)
    pace.learn(0.1, [(0, 100)], 0)
    assert pace.rate(50 + 256) == pytest.approx(0.002) and pace.rate(50 + 1024) == pytest.approx(0.005)
    pace.learn(0.1, [(1024, 100)], 0)  # a bounded method: no more than at the beginning
    assert pace.rate(400) == pace.rate(1024) == pace.rate(9000) == pytest.approx(0.001)
    deep = Pace(0.5)
    deep.learn(0.4, [(4096, 100)], 0)
    assert deep.rate(0) == pytest.approx(0.004)  # from above, where nothing below is known


def test_what_a_token_costs_lies_on_a_line():
    pace = Pace(0.5)
    pace.learn(0.1, [(0, 100)], 0)
    pace.learn(0.3, [(900, 100)], 0)  # 0.001 at 50, 0.003 at 950
    assert pace.rate(500) == pytest.approx(0.002) and pace.rate(1850) == pytest.approx(0.005) and pace.cost(850, 200) == pytest.approx(0.6)
    pace.learn(0.34, [(960, 100)], 0)  # 0.0034 at 1010: in the same band, which has the mean of both
    assert pace.rate(980) == pytest.approx(0.0032) and pace.rate(980 + 930) == pytest.approx(0.0054)
    pace.learn(3.0, [(2048, 100)], 0)  # steeper than attention can be: it is taken for noise
    assert pace.rate(2 * 2098) == pytest.approx(0.06)


COSTS = {
    "deeper": lambda depth: 1e-3 + depth * 1e-6,
    "attention alone": lambda depth: 2e-4 + depth * 2e-6,
    "bounded": lambda depth: 1e-3 + min(depth, 2000) * 1e-6,
    "the same": lambda depth: 2e-3,
}


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("cost", COSTS)
def test_a_chunk_is_chosen_for_the_depth_that_it_is_read_at(cost, noise):
    """A prompt of 16000 tokens is read in steps of half a second."""
    draw, pace, depth, steps = random.Random(1), Pace(0.5), 0, list[float]()
    while depth < 16_000:
        tokens = min(max(LEAST, pace.tokens(depth, pace.left)), 16_000 - depth)
        steps.append(sum(map(COSTS[cost], range(depth, depth + tokens))) * draw.uniform(1 - noise, 1 + noise))
        pace.learn(steps[-1], [(depth, tokens)], 0)
        depth += tokens
    assert max(steps) <= 0.5 * (1.03 + 2 * noise) and sum(steps[1:-1]) / len(steps[1:-1]) > 0.5 * 0.94


def test_what_decoding_takes_is_not_left_for_reading():
    pace = Pace(0.5)
    pace.learn(0.2, [], 8)
    assert pace.left == pytest.approx(0.3)
    pace.learn(0.4, [(0, 100)], 8)  # 0.2 of these were the decoded tokens
    assert pace.rate(0) == pytest.approx(0.002)
    pace.learn(0.3, [(0, 100)], 0)  # the mean of what was known and what was measured
    assert pace.rate(0) == pytest.approx(0.0025)
    pace.learn(1.2, [], 8)
    assert pace.left == 0.0  # it takes 0.7 by then


def test_a_forward_of_several_depths_teaches_all_of_them():
    pace = Pace(0.5)
    pace.learn(0.1, [(0, 100)], 0)
    pace.learn(0.4, [(1024, 100)], 0)
    pace.learn(1.0, [(0, 100), (1024, 100)], 0)  # twice what was expected
    assert (pace.rate(50), pace.rate(1074)) == (pytest.approx(0.0015), pytest.approx(0.006))


class Machine:
    """Forwards that take `seconds(depth)` for every token that is read, and nothing else does."""

    def __init__(self, monkeypatch, seconds) -> None:
        self.now, self.forwards, real = 0.0, [], Flat.read

        def read(flat, new, *more):
            before = self.now
            self.now += sum(seconds(flat.length(name) + n) for name, chunk in new.items() for n in range(len(chunk)))
            self.forwards.append((self.now - before, {name: len(chunk) for name, chunk in new.items()}))
            return real(flat, new, *more)

        monkeypatch.setattr(Flat, "read", read)


@pytest.mark.parametrize("method", [Stock(), LMInfinite(9, 3)], ids=["deeper", "bounded"])
def test_a_forward_takes_no_longer_than_asked(method, monkeypatch):
    seconds = (lambda depth: 1e-3 + depth * 1e-6) if method == Stock() else lambda depth: 1e-3
    with longreach.extend(build("llama", eos_token_id=None), method) as extension:
        scheduler = Scheduler(extension, step_ms=200, clock=lambda: machine.now)
        machine = Machine(monkeypatch, seconds)
        scheduler.add(Job(tokens(1, 9)[0].tolist(), 30))
        scheduler.step()
        scheduler.add(Job(tokens(1, 4000)[0].tolist(), 3))
        while scheduler.busy:
            scheduler.step()
        reading = [(took, max(chunks.values())) for took, chunks in machine.forwards if max(chunks.values()) > 1]
        assert max(took for took, _ in reading) <= 0.204
        full = reading[3:-1]
        assert sum(took for took, _ in full) / len(full) > 0.17  # and most of it is used
        if method == Stock():
            assert full[-1][1] < 0.3 * max(count for _, count in reading)  # it shrinks with the depth: a token at 4000 costs five times as much as one at 0


def test_a_slow_machine_reads_on(monkeypatch):
    with longreach.extend(build("llama", eos_token_id=None), Stock()) as extension:
        scheduler = Scheduler(extension, step_ms=100, clock=lambda: machine.now)
        machine = Machine(monkeypatch, lambda depth: 1.0)
        scheduler.add(Job(tokens(1, 200)[0].tolist(), 1))
        while scheduler.busy:
            scheduler.step()
        assert [max(chunks.values()) for _, chunks in machine.forwards] == [FIRST, *[LEAST] * 10, 8]


def test_a_long_prompt_starves_nobody_and_is_not_starved(monkeypatch):
    """A long one is being read; short ones come all the time. Each of these begins its answer soon, and the long one ends while they still come."""
    with longreach.extend(build("llama", eos_token_id=None), Stock()) as extension:
        scheduler = Scheduler(extension, step_ms=200, clock=lambda: machine.now, prefixes=0)
        machine = Machine(monkeypatch, lambda depth: 1e-3)
        scheduler.add(long := Job(tokens(1, 3000)[0].tolist(), 2))
        came, first, ended = {}, {}, None
        for step in range(60):
            if step % 2 == 0:
                scheduler.add(short := Job(tokens(1, 60, seed=step)[0].tolist(), 2))
                came[short] = step
            for event in scheduler.step():
                if event.token is not None and event.job not in first:
                    first[event.job] = step
                if event.job is long and event.finish:
                    ended = step
        assert max(first[job] - step for job, step in came.items() if step < 56) <= 1
        assert ended is not None and ended < 30


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("slow", [False, True], ids=["fast", "slow"])
@pytest.mark.parametrize("method", [Stock(), InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=64)], ids=["cut at 1", "cut at 64"])
def test_every_job_ends_in_bounded_time_whatever_comes_after_it(method, slow, seed, monkeypatch):
    """Shorter prompts than the long one come as fast as they are served, at random. Whoever is first reads, and comes to be first again after all who have a
    place: as many forwards as there are places for every turn that a prompt takes."""
    at_once, chunk_size, length, draw = 6, 256, 900, random.Random(seed)
    turn = max(method.cut, LEAST) if slow else max(method.cut, chunk_size // READERS)
    with longreach.extend(build("llama", eos_token_id=None), method) as extension:
        scheduler = Scheduler(extension, step_ms=100, clock=lambda: machine.now, prefixes=0, at_once=at_once, chunk_size=chunk_size)
        machine = Machine(monkeypatch, lambda depth: 1.0 if slow else 1e-6)
        real = scheduler._counts

        def counts():
            first = next((row for row in scheduler.room.places if not row.decodes), None)
            found = real()
            assert first is None or found[first] >= min(first.end - first.read, method.cut)
            return found

        monkeypatch.setattr(scheduler, "_counts", counts)
        scheduler.add(long := Job(tokens(1, length)[0].tolist(), 1))
        number, steps, ended = 0, 0, False
        while not ended:
            while scheduler.stats().waiting < 3:
                number += 1
                scheduler.add(Job(tokens(1, draw.choice((40, 63, 65, 130, 256, 300, 600)), seed=number)[0].tolist(), draw.randint(1, 3)))
            ended = any(event.job is long and event.finish for event in scheduler.step())
            steps += 1
            assert steps <= -(-length // turn) * at_once
