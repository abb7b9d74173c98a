"""The gates: every method on every family. One dense forward per cell is the truth for prefill, chunks, decode and padding."""

from __future__ import annotations

import functools

import pytest
import torch

import longreach
from families import FAMILIES, WINDOW, build, each_once, tokens
from longreach import LMInfinite, SelfExtend, Stock
from longreach.methods import registry
from methods_matrix import METHODS, NEUTRAL, UNROTATED, cells, context, each_family, refusal

LENGTH = 75


@functools.lru_cache(maxsize=2)
def model_of(family: str):
    return build(family)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    assert not a.isnan().any() and not b.isnan().any()
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


def chunked(model, ids: torch.Tensor, sizes: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    cache, start, parts = None, 0, []
    for size in sizes:
        stop = start + size
        out = model(ids[:, start:stop], attention_mask=None if mask is None else mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
        start = stop
    return torch.cat(parts, 1)


def assert_refused(model, method, sentence: str, **arguments) -> None:
    """`extend` raises with the reason, and the model stays as it was."""
    ids = tokens(1, 20)
    before = model(ids).logits
    with pytest.raises(ValueError, match=sentence):
        longreach.extend(model, method, **arguments)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(("family", "method"), cells(METHODS))
@torch.no_grad()
def test_fast_equals_dense(family, method):
    """One shot, cached one shot, chunks with decode, a left-padded batch: all against one dense forward."""
    model, ids = model_of(family), (tokens if method.choice is None else each_once)(2, LENGTH)
    declared = context(method, LENGTH)
    if sentence := refusal(family, method):
        assert_refused(model, method, sentence, context=declared)
        return
    with longreach.extend(model, method, context=declared, backend="reference"):
        truth = model(ids, use_cache=False).logits
    gate = 1e-5
    with longreach.extend(model, method, context=declared):
        assert difference(model(ids, use_cache=False).logits, truth) <= gate
        assert difference(model(ids, use_cache=True).logits, truth) <= gate
        if method.cut == 1:
            sizes = [23, 1, 1, 9, 8, 1, 17, *[1] * 15]
            assert difference(chunked(model, ids, sizes), truth) <= gate
        # rows of unequal length: the second row loses its first 11 tokens and is padded on the left
        mask = torch.ones_like(ids)
        mask[1, :11] = 0
        single = model(ids[1:, 11:], use_cache=False).logits
        if method.cut == 1:
            padded = chunked(model, ids, [40, 5, *[1] * 30], mask)
        else:
            padded = model(ids, attention_mask=mask, use_cache=False).logits
        assert difference(padded[:1], truth[:1]) <= gate
        assert difference(padded[1:, 11:], single) <= gate


@pytest.mark.parametrize(("family", "method"), cells(NEUTRAL))
@torch.no_grad()
def test_neutral_parameters_equal_stock(family, method):
    if family == "mistral-sliding":
        model = build(family, sliding_window=None)  # a method replaces a window that every layer has
        extended = build(family)
    else:
        model = extended = model_of(family)
    ids = tokens(2, 60)
    declared = context(method, 60)
    if sentence := refusal(family, method):
        assert_refused(extended, method, sentence, context=declared, trained_window=WINDOW)
        return
    stock = model(ids[:, :60]).logits
    if family == "mistral-sliding" and isinstance(method, longreach.Stock):
        stock = extended(ids).logits
    # frequencies that switch with the length: 60 tokens are beyond the original window, so are they for stock
    with longreach.extend(extended, method, context=declared, trained_window=WINDOW):
        assert difference(extended(ids, use_cache=False).logits, stock) <= 1e-4
        assert difference(chunked(extended, ids, [30, 1, 20, *[1] * 9]), stock) <= 1e-4


def rotary_of(model) -> torch.nn.Module | None:
    return next((m.rotary_emb for m in model.modules() if hasattr(m, "rotary_emb")), None)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_removal_is_bit_identical(family):
    model, ids = model_of(family), tokens(1, 40)
    before = model(ids).logits
    implementation, rotary = model.config._attn_implementation, rotary_of(model)
    extension = longreach.extend(model, LMInfinite(8, 2) if family in UNROTATED else SelfExtend(4, 8))
    changed = model(ids).logits
    extension.remove()
    extension.remove()
    assert not torch.equal(changed, before)
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == implementation and rotary_of(model) is rotary
    assert not any("longreach" in name for name in dict(model.named_modules()))
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("method", [SelfExtend(1, 16), LMInfinite(60, 4)], ids=str)
@pytest.mark.parametrize("family", each_family())
@torch.no_grad()
def test_bf16_error_is_that_of_stock(family, method):
    """Against an fp32 stock run, our bf16 error is at most 1.5 times that of stock in bf16 (root mean square over logits)."""
    settings = {"sliding_window": None} if family == "mistral-sliding" else {}
    model, ids = build(family, **settings), tokens(4, 48)
    truth = model(ids).logits
    model = model.bfloat16()
    error = lambda logits: (logits.float() - truth).square().mean().sqrt().item()  # noqa: E731
    stock = error(model(ids).logits)
    with longreach.extend(model, method):
        ours = error(model(ids).logits)
        decoded = error(chunked(model, ids, [20, 3, *[1] * 25]))
    assert ours <= 1.5 * stock
    assert decoded <= 1.5 * stock


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_declared_chunk_invariance_is_true_both_ways(method):
    family = "llama-head8" if refusal("llama", method) else "llama"
    model, ids = model_of(family), tokens(1, LENGTH)
    with longreach.extend(model, method, context=context(method, LENGTH)):
        whole = model(ids, use_cache=False).logits
        cut = chunked(model, ids, [30, 1, 9, 35])
    same = difference(cut, whole) <= 1e-4
    assert same == (method.cut == 1)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gpt-oss"])
@torch.no_grad()
def test_sliding_layers_stay_as_trained(family):
    """The method goes on the full layers only; the others keep their window, and the description says so."""
    model = model_of(family)
    with longreach.extend(model, SelfExtend(4, 8)) as extension:
        report = extension.report()
        assert report["layers_with_method"] == [1]
        assert "sliding ones as trained" in extension.describe()
        assert extension.layers[0].method == Stock(sliding_window=24)


@torch.no_grad()
def test_chunked_layers_stay_as_trained():
    """Beyond a chunk the logits are those of the model itself, whose chunks begin anew for every row; the description says what stays."""
    model, ids = model_of("llama4-rope"), tokens(2, LENGTH)
    stock = model(ids).logits
    with longreach.extend(model, SelfExtend(4, 8)) as extension:
        report = extension.report()
        assert report["layers_with_method"] == [1] and report["layers_in_chunks"] == [0]
        assert "chunked ones as trained" in extension.describe()
        assert extension.layers[0].method == Stock(attention_chunk=24)
        assert difference(model(ids).logits, stock) > 1e-2
    with longreach.extend(model, SelfExtend(1, 8)):
        assert difference(model(ids).logits, stock) <= 1e-4
        assert difference(chunked(model, ids, [23, 1, 1, 23, 1, 20, *[1] * 6]), stock) <= 1e-4


@torch.no_grad()
def test_queries_scaled_by_the_model_stay_so():
    """Llama 4 scales the queries of its layers without positions by the slots seen: as stock, and refused where pads would shift them."""
    model, ids = build("llama4", floor_scale=16, attn_scale=0.5), tokens(2, LENGTH)
    stock = model(ids).logits
    assert difference(stock, model_of("llama4")(ids).logits) > 1e-2
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with longreach.extend(model, Stock()):
        assert difference(model(ids).logits, stock) <= 1e-4
        assert difference(chunked(model, ids, [40, *[1] * 35]), stock) <= 1e-4
        model(ids[:, :15], attention_mask=mask[:, :15])
        with pytest.raises(ValueError, match="run rows of unequal length one by one"):
            model(ids[:, :17], attention_mask=mask[:, :17])
        cache = model(ids[:, :15], attention_mask=mask[:, :15], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="run rows of unequal length one by one"):  # the pads of before shift the token that is decoded now
            model(ids[:, 15:16], attention_mask=mask[:, :16], past_key_values=cache)


@torch.no_grad()
def test_queries_scaled_by_position_are_scaled_by_the_index_in_the_row():
    """Ministral 3 scales by `position_ids`; neither pads nor an offset that a caller passes may count."""
    model, ids = model_of("ministral3"), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    with longreach.extend(model, Stock(), trained_window=LENGTH):
        alone = model(ids[1:, 11:]).logits
        assert difference(model(ids, attention_mask=mask).logits[1:, 11:], alone) <= 1e-5
        assert difference(model(ids[1:, 11:], position_ids=torch.arange(40, 104)[None]).logits, alone) <= 1e-5


@pytest.mark.parametrize("family", sorted(UNROTATED))
@torch.no_grad()
def test_where_nothing_rotates_the_dial_chooses_plain_attention(family):
    model, ids = model_of(family), tokens(1, 300)
    with longreach.extend(model, context=300) as extension:
        assert extension.method == Stock() and extension.capacity is None and "no distance" in extension.describe()
        ours = model(ids).logits
    assert difference(ours, model(ids).logits) <= 1e-4
    with pytest.warns(UserWarning, match="no layer that takes the method encodes positions"), longreach.extend(model, SelfExtend(4, 8)) as extension:
        assert "have no effect there" in extension.describe()


def test_every_method_has_a_small_and_a_neutral_configuration_in_the_matrix():
    """So that what `check --all` publishes is behind the gates."""
    for kind in registry().values():
        assert kind.small(8) in METHODS
        assert kind.neutral(60, 8) in NEUTRAL
