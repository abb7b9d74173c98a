"""What was read is kept for those that begin with it, documents have names, and nobody takes more memory than there is."""

from __future__ import annotations

import bisect
import json
import math
import random
from typing import Any

import pytest

import longreach
from families import tokens
from longreach import Combined, InfLLM, LMInfinite, SelfExtend, Stock, YaRN
from longreach.hf.flat import Flat
from longreach.memory.budgets import Tiered
from longreach.running.prefix import common
from longreach.running.sampling import Sampling
from longreach.serving.jobs import Job
from longreach.serving.scheduler import PASSES, Scheduler
from test_scheduler import NEW, alone, ids, model_of, new, run

CUT = InfLLM.small(8)  # prompts are cut at multiples of 8
METHODS = [Stock(), SelfExtend(3, 8), LMInfinite(9, 3), CUT]


def test_a_common_beginning_is_found():
    long = [*range(5000)]
    for n in (0, 1, 1023, 1024, 1025, 2048, 4999):
        assert common(long, [*long[:n], -1, *long[n + 1 :]]) == common([*long[:n], -1], long) == n
    assert common(long, long) == 5000 and common([], long) == 0 and common(long, long[:1030]) == 1030


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_chat_goes_on_from_its_last_turn(method):
    """Every turn is the last one, its answer and a question. What was read of a prompt only counts where the end of one belongs to it."""
    with longreach.extend(model_of(), method) as extension:
        scheduler, turn, cached = Scheduler(extension), ids(200, 1), []
        for n in range(4):
            job = Job(turn, NEW)
            (want,) = alone(extension, [job])
            events = run(scheduler, [job])[job]
            assert new(events) == want
            cached.append((events[0].cached, len(turn)))
            turn = turn + want + ids(30, 50 + n)
        if method.cut == 1:
            assert cached == [(0, 200), (205, 236), (241, 272), (277, 308)]
            assert scheduler.stats().prefixes == 1  # it grows, and is held once
        else:
            assert [(c % method.cut, 0 < length - c <= 36 + 2 * method.cut) for c, length in cached[1:]] == [(0, True)] * 3
        assert (scheduler.stats().hits, scheduler.stats().cached) == (3, sum(c for c, _ in cached))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_many_questions_about_one_text_read_it_once(method):
    """They come one after the other: without a word about what they share, the first two read it where the method forgets."""
    with longreach.extend(model_of(), method) as extension:
        text = ids(600, 1)
        jobs = [Job(text + ids(20 + n, 30 + n), NEW) for n in range(4)]
        long = [Job(job.ids + ids(200, n), NEW) for n, job in enumerate(jobs)]  # too far behind the text to go back to it
        for asked in (jobs, long):
            want = alone(extension, asked)
            for shared in (0, 600):
                scheduler = Scheduler(extension)
                found = [run(scheduler, [again])[again] for again in (Job(job.ids, NEW, shared=shared) for job in asked)]
                assert [new(events) for events in found] == want
                cached = [events[0].cached for events in found]
                forgot = asked is long and not shared and method != Stock()
                whole = 592 if method == CUT and asked is long and shared else 600  # what goes on has at least one token, so that 8 are left to be the end
                assert cached == [0, 0 if forgot else whole, whole, whole], (asked is long, shared)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_questions_that_come_together_read_their_text_once(method):
    with longreach.extend(model_of(), method) as extension:
        text = ids(600, 1)
        jobs = [Job(text + ids(20 + n, 30 + n), NEW) for n in range(5)]
        jobs += [Job(jobs[0].ids, NEW, Sampling(1.0, None, n)) for n in range(3)]
        want = alone(extension, jobs)
        scheduler = Scheduler(extension, chunk_size=100)
        found = run(scheduler, jobs)
        assert [new(found[job]) for job in jobs] == want
        whole = 600 if method.cut == 1 else 600 // method.cut * method.cut
        assert found[jobs[0]][0].cached == 0 and all(found[job][0].cached >= whole for job in jobs[1:])
        assert scheduler.stats().read == sum(len(job.ids) for job in jobs) - scheduler.stats().cached


def test_many_forks_hold_a_text_once():
    with longreach.extend(model_of(), Stock()) as extension:
        text = ids(8000, 1)
        scheduler = Scheduler(extension)
        run(scheduler, [Job(text, 1)])
        before, most = scheduler.stats().held, 0

        def each(step: int, events: Any) -> None:
            nonlocal most
            most = max(most, scheduler.stats().held)

        run(scheduler, [Job(text + [n], 5) for n in range(16)], each)
        assert scheduler.stats().cached == 16 * 8000 and most < before * 1.25


