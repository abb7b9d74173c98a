"""What cannot apply raises, and the sentence contains the fix. Nothing falls back."""

from __future__ import annotations

import copy
import dataclasses
import typing

import pytest
import torch
import transformers as t

import longreach
from families import BASE, REFUSED, build, tokens
from longreach import LMInfinite, SelfExtend, Stock
from longreach.engine.batch import Batch
from longreach.methods import registry
from longreach.quantities import MOST_TOKENS
from tiny import llama


@pytest.fixture
def model():
    return build("llama")


def refuses(sentence: str):
    return pytest.raises(ValueError, match=sentence)


def test_what_extend_needs(model):
    with refuses("pass context=N"):
        longreach.extend(model)
    with refuses("is not a method"):
        longreach.extend(model, "selfextend")
    with refuses("by name"):
        longreach.extend(model, 4096)
    with refuses("backend must be"):
        longreach.extend(model, Stock(), backend="fast")
    with refuses("number of tokens"):
        longreach.extend(model, context=0)
    with refuses("number of tokens"):
        longreach.extend(model, Stock(), trained_window=0)
    with refuses("not a Transformers model"):
        longreach.extend(torch.nn.Linear(2, 2), Stock())


def test_second_extend(model):
    extension = longreach.extend(model, Stock())
    with refuses("call remove"):
        longreach.extend(model, SelfExtend(2, 4))
    extension.remove()
    longreach.extend(model, SelfExtend(2, 4)).remove()


def test_a_failed_extend_leaves_the_model_as_it_was(model, monkeypatch):
    ids = tokens(1, 20)
    before = model(ids).logits
    monkeypatch.setattr("longreach.hf.rotary.match", lambda *_: (None, None, 1.0))
    with refuses("applies its rotary in a way we do not know"):
        longreach.extend(model, Stock())
    assert torch.equal(model(ids).logits, before)
    assert not hasattr(model.model.rotary_emb, "original")


def test_a_probe_that_stops_halfway_restores_the_implementation(model, monkeypatch):
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(type(model.model.rotary_emb), "forward", lambda self, x, position_ids: x)
    with refuses("not supported"):
        longreach.extend(model, Stock())
    assert model.config._attn_implementation == "sdpa"


def test_a_tiny_declared_context_is_no_obstacle(model):
    with longreach.extend(model, context=8, trained_window=8):
        model(tokens(1, 8))


def test_a_context_beyond_the_parameters(model):
    with refuses("reaches 100 tokens"):
        longreach.extend(model, SelfExtend(2, 28), context=101)
    with refuses("LMInfinite"):
        longreach.extend(model, context=10**6)
    with refuses(r"Combined\(YaRN\(4\), Quest\(...\)\) \(--method combined --encoding 'yarn --factor 4' --positions 'quest ...'\)"):
        longreach.extend(model, longreach.Quest(32), context=200, trained_window=60)


@torch.no_grad()
def test_a_text_beyond_the_declared_context_raises_and_an_undeclared_one_warns(model):
    with longreach.extend(model, context=100):
        model(tokens(1, 100), use_cache=True)
        with refuses("a sequence of 101 tokens exceeds the declared context of 100"):
            model(tokens(1, 101))
    with longreach.extend(model, LMInfinite(32, 2), context=100), refuses("declared context"):
        model(tokens(1, 101))
    with longreach.extend(model, SelfExtend(2, 28)), pytest.warns(UserWarning, match="exceeds the capacity of 100"):
        model(tokens(1, 101))
    with longreach.extend(model, Stock(), context=64), refuses("exceeds the declared context of 64"):
        model.generate(tokens(1, 60), max_new_tokens=10)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_models_without_a_rotary_module(family):
    size = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = {
        "gpt2": lambda: t.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2),
        "opt": lambda: t.OPTConfig(**size, ffn_dim=32, word_embed_proj_dim=32),
    }[family]()
    with refuses("rotary"):
        longreach.extend(t.AutoModelForCausalLM.from_config(config), context=4096)


def test_rotary_models_that_do_not_use_the_attention_interface():
    config = t.GPTNeoXJapaneseConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    before = model(tokens(1, 10)).logits
    with refuses("attention interface"):
        longreach.extend(model, Stock())
    assert torch.equal(model(tokens(1, 10)).logits, before)


REASONS = {
    "hunyuan": "changes q and k after it, as a norm with weights does",
    "minimax": "layers of type linear_attention",
    "qwen3-next": "layers of type linear_attention",
    "lfm2": "layers of type conv",
    "diffllama": "seen in 4 of 2 layers|does not use Transformers' attention interface",  # by the version of Transformers
    "jamba": "no rotary position module",
}


