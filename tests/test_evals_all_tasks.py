"""Every registered task: the same samples in any order, prompts that fit, and what fake models score. New tasks are covered as they are added."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import longreach
import test_evals_data_tasks
from fake_engines import CopyTail, Empty, Oracle
from longreach.evals import tasks as registry
from longreach.evals.samples import budget
from longreach.evals.samples.base import Sample, Settings
from longreach.evals.samples.fitting import FILLER
from longreach.evals.tasks import niah, passkey
from longreach.running.loading import shipped_book

OFFLINE = [name for name, task in registry.tasks().items() if not task.needs_data]
WITH_DATA = [name for name, task in registry.tasks().items() if task.needs_data]
SMALL = Settings(lengths=(2048,), depths=(0.0, 0.6), samples=2, text=None)
EDGE = ["", "\n\n", "?!.,;:", "\ud83d\ud83d", "\x00\x07", "{[(<", "7" * 10_000, "a the an " * 100_000]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return longreach.load("nano")[1]


@pytest.fixture(scope="module")
def samples(tokenizer: Any) -> dict[str, list[Sample]]:
    return {name: list(itertools.islice(registry.task(name).samples(tokenizer, SMALL), 6)) for name in OFFLINE}


def score(name: str, engine: Any, samples: list[Sample], tokenizer: Any) -> list[dict[str, float]]:
    task = registry.task(name)
    return [task.score(sample, engine.answer(budget.encode(tokenizer, sample)).text) for sample in samples]


@pytest.mark.parametrize("name", OFFLINE)
def test_prompts_fit_and_say_what_they_are(name, samples, tokenizer):
    assert samples[name], "no samples at 2048 tokens"
    assert len({sample.id for sample in samples[name]}) == len(samples[name])
    for sample in samples[name]:
        assert sample.references and sample.max_new_tokens >= 1
        assert sample.meta.get("length_target") == 2048
        assert budget.encode(tokenizer, sample).needs <= 2048


@pytest.mark.parametrize("name", OFFLINE)
def test_a_sample_is_a_function_of_seed_length_and_index(name, samples, tokenizer):
    """Also after another length, and with fewer samples or depths. Only a document that is asked about at several depths may be another one with other depths:
    its samples have other names then."""
    task = registry.task(name)
    fewer = replace(SMALL, lengths=(1536, 2048), samples=1)
    asked = Counter(sample.parts.document for sample in samples[name] if "depth" in sample.meta)
    several = max(asked.values(), default=1) > 1
    for settings, must_agree in ((fewer, True), (replace(fewer, depths=(0.6,)), not several)):
        other = {s.id: s for s in itertools.islice(task.samples(tokenizer, settings), 8)}
        common = [sample for sample in samples[name] if sample.id in other]
        assert common or not must_agree, "the same sample has another name among other lengths or depths"
        for sample in common:
            assert other[sample.id] == sample
    moved = list(itertools.islice(task.samples(tokenizer, replace(SMALL, seed=1)), 6))
    assert [s.parts for s in moved] != [s.parts for s in samples[name]]


@pytest.mark.parametrize("name", OFFLINE)
def test_the_oracle_is_right_and_silence_is_wrong(name, samples, tokenizer):
    task = registry.task(name)
    for found in score(name, Oracle(), samples[name], tokenizer):
        assert found[task.metric] == 1.0 and all(0 <= value <= 1 for value in found.values())
    for found in score(name, Empty(), samples[name], tokenizer):
        assert found[task.metric] == 0.0


@pytest.mark.parametrize("name", OFFLINE)
def test_no_answer_breaks_a_scorer(name, samples):
    for text in EDGE:
        found = registry.task(name).score(samples[name][0], text)
        assert all(0 <= value <= 1 for value in found.values())


@pytest.mark.parametrize("name", WITH_DATA)
def test_data_that_are_not_there_are_named(name, tokenizer, tmp_path):
    """What is made of data that are there is tested in test_evals_data_tasks.py, on small files in the official formats."""
    if "zh" in registry.task(name).metric:
        pytest.importorskip("jieba", reason="jieba is not installed (pip install jieba)")
    settings = Settings(lengths=(2048,) if registry.task(name).group == "ruler" else (), samples=1, data=str(tmp_path))
    with pytest.raises(ValueError, match=r"has no .*pass the folder"):
        next(iter(registry.task(name).samples(tokenizer, settings)))


def test_every_task_says_what_it_is():
    for name, task in registry.tasks().items():
        assert task.name == name == name.lower() and task.license and task.source, f"{name} lacks its licence or its source"
        assert task.metric and (task.random is None or 0 < task.random < 1)


def test_the_pages_name_every_benchmark():
    """Numbers of tasks in the tables of docs/evaluation.md and docs/benchmark_data.md, against the registry."""
    docs = Path(__file__).parents[1] / "docs"
    made, official = Counter(registry.task(name).group for name in OFFLINE), Counter(registry.task(name).group for name in WITH_DATA)
    rows = re.findall(r"^\| (none|`[a-z0-9-]+`) \| (\d+) \| (\d+) \|", (docs / "evaluation.md").read_text(encoding="utf-8"), re.M)
    listed = {name.strip("`").replace("none", ""): (int(here), int(data)) for name, here, data in rows}
    assert listed == {group: (made[group], official[group]) for group in made | official}
    rows = re.findall(r"^\| `([a-z0-9-]+)`[^|]*\|[^|]+\|[^|]+\| (\d+)", (docs / "benchmark_data.md").read_text(encoding="utf-8"), re.M)
    assert {group: int(count) for group, count in rows} == official


def test_every_task_is_tested():
    """A task that is made here is taken up by the tests above; one with data has to be known to the file that makes small data."""
    assert set(WITH_DATA) == {*test_evals_data_tasks.TASKS, "ruler-qa-1", "ruler-qa-2"}


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["passkey", "niah", "niah-classic"])
def test_needles_stand_once_and_where_they_should(name, depth, tokenizer):
    for text in (None, shipped_book()[:150_000]):
        settings = Settings(lengths=(1024,), depths=(depth,), samples=1, text=text)
        (sample,) = registry.task(name).samples(tokenizer, settings)
        needle = passkey.STATEMENT.format(key=sample.references[0]) if name == "passkey" else None
        if name == "niah-classic":
            needle = sample.references[0]
        assert sample.parts.document.count(needle or sample.references[0]) == 1
        assert abs(sample.meta["depth_actual"] - depth) < 0.06
        assert 1024 - 60 <= budget.encode(tokenizer, sample).needs <= 1024


def test_the_haystack_is_the_same_at_every_depth(tokenizer):
    near, far = niah.NeedleInAHaystack().samples(tokenizer, Settings(lengths=(600,), depths=(0.2, 0.8), samples=1))
    strip = [s.parts.document.replace(next(l for l in s.parts.document.split(". ") if s.references[0] in l), "") for s in (near, far)]
    assert strip[0][:200] == strip[1][:200] and near.references != far.references


def test_golden_values_of_lm_infinite(tokenizer):
    """Keys and places of the published script: numpy's generator, seeded with the length."""
    from numpy.random import RandomState

    golden = {2048: (377032, 5, 8042826), 4096: (8929652, 36, 2993705), 8192: (8645673, 99, 9357453), 16384: (4224534, 13, 2502326)}
    for length, (key, place, following) in golden.items():
        rng = RandomState(length)
        assert (rng.randint(1, 10**7), rng.randint(0, 100), rng.randint(1, 10**7)) == (key, place, following)
    drawn = list(passkey.lm_infinite_draws(tokenizer, 2048, 3))
    assert drawn[0][0] == "377032" and 0 <= drawn[0][1] < drawn[0][2]
    assert drawn[:2] == list(passkey.lm_infinite_draws(tokenizer, 2048, 2))

    class Slots100:  # a tokenizer with which exactly 100 sentences of filler fit
        def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
            return {"input_ids": [0] * ({2048: 20, 4096: 40, 8192: 81}[self.length] if text == FILLER else self.length - 2 - self.room)}

        def __init__(self, length: int) -> None:
            self.length, self.room = length, 100 * {2048: 20, 4096: 40, 8192: 81}[length]

    for length in (2048, 4096, 8192):
        (key, place, slots), (second, _, _) = passkey.lm_infinite_draws(Slots100(length), length, 2)
        assert (int(key), place, slots, int(second)) == (*golden[length][:2], 100, golden[length][2])


