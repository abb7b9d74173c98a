"""Measures this machine for `longreach plan --calibrate`: matrix products, attention, memory reads, and what a forward costs beside them.

Knows random tensors, tiny random models under `extend`, and clocks. The overheads are those of `generate` on the engine, for that is what a
plan predicts; the speeds are those of the operations that it is made of.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from longreach.hf.extension import extend
from longreach.hf.placement import device_of
from longreach.kernels import kernel_for
from longreach.kernels.protocol import KV
from longreach.kernels.tiles import Band
from longreach.methods.base import Method
from longreach.methods.rerope import ReRoPE
from longreach.methods.stock import Stock
from longreach.planning import calibration
from longreach.planning.architecture import read
from longreach.planning.hardware import Curve, Hardware, Speeds
from longreach.planning.machine import resident_memory, total_memory
from longreach.planning.memory import Schedule
from longreach.planning.timing import elementwise_bytes, prefill
from longreach.planning.work import layouts
from longreach.quantities import CHUNK_SIZE
from longreach.running.reading import stream

ROWS = CHUNK_SIZE  # tokens of a forward, as `longreach run` has them
MATRICES = ((256, 512), (1024, 1024), (2048, 2048), (2048, 8192))
HEADS = (64, 128)
POOL = 1 << 28  # bytes of matrices that are read in turn, more than any cache holds
OVERHEAD_LAYERS = (2, 8)
TINY = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
SMALL = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4)
FEW, MANY = 8, 40  # new tokens of the two answers whose difference is timed

Say = Callable[[str], None]


def calibrate(device: str = "cpu", dtypes: tuple[str, ...] = ("float32", "bfloat16"), path: Path | None = None, say: Say = lambda text: None) -> Hardware:
    """Measure, write the file, -> this machine as hardware. About a minute on a quiet machine."""
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"only cpu and cuda can be measured, not {device!r}; pass one of them")
    say("overheads, on tiny random models")
    overheads = overhead_seconds(where)
    reserved = resident_memory() if where.type == "cpu" else reserved_on_card(where)
    measured = {}
    for name in dtypes:
        say(f"matrix products, attention and memory in {name}")
        measured[name] = speeds(where, getattr(torch, name), overheads)
    made = Hardware(
        name="this machine" if where.type == "cpu" else torch.cuda.get_device_name(where),
        memory=total_memory() if where.type == "cpu" else torch.cuda.get_device_properties(where).total_memory,
        flops={name: max(y for _, y in found.gemm.points) for name, found in measured.items()},
        bandwidth=max(found.elementwise for found in measured.values()),
        link=next(iter(measured.values())).link,
        reserved=reserved,
        source=f"measured on {datetime.now(UTC):%Y-%m-%d}",
        host_memory=total_memory(),
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        link_efficiency=1.0,
        device=where.type,
        measured=measured,
    )
    calibration.save(made, datetime.now(UTC).isoformat(timespec="seconds"), path)
    return made


def reserved_on_card(device: torch.device) -> int:
    """What is in use on the card and is not ours: the driver and the libraries' work space."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def speeds(device: torch.device, dtype: torch.dtype, overheads: tuple[float, float, float]) -> Speeds:
    gemm, gemv = [], []
    for inner, outer in MATRICES:
        x, weight = (torch.randn(shape, device=device).to(dtype) for shape in ((ROWS, inner), (outer, inner)))
        gemm.append((float(inner * outer), 2 * ROWS * inner * outer / seconds(lambda: torch.nn.functional.linear(x, weight), device)))  # noqa: B023
        gemv.append((float(inner * outer), matrix_read(inner, outer, device, dtype)))
    found = Speeds(
        gemm=Curve(tuple(gemm)),
        gemv=Curve(tuple(gemv)),
        attention=Curve(tuple((float(width), attention(width, device, dtype)) for width in HEADS)),
        keys=keys_read(device, dtype),
        elementwise=elementwise(device, dtype),
        link=link(device),
        forward_seconds=overheads[0],
        layer_seconds=overheads[1],
        call_seconds=overheads[2],
        square=causal_square(device, dtype),
    )
    return replace(found, elementwise=elementwise_in_a_model(device, dtype, found))


