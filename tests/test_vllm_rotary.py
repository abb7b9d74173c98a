"""Reading an engine's rotary modules, and verifying a layer by running it. Runs without vLLM: the modules here have the attributes of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from longreach.vllm.probe import replace_rotaries, unit_of
from longreach.vllm.rotary import Unturned, frequencies, read

PAIRS, HEADS, GROUPS, WIDTH = 8, 4, 2, 20


def table(inverse: torch.Tensor, rows: int = 512, factor: float = 1.0) -> torch.Tensor:
    """In fp32, as engines make it."""
    angles = torch.outer(torch.arange(rows, dtype=torch.float32), inverse)
    return torch.cat([angles.cos() * factor, angles.sin() * factor], -1)


@pytest.mark.parametrize("rows", [2, 64, 512, 4096])
@pytest.mark.parametrize("base", [100.0, 10_000.0, 5e6])
@pytest.mark.parametrize("factor", [1.0, 1.1386294])
def test_frequencies_are_read_back(rows, base, factor):
    inverse = 1.0 / base ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    found, scaling = frequencies(table(inverse, rows, factor))
    assert scaling == pytest.approx(factor, abs=1e-6)
    if rows >= 512:  # a frequency that is large enough for its error to be seen
        assert torch.equal(found.float()[inverse > 0.1], inverse[inverse > 0.1])
    assert torch.allclose(found.float(), inverse, rtol=3e-7, atol=0)


def test_tables_that_are_of_no_frequencies():
    good = table(1.0 / 100.0 ** (torch.arange(8) / 8))
    mixed = good.clone()
    mixed[55:] = good[:-55]
    for wrong in (mixed, good + 0.01, good * torch.nan):
        with pytest.raises(ValueError, match="not that of one set of frequencies"):
            frequencies(wrong)
    with pytest.raises(ValueError, match="less than two positions"):
        frequencies(good[:1])


class RotaryEmbedding(nn.Module):
    def __init__(self, neox: bool = True, factor: float = 1.0) -> None:
        super().__init__()
        self.is_neox_style, self.factor = neox, factor
        self.inverse = 1.0 / 1000.0 ** (torch.arange(0, 2 * PAIRS, 2, dtype=torch.float32) / (2 * PAIRS))

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        return table(self.inverse, factor=self.factor)

    def forward(self, positions, query, key):
        cos, sin = self._compute_cos_sin_cache()[positions][:, None].chunk(2, -1)
        return self._turn(query, cos, sin), self._turn(key, cos, sin)

    def _turn(self, x, cos, sin):
        y = x.view(len(x), -1, WIDTH).clone()
        part = y[..., : 2 * PAIRS]
        a, b = (part[..., :PAIRS], part[..., PAIRS:]) if self.is_neox_style else (part[..., 0::2], part[..., 1::2])
        turned = a * cos - b * sin, b * cos + a * sin
        y[..., : 2 * PAIRS] = torch.cat(turned, -1) if self.is_neox_style else torch.stack(turned, -1).flatten(-2)
        return y.view_as(x)


class MRotaryEmbedding(RotaryEmbedding):
    pass


RotaryEmbedding.__module__ = MRotaryEmbedding.__module__ = "engine.rotary"


class Projection(nn.Linear):
    def __init__(self) -> None:
        super().__init__(24, (HEADS + 2 * GROUPS) * WIDTH)
        self.input_size = 24


class Attend(nn.Module):
    head_size = WIDTH

    def forward(self, query, key, value):
        raise AssertionError("the probe stops before it")


class Around(nn.Module):
    def __init__(self, rotary: nn.Module | None, scales: bool = False) -> None:
        super().__init__()
        self.qkv, self.attn, self.scales = Projection(), Attend(), scales
        if rotary is not None:
            self.rotary_emb = rotary

    def forward(self, positions, hidden_states):
        q, k, v = self.qkv(hidden_states).split([HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH], -1)
        if hasattr(self, "rotary_emb"):
            q, k = self.rotary_emb(positions, q, k)
        if self.scales:
            q = q * (1 + positions // 8192)[:, None]
        return self.attn(q, k, v)


def unit(module: nn.Module):
    return unit_of(nn.ModuleDict({"layer": module}), "layer.attn", "engine.rotary")


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("factor", [1.0, 1.25])
def test_the_identity_takes_the_place_of_a_rotary_that_was_understood(neox, factor):
    original = RotaryEmbedding(neox, factor)
    around = Around(original)
    rotary, difference = replace_rotaries(unit(around))
    assert rotary is not None and difference < 1e-5 and rotary.pairing == ("half" if neox else "interleaved")
    assert rotary.scaling == factor and torch.allclose(rotary.inverse_frequencies.float(), original.inverse, rtol=2e-7)
    assert isinstance(around.rotary_emb, Unturned) and around.rotary_emb.original is original and not [*around.rotary_emb.parameters()]
    assert not hasattr(around.rotary_emb, "inverse")  # whoever reads its tables fails


def test_a_layer_that_rotates_nothing():
    assert replace_rotaries(unit(Around(None))) == (None, 0.0)


class Otherwise(RotaryEmbedding):
    """It says half, and turns interleaved."""

    def _turn(self, x, cos, sin):
        self.is_neox_style = False
        found = super()._turn(x, cos, sin)
        self.is_neox_style = True
        return found


Otherwise.__name__, Otherwise.__module__ = "RotaryEmbedding", "engine.rotary"


@pytest.mark.parametrize(
    "module, sentence",
    [
        (Around(RotaryEmbedding(), scales=True), "depend on positions beside their rotary"),
        (Around(MRotaryEmbedding()), "MRotaryEmbedding is not supported"),
        (Around(Otherwise()), "rotates in another way"),
    ],
    ids=["scale", "kind", "otherwise"],
)
def test_what_was_not_understood_is_refused_and_left_as_it_was(module, sentence):
    before = module.rotary_emb
    with pytest.raises(ValueError, match=sentence):
        replace_rotaries(unit(module))
    assert module.rotary_emb is before


def test_modules_that_cannot_be_run():
    class Needs(Around):
        def forward(self, positions, hidden_states, residual):
            return super().forward(positions, hidden_states)

    class Silent(Around):
        def forward(self, positions, hidden_states):
            return hidden_states

    class Fails(Around):
        def forward(self, positions, hidden_states):
            raise RuntimeError("no forward context")

    with pytest.raises(ValueError, match=r"does not run by itself .RuntimeError: no forward context"):
        replace_rotaries(unit(Fails(RotaryEmbedding())))
    with pytest.raises(ValueError, match="needs residual"):
        unit(Needs(RotaryEmbedding()))
    with pytest.raises(ValueError, match="no module around"):
        unit_of(nn.ModuleDict({"layer": nn.ModuleDict({"attn": Attend()})}), "layer.attn", "engine.rotary")
    with pytest.raises(ValueError, match="did not call its attention"):
        replace_rotaries(unit(Silent(RotaryEmbedding())))

    class Wants(Around):  # as Transformers' own layers do, under --model-impl transformers
        def forward(self, positions, hidden_states, position_embeddings=None):
            return super().forward(positions, hidden_states * position_embeddings[0])

    with pytest.raises(ValueError, match=r"does not run by itself .TypeError"):
        replace_rotaries(unit(Wants(RotaryEmbedding())))


def test_two_tables_of_which_one_is_in_force():
    class Phi3LongRoPEScaledRotaryEmbedding(nn.Module):
        use_long_rope, max_position_embeddings, original_max_position_embeddings = True, 1024, 512
        short_factor, long_factor, short_mscale, long_mscale = 1.0, 4.0, 1.0, 1.19

        def _compute_cos_sin_cache(self, rows, factor, scale):
            return table(RotaryEmbedding().inverse / factor, rows, scale)

    module = Phi3LongRoPEScaledRotaryEmbedding()
    long = read(module)
    module.use_long_rope = False
    short = read(module)
    assert torch.allclose(short.inverse_frequencies, long.inverse_frequencies * 4, rtol=1e-6) and (short.scaling, long.scaling) == (1.0, pytest.approx(1.19))
