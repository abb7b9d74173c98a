"""The scheduler: whoever is served beside whom, a job gets the tokens that it gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch

import longreach
from families import build, tokens
from longreach import InfiniteHiP, InfLLM, LMInfinite, SelfExtend, Stock
from longreach.hf.flat import Flat
from longreach.memory.budgets import Tiered
from longreach.running.generation import Sampling
from longreach.running.together import Pool, Request
from longreach.serving import room
from longreach.serving.jobs import Event, Job, Stats
from longreach.serving.scheduler import Scheduler

NEW = 6


def ids(count: int, seed: int) -> list[int]:
    return tokens(1, count, seed=seed)[0].tolist()


def model_of(family: str = "llama") -> Any:
    return build(family, eos_token_id=None)


def alone(extension: Any, jobs: Iterable[Job]) -> list[list[int]]:
    """One after the other, nothing shared."""
    found = []
    for job in jobs:
        pool = Pool(extension, at_once=1, sampling=job.sampling)
        pool.add([request := Request([*job.ids], job.max_new_tokens, job.sampling.seed)])
        while pool.busy:
            found += [done[request].ids for done in [pool.step().done] if request in done]
    return found


def run(scheduler: Scheduler, jobs: Iterable[Job] = (), each: Callable[[int, list[Event]], None] = lambda step, events: None) -> dict[Job, list[Event]]:
    """Until nothing is left to do. Every job tells what it reads in order, and ends once."""
    for job in jobs:
        scheduler.add(job)
    found: dict[Job, list[Event]] = {}
    for step in range(100_000):
        if not scheduler.busy:
            break
        events = scheduler.step()
        for event in events:
            before = found.setdefault(event.job, [])
            assert not before or (before[-1].finish is None and before[-1].read <= event.read and before[-1].cached == event.cached)
            before.append(event)
        each(step, events)
    assert not scheduler.busy
    return found


def new(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


ALL = [Stock(), SelfExtend(3, 8), LMInfinite(9, 3), InfLLM.small(8), InfiniteHiP.small(8)]
OTHERS = [(family, method) for family in ("qwen3", "gemma2") for method in ALL]


@pytest.mark.parametrize(
    ("family", "method"),
    [*(("llama", method) for method in ALL), *(pytest.param(*other, marks=[pytest.mark.slow] if other[1] in ALL[3:] else []) for other in OTHERS)],
    ids=lambda given: str(given),
)
def test_32_jobs_get_what_each_gets_alone(family, method):
    """Of mixed lengths, some with a common beginning, that come and are cancelled at any time, in small forwards."""
    draw = random.Random(7)
    shared = [ids(300, 1), ids(150, 2)]
    jobs = []
    for n in range(32):
        begin = shared[n % 3] if n % 3 < 2 else []
        jobs.append(Job(begin + ids(draw.choice((1, 5, 40, 90, 200)), 10 + n), draw.randint(1, NEW), shared=len(begin)))
    jobs[9] = replace(jobs[9], ids=[*jobs[3].ids])  # the same prompt once more
    with longreach.extend(model_of(family), method) as extension:
        want = alone(extension, jobs)
        scheduler = Scheduler(extension, at_once=6, chunk_size=90, clock=lambda: 0.0)
        waiting, cancelled = [*zip(jobs, want, strict=True)], set()

        def each(step: int, events: list[Event]) -> None:
            for job, _ in waiting[:2]:
                scheduler.add(job)
            del waiting[:2]
            if step % 5 == 0 and (running := [event.job for event in events if event.finish is None]):
                scheduler.cancel(gone := draw.choice(running))
                cancelled.add(gone)

        scheduler.add(waiting.pop(0)[0])
        found = run(scheduler, each=each)
        assert not waiting and 3 < len(cancelled) < 20
        for job, tokens_alone in zip(jobs, want, strict=True):
            got = new(found.get(job, []))
            assert got == tokens_alone[: len(got)], jobs.index(job)
            assert (found[job][-1].finish == "length" and got == tokens_alone) or job in cancelled
        stats = scheduler.stats()
        assert (stats.running, stats.waiting, stats.failed) == (0, 0, 0)
        assert stats.hits > 3 and stats.cached >= stats.hits * 64
        assert stats.decoded == sum(len(new(events)) for events in found.values())


def test_the_memory_returns_to_where_it_was():
    with longreach.extend(model_of(), SelfExtend(3, 8)) as extension:
        scheduler = Scheduler(extension, prefixes=0)
        jobs = [Job(ids(n, n), NEW) for n in (700, 3, 90)]
        found = run(scheduler, jobs)
        assert all(events[0].cached == 0 for events in found.values())
        assert scheduler.stats() == Stats(0, 0, 0, None, read=793, decoded=18)
        scheduler.add(late := Job(ids(50, 5), NEW))
        scheduler.step()
        assert scheduler.stats().held > 0
        scheduler.cancel(late)
        scheduler.cancel(late)
        assert (scheduler.busy, scheduler.stats().held) == (False, 0)


@pytest.mark.parametrize("when", ["waiting", "reading", "decoding", "over"])
def test_a_job_can_be_cancelled_at_any_time(when):
    with longreach.extend(model_of(), Stock()) as extension:
        other, job = Job(ids(40, 1), 12), Job(ids(300, 2), 3)
        (want,) = alone(extension, [other])
        scheduler = Scheduler(extension, at_once=1 if when == "waiting" else 2, chunk_size=100, clock=lambda: 0.0)
        seen, ended = list[Event](), list[int]()

        def each(step: int, events: list[Event]) -> None:
            seen.extend(event for event in events if event.job is job)
            state = "waiting" if not seen else "over" if seen[-1].finish else "decoding" if seen[-1].token is not None else "reading"
            if state == when:
                scheduler.cancel(job)
                ended.append(len(seen))

        found = run(scheduler, [other, job], each)
        assert new(found[other]) == want
        assert len(seen) == ended[0]  # nothing came after it
        assert {"waiting": not seen, "reading": not new(seen), "decoding": len(new(seen)) == 1, "over": len(new(seen)) == 3}[when]


def test_sampling_depends_on_the_seed_alone():
    with longreach.extend(model_of(), SelfExtend(3, 8)) as extension:
        hot = [Job(ids(80 + 30 * n, n), 8, Sampling(1.3, 0.9, seed=n)) for n in range(4)]
        want = alone(extension, hot)
        others = [Job(ids(90, 70 + n), 5, Sampling(0.7, None, 3)) for n in range(5)]
        found = run(Scheduler(extension, chunk_size=50), [*others[:2], *hot, *others[2:]])
        assert [new(found[job]) for job in hot] == want
        again = run(Scheduler(extension), [Job(job.ids, 8, replace(job.sampling, seed=9)) for job in hot])
        assert [new(events) for events in again.values()] != want


def test_log_probabilities_are_those_of_the_model():
    with longreach.extend(model_of(), SelfExtend(3, 8)) as extension:
        job = Job(ids(60, 4), 4, Sampling(2.0, None, 1), logprobs=3)
        found = run(Scheduler(extension), [job, replace(job, logprobs=0), replace(job, logprobs=None)])
        events, own, none = found.values()
        for event in events[-4:]:
            with torch.no_grad():
                before = [*job.ids, *new(events)[: events[-4:].index(event)]]
                scores = extension.model(input_ids=torch.tensor([before])).logits[0, -1].log_softmax(-1)
            assert event.logprob == pytest.approx(float(scores[event.token]), abs=1e-4)
            assert [token for token, _ in event.best] == scores.topk(3).indices.tolist()
            assert [value for _, value in event.best] == pytest.approx(scores.topk(3).values.tolist(), abs=1e-4)
        assert new(events) == new(own) == new(none)
        assert own[-1].logprob == pytest.approx(events[-1].logprob) and own[-1].best == () and none[-1].logprob is None


def test_jobs_end_as_they_say():
    with longreach.extend(model_of(), Stock()) as extension:
        prompt = ids(50, 3)
        (want,) = alone(extension, [Job(prompt, 8)])
        first = want.index(want[4])
        found = run(Scheduler(extension), [Job(prompt, 8, ends=[want[4]]), Job(prompt, 8, stop=lambda new: len(new) == 2), Job(prompt, 8, ends=())])
        assert [(new(events), events[-1].finish) for events in found.values()] == [(want[: first + 1], "stop"), (want[:2], "stop"), (want, "length")]
        extension.model.generation_config.eos_token_id = want[4]
        try:
            assert [new(events) for events in run(Scheduler(extension), [Job(prompt, 8)]).values()] == [want[: first + 1]]
        finally:
            extension.model.generation_config.eos_token_id = None


def test_a_question_to_the_caller_that_fails_ends_that_job():
    with longreach.extend(model_of(), Stock()) as extension:
        good, bad = Job(ids(20, 1), 3), Job(ids(20, 2), 3, stop=lambda new: 1 / 0 > 0)
        found = run(Scheduler(extension), [good, bad])
        assert new(found[good]) == alone(extension, [good])[0]
        assert (found[bad][-1].finish, found[bad][-1].problem) == ("error", "ZeroDivisionError: division by zero")


def test_what_cannot_be_kept_is_let_go(monkeypatch):
    with longreach.extend(model_of(), Stock()) as extension:
        job = Job(ids(200, 1), 3)
        (want,) = alone(extension, [job])

        def short(*given: Any) -> None:
            raise MemoryError

        monkeypatch.setattr(Flat, "take", short)
        scheduler = Scheduler(extension)
        assert new(run(scheduler, [job])[job]) == want
        assert (scheduler.stats().held, scheduler.stats().prefixes) == (0, 0)


def test_the_usual_budget_is_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda device: 1000)
    with longreach.extend(model_of(), Stock()) as extension:
        assert room.usual_budget(extension) == 500
    with longreach.extend(model_of(), Stock(), memory=Tiered(device="8MiB")) as extension:
        assert room.usual_budget(extension) is None


def test_what_cannot_be_is_refused():
    with longreach.extend(model_of(), SelfExtend(3, 8), context=100) as extension:
        scheduler = Scheduler(extension, budget=50_000)
        for job, says in (
            (Job([], 3), "at least one token"),
            (Job([1], 0), "max_new_tokens must be at least 1, not 0"),
            (Job([1, 96], 3), "a token that is none of the 96 of the model"),
            (Job([1, -1], 3), "a token that is none of the 96"),
            (Job([1] * 99, 2), r"99 tokens, and with 2 new ones it exceeds the declared context of 100; shorten it, or extend\(model, context=101\)"),
            (Job([1], 3, logprobs=97), "logprobs=97"),
            (Job([1], 3, shared=2), "shared=2"),
            (Job([1], 3, document="book"), "there is no document 'book'"),
            (Job([1] * 90, 3), r"92 tokens take .*KiB of keys and values, and all jobs together have 48.83KiB; .* serve with a budget of"),
        ):
            with pytest.raises(ValueError, match=says):
                scheduler.add(job)
        assert not scheduler.busy
        for arguments, says in (
            ({"at_once": 0}, "at_once must be at least 1"),
            ({"reserve": 2}, "reserve is a share"),
            ({"reserve": 0.5}, "pass moved=, a folder that is there"),
        ):
            with pytest.raises(ValueError, match=says):
                Scheduler(extension, **arguments)
        extension.model.generation_config.no_repeat_ngram_size = 2
        try:
            with pytest.raises(ValueError, match="no_repeat_ngram_size=2, which is not honoured here"):
                Scheduler(extension).add(Job([1], 3))
        finally:
            extension.model.generation_config.no_repeat_ngram_size = None
    with longreach.extend(model_of(), Stock(), memory=Tiered(device="8MiB")) as extension, pytest.raises(ValueError, match="tiers have budgets of their own"):
        Scheduler(extension, budget=10)


@pytest.mark.parametrize("method", [Stock(), LMInfinite(9, 3), InfLLM.small(8)], ids=str)
def test_a_forward_that_fails_ends_those_for_which_it_fails_alone(method, monkeypatch):
    """One job is poison for the forward that reads its end."""
    real = Flat.read
    with longreach.extend(model_of(), method) as extension:
        jobs = [Job(ids(70 + n, n), NEW) for n in range(4)]
        want = alone(extension, jobs)
        bad, count = jobs[2], 0

        def read(self: Flat, new: dict[int, list[int]], *more: Any) -> Any:
            nonlocal count
            if any(len(chunk) > 4 and chunk == bad.ids[-len(chunk) :] for chunk in new.values()):
                count += 1
                raise RuntimeError("out of memory")
            return real(self, new, *more)

        scheduler = Scheduler(extension, clock=lambda: 0.0)
        monkeypatch.setattr(Flat, "read", read)
        found = run(scheduler, jobs)
        for job, alone_tokens in zip(jobs, want, strict=True):
            last = found[job][-1]
            if job is bad:
                assert (last.finish, last.token, last.problem) == ("error", None, "RuntimeError: out of memory")
            else:
                assert new(found[job]) == alone_tokens and last.finish == "length"
        assert scheduler.stats().failed == count == 2


def test_a_model_that_gives_nan_ends_that_job(monkeypatch):
    real = Flat.read
    with longreach.extend(model_of(), Stock()) as extension:
        good, bad, hot = Job(ids(20, 1), 3), Job([5, 5, 5], 3), Job([6, 6, 6], 3, Sampling(1.0))
        (want,) = alone(extension, [good])

        def read(self: Flat, new: dict[int, list[int]], *more: Any) -> Any:
            found = real(self, new, *more)
            return {name: logits * float("nan") if new[name] in ([5, 5, 5], [6, 6, 6]) else logits for name, logits in found.items()}

        monkeypatch.setattr(Flat, "read", read)
        found = run(Scheduler(extension), [good, bad, hot])
        assert new(found[good]) == want
        for job in (bad, hot):
            assert found[job][-1].finish == "error" and "the model gives NaN or infinity for the next token" in found[job][-1].problem
