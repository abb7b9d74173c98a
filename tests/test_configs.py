"""Configurations of real families, as their classes are without weights: window, kinds of layers, sizes, refusals, and where one is found."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as t

import longreach
from families import BASE, build
from longreach import LMInfinite, SelfExtend, Stock, configs
from longreach.configs import Window, trained_layers, trained_window

LARGER = "no layer was trained on a larger distance"


def rope(kind: str, **more):
    return {"rope_type": kind, "rope_theta": 10000.0, **more}


CONFIGS = [
    (t.LlamaConfig(max_position_embeddings=4096), 4096),
    (
        t.LlamaConfig(
            max_position_embeddings=131072,
            rope_parameters=rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
        ),
        131072,
    ),
    (t.LlamaConfig(max_position_embeddings=65536, rope_parameters=rope("yarn", factor=16.0, original_max_position_embeddings=4096)), 65536),
    (t.Qwen2Config(max_position_embeddings=32768, rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=32768)), 131072),
    (t.LlamaConfig(max_position_embeddings=4096, rope_parameters=rope("linear", factor=4.0)), 4096),
    (t.LlamaConfig(max_position_embeddings=4096, rope_parameters=rope("dynamic", factor=4.0)), 4096),
    (t.MistralConfig(max_position_embeddings=32768, sliding_window=4096), 4096),
    (t.MistralConfig(max_position_embeddings=32768, sliding_window=None), 32768),
    (t.Qwen2Config(max_position_embeddings=32768, use_sliding_window=False, sliding_window=4096), 32768),
    (t.Gemma2Config(max_position_embeddings=8192, sliding_window=4096), 8192),
    (t.GptOssConfig(max_position_embeddings=131072), 131072),
]


@pytest.mark.parametrize(("config", "window"), CONFIGS, ids=lambda x: f"{x}" if isinstance(x, int) else x.model_type)
def test_trained_window(config, window):
    assert trained_window(config).tokens == window


def test_the_window_says_where_it_was_read():
    assert trained_window(CONFIGS[3][0]).reason == "yarn scaling: 32768 x 4"
    assert trained_window(CONFIGS[4][0]).reason == "max_position_embeddings 4096; with its linear scaling by 4 it may be more: then pass trained_window=N"
    assert trained_window(CONFIGS[6][0]).reason == f"sliding window of every layer, 4096: {LARGER}"
    assert trained_window(t.LlamaConfig(), 99) == Window(99, "given") == trained_window(t.BloomConfig(), 99)
    with pytest.raises(ValueError, match=r"no max_position_embeddings; pass trained_window=N"):
        trained_window(t.BloomConfig())


# What a class says by default: window, how many layers of which kind, (heads, key heads, key and value width), latent.
FAMILIES = {
    "llama": (2048, "32 full", (32, 32, 128, 128), None),
    "qwen2": (32768, "32 full", (32, 32, 128, 128), None),
    "qwen3_moe": (32768, "24 full", (32, 4, 64, 64), None),
    "mistral": (4096, "32 sliding 4096", (32, 8, 128, 128), None),
    "mixtral": (131072, "32 full", (32, 8, 128, 128), None),
    "ministral3": (262144, "34 full", (32, 8, 128, 128), None),
    "gemma": (8192, "28 full", (16, 16, 256, 256), None),
    "gemma2": (8192, "13 full, 13 sliding 4096", (8, 4, 256, 256), None),
    "gemma3_text": (131072, "4 full, 22 sliding 4096", (8, 4, 256, 256), None),
    "gpt_oss": (131072, "18 full, 18 sliding 128", (64, 8, 64, 64), None),
    "llama4_text": (131072, "12 full, 36 chunks 8192", (40, 8, 128, 128), None),
    "phi": (2048, "24 full", (32, 32, 64, 64), None),
    "phi3": (4096, "32 full", (32, 32, 96, 96), None),
    "deepseek_v3": (4096, "61 full", (128, 128, 192, 128), 576),
    "cohere2": (8192, "10 full, 30 sliding 4096", (64, 64, 128, 128), None),
    "olmo3": (2048, "8 full, 24 sliding 4096", (32, 32, 128, 128), None),
    "exaone4": (2048, "8 full, 24 sliding 4096", (32, 32, 128, 128), None),
    "starcoder2": (4096, "30 full", (24, 2, 128, 128), None),
    "falcon": (2048, "32 full", (71, 1, 64, 64), None),
    "mpt": (2048, "24 full", (16, 16, 128, 128), None),
    "gpt_neox": (2048, "44 full", (64, 64, 96, 96), None),
    "gptj": (2048, "28 full", (16, 16, 256, 256), None),
    "codegen": (2048, "28 full", (16, 16, 256, 256), None),
    "stablelm": (4096, "32 full", (32, 32, 80, 80), None),
    "smollm3": (32768, "36 full", (16, 4, 128, 128), None),
    "minimax_m2": (196608, "62 full", (48, 8, 128, 128), None),
    "glm4": (131072, "40 full", (32, 2, 128, 128), None),
    "granite": (2048, "32 full", (32, 32, 128, 128), None),
    "ernie4_5": (131072, "18 full", (16, 2, 128, 128), None),
    "nemotron": (4096, "32 full", (48, 48, 128, 128), None),
    "gpt2": (1024, "12 full", (12, 12, 64, 64), None),
}


def kind(layer: Stock) -> str:
    return f"sliding {layer.sliding_window}" if layer.sliding_window else f"chunks {layer.attention_chunk}" if layer.attention_chunk else "full"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_read_as_they_are(family):
    config = t.AutoConfig.for_model(family)
    window, kinds, shape, latent = FAMILIES[family]
    found, names = configs.decoder(config, torch.bfloat16), [kind(layer) for layer in trained_layers(config)]
    assert trained_window(config).tokens == window
    assert {f"{names.count(name)} {name}" for name in names} == set(kinds.split(", "))
    assert {(x.heads, x.kv_heads, x.key_width, x.value_width) for x in found.layers} == {shape} and found.latent == latent
    assert [x.trained for x in found.layers] == list(trained_layers(config)) and len(names) == config.num_hidden_layers
    assert (found.name, found.hidden, found.vocabulary, found.itemsize) == (family, config.hidden_size, config.vocab_size, 2)
    configs.refuse_unsupported(config)


def test_the_order_of_layers():
    assert [layer.sliding_window for layer in trained_layers(t.Gemma2Config(num_hidden_layers=4))] == [4096, None, 4096, None]
    assert [layer.attention_chunk for layer in trained_layers(t.Llama4TextConfig(num_hidden_layers=5, attention_chunk_size=24))] == [24, 24, 24, None, 24]
    assert [layer.sliding_window for layer in trained_layers(t.Gemma3TextConfig(num_hidden_layers=7, sliding_window=8))] == [8] * 5 + [None, 8]


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "mistral-sliding", "gemma2", "gemma3", "gpt-oss", "cohere2", "olmo3", "exaone4", "llama4", "llama4-rope", "deepseek-v3"]
)
def test_a_layer_attends_as_its_configuration_says(family):
    """What the attention calls of a model are told, against what planning reads."""
    model = build(family)
    with longreach.extend(model, Stock()) as extension:
        assert [layer.method for layer in extension.layers] == list(trained_layers(model.config))


def test_which_layers_take_a_method():
    full, sliding, chunks, method = Stock(), Stock(sliding_window=8), Stock(attention_chunk=8), SelfExtend(4, 16)
    assert configs.methods_of([full, sliding, chunks], method) == [method, sliding, chunks]
    assert configs.methods_of([sliding, sliding], method) == [method, method] and configs.methods_of([chunks, sliding], method) == [chunks, sliding]
    assert configs.methods_of([sliding, full], Stock()) == [sliding, full] and configs.methods_of([sliding], Stock()) == [sliding]
    assert configs.methods_of([full], LMInfinite(9)) == [LMInfinite(9)]


STATE, SHARED, COST = "whose state has no positions to extend", "shares keys and values between layers", "whose cost is not known here"
REFUSED = {
    "qwen3_next": f"layers of type linear_attention, {STATE}",
    "falcon_h1": f"layers of type hybrid, {STATE}",
    "minimax": f"layers of type linear_attention, {STATE}",
    "gemma3n_text": SHARED,
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_no_method_can_be_attached_to(family):
    config, says = t.AutoConfig.for_model(family), REFUSED[family]
    with pytest.raises(ValueError, match=says):
        configs.refuse_unsupported(config)
    with pytest.raises(ValueError, match=says):
        configs.decoder(config, torch.float32)


def test_what_cannot_be_counted():
    config = t.LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "other_attention"]
    configs.refuse_unsupported(config)
    with pytest.raises(ValueError, match=f"layers of type other_attention, {COST}"):
        configs.decoder(config, torch.float32)
    with pytest.raises(ValueError, match="the clip configuration has no num_attention_heads"):
        configs.decoder(t.CLIPConfig(), torch.float32)


class Uneven(t.LlamaConfig):
    """Newer Transformers refuse to read a size that is not the same in all layers, with an error that getattr's default does not catch."""

    def __getattribute__(self, name):
        if name == "head_dim":
            raise RuntimeError("'head_dim' is a per-layer attribute and may vary across layers")
        return super().__getattribute__(name)


