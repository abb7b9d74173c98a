"""What a run will cost: the formula against engines whose seconds are a known function, the clock of a run against one that is wound by hand, and the counted
work against the layouts of real methods. Nothing here is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import pytest

import longreach
from longreach.evals import tasks as registry
from longreach.evals.harness import costs, estimates, runner
from longreach.evals.harness.costs import PLAIN, Load, Rate, Sight, Speed, Work, causal
from longreach.evals.harness.engine import Reply
from longreach.evals.harness.items import Item, by_length, ordered, shard
from longreach.evals.harness.model_engine import ModelEngine, pairs
from longreach.evals.harness.results import Folder
from longreach.evals.samples.base import Parts, Sample, Settings, Task
from longreach.evals.samples.budget import Prompt

WINDOWED = longreach.LMInfinite(n_local=256, n_global=4).layout(0)
PAIRS: dict[str, Callable[[int, int], float]] = {"linear": lambda start, stop: 0.0, "quadratic": causal, "windowed": partial(pairs, WINDOWED)}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return longreach.load("nano")[1]


class Chapters(Task):
    """Documents of several lengths with several questions each."""

    name = "chapters"

    def __init__(self, sizes: tuple[int, ...] = (700, 300, 100), questions: int = 4) -> None:
        self.sizes, self.questions = sizes, questions

    def samples(self, tokenizer: Any, settings: Settings) -> Iterator[Sample]:
        for size in self.sizes:
            for n in range(self.questions):
                parts = Parts(f"Chapter {size}. " + "It rained for days. " * size, f"\n\nQuestion {n}?", "Read this.\n", " It is")
                yield Sample(f"{size}/{n}", parts, (str(n),), 12, {"length_target": size}, chat="prefix")

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": 1.0}


@dataclass
class Timed:
    """Takes known seconds: for every token and pair that it reads or writes, and for every answer. It holds the last document, as the real one does."""

    pairs: Callable[[int, int], float]
    token: float = 1e-3
    pair: float = 2e-6
    step: float = 0.03
    key: float = 1e-5
    answering: float = 0.05
    shares: bool = True
    noise: Random | None = None
    seconds: float = 0.0
    read: int = 0
    asked: list[int] = field(default_factory=list)
    _held: list[int] = field(default_factory=list)

    def answer(self, prompt: Prompt) -> Reply:
        n, new, document = len(prompt.ids), prompt.sample.max_new_tokens, prompt.ids[: prompt.shared]
        start = len(document) if self.shares and document and self._held == document else 0
        self._held = document
        error = self.noise.uniform(0.9, 1.1) if self.noise else 1.0
        prefill = self.token * (n - 1 - start) + self.pair * self.pairs(start, n - 1) + self.step + self.key * self.pairs(n - 1, n) + self.answering
        decode = self.step * (new - 1) + self.key * self.pairs(n, n + new - 1)
        self.seconds += error * (prefill + decode)
        self.read += n - start
        self.asked.append(n)
        return Reply(" 1", new, "length", error * prefill, error * decode, start)


def planned(tokenizer: Any, *sizes: int) -> list[Item]:
    return runner.plan({Chapters(sizes): Settings()}, tokenizer)


def ran(items: list[Item], engine: Any, tokenizer: Any, folder: Folder, **more: Any) -> list[estimates.Step]:
    steps: list[estimates.Step] = []
    runner.run(items, engine, tokenizer, folder, {"chapters": "hash"}, progress=steps.append, **more)
    return steps


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "anew"])
@pytest.mark.parametrize("shape", PAIRS)
def test_an_estimate_is_right_whatever_the_shape_of_the_cost(shape, shares, tokenizer, tmp_path):
    """From probes of a quarter of the longest prompt, though the counted FLOP of attention are wrong by a factor of three."""
    items = planned(tokenizer, 2000, 700, 100)
    longest = max(item.tokens for item in items)
    assert longest > 8000
    probed = Timed(PAIRS[shape], shares=shares)
    work = Work(1.0, lambda start, stop: 6e-3 * PAIRS[shape](start, stop), None if shares else 0)
    speed = estimates.measure(items, probed, tokenizer, work)
    assert max(probed.asked) == longest // 4 and probed.read < longest
    engine = Timed(PAIRS[shape], shares=shares)
    ran(items, engine, tokenizer, Folder(tmp_path))
    found = estimates.estimate(items, work, speed)
    assert found.seconds == pytest.approx(engine.seconds, rel=0.04)
    assert (found.samples, found.read_tokens) == (12, engine.read)
    for _, _, part in by_length(items):
        alone = Timed(PAIRS[shape], shares=shares)
        (tmp_path / str(part[0].tokens)).mkdir()
        ran(part, alone, tokenizer, Folder(tmp_path / str(part[0].tokens)))
        assert estimates.estimate(part, work, speed).seconds == pytest.approx(alone.seconds, rel=0.1)


def test_the_times_of_a_real_model_follow_from_its_counts():
    """Seconds that SmolLM2-135M-Instruct took for plain prompts on two quiet cores, in bfloat16: 30 layers of width 576, 106 million weights beside the table.
    Reading 4k tokens says what 16k will take, to a tenth, where a proportion would say 32 s and a square 128 s."""
    work = Work(2.0 * 106e6, lambda start, stop: 4.0 * 576 * 30 * causal(start, stop))
    seconds = {4096: 8.0, 8192: 24.0, 12288: 47.0, 16384: 75.0}
    for known in ([4096], [4096, 8192]):
        speed = costs.fit(work, [Sight(tokens, 0, 1, seconds[tokens], 0.0) for tokens in known])
        assert speed is not None
        for tokens, took in seconds.items():
            assert speed.seconds(work.load(tokens, 0, 1)) == pytest.approx(took, rel=0.1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", PAIRS)
def test_an_estimate_bears_that_every_time_is_a_tenth_off(shape, seed, tokenizer, tmp_path):
    items = planned(tokenizer, 2000, 700, 100)
    work = Work(1.0, lambda start, stop: 6e-3 * PAIRS[shape](start, stop))
    speed = estimates.measure(items, Timed(PAIRS[shape], noise=Random(seed)), tokenizer, work)
    engine = Timed(PAIRS[shape])
    ran(items, engine, tokenizer, Folder(tmp_path))
    assert 1 / 1.5 < estimates.estimate(items, work, speed).seconds / engine.seconds < 1.5


def test_a_window_is_not_taken_for_a_square(tokenizer):
    """One and the same time says less of a long prompt under a method that looks at a window."""
    items = planned(tokenizer, 2000)
    told: dict[str, Any] = {}
    for shape in ("windowed", "quadratic"):
        work = Work(1.0, PAIRS[shape])
        told[shape] = estimates.estimate(items, work, costs.fit(work, [Sight(1024, 0, 1, 1.5, 0.0)])).seconds
    assert told["quadratic"] > 1.5 * told["windowed"]


def test_probes_are_bounded_in_time(tokenizer):
    """A machine on which the quarter of the longest prompt would take an hour."""
    items = planned(tokenizer, 2000)
    engine = Timed(causal, token=0.02, pair=1e-3)
    speed = estimates.measure(items, engine, tokenizer, Work(1.0, causal))
    first, longest = engine.asked[0], max(engine.asked)
    assert first == max(1024, items[0].tokens // 4) // 4 and longest == first
    once = Timed(causal, token=0.02, pair=1e-3)
    once.answer(Prompt(items[0].sample, "", list(range(first)), first - 10))
    assert speed.seconds(Work(1.0, causal).load(first, first - 10, 12)) == pytest.approx(once.seconds, rel=0.05)
    quicker = Timed(causal, token=0.02, pair=1e-5)
    estimates.measure(items, quicker, tokenizer, Work(1.0, causal))
    assert first < max(quicker.asked) < items[0].tokens // 4


def test_a_short_prompt_is_its_own_probe(tokenizer):
    items = planned(tokenizer, 20)
    engine = Timed(causal)
    estimates.measure(items, engine, tokenizer)
    assert max(engine.asked) == max(item.tokens for item in items) < 1024 and min(engine.asked) == max(engine.asked) // 4
    with pytest.raises(ValueError, match="--no-measure"):
        estimates.measure(items, Timed(causal, 0, 0, 0, 0, 0), tokenizer)


def test_the_cost_of_a_document_and_of_a_further_question():
    """The small function that others use: exact for speeds that are known."""
    work, speed = Work(2.0, causal), Speed(Rate(0.5, 0.25), Rate(3.0, 0.125), 7.0)
    assert work.load(11, 8, 3) == Load(read=20.0, attended=55.0, written=6.0, seen=11 + 12 + 13, answers=1, tokens=11)
    assert work.load(11, 8, 3, held=True) == Load(read=4.0, attended=19.0, written=6.0, seen=36.0, answers=1, tokens=3)
    assert speed.seconds(work.load(11, 8, 3)) == 0.5 * 20 + 0.25 * 55 + 3 * 6 + 0.125 * 36 + 7
    assert speed.seconds(work.load(11, 8, 3, held=True)) == 0.5 * 4 + 0.25 * 19 + 3 * 6 + 0.125 * 36 + 7
    both = work.load(11, 8, 3) + work.load(11, 8, 3, held=True)
    assert both.answers == 2 and speed.seconds(both) == speed.seconds(work.load(11, 8, 3)) + speed.seconds(work.load(11, 8, 3, held=True))
    assert work.load(1, 0, 1) == Load(0.0, 0.0, 2.0, 1.0, 1, 1)


@pytest.mark.parametrize("cost", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 40.0), (40.0, 1.0)])
def test_two_speeds_from_times(cost):
    rows = [(cost[0] * u + cost[1] * v, u, v) for u, v in ((1.0, 0.1), (2.0, 0.4), (4.0, 1.6))]
    found = costs.rate(rows)
    assert found is not None
    for u, v in ((1.0, 0.1), (16.0, 25.6)):
        assert found.seconds(u, v) == pytest.approx(cost[0] * u + cost[1] * v, rel=0.03)
    assert min(found.products, found.attention) >= 0


@pytest.mark.parametrize("sizes", [(512, 600), (512, 1024, 1254), (512, 1024, 2048)])
@pytest.mark.parametrize("slow", [0, -1])
def test_a_slow_probe_is_not_taken_for_a_steep_slope(sizes, slow):
    """The counts of a model of 135 million parameters, one probe of a busy machine: 8192 tokens are foretold within a factor of two."""
    work = Work(2.1e8, lambda start, stop: 4 * 576 * 30 * causal(start, stop))
    true = Speed(Rate(1e-12, 1.5e-12), Rate(1e-12, 1.5e-12))
    seconds = [true.seconds(work.load(size, 0, 1)) for size in sizes]
    seconds[slow] *= 1.8
    found = costs.fit(work, [Sight(size, 0, 1, time, 0.0) for size, time in zip(sizes, seconds)])
    assert found is not None
    assert 0.5 < found.seconds(work.load(8192, 8100, 12)) / true.seconds(work.load(8192, 8100, 12)) < 2


def test_what_the_times_leave_open_is_left_to_the_counts():
    found = costs.rate([(6.0, 2.0, 1.0)] * 3)  # one length only
    assert found is not None and found.products == pytest.approx(2.0) == found.attention
    assert costs.rate([]) is None and costs.rate([(0.0, 1.0, 1.0)]) is None
    assert costs.fit(PLAIN, [Sight(100, 90, 4, 1.0, 1.0)]) is None  # no document was read
    shrinking = costs.rate([(1.0, 1.0, 0.1), (1.2, 2.0, 0.4), (1.3, 4.0, 1.6)])  # less than in proportion: no speed is negative
    assert shrinking is not None and shrinking.attention == 0.0 and 0.3 < shrinking.products < 1.0


def test_a_bounded_cache_goes_back_so_far_and_no_farther(tokenizer):
    items = ordered(planned(tokenizer, 100))
    question = items[0].tokens - items[0].shared
    assert 0 < question < 20
    read = {back: [load.tokens for load in estimates.loads(items, Work(1.0, causal, back))] for back in (None, 0, question + 10, question + 11)}
    anew, held = [item.tokens for item in items], [items[0].tokens, *[question] * 3]
    assert read == {None: held, 0: anew, question + 10: anew, question + 11: held}


def test_a_prompt_that_is_cut_costs_what_is_left_of_it(tokenizer):
    items = planned(tokenizer, 100)
    assert {load.tokens for load in estimates.loads(items, PLAIN, limit=212)} == {200}


def test_the_clock_counts_a_document_once(tokenizer, tmp_path):
    """Three documents, four questions each: the first question of each takes nearly all the time, and the time left says so."""
    items = planned(tokenizer, 700, 300, 100)
    engine = Timed(causal)
    work = Work(1.0, lambda start, stop: 6e-3 * causal(start, stop))
    clock = estimates.Clock(len(items), ordered(items), work, now=lambda: engine.seconds)
    left, at = [], []
    for item in ordered(items):
        left.append(clock.step(item, 0).seconds_left)
        at.append(engine.seconds)
        prompt = runner.budget.encode(tokenizer, item.sample)
        clock.read(item, engine.answer(prompt), len(prompt.ids))
    assert left[0] is None
    for n in range(1, len(items)):
        assert left[n] == pytest.approx(engine.seconds - at[n], rel=0.35 if n < 5 else 0.45 if n < 9 else 0.05), n  # two sizes leave the shape open
    by_tokens = at[1] * sum(item.needs for item in ordered(items)[1:]) / ordered(items)[0].needs
    assert by_tokens > 2 * (engine.seconds - at[1])  # what was told before
    end = clock.step(None, 0)
    assert end.seconds_left == 0.0 and end.done == end.total == 12 and end.tokens == sum(item.needs for item in items)


def test_the_clock_knows_of_no_times_and_of_failures(tokenizer):
    """An engine that tells no times, and answers that failed: the counted work alone is compared."""
    items = ordered(planned(tokenizer, 300, 100))
    ticks = iter(range(0, 1000, 10))
    clock = estimates.Clock(10, items, now=lambda: float(next(ticks)))
    assert clock.step(items[0], 0).done == 2  # were known before
    clock.read(items[0], None, 0)
    loads = [costs.EVEN.seconds(load) for load in estimates.loads(items, PLAIN)]
    assert clock.step(items[1], 1).seconds_left == pytest.approx(10 * sum(loads[1:]) / loads[0])
    clock.read(items[1], Reply("", 1, "stop"), items[1].tokens)
    assert clock.step(items[2], 1).seconds_left == pytest.approx(20 * sum(loads[2:]) / sum(loads[:2]))


def test_a_run_that_goes_on_reads_a_document_anew_whose_first_question_is_known(tokenizer, tmp_path):
    items = planned(tokenizer, 300)
    folder = Folder(tmp_path)
    ran(items[:1], Timed(causal), tokenizer, folder)
    engine = Timed(causal)
    steps = ran(items, engine, tokenizer, folder)
    assert [step.done for step in steps] == [1, 2, 3, 4] and engine.asked == [item.tokens for item in items[1:]]
    assert engine.read == estimates.estimate(items[1:]).read_tokens


def test_shards_share_no_document(tokenizer):
    items = planned(tokenizer, 30, 20, 10)
    parts = [shard(items, index, 2) for index in (0, 1)]
    assert sorted(item.index for part in parts for item in part) == list(range(12))
    assert [{item.document for item in part} & {item.document for item in parts[1 - n]} for n, part in enumerate(parts)] == [set(), set()]
    assert [len(part) for part in parts] == [8, 4] and shard(items, 0, 1) == items


@pytest.mark.parametrize(
    ("method", "shape", "back"),
    [
        (longreach.Stock(), "all", None),
        (longreach.SelfExtend(4, 64), "all", 128),
        (longreach.ReRoPE(64), "all", 128),
        (longreach.LMInfinite(n_local=100), "window", 128),
    ],
    ids=str,
)
def test_the_work_of_a_model_is_counted_from_its_layouts(method, shape, back, tokenizer):
    model, _ = longreach.load("nano")
    with longreach.extend(model, method) as extension:
        work = ModelEngine(model, tokenizer, extension).work
    layers, width = model.config.num_hidden_layers, model.config.hidden_size
    whole = {"all": causal(0, 2000), "window": pairs(longreach.LMInfinite(n_local=100).layout(0), 0, 2000)}[shape]
    assert work.attention(0, 2000) == 4.0 * width * layers * whole
    assert work.attention(0, 700) + work.attention(700, 2000) == work.attention(0, 2000)
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    assert work.per_token == 2.0 * (sum(p.numel() for p in model.parameters() if p.dim() > 1) - embedding.numel() * (1 if tied else 2))
    assert work.back == back


def test_the_stock_model_reads_every_prompt_anew(tokenizer):
    model, _ = longreach.load("nano")
    work = ModelEngine(model, tokenizer).work
    assert work.back == 0 and work.attention(0, 300) == 4.0 * model.config.hidden_size * model.config.num_hidden_layers * causal(0, 300)


def test_an_estimate_of_a_real_engine_counts_what_it_reads(tokenizer, tmp_path):
    """The engine's own record of reused tokens, under a method of each kind."""
    model, _ = longreach.load("nano")
    settings = Settings(lengths=(200, 300), depths=(0.0, 0.5, 1.0), samples=1)
    items = runner.plan({registry.task("passkeys"): settings}, tokenizer)
    for method in (longreach.SelfExtend(4, 64), longreach.LMInfinite(n_local=100), longreach.Stock()):
        with longreach.extend(model, method) as extension:
            engine = ModelEngine(model, tokenizer, extension)
            work, read = engine.work, 0
            for item in ordered(items):
                reply = engine.answer(runner.budget.encode(tokenizer, item.sample))
                read += item.tokens - reply.reused
        assert estimates.estimate(items, work).read_tokens == read < sum(item.tokens for item in items)
