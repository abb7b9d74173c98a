"""The ways people run models: half precision, placement, adapters, quantised weights, GGUF, torch.compile, pipelines."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch.utils._python_dispatch import TorchDispatchMode

import gguf_files
import longreach
from families import build, tokens
from longreach import LMInfinite, SelfExtend
from longreach.core import encodings
from longreach.core.encodings import Rotary
from longreach.core.segments import Identity
from longreach.engine.batch import Batch
from longreach.engine.executor import execute
from longreach.engine.layer import Inputs, Layer
from longreach.hf.cache import store_of
from longreach.kernels.plain import PlainKernel
from test_matrix import chunked, difference
from tiny import SMALL
from tiny import tokenizer as byte_tokenizer

METHOD = SelfExtend(3, 8)
IDS = tokens(2, 50)


@torch.no_grad()
def logits_of(model: Any, method: Any = METHOD, **arguments: Any) -> torch.Tensor:
    """Prefill and decode under the method; the model is as before afterwards."""
    with longreach.extend(model, method, **arguments):
        return chunked(model, IDS, [30, 9, *[1] * 11])


@torch.no_grad()
def assert_served(model: Any) -> None:
    """Neutral is stock, the fast path is the dense truth, removal is bit-identical."""
    stock = model(IDS).logits
    assert difference(logits_of(model, SelfExtend(1, 8)), stock) <= 1e-4
    with longreach.extend(model, METHOD, backend="reference"):
        truth = model(IDS, use_cache=False).logits
    assert difference(logits_of(model), truth) <= 1e-5 and difference(truth, stock) > 1e-3
    assert torch.equal(model(IDS).logits, stock)


# -- dtypes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SelfExtend(1, 16), pytest.param(LMInfinite(60, 4), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "cohere", "gpt-oss"])
@torch.no_grad()
def test_fp16_error_is_that_of_stock(family, method):
    """As the gate of bf16: root mean square over logits against fp32 stock, at most 1.5 times that of stock in fp16."""
    model, ids = build(family), tokens(4, 48)
    truth = model(ids).logits
    model = model.half()
    error = lambda logits: (logits.float() - truth).square().mean().sqrt().item()  # noqa: E731
    stock = error(model(ids).logits)
    with longreach.extend(model, method):
        assert error(model(ids).logits) <= 1.5 * stock
        assert error(chunked(model, ids, [20, 3, *[1] * 25])) <= 1.5 * stock


# -- devices --------------------------------------------------------------------------------------------------------------------


class NoFp64(TorchDispatchMode):
    """A device type on which no fp64 tensor can exist, as on MPS."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device_type:
                assert tensor.dtype != torch.float64, f"{func} made an fp64 tensor on {self.device_type}"
        return result