def test_layers_of_unequal_sizes_are_a_sentence():
    config = t.LlamaConfig()
    config.__class__ = Uneven
    with pytest.raises(ValueError, match="layers of this llama differ in head_dim; plan a model whose layers are alike"):
        configs.decoder(config, torch.float32)


def test_how_a_layer_rotates():
    yarn = t.LlamaConfig(max_position_embeddings=65536, rope_parameters=rope("yarn", factor=16.0, original_max_position_embeddings=4096))
    assert configs.scaling(yarn) == configs.Scaling("yarn", 16.0, 4096, 10000.0) and configs.original_window(yarn) == 4096
    nested = t.Gemma3TextConfig()
    kinds = {kind: configs.scaling(nested, kind).base for kind in ("full_attention", "sliding_attention")}
    assert kinds == {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}
    assert configs.scaling(t.GPTJConfig()) == configs.Scaling("default", None, None, 10000.0) and configs.original_window(t.GPTJConfig()) == 2048
    assert configs.original_window(t.GptOssConfig()) == 4096 and configs.original_window(t.MistralConfig()) == 131072
    assert configs.original_window(t.Phi3Config(original_max_position_embeddings=1024)) == 1024


def test_a_configuration_is_found_by_name(tmp_path):
    nano, shown = configs.load("nano")
    assert (nano.model_type, trained_window(nano).tokens, shown) == ("llama", 512, "nano")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**t.Gemma2Config().to_dict(), "sliding_window": 77}))
    for model, config, name in ((str(tmp_path), None, str(tmp_path)), ("nano", file, str(tmp_path)), ("mine", str(file), "mine")):
        found, shown = configs.load(model, config)
        assert (found.sliding_window, shown) == (77, name)
    assert configs.load(t.LlamaConfig(num_hidden_layers=3))[0].num_hidden_layers == 3
    assert configs.load("nano", {"model_type": "gpt2"})[1] == "gpt2"


