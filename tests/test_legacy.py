"""Families outside the attention interface: GPT-J, CodeGen, Falcon, MPT, BLOOM. The matrix has their cells; here is what only they have."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers as t
from transformers import DynamicCache, GenerationConfig

import longreach
from families import WINDOW, build, tokens
from longreach import PI, LMInfinite, SelfExtend, Stock, configs
from longreach.hf import legacy
from longreach.hf.cache import cache_bytes, store_of
from longreach.hf.legacy import FAMILIES as KNOWN
from methods_matrix import ALIBI, LEGACY

ALL = sorted(LEGACY | {"gptj", "bloom"})
LENGTH = WINDOW + 11  # beyond every table
NEVER = 10_000


@functools.lru_cache(maxsize=1)
def model_of(family: str):
    model = build(family, eos_token_id=None)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=NEVER)
    return model


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert not a.isnan().any()
    return ((a - b).abs().max() / b.abs().max()).item()


def refuses(sentence: str):
    return pytest.raises(ValueError, match=sentence)


@pytest.mark.parametrize("family", ALL)
@torch.no_grad()
def test_gates_beyond_the_window_of_the_model(family):
    """Fast against dense, chunks with decode, a padded row alone; neutral against stock where stock still runs."""
    model, ids, method = model_of(family), tokens(2, LENGTH), SelfExtend(3, 8)
    stock = model(ids[:, :60]).logits
    with longreach.extend(model, method, backend="reference"):
        truth = model(ids, use_cache=False).logits
    with longreach.extend(model, method) as extension:
        assert extension.exactness.rotary < 1e-5 and extension.exactness.logits < 1e-5
        assert difference(model(ids, use_cache=False).logits, truth) <= 1e-5
        cache, parts = DynamicCache(), []
        for a, b in ((0, 23), (23, 24), (24, 70), *((i, i + 1) for i in range(70, LENGTH))):
            parts.append(model(ids[:, a:b], past_key_values=cache).logits)
        assert difference(torch.cat(parts, 1), truth) <= 1e-5
        mask = torch.ones_like(ids)
        mask[1, :11] = 0
        padded, alone = model(ids, attention_mask=mask).logits, model(ids[1:, 11:]).logits
        assert difference(padded[1:, 11:], alone) <= 1e-5 and difference(padded[:1], truth[:1]) <= 1e-5
    with longreach.extend(model, Stock()):
        assert difference(model(ids[:, :60]).logits, stock) <= 1e-4


@pytest.mark.parametrize("family", ["gptj", "codegen", "mpt"])
@torch.no_grad()
def test_stock_ends_with_its_table_and_an_extended_model_does_not(family):
    model, ids = model_of(family), tokens(1, 3 * WINDOW)
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)
    with longreach.extend(model, context=3 * WINDOW):
        assert model(ids).logits.isfinite().all()


@pytest.mark.parametrize(("family", "method"), [("gptj", SelfExtend(3, 8)), ("bloom", SelfExtend(3, 8)), ("bloom", LMInfinite(9, 3))], ids=str)
@torch.no_grad()
def test_generate(family, method):
    """Greedy, beams, prompt lookup and chunked prefill give the tokens of full forwards."""
    model, ids = model_of(family), tokens(2, 50)
    with longreach.extend(model, method):
        want = ids
        for _ in range(20):
            want = torch.cat([want, model(want, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        make = functools.partial(model.generate, max_new_tokens=20, do_sample=False)
        assert torch.equal(make(ids), want)
        assert torch.equal(make(ids, prefill_chunk_size=7), want)
        assert torch.equal(make(ids[:1], prompt_lookup_num_tokens=5), want[:1])
        assert torch.equal(make(ids, num_beams=3), make(ids, num_beams=3, use_cache=False))


@pytest.mark.parametrize("family", ["falcon", "bloom"])
@torch.no_grad()
def test_crop(family):
    model, ids = model_of(family), tokens(1, 60)
    with longreach.extend(model, LMInfinite(9, 3)):
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        cache.crop(-20)
        assert difference(model(ids[:, 40:], past_key_values=cache).logits, model(ids).logits[:, 40:]) <= 1e-5


@torch.no_grad()
def test_the_store_of_falcon_has_no_expanded_keys_and_that_of_alibi_one_form():
    sizes = {}
    for family in ("falcon", "falcon-groups", "bloom"):
        model, cache = model_of(family), DynamicCache()
        with longreach.extend(model, SelfExtend(3, 8)):
            model(tokens(1, 60), past_key_values=cache)
        shape = next(iter(store_of(cache).layers[0].whole.bodies.values())).shape
        sizes[family] = shape[1], cache_bytes(cache) / (2 * 4 * shape[1] * shape[3])  # entries of one layer
    assert sizes["falcon"] == (1, 3 * (60 + 64)) and sizes["falcon-groups"] == (2, 3 * (60 + 64))
    assert sizes["bloom"] == (12, 2 * (60 + 64))  # the rotated families above need a second form of the near keys


@pytest.mark.parametrize("family", sorted(ALIBI))
def test_methods_of_frequencies_are_refused_under_alibi(family):
    model = model_of(family)
    with refuses("biases of ALiBi, so there are no rotary frequencies to change; use a method of positions, such as SelfExtend or LMInfinite"):
        longreach.extend(model, PI(2.0))
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_description():
    with longreach.extend(model_of("bloom"), SelfExtend(3, 8)) as extension:
        assert "ALiBi, slopes from" in extension.describe() and "attention " in str(extension.exactness)
        assert extension.report()["encoding"] == "alibi" and extension.report()["layers_without_positions"] == []
    with longreach.extend(model_of("gptj"), SelfExtend(3, 8)) as extension:
        assert extension.report()["encoding"] == "rotary"


@torch.no_grad()
def test_falcons_alibi_is_added_once_whichever_implementation_is_set():
    """Its eager code adds the bias to the scores and to the mask. What the model was trained with is what its code for SDPA computes."""
    model, ids = build("falcon-alibi"), tokens(1, 60)
    once = model(ids).logits
    model.config._attn_implementation_internal = "eager"
    twice = model(ids).logits
    with longreach.extend(model, Stock()):
        assert difference(model(ids).logits, once) <= 1e-4
    assert torch.equal(model(ids).logits, twice) and model.config._attn_implementation == "eager"


@torch.no_grad()
def test_falcons_alibi_is_not_rounded(monkeypatch):
    """Its code computes the bias in bf16, in which 257 is 256. Here it is the bias itself, which BLOOM's code computes for the same slopes."""
    from transformers.models.bloom import modeling_bloom
    from transformers.models.falcon import modeling_falcon

    model, ids = build("falcon-alibi", max_position_embeddings=512), tokens(1, 400)
    rounded = model(ids).logits
    monkeypatch.setattr(modeling_falcon, "build_alibi_tensor", modeling_bloom.build_alibi_tensor)
    exact = model(ids).logits
    with longreach.extend(model, Stock()):
        ours = model(ids).logits
    assert difference(ours, exact) <= 1e-4 < difference(ours, rounded)
    assert difference(ours[:, :256], rounded[:, :256]) <= 1e-4


