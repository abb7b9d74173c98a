"""verify(): what is true of a model is found without leaving a trace in it, and does not change afterwards."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest
import torch
import transformers

import longreach
from families import BASE, WINDOW, build, tokens
from longreach import LMInfinite, SelfExtend, Stock, configs
from longreach.checking.families import VOCABULARY
from longreach.hf import legacy, registration
from longreach.hf.checks import configs_of, find_base
from longreach.hf.facts import Chosen, Facts
from longreach.hf.standard import StandardSeam
from longreach.hf.verify import verify
from longreach.methods.base import Method

IDS = torch.arange(3, 23)[None]
NAME = "longreach-verified"


def verified(model: torch.nn.Module, method: Method) -> Facts:
    base = find_base(model)
    before = [(config, config._attn_implementation_internal) for config in configs_of(model)]
    seam = legacy.seam_of(model, NAME, before) or StandardSeam(model, base, NAME, before)
    window = configs.trained_window(base.config)
    return verify(seam, Chosen(method, window, None, method.capacity(window.tokens)))


def state(model: torch.nn.Module) -> list[object]:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), sorted(set(vars(m)) & {"forward", "prepare_inputs_for_generation"})) for m in model.modules()]
    return [*hooks, *(config._attn_implementation_internal for config in configs_of(model)), *map(id, model.modules())]


@pytest.mark.parametrize("family", ["llama", "llama-dynamic", "phi3-longrope", "gemma2", "gptj", "bloom"])
def test_verifying_leaves_no_trace(family):
    model = build(family)
    before, want = state(model), model(IDS).logits
    facts = verified(model, SelfExtend(2, 8))
    assert state(model) == before and torch.equal(model(IDS).logits, want)
    assert not any(NAME in mapping._global_mapping for mapping in registration.MAPPINGS)
    assert facts.exactness.logits < 1e-5 and len(facts.layers) == model.config.num_hidden_layers == len(facts.reading.entries)


def test_facts_are_frozen_and_say_which_layers_take_the_method():
    facts = verified(build("gemma2"), SelfExtend(2, 8))
    for field in fields(facts):
        with pytest.raises(FrozenInstanceError):
            setattr(facts, field.name, None)
    sliding = [i for i, own in enumerate(facts.reading.trained) if own.sliding_window]
    assert sliding and sorted([*facts.covered, *sliding]) == list(range(len(facts.layers)))
    assert all(facts.layers[i].method == facts.reading.trained[i] for i in sliding)


def test_layers_of_one_kind_share_their_rotation_and_its_tables():
    facts = verified(build("llama"), LMInfinite(WINDOW, 4))
    assert len({id(layer.rotary) for layer in facts.layers}) == 1 and facts.layers[0].rotary is not None


def test_a_verified_model_can_be_verified_and_extended_again():
    model = build("llama")
    assert verified(model, Stock()).exactness == verified(model, SelfExtend(4, 8)).exactness
    with longreach.extend(model, SelfExtend(4, 8)) as extension:
        assert extension.exactness == extension.facts.exactness and extension.attached
    assert not extension.attached and "removed" in repr(extension)


def test_kinds_of_layers_may_have_heads_of_unlike_width():
    """Gemma 4: its full layers have wider heads, and frequencies of their own that partly do not rotate."""
    types = ["sliding_attention", "full_attention"]
    wide = dict(head_dim=8, global_head_dim=16, num_key_value_heads=2, num_global_key_value_heads=2, hidden_size_per_layer_input=8)
    sizes = {**BASE, **wide, "vocab_size_per_layer_input": VOCABULARY, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**sizes, layer_types=types, sliding_window=24)).eval()
    ids = tokens(1, 60)
    want = model(ids, use_cache=False).logits
    with longreach.extend(model, SelfExtend(1, WINDOW)) as extension:
        assert [layer.rotary.width for layer in extension.layers] == [8, 16] and extension.facts.covered == [1]
        assert (model(ids, use_cache=False).logits - want).abs().max() <= 1e-4 * want.abs().max()
    with longreach.extend(model, SelfExtend(3, 8), backend="reference"):
        dense = model(ids, use_cache=False).logits
    with longreach.extend(model, SelfExtend(3, 8)):
        cache = transformers.DynamicCache()
        parts = [model(ids[:, a : a + 7], past_key_values=cache).logits for a in range(0, 60, 7)]
    assert (torch.cat(parts, 1) - dense).abs().max() <= 1e-4 * dense.abs().max()


@pytest.mark.parametrize("stated", [None, 0])
def test_a_window_that_only_its_user_knows(stated):
    model = build("llama")
    want = verified(model, SelfExtend(4, 8)).exactness
    vars(model.config)["max_position_embeddings"] = stated
    with pytest.raises(ValueError, match="pass trained_window=N"):
        longreach.extend(model, SelfExtend(4, 8))
    with longreach.extend(model, SelfExtend(4, 8), trained_window=WINDOW) as extension:
        assert extension.window.tokens == WINDOW and extension.exactness == want