def test_a_folder_of_the_name_goes_before_the_embedded_model(tmp_path, monkeypatch):
    """`load` takes it at its own dtype, and so does a plan."""
    t.LlamaConfig(**{**BASE, "dtype": "bfloat16"}).save_pretrained(tmp_path / "nano")
    assert longreach.plan("nano", 300, "L4", new_tokens=8).to_json()["dtype"] == "float32"
    monkeypatch.chdir(tmp_path)
    found = longreach.plan("nano", 300, "L4", new_tokens=8).to_json()
    assert (found["dtype"], found["trained_window"]) == ("bfloat16", 64)


@pytest.mark.parametrize(
    ("model", "config", "says"),
    [
        (3, None, "3 is not a model; pass a name"),
        ("nano", {}, 'add "model_type"'),
        ("nano", {"model_type": "nothing"}, "could not load 'config': .*; it is no configuration that Transformers knows"),
        ("nano", "absent.json", "cannot read 'absent.json'"),
        ("nothing.gguf", None, "there is no file 'nothing.gguf'"),
        ("./nothing", None, "there is no folder './nothing'"),
        (" ", None, "there is no model without a name"),
    ],
    ids=str,
)
def test_what_is_no_configuration(model, config, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=says):
        configs.load(model, config)


def test_the_text_part_of_a_wrapper():
    text, dtype, notes = configs.text_part(t.Gemma3Config(), None)
    assert text.model_type == "gemma3_text" and dtype == torch.float32 and "only its text model (gemma3_text) is counted" in notes[0] and len(notes) == 2
    quantised = t.LlamaConfig(dtype="bfloat16", quantization_config={"quant_method": "gptq", "bits": 4})
    text, dtype, notes = configs.text_part(quantised, None)
    assert dtype == torch.bfloat16 and "counted unquantised" in notes[0] and not hasattr(text, "quantization_config") and quantised.quantization_config
    assert configs.text_part(quantised, torch.float16)[1] == torch.float16
    with pytest.raises(ValueError, match="encoder-decoder"):
        configs.text_part(t.T5Config(), None)
