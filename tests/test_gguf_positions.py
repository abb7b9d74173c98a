"""What a GGUF file says of positions and attention and Transformers leaves out: read as llama.cpp wrote it, against the model that it was written from."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as t

import gguf_files
import longreach
from longreach import configs, gguf_file, gguf_positions

pytest.importorskip("gguf", reason="gguf is not installed: pip install 'longreach[interop]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'longreach[interop]'")

SHORT, LONG = [1.0 + 0.05 * i for i in range(8)], [1.5 + 3.0 * i for i in range(8)]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def dense(kind: str, **own: object) -> t.PretrainedConfig:
    return getattr(t, kind)(**{**gguf_files.DENSE, "tie_word_embeddings": True, **own})


def divisors(config: t.PretrainedConfig) -> list[float]:
    """As llama.cpp makes `rope_freqs` from the rule of Llama 3."""
    rope, width, made = config.rope_parameters, config.head_dim, []
    for i in range(width // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / width)
        turns = rope["original_max_position_embeddings"] / wavelength
        smooth = min(1.0, max(0.0, (turns - 1.0) / 3.0))
        made.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return made


def cases() -> dict[str, tuple[str, t.PretrainedConfig, dict[str, object], dict[str, object]]]:
    """{what: (architecture, the model's own configuration, what llama.cpp writes of it besides, its vectors)}"""
    llama3 = {window: dense("LlamaConfig", rope_parameters={**LLAMA3, "original_max_position_embeddings": window}) for window in (8192, 4096)}
    yarn = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 256}
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": SHORT,
        "long_factor": LONG,
        "attention_factor": 1.19,
        "partial_rotary_factor": 1.0,
    }
    linear = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    swa = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0}}
    mixed = {"num_hidden_layers": 6, "sliding_window": 24, "query_pre_attn_scalar": 16}
    scaling = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 256}
    bare = {key: value for key, value in scaling.items() if "original" not in key}
    nowhere = {**mixed, "layer_types": ["full_attention"] * 6, "query_pre_attn_scalar": 16}
    partial = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.75}
    return {
        "Llama 3": ("llama", llama3[8192], {}, {"rope_freqs.weight": divisors(llama3[8192])}),
        "Llama 3 of another window": ("llama", llama3[4096], {}, {"rope_freqs.weight": divisors(llama3[4096])}),
        "divisors of one": ("llama", dense("LlamaConfig"), {}, {"rope_freqs.weight": [1.0] * 8}),
        "YaRN": ("qwen2", dense("Qwen2Config", rope_parameters=yarn), scaling, {}),
        "YaRN with its own betas and factor": (
            "qwen2",
            dense("Qwen2Config", rope_parameters={**yarn, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.5 * (0.1 * math.log(4) + 1)}),
            {**scaling, "rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.attn_factor": 0.5},
            {},
        ),
        "linear": (
            "llama",
            dense("LlamaConfig", rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {},
        ),
        "YaRN of a window that is not stated": (
            "qwen2",
            dense("Qwen2Config", rope_parameters={**yarn, "original_max_position_embeddings": gguf_files.DENSE["max_position_embeddings"]}),
            bare,
            {},
        ),
        "YaRN with Mistral's multiplier": (
            "llama",
            dense("LlamaConfig", rope_parameters={**yarn, "attention_factor": 1.0}),
            {**scaling, "rope.scaling.yarn_log_multiplier": 1.0, "rope.scaling.yarn_ext_factor": -1.0},
            {},
        ),
        "linear, as it was written once": (
            "llama",
            dense("LlamaConfig", rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}),
            {"rope.scale_linear": 4.0},
            {},
        ),
        "no scaling, and said so": ("llama", dense("LlamaConfig"), {"rope.scaling.type": "none"}, {}),
        "linear on full layers alone": (
            "gemma3",
            dense("Gemma3TextConfig", rope_parameters=linear, **mixed),
            {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
            {},
        ),
        "YaRN, and no layer slides (Rnj-1)": (
            "gemma3",
            dense("Gemma3TextConfig", rope_parameters={**swa, "full_attention": {**yarn, "rope_theta": 1e6}}, **nowhere),
            {**scaling, "attention.sliding_window": None},
            {},
        ),
        "bases as Ollama writes them": (
            "gemma3",
            dense("Gemma3TextConfig", rope_parameters=swa, **mixed),
            {"rope.freq_base": None, "rope.global.freq_base": 1e6, "rope.local.freq_base": 20_000.0},
            {},
        ),
        "no window, and said so (Phi-4)": (
            "phi3",
            dense("Phi3Config", sliding_window=None, vocab_size=32064),
            {"rope.dimension_count": 16, "attention.sliding_window": 0},
            {},
        ),
        "the base of sliding layers": ("gemma3", dense("Gemma3TextConfig", rope_parameters=swa, **mixed), {"rope.freq_base_swa": 20_000.0}, {}),
        "LongRoPE": (
            "phi3",
            dense("Phi3Config", rope_parameters={**longrope, "original_max_position_embeddings": 256}, original_max_position_embeddings=256, vocab_size=32064),
            {"rope.dimension_count": 16, "rope.scaling.original_context_length": 256, "rope.scaling.attn_factor": 1.19},
            {"rope_factors_short.weight": SHORT, "rope_factors_long.weight": LONG},
        ),
        "a part of each head, and a sliding window": (
            "phi3",
            dense("Phi3Config", rope_parameters=partial, sliding_window=40, vocab_size=32064),
            {"rope.dimension_count": 12, "attention.sliding_window": 40},
            {},
        ),
        "a base that Transformers does not read": (
            "starcoder2",
            dense("Starcoder2Config", rope_parameters={"rope_type": "default", "rope_theta": 999_999.0}),
            {"rope.freq_base": 999_999.0},
            {},
        ),
        "soft-caps": (
            "gemma2",
            dense("Gemma2Config", query_pre_attn_scalar=16, attn_logit_softcapping=7.0, final_logit_softcapping=9.0),
            {"attn_logit_softcapping": 7.0, "final_logit_softcapping": 9.0},
            {},
        ),
    }


CASES = cases()


def loaded(file: Path) -> t.PreTrainedModel:
    """The tokenizers of some architectures need words that these files do not have."""
    return gguf_file.model(file, gguf_file.header(file), torch.float32)[0].eval()


@pytest.mark.parametrize("what", CASES)
def test_a_file_gives_the_model_that_it_was_written_from(tmp_path, what):
    """The same logits as the original configuration gives with these weights, in its window and, where frequencies depend on it, beyond."""
    architecture, config, said, vectors = CASES[what]
    file = tmp_path / "tiny.gguf"
    gguf_files.write(file, architecture, config=config, said=said, vectors=vectors)
    model = loaded(file)
    original = t.AutoModelForCausalLM.from_config(config).eval()
    original.load_state_dict(model.state_dict())
    for length in (20, 300):
        ids = torch.randint(3, gguf_files.VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            expected, found = original(ids).logits, model(ids).logits
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), (what, length)
    assert configs.trained_window(model.config) == configs.trained_window(config)
    assert configs.scaling(configs.load(str(file))[0]) == configs.scaling(model.config)  # what `plan` reads


@pytest.mark.parametrize("what", [what for what in CASES if what not in ("divisors of one", "no scaling, and said so", "no window, and said so (Phi-4)")])
def test_transformers_alone_makes_another_model_of_it(tmp_path, what):
    """Why this is here. Where Transformers has learned to read it, its line in `gguf_positions` can go."""
    architecture, config, said, vectors = CASES[what]
    gguf_files.write(tmp_path / "tiny.gguf", architecture, config=config, said=said, vectors=vectors)
    alone = t.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    model = loaded(tmp_path / "tiny.gguf")
    ids = torch.randint(3, gguf_files.VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (alone(ids).logits - model(ids).logits).abs().max() > 1e-3


def test_a_version_that_streams_files_itself_is_given_what_it_leaves_out(tmp_path, monkeypatch):
    architecture, config, said, vectors = CASES["Llama 3"]
    gguf_files.write(tmp_path / "tiny.gguf", architecture, config=config, said=said, vectors=vectors)
    expected = longreach.load(str(tmp_path / "tiny.gguf"))[0]
    monkeypatch.setattr(gguf_file, "streamed_by_transformers", lambda architecture: True)
    found = longreach.load(str(tmp_path / "tiny.gguf"))[0]
    assert found.config.rope_parameters == expected.config.rope_parameters
    ids = torch.arange(5, 105)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, expected(ids).logits)


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("said", "vectors", "sentence"),
    [
        ({}, {"rope_freqs.weight": [1.0, 1.0, 9.0, 2.0, 1.0, 1.0, 1.0, 1.0]}, "by another rule than Llama 3's"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_freqs.weight": [1.0] * 7 + [8.0]}, "both rope_freqs.weight and"),
        ({"rope.scaling.type": "longrope"}, {}, "or the original window"),
        ({}, {"rope_factors_short.weight": [1.0] * 8}, "lacks rope_factors_short.weight, rope_factors_long.weight or"),
        ({"rope.scaling.type": "spiral"}, {}, "unknown rule 'spiral'"),
        ({"rope.scaling.type": "yarn"}, {}, "does not say by how much"),
        ({**YARN, "rope.scaling.yarn_ext_factor": 0.5}, {}, "extrapolation factor of 0.5"),
        ({"rope.spiral": 0.1}, {}, "it says rope.spiral"),
        ({"rope.scaling.attn_factor": 0.5}, {}, "it multiplies cos and sin by 0.5"),
    ],
)
def test_frequencies_that_transformers_has_no_name_for(tmp_path, said, vectors, sentence):
    gguf_files.write(tmp_path / "tiny.gguf", "llama", said=said, vectors=vectors)
    for read in (longreach.load, configs.load):
        with pytest.raises(ValueError, match="could not load") as raised:
            read(str(tmp_path / "tiny.gguf"))
        assert sentence in str(raised.value) and str(raised.value).endswith("load the safetensors that it was made from")


NUMBERS = (
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.dimension_count",
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -2.0, 0.0, "4", [4.0, 4.0]], ids=str)
@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_cannot_be_is_refused(key, value):
    """Not read as another one: a list is known by its length alone, and 0 is no factor."""
    said = {"context_length": 1024, "rope.freq_base": 10_000.0, "rope.scaling.original_context_length": 256, **YARN}
    said[key] = gguf_file.Length(len(value)) if isinstance(value, list) else value
    with pytest.raises(ValueError, match=f"for {key.removeprefix('rope.')}, .*; download the file again"):
        gguf_positions.complete(dense("LlamaConfig"), said, {})


