"""The Triton kernel that reads pages, in Triton's interpreter:

    TRITON_INTERPRET=1 pytest -n 0 tests/test_pages_triton.py

where Triton is installed. Triton reads the variable when it is imported, so a process is interpreted as a whole or not at all. A card has never run the kernel;
it is compiled for some here.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from longreach import LMInfinite, SelfExtend, kernels
from longreach.engine.layer import Inputs
from longreach.kernels import paged
from longreach.kernels.paged import OnPages, PagedKernel, reading_pages
from longreach.kernels.protocol import Chosen, Spans
from longreach.kernels.tiles import Band
from longreach.methods.stock import Stock
from paged_engine import BOUNDED, HEADS, HISTORY, LONG, PAGED, ROTARIES, check, engine, rotary

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton is not installed, or TRITON_INTERPRET is not 1", allow_module_level=True)

CPU = torch.device("cpu")


@pytest.fixture
def kernel() -> PagedKernel:
    return PagedKernel(kernels.kernel_for(CPU, torch.float32))


@pytest.mark.parametrize("width", [16, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_its_own_test_passes(dtype, width):
    assert paged.failure_of(PagedKernel(kernels.kernel_for(CPU, dtype)), CPU, dtype, width) is None


COMPILE = """
import sys
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from longreach.kernels.pages_triton import _attend
capability, width, rows, columns = map(int, sys.argv[1:5])
kind = sys.argv[5]
signature = {name: "i32" for name in _attend.arg_names} | dict.fromkeys(("out", "lse"), "*fp32") | dict.fromkeys(("scale", "softcap"), "fp32")
signature |= dict.fromkeys(("q", "pool"), f"*{kind}") | {"table": "*i64", "lows": "*i32", "highs": "*i32"}
number = {"fp32": tl.float32, "bf16": tl.bfloat16}[kind]
fixed = dict(WIDTH=width, WIDE=triton.next_power_of_2(width), SIZE=16, CAPPED=True, ROWS=rows, COLUMNS=columns, PRODUCT=number)
made = triton.compile(ASTSource(_attend, signature | dict.fromkeys(fixed, "constexpr"), constexprs=fixed), target=GPUTarget("cuda", capability, 32))
print(len(made.asm["cubin"]) > 0, made.metadata.shared)
"""


SHAPES = [("128", "16", "64", "bf16"), ("256", "64", "32", "bf16"), ("80", "64", "32", "fp32"), ("256", "16", "32", "fp32")]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("shape", SHAPES, ids="-".join)
def test_it_compiles_for_a_card(shape, capability):
    """To machine code, and with as little memory for a block of threads as every card of these generations has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, str(capability), *shape], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    compiled, shared = done.stdout.split()
    assert compiled == "True" and int(shared) <= 99 * 1024


@pytest.mark.parametrize("method", PAGED, ids=lambda m: m.brief())
def test_mixed_requests_equal_the_dense_truth(method, kernel):
    torch.manual_seed(0)
    run = engine(method, turning=rotary(method), kernel=kernel)
    for new in HISTORY:
        check(run, new)


@pytest.mark.parametrize("turning", ROTARIES.values(), ids=ROTARIES.keys())
def test_every_way_of_rotating(turning, kernel):
    torch.manual_seed(0)
    run = engine(SelfExtend(3, 8) if turning is not None else LMInfinite(9, 3), turning=turning, kernel=kernel)
    for new in HISTORY:
        check(run, new)


@pytest.mark.parametrize("inputs", [Inputs(0.3, softcap=5.0), Inputs(0.3, sink=torch.randn(HEADS))], ids=["softcap", "sink"])
def test_softcap_and_sink(inputs, kernel):
    torch.manual_seed(0)
    run = engine(SelfExtend(3, 8), inputs, rotary(Stock()), kernel=kernel)
    for new in HISTORY:
        check(run, new)


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("method", BOUNDED[:5], ids=lambda m: m.brief())
def test_freed_pages_are_never_read(method, size, kernel):
    torch.manual_seed(0)
    run = engine(method, turning=rotary(method), kernel=kernel, size=size, pages=1 + -(-120 // size), frees=True)
    for new in LONG:
        check(run, new)


def test_plain_attention_gathers_nothing(kernel, monkeypatch):
    monkeypatch.setattr(OnPages, "_gathered", property(lambda self: pytest.fail("gathered")))
    torch.manual_seed(0)
    run = engine(Stock(), turning=rotary(Stock()), kernel=kernel)
    for new in HISTORY:
        check(run, new)


def test_requests_of_any_lengths_are_one_call(kernel, monkeypatch):
    from longreach.kernels import pages_triton

    asked, whole = [], pages_triton.attend
    monkeypatch.setattr(pages_triton, "attend", lambda q, *args: asked.append(len(q)) or whole(q, *args))
    torch.manual_seed(0)
    run = engine(Stock(), turning=rotary(Stock()), kernel=kernel)
    run.read({"a": 90, "b": 3, "c": 30})
    asked.clear()
    check(run, {"a": 1, "b": 1, "c": 1})
    assert asked == [3]


@pytest.mark.parametrize("split", [16, 33, 4096])
def test_splits_of_the_columns_are_merged_exactly(split, kernel, monkeypatch):
    from longreach.kernels import pages_triton

    monkeypatch.setattr(pages_triton, "SPLIT", split)
    assert paged.difference(kernel, CPU, torch.float32, 64) < 1e-5


@pytest.mark.parametrize("work", [Band(0, 1), Band(150, 0, 0), Spans((5, 9), (5, 3))], ids=str)
def test_who_sees_nothing_gets_nothing(work, kernel):
    pool = torch.full((9, 1, 2, 4, 16), torch.nan)
    kv = OnPages(pool, torch.arange(1, 9).view(2, 4), 3, 12, 0, lambda: pytest.fail("gathered"))
    out, lse = kernel.attend(torch.randn(2, 2, 1, 16), kv, work, 0.25)
    assert not out.any() and lse.isneginf().all()


def test_a_choice_is_the_other_kernel_s(kernel):
    pool = torch.randn(9, 1, 2, 4, 16)
    gathered = []
    kv = OnPages(pool, torch.arange(1, 9).view(2, 4), 0, 16, 0, lambda: gathered.append(1) or paged._gather(pool, torch.arange(1, 9).view(2, 4), 0, 16))
    kernel.attend(torch.randn(2, 2, 1, 16), kv, Chosen(torch.rand(2, 1, 16) > 0.5), 0.25)
    assert gathered == [1]


def test_where_no_kernel_reads_pages_it_is_said():
    inner = kernels.kernel_for(CPU, torch.float32)
    kernel, said = reading_pages(inner, CPU, torch.float32, 64)
    assert kernel is inner and "gathers pages" in said


def test_one_that_is_wrong_is_not_used(monkeypatch):
    """Nor one that does not compile."""
    from longreach.kernels import pages_triton

    inner, cuda = kernels.kernel_for(CPU, torch.float32), torch.device("cuda")
    monkeypatch.setattr(paged, "difference", lambda *_: 1.0)
    kernel, said = reading_pages(inner, cuda, torch.float32, 64)
    assert kernel is inner and "differs by 1.0e+00" in said
    monkeypatch.undo()
    monkeypatch.setattr(pages_triton, "attend", lambda *_: (_ for _ in ()).throw(RuntimeError("no ptxas")))
    whole = paged.difference
    monkeypatch.setattr(paged, "difference", lambda kernel, device, dtype, width: whole(kernel, CPU, dtype, width))
    assert "RuntimeError: no ptxas" in reading_pages(inner, cuda, torch.float32, 64)[1]
