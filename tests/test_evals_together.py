"""Samples that are read together: the answers of each alone, honest seconds, as many as fit, and no silent way back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import longreach
from families import build
from longreach import LMInfinite, SelfExtend, Stock, YaRN
from longreach.cli import main
from longreach.evals.harness import estimates
from longreach.evals.harness.costs import Rate, Speed, Work, causal
from longreach.evals.harness.engine import Reply
from longreach.evals.harness.items import Item
from longreach.evals.harness.model_engine import attached
from longreach.evals.harness.results import Folder
from longreach.evals.harness.together import several
from longreach.evals.samples import budget
from longreach.evals.samples.base import Parts, Sample
from longreach.evals.samples.budget import Prompt
from longreach.hf.flat import Flat
from longreach.planning import dial
from longreach.running.loading import shipped_book


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any]:
    return longreach.load("nano")


BOOK = shipped_book()


def prompts(tokenizer: Any) -> list[Prompt]:
    """Three questions about a document, a prompt without one, two questions about another document; answers of several lengths, one with a stop string."""

    def sample(at: int, question: str, new: int, stop: tuple[str, ...] = ()) -> Sample:
        query = f"\n\n{question} " if question else ""
        return Sample(f"{at}{question}", Parts(BOOK[at : at + 900], query, "Read.\n", ""), ("7",), new, stop=stop)

    asked = [(100_000, "Who?", 6), (100_000, "Where was it, and why?", 1), (100_000, "When?", 9), (200_000, "", 5), (300_000, "How?", 12), (300_000, "Who?", 4)]
    found = [budget.encode(tokenizer, sample(*each)) for each in asked]
    return [*found, replace(found[4], sample=replace(found[4].sample, max_new_tokens=40, stop=("\n", " the", ".")))]


@pytest.mark.parametrize("method", [SelfExtend(8, 32), LMInfinite(64, 4), LMInfinite(64, 4, top_k=2), YaRN(4.0)], ids=str)
def test_the_answers_are_those_of_each_alone(nano, method):
    model, tokenizer = nano
    asked = prompts(tokenizer)
    with attached(model, tokenizer, method, 1024) as engine:
        want = [engine.answer(prompt) for prompt in asked]
        assert want[-1].finish == "stop" and want[-1].tokens < 40
        for size in (1, 2, 16):
            engine.several = several(engine.extension, size, 1024, 40)
            assert (engine.several.size, engine.several.reason) == (size, "as asked")
            started = time.perf_counter()
            found: dict[int, Any] = dict(engine.answers(asked))
            seconds = time.perf_counter() - started
            assert sorted(found) == list(range(len(asked)))
            for n, reply in enumerate(want):
                assert (found[n].text, found[n].tokens, found[n].finish) == (reply.text, reply.tokens, reply.finish), (size, n)
                assert found[n].prefill_seconds > 0 and (found[n].decode_seconds > 0 or found[n].tokens == 1)
            spent = sum(reply.prefill_seconds + reply.decode_seconds for reply in found.values())
            assert 0.3 * seconds < spent <= seconds  # every second once
            if size > 1:
                shared = [prompt.shared if method.cut == 1 else 0 for prompt in asked]
                assert [found[n].reused for n in range(7)] == [0, shared[1], shared[2], 0, 0, shared[5], shared[6]]
                assert 1 < max(reply.together for reply in found.values()) <= size
        assert not engine.failures


def test_as_many_as_fit(nano, monkeypatch):
    model, tokenizer = nano
    with attached(model, tokenizer, SelfExtend(16, 32), 4096) as engine:
        monkeypatch.setattr(dial, "free_memory", lambda device: 2**40)
        many = several(engine.extension, None, 4096, 16)
        assert many.size == 16 and "4096 tokens takes" in many.reason
        sizes = []
        for free in (2**28, 2**27, 2**26, 2**24):
            monkeypatch.setattr(dial, "free_memory", lambda device, free=free: free)
            sizes.append(several(engine.extension, None, 4096, 16).size)
        assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 1 < sizes[1] < 16
        assert several(engine.extension, None, 512, 16).size == 1  # what the forward itself needs is not there
        assert several(engine.extension, 5, 4096, 16).size == 5
        monkeypatch.setattr(dial, "free_memory", lambda device: None)
        unknown = several(engine.extension, None, 4096, 16)
        assert unknown.size == 1 and "--batch-size N" in unknown.reason
        with pytest.raises(ValueError, match="at least one sample, not 0"):
            several(engine.extension, 0, 4096, 16)
    assert several(None, None, 512, 16).reason == "the stock model has no flat forwards"


def test_what_fits_is_what_is_taken(nano, monkeypatch):
    """The bytes that are counted for a sample are at least those that the requests really take."""
    model, tokenizer = nano
    with attached(model, tokenizer, SelfExtend(8, 32), 2048) as engine:
        taken: list[float] = []
        real = Flat.read
        monkeypatch.setattr(Flat, "read", lambda self, new, *more: (real(self, new, *more), taken.append(self.nbytes))[0])
        ids = budget.encode(tokenizer, Sample("s", Parts(BOOK[:9000]), ("7",), 8)).ids[:2000]
        longreach.generate(engine.extension, [ids[n:] for n in range(0, 400, 100)], 8, at_once=4)
        free = 4 * max(taken)  # half of it is what the four took
        monkeypatch.setattr(dial, "free_memory", lambda device: int(free))
        assert 1 <= several(engine.extension, None, 2008, 8).size <= 4


def test_a_model_that_reads_one_by_one_says_why(nano):
    with longreach.extend(build("llama4"), Stock()) as extension:
        for asked in (None, 8):
            found = several(extension, asked, 64, 4)
            assert found.size == 1 and "scales queries by the slots of the cache" in found.reason
    model, _ = nano
    with longreach.extend(model, Stock()) as extension:
        model.generation_config.no_repeat_ngram_size = 3
        try:
            found = several(extension, 4, 64, 4)
        finally:
            model.generation_config.no_repeat_ngram_size = None
        assert found.size == 1 and "no_repeat_ngram_size=3" in found.reason


def test_a_forward_that_fails_costs_no_answer(nano, monkeypatch):
    """Whoever was in it is asked alone, fewer are read together afterwards, and both are said."""
    model, tokenizer = nano
    asked = [replace(prompt, sample=replace(prompt.sample, stop=())) for prompt in prompts(tokenizer)]
    with attached(model, tokenizer, SelfExtend(8, 32), 1024) as engine:
        want = [engine.answer(prompt).text for prompt in asked]
        engine.several = several(engine.extension, 4, 1024, 40)
        real, calls = Flat.read, 0

        def read(self: Flat, new: Any, *more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise RuntimeError("not enough memory: you tried to allocate")
            return real(self, new, *more)

        monkeypatch.setattr(Flat, "read", read)
        found: dict[int, Any] = dict(engine.answers(asked))
        assert [found[n].text for n in range(len(asked))] == want
        alone = sum(reply.together == 1 for reply in found.values())
        assert len(engine.failures) == 1 and engine.failures[0].endswith("read one by one, after RuntimeError: not enough memory: you tried to allocate")
        assert int(engine.failures[0].split()[0]) <= alone < len(asked) and max(reply.together for reply in found.values()) == 2


def test_one_bad_prompt_is_the_only_one_to_fail(nano):
    model, tokenizer = nano
    with attached(model, tokenizer, YaRN(4.0), 1024) as engine:
        engine.several = several(engine.extension, 4, 1024, 40)
        asked = prompts(tokenizer)
        long = replace(asked[3], ids=asked[3].ids * 9)
        found = dict(engine.answers([*asked[:3], long, *asked[4:]]))
        assert [n for n, reply in found.items() if isinstance(reply, Exception)] == [3] and "declared context of 1024" in str(found[3])


def test_a_run_goes_on_whatever_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The records are the same for every size, but for clocks; the run says how it read, and can go on with another size."""
    unsteady = ("t_prefill", "tok_per_s", "peak_mem", "together")

    def run(name: str, *more: Any, samples: int = 2) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
        asked = ["passkeys", "niah", "--lengths", "300,700", "--depths", "0,0.5,1", "--samples", samples, "--method", "selfextend", "--group-size", 4]
        assert main([*map(str, ["eval", "run", *asked, "--window", 64, "--out", tmp_path / name, *more]), "--json"]) == 0
        said = capsys.readouterr()
        records = [{k: v for k, v in asdict(r).items() if k not in unsteady} for r in Folder(tmp_path / name).records()]
        return json.loads(said.out), said.err, records

    one, said, want = run("one", "--batch-size", 1)
    assert "samples are read one by one" in said and one["together"] == {"batch_size": 1, "reason": "as asked", "failures": []}
    several_, said, found = run("several")
    assert "samples are read together (a sample of" in said and several_["together"]["batch_size"] == 16 and found == want
    assert json.loads((tmp_path / "several" / "run.json").read_text())["together"] == several_["together"]
    assert max(r.together for r in Folder(tmp_path / "several").records()) > 1 == max(r.together for r in Folder(tmp_path / "one").records())
    run("mixed", "--batch-size", 1, samples=1)
    mixed, _, found = run("mixed", "--batch-size", 3)
    assert (mixed["known"], mixed["answered"]) == (12, 12) and found == want


