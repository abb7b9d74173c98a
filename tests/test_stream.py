"""Streaming: losses do not depend on the chunks, memory does not grow, generation can go on from the state."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import longreach
from families import build, tokens
from longreach import LMInfinite, SelfExtend, Stock, StreamingLLM
from longreach.memory.placement import ROLLBACK, SLACK


@pytest.fixture(scope="module")
def model():
    return build("llama", eos_token_id=None)


@pytest.mark.parametrize("method", [LMInfinite(32, 4), SelfExtend(8, 16), StreamingLLM(32, 4)], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 17, 100, 1000])
@torch.no_grad()
def test_losses_are_those_of_one_forward(model, method, chunk_size):
    ids = tokens(1, 300)
    with longreach.extend(model, method) as extension:
        logits = model(ids, use_cache=False).logits[0]
        want = F.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        chunks = list(longreach.stream(extension, ids[0], chunk_size=chunk_size))
        losses = torch.cat([c.losses for c in chunks])
        assert losses[0].isnan() and [c.start for c in chunks] == list(range(0, 300, chunk_size))
        torch.testing.assert_close(losses[1:], want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("method", "entries"),
    [
        (LMInfinite(64, 4), 2 * (64 + ROLLBACK + SLACK) + 2 * 4),
        (StreamingLLM(60, 4), 2 * (61 + ROLLBACK + SLACK) + 3 * 4),
        (StreamingLLM(60, 4, counting="chunkable"), 2 * (60 + ROLLBACK + SLACK) + 2 * 4),
    ],
    ids=str,
)
def test_memory_is_constant_on_an_endless_iterator(model, method, entries):
    endless = itertools.cycle(tokens(1, 997)[0].tolist())
    with longreach.extend(model, method) as extension:
        sizes = []
        for chunk in itertools.islice(longreach.stream(extension, endless, chunk_size=500), 8):
            assert not chunk.losses[1:].isnan().any()
            sizes.append(chunk.store_bytes)
        layers, heads, width, item = 2, 1, 16, 4
        assert set(sizes) == {layers * heads * width * item * entries}


@torch.no_grad()
def test_the_state_goes_on(model):
    ids = tokens(1, 200)
    with longreach.extend(model, LMInfinite(32, 4)) as extension:
        *_, last = longreach.stream(extension, ids[:, :150], chunk_size=64, losses=False)
        assert last.losses is None
        again = list(longreach.stream(extension, ids[0, 150:], chunk_size=64, cache=last.cache))
        assert again[0].start == 150
        whole = torch.cat([c.losses for c in longreach.stream(extension, ids[0])])
        torch.testing.assert_close(again[0].losses[1:], whole[151:], atol=1e-4, rtol=0)
        *_, state = longreach.stream(extension, ids[0, :199], chunk_size=64, losses=False)
        answer = model.generate(ids, past_key_values=state.cache, max_new_tokens=5, do_sample=False)
        assert torch.equal(answer, model.generate(ids, max_new_tokens=5, do_sample=False))


def test_refusals(model):
    with longreach.extend(model, Stock(), context=64) as extension:
        with pytest.raises(ValueError, match="exceeds the declared context"):
            list(longreach.stream(extension, tokens(1, 100)[0], chunk_size=30))
        with pytest.raises(ValueError, match="chunk_size"):
            next(longreach.stream(extension, [1], chunk_size=0))
        with pytest.raises(ValueError, match="one sequence"):
            next(longreach.stream(extension, tokens(2, 9)))
        assert list(longreach.stream(extension, [])) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [0, 37, 98])
@torch.no_grad()
def test_a_model_that_gives_nan_is_not_scored_on_the_rest(model, bad, token):
    """NaN is what a first token has, which nothing precedes; a loss that a model makes NaN must not look like it."""
    seen = 0

    def spoil(module, args, output):
        nonlocal seen
        if seen <= token < seen + output.shape[1]:
            output[:, token - seen] = bad
        seen += output.shape[1]

    hook = model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(ValueError, match=f"NaN or infinity for token {token + 1}, .*float32"):
            list(longreach.stream(model, tokens(1, 100)[0], chunk_size=30))
    finally:
        hook.remove()


def test_ids_of_other_types(model):
    """Whole numbers of any size are read; others are refused rather than rounded."""
    ids = tokens(1, 40)[0]
    want = torch.cat([chunk.losses for chunk in longreach.stream(model, ids, chunk_size=30)])
    found = torch.cat([chunk.losses for chunk in longreach.stream(model, ids.int(), chunk_size=30)])
    assert torch.equal(found[1:], want[1:])
    for wrong in (ids.float(), ids.bool()):
        with pytest.raises(ValueError, match=r"token ids are whole numbers, not torch.*; pass ids.long\(\)"):
            next(longreach.stream(model, wrong))