def test_a_method_that_allows_no_cut_shares_nothing():
    method = Combined(YaRN(2.0), InfLLM(n_local=9, n_init=3, block_size=4, topk=2, repr_topk=2, exc_block_size=8)) if InfLLM.cut is None else None
    whole = next((m for m in ([method] if method else []) + _uncut() if m.cut is None), None)
    if whole is None:
        pytest.skip("no method of that kind")
    with longreach.extend(model_of(), whole) as extension:
        scheduler, text = Scheduler(extension), ids(200, 1)
        jobs = [Job(text + [n], 3, shared=200) for n in range(2)]
        want = alone(extension, jobs)
        assert [new(run(scheduler, [job])[job]) for job in jobs] == want
        assert scheduler.stats().hits == scheduler.stats().prefixes == 0
        with pytest.raises(ValueError, match="reads a prompt whole, so that no document is read once"):
            scheduler.hold("book", text)


def _uncut() -> list[Any]:
    from methods_matrix import METHODS as EVERY

    return [method for method in EVERY if method.eviction is None and method.cut is None]


def test_the_oldest_prefixes_go_first():
    with longreach.extend(model_of(), Stock()) as extension:
        texts = [ids(300, n) for n in range(4)]
        scheduler = Scheduler(extension, prefixes=2)
        for n in (0, 1, 0, 2):
            run(scheduler, [Job(texts[n] + [n], 1)])
        assert scheduler.stats().prefixes == 2
        cached = [next(iter(run(scheduler, [Job(texts[n] + [n], 1)]).values()))[0].cached for n in (0, 2, 1)]
        assert cached == [300, 300, 0]


@pytest.mark.parametrize("method", [Stock(), SelfExtend(3, 8), LMInfinite(9, 3)], ids=str)
def test_jobs_wait_until_there_is_room(method):
    """Within a budget of about three jobs: never more is held, nobody is pre-empted, all are served in their order, and prefixes make room."""
    with longreach.extend(model_of(), method) as extension:
        jobs = [Job(ids(400 + 40 * n, n), NEW) for n in range(9)]
        want = alone(extension, jobs)
        budget = 3 * Scheduler(extension).room.flat.need_alone(800).nbytes
        scheduler, most, together, order = Scheduler(extension, budget=budget, chunk_size=150), 0, 0, []

        def each(step: int, events: Any) -> None:
            nonlocal most, together
            stats = scheduler.stats()
            most, together = max(most, stats.held), max(together, stats.running)
            order.extend(event.job for event in events if event.job not in order)

        found = run(scheduler, jobs, each)
        assert [new(found[job]) for job in jobs] == want and order == jobs
        assert most <= budget and 2 <= together <= 6 and scheduler.stats().preempted == 0
        assert scheduler.stats().prefixes >= 1


def test_a_few_small_jobs_pass_a_large_one_that_waits_for_room():
    """While a first one decodes, there is no room for the large one. Small ones come for ever: so many of them begin before it, and no more."""
    with longreach.extend(model_of(), Stock()) as extension:
        first, large = Job(ids(300, 1), 60), Job(ids(1000, 2), NEW)
        (want,) = alone(extension, [large])
        budget = int(1.15 * Scheduler(extension).room.flat.need_alone(1000 + NEW).nbytes)
        scheduler, began = Scheduler(extension, budget=budget, prefixes=0, clock=lambda: 0.0), list[Job]()

        def each(step: int, events: Any) -> None:
            began.extend(event.job for event in events if event.job not in began)
            while step < 150 and scheduler.stats().waiting < 4:
                scheduler.add(Job(ids(50, 10 + step), 2))

        found = run(scheduler, [first, large], each)
        assert (began[0], began.index(large)) == (first, 1 + PASSES) and len(began) > 30
        assert new(found[large]) == want and all(events[-1].finish == "length" for events in found.values())