def test_the_command_says_why_it_reads_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    def refuse(*anything: Any) -> None:
        raise ValueError("its code mixes tokens; read requests one by one")

    monkeypatch.setattr("longreach.hf.flat_check.require_exact", refuse)
    asked = ("passkey", "--lengths", "200", "--depths", "0", "--samples", "2", "--method", "stock")
    assert main(["eval", "run", *asked, "--batch-size", "2", "--out", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    assert "warning: samples are read one by one: its code mixes tokens" in said.err
    assert json.loads(said.out)["together"]["reason"].startswith("its code mixes tokens") and json.loads(said.out)["answered"] == 2


class Clockwork:
    """Answers take what a law says; those that are read together share the seconds of a step."""

    def __init__(self, work: Work, speed: Speed, size: int) -> None:
        self.work, self.speed, self.size = work, speed, size

    def answer(self, prompt: Prompt) -> Reply:
        return next(iter(self.answers([prompt])))[1]

    def answers(self, prompts: Iterable[Prompt]) -> Iterator[tuple[int, Reply]]:
        held: list[int] = []
        for number, prompt in enumerate(prompts):
            shared = prompt.shared if held == prompt.ids[: prompt.shared] and held else 0
            held, new, tokens = prompt.ids[: prompt.shared], prompt.sample.max_new_tokens, len(prompt.ids)
            first = self.work.load(tokens, shared, 1, held=shared > 0)
            step = self.speed.writing.seconds((new - 1) * self.work.per_token, self.work.attention(tokens, tokens + new - 1))
            yield number, Reply("7", new, "length", self.speed.seconds(first), step, shared, together=self.size)


def test_the_estimate_knows_what_a_batch_saves(nano):
    """The probes are read as the run reads, so that the estimate is right for both."""
    _, tokenizer = nano
    from longreach.evals import tasks as registry
    from longreach.evals.harness import runner
    from longreach.evals.samples.base import Settings

    items: list[Item] = runner.plan({registry.task("niah"): Settings(lengths=(2000, 8000), depths=(0.0, 1.0), samples=4)}, tokenizer)
    work = Work(1.0, lambda start, stop: causal(start, stop) / 2000)
    for size, writing in ((1, 3e-3), (8, 5e-4)):
        speed = Speed(Rate(1e-4, 1e-4), Rate(writing, writing))
        engine = Clockwork(work, speed, size)
        found = estimates.measure(items, engine, tokenizer, work, together=size)
        said, true = estimates.estimate(items, work, found).seconds, estimates.estimate(items, work, speed).seconds
        assert said == pytest.approx(true, rel=0.02)


def test_torch_is_asked_for_its_clock_on_a_card_only(monkeypatch):
    from longreach.evals.harness.together import synchronise

    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    synchronise(torch.device("cpu"))
    synchronise(torch.device("cuda:0"))
    assert asked == [torch.device("cuda:0")]
