"""Short forwards that an engine is judged by: what the stock model makes of the probe under each of its kernels, and in fp32.

Knows modules and their hooks; nothing about methods. In fp32 the stock model's eager code is the truth. In half precision it is not: eager rounds
logits that a fused kernel keeps in fp32, and a fused kernel may ignore a soft-cap or a sink. The truth is then the model itself computed in
fp32, one module at a time, and the measure is the error that the better of the stock kernels has. Attention layers are compared on one common
input, for rounding may decide something between them: a router that chooses other experts for a token changes all that follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from longreach.core.differences import relative, root_mean_square
from longreach.hf.placement import ordinary

HALVES = (torch.bfloat16, torch.float16)
RATIO = 1.5  # our error in half precision is at most this multiple of the better stock kernel's
NEAR_LOGITS, NEAR = 1e-1, 5e-2  # of logits, or of every layer, to the nearer stock kernel where there is no truth in fp32

Streams = dict[int | str, torch.Tensor]  # the hidden states among the arguments of a layer, by place or by name


@dataclass(frozen=True)
class Run:
    """One forward. logits: fp32. inputs: what every attention layer was given. outputs: what it made of that, or of the inputs it was to be compared on."""

    logits: torch.Tensor
    inputs: list[Streams]
    outputs: list[torch.Tensor]

    @property
    def finite(self) -> bool:
        return all(bool(x.isfinite().all()) for x in (self.logits, *self.outputs))


@dataclass(frozen=True)
class Stock:
    """The stock model on the probe: a run for each of its kernels whose values are finite, all on the inputs of the first, and the truth in fp32."""

    kernels: dict[str, Run]
    truth: Run | None = None
    without: str = ""  # why there is no truth

    @property
    def first(self) -> Run:
        return next(iter(self.kernels.values()))


@dataclass(frozen=True)
class Errors:
    """What is wrong with one run, and how wrong stock is by itself.

    To the truth in fp32: root mean square over that of the truth. Without one: largest difference over the largest value, to the nearer stock kernel.
    stock_logits, stock_layer: the same of the better stock kernel, None where there is nothing to measure it against.
    """

    logits: float
    layer: float  # the largest of all layers
    stock_logits: float | None
    stock_layer: float | None
    passed: bool


def observe(modules: Sequence[nn.Module], run: Callable[[], torch.Tensor], inputs: Sequence[Streams] | None = None) -> Run:
    """Run a forward and listen to its attention layers. `inputs`: what their outputs are wanted of; the forward itself goes on from its own."""
    heard: dict[int, Streams] = {}
    outputs: dict[int, torch.Tensor] = {}

    def listen(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if index in heard:
                return
            heard[index] = _streams(args, kwargs)
            if inputs is not None:
                args, kwargs = _given(args, kwargs, inputs[index])
                out = module(*args, **kwargs)
            outputs[index] = (out[0] if isinstance(out, tuple) else out).detach().float()

        return hook

    with ExitStack() as hooks:
        for index, module in enumerate(modules):
            hooks.callback(module.register_forward_hook(listen(index), with_kwargs=True).remove)
        logits = run().detach().float()
    return Run(logits, [heard[index] for index in range(len(modules))], [outputs[index] for index in range(len(modules))])


def _streams(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Streams:
    shape = (args[0] if args else kwargs["hidden_states"]).shape
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {name: x.detach() for name, x in named if isinstance(x, torch.Tensor) and x.shape == shape}


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], streams: Streams) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the hidden states of another run, in the dtype of this one."""
    put = lambda name, x: streams[name].to(x.dtype) if name in streams and isinstance(x, torch.Tensor) else x  # noqa: E731
    return tuple(put(place, x) for place, x in enumerate(args)), {name: put(name, x) for name, x in kwargs.items()}


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Inside, modules of half precision compute in fp32 with their own weights. They are held twice one module at a time, and are untouched after."""
    replaced: dict[nn.Module, list[tuple[dict[str, Any], str, torch.Tensor]]] = {}

    def widen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if not isinstance(module, nn.Embedding) and module not in replaced:  # of a large table few rows are read: its output is widened
            replaced[module] = []
            every: list[dict[str, Any]] = [module._parameters, module._buffers]
            for held in every:
                for name, tensor in list(held.items()):
                    if tensor is not None and tensor.dtype in HALVES and not tensor.is_meta:
                        replaced[module].append((held, name, tensor))
                        wide = tensor.detach().float()
                        held[name] = nn.Parameter(wide, requires_grad=False) if held is module._parameters else wide
        return tree_map(_wide, args), {name: tree_map(_wide, x) for name, x in kwargs.items()}

    def restore(module: nn.Module, args: Any, out: Any) -> Any:
        for held, name, tensor in replaced.pop(module, ()):
            held[name] = tensor
        return _wide(out)

    with ExitStack() as hooks:
        hooks.callback(lambda: [restore(module, None, None) for module in list(replaced)])
        for module in model.modules():
            if module._parameters or module._buffers:
                hooks.callback(module.register_forward_pre_hook(widen, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(restore).remove)
        yield


def _wide(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.dtype in HALVES else x


def truth(model: nn.Module, modules: Sequence[nn.Module], run: Callable[[], torch.Tensor], inputs: Sequence[Streams]) -> dict[str, Any]:
    """`truth` and `without` of a `Stock`: the run in fp32, or why there is none. Weights may be packed or kept elsewhere, or a module may not fit."""
    if not ordinary(model):
        return {"without": "its weights are quantised, sharded or off-loaded"}
    try:
        with in_fp32(model):
            found = observe(modules, run, inputs)
    except (RuntimeError, TypeError, NotImplementedError) as error:  # code with a dtype of its own
        return {"without": f"its code does not run in fp32 ({' '.join(str(error).split())[:120]})"}
    return {"truth": found} if found.finite else {"without": "its code gives NaN or infinity in fp32"}


def stock_runs(
    model: nn.Module, modules: Sequence[nn.Module], run: Callable[[], torch.Tensor], kernels: Sequence[str],
    using: Callable[[str], AbstractContextManager[None]], dtype: torch.dtype,
) -> Stock:  # fmt: skip
    """The stock model on the probe: under eager attention, which is its definition, and in half precision under each kernel and in fp32 too.

    using  a context in which the model is stock with one of the kernels. Raises ValueError if no kernel gives finite values.
    """
    found: dict[str, Run] = {}
    for name in kernels:
        inputs = next(iter(found.values())).inputs if found else None
        with using(name):
            heard = observe(modules, run, inputs)
        if heard.finite:
            found[name] = heard
    if not found:
        require_finite("the logits of the stock model itself", dtype, heard.logits * float("nan"))
    stock = Stock(found)
    if dtype not in HALVES:
        return stock
    with using(kernels[-1]):
        return replace(stock, **truth(model, modules, run, stock.first.inputs))


def require_finite(what: str, dtype: torch.dtype, *tensors: torch.Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        name = str(dtype).removeprefix("torch.")
        fix = "load the model with sound weights" if dtype not in HALVES else "load the model with dtype=torch.float32"
        if dtype == torch.float16:
            name, fix = "float16, where values beyond 65504 overflow", "load the model with dtype=torch.bfloat16 or torch.float32"
        raise ValueError(f"{what} are NaN or infinite in {name}, so there is nothing to extend; {fix}")


def judge(ours: Run, stock: Stock, unit: float) -> Errors:
    """Our run of half precision, on the inputs of `stock.first`. unit: the rounding unit of the dtype, which no error is asked to be below."""
    if stock.truth is None:
        near = min(relative(ours.logits, run.logits) for run in stock.kernels.values())
        layers = [min(relative(a, b) for b in wanted) for a, wanted in zip(ours.outputs, _by_layer(stock), strict=True)]
        return Errors(near, max(layers), None, None, near < NEAR_LOGITS or max(layers) < NEAR)
    own = [root_mean_square(a, b) for a, b in zip(ours.outputs, stock.truth.outputs, strict=True)]
    stocks = [min(root_mean_square(b, want) for b in runs) for runs, want in zip(_by_layer(stock), stock.truth.outputs, strict=True)]
    logits = root_mean_square(ours.logits, stock.truth.logits)
    stock_logits = min(root_mean_square(run.logits, stock.truth.logits) for run in stock.kernels.values())
    passed = logits < float("inf") and all(mine <= RATIO * theirs + unit for mine, theirs in zip(own, stocks, strict=True))
    return Errors(logits, max(own), stock_logits, max(stocks), passed)


def _by_layer(stock: Stock) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(run.outputs for run in stock.kernels.values()), strict=True)
