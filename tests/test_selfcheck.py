"""What `extend` believes: the truth in fp32, the better of the stock kernels, and that what is not finite never passes."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import transformers as t

import longreach
from families import build, tokens
from longreach import SelfExtend, Stock
from longreach.hf import forward as seam
from longreach.hf import selfcheck

HALVES = [torch.bfloat16, torch.float16]
IDS = tokens(1, 40)
execute = seam.execute


def rms(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.float() - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def refuses(sentence: str):
    return pytest.raises(ValueError, match=sentence)


def biased(bias: float, dtype: torch.dtype, pair: int = 15) -> t.PreTrainedModel:
    """Qwen2 with a large bias in one rotary pair of q and k. In the slowest pair it is a constant on all logits, which eager rounds in half precision."""
    model = build("qwen2", rope_parameters={"rope_type": "default", "rope_theta": 1e6}, num_attention_heads=2, num_key_value_heads=1)
    with torch.no_grad():
        for layer in model.model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.bias.zero_()
                for head in range(projection.bias.shape[0] // 32):
                    dims = [32 * head + pair, 32 * head + pair + 16]
                    projection.weight[dims], projection.bias[dims] = 0, bias
    return model.to(dtype)


# -- the truth in fp32 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-oss", "mixtral", "deepseek-v3", "llama4", "bloom", "falcon", "gptj"])
@torch.no_grad()
def test_a_model_in_fp32_one_module_at_a_time(family):
    """The logits of an fp32 copy; never more than one module's weights twice, and all of them the same objects and bits afterwards."""
    model = build(family).bfloat16()
    copied = copy.deepcopy(model).float()
    if (rotary := getattr(copied.base_model, "rotary_emb", None)) is not None and hasattr(rotary, "original_inv_freq"):
        rotary.original_inv_freq = rotary.inv_freq.clone()
    kept = {name: (tensor, tensor.clone()) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    wide: list[int] = []

    def count(*_):
        wide.append(sum(any(x is not None and x.dtype == torch.float32 for x in m._parameters.values()) for m in model.modules()))

    with selfcheck.in_fp32(model):
        handles = [module.register_forward_pre_hook(count) for module in model.modules() if not list(module.children())]
        logits = model(IDS).logits
        for handle in handles:
            handle.remove()
    assert logits.dtype == torch.float32 and rms(logits, copied(IDS).logits) < 5e-3 < rms(model(IDS).logits, copied(IDS).logits) * 2
    assert 1 <= max(wide) <= 2  # a module and, at most, one inside it
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor is kept[name][0] and torch.equal(tensor, kept[name][1])


@torch.no_grad()
def test_weights_come_back_when_a_forward_in_fp32_fails():
    model = build("llama").bfloat16()
    want = model(IDS).logits
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), selfcheck.in_fp32(model):
        model(IDS)
    handle.remove()
    assert torch.equal(model(IDS).logits, want) and not model.lm_head._forward_pre_hooks and {p.dtype for p in model.parameters()} == {torch.bfloat16}


# -- half precision -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bias", [20.0, 100.0, 300.0])
@torch.no_grad()
def test_a_model_that_stock_sdpa_gets_right_and_eager_does_not_is_accepted(bias, dtype):
    model = biased(bias, dtype)
    truth = copy.deepcopy(model).float()(IDS).logits
    errors = {}
    for kernel in ("eager", "sdpa"):
        model.set_attn_implementation(kernel)
        errors[kernel] = rms(model(IDS).logits, truth)
    assert not errors["eager"] < 3 * errors["sdpa"]
    with longreach.extend(model, SelfExtend(1, 16)) as extension:
        assert rms(model(IDS).logits, truth) <= 1.5 * errors["sdpa"]
        found = extension.report()["exactness"]
    assert found["logits"] <= 1.5 * found["stock_logits"] and found["layers"] <= 1.5 * found["stock_layers"] < 0.05
    assert "where stock itself has" in extension.describe() and f"rounding of {str(dtype)[6:]}" in extension.describe()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_a_bias_in_a_fast_pair_is_as_wrong_as_it_is_in_stock(dtype):
    """The rotation of large values loses what attention needs; nobody in half precision has it, and that is no reason to refuse."""
    model = biased(100.0, dtype, pair=3)
    with longreach.extend(model, SelfExtend(1, 16)) as extension:
        found = extension.exactness
    assert found.layers <= 1.5 * found.stock_layers


def test_a_soft_cap_that_a_fused_kernel_ignores_is_measured_against_the_code_that_has_it():
    """gemma2's truth is eager code in fp32, whichever kernel is set; the engine without the cap is refused."""
    model = build("gemma2", attn_logit_softcapping=2.0).bfloat16()
    with longreach.extend(model, Stock()) as extension:
        assert extension.exactness.layers <= 1.5 * extension.exactness.stock_layers