@pytest.mark.parametrize("method", [SelfExtend(3, 8, log_scale=32), LMInfinite(9, 3), longreach.DualChunk(24)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_layers_on_several_devices_and_devices_without_fp64(method, padded, monkeypatch):
    """One plan serves layers on the CPU and on `meta`, which stands for a device without fp64; tables are kept per device."""
    monkeypatch.setattr(encodings, "WITHOUT_FP64", frozenset({"meta"}))
    cpu, meta = torch.device("cpu"), torch.device("meta")
    mask = torch.ones(2, 40, dtype=torch.bool)
    if padded:
        mask[0, 3:7] = False  # a row whose tokens are no slice
    plan = Batch.of(2, 40, mask, cpu, None)
    layer = Layer(0, method, Rotary(torch.rand(4, dtype=torch.float64)))
    q, k, v = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    out = execute(layer, plan, None, PlainKernel(), q, k, v, Inputs(0.5))
    with NoFp64("meta"):
        away = execute(layer, plan, None, PlainKernel(), q.to(meta), k.to(meta), v.to(meta), Inputs(0.5))
    assert away.device == meta and away.shape == out.shape
    here, there = (plan.table(layer.rotary, Identity(), 0, 5, device) for device in (cpu, meta))
    assert (here.cos.device, there.cos.device) == (cpu, meta) and here is plan.table(layer.rotary, Identity(), 0, 5, cpu)


def test_the_plain_backend_serves_a_model(monkeypatch):
    """What runs on MPS: tables made on the CPU, attention of matrix products."""
    model = build("gpt-oss")
    expected = logits_of(model)
    monkeypatch.setattr("longreach.hf.forward.kernel_for", lambda device, dtype: PlainKernel())
    assert difference(logits_of(model), expected) <= 1e-5


def test_a_device_map_and_offloaded_layers(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'longreach[interop]'")
    plain = build("llama")
    plain.save_pretrained(tmp_path / "model")
    plain.set_attn_implementation("sdpa")
    expected = logits_of(plain)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with longreach.extend(plain, METHOD) as extension, torch.no_grad():
        extension.save(plain(IDS, use_cache=True).past_key_values, tmp_path / "document", IDS)
    for number, device_map in enumerate(({"": "cpu"}, places)):
        model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / str(number))
        assert torch.equal(logits_of(model), expected)
        with longreach.extend(model, METHOD) as extension:
            assert torch.equal(extension.load(tmp_path / "document").ids, IDS)
            assert "cpu" in extension.report()["backend"]


@pytest.mark.parametrize("family", ["llama", "falcon", "mpt", "bloom"])
def test_every_weight_on_the_disk(family, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'longreach[interop]'")
    model = build(family)
    expected = logits_of(model)
    accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(logits_of(model), expected)


def test_a_model_that_was_never_loaded_is_refused():
    with pytest.raises(ValueError, match="never loaded; load it with from_pretrained"):
        longreach.extend(build("llama").to("meta"), METHOD)


# -- autocast -------------------------------------------------------------------------------------------------------------------

HALVES = [torch.bfloat16, torch.float16]
FAMILIES_CAST = ["llama", "gemma2", "gpt-oss", "deepseek-v3", "bloom", "falcon"]


def autocast(dtype: torch.dtype) -> Any:
    return torch.autocast(IDS.device.type, dtype)


def rms(logits: torch.Tensor, truth: torch.Tensor) -> float:
    return (logits.float() - truth).square().mean().sqrt().item()


@pytest.mark.parametrize("family", FAMILIES_CAST)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_autocast_errs_as_stock_does(family, dtype):
    """Extended inside or outside: what is measured and the error against fp32 are those of the weights, and of stock under autocast."""
    model, ids = build(family), tokens(4, 48)
    truth = model(ids).logits
    with autocast(dtype):
        stock = model(ids)
        with longreach.extend(model, SelfExtend(1, 16)) as extension:
            ours, parts = model(ids), chunked(model, ids, [20, 3, *[1] * 25])
            assert extension.exactness.logits <= 1e-4 and extension.exactness.layers is None
    assert ours.logits.dtype == stock.logits.dtype
    assert rms(ours.logits, truth) <= 1.5 * rms(stock.logits, truth) and rms(parts, truth) <= 1.5 * rms(stock.logits, truth)
    assert difference(model(ids).logits, truth) == 0


@pytest.mark.parametrize("method", [METHOD, LMInfinite(9, 3)], ids=str)
@pytest.mark.parametrize("family", ["llama", "bloom"])
@torch.no_grad()
def test_a_cache_filled_under_autocast_goes_on_outside_and_the_other_way_round(family, method):
    """It holds the dtype of the weights either way, so what was read in fp32 stays exact."""
    model = build(family)
    with longreach.extend(model, method) as extension:
        truth = model(IDS, use_cache=False).logits
        for inside in (False, True):
            with autocast(torch.bfloat16) if inside else nullcontext():
                cache = model(IDS[:, :40], use_cache=True).past_key_values
            assert {body.dtype for layer in store_of(cache).layers for buffer in layer.buffers for body in buffer.bodies.values()} == {torch.float32}
            with nullcontext() if inside else autocast(torch.bfloat16):
                rest = torch.cat([model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(40, 50)], 1)
            assert rest.dtype == (torch.float32 if inside else torch.bfloat16)
            assert difference(rest, truth[:, 40:]) < 0.05
            with autocast(torch.bfloat16) if inside else nullcontext():
                cache = model(IDS[:, :40], use_cache=True).past_key_values
                if not inside:
                    again = chunked(model, IDS, [40, *[1] * 10])
            if not inside:
                with autocast(torch.bfloat16):
                    model(IDS[:, 40:45], past_key_values=cache)
                cache.crop(-5)  # what was read under autocast is gone, and what was read before is as it was
                assert difference(torch.cat([model(IDS[:, t : t + 1], past_key_values=cache).logits for t in range(40, 50)], 1), again[:, 40:]) == 0
        assert extension.exactness.dtype == "float32"


@torch.no_grad()
def test_generate_under_autocast():
    model = build("llama")
    with longreach.extend(model, METHOD), autocast(torch.bfloat16):
        want = IDS
        for _ in range(8):
            want = torch.cat([want, model(want, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        made = model.generate(IDS, max_new_tokens=8, do_sample=False)
        agree = (made[:, : want.shape[1]] == want).float().mean().item()
    assert made.shape[0] == 2 and agree > 0.95  # a near tie may fall the other way in bf16


@torch.no_grad()
def test_half_weights_under_the_other_half():
    model = build("llama").bfloat16()
    truth = build("llama")(IDS).logits
    with longreach.extend(model, SelfExtend(1, 16)), autocast(torch.float16):
        cache = model(IDS[:, :40], use_cache=True).past_key_values
        logits = model(IDS[:, 40:], past_key_values=cache).logits
    assert difference(logits, truth[:, 40:]) < 0.1


def test_gradients_are_refused_under_autocast_as_elsewhere():
    model = build("llama")
    with longreach.extend(model, METHOD), autocast(torch.bfloat16), pytest.raises(NotImplementedError, match="remove"):
        model(IDS, labels=IDS).loss.backward()


@torch.no_grad()
def test_models_that_accelerate_prepared_and_the_trainer(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'longreach[interop]'")
    truth = logits_of(build("llama"))
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare_model(build("llama"), evaluation_mode=True)
    ours = logits_of(prepared)
    assert ours.dtype == torch.float32 and 0 < difference(ours, truth) < 0.1
    model = small_llama()
    with longreach.extend(model, METHOD):
        arguments = t.TrainingArguments(output_dir=str(tmp_path), bf16=True, use_cpu=True, report_to=[], per_device_eval_batch_size=2)
        rows = [{"input_ids": row, "labels": row} for row in IDS]
        loss = t.Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"]
        assert abs(loss - model(IDS, labels=IDS).loss.item()) < 0.05


# -- adapters and quantised weights ---------------------------------------------------------------------------------------------


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'longreach[interop]'")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def test_lora_before_and_after_extending():
    model = adapted(build("llama"))
    assert_served(model)
    expected, stock = logits_of(model), model(IDS).logits
    base = build("llama")
    with longreach.extend(base, METHOD):
        after = adapted(base)
        assert torch.equal(chunked(after, IDS, [30, 9, *[1] * 11]), expected)
        made = after.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(after(IDS).logits, stock)
    with longreach.extend(model, METHOD):
        assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False), made)


@torch.no_grad()
def test_lora_merged_and_unloaded_while_extended():
    model = adapted(build("llama"))
    expected, plain = logits_of(model), logits_of(build("llama"))
    with longreach.extend(model, METHOD):
        merged = model.merge_and_unload()
        assert difference(chunked(merged, IDS, [30, 9, *[1] * 11]), expected) <= 1e-5
    fresh = adapted(build("llama"))
    with longreach.extend(fresh, METHOD):
        assert torch.equal(chunked(fresh.unload(), IDS, [30, 9, *[1] * 11]), plain)


@torch.no_grad()
def test_a_document_belongs_to_its_adapter(tmp_path):
    model = adapted(build("llama"))
    with longreach.extend(model, METHOD) as extension:
        extension.save(model(IDS, use_cache=True).past_key_values, tmp_path / "d", IDS)
        extension.load(tmp_path / "d")
        with model.disable_adapter(), pytest.raises(ValueError, match="adapters"):
            extension.load(tmp_path / "d")


@torch.no_grad()
def test_int8_weights(tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'longreach[interop]'")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = build("llama")
    full = model(IDS).logits
    quantize_(model, Int8WeightOnlyConfig())
    assert not torch.equal(model(IDS).logits, full)
    assert_served(model)
    with longreach.extend(model, METHOD) as extension:
        cache = model(IDS, use_cache=True).past_key_values
        extension.save(cache, tmp_path / "d", IDS)
        again = extension.load(tmp_path / "d").cache
        assert torch.equal(model(IDS[:, :1], past_key_values=again).logits, model(IDS[:, :1], past_key_values=cache).logits)
    with longreach.extend(build("llama"), METHOD) as extension, pytest.raises(ValueError, match="other weights"):
        extension.load(tmp_path / "d")


# -- GGUF -----------------------------------------------------------------------------------------------------------------------


def write_gguf(file: Path, model: Any) -> None:
    """A Llama with a byte-level tokenizer, in the layout of llama.cpp: rotary pairs of q and k side by side."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'longreach[interop]'")
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'longreach[interop]'")
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    gguf_files.vocabulary(writer, config.vocab_size)
    names_in_file = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(names_in_file.get_name(name, try_suffixes=(".weight",)), weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_llama() -> Any:
    torch.manual_seed(0)
    return t.LlamaForCausalLM(t.LlamaConfig(**{**SMALL, "vocab_size": 260})).eval()


@torch.no_grad()
def test_gguf(tmp_path, capsys):
    from longreach.cli import main

    file, original = tmp_path / "tiny.gguf", small_llama()
    write_gguf(file, original)
    model, tokenizer = longreach.load(str(file))
    assert model.dtype == torch.float32 and difference(model(IDS).logits, original(IDS).logits) <= 1e-5
    assert_served(model)
    text = "It was a dark night."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert main(["run", "--model", str(file), "--prompt", text, "--context", "200", "--max-new-tokens", "4", "--json"]) == 0
    assert '"new_tokens": ' in capsys.readouterr().out


def test_gguf_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        longreach.load(str(tmp_path / "none.gguf"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\x00" * 20)
    with pytest.raises(ValueError, match=r"could not load|pip install 'longreach\[interop\]'"):
        longreach.load(str(tmp_path / "broken.gguf"))


def test_a_gguf_file_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("longreach.gguf_file.find_spec", lambda name: None)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + b"\x00" * 20)
    with pytest.raises(ValueError, match=r"^reading a GGUF file needs gguf and accelerate; pip install 'longreach\[interop\]'$"):
        longreach.load(str(tmp_path / "tiny.gguf"))
    with pytest.raises(ValueError, match=r"^reading a GGUF file needs gguf; pip install 'longreach\[interop\]'$"):
        longreach.plan(str(tmp_path / "tiny.gguf"), 200, "L4")


# -- torch.compile and pipelines ------------------------------------------------------------------------------------------------


def compile_in_place(model: Any, how: str, **arguments: Any) -> Any:
    """The ways people compile a model, of which only the first leaves the model itself as it is."""
    if how == "torch.compile(model)":
        return torch.compile(model, **arguments)
    part = model.get_submodule(model.base_model_prefix) if "base" in how else model
    if how.endswith(".compile()"):
        part.compile(**arguments)
    elif how.endswith(".forward"):
        part.forward = torch.compile(part.forward, **arguments)
    else:
        setattr(model, model.base_model_prefix, torch.compile(part, **arguments))
    return model


WAYS = ["torch.compile(model)", "model.compile()", "model.forward", "base.compile()", "base.forward", "base"]


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["compiled, then extended", "extended, then compiled"])
@pytest.mark.parametrize(("family", "how"), [*(("llama", how) for how in WAYS), ("bloom", "model.forward"), ("bloom", "base")])
@torch.no_grad()
def test_every_way_to_compile(family, how, before):
    torch._dynamo.reset()
    model = build(family)
    stock, expected = model(IDS).logits, logits_of(model)
    compiled = None
    if before:
        compiled = compile_in_place(model, how, backend="eager")
        assert difference(compiled(IDS).logits, stock) <= 1e-5
    with longreach.extend(model if compiled is None else compiled, METHOD):
        if compiled is None:
            compiled = compile_in_place(model, how, backend="eager")
        assert difference(chunked(compiled, IDS, [30, 9, *[1] * 11]), expected) <= 1e-5
    assert difference(compiled(IDS).logits, stock) <= 1e-5
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3"])
@torch.no_grad()
def test_the_number_of_graphs_does_not_grow_with_layers_or_tokens(family):
    """Compiled code that reads the number of its layer would be made anew for each, until torch.compile gives up."""
    from torch._dynamo.utils import counters

    graphs = []
    for layers in (4, 30):
        torch._dynamo.reset()
        counters.clear()
        types = {"layer_types": ["sliding_attention", "full_attention"] * (layers // 2)} if family == "gemma3" else {}
        model = build(family, num_hidden_layers=layers, **types)
        with longreach.extend(model, METHOD), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
            compiled = torch.compile(model, backend="eager")
            got = chunked(compiled, IDS, [30, 9, *[1] * 4])
            graphs.append(counters["stats"]["unique_graphs"])
            chunked(compiled, IDS, [30, 9, *[1] * 11])
            assert counters["stats"]["unique_graphs"] == graphs[-1]  # further tokens compile nothing
            assert difference(got, chunked(model, IDS, [30, 9, *[1] * 4])) <= 1e-5
    assert graphs[0] == graphs[1] > 0
    torch._dynamo.reset()


@pytest.mark.slow  # tracing costs more than everything else here
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@torch.no_grad()
def test_compiled_models(compiler):
    """Compiled before, called before, after and while extended: what the compiled model computes is what the model computes."""
    torch._dynamo.reset()
    model = build("llama")
    stock = model(IDS).logits
    compiled = torch.compile(model, backend=compiler)
    assert difference(compiled(IDS).logits, stock) <= 1e-5
    with longreach.extend(compiled, METHOD) as extension:
        assert extension.model is model
        expected = chunked(model, IDS, [30, 18, 1, 1])
        assert difference(expected, stock) > 1e-3
        assert difference(chunked(compiled, IDS, [30, 18, 1, 1]), expected) <= 1e-5
    assert difference(compiled(IDS).logits, stock) <= 1e-5
    torch._dynamo.reset()


def test_pipelines():
    model, tokenizer = small_llama(), byte_tokenizer()
    texts = ["It was a dark night and nobody was on the road.", "Why?"]
    with longreach.extend(model, METHOD):
        generator = t.pipeline("text-generation", model=model, tokenizer=tokenizer)
        found = [made[0]["generated_text"] for made in generator(texts, max_new_tokens=8, do_sample=False, batch_size=2, return_full_text=True)]
        for text, got in zip(texts, found):
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            assert got == tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0], skip_special_tokens=True)


# -- tensor parallel ------------------------------------------------------------------------------------------------------------

RANK = """
import sys, torch, transformers as t, longreach
from transformers.distributed import DistributedConfig
torch.set_num_threads(1)
folder, ids = sys.argv[1], torch.load(sys.argv[2])
new = "tp_size" in DistributedConfig.__init__.__annotations__  # older releases take the plan itself
split = {"distributed_config": DistributedConfig(tp_size=2, tp_plan="auto")} if new else {"tp_plan": "auto"}
model = t.AutoModelForCausalLM.from_pretrained(folder, **split).eval()
with torch.no_grad(), longreach.extend(model, longreach.SelfExtend(3, 8)) as extension:
    assert extension.facts.reading.entries[0].heads == 1, extension.facts.reading.entries  # two key heads over two ranks
    cache = t.DynamicCache()
    parts = [model(part, past_key_values=cache).logits for part in ids.split([30, 9, *[1] * 11], dim=1)]
    made = model.generate(ids, max_new_tokens=6, do_sample=False)
if torch.distributed.get_rank() == 0:
    full = lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x
    torch.save((torch.cat([full(p) for p in parts], 1), made), sys.argv[3])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_ranks_with_half_of_the_heads_each(tmp_path):
    """Tensor parallel over gloo: every rank stores and attends to its own heads, and the logits are those of one process."""
    pytest.importorskip("transformers.distributed", reason="this Transformers has no DistributedConfig")
    model = small_llama()
    model.save_pretrained(tmp_path / "model")
    torch.save(IDS, tmp_path / "ids.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK, str(tmp_path / "model"), str(tmp_path / "ids.pt"), str(tmp_path / "out.pt")]
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for r in range(2)
    ]
    said = [rank.communicate(timeout=900)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    logits, made = torch.load(tmp_path / "out.pt")
    assert difference(logits, logits_of(model)) <= 1e-5
    with longreach.extend(model, METHOD):
        assert torch.equal(made, model.generate(IDS, max_new_tokens=6, do_sample=False))


# -- the page -------------------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "uses.md").read_text(encoding="utf-8")
SNIPPETS = {block.split("```")[0]: title for title, *blocks in (part.split("```python\n") for part in PAGE.split("\n## ")[1:]) for block in blocks}


@pytest.mark.parametrize(
    "snippet",
    [pytest.param(code, id=title.splitlines()[0], marks=pytest.mark.slow if "torch.compile" in code else ()) for code, title in SNIPPETS.items()],
)
def test_the_snippets_of_the_page_run(snippet, tmp_path, monkeypatch, capsys):
    if snippet.startswith("# needs: "):
        name = snippet.splitlines()[0].removeprefix("# needs: ")
        pytest.importorskip(name, reason=f"{name} is not installed: pip install 'longreach[interop]'")
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(longreach.shipped_book()[:1500], encoding="utf-8")
    if "model.gguf" in snippet:
        write_gguf(Path("model.gguf"), small_llama())
    exec(compile(snippet, "docs/uses.md", "exec"), {"__name__": "snippet"})
    assert capsys.readouterr().out.strip()
    torch._dynamo.reset()
