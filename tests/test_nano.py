"""Behaviour of the embedded model: what it can do inside its window, and what each method adds beyond it."""

from __future__ import annotations

import functools
from random import Random

import pytest
import torch
import torch.nn.functional as F

import longreach
from longreach import LMInfinite
from longreach.loading import shipped_book


@functools.lru_cache(maxsize=1)
def nano():
    model, tokenizer = longreach.load("nano")
    return model, tokenizer, tokenizer.encode(shipped_book()[:150_000], add_special_tokens=False)


def haystack(length: int, depth: float, key: str, seed: int) -> tuple[list[int], list[int]]:
    """-> prompt and answer, `length` tokens together, with the key at `depth` of a passage that nano never saw."""
    _, tokenizer, text = nano()
    encode = lambda s: tokenizer.encode(s, add_special_tokens=False)  # noqa: E731
    hidden, question = encode(f" The pass key is {key}. Remember it. {key} is the pass key."), encode("\n\nWhat is the pass key?")
    answer = encode(f" The pass key is {key}.")
    room = length - 1 - len(hidden) - len(question) - len(answer)
    start = Random(seed).randrange(len(text) - room)
    at = round(depth * room)
    return [tokenizer.bos_token_id, *text[start : start + at], *hidden, *text[start + at : start + room], *question], answer


@torch.no_grad()
def found(length: int, depths: list[float], trials: int) -> float:
    """Share of keys that greedy decoding gives."""
    model, _, _ = nano()
    hits = []
    for trial in range(trials):
        for depth in depths:
            prompt, answer = haystack(length, depth, str(Random(trial * 97 + int(depth * 100)).randrange(10000, 100000)), trial)
            ids = torch.tensor([prompt + answer])
            hits.append(model(ids, use_cache=False).logits[0, -len(answer) - 1 : -1].argmax(-1).tolist() == answer)
    return sum(hits) / len(hits)


def test_it_loads_small_and_writes_words():
    model, tokenizer, _ = nano()
    assert sum(p.numel() for p in model.parameters()) < 8e6 and model.config.max_position_embeddings == 512
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokenizer.encode("It was 1851, in New Bedford.", add_special_tokens=False)) == "It was 1851, in New Bedford."
    assert len(tokenizer.encode("12345", add_special_tokens=False)) == 5
    torch.manual_seed(0)
    words = tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0, 4:])
    assert sum(w.strip(".,;'\"").isalpha() for w in words.split()) >= 15


def test_pass_keys_inside_the_window_are_found():
    assert found(512, [0.0, 0.3, 0.6, 1.0], 4) >= 0.9


def test_far_beyond_the_window_selfextend_finds_what_stock_does_not():
    """Four times the window, keys farther away than the window. The dial chooses the parameters."""
    model, _, _ = nano()
    depths = [0.05, 0.3, 0.6]
    stock = found(2048, depths, 3)
    with longreach.extend(model, context=2048):
        extended = found(2048, depths, 3)
    with longreach.extend(model, LMInfinite(512, 4)):
        local = found(2048, depths, 3)
    assert stock <= 0.2 and extended >= 0.6 and local <= 0.2


@torch.no_grad()
def test_beyond_the_window_both_methods_keep_the_loss_that_stock_loses():
    model, tokenizer, text = nano()
    ids = torch.tensor([[tokenizer.bos_token_id, *text[:4095]]])

    def loss(span: slice) -> float:
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        return F.cross_entropy(logits, ids[0, 1:], reduction="none")[span].mean().item()

    inside, beyond = loss(slice(128, 511)), slice(2048, 4095)
    stock = loss(beyond)
    with longreach.extend(model, context=4096):
        extended = loss(beyond)
    with longreach.extend(model, LMInfinite(512, 4)):
        local = loss(beyond)
    assert stock > inside + 0.5
    assert extended < inside + 0.35 and local < inside + 0.25


@pytest.mark.slow
def test_a_stream_is_as_good_as_a_sliding_window_re_run():
    """50,000 tokens through LM-Infinite against stock re-run on <bos> + the last window, at sampled positions."""
    model, tokenizer, _ = nano()
    ids = torch.tensor(tokenizer.encode(shipped_book()))[:50_000]
    positions = sorted(Random(0).sample(range(1024, len(ids)), 400))
    with longreach.extend(model, LMInfinite(512, 4)) as extension:
        chunks = list(longreach.stream(extension, ids, chunk_size=1024))
    losses = torch.cat([c.losses for c in chunks])[positions]
    assert len({c.store_bytes for c in chunks[2:]}) == 1
    with torch.no_grad():
        rows = torch.stack([torch.cat([ids[:1], ids[p - 511 : p]]) for p in positions])
        logits = torch.cat([model(part, use_cache=False, logits_to_keep=1).logits[:, -1] for part in rows.split(50)])
    stock = F.cross_entropy(logits.float(), ids[positions], reduction="none")
    assert abs(losses.mean() - stock.mean()) <= 0.02 * stock.mean()
