"""Summaries of blocks of keys, made once when a block is complete: of its keys, and where an index needs them of its queries, values and masses.

A mass is what the queries that are near enough have paid to a key: their final probabilities. The log-sum-exp of each is kept until the last of them has
come, and the sums are formed then in one pass, so that they are a function of the sequence, however it was read, cropped or forked.
"""

from __future__ import annotations

from typing import Any

import torch

from longreach.core.choice import OfQueries
from longreach.core.encodings import exact_device
from longreach.core.segments import Chunked, Summary
from longreach.engine.batch import Batch, Rows
from longreach.engine.layer import LSE, QUERY, Inputs, Layer
from longreach.kernels import mass
from longreach.kernels.biased import Bias
from longreach.kernels.tiles import Band
from longreach.memory.layer import Shown, joined


def summarise(layer: Layer, batch: Batch, memory: Shown, rows: slice, start: int, stop: int, inputs: Inputs) -> None:
    """What is to be kept of the blocks that the tokens start .. stop have completed."""
    made: dict[Summary | OfQueries, torch.Tensor] = {}
    for form, kept in layer.summaries.items():
        before, now = kept.entries(start), kept.entries(stop)
        if before < now:
            a, b, shape = form.first + before * form.block, form.first + now * form.block, (now - before, form.block)
            k, given = memory.keys_of(layer.form_of(form.positions), rows, a, b), {}  # by name, beside the keys
            if "v" in form.index.needs:
                given["v"] = joined(memory.view(layer.form_of(form.positions), rows, a, b, False), rows.stop - rows.start).v
            if "q" in form.index.needs:
                given["q"] = memory.summaries(QUERY, rows, b, a)
            if form.index.frame == "block":
                place = Chunked(form.block, shift=-form.first % form.block)  # of an index in its block, which begins with `first`
                k = batch.turned(k, layer.rest, place, a, b - a)
                given |= {name: batch.turned(x, layer.rotary, place, a, b - a) for name, x in given.items() if name == "q"}
            if form.index.mass:
                given["mass"] = masses(layer, batch, memory, rows, form, k, a, inputs)
            found: dict[str, Any] = {name: x.unflatten(2, shape) for name, x in given.items()}
            if "q" in form.index.needs:
                found["scale"] = inputs.scale
            made[form] = form.index.summarise(k.unflatten(2, shape), **found)
    if made:
        memory.append_summaries(rows, start, made)


def masses(layer: Layer, batch: Batch, memory: Shown, rows: slice, form: Summary, k: torch.Tensor, first: int, inputs: Inputs) -> torch.Tensor:
    """k [n, G, T, D] at position 0, from token `first` on -> what was paid to them [n, H, T] fp32."""
    count, reach = k.shape[2], form.index.mass
    asking = count + reach - 1
    q, lse = (memory.summaries(of, rows, first + asking, first) for of in (QUERY, LSE))
    total = torch.zeros(*q.shape[:2], count, device=q.device)
    for segment, high in layer.layout.paying(reach):
        scale = None if segment.query_scale is None else batch.scale(segment.query_scale, first, asking, q.device)
        turned = batch.turned(q, layer.rotary, segment.query_positions, first, asking, scale)
        keys = batch.turned(k, layer.rest, segment.key_positions, first, count)
        bias = None
        if layer.alibi is not None:
            exact = exact_device(q.device)
            at = torch.arange(first, first + asking, device=exact)
            bias = Bias(layer.alibi.on(exact), segment.query_positions(at), segment.key_positions(at[:count]), q.device)
        total += mass.paid(turned, keys, lse[..., 0] - segment.lse_bias, Band(0, segment.visible.low, high), inputs.scale, inputs.softcap, bias)
    return total


def paying(rows: Rows, lse: torch.Tensor) -> torch.Tensor:
    """lse [n, H, T] of some queries -> what is kept of it, [n, H, T, 1] fp32. Queries from which a mask hides keys pay nothing to any, now or later."""
    lse = lse.float()[..., None]
    return torch.full_like(lse, float("inf")) if rows.hidden else lse
