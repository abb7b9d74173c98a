"""verify(): is this model what we take it for? Its layers are read, the engine is run beside the stock model, and what was found is frozen.

Knows models, seams and the engine; attaches nothing for good.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from longreach import configs
from longreach.core.differences import relative
from longreach.core.encodings import Rotary
from longreach.engine.layer import Layer
from longreach.hf import frequencies, layer_kinds, selfcheck
from longreach.hf.attach import Attachment
from longreach.hf.checks import Inexact
from longreach.hf.facts import Chosen, Exactness, Facts, Reading, Seam
from longreach.hf.forward import Forward
from longreach.hf.placement import device_of
from longreach.hf.rotary import evaluation
from longreach.methods.base import Method
from longreach.methods.stock import Stock


def verify(seam: Seam, chosen: Chosen, dense: bool = False) -> Facts:
    """The facts of a model under a method. dense: every layer is to compute the dense truth.

    Raises ValueError, with the fix, where the method cannot apply to the model, and Inexact where the engine does not compute what the model does. The
    model is as before.
    """
    device = device_of(seam.model)
    with evaluation(seam.model, device):
        positions = seam.probe(chosen.window.tokens).to(device)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, seam.base.config.vocab_size, (1, positions.numel()), generator=generator).to(device)
        reading = seam.read(ids, positions)
        if reading.alibi is not None and chosen.method.rescales:
            raise ValueError(
                "the positions of this model are the biases of ALiBi, so there are no rotary frequencies to change; use a method of positions, such as "
                "SelfExtend or LMInfinite"
            )
        if (choice := chosen.method.choice) is not None:
            for entry in reading.entries:
                choice.index.require_widths(entry.key_width, entry.value_width)
        logits = _logits_of(seam, ids)
        stock = selfcheck.stock_runs(seam.model, reading.modules, logits, seam.kernels(reading), seam.stock, reading.dtype)
        chosen, methods, remark = _settle(seam.base, chosen, reading)
        neutral = tuple(Layer(i, t, r, alibi=reading.alibi) for i, (t, r) in enumerate(zip(reading.trained, reading.rotaries, strict=True)))
        unlimited = replace(chosen, context=None, capacity=None)
        probed = Facts(seam.model, seam.base, seam.legacy, seam.name, unlimited, reading, neutral, layer_kinds.slot_scales(reading.modules))
        forward = Forward(probed)
        forward.eviction = None  # of the few tokens of the probe nothing has to leave
        with Attachment(seam, forward):
            ours = selfcheck.observe(reading.modules, logits, stock.first.inputs)
    return replace(
        probed,
        chosen=chosen,
        layers=tuple(_layers(seam.base.config, reading, chosen, methods, dense)),
        exactness=_measured(type(seam.base).__name__, reading, ours, stock),
        remark=remark,
    )


def _logits_of(seam: Seam, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Of the probe. The base and the head are called, not what is around them: that may be compiled, cast, or a head that pools."""

    def logits() -> torch.Tensor:
        hidden = seam.base(input_ids=ids, use_cache=False)[0]
        head = seam.model.get_output_embeddings()
        return hidden if head is None else torch.as_tensor(head(hidden))

    return logits


def _settle(base: Any, chosen: Chosen, reading: Reading) -> tuple[Chosen, list[Method], str | None]:
    """-> (what is in force, the method of every layer, a remark).

    Where the layers that take the method encode no positions, its distances mean nothing: plain attention is chosen, or it is refused, or said.
    """
    name, method, choice = type(base).__name__, chosen.method, chosen.choice
    methods = configs.methods_of(reading.trained, method)
    covered = [i for i, m in enumerate(methods) if m is method]
    layer_kinds.refuse_uncovered(name, method, covered)
    layer_kinds.refuse_partly(name, method, covered, len(methods))
    remark = None
    if covered and reading.alibi is None and all(reading.rotaries[i] is None for i in covered):
        if choice is not None:
            reason = f"the layers that see everything encode no positions, so no distance of {chosen.context} tokens is untrained: plain attention"
            choice = replace(choice, method=Stock(), reason=reason, warning=None, profile=None)
            chosen = replace(chosen, method=choice.method, capacity=None, choice=choice)
            methods = [chosen.method if i in covered else m for i, m in enumerate(methods)]
        elif not isinstance(method, Stock):
            layer_kinds.refuse_unrotated(name, method)
            remark = layer_kinds.unrotated_remark(covered)
    return chosen, methods, (choice.warning if choice is not None else None) or remark


def _layers(config: Any, reading: Reading, chosen: Chosen, methods: list[Method], dense: bool) -> list[Layer]:
    """Every layer with its method, and with what it rotates with while that is in force."""
    fixed: dict[tuple[int, Method], Rotary | None] = {}  # one object per kind of layer, so that layers share their tables
    for key, found, method in zip(reading.keys, reading.rotaries, methods, strict=True):
        if (id(found), method) not in fixed:
            rotary = None if found is None else frequencies.fixed(config, key, found, method, chosen.window, chosen.context)
            fixed[id(found), method] = rotary
    return [Layer(i, m, fixed[id(r), m], dense, reading.alibi) for i, (r, m) in enumerate(zip(reading.rotaries, methods, strict=True))]


def _measured(name: str, reading: Reading, ours: selfcheck.Run, stock: selfcheck.Stock) -> Exactness:
    """The engine with neutral parameters, at the frequencies the stock forward used, against the stock model."""
    what = "attention" if reading.difference is None else "rotation"
    if reading.dtype in selfcheck.HALVES:
        errors = selfcheck.judge(ours, stock, torch.finfo(reading.dtype).eps / 2)
        rotary, by_layer, passed = errors.layer if reading.difference is None else reading.difference, errors.layer, errors.passed
        dtype = str(reading.dtype).removeprefix("torch.")
        found = Exactness(rotary, errors.logits, what, errors.layer, errors.stock_logits, errors.stock_layer, dtype, stock.without)
    else:
        by_layer = max(relative(a, b) for a, b in zip(ours.outputs, stock.first.outputs, strict=True))
        found = Exactness(by_layer if reading.difference is None else reading.difference, relative(ours.logits, stock.first.logits), what)
        passed = found.logits < 1e-3 and by_layer < 1e-3 and found.rotary < 1e-4  # a fault of one layer may be small in the logits
    if not passed:
        raise Inexact(
            f"with neutral parameters {name} differs from the stock model by {found.logits:.1e} (a layer by {by_layer:.1e}); "
            "its attention does something we do not know, use it without extend()"
        )
    return found