@pytest.mark.parametrize("memory", [None, Tiered(device="1MiB", block=16)], ids=["budget", "tiers"])
def test_nothing_is_forgotten_for_a_job_that_finds_no_room(memory):
    """A long one waits until another one that is answered has gone. What was kept before is there at that time, or goes when that makes room."""
    with longreach.extend(model_of(), Stock(), memory=memory) as extension:
        flat = extension.flat()
        fits = [n for n in range(500, 4000, 20) if flat.has_room(flat.need_alone(n))] if memory else [2000]
        most = fits[-1]
        budget = None if memory else flat.need_alone(most).nbytes
        large = Job(ids(most * 3 // 4, 3), 2)
        (want,) = alone(extension, [large])
        scheduler = Scheduler(extension, budget=budget, clock=lambda: 0.0)
        text = ids(most // 8, 1)
        run(scheduler, [Job(text, 1)])
        scheduler.add(Job(ids(most // 3, 2), most // 6))
        for _ in range(20):
            scheduler.step()
        scheduler.add(large)
        for _ in range(20):
            scheduler.step()
        assert (scheduler.stats().waiting, scheduler.stats().prefixes) == (1, 1)
        again = Job([*text, 5], 1)
        found = run(scheduler, [again])
        assert found[again][0].cached == len(text) and new(found[large]) == want
        if memory is None:
            assert scheduler.stats().held <= budget


BUDGETS = (1.0, 1.1, 1.5)  # over what the largest needs
MORE = (1.02, 1.25, 2.0)


@pytest.mark.parametrize("reserve", [1, 0])
@pytest.mark.parametrize("budgets", [BUDGETS, pytest.param(MORE, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("method", [*METHODS[:3], InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=64)], ids=str)
def test_a_job_that_has_room_alone_is_answered_whatever_is_kept(method, budgets, reserve, tmp_path):
    """One after the other, they go on from what others have read, or not, within a budget that is little more than the largest needs. What they would go on
    from makes room too, also where it is a document on disk."""
    with longreach.extend(model_of(), method) as extension:
        flat = extension.flat()
        for n, times in enumerate(budgets):
            draw, largest = random.Random(n), 1500
            budget = math.ceil(times * flat.need_alone(largest + NEW - 1).nbytes)
            scheduler, texts = Scheduler(extension, budget=budget, reserve=reserve, moved=tmp_path), [ids(600, n)]
            scheduler.hold("book", texts[0], tmp_path / "book")
            run(scheduler)
            for number in range(6):
                before = draw.choice(texts)
                text = before[: draw.choice((0, len(before), len(before) - draw.randint(0, 100)))]
                text = text + ids(largest if number == 2 else draw.choice((1, 100, 500, 1000)), 10 * n + number)
                texts.append(text := text[:largest])
                job = Job(text[600:], NEW, document="book") if text[:600] == texts[0] and len(text) > 600 else Job(text, NEW)
                events = run(scheduler, [job])[job]
                assert events[-1].finish == "length", (times, number, events[-1].problem)
                assert scheduler.stats().held <= budget, (times, number)
                if number == 4:
                    assert new(events) == alone(extension, [Job(text, NEW)])[0]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_who_came_last_is_moved_out_and_goes_on_later(method, tmp_path):
    """Room is reserved for no new tokens. The answers are long: jobs are moved out and come back, and are not read again."""
    with longreach.extend(model_of(), method) as extension:
        jobs = [Job(ids(300 + 20 * n, n), 120, Sampling(1.0, None, n) if n % 2 else Sampling()) for n in range(3)]
        want = alone(extension, jobs)
        budget = 2 * Scheduler(extension).room.flat.need_alone(400).nbytes
        scheduler, most = Scheduler(extension, budget=budget, reserve=0, moved=tmp_path, prefixes=0), 0

        def each(step: int, events: Any) -> None:
            nonlocal most
            most = max(most, scheduler.stats().held)

        found = run(scheduler, jobs, each)
        assert [new(found[job]) for job in jobs] == want and most <= budget
        stats = scheduler.stats()
        assert (stats.preempted > 0) == (method != LMInfinite(9, 3)) and stats.read == sum(len(job.ids) for job in jobs)
        assert [*tmp_path.iterdir()] == [] and stats.held == 0


def test_a_job_that_is_moved_out_can_be_cancelled(tmp_path):
    with longreach.extend(model_of(), Stock()) as extension:
        budget = 2 * Scheduler(extension).room.flat.need_alone(500).nbytes
        scheduler = Scheduler(extension, budget=budget, reserve=0, moved=tmp_path, prefixes=0)
        jobs = [Job(ids(400, n), 300) for n in range(2)]
        for job in jobs:
            scheduler.add(job)
        while not scheduler.stats().preempted:
            scheduler.step()
        assert len([*tmp_path.iterdir()]) == 1
        scheduler.cancel(jobs[1])
        assert [*tmp_path.iterdir()] == []
        assert {event.job for events in run(scheduler).values() for event in events} == {jobs[0]}


def test_a_disk_that_fails_ends_the_job_that_was_to_move(tmp_path, monkeypatch):
    with longreach.extend(model_of(), Stock()) as extension:
        budget = 2 * Scheduler(extension).room.flat.need_alone(500).nbytes
        scheduler = Scheduler(extension, budget=budget, reserve=0, moved=tmp_path, prefixes=0)
        jobs = [Job(ids(400, n), 300) for n in range(2)]
        want = alone(extension, jobs)

        def full(*given: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(Flat, "save", full)
        found = run(scheduler, jobs)
        assert new(found[jobs[0]]) == want[0]
        assert (found[jobs[1]][-1].finish, found[jobs[1]][-1].problem) == ("error", "OSError: no space left")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("folder", [False, True])
def test_a_document_is_read_once_and_asked_by_its_name(method, folder, tmp_path):
    with longreach.extend(model_of(), method) as extension:
        text = ids(607, 1)
        jobs = [Job(ids(n, 30 + n), NEW, document="book") for n in (1, 9, 300)]
        want = alone(extension, [Job(text + [*job.ids], NEW) for job in jobs])
        scheduler = Scheduler(extension, chunk_size=150)
        other = Job(ids(40, 9), 4)
        reading = scheduler.hold("book", text, tmp_path / "book" if folder else None)
        found = run(scheduler, [other])
        assert [event.read for event in found[reading]][-1] == (whole := method.apart(608)) and found[reading][-1].finish == "held"
        assert len(found[reading]) > 3 and new(found[other]) == alone(extension, [other])[0]
        assert scheduler.documents == dict(scheduler.stats().documents) == {"book": 607}
        found = run(scheduler, jobs)
        assert [new(found[job]) for job in jobs] == want
        assert [found[job][0].cached for job in jobs] == [whole] * 3
        if folder:
            later = Scheduler(extension)
            later.load("novel", tmp_path / "book")
            asked = [Job(job.ids, NEW, document="novel") for job in jobs]
            found = run(later, asked)
            assert [new(found[job]) for job in asked] == want and found[asked[0]][0].cached == whole
        scheduler.release("book")
        with pytest.raises(ValueError, match="there is no document 'book'"):
            scheduler.release("book")
        assert scheduler.documents == {}


def test_a_document_leaves_the_memory_and_comes_back(tmp_path):
    with longreach.extend(model_of(), Stock()) as extension:
        text, held = ids(900, 1), Job(ids(20, 2), NEW, document="book")
        want, other = alone(extension, [Job(text + [*held.ids], NEW), Job(ids(1000, 3), NEW)])
        budget = int(1.3 * Scheduler(extension).room.flat.need_alone(1100).nbytes)
        for folder in (tmp_path / "book", None):
            scheduler = Scheduler(extension, budget=budget)
            scheduler.hold("book", text, folder)
            run(scheduler)
            job = Job(ids(1000, 3), NEW)
            events = run(scheduler, [job])[job]
            if folder is None:
                assert (events[-1].finish, events[-1].refused) == ("error", True)
                assert events[-1].problem.startswith("documents leave no room for this job; release one")
            else:
                assert new(events) == other and scheduler.room.prefixes.documents["book"].prefix is None
            events = run(scheduler, [held])[held]
            assert new(events) == want and events[0].cached == 900
            assert scheduler.stats().held <= budget


def test_a_document_is_replaced_when_the_new_one_is_there(tmp_path):
    with longreach.extend(model_of(), Stock()) as extension:
        scheduler = Scheduler(extension)
        scheduler.hold("book", ids(100, 1), tmp_path / "book")
        run(scheduler)
        scheduler.cancel(scheduler.hold("book", ids(300, 2), tmp_path / "book"))
        assert scheduler.documents == {"book": 100}
        scheduler.hold("book", ids(200, 2), tmp_path / "book")
        run(scheduler)
        assert scheduler.documents == {"book": 200}
        job = Job([5], NEW, document="book")
        assert new(run(scheduler, [job])[job]) == alone(extension, [Job([*ids(200, 2), 5], NEW)])[0]


def test_documents_of_others_are_loaded_or_refused(tmp_path):
    from transformers import DynamicCache

    text = tokens(1, 300, seed=1)
    for method in (SelfExtend(3, 8), CUT):
        with longreach.extend(model_of(), method) as extension:
            cache = DynamicCache()
            extension.model(input_ids=text, past_key_values=cache)
            extension.save(cache, folder := tmp_path / method.name, text)
            scheduler = Scheduler(extension)
            if method.cut != 1:
                with pytest.raises(ValueError, match="does not say how its end is to be read with a question"):
                    scheduler.load("book", folder)
                continue
            scheduler.load("book", folder)
            job = Job([5, 6], NEW, document="book")
            assert new(run(scheduler, [job])[job]) == alone(extension, [Job([*text[0].tolist(), 5, 6], NEW)])[0]
    with longreach.extend(model_of(), SelfExtend(4, 8)) as extension, pytest.raises(ValueError, match="was read with"):
        Scheduler(extension).load("book", tmp_path / "selfextend")


def test_a_short_document_is_read_with_every_question():
    with longreach.extend(model_of(), CUT) as extension:
        scheduler = Scheduler(extension)
        reading = scheduler.hold("note", [1, 2, 3])
        assert run(scheduler)[reading][-1].finish == "held" and scheduler.documents == {"note": 3}
        job = Job([4, 5], NEW, document="note")
        assert new(run(scheduler, [job])[job]) == alone(extension, [Job([1, 2, 3, 4, 5], NEW)])[0]


@pytest.mark.parametrize("method", [Stock(), SelfExtend(3, 8)], ids=str)
def test_over_tiers_jobs_wait_for_their_room(method):
    with longreach.extend(model_of(), method, memory=Tiered(device="1MiB", host="1MiB", block=16)) as extension:
        jobs = [Job(ids(500 + 50 * n, n), NEW) for n in range(6)]
        jobs.append(Job(jobs[5].ids + [3, 4], NEW))
        want = alone(extension, jobs)
        scheduler = Scheduler(extension, prefixes=4)
        found = run(scheduler, jobs)
        assert [new(found[job]) for job in jobs] == want and found[jobs[-1]][0].cached >= 750
        del found, scheduler


@pytest.mark.parametrize("tiers", [{"host": "1MiB"}, {"disk": "1MiB"}, {}], ids=["host", "disk", "device"])
@pytest.mark.parametrize("method", [Stock(), InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=64)], ids=str)
def test_what_never_has_room_in_tiers_is_refused_at_once(method, tiers, tmp_path):
    """The longest that is taken is answered, and one block more is refused, whoever waits."""
    if "disk" in tiers:
        tiers = {"disk": f"{tmp_path}:{tiers['disk']}"}
    with longreach.extend(model_of(), method, memory=Tiered(device="1MiB", block=16, **tiers)) as extension:
        scheduler = Scheduler(extension, prefixes=0)
        scheduler.add(waiting := Job(ids(100, 1), NEW))

        def takes(n: int) -> bool:
            try:
                scheduler.add(job := Job([1] * n, 2))
            except ValueError as error:
                assert "tokens never have room" in str(error) and "; shorten the prompt, ask for fewer new tokens, or serve with larger tiers" in str(error)
                return False
            scheduler.cancel(job)
            return True

        most = bisect.bisect(range(200_000), False, key=lambda n: not takes(n + 1))
        assert 500 < most < 10_000
        found = run(scheduler, [last := Job(ids(most, 5), 2)])
        assert len(new(found[last])) == 2 and len(new(found[waiting])) == NEW
        with pytest.raises(ValueError, match="never have room"):
            scheduler.hold("book", ids(most + 600, 5))


def test_notes_of_a_document_are_looked_at(tmp_path):
    with longreach.extend(model_of(), CUT) as extension:
        flat = extension.flat()
        flat.read({(own := flat.join()): ids(64, 1)})
        for n, rest in enumerate((None, "x", "[1.5]", "[96]", "[-1]", json.dumps({"a": 1}), "[true]")):
            flat.save(flat.take(own), tmp_path / str(n), ids(64, 1), {} if rest is None else {"rest": rest})
            with pytest.raises(ValueError, match="hold the document again"):
                Scheduler(extension).load("book", tmp_path / str(n))
