"""One short forward of the stock model, kept to compare the engine with: its logits, and what every attention layer was given and gave.

Knows modules and their hooks; nothing about methods. Logits settle the question unless rounding decides something: in half precision a router
may choose other experts for a token, and all that follows differs. Then every layer is compared on the input that it had in the stock model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class StockRun:
    """Logits fp32, and the hidden states before and after each attention layer."""

    logits: torch.Tensor
    inputs: list[torch.Tensor]
    outputs: list[torch.Tensor]


def record(modules: Sequence[nn.Module], run: Callable[[], torch.Tensor]) -> StockRun:
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(lambda _, a, k: inputs.append(_hidden(a, k)), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(lambda _, a, out: outputs.append(_first(out))).remove)
        logits = run().float()
    return StockRun(logits, inputs, outputs)


def layerwise(modules: Sequence[nn.Module], stock: StockRun, run: Callable[[], Any]) -> float:
    """Largest difference of a layer's output to the stock one, relative to the largest value, each layer given the input that it had there."""
    worst = 0.0

    def give(index: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            given = stock.inputs[index]
            return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

        return hook

    def compare(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            nonlocal worst
            want = stock.outputs[index].float()
            worst = max(worst, ((_first(out).float() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item())

        return hook

    with ExitStack() as hooks:
        for index, module in enumerate(modules):
            hooks.callback(module.register_forward_pre_hook(give(index), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(compare(index)).remove)
        run()
    return worst


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return (args[0] if args else kwargs["hidden_states"]).detach()


def _first(out: Any) -> torch.Tensor:
    return (out[0] if isinstance(out, tuple) else out).detach()
