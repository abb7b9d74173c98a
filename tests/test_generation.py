"""A request draws its own random numbers: the same seed gives the same answer, whatever else happens, and the process goes on with its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longreach.running import generation
from longreach.running.generation import Sampling
from tiny import llama, tokenizer

HOT = Sampling(temperature=5.0, seed=3)
PROMPT = list(range(20, 40))


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def sampled(model: Any, sampling: Sampling = HOT, **more: Any) -> list[int]:
    return generation.answer(model, tokenizer(), PROMPT, 12, sampling=sampling, **more).ids


def test_the_same_seed_gives_the_same_answer(model: Any) -> None:
    torch.manual_seed(1)
    one = sampled(model)
    torch.rand(7)
    assert sampled(model) == one != sampled(model, Sampling(5.0, seed=4)) and len(one) > 4
    torch.manual_seed(HOT.seed)  # as the whole process would be seeded
    logits = model(torch.tensor([PROMPT])).logits[0, -1].float() / 5.0
    assert one[0] == int(torch.multinomial(logits.softmax(-1), 1))


@pytest.mark.parametrize("sampling", [HOT, generation.GREEDY, Sampling(1.0, seed=-(2**63))])
def test_the_random_state_of_the_caller_is_left_alone(model: Any, sampling: Sampling) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    sampled(model, sampling)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, ValueError])
def test_also_where_an_answer_is_broken_off(model: Any, failure: type[BaseException]) -> None:
    written: list[str] = []

    def fail(text: str) -> None:
        written.append(text)
        if len("".join(written)) > 2:
            raise failure

    before = torch.get_rng_state()
    with pytest.raises(failure):
        sampled(model, write=fail)
    assert torch.equal(torch.get_rng_state(), before) and written


def test_a_request_within_a_request_changes_neither(model: Any) -> None:
    one, inner = sampled(model), []
    outer = sampled(model, write=lambda text: inner.append(sampled(model)) if len(inner) < 2 else None)
    assert outer == one and inner == [one, one]