def matrix_read(inner: int, outer: int, device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s of matrices that meet one row, each new to the caches."""
    size = inner * outer * dtype.itemsize
    pool = torch.randn(max(2, POOL // size), outer, inner, device=device, dtype=dtype)
    x = torch.randn(1, inner, device=device, dtype=dtype)

    def once() -> None:
        for weight in pool:
            torch.nn.functional.linear(x, weight)

    return pool.numel() * dtype.itemsize / seconds(once, device)


def attention(width: int, device: torch.device, dtype: torch.dtype, keys: int = 4096, heads: int = 8) -> float:
    """FLOP/s of a chunk of a prompt on the keys before it."""
    return 4 * heads * width * ROWS * keys / attend_seconds(width, keys, keys, device, dtype, heads)


def causal_square(device: torch.device, dtype: torch.dtype, width: int = 64, heads: int = 8) -> float:
    """What a pair of a chunk on itself costs, in pairs of a rectangle."""
    rectangle = attend_seconds(width, ROWS, ROWS, device, dtype, heads) / (ROWS * ROWS)
    return max(1.0, attend_seconds(width, ROWS, 0, device, dtype, heads) / (ROWS * (ROWS + 1) // 2) / rectangle)


def attend_seconds(width: int, keys: int, offset: int, device: torch.device, dtype: torch.dtype, heads: int) -> float:
    kernel = kernel_for(device, dtype)
    q, k, v = (torch.randn(1, heads, n, width, device=device, dtype=dtype) for n in (ROWS, keys, keys))
    return seconds(lambda: kernel.attend(q, KV(k, v), Band(offset), width**-0.5), device)


def keys_read(device: torch.device, dtype: torch.dtype, heads: int = 8, groups: int = 4, width: int = 64) -> float:
    """Bytes/s of keys and values for one query, with grouped heads."""
    kernel = kernel_for(device, dtype)
    count = POOL // (2 * heads * width * dtype.itemsize)
    k, v = (torch.randn(1, heads, count, width, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(1, heads * groups, 1, width, device=device, dtype=dtype)
    return POOL / seconds(lambda: kernel.attend(q, KV(k, v), Band(count - 1), width**-0.5), device)


def elementwise(device: torch.device, dtype: torch.dtype, width: int = 2048) -> float:
    """Bytes/s of a product of two tensors of the size that a chunk has. The result is new memory, as in a model: on the CPU its pages cost more than
    the product."""
    a, b = (torch.randn(ROWS, width, device=device).to(dtype) for _ in range(2))
    return 3 * a.numel() * dtype.itemsize / seconds(lambda: torch.mul(a, b), device)


def elementwise_in_a_model(device: torch.device, dtype: torch.dtype, found: Speeds, rounds: int = 3) -> float:
    """Bytes/s of what is neither product nor attention nor overhead: what they leave of the seconds of a small model. Between two steps a model has
    forgotten its caches and takes new memory, which no loop over one step shows; a loop is the upper limit."""
    model, schedule = random_model(device, dtype, **SMALL), Schedule(2 * ROWS + 1, 1, ROWS)
    architecture = read(model.config, dtype)
    ids = torch.ones(schedule.prompt, dtype=torch.long, device=device)
    taken: list[float] = []
    with extend(model, Stock(), trained_window=len(ids)) as extension, torch.no_grad():
        for _ in range(1 + rounds):
            started = time.perf_counter()
            for _ in stream(extension, ids, chunk_size=ROWS, losses=False):
                pass
            synchronise(device)
            taken.append(time.perf_counter() - started)
    left = statistics.median(taken[1:]) - prefill(architecture, Stock(), schedule, replace(found, elementwise=math.inf)).total
    moved = schedule.prompt * sum(n * elementwise_bytes(architecture, layer, layout) for (layer, layout), n in layouts(architecture, Stock()).items())
    return min(found.elementwise, moved / left) if left > 0 else found.elementwise


def random_model(device: torch.device, dtype: torch.dtype, **sizes: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=64, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).to(device, dtype).eval()


def link(device: torch.device) -> float:
    """Bytes/s of pinned memory to the card; of a copy on the CPU, where the host is the device."""
    host = torch.ones(POOL // 4, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device)
    return POOL / seconds(lambda: there.copy_(host), device)


def overhead_seconds(device: torch.device) -> tuple[float, float, float]:
    """Of a forward, of a layer, of an attention call beyond the first: differences between tiny models that do next to nothing else."""
    few, many = (token_seconds(random_model(device, torch.float32, num_hidden_layers=layers, **TINY), Stock()) for layers in OVERHEAD_LAYERS)
    layer = max(0.0, (many - few) / (OVERHEAD_LAYERS[1] - OVERHEAD_LAYERS[0]))
    two_calls = token_seconds(random_model(device, torch.float32, num_hidden_layers=OVERHEAD_LAYERS[1], **TINY), ReRoPE(4))
    call = max(0.0, (two_calls - many) / OVERHEAD_LAYERS[1])
    return max(0.0, few - OVERHEAD_LAYERS[0] * layer), layer, call


def token_seconds(model: Any, method: Method, rounds: int = 3) -> float:
    """Of one new token of `generate`: the difference of a long and a short answer, median of `rounds`."""
    ids = torch.ones(1, 16, dtype=torch.long, device=device_of(model))

    def answer(count: int) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - started

    with extend(model, method):
        answer(2)
        return statistics.median((answer(MANY) - answer(FEW)) / (MANY - FEW) for _ in range(rounds))


def seconds(run: Callable[[], Any], device: torch.device, least: float = 0.6) -> float:
    """Of one call: the median of several after a warm-up; the second where one takes long."""
    found: list[float] = []
    with torch.no_grad():
        began = time.perf_counter()
        run()
        synchronise(device)
        rounds = 5 if time.perf_counter() - began < 1.0 else 1
        while len(found) < rounds or time.perf_counter() - began < least:
            started = time.perf_counter()
            run()
            synchronise(device)
            found.append(time.perf_counter() - started)
    return statistics.median(found)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