@pytest.mark.parametrize("vector", [[1.0] * 4, [1.0] * 16, [1.0] * 7 + [float("nan")], [1.0] * 7 + [0.0], [-1.0] * 8], ids=str)
@pytest.mark.parametrize("name", gguf_positions.VECTORS)
def test_a_vector_that_cannot_be_is_refused(name, vector):
    whole = {name: np.full(8, 1.5, np.float32) for name in gguf_positions.VECTORS}
    with pytest.raises(ValueError, match=f"its {name} is not one positive number for each of 8 frequencies"):
        gguf_positions.complete(dense("LlamaConfig"), {"context_length": 1024}, {**whole, name: np.asarray(vector, np.float32)})


@pytest.mark.parametrize("value", [float("nan"), -1, "24"])
@pytest.mark.parametrize("key", ["attention.sliding_window", "attn_logit_softcapping"])
def test_a_window_or_a_cap_that_cannot_be_is_refused(key, value):
    with pytest.raises(ValueError, match=f"for {key}, .*; download the file again"):
        gguf_positions.complete(dense("Gemma2Config"), {key: value}, {})


def test_a_factor_that_files_do_not_explain_is_said_aloud():
    """The converter writes a model's attention_factor, which replaces YaRN's, and its attn_factor, which multiplies it, under one name."""
    config = dense("Qwen2Config")
    said = {"context_length": 1024, **YARN, "rope.scaling.original_context_length": 256, "rope.scaling.yarn_attn_factor": 0.9}
    with pytest.warns(UserWarning, match="yarn_attn_factor of 0.9 may replace YaRN's own factor or multiply it"):
        gguf_positions.complete(config, said, {})
    assert "attention_factor" not in config.rope_parameters


