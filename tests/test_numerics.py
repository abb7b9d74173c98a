"""Merge, tiles, backends, rotation and the dense reference, without any model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from families import DEVICE
from longreach import STRING, DualChunk, LeakyReRoPE, LMInfinite, ReRoPE, SelfExtend, StreamingLLM
from longreach.core import differences
from longreach.core.encodings import Rotary
from longreach.core.merge import Merge, merge
from longreach.engine import reference
from longreach.engine.batch import Batch
from longreach.engine.executor import execute
from longreach.engine.layer import Inputs, Layer
from longreach.kernels import kernel_for, selftest, tiles
from longreach.kernels.cpu import CpuKernel, operator
from longreach.kernels.protocol import KV
from longreach.kernels.tiles import Band

CPU = torch.device("cpu")
INF = float("inf")


def dense(q, k, v, band: Band, scale: float):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    behind = band.offset + torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])[None, :]
    visible = behind >= band.low
    if band.high is not None:
        visible &= behind < band.high
    logits = (q.double() @ k.transpose(-1, -2) * scale).masked_fill(~visible, -INF)
    lse = logits.logsumexp(-1)
    return (torch.exp(logits - lse[..., None]).nan_to_num(0.0) @ v), lse


def qkv(rows, columns, heads=4, groups=4, width=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    make = lambda h, t: torch.randn(1, h, t, width, generator=g).to(dtype)  # noqa: E731
    return make(heads, rows), make(heads // groups, columns), make(heads // groups, columns)


SHAPES = [(1, 1), (1, 37), (37, 37), (37, 90), (64, 64), (63, 1), (100, 300), (5, 200)]
BANDS = [(0, None), (0, 1), (0, 7), (0, 16), (0, 63), (0, 64), (3, None), (20, None), (16, 48), (7, 8), (200, None), (500, 600)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("core", [2, 16, 1024])
@pytest.mark.parametrize("groups", [1, 2])
def test_tiles_equal_dense(rows, columns, core, groups, monkeypatch):
    """Every band at several offsets: keys before, under and beyond the diagonal; rows that see nothing are (0, -inf)."""
    monkeypatch.setattr(tiles, "LARGEST_CORE", core)
    q, k, v = qkv(rows, columns, groups=groups)
    q, k, v = (torch.cat([x, x.flip(2)]) for x in (q, k, v))  # a batch of two
    for (low, high), offset, tile in itertools.product(BANDS, (0, columns - rows, columns + 9, -3, 11), (64, 7, 4, 1)):
        band = Band(offset, low, high)
        out, lse = tiles.attend(operator, q, k, v, band, 0.25, rows_per_tile=tile)
        want, want_lse = dense(q, k, v, band, 0.25)
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=0)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_kernel_grouped_heads_and_dtypes(groups, dtype):
    """Of the device that is tested, see families.py."""
    q, k, v = qkv(70, 110, heads=8, groups=groups, dtype=dtype)
    kernel = kernel_for(torch.device(DEVICE), dtype)
    for band in (Band(40), Band(40, 0, 20), Band(40, 50)):
        out, lse = (x.double().cpu() for x in kernel.attend(q.to(DEVICE), KV(k.to(DEVICE), v.to(DEVICE)), band, 0.25))
        want, want_lse = dense(q, k, v, band, 0.25)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out, want, atol=tolerance, rtol=0)
        torch.testing.assert_close(lse, want_lse, atol=tolerance, rtol=0)


def test_cpu_backend_values_may_be_narrower_than_keys():
    q, k, v = qkv(20, 20)
    out, _ = CpuKernel().attend(q, KV(k, v[..., :9]), Band(0), 0.25)
    torch.testing.assert_close(out.double(), dense(q, k, v[..., :9], Band(0), 0.25)[0], atol=1e-5, rtol=0)


def test_empty_keys_never_reach_the_operator():
    """A zero-length key dimension would end the process."""
    q, k, v = qkv(3, 0)
    out, lse = CpuKernel().attend(q, KV(k, v), Band(5), 1.0)
    assert out.eq(0).all() and lse.eq(-INF).all()


def test_kernel_refuses_causal_on_anything_but_squares():
    """`is_causal` is aligned to the top left."""
    with pytest.raises(AssertionError, match="squares"):
        operator(*qkv(3, 5), 1.0, causal=True)


def test_softcap_equals_dense():
    q, k, v = qkv(150, 170, groups=2)
    for band in (Band(20), Band(20, 0, 30), Band(20, 35), Band(-40)):
        out, lse = CpuKernel().attend(q, KV(k, v), band, 0.9, softcap=2.0)
        kk, vv = (x.double().repeat_interleave(2, 1) for x in (k, v))
        behind = band.offset + torch.arange(150)[:, None] - torch.arange(170)[None, :]
        visible = (behind >= band.low) & (behind < (band.high or 10**9))
        logits = (2.0 * torch.tanh(q.double() @ kk.transpose(-1, -2) * 0.9 / 2.0)).masked_fill(~visible, -INF)
        torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=1e-5, rtol=0)
        torch.testing.assert_close(out.double(), logits.softmax(-1).nan_to_num(0.0) @ vv, atol=1e-5, rtol=0)


def test_kernel_for_refuses_unknown_devices():
    with pytest.raises(ValueError, match="move the model"):
        kernel_for(torch.device("meta"), torch.float32)


# -- merge ---------------------------------------------------------------------------------------------------------------------


def test_merge_equals_one_softmax_for_any_partition():
    g = torch.Generator().manual_seed(1)
    logits, values = torch.randn(2, 3, 5, 40, generator=g).double() * 4, torch.randn(2, 3, 40, 7, generator=g).double()
    want, want_lse = logits.softmax(-1) @ values, logits.logsumexp(-1)
    owner = torch.randint(0, 4, (40,), generator=g)  # part 3 may be empty for nobody; part 4 is always empty
    parts = []
    for part in range(5):
        piece = logits.masked_fill(owner != part, -INF)
        parts.append((piece.softmax(-1).nan_to_num(0.0) @ values, piece.logsumexp(-1)))
    out, lse = merge(parts)
    torch.testing.assert_close(out.double(), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=0)


def test_merge_of_empty_rows_stays_empty():
    zero, nothing = torch.zeros(1, 1, 2, 3), torch.full((1, 1, 2), -INF)
    out, lse = merge([(zero, nothing), (zero.clone(), nothing.clone())])
    assert out.eq(0).all() and lse.eq(-INF).all()
    out, lse = merge([(zero, nothing), (torch.ones(1, 1, 2, 3), torch.zeros(1, 1, 2))])
    assert out.eq(1).all() and lse.eq(0).all()


def test_merge_of_far_apart_parts_does_not_overflow():
    a, b = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 5.0)
    out, lse = merge([(a, torch.tensor([[[1e4]]])), (b, torch.tensor([[[-1e4]]]))])
    assert out.item() == 1.0 and lse.item() == 1e4


def test_merge_into_some_rows_only():
    merged = Merge(4)
    merged.add(torch.ones(1, 1, 2, 1), torch.zeros(1, 1, 2), first_row=2)
    merged.add(torch.full((1, 1, 4, 1), 3.0), torch.zeros(1, 1, 4))
    assert merged.result()[0].flatten().tolist() == [3.0, 3.0, 2.0, 2.0]


# -- differences ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, INF, -INF])
@pytest.mark.parametrize("where", ["ours", "want", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_not_finite_is_infinitely_far(bad, where, dtype):
    ours, want = torch.ones(3, 4, dtype=dtype), torch.full((3, 4), 2.0, dtype=dtype)
    for measure in (differences.relative, differences.root_mean_square):
        assert measure(ours, want) == 0.5 and measure(want, want) == 0
        a, b = ours.clone(), want.clone()
        for x in {"ours": (a,), "want": (b,), "both": (a, b)}[where]:
            x[1, 2] = bad
        assert measure(a, b) == INF and max(0.5, measure(a, b)) == INF  # as a running worst has it
    assert differences.largest(torch.tensor([1.0, bad])) == INF and differences.largest(ours[:0]) == 0
    assert differences.root_mean_square(1e-30 * ours.double(), 2e-30 * ours.double()) == pytest.approx(0.5)


# -- rotation ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_distance_is_all_that_matters_even_at_a_billion(pairing):
    """Neighbour logits at position 10^9 equal those at the start; angles in fp32 would have lost them by 10^7."""
    rotary = Rotary(1e4 ** -(torch.arange(0, 64, 2).double() / 64), pairing=pairing)
    q, k, _ = qkv(1, 1, heads=1, groups=1, width=64)
    logits = []
    for base in (0, 10**6, 10**9):
        a = rotary.table(torch.tensor([base + 7])).rotate(q)
        b = rotary.table(torch.tensor([base])).rotate(k)
        logits.append((a * b).sum().item())
    assert max(logits) - min(logits) < 2e-5


def test_partial_rotation_leaves_the_other_dims_alone():
    rotary = Rotary(torch.tensor([1.0, 0.1]).double(), start=3)
    x = torch.randn(1, 2, 5, 16)
    y = rotary.table(torch.arange(5)).rotate(x)
    assert torch.equal(y[..., :3], x[..., :3]) and torch.equal(y[..., 7:], x[..., 7:]) and not torch.allclose(y[..., 1:, 3:7], x[..., 1:, 3:7])


def test_rotation_is_cast_once():
    rotary = Rotary(torch.tensor([1.0, 0.1]).double())
    x = torch.randn(1, 1, 9, 4).bfloat16()
    table = rotary.table(torch.arange(9))
    assert torch.equal(table.rotate(x), table.rotate(x.float()).bfloat16())


# -- golden values of the specification -------------------------------------------------------------------------------------------

GOLDEN_ROTARY = Rotary(torch.tensor([1.0, 0.01], dtype=torch.float64))


def golden_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    i, m = torch.arange(10).double(), torch.arange(4).double()
    q = torch.sin(0.3 * (i[:, None] + 1) * (m[None] + 1))
    k = torch.cos(0.2 * (i[:, None] + 1) * (m[None] + 1))
    v = torch.stack([i, i % 3], -1)
    return q[None, None], k[None, None], v[None, None]


GOLDEN = [
    (SelfExtend(1, 4), (4.85464447, 0.93546562), 2.37231558, (3.59439182, 0.67004828)),
    (SelfExtend(2, 4), (4.45255095, 0.91670396), 2.50778465, (3.86650345, 0.72077395)),
    (SelfExtend(3, 4), (4.48455661, 0.88708894), 2.46709747, (3.80134344, 0.76543199)),
    (LMInfinite(4, 2, distance_limit=4), (5.69313327, 0.67575709), 1.78707701, (4.29930165, 0.60910452)),
    (ReRoPE(4), (4.60022155, 0.92293917), 2.47466051, (4.09121898, 0.73497806)),
    (LeakyReRoPE(4, 2), (4.48881221, 0.91593709), 2.49367563, (3.92464441, 0.71511044)),
    (DualChunk(7, chunk_length=4), (4.48434243, 0.91918526), 2.47789985, (3.59439182, 0.67004828)),
    (StreamingLLM(3, 2), (5.50580867, 0.65352225), 1.82053412, (4.14925430, 0.58784653)),
    (STRING(3, 1), (4.47355626, 0.90536999), 2.44882411, (4.08696134, 0.71084140)),
]


@pytest.mark.parametrize(("method", "out9", "lse9", "out6"), GOLDEN, ids=lambda x: str(x) if not isinstance(x, (tuple, float)) else "")
def test_golden_values(method, out9, lse9, out6):
    q, k, v = golden_inputs()
    i = torch.arange(10)
    out, lse = reference.attention(q, k, v, method.distances(i[:, None], i[None]), GOLDEN_ROTARY, 0.5)
    torch.testing.assert_close(out[0, 0, 9], torch.tensor(out9, dtype=torch.float64), atol=1e-8, rtol=0)
    assert lse[0, 0, 9].item() == pytest.approx(lse9, abs=1e-7)
    torch.testing.assert_close(out[0, 0, 6], torch.tensor(out6, dtype=torch.float64), atol=1e-8, rtol=0)
    fast = run(Layer(0, method, GOLDEN_ROTARY), q, k, v)
    torch.testing.assert_close(fast[0, 0].double(), out[0, 0], atol=2e-6, rtol=0)


def test_golden_sink_interleaved_and_top_k():
    q, k, v = golden_inputs()
    i = torch.arange(10)
    method = SelfExtend(2, 4)
    sink = torch.tensor([0.7])
    fast = run(Layer(0, method, GOLDEN_ROTARY), q, k, v, sink=sink)
    assert fast[0, 0, 9].tolist() == pytest.approx([3.82515943, 0.78753479], abs=2e-6)
    out, _ = reference.attention(q, k, v, method.distances(i[:, None], i[None]), GOLDEN_ROTARY, 0.5, sink=sink)
    assert out[0, 0, 9].tolist() == pytest.approx([3.82515943, 0.78753479], abs=1e-7)
    interleaved = Rotary(GOLDEN_ROTARY.inverse_frequencies, pairing="interleaved")
    assert run(Layer(0, method, interleaved), q, k, v)[0, 0, 9].tolist() == pytest.approx([4.54386235, 0.86908874], abs=2e-6)
    top = LMInfinite(4, 2, top_k=2, top_k_distance=2, top_k_from_layer=0)
    assert run(Layer(0, top, GOLDEN_ROTARY), q, k, v)[0, 0, 9].tolist() == pytest.approx([5.08380764, 0.62679270], abs=2e-6)
    assert run(Layer(0, top, GOLDEN_ROTARY), q, k, v)[0, 0, 8].tolist() == run(Layer(0, LMInfinite(4, 2), GOLDEN_ROTARY), q, k, v)[0, 0, 8].tolist()


def run(layer: Layer, q, k, v, sink=None) -> torch.Tensor:
    """[B, H, T, E], stateless."""
    q, k, v = q.float(), k.float(), v.float()
    padded = torch.nn.functional.pad(v, (0, k.shape[-1] - v.shape[-1]))
    out = execute(layer, Batch.of(1, q.shape[2], None, CPU, None), None, CpuKernel(), q, k, padded, Inputs(0.5, sink=sink))
    return out.transpose(1, 2)[..., : v.shape[-1]]


def test_reference_softmax_over_nothing_is_zero():
    q, k, v = golden_inputs()
    distance = torch.full((10, 10), math.nan)
    out, lse = reference.attention(q, k, v, distance, GOLDEN_ROTARY, 0.5)
    assert out.eq(0).all() and lse.eq(-INF).all()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_one_windowed_call_covers_a_band(rows, columns, monkeypatch):
    """How the CUDA backend trims rows and keys for a flash call, with that call written out: causal to the bottom right, `window` keys back."""
    from longreach.kernels import cuda

    def windowed(q, k, v, scale, window):
        assert k.shape[2] >= q.shape[2] > 0, "the kernel would align rows without a key elsewhere"
        out, lse = dense(q, k, v, Band(k.shape[2] - q.shape[2], 0, None if window < 0 else window + 1), scale)
        return out.float(), lse.float()

    monkeypatch.setattr(cuda, "windowed", windowed)
    monkeypatch.setattr(cuda, "operator", operator)
    if (rows, columns) == SHAPES[0]:
        assert all(selftest.difference(kernel, CPU, torch.float32) < 1e-4 for kernel in (cuda.CudaWindow(), cuda.CudaTiles()))
    q, k, v = qkv(rows, columns, groups=2)
    for (low, high), offset in itertools.product(BANDS, (0, columns - rows, columns + 9, -3, 11)):
        band = Band(offset, low, high)
        out, lse = cuda.CudaWindow().attend(q, KV(k, v), band, 0.25)
        want, want_lse = dense(q, k, v, band, 0.25)
        torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=0)
        torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("part", ["out", "lse"])
def test_self_tests_of_the_card_do_not_pass_nan(part, monkeypatch):
    """With a kernel that gives one NaN, whatever it gives before and after."""
    from longreach.kernels import cuda

    def broken(*arguments, **more):
        out, lse = operator(*arguments, **more)
        (out if part == "out" else lse)[0, 0, -1] = math.nan
        return out, lse

    monkeypatch.setattr(cuda, "operator", operator)
    cuda.require_bias.__wrapped__(CPU, torch.float32)
    assert selftest.difference(cuda.CudaTiles(), CPU, torch.float32) < 1e-4
    monkeypatch.setattr(cuda, "operator", broken)
    assert selftest.difference(cuda.CudaTiles(), CPU, torch.float32) == INF
    monkeypatch.setattr("longreach.kernels.cpu.kernels", lambda device, dtype: [cuda.CudaTiles()])
    with pytest.raises(ValueError, match=r"no attention of this PyTorch passes the self-test on cpu \(cuda: fused attention, tiled: differs by inf"):
        kernel_for.__wrapped__(CPU, torch.float32)
    with pytest.raises(ValueError, match="off by inf"):
        cuda.require_bias.__wrapped__(CPU, torch.float32)
