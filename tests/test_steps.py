"""One new token for each of several rows of any lengths: few calls, and every row as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import longreach
from families import build, tokens
from longreach import LMInfinite, SelfExtend, Stock, StreamingLLM
from longreach.hf.cache import store_of
from longreach.kernels.cpu import CpuKernel
from longreach.kernels.protocol import Spans
from longreach.memory.placement import SMALLEST
from methods_matrix import METHODS, context, refusal, slow_truths

LENGTHS = [1, 2, 37, 250, 251, 400, 620]  # of several buckets
STEPS = 4
INVARIANT = [m for m in METHODS if m.cut == 1 and m.eviction is None]


def read(model: Any, lengths: list[int], seed: int = 5) -> tuple[list[torch.Tensor], torch.Tensor, Any]:
    """-> texts with a few tokens more, the mask so far, the cache."""
    texts = [tokens(1, n + STEPS, seed=seed + row)[0] for row, n in enumerate(lengths)]
    width = max(lengths)
    ids = torch.stack([F.pad(text[:n], (width - n, 0)) for text, n in zip(texts, lengths)])
    mask = torch.stack([F.pad(torch.ones(n, dtype=torch.long, device=ids.device), (width - n, 0)) for n in lengths])
    return texts, mask, model(ids, attention_mask=mask, use_cache=True).past_key_values


def check(model: Any, lengths: list[int], limit: float = 1e-5) -> None:
    texts, mask, cache = read(model, lengths)
    for step in range(STEPS):
        ids, mask = torch.stack([text[n + step : n + step + 1] for text, n in zip(texts, lengths)]), F.pad(mask, (0, 1), value=1)
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
        for row, (text, n) in enumerate(zip(texts, lengths)):
            alone = model(text[None, : n + step + 1], use_cache=False).logits[0, -1]
            assert ((logits[row] - alone).float().abs().max() / alone.float().abs().max()).item() <= limit, (row, step)


@pytest.mark.parametrize("method", slow_truths(INVARIANT), ids=str)
@torch.no_grad()
def test_every_row_is_as_if_it_were_alone(method):
    model = build("llama-head8" if refusal("llama", method) else "llama")
    with longreach.extend(model, method, context=context(method, max(LENGTHS) + STEPS)):
        check(model, LENGTHS)


@pytest.mark.parametrize("method", [SelfExtend(3, 8), StreamingLLM(60, 4)], ids=str)
@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "gptj", "deepseek-v3", "falcon-alibi", "mistral-sliding", "phi3", "qwen3"])
@torch.no_grad()
def test_in_other_families(family, method):
    if refusal(family, method):
        pytest.skip("refused")
    model = build(family)
    with longreach.extend(model, method, context=context(method, max(LENGTHS) + STEPS)):
        check(model, LENGTHS[1:])


@torch.no_grad()
def test_in_half_precision():
    model = build("llama", torch.bfloat16)
    with longreach.extend(model, SelfExtend(3, 8)):
        check(model, LENGTHS, limit=6e-2)


@pytest.mark.parametrize("method", [SelfExtend(3, 8), LMInfinite(9, 3), Stock()], ids=str)
@torch.no_grad()
def test_a_bucket_is_one_call_of_a_segment(method, monkeypatch):
    """Thirty rows in three buckets, whatever their lengths."""
    model, lengths = build("llama"), [20 + 3 * row for row in range(10)] + [SMALLEST + 20 + row for row in range(10)] + [450 + row for row in range(10)]
    real, works = CpuKernel.attend, []

    def attend(self: CpuKernel, q: torch.Tensor, kv: Any, work: Any, *more: Any) -> Any:
        works.append(work)
        return real(self, q, kv, work, *more)

    with longreach.extend(model, method, trained_window=4096) as extension:
        texts, mask, cache = read(model, lengths)
        ids = torch.stack([text[n : n + 1] for text, n in zip(texts, lengths)])
        monkeypatch.setattr(CpuKernel, "attend", attend)
        model(ids, attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=cache)
        segments = sum(len(layer.layout.segments) for layer in extension.facts.layers)
        buckets = max(len(placement.places.members) for placement in store_of(cache).placements.values())
        assert buckets == (1 if isinstance(method, LMInfinite) else 3)
        assert all(isinstance(work, Spans) for work in works) and len(works) <= segments * buckets
        assert sum(len(work.starts) for work in works) <= segments * len(lengths)


@torch.no_grad()
def test_rows_that_have_forgotten_their_last_tokens_are_not_among_them():
    """A mask hides the end of one row: its next token takes an earlier place, and the others go on."""
    model = build("llama")
    with longreach.extend(model, SelfExtend(3, 8)):
        texts, mask, cache = read(model, [30, 200, 310])
        mask = F.pad(mask, (0, 1), value=1)
        mask[1, 300:310] = 0  # the last ten tokens that the second row has read
        ids = torch.stack([text[n : n + 1] for text, n in zip(texts, (30, 200, 310))])
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
        want = [texts[0][:31], torch.cat([texts[1][:190], texts[1][200:201]]), texts[2][:311]]
        for row, ids in enumerate(want):
            alone = model(ids[None], use_cache=False).logits[0, -1]
            assert ((logits[row] - alone).abs().max() / alone.abs().max()).item() <= 1e-5


@torch.no_grad()
def test_nothing_that_another_row_left_behind_is_seen():
    """NaN lies where a row was cropped, and a mask would not hide it."""
    model = build("llama")
    with longreach.extend(model, SelfExtend(3, 8)):
        texts, mask, cache = read(model, [30, 60])
        broken = model.get_input_embeddings()(torch.stack([text[:4] for text in texts])) * float("nan")
        model(inputs_embeds=broken, attention_mask=F.pad(mask, (0, 4), value=1), past_key_values=cache)
        cache.crop(-4)
        ids = torch.stack([text[n : n + 1] for text, n in zip(texts, (30, 60))])
        logits = model(ids, attention_mask=F.pad(mask, (0, 1), value=1), past_key_values=cache).logits[:, -1]
        for row, n in enumerate((30, 60)):
            alone = model(texts[row][None, : n + 1], use_cache=False).logits[0, -1]
            assert ((logits[row] - alone).abs().max() / alone.abs().max()).item() <= 1e-5