@pytest.mark.parametrize("off", [1.03, 1.1], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "bloom", "falcon"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_three_percent_are_noticed_in_half_precision(family, dtype, off, monkeypatch):
    monkeypatch.setattr(seam, "execute", lambda *args: (off * execute(*args).float()).to(args[4].dtype))
    with refuses("does something we do not know"):
        longreach.extend(build(family).to(dtype), SelfExtend(1, 16))


@pytest.mark.parametrize("layer", [0, 1])
def test_a_fault_of_one_layer_is_noticed_though_the_logits_hardly_change(layer, monkeypatch):
    """Without the cap in one layer, logits in fp32 may be off by less than a thousandth of the largest."""

    def uncapped(own, *args):
        *before, inputs, watch = args
        return execute(own, *before, replace(inputs, softcap=None) if own.index == layer else inputs, watch)

    model = build("gemma2")
    monkeypatch.setattr(seam, "execute", uncapped)
    with refuses("does something we do not know"):
        longreach.extend(model, SelfExtend(1, 16), trained_window=2048)


def test_without_a_truth_the_nearer_stock_kernel_decides(monkeypatch):
    @contextmanager
    def no_room(model):
        raise torch.OutOfMemoryError("out of memory")
        yield

    monkeypatch.setattr(selfcheck, "in_fp32", no_room)
    for model in (build("llama").bfloat16(), build("bloom").bfloat16(), biased(100.0, torch.float16)):
        with longreach.extend(model, SelfExtend(1, 16)) as extension:
            assert extension.exactness.stock_layers is None and extension.exactness.layers < 5e-2
            assert "nearer stock kernel" in extension.describe() and "out of memory" in extension.describe()
        with monkeypatch.context() as broken:
            broken.setattr(seam, "execute", lambda *args: 2.0 * execute(*args))
            with refuses("does something we do not know"):
                longreach.extend(model, SelfExtend(1, 16))


@torch.no_grad()
def test_a_stock_model_that_overflows_is_refused_with_that_reason():
    """Fine in fp32, infinite in fp16."""
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight.mul_(1e6)
    longreach.extend(model, Stock()).remove()
    with refuses("stock model itself are NaN or infinite in float16, where values beyond 65504 overflow.*dtype=torch.bfloat16 or torch.float32"):
        longreach.extend(model.half(), Stock())
    keys = build("llama")
    keys.model.layers[0].self_attn.k_proj.weight.mul_(1e6)
    with refuses("queries or keys of layer 0 are NaN or infinite in float16"):
        longreach.extend(keys.half(), Stock())


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@torch.no_grad()
def test_damaged_weights_are_named(family, dtype):
    model = build(family).to(dtype)
    model.get_output_embeddings().weight[5] = float("nan")
    with refuses(r"NaN or infinite in .*(sound weights|dtype=)"):
        longreach.extend(model, Stock())


# -- what is not finite never passes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["everywhere", "one value", "infinity", "the last layer"])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "bloom", "falcon"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_nan_fails_the_gate(family, dtype, where, monkeypatch):

    def broken(layer, *args):
        out = execute(layer, *args)
        if where == "everywhere":
            return out * float("nan")
        if where == "the last layer" and layer.index < 1:
            return out
        out = out.clone()
        out[0, -1, 0, 0] = float("inf" if where == "infinity" else "nan")
        return out

    model = build(family).to(dtype)
    monkeypatch.setattr(seam, "execute", broken)
    with refuses(r"differs from the stock model by inf \(a layer by inf\)"):
        longreach.extend(model, SelfExtend(1, 16))


def test_a_rotation_that_gives_nan_is_no_match(monkeypatch):
    from longreach.hf import rotary

    match = rotary.match

    def broken(raw, turned, *rest):
        turned.k[0, 0, 1, 0] = float("nan")  # after q, whose difference is finite
        return match(raw, turned, *rest)

    monkeypatch.setattr(rotary, "match", broken)
    with refuses(r"applies its rotary in a way we do not know \(off by inf\)"):
        longreach.extend(build("llama"), Stock())


@pytest.mark.parametrize("longer_than", [0, 12], ids=["at extend", "after it"])
def test_check_of_all_families_does_not_pass_nan(longer_than, monkeypatch, capsys):
    """An engine that is refused by its own self-check is no family that is refused by intent."""
    from longreach.cli import main

    def broken(layer, plan, store, backend, q, *rest):
        out = execute(layer, plan, store, backend, q, *rest)
        return out * float("nan") if q.shape[2] > longer_than else out

    arguments = ["check", "--all", "--family", "llama", "--method", "selfextend"]
    assert main([*arguments, "--json"]) == 0 and json.loads(capsys.readouterr().out)["passed"]
    monkeypatch.setattr(seam, "execute", broken)
    assert main([*arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["passed"] and not found["families"][0]["passed"]
    if longer_than:
        assert found["families"][0]["cells"][0]["fast"] is None and found["families"][0]["cells"][0]["refusal"] is None
    assert main(arguments) == 1
    assert "a gate fails" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_check_of_a_model_does_not_pass_nan(dtype, monkeypatch, capsys):
    from longreach.cli import main

    def broken(layer, plan, store, backend, q, *rest):
        out = execute(layer, plan, store, backend, q, *rest)
        if q.shape[2] > 12:
            out[0, -1, 0, 0] = float("nan")
        return out

    monkeypatch.setattr(seam, "execute", broken)
    assert main(["check", "--dtype", dtype, "--tokens", "48", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    failed = [m["name"] for group in found["groups"] for m in group["measurements"] if not m["passed"]]
    assert not found["passed"] and any("neutral" in name for name in failed) and any("fast path" in name for name in failed)
    assert any("half precision" in name for name in failed) == (dtype == "bfloat16")