def test_a_family_with_a_rule_of_its_own_keeps_it():
    """Gemma 4's full layers rotate a part of their frequencies, which files write as divisors of 1e30."""
    config = t.Gemma3TextConfig(num_hidden_layers=6)
    config.rope_parameters["full_attention"] |= {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    before = copy.deepcopy(config.rope_parameters)
    gguf_positions.complete(config, {"attention.sliding_window": 512, "rope.freq_base": 5.0}, {"rope_freqs.weight": np.asarray([1.0] * 64 + [1e30] * 64)})
    assert config.rope_parameters == before and config.sliding_window == 512


def test_dimensions_that_would_not_rotate_as_in_training(tmp_path):
    """Starcoder2's rotary embedding knows no part of a head."""
    gguf_files.write(tmp_path / "tiny.gguf", "starcoder2", said={"rope.dimension_count": 8})
    with pytest.raises(ValueError, match="8 dimensions of its heads rotate, and 16 would"):
        longreach.load(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (t.Gemma2Config(hidden_size=4608, num_attention_heads=32, num_hidden_layers=46), 144),
        (t.Gemma2Config(hidden_size=3584, num_attention_heads=16, num_hidden_layers=42), 256),
        (t.Gemma3TextConfig(hidden_size=5376, num_attention_heads=32, num_hidden_layers=62), 168),
        (t.Gemma3TextConfig(hidden_size=640, num_attention_heads=4, num_hidden_layers=18), 256),
    ],
)
def test_the_largest_gemma_scales_its_queries_by_another_width(config, width):
    """As in the published configurations. Files say nothing of it."""
    gguf_positions.complete(config, {}, {})
    assert config.query_pre_attn_scalar == width


def test_the_defaults_of_other_configurations_stay(tmp_path):
    before = t.LlamaConfig().rope_parameters
    architecture, config, said, vectors = CASES["linear"]
    gguf_files.write(tmp_path / "tiny.gguf", architecture, config=config, said=said, vectors=vectors)
    longreach.load(str(tmp_path / "tiny.gguf"))
    assert t.LlamaConfig().rope_parameters == before and np.isfinite(before["rope_theta"])
