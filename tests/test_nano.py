"""Behaviour of the embedded model: what it can do inside its window, and what each method adds beyond it."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import longreach
from longreach import LMInfinite
from longreach.evals.samples import haystack
from longreach.running import generation
from longreach.running.loading import shipped_book

QUESTION_ONLY = haystack.Wording(lead="")  # nano begins its answer itself


@functools.lru_cache(maxsize=1)
def nano():
    model, tokenizer = longreach.load("nano")
    return model, tokenizer, tokenizer.encode(shipped_book()[:150_000], add_special_tokens=False)


def found(length: int, depths: list[float], trials: int, extension=None) -> float:
    """Share of keys that greedy decoding gives."""
    model, tokenizer, _ = nano()
    hits, rng = [], Random(length)
    for depth in depths * trials:
        asked = haystack.trial(tokenizer, shipped_book(), length, depth, rng, wording=QUESTION_ONLY)
        answer = generation.answer(model, tokenizer, asked.ids, 14, extension=extension).text
        hits.append(haystack.number_in(answer) == asked.key)
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


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("pass key, all trained wordings", 0.85),
        ("pass key, held-out wording", 0.8),
        ("one of three labelled keys", 0.7),
        ("needle sentence", 0.7),
        ("one of six key-value pairs", 0.6),
    ],
)
def test_questions_inside_the_window_are_answered(kind, least):
    """What the card says, on another book and with room for chance: 24 questions."""
    recipes = str(Path(__file__).resolve().parent.parent / "recipes")
    sys.path.insert(0, recipes)
    try:
        import abilities
        from training_rows import Rows
    finally:
        sys.path.remove(recipes)
    model, tokenizer, text = nano()
    books = np.asarray(text, dtype=np.uint16)
    rows, rng = Rows(tokenizer.backend_tokenizer, books), Random(kind)
    assert sum(abilities.found(model, [abilities.trial(rows, books, kind, rng, 512) for _ in range(24)])) >= 24 * least


@pytest.mark.slow  # README's first command shows it too, in tests/test_readme.py
def test_far_beyond_the_window_selfextend_finds_what_stock_does_not():
    """Four times the window, keys farther away than the window. The dial chooses the parameters."""
    model, _, _ = nano()
    depths = [0.05, 0.3, 0.6]
    stock = found(2048, depths, 3)
    with longreach.extend(model, context=2048) as extension:
        extended = found(2048, depths, 3, extension)
    with longreach.extend(model, LMInfinite(512, 4)) as extension:
        local = found(2048, depths, 3, extension)
    assert stock <= 0.2 and extended >= 0.7 and local <= 0.2


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
    assert stock > extended + 0.1 and stock > local + 0.2  # at the same positions of the same text
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
