"""What is looked at before requests are read together: every way in which a model's own code may mix them is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import longreach
from families import FAMILIES, build, tokens
from longreach import SelfExtend, Stock
from longreach.hf import flat_check, layer_kinds
from longreach.hf.flat import Flat

HALF = torch.bfloat16
SCALE = r"with one scale for a whole tensor does; quantise them per token \(per row\), or read requests one by one"


class Quantised(nn.Module):
    """A projection whose input is rounded to so many levels of its largest value: of the tensor, or of every token."""

    def __init__(self, inner: nn.Module, per_token: bool, round_to: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.per_token, self.round_to = inner, per_token, round_to

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        largest = (x.abs().amax(-1, keepdim=True) if self.per_token else x.abs().max()).clamp(min=1e-9)
        return self.inner(self.round_to(x / largest) * largest)  # type: ignore[no-any-return]


def int8(x: torch.Tensor) -> torch.Tensor:
    return (x * 127).round() / 127


def float8(x: torch.Tensor) -> torch.Tensor:
    return (x * 448).to(torch.float8_e4m3fn).to(x.dtype) / 448


def quantised(family: str, dtype: torch.dtype, per_token: bool, round_to: Any, only: str = "") -> Any:
    model = build(family, dtype)
    for module in [*model.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings() and name.endswith(only):
                setattr(module, name, Quantised(child, per_token, round_to))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("round_to", [int8, float8])
@pytest.mark.parametrize("only", ["", "down_proj", "q_proj"])
def test_activations_quantised_per_tensor_are_refused(dtype, round_to, only):
    model = quantised("llama", dtype, False, round_to, only)
    with longreach.extend(model, Stock(), trained_window=4096) as extension, pytest.raises(ValueError, match=SCALE):
        extension.flat()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("round_to", [int8, float8])
def test_activations_quantised_per_token_are_read_together(dtype, round_to):
    model = quantised("llama", dtype, True, round_to)
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        flat = extension.flat()
        a, b = flat.join(), flat.join()
        first, second = tokens(1, 70, seed=1)[0], tokens(1, 33, seed=2)[0]
        found = flat.read({a: first, b: second})
        other = extension.flat()
        c, d = other.join(), other.join()
        beside = other.read({c: first, d: tokens(1, 33, seed=3)[0]})  # another neighbour
        assert torch.equal(found[a], beside[c])


@pytest.mark.parametrize("per_token", [False, True])
def test_torchao(per_token):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install 'longreach[interop]'")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    from torchao.quantization.granularity import PerRow, PerTensor

    model = build("llama", HALF)
    quantize_(model.model, Int8DynamicActivationInt8WeightConfig(granularity=PerRow() if per_token else PerTensor()))
    with longreach.extend(model, Stock(), trained_window=4096) as extension:
        if per_token:
            flat = extension.flat()
            assert flat.read({flat.join(): [1, 2, 3], flat.join(): [4]}).keys() == {1, 2}
        else:
            with pytest.raises(ValueError, match=SCALE):
                extension.flat()


@pytest.mark.parametrize("per_token", [False, True])
def test_only_a_loud_neighbour_shows_a_common_scale_for_sure(per_token):
    """A neighbour of the same kind moves logits by no more than half precision does; a loud one changes all of them, or, with scales of their own, no bit."""
    with longreach.extend(quantised("llama", HALF, per_token, int8, "down_proj"), Stock(), trained_window=4096) as extension:
        assert flat_check._beside(extension.forward, (0, 0, 0)) <= flat_check.HALF
        found = flat_check._beside_loud(extension.forward)
        assert found == 0 if per_token else found > 0.5


def by_slot(model: Any) -> None:
    """A twin of Ministral 3 whose layers scale queries by the slots of the cache, as Llama 4's do."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        held, count = kwargs["past_key_values"].get_seq_length(), kwargs["hidden_states"].shape[1]
        return args, {**kwargs, "position_ids": torch.arange(held, held + count)[None]}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("method", [Stock(), SelfExtend(3, 8)], ids=str)
def test_queries_scaled_by_position_are_checked_beyond_the_first_step(method, monkeypatch):
    step = 1000
    parameters = dict(build("ministral3").config.rope_parameters, original_max_position_embeddings=step)
    for twin in (False, True):
        model = build("ministral3", rope_parameters=parameters)
        with longreach.extend(model, method, trained_window=4096) as extension:
            if twin:
                by_slot(model)
            assert flat_check._beside(extension.forward, (0, 0, 0)) <= 1e-5  # a dozen tokens show nothing
            if twin:
                with pytest.raises(ValueError, match=r"at index .* counts the slots of a cache or the tokens of a forward in place of position_ids"):
                    extension.flat()
            else:
                extension.flat()


def test_llama4_would_be_found_by_the_check_too(monkeypatch):
    monkeypatch.setattr(layer_kinds, "slot_scales", lambda modules: set())
    with longreach.extend(build("llama4", floor_scale=5000, attn_scale=0.5), Stock()) as extension, pytest.raises(ValueError, match="counts the slots"):
        extension.flat()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_index_is_beyond_every_length_of_the_configuration(family):
    config = build(family).config
    far = flat_check._far(config)
    rope = getattr(config, "rope_parameters", None) or {}
    lengths = [config.max_position_embeddings if hasattr(config, "max_position_embeddings") else 0, getattr(config, "floor_scale", 0) or 0]
    lengths += [getattr(config, "original_max_position_embeddings", 0) or 0, getattr(config, "sliding_window", 0) or 0]
    lengths += [own.get("original_max_position_embeddings", 0) for own in (rope, *rope.values()) if isinstance(own, dict)]
    assert far >= max(lengths) and far % flat_check.CHUNK == 0


def test_the_check_is_made_once_and_leaves_nothing_behind(monkeypatch):
    model = build("llama")
    with longreach.extend(model, SelfExtend(3, 8), context=60) as extension:  # it reads at larger indices than were declared
        facts, hooks = extension.forward.facts, sum(len(module._forward_pre_hooks) for module in model.modules())
        extension.flat()
        assert extension.forward.facts is facts and sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
        monkeypatch.setattr(Flat, "read", lambda *anything: pytest.fail("checked again"))
        extension.flat()
