"""Several pass keys in one document: what the names, the documents and the questions are, and that one reading answers as many would."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

import longreach
from fake_engines import First, Oracle
from longreach.evals import tasks as registry
from longreach.evals.harness import runner
from longreach.evals.harness.items import ordered
from longreach.evals.harness.model_engine import ModelEngine
from longreach.evals.harness.results import Folder
from longreach.evals.samples import budget
from longreach.evals.samples.base import Sample, Settings
from longreach.evals.samples.fitting import FILLER
from longreach.evals.tasks.passkeys import NAMES, WORDING
from longreach.running.loading import shipped_book

TASK = registry.task("passkeys")
DEPTHS = (0.0, 0.3, 0.5, 0.9, 1.0)
SETTINGS = Settings(lengths=(700, 1500), depths=DEPTHS, samples=2)
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]\n{% endfor %}[assistant] "


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return longreach.load("nano")[1]


@pytest.fixture(scope="module")
def talking(tokenizer: Any) -> Any:
    """The same tokenizer with a chat template."""
    found = copy.deepcopy(tokenizer)
    found.chat_template = CHAT
    return found


@pytest.fixture(scope="module")
def book() -> str:
    return shipped_book()[20_000:150_000]


def documents(samples: Sequence[Sample]) -> dict[tuple[int, int], list[Sample]]:
    found: dict[tuple[int, int], list[Sample]] = {}
    for sample in samples:
        found.setdefault((sample.meta["length_target"], sample.meta["index"]), []).append(sample)
    return found


def statement(sample: Sample) -> str:
    return WORDING.statement.format(name=sample.meta["name"], key=sample.references[0])


def test_no_name_can_be_taken_for_another():
    """Two names that end in the same word would ask for two numbers at once, for a small model goes by the words right before a number."""
    assert len(set(NAMES)) == len(NAMES) == 24 and len({name.split()[-1] for name in NAMES}) == 24
    assert not [(one, other) for one in NAMES for other in NAMES if one != other and one in other]
    assert all(name == name.strip().lower() and name.split()[-1] not in FILLER.lower() for name in NAMES)


@pytest.mark.parametrize("hidden", [False, True], ids=["filler", "text"])
def test_one_document_holds_every_key_once_and_at_its_depth(hidden, tokenizer, book):
    text = book if hidden else None
    groups = documents(list(TASK.samples(tokenizer, replace(SETTINGS, text=text))))
    assert sorted(groups) == [(700, 0), (700, 1), (1500, 0), (1500, 1)]
    assert len({group[0].parts.document for group in groups.values()}) == 4
    for (length, _), group in groups.items():
        (document,) = {sample.parts.document for sample in group}
        assert [sample.meta["depth"] for sample in group] == list(DEPTHS) and len({sample.meta["name"] for sample in group}) == 5
        assert len({sample.references for sample in group}) == 5 and len({sample.id for sample in group}) == 5
        for sample in group:
            assert document.count(statement(sample)) == 1 and document.count(sample.references[0]) == 2 and len(sample.references[0]) == 5
            assert sample.parts.text.count(sample.meta["name"]) == 4  # twice stated, asked for, and the beginning of the answer
            assert sample.meta["depth_actual"] == pytest.approx(sample.meta["depth"], abs=0.12 if length == 700 else 0.06)
            assert sample.parts.text.endswith(f"What is the {sample.meta['name']}? The {sample.meta['name']} is") and sample.meta["keys"] == 5
        assert (FILLER in document) == (not hidden) and ("irrelevant text" in group[0].parts.text) == (not hidden)
        bare = document
        for sample in group:
            bare = bare.replace(statement(sample), "")
        assert not any(character.isdigit() for character in bare) or hidden
        if hidden:
            first = " ".join(bare.split())[:100]
            assert first in " ".join(book.split()), "a passage of the text that was given"


@pytest.mark.parametrize("hidden", [False, True], ids=["filler", "text"])
@pytest.mark.parametrize("chat", [False, True], ids=["raw", "chat"])
def test_every_question_fits_and_few_tokens_are_left(chat, hidden, tokenizer, talking, book):
    """Of the longest name: the others leave some more. What fits does so with and without the chat template."""
    used = talking if chat else tokenizer
    for length in (200, 333, 700, 1501):
        depths = DEPTHS if length > 300 else DEPTHS[:3]
        samples = list(TASK.samples(used, Settings(lengths=(length,), depths=depths, samples=2, text=book if hidden else None)))
        for group in documents(samples).values():
            for mode in ("auto", "off"):
                prompts = [budget.encode(used, sample, mode) for sample in group]
                assert max(prompt.needs for prompt in prompts) <= length
                assert all(("[user]" in prompt.text) == (chat and mode == "auto") for prompt in prompts)
                if mode == "auto":
                    assert max(prompt.needs for prompt in prompts) > length - 45
                assert len({tuple(prompt.ids[: prompt.shared]) for prompt in prompts}) == 1, "the document is one beginning of all its prompts"
                assert all(0 < len(prompt.ids) - prompt.shared < 60 for prompt in prompts)


def test_other_depths_are_another_document_under_other_names(tokenizer, tmp_path):
    """So a run that is made larger by depths takes no answer of another document for its own."""
    few, many = (list(TASK.samples(tokenizer, Settings(lengths=(700,), depths=depths, samples=1))) for depths in ((0.0, 1.0), (0.0, 0.5, 1.0)))
    assert not {sample.id for sample in few} & {sample.id for sample in many}
    assert {sample.id for sample in few} == {"passkeys/700/0-1/0/0", "passkeys/700/0-1/0/1"}
    folder = Folder(tmp_path)

    def run(depths: tuple[float, ...], samples: int) -> runner.Outcome:
        items = runner.plan({TASK: Settings(lengths=(700,), depths=depths, samples=samples)}, tokenizer)
        return runner.run(items, Oracle(), tokenizer, folder, {"passkeys": "hash"})

    assert run((0.0, 1.0), 1) == runner.Outcome(2, 0, 0, 0)
    assert run((0.0, 1.0), 2) == runner.Outcome(2, 0, 2, 0)  # more samples: those that are there stay
    assert run((0.0, 0.5, 1.0), 1) == runner.Outcome(3, 0, 0, 0)  # more depths: all anew
    assert run((0.0, 1.0), 2) == runner.Outcome(0, 0, 4, 0)
    assert len(folder.records()) == 7


def test_what_is_right(tokenizer):
    (sample,) = TASK.samples(tokenizer, Settings(lengths=(300,), depths=(0.5,), samples=1))
    key = sample.references[0]
    for answer, right in ((f" {key}.", 1.0), (f"\n{key}", 1.0), (f" {key}7", 0.0), (f" 1 {key}", 0.0), (" the", 0.0), ("", 0.0)):
        assert TASK.score(sample, answer) == {"accuracy": right}


def test_no_key_stands_in_the_text(tokenizer):
    """A text that holds nearly every number of two digits."""
    numbers = "Here are " + " ".join(str(n) for n in range(10, 98)) + ". "
    samples = list(TASK.samples(tokenizer, Settings(lengths=(600,), depths=(0.0, 1.0), samples=1, text=numbers * 20, options={"digits": 2})))
    assert {sample.references[0] for sample in samples} == {"98", "99"}


def test_what_cannot_be_is_refused(tokenizer):
    for settings, says in (
        (Settings(lengths=(60,)), r"choose a length of at least \d+"),
        (Settings(lengths=(4000,), depths=tuple(n / 24 for n in range(25))), "names for 24 keys in a document, not for 25; pass fewer depths"),
        (Settings(lengths=(900,), depths=tuple(n / 10 for n in range(10)), options={"digits": 1}), "no 10 different numbers of 1 digit; .* digits=2"),
        (Settings(lengths=(900,), options={"digits": 0}), "whole number of at least 1 for digits"),
        (Settings(lengths=(900,), options={"digits": 101}), "whole number of 1 to 100, not 101"),
        (Settings(lengths=(900,), options={"style": "yarn"}), "no option style"),
        (Settings(lengths=(900,), depths=(0.5, 7.0)), "fractions of the document"),
        (Settings(lengths=(900,), text=" \n"), "the text to hide facts in is empty"),
    ):
        with pytest.raises(ValueError, match=says):
            list(TASK.samples(tokenizer, settings))
    with pytest.raises(ValueError, match="two samples called"):
        runner.plan({TASK: Settings(lengths=(300,), depths=(0.5, 0.5), samples=1)}, tokenizer)


@pytest.mark.parametrize("method", [longreach.SelfExtend(8, 64), longreach.LMInfinite(n_local=100), longreach.Stock()], ids=lambda method: method.name)
def test_a_document_is_read_once_and_the_answers_are_those_of_separate_readings(method, tokenizer):
    items = runner.plan({TASK: Settings(lengths=(300, 400), depths=(0.0, 0.5, 1.0), samples=2)}, tokenizer)
    asked = ordered(items)
    assert [item.document for item in asked[::3]] == [item.document for item in asked[2::3]] and len({item.document for item in asked}) == 4
    assert [item.sample.meta["length_target"] for item in asked] == [400] * 6 + [300] * 6
    model, _ = longreach.load("nano")
    with longreach.extend(model, method) as extension:
        engine = ModelEngine(model, tokenizer, extension)
        for n, item in enumerate(asked):
            prompt = budget.encode(tokenizer, item.sample)
            reply, alone = engine.answer(prompt), ModelEngine(model, tokenizer, extension).answer(prompt)
            assert reply.reused == (prompt.shared if n % 3 else 0) and prompt.shared == item.shared > 0.8 * item.tokens
            assert (reply.text, reply.tokens, reply.finish) == (alone.text, alone.tokens, alone.finish) and alone.reused == 0


def test_results_say_which_key_was_asked_for(tokenizer, tmp_path):
    items = runner.plan({TASK: Settings(lengths=(300,), depths=(0.0, 1.0), samples=1)}, tokenizer)
    runner.run(items, First(), tokenizer, Folder(tmp_path), {"passkeys": "hash"})
    records = Folder(tmp_path).records()
    assert [record.meta for record in records] == [{"index": 0, "name": item.sample.meta["name"], "keys": 2} for item in items]
    assert [(record.depth, record.metrics) for record in records] == [(0.0, {"accuracy": 1.0}), (1.0, {"accuracy": 1.0})]