@pytest.mark.parametrize("style", ["longreach", "selfextend", "yarn", "infinitebench", "lm-infinite"])
def test_styles(style, tokenizer):
    settings = Settings(lengths=(900,), depths=(0.5,), samples=2, options={"style": style})
    task = registry.task("passkey")
    for sample in task.samples(tokenizer, settings):
        prompt = budget.encode(tokenizer, sample)
        key = sample.references[0]
        assert sample.parts.document.count(passkey.STATEMENT.format(key=key)) == 1
        assert prompt.needs <= 900 or style == "lm-infinite"
        assert prompt.needs >= 900 - 35
        assert prompt.text.endswith("The pass key is " if style == "lm-infinite" else "The pass key is")
        assert task.score(sample, f" {key}.") == {"accuracy": 1.0}
        assert task.score(sample, f" {key}7.") == {"accuracy": float(style == "selfextend")}
        assert task.score(sample, f"\n{key}") == {"accuracy": 1.0}
        assert task.score(sample, f" 00{key}") == {"accuracy": float(style in ("selfextend", "yarn", "lm-infinite"))}, "some compare numbers, some digits"
        assert task.score(sample, f" \uff17 {key}") == {"accuracy": float(style in ("selfextend", "infinitebench"))}, "digits of other scripts"
        assert task.score(sample, f" it is\n{key}")["accuracy"] == float(style != "lm-infinite")


