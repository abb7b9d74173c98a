"""Frequency methods: their frequencies against the papers and against Transformers, their logits against a stock model that is
configured with the same rope parameters, and what they refuse."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import transformers as t
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import longreach
from families import WINDOW, build, rope, tokens
from longreach import NTK, PI, Combined, DynamicNTK, DynamicYaRN, LMInfinite, LongRoPE, NTKByParts, SelfExtend, Stock, YaRN
from longreach.core.encodings import Frequencies, Rope
from longreach.hf.frequencies import _Standard
from longreach.methods.base import Method
from test_matrix import chunked, difference

LONG = tuple(1.0 + 0.5 * a for a in range(8))
SHORT = tuple(1.0 + 0.1 * a for a in range(8))


def own(base: float = 1e4, width: int = 128) -> torch.Tensor:
    return (1.0 / base ** (torch.arange(0, width, 2).float() / width)).double()


def asked(method: Method, window: int = 4096, length: int = 4096, base: float = 1e4, width: int = 128) -> Frequencies:
    """What a method answers for a head of `width` rotary dims."""
    frequencies = Frequencies(own(base, width))
    standard = _Standard("llama", base, frequencies, window)
    return method.frequencies(Rope(frequencies, window, length, standard))


# -- against the papers -----------------------------------------------------------------------------------------------------------


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b.double(), rtol=1e-5, atol=0)


def test_interpolation_divides_every_frequency():
    assert close(asked(PI(8.0)).inverse, own() / 8)


@pytest.mark.parametrize(("factor", "base"), [(2, 20221.26), (4, 40889.94), (8, 82684.62), (16, 167198.74), (32, 338096.95)])
def test_ntk_is_a_larger_base(factor, base):
    """The slowest pair is that of interpolation, the fastest is unchanged."""
    found = asked(NTK(factor))
    assert close(found.inverse, own(base)) and found.scaling == 1
    assert found.inverse[0] == 1 and math.isclose(found.inverse[-1], own()[-1] / factor, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("window", "base", "reach"), [(2048, 1e4, [1.57, 2.46, 3.87, 6.08]), (4096, 1e4, [1.66, 2.75, 4.56, 7.57]), (8192, 5e5, [1.47, 2.16, 3.17, 4.67])]
)
def test_where_ntk_first_shows_an_angle_that_was_never_trained(window, base, reach):
    """The table of the docs: a pair that makes no full turn in the window has seen no angle beyond window * frequency."""
    before = own(base)
    partial = before * window < 2 * math.pi
    for factor, windows in zip((2.0, 4.0, 8.0, 16.0), reach, strict=True):
        lengths = before[partial] * window / asked(NTK(factor), window, base=base).inverse[partial]
        assert lengths.min().item() / window == pytest.approx(windows, abs=0.006)


@pytest.mark.parametrize("length", [100, 4096, 4097, 16384])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_dynamic_ntk(factor, length):
    stretch = factor * max(length, 4096) / 4096 - (factor - 1)
    assert close(asked(DynamicNTK(factor), length=length).inverse, own(1e4 * stretch ** (128 / 126)))
    if factor == 1:
        assert close(asked(DynamicNTK(), length=length).inverse, asked(NTK(max(1.0, length / 4096))).inverse)


def test_by_parts_interpolates_what_makes_less_than_a_turn_and_keeps_what_makes_more_than_32():
    found, before = asked(NTKByParts(4.0)).inverse, own()
    turns = 4096 * before / (2 * math.pi)
    assert torch.equal(found[turns > 32], before[turns > 32]) and int((turns > 32).sum()) == 21
    assert close(found[turns < 1], before[turns < 1] / 4) and int((turns < 1).sum()) == 18
    for pair in range(21, 46):
        gamma = (turns[pair] - 1) / 31
        assert math.isclose(found[pair], (1 - gamma) * before[pair] / 4 + gamma * before[pair], rel_tol=1e-12)


@pytest.mark.parametrize(("window", "base", "low", "high"), [(4096, 1e4, 20, 46), (2048, 1e4, 16, 41), (8192, 5e5, 18, 35)])
def test_yarn_ramp_is_linear_in_the_pair_between_the_published_borders(window, base, low, high):
    found, before = asked(YaRN(16.0), window, base=base), own(base)
    ramp = ((torch.arange(64).double() - low) / (high - low)).clamp(0, 1)
    assert torch.allclose(found.inverse, ramp * before / 16 + (1 - ramp) * before, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("factor", "scaling"), [(1, 1.0), (2, 1.06931), (4, 1.13863), (8, 1.20794), (16, 1.27726), (32, 1.34657)])
def test_yarn_temperature(factor, scaling):
    assert asked(YaRN(factor)).scaling == pytest.approx(scaling, abs=1e-5)
    assert asked(DynamicYaRN(), length=4096 * factor).scaling == pytest.approx(scaling, abs=1e-5)
    assert asked(YaRN(factor, attention_factor=1.5)).scaling == 1.5


@pytest.mark.parametrize(("factor", "scaling"), [(1, 1.0), (2, 1.04083), (4, 1.08012), (8, 1.11803), (16, 1.15470), (32, 1.19024)])
def test_longrope_divides_by_its_lists_and_scales(factor, scaling):
    method = LongRoPE(factor, tuple(range(2, 66)), tuple(range(1, 65)))
    for length, first in ((4096, 1), (4097, 2)):
        found = asked(method, length=length)
        assert close(found.inverse, own() / torch.arange(first, first + 64))
        assert found.scaling == pytest.approx(scaling, abs=1e-5)
    assert asked(LongRoPE(factor, (2.0,) * 64, attention_factor=0.5)).scaling == 0.5


def test_dynamic_yarn_is_yarn_with_the_factor_of_the_length():
    for length, factor in ((17, 1.0), (4096, 1.0), (6144, 1.5), (65536, 16.0)):
        for a, b in zip(asked(DynamicYaRN(beta_fast=16), length=length), asked(YaRN(factor, beta_fast=16)), strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


# -- against Transformers ---------------------------------------------------------------------------------------------------------

CONTEXT = 150
# method -> the rope parameters that say the same to stock
SAME: list[tuple[Method, dict[str, Any]]] = [
    (PI(3.0), dict(rope_type="linear", factor=3.0)),
    (DynamicNTK(2.0), dict(rope_type="dynamic", factor=2.0)),
    (YaRN(3.0), dict(rope_type="yarn", factor=3.0, original_max_position_embeddings=WINDOW)),
    (
        YaRN(4.0, beta_fast=8.0, beta_slow=2.0, truncate_ramp=False, attention_factor=1.2),
        dict(
            rope_type="yarn", factor=4.0, beta_fast=8.0, beta_slow=2.0, truncate=False, attention_factor=1.2, original_max_position_embeddings=WINDOW
        ),
    ),
    (DynamicYaRN(), dict(rope_type="yarn", factor=CONTEXT / WINDOW, original_max_position_embeddings=WINDOW)),
    (NTK(4.0), dict(rope_type="default", rope_theta="ntk")),
]  # fmt: skip


def configured(family: str, parameters: dict[str, Any]) -> Any:
    """The same weights with other rope parameters on its full-attention layers."""
    config = build(family).config
    before = config.rope_parameters
    nested = "full_attention" in before
    old = before["full_attention"] if nested else before
    width = int(config.head_dim if getattr(config, "head_dim", None) else config.hidden_size // config.num_attention_heads)
    width = int(width * old.get("partial_rotary_factor", 1.0))
    parameters = {**old, **parameters}
    if parameters["rope_theta"] == "ntk":
        parameters["rope_theta"] = old["rope_theta"] * 4.0 ** (width / (width - 2))
    return build(family, rope_parameters={**before, "full_attention": parameters} if nested else parameters)


@pytest.mark.parametrize(("method", "parameters"), SAME, ids=lambda x: str(x) if isinstance(x, Method) else "")
@pytest.mark.parametrize("family", ["llama", "llama-head8", "qwen3", "gemma3", "phi", "gpt-neox", "stablelm", "cohere", "olmo2"])
@torch.no_grad()
def test_logits_equal_those_of_a_stock_model_with_the_same_rope_parameters(family, method, parameters):
    """Partial rotary, interleaved pairs, and Gemma 3, whose local layers keep their own."""
    ids = tokens(2, CONTEXT)
    stock = configured(family, parameters)(ids).logits
    plain = build(family)
    assert difference(plain(ids).logits, stock) > 1e-2
    with longreach.extend(plain, method, context=CONTEXT):
        assert difference(plain(ids, use_cache=False).logits, stock) <= 1e-4
        assert difference(chunked(plain, ids, [70, 1, 60, *[1] * 19]), stock) <= 1e-4


@pytest.mark.parametrize(("method", "parameters"), [SAME[0], SAME[2]], ids=["pi", "yarn"])
@torch.no_grad()
def test_bf16_error_is_that_of_stock(method, parameters):
    """Casting a model casts the frequencies that it holds too."""
    stock, plain, ids = configured("llama", parameters), build("llama"), tokens(4, CONTEXT)
    truth = stock(ids).logits
    error = lambda logits: (logits.float() - truth).square().mean().sqrt().item()  # noqa: E731
    stocks = error(stock.bfloat16()(ids).logits)
    with longreach.extend(plain.bfloat16(), method, context=CONTEXT):
        assert error(plain(ids).logits) <= 1.5 * stocks


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
@torch.no_grad()
def test_sliding_layers_keep_their_own_frequencies(family):
    """Gemma 2 has one set for both kinds of layers; they share it no longer."""
    model = build(family)
    with longreach.extend(model, PI(2.0)) as extension:
        sliding, full = (layer.rotary.inverse_frequencies for layer in extension.layers)
    with longreach.extend(model, Stock()) as extension:
        before = [layer.rotary.inverse_frequencies for layer in extension.layers]
    assert torch.equal(sliding, before[0]) and close(full, before[1] / 2)


@pytest.mark.parametrize("length", [WINDOW, CONTEXT])
@torch.no_grad()
def test_longrope_equals_stock_on_both_sides_of_the_window(length):
    parameters = dict(rope_type="longrope", factor=3.0, long_factor=list(LONG), short_factor=list(SHORT), original_max_position_embeddings=WINDOW)
    ids, plain = tokens(2, length), build("llama")
    with longreach.extend(plain, LongRoPE(3.0, LONG, SHORT), context=length):
        assert difference(plain(ids).logits, configured("llama", parameters)(ids).logits) <= 1e-4


@pytest.mark.parametrize("length", [32, 60])
@torch.no_grad()
def test_longrope_on_an_unscaled_phi3_equals_a_phi3_that_has_it(length):
    ids, stock, plain = tokens(2, length), build("phi3-longrope"), build("phi3")
    lists = stock.config.rope_parameters
    method = LongRoPE(2.0, tuple(lists["long_factor"]), tuple(lists["short_factor"]))
    with longreach.extend(plain, method, context=length, trained_window=32):
        assert difference(plain(ids).logits, stock(ids).logits) <= 1e-4


@torch.no_grad()
def test_longrope_without_a_short_list_leaves_short_texts_alone():
    ids, model = tokens(2, WINDOW), build("llama")
    stock = model(ids).logits
    with longreach.extend(model, LongRoPE(3.0, LONG, attention_factor=1.0), context=WINDOW):
        assert difference(model(ids).logits, stock) <= 1e-4
    with longreach.extend(model, LongRoPE(3.0, LONG, attention_factor=1.0)):  # undeclared: made for its capacity
        assert difference(model(ids).logits, stock) > 1e-2


@pytest.mark.parametrize("method", [DynamicNTK(2.0), DynamicYaRN()], ids=str)
@torch.no_grad()
def test_generation_across_the_window_equals_full_forwards(method):
    """Stock changes its frequencies on the way, with rotated keys in its cache."""
    model, ids = build("llama"), tokens(2, WINDOW - 10)
    with longreach.extend(model, method, context=WINDOW + 20):
        got = model.generate(ids, max_new_tokens=30, do_sample=False, eos_token_id=None)
        want = ids
        for _ in range(30):
            want = torch.cat([want, model(want, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, want)


@pytest.mark.parametrize("family", ["llama3", "llama-yarn", "llama-linear"])
@pytest.mark.parametrize("method", [SelfExtend(3, 8), LMInfinite(9, 3), Stock()], ids=str)
def test_methods_of_positions_keep_the_scaling_of_a_checkpoint(family, method):
    model = build(family)
    config = model.config
    inverse, scaling = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, None)
    with longreach.extend(model, method) as extension:
        rotary = extension.layers[0].rotary
        assert rotary is not None and close(rotary.inverse_frequencies, inverse) and rotary.scaling == pytest.approx(scaling)


@torch.no_grad()
def test_the_description_says_what_was_done_to_the_frequencies():
    model = build("llama")
    with longreach.extend(model, DynamicYaRN(), context=4 * WINDOW) as extension:
        said = extension.report()["frequencies"]
        assert said["divided_by"] == [pytest.approx(1), pytest.approx(4, rel=1e-5)] and said["attention_factor"] == pytest.approx(1.13863, abs=1e-5)
        assert "divided by 1 (fastest pair) to 4 (slowest pair), cos and sin times 1.1386" in extension.describe()
    for family, method in (("llama", SelfExtend(2, 8)), ("llama-yarn", Stock())):
        with longreach.extend(build(family), method) as extension:
            assert extension.report()["frequencies"] is None and "divided by" not in extension.describe()


# -- combinations -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [SelfExtend(3, 8), LMInfinite(9, 3)], ids=str)
@torch.no_grad()
def test_a_combination_equals_its_positions_on_a_checkpoint_that_is_scaled_so(positions):
    ids = tokens(2, 90)
    scaled = configured("llama", dict(rope_type="yarn", factor=3.0, original_max_position_embeddings=WINDOW))
    with longreach.extend(scaled, positions):
        want = scaled(ids).logits
    plain = build("llama")
    with longreach.extend(plain, Combined(YaRN(3.0), positions)) as extension:
        assert difference(plain(ids).logits, want) <= 1e-5
        assert "yarn" in json.dumps(extension.report()["method"])


def test_a_combination_has_the_properties_of_its_parts():
    assert Combined(YaRN(4.0), LMInfinite(9, 3)).bounded and not Combined(YaRN(4.0), SelfExtend(2, 4)).bounded
    assert Combined(DynamicNTK(), SelfExtend(2, 4)).needs_context and not Combined(PI(2.0), SelfExtend(2, 4)).needs_context
    assert Combined(PI(2.0), LMInfinite(9, 3, top_k=2)).cut is None
    assert Combined(PI(4.0), SelfExtend(2, 16)).capacity(16) == SelfExtend(2, 16).capacity(64) == 2 * (64 - 16 + 8)
    assert Combined(PI(4.0), LMInfinite(64)).capacity(16) is None and Combined(PI(3.0), LMInfinite(64)).capacity(16) == 0
    assert Combined(DynamicNTK(), SelfExtend(2, 16)).capacity(16) is None


@torch.no_grad()
def test_frequencies_of_a_combination_follow_its_largest_distance():
    """SelfExtend keeps 200 tokens inside the window, so dynamic NTK has nothing to scale; LM-Infinite reaches no further than n_local."""
    model = build("llama")
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        before = extension.layers[0].rotary.inverse_frequencies
    for positions in (SelfExtend(8, 16), LMInfinite(WINDOW - 1)):
        with longreach.extend(model, Combined(DynamicNTK(2.0), positions), context=200) as extension:
            assert close(extension.layers[0].rotary.inverse_frequencies, before)
    with longreach.extend(model, Combined(DynamicNTK(2.0), LMInfinite(127)), context=500) as extension:
        assert close(extension.layers[0].rotary.inverse_frequencies, asked(DynamicNTK(2.0), WINDOW, 128, width=16).inverse)


# -- capacity, parameters, refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [PI, NTK, NTKByParts, YaRN, lambda f: LongRoPE(f, LONG)])
def test_capacity_is_the_factor_times_the_window(make):
    assert [make(f).capacity(4096) for f in (1, 2.0, 2.5, 4, 32.0)] == [4096, 8192, 10240, 16384, 131072]
    assert make(1.1).capacity(10) == 11 and make(4.35).capacity(100) == 435


@torch.no_grad()
def test_contexts():
    model = build("llama")
    with longreach.extend(model, YaRN(2.0), context=128), pytest.raises(ValueError, match="exceeds the declared context of 128"):
        model(tokens(1, 129))
    with longreach.extend(model, YaRN(2.0)) as extension, pytest.warns(UserWarning, match="exceeds the capacity of 128"):
        assert extension.capacity == 128
        model(tokens(1, 129))
    with pytest.raises(ValueError, match="reaches 128 tokens"):
        longreach.extend(model, YaRN(2.0), context=129)
    for method in (DynamicNTK(), DynamicYaRN(), Combined(DynamicYaRN(), SelfExtend(2, 8))):
        with pytest.raises(ValueError, match=r"pass context=N"):
            longreach.extend(model, method)
        with longreach.extend(model, method, context=500) as extension:
            assert extension.capacity == 500


SCALINGS = [
    ("llama3", "llama3 by 8"),
    ("llama-yarn", "yarn by 4"),
    ("llama-linear", "linear by 2"),
    ("llama-dynamic", "dynamic by 2"),
    ("phi3-longrope", "longrope"),
]


@pytest.mark.parametrize("method", [PI(2.0), NTK(2.0), DynamicNTK(), NTKByParts(2.0), YaRN(2.0), DynamicYaRN(), Combined(PI(2.0), LMInfinite(8))], ids=str)
@pytest.mark.parametrize(("family", "kind"), SCALINGS)
@torch.no_grad()
def test_a_scaled_checkpoint_is_not_scaled_again(family, kind, method):
    model, ids = build(family), tokens(1, 30)
    before = model(ids).logits
    with pytest.raises(ValueError, match=rf"scaled already \({kind}.*such as SelfExtend or LMInfinite"):
        longreach.extend(model, method, context=60)
    assert torch.equal(model(ids).logits, before)


def test_a_model_without_a_rotary_has_no_frequencies():
    model = t.AutoModelForCausalLM.from_config(t.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="no rotary position module"):
        longreach.extend(model, YaRN(2.0))


def test_frequencies_that_are_no_powers_of_the_base_are_refused():
    model = build("llama")
    model.model.rotary_emb.inv_freq *= 1.001
    with pytest.raises(ValueError, match="not powers of its rope_theta"):
        longreach.extend(model, YaRN(2.0))


def test_one_rotary_pair_has_no_base_to_change():
    model = build("gpt-neox", **rope("default", partial_rotary_factor=0.125))
    for method in (NTK(2.0), DynamicNTK()):
        with pytest.raises(ValueError, match="two pairs"):
            longreach.extend(model, method, context=80)
    longreach.extend(model, PI(2.0)).remove()


@torch.no_grad()
def test_layers_without_positions_stay_as_they_are():
    settings = {k: v for k, v in build("llama").config.to_dict().items() if k in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    config = t.SmolLM3Config(
        **settings, num_hidden_layers=2, num_key_value_heads=2, no_rope_layers=[1, 0], initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=WINDOW,
    )  # fmt: skip
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with longreach.extend(model, YaRN(2.0)) as extension:
        assert extension.layers[1].rotary is None and extension.layers[0].rotary.scaling > 1
        assert extension.report()["layers_without_positions"] == [1]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: PI(0.5), "factor must be a number of at least 1"),
        (lambda: NTK(True), "at least 1"),
        (lambda: YaRN(math.inf), "at least 1"),
        (lambda: DynamicNTK(0), "at least 1"),
        (lambda: NTKByParts(2.0, alpha=0), "above 0"),
        (lambda: NTKByParts(2.0, alpha=4, beta=4), "beta must be larger"),
        (lambda: YaRN(2.0, beta_fast=1.0), "beta_fast must be larger"),
        (lambda: YaRN(2.0, truncate_ramp=1), "true or false"),
        (lambda: YaRN(2.0, attention_factor=0.0), "above 0"),
        (lambda: DynamicYaRN(beta_slow=-1), "above 0"),
        (lambda: LongRoPE(2.0, ()), "numbers above 0"),
        (lambda: LongRoPE(2.0, (1.0, 0.0)), "numbers above 0"),
        (lambda: LongRoPE(2.0, (1.0, 2.0), (1.0,)), "give both one per pair"),
        (lambda: LongRoPE(2.0, "nowhere.json"), "cannot be read"),
        (lambda: Combined(SelfExtend(2, 4), LMInfinite(8)), "encoding must be a frequency method"),
        (lambda: Combined(YaRN(2.0), PI(2.0)), "positions must be a method without frequencies"),
        (lambda: Combined(YaRN(2.0), Combined(PI(2.0), Stock())), "positions must be"),
    ],
)
def test_bad_parameters(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("home", [None, "rope_parameters", "rope_scaling"])
def test_longrope_reads_its_lists_from_a_file(tmp_path, home):
    lists = {"long_factor": list(LONG), "short_factor": list(SHORT)}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(lists if home is None else {home: lists, "model_type": "phi3"}))
    assert LongRoPE(2.0, str(path)) == LongRoPE(2.0, LONG, SHORT)
    assert LongRoPE(2.0, str(path), (1.0,) * 8) == LongRoPE(2.0, LONG, (1.0,) * 8)
    path.write_text(json.dumps(list(LONG)))
    assert LongRoPE(2.0, str(path)) == LongRoPE(2.0, LONG)
    path.write_text(json.dumps({"short_factor": [1.0]}))
    with pytest.raises(ValueError, match="has no long_factor"):
        LongRoPE(2.0, str(path))


def test_a_long_list_is_not_written_out_in_sentences():
    written = str(LongRoPE(4.0, (1.0, *[2.0] * 62, 3.0)))
    assert written == "LongRoPE(factor=4.0, long_factor=(1.0, 2.0, ..., 3.0: 64 values), short_factor=None, attention_factor=None)"
