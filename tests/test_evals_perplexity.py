"""Perplexity: the identities between the protocols, plain forwards as the truth, and bits per byte."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import longreach
from families import build, tokens
from longreach import LMInfinite, SelfExtend, Stock
from longreach.evals.harness import perplexity
from longreach.evals.harness.perplexity import Document

BOS = 1


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", eos_token_id=None)


DOCUMENTS = [Document(tokens(1, n, seed)[0], torch.full((n,), 3)) for n, seed in ((150, 5), (190, 6))]
METHODS = [Stock(), SelfExtend(8, 16), LMInfinite(32, 4)]


def forward(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(ids[None], use_cache=False).logits[0].float()
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none").double()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_positions_average_to_truncated_and_both_are_plain_forwards(model, method):
    with longreach.extend(model, method) as extension:
        curve, each = perplexity.positions(extension, DOCUMENTS)
        points = perplexity.truncated(DOCUMENTS, each, (40, 100, 150))
        for point in points:
            length = point.length
            assert curve.mean[1:length].mean().item() == pytest.approx(point.nll, abs=1e-9)
            want = sum(forward(model, doc.ids[:length]).mean().item() for doc in DOCUMENTS) / 2
            assert point.nll == pytest.approx(want, abs=1e-4) and point.perplexity == pytest.approx(math.exp(point.nll))
            assert (point.documents, point.tokens) == (2, 2 * (length - 1)) and point.low <= point.nll <= point.high
    assert curve.count.tolist() == [0] + [2] * 149 + [1] * 40
    two = torch.stack([found[1:150] for found in each])
    torch.testing.assert_close(curve.variance[1:150], two.var(0))
    assert (curve.variance[150:] == 0).all() and curve.mean[0].isnan()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("bos", [None, BOS])
def test_sliding_is_what_every_window_alone_gives(model, method, bos):
    doc = DOCUMENTS[0]
    body = 50 - (bos is not None)
    with longreach.extend(model, method) as extension:
        scored, means, before, end = [], [], 0, body
        while True:
            window = doc.ids[max(0, end - body) : end]
            read = window if bos is None else torch.cat([torch.tensor([bos]), window])
            found = forward(model, read)[-(end - before) :]
            scored.append(found)
            means.append(found.mean().item())
            if end == len(doc):
                break
            before, end = end, min(len(doc), end + 20)
        for weighting, want in (("token", torch.cat(scored).mean().item()), ("window", sum(means) / len(means))):
            for chunk_size in (512, 7):
                point = perplexity.sliding(extension, [doc], 50, 20, bos=bos, weighting=weighting, chunk_size=chunk_size)
                assert point.nll == pytest.approx(want, abs=1e-4) and point.tokens == len(doc) - (bos is None)


def test_a_stride_of_the_window_gives_disjoint_windows(model):
    doc = DOCUMENTS[0]
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        point = perplexity.sliding(extension, [doc], 51, 50, bos=BOS)
        pieces = [forward(model, torch.cat([torch.tensor([BOS]), piece])) for piece in doc.ids.split(50)]
        assert point.nll == pytest.approx(torch.cat(pieces).mean().item(), abs=1e-4)
        opened = Document(torch.cat([torch.tensor([BOS]), doc.ids]), None)  # its own first token is the one that opens windows
        assert perplexity.sliding(extension, [opened], 51, 50, bos=BOS).nll == pytest.approx(point.nll, abs=1e-9)
        with pytest.raises(ValueError, match="the stride must be 1 to 50"):
            perplexity.sliding(extension, [doc], 51, 51, bos=BOS)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_chunks_change_nothing(model, method):
    with longreach.extend(model, method) as extension:
        one, many = (perplexity.positions(extension, DOCUMENTS, chunk_size=size)[0] for size in (512, 13))
        torch.testing.assert_close(one.mean[1:], many.mean[1:], atol=1e-4, rtol=0)
        whole = perplexity.losses(extension, DOCUMENTS[0].ids)[1:].double()
        for chunk_size in (64, 17):
            stretches = list(perplexity.streaming(extension, DOCUMENTS[0].ids, every=40, chunk_size=chunk_size))
            assert [s.end for s in stretches] == [40, 80, 120, 150] and [s.tokens for s in stretches] == [39, 40, 40, 30]
            want = [whole[max(0, a - 1) : b - 1].mean().item() for a, b in ((0, 40), (40, 80), (80, 120), (120, 150))]
            assert [s.nll for s in stretches] == pytest.approx(want, abs=1e-4)


def test_the_stock_model_needs_no_extension(model):
    found = perplexity.losses(model, DOCUMENTS[0].ids)
    torch.testing.assert_close(found[1:].double(), forward(model, DOCUMENTS[0].ids), atol=1e-4, rtol=0)
    assert found[0].isnan()


def test_a_text_in_one_forward_needs_room_for_its_logits(model, monkeypatch):
    ids = tokens(1, 150, 5)[0]
    size = 150 * model.config.vocab_size * 4
    monkeypatch.setattr(perplexity, "free_memory", lambda device: size - 1)
    with pytest.raises(ValueError, match=r"the logits of 150 tokens take .* pass a shorter text, or a method"):
        perplexity.losses(model, ids)
    with longreach.extend(model, Stock()) as extension:  # in chunks no room is needed
        assert len(perplexity.losses(extension, ids, 64)) == 150
    monkeypatch.setattr(perplexity, "free_memory", lambda device: size)
    assert len(perplexity.losses(model, ids)) == 150


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    tokenizer = longreach.load("nano")[1]
    text = "Call me Ishmael: naïve café, 日本 \N{GRINNING FACE}!"
    doc = perplexity.document(tokenizer, text)
    assert doc.bytes is not None and doc.bytes.sum().item() == len(text.encode()) and doc.ids[0] == tokenizer.bos_token_id
    losses = torch.full((len(doc),), 2.0)
    losses[0] = math.nan
    (point,) = perplexity.truncated([doc], [losses.double()], [len(doc)])
    assert point.bits_per_byte == pytest.approx(2.0 * (len(doc) - 1) / math.log(2) / len(text.encode()))
    assert perplexity.bits_per_byte([(Document(doc.ids, None), losses)]) is None


def test_what_cannot_be_is_refused(model):
    with pytest.raises(ValueError, match="fewer than 2 tokens"):
        perplexity.positions(model, [Document(torch.tensor([5]), None)])
    with pytest.raises(ValueError, match="no document has 500 tokens"):
        perplexity.truncated(DOCUMENTS, [torch.zeros(150), torch.zeros(190)], [500])
    with pytest.raises(ValueError, match="every must be at least 1"):
        list(perplexity.streaming(model, DOCUMENTS[0].ids, every=0))
