"""What is left of an extension when it, its model or its caches are dropped, and calls inside calls."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import transformers as t
from transformers import DynamicCache

import longreach
from families import build, tokens
from longreach import SelfExtend, Stock
from longreach.hf.cache import store_of
from longreach.hf.registration import MAPPINGS, PREFIX

METHOD = SelfExtend(3, 8)
IDS = tokens(2, 40)
FAMILIES = ["llama", "bloom"]  # through the attention interface, and with attention of its own


def names() -> list[str]:
    return [name for mapping in MAPPINGS for name in mapping._global_mapping if name.startswith(PREFIX)]


def refuses(sentence: str):
    return pytest.raises(ValueError, match=sentence)


# -- lifetimes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_dropped_model_is_freed_with_its_extension(family):
    gc.collect()
    before = names()
    model = build(family)
    extension = longreach.extend(model, METHOD)
    assert len(names()) == len(before) + 2
    model(IDS)
    model.generate(IDS, max_new_tokens=2)
    alive, config = weakref.ref(model), model.config
    del model, extension
    gc.collect()
    assert alive() is None and names() == before
    assert not config._attn_implementation.startswith(PREFIX)  # another model may be made with it


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_extension_that_nobody_holds_stays_in_force(family):
    model = build(family)
    plain = model(IDS).logits
    longreach.extend(model, METHOD)
    gc.collect()
    assert not torch.equal(model(IDS).logits, plain)


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_keeps_no_model(family, removed):
    model = build(family)
    extension = longreach.extend(model, METHOD)
    cache = model(IDS, use_cache=True).past_key_values
    fork = extension.fork(cache)
    if removed:
        extension.remove()
    alive = weakref.ref(model)
    del model, extension
    gc.collect()
    assert alive() is None and cache.get_seq_length() == 40 and fork.get_seq_length() == 40
    with longreach.extend(build(family), METHOD) as other, refuses("another extension"):
        other.model(IDS, past_key_values=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_failed_extend_leaves_nothing_behind(family, monkeypatch):
    gc.collect()
    before = names()
    model = build(family)
    with monkeypatch.context() as broken:
        broken.setattr("longreach.hf.forward.execute", lambda *a: torch.zeros(1, 12, a[4].shape[1], a[6].shape[3]))
        with refuses("does something we do not know"):
            longreach.extend(model, METHOD)
    assert names() == before and not any("forward" in vars(module) for module in model.modules())
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_and_pickles_of_an_extended_model_are_refused_and_fine_afterwards(family):
    model = build(family)
    part = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    with longreach.extend(model, METHOD) as extension:
        for copying in (copy.deepcopy, copy.copy, pickle.dumps):
            with refuses(r"call remove\(\) on its extension first"):
                copying(extension)
        for copying in (copy.deepcopy, pickle.dumps, lambda x: torch.save(x, io.BytesIO())):
            with refuses(r"call remove\(\) on its extension first"):
                copying(model)
        model(IDS)
        if family == "llama":
            alone = copy.deepcopy(part)  # a part of it has weights of its own
            assert alone.self_attn.forward.forward.__self__ is alone.self_attn
    assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(IDS).logits, model(IDS).logits)


def test_weights_are_saved_as_they_are(tmp_path):
    model = build("llama")
    keys = set(model.state_dict())
    with longreach.extend(model, METHOD):
        assert set(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
    again = t.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not again.config._attn_implementation.startswith(PREFIX)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=1e-5, rtol=0)


# -- one config, one model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_serves_one_extended_model(family):
    first = build(family)
    second = type(first)(first.config).eval()
    third = type(first)(copy.deepcopy(first.config)).eval()
    plain, implementation = second(IDS).logits, first.config._attn_implementation
    extension = longreach.extend(first, METHOD)
    with refuses(r"in use by another model that is extended.*copy.deepcopy"):
        longreach.extend(second, METHOD)
    longreach.extend(third, METHOD).remove()
    copied = type(first)(copy.deepcopy(first.config)).eval()  # taken too late: it names our function
    with refuses("was copied from one"):
        longreach.extend(copied, METHOD)
    first(IDS)
    extension.remove()
    assert first.config._attn_implementation == implementation and torch.equal(second(IDS).logits, plain)
    with longreach.extend(second, METHOD), longreach.extend(third, METHOD):
        assert not torch.equal(second(IDS).logits, plain)
    assert torch.equal(second(IDS).logits, plain)


# -- calls inside calls, and calls that end early ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_model_called_from_a_hook_of_its_own(family, cached):
    """Three deep, each with its own cache: every call gives what it gives alone."""
    model, others = build(family), [tokens(2, 30, seed=5), tokens(1, 20, seed=6)]
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[0]
    with longreach.extend(model, METHOD):
        alone = [model(ids, use_cache=cached).logits for ids in (IDS, *others)]
        found, waiting = [], [*others]

        def hook(*_):
            if waiting:
                ids = waiting.pop(0)
                found.append((ids, model(ids, use_cache=cached)))

        handle = layer.register_forward_hook(hook)
        outer = model(IDS, use_cache=cached)
        handle.remove()
        assert torch.equal(outer.logits, alone[0])
        for ids, out in found:
            assert torch.equal(out.logits, alone[1 if ids is others[0] else 2])
        if cached:
            assert [store_of(x.past_key_values).seen for x in (outer, *(out for _, out in found))] == [40, 20, 30]
        rest = model(IDS[:, :1], past_key_values=outer.past_key_values).logits if cached else None
        assert rest is None or rest.isfinite().all()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_forward_that_raises_leaves_no_plan_and_frees_its_cache(family, error):
    model = build(family)
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))[1]

    def fail(*_):
        raise error("on purpose")

    with longreach.extend(model, METHOD) as extension:
        want = model(IDS, use_cache=False).logits
        cache = model(IDS[:, :30], use_cache=True).past_key_values
        lost = weakref.ref(store_of(cache))
        for hooked in (layer.register_forward_pre_hook, extension.facts.base.register_forward_pre_hook):  # inside, and between our hook and the forward
            handle = hooked(fail)
            with pytest.raises(error):
                model(IDS[:, 30:], past_key_values=cache)
            handle.remove()
            assert store_of(cache).seen == 30
            if error is RuntimeError:
                assert extension.forward.calls.batch is None
        assert torch.allclose(model(IDS[:, 30:], past_key_values=cache).logits, want[:, 30:], atol=1e-4)
        del cache
        model(IDS[:, :2])  # an interrupt runs no hook: its plan goes with the next call
        gc.collect()
        assert extension.forward.calls.batch is None and lost() is None


@torch.no_grad()
def test_a_call_that_fails_inside_another_leaves_the_outer_one_alone():
    model = build("llama")
    with longreach.extend(model, METHOD, context=50) as extension:
        want = model(IDS).logits
        said = []

        def hook(*_):
            if not said:
                said.append("")
                with pytest.raises(ValueError, match="declared context") as raised:
                    model(tokens(1, 60))
                said.append(str(raised.value))

        model.model.layers[0].register_forward_hook(hook)
        cache = DynamicCache()
        assert torch.equal(model(IDS, past_key_values=cache).logits, want) and len(said) == 2
        assert cache.get_seq_length() == 40 and extension.forward.calls.batch is None


@torch.no_grad()
def test_a_hook_that_exchanges_the_tokens():
    """Ours knows a call by its tokens; a later hook may put others, or embeddings, in their place."""
    model = build("llama")
    with longreach.extend(model, METHOD) as extension:
        want = model(IDS).logits

        def exchange(module, args, kwargs):
            kwargs = {**kwargs, "inputs_embeds": module.get_input_embeddings()(IDS)}
            del kwargs["input_ids"]
            return args, kwargs

        model.model.register_forward_pre_hook(exchange, with_kwargs=True)
        cache = DynamicCache()
        assert torch.equal(model(torch.zeros_like(IDS), past_key_values=cache).logits, want)
        assert store_of(cache).lengths == [40, 40] and extension.forward.calls.batch is None


# -- models without a language head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_bare_base_models(family):
    model = build(family)
    base = model.get_submodule(model.base_model_prefix)
    with longreach.extend(model, METHOD):
        want = base(IDS).last_hidden_state
    stock = base(IDS).last_hidden_state
    with longreach.extend(base, METHOD) as extension:
        assert torch.equal(base(IDS).last_hidden_state, want) and not torch.equal(want, stock)
        assert extension.exactness.logits < 1e-5 and extension.describe()
    assert torch.equal(base(IDS).last_hidden_state, stock)


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification"])
@torch.no_grad()
def test_classifiers(kind):
    config = build("llama").config
    config.num_labels = 3
    torch.manual_seed(0)
    model = getattr(t, f"LlamaFor{kind}")(config).eval()
    mask = torch.ones_like(IDS)
    mask[1, 33:] = 0
    ids = IDS.masked_fill(mask == 0, config.pad_token_id)
    plain = model(ids, attention_mask=mask).logits
    with longreach.extend(model, SelfExtend(1, 8)):
        real = (lambda logits: logits) if kind[0] == "S" else (lambda logits: logits[mask.bool()])
        torch.testing.assert_close(real(model(ids, attention_mask=mask).logits), real(plain), atol=1e-4, rtol=0)
    with longreach.extend(model, METHOD):
        both = model(ids, attention_mask=mask).logits
        alone = model(ids[1:, :33]).logits
        torch.testing.assert_close(both[1:] if kind[0] == "S" else both[1:, :33], alone, atol=1e-5, rtol=0)
    assert torch.equal(model(ids, attention_mask=mask).logits, plain)


def test_models_that_attend_in_both_directions():
    size = dict(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0)
    for model in (t.EuroBertForMaskedLM(t.EuroBertConfig(**size)), t.ModernBertForMaskedLM(t.ModernBertConfig(**size, cls_token_id=1, sep_token_id=2))):
        with refuses("attend to later ones"):
            longreach.extend(model.eval(), Stock())