def test_a_key_is_found_where_it_lies_in_the_known_tail(tokenizer):
    """Depth arithmetic: with keys at even depths and the last 40 % known, about 40 % are found, and those are the deep ones."""
    depths = tuple(d / 10 for d in range(11))
    settings = Settings(lengths=(2000,), depths=depths, samples=1)
    samples = list(registry.task("passkey").samples(tokenizer, settings))
    found = score("passkey", CopyTail(tokenizer, 800), samples, tokenizer)
    for sample, row in zip(samples, found):
        text, key = sample.parts.text, sample.references[0]
        from_the_end = len(tokenizer(text[text.index(passkey.STATEMENT.format(key=key)) :], add_special_tokens=False)["input_ids"])
        if abs(from_the_end - 800) > 3:
            assert row["accuracy"] == float(from_the_end < 800)
    assert abs(sum(row["accuracy"] for row in found) / len(found) - 0.4) <= 0.1


def test_what_cannot_be_is_refused(tokenizer):
    task = registry.task("passkey")
    for settings, says in [
        (Settings(lengths=(50,)), r"choose a length of at least \d+"),
        (Settings(lengths=(900,), options={"style": "other"}), "choose one of longreach"),
        (Settings(lengths=(900,), options={"stile": "yarn"}), "no option stile"),
        (Settings(lengths=(900,), options={"style": "yarn"}, text="A text."), "leave out the text"),
        (Settings(lengths=(900,), options={"digits": 0}), "whole number of 1 to 100"),
    ]:
        with pytest.raises(ValueError, match=says):
            list(task.samples(tokenizer, settings))
    with pytest.raises(ValueError, match="the text says already"):
        list(registry.task("niah-classic").samples(tokenizer, Settings(lengths=(300,), text=f"Once. {niah.NEEDLE} " * 99)))
    with pytest.raises(ValueError, match="there is no task 'pass'"):
        registry.task("pass")