@pytest.mark.parametrize("family", REFUSED)
@torch.no_grad()
def test_families_that_no_method_can_be_attached_to(family):
    model, ids = build(family), tokens(1, 10)
    before = model(ids).logits
    with refuses(REASONS[family]):
        longreach.extend(model, Stock())
    assert torch.equal(model(ids).logits, before)


def test_a_model_whose_layers_all_attend_in_chunks():
    model = build("llama4", no_rope_layers=[1, 1], layer_types=["chunked_attention"] * 2)
    with refuses("has nothing to act on"):
        longreach.extend(model, SelfExtend(4, 8))
    with longreach.extend(model, Stock()) as extension:
        assert [layer.method for layer in extension.layers] == [Stock(attention_chunk=24)] * 2


def test_three_axis_positions():
    text = {k: v for k, v in BASE.items() if k != "initializer_range"}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    config = t.Qwen2VLConfig(
        text_config=dict(**text, num_key_value_heads=2, rope_parameters=rope), vision_config=dict(depth=1, embed_dim=32, num_heads=2, hidden_size=64)
    )
    with refuses("multimodal wrapper; extend its text model"):
        longreach.extend(t.Qwen2VLForConditionalGeneration(config), Stock())


def test_multimodal_wrappers():
    text = {k: v for k, v in BASE.items() if k != "initializer_range"}
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    config = t.LlavaConfig(text_config=t.LlamaConfig(**text), vision_config=t.CLIPVisionConfig(**vision), image_token_index=5)
    with refuses("multimodal"):
        longreach.extend(t.LlavaForConditionalGeneration(config), Stock())


def test_encoder_decoders():
    with refuses("encoder-decoder|rotary"):
        longreach.extend(t.T5ForConditionalGeneration(t.T5Config(vocab_size=96, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)), Stock())


# -- forwards ---------------------------------------------------------------------------------------------------------------------


def test_foreign_caches(model):
    ids = tokens(1, 20)
    stock_cache = model(ids, use_cache=True).past_key_values
    with longreach.extend(model, Stock()):
        with refuses("already rotated"):
            model(ids, past_key_values=stock_cache)
        with refuses("StaticCache"):
            model(ids, past_key_values=t.StaticCache(config=model.config, max_cache_len=64))
        with refuses("offload"):
            model(ids, past_key_values=t.DynamicCache(offloading=True))
        own = model(ids, use_cache=True).past_key_values
    with refuses("not in force"):  # keys in it have no positions, so plain attention on them would be silently wrong
        model(ids, past_key_values=own)
    with longreach.extend(model, Stock()), refuses("another extension"):
        model(ids, past_key_values=own)


def test_an_attention_implementation_changed_afterwards(model):
    with longreach.extend(model, Stock()):
        model.set_attn_implementation("sdpa")
        with refuses("no longer in force"):
            model(tokens(1, 8))


def test_layers_share_their_rotation_tables(model):
    with longreach.extend(model, SelfExtend(2, 4)) as extension:
        assert len({id(layer.rotary) for layer in extension.layers}) == 1


def test_masks_and_positions(model):
    ids = tokens(2, 8)
    with longreach.extend(model, Stock()):
        with refuses("2-D padding mask"):
            model(ids, attention_mask=torch.ones(2, 1, 8, 8))
        with refuses("does not cover"):
            model(ids, attention_mask=torch.ones(2, 5))
        with refuses("one by one"):
            model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2))
        with refuses("one by one"):
            model(ids, position_ids=torch.arange(0, 16, 2)[None])
        with refuses("leave them out"):
            model(ids, position_ids=torch.arange(5)[None])
        model(ids, position_ids=torch.arange(30, 38)[None])  # an offset changes no distance
        with refuses("rows"):
            model(ids[:1], past_key_values=model(ids, use_cache=True).past_key_values)


def test_attention_weights_and_dropout(model):
    ids = tokens(1, 8)
    with longreach.extend(model, Stock()), refuses("output_attentions"):
        model(ids, output_attentions=True)
    dropping = build("llama", attention_dropout=0.1).train()
    with longreach.extend(dropping, Stock()), refuses("eval"):
        dropping(ids)
    assert dropping.training and dropping.model.layers[0].training


