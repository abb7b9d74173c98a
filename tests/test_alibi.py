"""ALiBi as an encoding: the biased band, its exactness at any index, the dense truth, and what the store keeps. No models."""

from __future__ import annotations

import itertools

import pytest
import torch

from longreach import STRING, DualChunk, LMInfinite, ReRoPE, SelfExtend, StreamingLLM
from longreach.core.encodings import Alibi
from longreach.core.segments import Retention
from longreach.engine import reference
from longreach.engine.batch import Batch
from longreach.engine.executor import execute
from longreach.engine.layer import RAW, Inputs, Layer
from longreach.kernels import biased, tiles
from longreach.kernels.biased import Bias
from longreach.kernels.cpu import CpuKernel, operator
from longreach.kernels.protocol import KV
from longreach.kernels.tiles import Band

CPU = torch.device("cpu")
INF = float("inf")
SLOPES = torch.tensor([0.84, 0.5, 0.125, 0.0039], dtype=torch.float64)


def qkv(rows, columns, groups=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    make = lambda h, t: torch.randn(2, h, t, 16, generator=g).to(dtype)  # noqa: E731
    return make(4, rows), make(4 // groups, columns), make(4 // groups, columns)


def dense(q, k, v, band: Band, bias: Bias):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    behind = band.offset + torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None, :]
    visible = (behind >= band.low) & (behind < (band.high or 10**9))
    linear = bias.slope[:, None, None] * (bias.column[None, None, :] - bias.row[None, :, None])
    logits = (q.double() @ k.transpose(-1, -2) * 0.25 + linear).masked_fill(~visible, -INF)
    lse = logits.logsumexp(-1)
    return torch.exp(logits - lse[..., None]).nan_to_num(0.0) @ v, lse


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 37), (37, 37), (40, 90), (63, 1)])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_biased_bands_equal_dense(rows, columns, share, groups):
    """Rows that share a bias, rows that do not, keys before, under and beyond the diagonal, rows that see nothing."""
    q, k, v = qkv(rows, columns, groups)
    bands, offsets = [(0, None), (0, 1), (0, 7), (3, None), (16, 48), (200, None)], (0, columns - rows, columns + 9, -3)
    for (low, high), offset, block in itertools.product(bands, offsets, (256, 16)):
        bias = Bias(SLOPES, offset + torch.arange(rows).double(), (torch.arange(columns) // 3).double())
        out, lse = biased.attend(operator, q, k, v, Band(offset, low, high), 0.25, bias, share, block)
        want, want_lse = dense(q, k, v, Band(offset, low, high), bias)
        torch.testing.assert_close(lse.double(), want_lse, atol=2e-5, rtol=1e-6)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_of_half_precision_is_not_rounded(dtype):
    """In bf16 a bias of -200 is off by half a unit, which would be half a nat of attention."""
    q, k, v = qkv(250, 250, dtype=dtype)
    bias = Bias(SLOPES, torch.arange(250).double(), torch.arange(250).double())
    out, lse = CpuKernel().attend(q, KV(k, v), Band(0), 0.25, bias=bias)
    want, want_lse = dense(q, k, v, Band(0), bias)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=0)


def test_a_billion_tokens_ahead_the_bias_is_the_same():
    q, k, v = qkv(70, 300)
    results = []
    for base in (0, 10**9):
        bias = Bias(SLOPES, base + 230 + torch.arange(70).double(), base + torch.arange(300).double())
        results.append(CpuKernel().attend(q, KV(k, v), Band(230), 0.25, bias=bias))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_bounded_masks_where_rows_share_none(monkeypatch):
    """A device whose masks are as rough as its tensors gets true distances, in blocks of rows that bound the mask."""
    monkeypatch.setattr(biased, "LARGEST_MASK", 4 * 90 * 5)
    largest = 0

    def watched(q, k, v, scale, causal=False, mask=None):
        nonlocal largest
        largest = max(largest, mask.numel())
        return operator(q, k, v, scale, causal, mask)

    q, k, v = qkv(40, 90)
    bias = Bias(SLOPES, 50 + torch.arange(40).double(), torch.arange(90).double())
    out, _ = biased.attend(watched, q, k, v, Band(50), 0.25, bias, share=False)
    torch.testing.assert_close(out.double(), dense(q, k, v, Band(50), bias)[0], atol=1e-5, rtol=0)
    assert largest <= 4 * 90 * 5


def golden() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    i, m = torch.arange(10).double(), torch.arange(4).double()
    q, k = torch.sin(0.3 * (i[:, None] + 1) * (m[None] + 1)), torch.cos(0.2 * (i[:, None] + 1) * (m[None] + 1))
    return q[None, None], k[None, None], torch.stack([i, i % 3], -1)[None, None]


def test_golden_values_of_lm_infinite_under_alibi():
    """The bias is clipped at the distance limit (LM-Infinite's form of ALiBi)."""
    q, k, v = golden()
    i, alibi, method = torch.arange(10), Alibi(torch.tensor([0.25]).double()), LMInfinite(4, 2)
    out, _ = reference.attention(q, k, v, method.distances(i[:, None], i[None]), None, 0.5, alibi=alibi)
    assert out[0, 0, 9].tolist() == pytest.approx([6.59343698, 0.67656690], abs=1e-8)
    plan = Batch.of(1, 10, None, CPU, None)
    padded = torch.nn.functional.pad(v, (0, 2)).float()
    fast = execute(Layer(0, method, None, alibi=alibi), plan, None, CpuKernel(), q.float(), k.float(), padded, Inputs(0.5))
    torch.testing.assert_close(fast.transpose(1, 2)[..., :2].double(), out, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("method", "kept"),
    [
        (SelfExtend(3, 8), Retention(tail=None)),
        (ReRoPE(8), Retention(tail=None)),
        (DualChunk(24), Retention(tail=None)),
        (STRING(8, 2), Retention(tail=None)),
        (LMInfinite(9, 3), Retention(3, 9)),
        (StreamingLLM(9, 3), Retention(3, 10)),
    ],
    ids=str,
)
def test_keys_exist_once_whatever_their_positions(method, kept):
    assert Layer(0, method, None, alibi=Alibi(SLOPES)).forms == {RAW: kept}


def test_no_soft_cap_with_a_bias():
    q, k, v = qkv(3, 3)
    with pytest.raises(AssertionError, match="soft-cap"):
        CpuKernel().attend(q, KV(k, v), Band(0), 0.25, 30.0, Bias(SLOPES, torch.arange(3).double(), torch.arange(3).double()))


def test_plain_bands_do_not_take_the_biased_path(monkeypatch):
    monkeypatch.setattr(biased, "attend", None)
    q, k, v = qkv(40, 40)
    out, _ = CpuKernel().attend(q, KV(k, v), Band(0), 0.25)
    torch.testing.assert_close(out, tiles.attend(operator, q, k, v, Band(0), 0.25)[0])
