"""Generation for many prompts together: the tokens of each are those that it gets alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import longreach
from families import build, tokens
from longreach import LMInfinite, SelfExtend, Stock
from longreach.hf.flat import Flat
from longreach.running.generation import Sampling
from longreach.running.together import Pool, Request
from methods_matrix import METHODS, context, refusal

LENGTHS = [3, 260, 41, 1, 400, 90, 7]
NEW = 6


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", eos_token_id=None)


def prompts() -> list[torch.Tensor]:
    return [tokens(1, n, seed=40 + n)[0] for n in LENGTHS]


def alone(model: Any, prompt: torch.Tensor, **more: Any) -> list[int]:
    arguments = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **more}
    return model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **arguments)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("method", [method for method in METHODS if method.eviction is None], ids=str)
def test_greedy_tokens_are_those_of_each_alone(method):
    model = build("llama-head8" if refusal("llama", method) else "llama", eos_token_id=None)
    with longreach.extend(model, method, context=context(method, max(LENGTHS) + NEW)) as extension:
        done: list[int] = []
        found = longreach.generate(extension, prompts(), NEW, at_once=4, chunk_size=64, progress=done.append)
        assert [f.ids for f in found] == [alone(model, prompt) for prompt in prompts()]
        assert {f.finish for f in found} == {"length"} and done == list(range(1, len(LENGTHS) + 1))


@pytest.mark.parametrize(("at_once", "chunk_size"), [(1, 512), (3, 1), (16, 100_000)])
def test_how_they_are_scheduled_changes_nothing(model, at_once, chunk_size):
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        want = [alone(model, prompt) for prompt in prompts()]
        assert [f.ids for f in longreach.generate(extension, prompts(), NEW, at_once=at_once, chunk_size=chunk_size)] == want


def test_end_tokens_end_one_request_and_not_the_others(model):
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        want = [alone(model, prompt) for prompt in prompts()]
        ends = [want[1][2], want[4][0]]
        model.generation_config.eos_token_id = ends
        try:
            found = longreach.generate(extension, [prompt.tolist() for prompt in prompts()], NEW)
        finally:
            model.generation_config.eos_token_id = None
        for ids, own in zip(want, found):
            stop = next((n for n, token in enumerate(ids) if token in ends), None)
            assert own.ids == (ids if stop is None else ids[: stop + 1]) and own.finish == ("length" if stop is None else "stop")


def test_sampling_depends_on_seed_and_place_alone(model):
    with longreach.extend(model, LMInfinite(9, 3)) as extension:
        draw = lambda seed, **more: [f.ids for f in longreach.generate(extension, prompts(), NEW, sampling=Sampling(1.5, 0.9, seed), **more)]  # noqa: E731
        first = draw(7)
        assert draw(7, at_once=2, chunk_size=33) == first != draw(8)
        cold = [f.ids for f in longreach.generate(extension, prompts(), NEW, sampling=Sampling(1e-4, None, 3))]
        assert cold == [f.ids for f in longreach.generate(extension, prompts(), NEW)]


def test_the_settings_of_the_checkpoint_are_honoured_or_refused(model):
    with longreach.extend(model, Stock()) as extension:
        model.generation_config.repetition_penalty = 1.7
        try:
            assert [f.ids for f in longreach.generate(extension, prompts(), NEW)] == [alone(model, prompt) for prompt in prompts()]
            model.generation_config.no_repeat_ngram_size = 2
            with pytest.raises(ValueError, match=r"no_repeat_ngram_size=2, which is not honoured here; set model\.generation_config"):
                longreach.generate(extension, prompts(), NEW)
        finally:
            model.generation_config.repetition_penalty = model.generation_config.no_repeat_ngram_size = None


def test_requests_share_forwards_and_leave_no_memory(model, monkeypatch):
    reads, real = [], Flat.read
    monkeypatch.setattr(Flat, "read", lambda self, new, *more: reads.append({name: len(ids) for name, ids in new.items()}) or real(self, new, *more))
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        extension.flat()  # is checked once
        reads.clear()
        longreach.generate(extension, prompts(), NEW, at_once=16, chunk_size=512)
        assert len(reads) == 2 + NEW - 1  # the whole of the prompts is read in two forwards of 512 tokens
        assert sum(reads[0].values()) == 512 and len(reads[-1]) >= 1


@pytest.mark.parametrize("at_once", [1, 2, 3, 16])
@pytest.mark.parametrize("method", [SelfExtend(3, 8), LMInfinite(9, 3), LMInfinite(9, 3, top_k=2)], ids=str)
def test_a_document_is_read_once_for_its_questions(model, method, at_once):
    """Questions of a document, a prompt of its own, questions of another one, and an answer that its request ends: each as if alone."""
    documents = [tokens(1, n, seed=n)[0].tolist() for n in (300, 170)]
    asked = [[document + tokens(1, 3 + n, seed=n)[0].tolist() for n in range(count)] for document, count in zip(documents, (3, 2))]
    with longreach.extend(model, method) as extension:
        own = tokens(1, 50, seed=50)[0].tolist()
        want = {tuple(ids): alone(model, torch.tensor(ids)) for ids in [*asked[0], own, *asked[1]]}
        pool, lengths = Pool(extension, at_once=at_once, chunk_size=64), [4, 1, 6]
        requests = [Request(ids, n) for ids, n in zip(asked[0], lengths)]
        pool.add(requests, shared=300)
        pool.add([Request(own, NEW, stop=lambda new: len(new) == 3)])
        pool.add([Request(ids, NEW) for ids in asked[1]], shared=170)
        read, found, most = 0, {}, 0
        while pool.busy:
            turn = pool.step()
            most = max(most, pool.held)
            read += sum(b - a for a, b in turn.reads.values())
            found |= {tuple(request.ids): (request, generated) for request, generated in turn.done.items()}
        assert len(found) == 6 and most <= at_once
        for ids, (request, generated) in found.items():
            count = 3 if ids == tuple(own) else request.max_new_tokens
            assert generated.ids == want[ids][:count] and generated.finish == ("stop" if ids == tuple(own) else "length")
        shares = at_once > 1 and method.cut == 1
        written = sum(len(generated.ids) - 1 for _, generated in found.values())
        assert read == written + sum(map(len, want)) - (2 * 300 + 170 if shares else 0)


def test_what_cannot_be_is_refused(model):
    with longreach.extend(model, SelfExtend(3, 8), context=100) as extension:
        assert longreach.generate(extension, []) == []
        for arguments, says in (
            (([[]],), "prompt 0: a prompt needs at least one token"),
            (([[1], [2] * 99], 2), "prompt 1: a prompt has 99 tokens, and with 2 new ones it exceeds the declared context of 100"),
            (([[1]], 0), "max_new_tokens must be at least 1"),
        ):
            with pytest.raises(ValueError, match=says):
                longreach.generate(extension, *arguments)
