"""Prompts that share beginnings, read together and as a tree, give what each gives alone; and what they share is read once."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import longreach
from longreach import Combined, DualChunk, InfiniteHiP, InfLLM, LMInfinite, LongHeads, Quest, SelfExtend, SirLLM, Stock, YaRN
from longreach.running.continuations import LEAST, Continuations, Stopped, total
from tiny import llama

METHODS = [
    Stock(), SelfExtend(3, 8), LMInfinite(9, 3), DualChunk(24), Combined(YaRN(2.0), LMInfinite(9, 3)), Quest(12, 4, 1, "all"), InfLLM.small(4),
    InfiniteHiP.small(4), LongHeads.small(4),
]  # fmt: skip
ANSWER = [7, 11, 5, 250, 9]


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def prompts(seed: int = 0) -> list[list[int]]:
    """A tree of beginnings: some prompts share much, some nothing, two are the same, and one is the beginning of others."""
    rng = Random(seed)
    some = lambda n: [rng.randrange(3, 259) for _ in range(n)]  # noqa: E731
    head, first, second = some(30), some(23), some(41)
    return [
        head + first + some(5), head + first + some(17), head + second, head + first + second + some(1), head, some(9), some(1), head + second,
        head + first + second + some(2), head[:13] + some(50),
    ]  # fmt: skip


@torch.no_grad()
def alone(extension: Any, ids: list[int], answer: list[int]) -> float:
    """The prompt in one forward; then the answer token by token, as it is decoded."""
    cache, found = DynamicCache(), []
    for step in [ids, *([token] for token in answer[:-1])]:
        found.append(extension.model(input_ids=torch.tensor([step]), past_key_values=cache, use_cache=True).logits[0, -1].double().log_softmax(-1))
    return sum(float(row[token]) for row, token in zip(found, answer))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_each_is_as_alone(model, method):
    with longreach.extend(model, method, context=120 if method.needs_context else None) as extension:
        expected = [alone(extension, ids, ANSWER) for ids in prompts()]
        for how in (dict(), dict(at_once=2, chunk_size=9), dict(at_once=1, chunk_size=16)):
            reader = Continuations(extension, **how)
            assert reader.log_probabilities(prompts(), ANSWER) == pytest.approx(expected, abs=1e-4), how
            assert reader.alone is None
        assert Continuations(extension).log_probabilities(prompts()[:1], ANSWER[:1]) == pytest.approx([alone(extension, prompts()[0], ANSWER[:1])], abs=1e-4)


def test_it_is_the_loss_of_the_model(model):
    """As stock Transformers counts it: the mean over the labels."""
    ids = prompts()[3]
    labels = torch.tensor([[-100] * len(ids) + ANSWER])
    with torch.no_grad():
        expected = -float(model(input_ids=torch.tensor([ids + ANSWER]), labels=labels).loss) * len(ANSWER)
    with longreach.extend(model, Stock()) as extension:
        assert Continuations(extension).log_probabilities([ids], ANSWER) == pytest.approx([expected], abs=1e-4)


def test_what_is_shared_is_read_once(model):
    asked = prompts()
    beginnings = {tuple(ids[:n]) for ids in asked for n in range(1, len(ids))}  # all nodes of the tree, but the ends, which are read with the answer
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        readers = Continuations(extension), Continuations(extension, at_once=1)
        for reader in readers:
            seen: list[int] = []
            reader.log_probabilities(asked, ANSWER, done=seen.append)
    ends = len({tuple(ids) for ids in asked})
    assert readers[0].tokens == readers[1].tokens == len(beginnings) + ends * len(ANSWER) + 1  # where one ends, two branches go on, and each reads that token
    assert seen == [*range(1, ends + 1)]
    assert readers[0].forwards < readers[1].forwards - ends // 2


def test_turns_are_not_shared(model):
    """A method that evicts has no flat forwards, which is said; each prompt is read as by itself."""
    with longreach.extend(model, SirLLM(12, 4, 16)) as extension:
        reader = Continuations(extension)
        together = reader.log_probabilities(prompts(), ANSWER)
        assert reader.alone is not None and "evicts" in reader.alone
        assert together == pytest.approx([Continuations(extension).log_probabilities([ids], ANSWER)[0] for ids in prompts()], abs=1e-5)
        asked = {tuple(ids) for ids in prompts()}
        assert reader.tokens == sum(map(len, asked)) + len(asked) * len(ANSWER)


def test_stopped_between_forwards(model):
    with longreach.extend(model, Stock()) as extension:
        calls = iter([False, False, True])
        reader = Continuations(extension, chunk_size=8)
        with pytest.raises(Stopped):
            reader.log_probabilities(prompts(), ANSWER, stopped=lambda: next(calls))
        assert reader.forwards == 2


def test_a_token_that_is_ruled_out_costs_much_and_nan_is_refused():
    logits = torch.tensor([[0.0, -math.inf], [0.0, 0.0]])
    assert total(logits, [1, 0]) == pytest.approx(LEAST - math.log(2))
    with pytest.raises(ValueError, match="NaN"):
        total(logits * math.nan, [0, 1])


def test_what_is_refused(model):
    with longreach.extend(model, SelfExtend(3, 8), context=40) as extension:
        for wrong in (dict(at_once=0), dict(chunk_size=0)):
            with pytest.raises(ValueError, match="at least 1"):
                Continuations(extension, **wrong)
        reader = Continuations(extension)
        with pytest.raises(ValueError, match=r"context of 40.*context=41"):
            reader.log_probabilities([[5] * 36], ANSWER)
        with pytest.raises(ValueError, match="continuation has no tokens"):
            reader.log_probabilities([[5]], [])
        with pytest.raises(ValueError, match="a prompt has no tokens"):
            reader.log_probabilities([[]], ANSWER)