def test_backward_raises_and_forward_with_gradients_works(model):
    ids = tokens(1, 20)
    with longreach.extend(model, SelfExtend(2, 4)):
        with torch.no_grad():
            want = model(ids, use_cache=False).logits
        loss = model(ids, labels=ids).loss
        torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=0)
        with pytest.raises(NotImplementedError, match="remove"):
            loss.backward()
    model(ids, labels=ids).loss.backward()


def test_a_config_shared_by_two_models_is_noticed():
    config = build("llama").config
    first, second = (t.LlamaForCausalLM(config).eval() for _ in range(2))
    with longreach.extend(first, SelfExtend(2, 4)):
        with refuses("its own config"):
            second(tokens(1, 8))
        alone = t.LlamaForCausalLM(copy.deepcopy(build("llama").config)).eval()
        alone(tokens(1, 8))


def test_parts_of_a_model_are_not_called_alone(model):
    with longreach.extend(model, LMInfinite(8, 2)):
        hidden = model.get_input_embeddings()(tokens(1, 6))
        positions = model.model.rotary_emb(hidden, torch.arange(6)[None])
        with refuses("batch of this forward"):
            model.model.layers[0](hidden, position_embeddings=positions)


def test_a_batch_ranks_real_tokens_only():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    made = Batch.of(4, 4, mask, torch.device("cpu"), None)
    assert [(g.rows.start, g.start, g.count) for g in made.groups] == [(0, 0, 2), (1, 0, 4), (3, 0, 2)]
    assert made.groups[0].columns == slice(2, 4) and made.groups[2].columns.tolist() == [0, 2]


def test_in_half_precision_layers_are_compared_where_rounding_moves_the_logits(monkeypatch):
    """As it does where it chooses other experts: then logits say nothing, and a layer that is off is seen all the same."""
    from longreach.hf import forward as seam

    # a router whose choice is a matter of rounding, so that the logits are those of other experts
    model = build("qwen3-moe").bfloat16()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.mul_(1e-3)
    with longreach.extend(model, SelfExtend(1, 16)) as extension:
        measured = extension.report()["exactness"]
        assert 0 < measured["layers"] <= 1.5 * measured["stock_layers"] < 0.03
        assert "where stock itself has" in extension.describe()
    execute = seam.execute
    monkeypatch.setattr(seam, "execute", lambda *args: 1.1 * execute(*args))
    with refuses(r"differs from the stock model by .* \(a layer by 1"):
        longreach.extend(model, SelfExtend(1, 16))


def numbers(kind: type) -> dict[str, tuple[object, bool]]:
    """The parameters of a method that are numbers -> (what they are in a small configuration, whether they are whole ones)."""
    small, hints = kind.small(8), typing.get_type_hints(kind)
    return {f.name: (getattr(small, f.name), "float" not in str(hints[f.name])) for f in dataclasses.fields(kind) if {"int", "float"} & words(hints[f.name])}


def words(hint: object) -> set[str]:
    found = {getattr(hint, "__name__", "")}
    return found.union(*map(words, typing.get_args(hint)))


@pytest.mark.parametrize("name", registry())
def test_a_parameter_that_would_overflow_is_refused(name):
    kind = registry()[name]
    small = kind.small(8)
    for parameter, (value, whole) in numbers(kind).items():
        for far in (2**62, MOST_TOKENS + 1) if whole else (1e300, float("inf"), float("nan"), 10**400):
            given = (far,) * len(value) if isinstance(value, tuple) else far
            with pytest.raises(ValueError, match=f"{parameter} must be"):
                dataclasses.replace(small, **{parameter: given})


@pytest.mark.filterwarnings("ignore:a sequence of")
@pytest.mark.parametrize("name", registry())
def test_the_largest_parameters_need_no_more_memory_than_the_text(name):
    """But for the first tokens that stay, whose memory is set aside at once."""
    kind, model = registry()[name], llama()
    ids = torch.arange(80)[None] % 50 + 3
    for parameter, (value, whole) in numbers(kind).items():
        if parameter in ("n_init", "n_sink", "n_global") or value == ():
            continue
        most = MOST_TOKENS if whole else float(MOST_TOKENS)
        try:
            method = dataclasses.replace(kind.small(8), **{parameter: (most,) * len(value) if isinstance(value, tuple) else most})
            extension = longreach.extend(model, method, context=100 if method.needs_context else None)
        except ValueError as refused:  # the parameter has a smaller bound, alone or beside the others
            assert refused.args
            continue
        with extension, torch.no_grad():
            assert model(ids).logits.isfinite().all()
            assert len(model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)[0]) > 80