def test_a_second_extend_and_a_foreign_forward():
    model = build("bloom")
    extension = longreach.extend(model, Stock())
    with refuses("extended already; call remove"):
        longreach.extend(model, Stock())
    extension.remove()
    attention = model.transformer.h[1].self_attention
    attention.forward = attention.forward
    with refuses("replaced by another library"):
        longreach.extend(model, Stock())
    del attention.forward
    longreach.extend(model, Stock()).remove()


def test_what_a_layer_does_differently_is_noticed(monkeypatch):
    """A family is believed only after every layer was compared: here its scale is not what we think."""
    model, ids = build("mpt"), tokens(1, 20)
    before = model(ids).logits
    monkeypatch.setattr(type(KNOWN["mpt"]), "scale", lambda self, module: 0.3)
    with refuses("does something we do not know"):
        longreach.extend(model, Stock())
    assert torch.equal(model(ids).logits, before) and model.config._attn_implementation == "eager"


def test_tables_that_are_not_rotary_are_noticed():
    model = build("gptj")
    model.transformer.h[1].attn.embed_positions.mul_(1.5)
    with refuses("layer 1 are not those of a rotary base of 10000"):
        longreach.extend(model, Stock())


def test_slow_but_exact():
    model = build("bloom", pretraining_tp=2, slow_but_exact=True)
    with refuses("slow_but_exact=False"):
        longreach.extend(model, Stock())


def test_code_of_its_own_under_a_known_name():
    """A repository's own MPT is not Transformers' MPT: what it calls its parts is not looked for."""
    model = build("llama")
    model.config.model_type = "mpt"
    assert legacy.seam_of(model) is None


def test_training_and_gradients():
    model, ids = build("bloom", attention_dropout=0.1), tokens(1, 12)
    with longreach.extend(model, Stock()):
        with pytest.raises(NotImplementedError, match="remove"):
            model(ids, labels=ids).loss.backward()
        with refuses("dropout"):
            model.train()(ids)
    model.eval()(ids, labels=ids).loss.backward()


@torch.no_grad()
def test_arguments_by_position():
    """The second argument of these models is the cache, not the mask."""
    model, ids = model_of("bloom"), tokens(1, 30)
    with longreach.extend(model, SelfExtend(3, 8)):
        cache = DynamicCache()
        model.transformer(ids[:, :20], cache, use_cache=True)
        assert store_of(cache).lengths == [20]
        assert difference(model(ids[:, 20:], past_key_values=cache).logits, model(ids).logits[:, 20:]) <= 1e-5
        with refuses("2-D padding mask"):
            model.transformer(ids, None, torch.ones(1, 1, 30, 30))


def test_trained_windows():
    assert configs.trained_window(t.MptConfig(max_seq_len=77)).tokens == 77
    assert configs.trained_window(t.BloomConfig(seq_length=78)).tokens == 78
    assert configs.trained_window(t.GPTJConfig(n_positions=79)).tokens == 79
    with refuses("pass trained_window=N"):
        configs.trained_window(t.BloomConfig())
