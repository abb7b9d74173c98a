"""Loading: what comes from a folder or a GGUF file, and one clear sentence for what cannot."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
import transformers as t

import gguf_files
import longreach
from longreach import gguf_file
from longreach.running.loading import parse_dtype, shipped_book


def refusal(name: object) -> str:
    with pytest.raises(ValueError) as refused:
        longreach.load(str(name))
    sentence = str(refused.value)
    assert "\n" not in sentence and "..." not in sentence and len(sentence) < 900, sentence
    return sentence


def test_names_that_mean_no_model(tmp_path):
    assert "without a name" in refusal("")
    for name in (tmp_path / "nothing", "./nothing", "some/where/deep"):
        assert "there is no folder" in refusal(name) and "pass a folder with config.json" in refusal(name)
    assert "there is no file" in refusal(tmp_path / "none.gguf")
    (tmp_path / "notes.txt").write_text("GG, well played")
    assert "does not begin with the letters GGUF" in refusal(tmp_path / "notes.txt")
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    assert f"name its folder, {str(tmp_path)!r}" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        (("*.j*", "*.safetensors"), "no config.json and no tokenizer files (such as tokenizer.json) and no weights (*.safetensors)"),
        (("config.json",), "the folder has no config.json;"),
        (("tokenizer*",), "the folder has no tokenizer files (such as tokenizer.json);"),
        (("*.safetensors",), "the folder has no weights (*.safetensors);"),
    ],
)
def test_a_folder_that_lacks_something(tmp_path, removed, said):
    model, tokenizer = longreach.load("nano")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for pattern in removed:
        for file in tmp_path.glob(pattern):
            file.unlink()
    sentence = refusal(tmp_path)
    assert said in sentence and sentence.endswith("or 'nano'")


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    """Transformers fills them in with random numbers and says so in a log; all answers would be noise."""
    from safetensors.torch import load_file, save_file

    model, tokenizer = longreach.load("nano")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for name in [name for name in weights if "layers.1.mlp" in name]:
        del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert "it lacks model.layers.1.mlp.down_proj.weight and 2 more" in refusal(tmp_path)


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"hidden_size": -4}, {"num_attention_heads": 0}, {"model_type": "unheard-of"}, None])
def test_a_configuration_of_nonsense(tmp_path, change):
    model, tokenizer = longreach.load("nano")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{" if change is None else json.dumps({**json.loads(file.read_text()), **change}))
    assert "could not load" in refusal(tmp_path)


def test_corrupt_weights(tmp_path):
    model, tokenizer = longreach.load("nano")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = longreach.load(str(tmp_path), dtype="bf16")
    assert again.dtype == torch.bfloat16 and not again.training
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="could not load"):
        longreach.load(str(tmp_path))


def test_pickled_weights_are_never_read(tmp_path):
    model, tokenizer = longreach.load("nano")
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "convert them to safetensors" in refusal(tmp_path)


def test_dtypes_and_devices():
    assert parse_dtype("fp16") == torch.float16 and parse_dtype(None) is None
    with pytest.raises(ValueError, match="choose one of"):
        parse_dtype("int8")
    with pytest.raises(ValueError, match="unknown device"):
        longreach.load("nano", device="toaster")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device='cpu'"):
            longreach.load("nano", device="cuda")


def test_the_shipped_book_is_text():
    book = shipped_book()
    assert book.startswith("CHAPTER 1. Loomings.") and len(book) > 300_000


# -- GGUF -----------------------------------------------------------------------------------------------------------------------


def needs_gguf() -> None:
    for name in ("gguf", "accelerate"):
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'longreach[interop]'")


@pytest.mark.parametrize("architecture", gguf_files.ARCHITECTURES)
def test_gguf_is_what_transformers_makes_of_it(tmp_path, architecture):
    """Bit-equal, for every way in which Transformers undoes what llama.cpp did to weights and names."""
    needs_gguf()
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    file = tmp_path / "tiny.gguf"
    names = gguf_files.write(file, architecture, kind="Q8_0")
    stock = t.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.bfloat16)
    model, info = gguf_file.model(file, gguf_file.header(file), torch.bfloat16)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected, found = stock.state_dict(), model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    same = {name: value for name, value in stock.config.to_dict().items() if name not in ("quantization_config", "_name_or_path")}
    assert {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"} == same
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=stock.config.to_dict())
    assert gguf_file.names_of(model, processor) == names
    with torch.no_grad():
        ids = torch.arange(5, 25)[None]
        assert torch.equal(model(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_the_tokenizer_of_a_gguf_file_is_the_one_of_transformers(tmp_path, architecture):
    needs_gguf()
    gguf_files.write(tmp_path / "tiny.gguf", architecture)
    stock = t.AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    _, tokenizer = longreach.load(str(tmp_path / "tiny.gguf"))
    text = "It was a dark night; \u2014 n\u00e9e\n\n    </s>"
    assert type(tokenizer) is type(stock) and tokenizer(text) == stock(text) and tokenizer.init_kwargs == stock.init_kwargs


def test_gguf_by_its_first_bytes_and_in_a_folder(tmp_path):
    needs_gguf()
    gguf_files.write(tmp_path / "tiny.gguf", "llama")
    expected = longreach.load(str(tmp_path / "tiny.gguf"))[0].state_dict()
    for name in ("tiny.bin", "tiny"):
        (tmp_path / "tiny.gguf").rename(tmp_path / name)
        for path in (tmp_path / name, tmp_path):
            found = longreach.load(str(path))[0].state_dict()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
        (tmp_path / name).rename(tmp_path / "tiny.gguf")
    (tmp_path / "config.json").write_text("{}")  # many folders of GGUF files have one
    longreach.load(str(tmp_path))
    (tmp_path / "other.gguf").write_bytes((tmp_path / "tiny.gguf").read_bytes())
    sentence = refusal(tmp_path)
    assert "name one of them" in sentence and str(tmp_path / "other.gguf") in sentence and str(tmp_path / "tiny.gguf") in sentence


def test_gguf_that_is_cut_off_or_forged(tmp_path):
    """Cut anywhere, or with a count, a length, a type or an offset that cannot be: a sentence, and at once."""
    needs_gguf()
    file = tmp_path / "tiny.gguf"
    gguf_files.write(file, "llama")
    whole = file.read_bytes()
    for length in (4, 11, 24, 40, 300, 3000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert "download" in refusal(file), length
    (first,) = struct.unpack_from("<Q", whole, 24)
    merges, tensor = whole.index(b"tokenizer.ggml.merges") + len("tokenizer.ggml.merges"), whole.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight")
    for at, form, value in (
        (8, "<Q", 2**62),  # how many tensors
        (16, "<Q", 2**62),  # how many entries
        (24, "<Q", 2**63),  # how long the first name is
        (24 + 8 + first, "<I", 99),  # the type of its value
        (merges + 8, "<Q", 2**60),  # how many merges
        (tensor, "<I", 2**31),  # how many dimensions
        (tensor + 4, "<Q", 2**62),  # how wide
        (tensor + 4, "<Q", 0),
        (tensor + 20, "<I", 77),  # the type of the weights
        (tensor + 24, "<Q", 2**62),  # where they are
    ):
        forged = bytearray(whole)
        struct.pack_into(form, forged, at, value)
        file.write_bytes(forged)
        assert "could not load" in refusal(file), (at, value)
    file.write_bytes(whole[:4] + b"\x00\x00\x00\x03" + whole[8:])  # big-endian
    assert "convert the model anew" in refusal(file)


def test_gguf_without_a_weight(tmp_path):
    needs_gguf()
    file = tmp_path / "tiny.gguf"
    gguf_files.write(file, "llama")
    file.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_no.weight"))
    assert "it lacks model.layers.1.mlp.up_proj.weight, without which" in refusal(file)


MEASURE = """
import json, resource, sys, time
import torch, transformers, gguf, accelerate, longreach
from transformers.models.llama import modeling_llama
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, start = peak(), time.perf_counter()
model, tokenizer = longreach.load(sys.argv[1], dtype=sys.argv[2])
print(json.dumps({"peak": peak() - before, "seconds": time.perf_counter() - start, "weights": sum(p.nbytes for p in model.parameters())}))
"""


@pytest.mark.slow  # writes and reads 90 MB in fresh processes
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_gguf_stays_below_twice_its_weights_and_near_the_time_of_a_folder(tmp_path, dtype):
    """A process of its own for each, so that nothing is warm and the peak is that of loading. The words are many, for their lists cost time too."""
    needs_gguf()
    file = tmp_path / "one" / "model.gguf"
    file.parent.mkdir()
    wide = {**gguf_files.DENSE, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "head_dim": 128, "vocab_size": 20_000}
    gguf_files.write(file, "llama", "F16", t.LlamaConfig(**wide, tie_word_embeddings=True))
    model, tokenizer = longreach.load(str(file), dtype=dtype)
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")

    def measure(path: object) -> dict[str, float]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ran = subprocess.run([sys.executable, "-c", MEASURE, str(path), dtype], capture_output=True, text=True, check=True, env=environment)
        return json.loads(ran.stdout.splitlines()[-1])

    found, folder = measure(file), measure(tmp_path / "folder")
    assert found["weights"] == folder["weights"] > 60e6
    assert found["peak"] < 2 * found["weights"], (found, folder)
    assert found["seconds"] < folder["seconds"] + 15, (found, folder)  # 1 s, and 5 s with the oldest Transformers; it was quadratic in the layers
