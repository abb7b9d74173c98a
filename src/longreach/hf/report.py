"""What is attached to a model, as plain data and in words. Knows facts and memories; not how they came about."""

from __future__ import annotations

from typing import Any

from longreach.hf import frequencies
from longreach.hf.facts import Facts
from longreach.hf.placement import device_of
from longreach.kernels import kernel_for
from longreach.memory import pooled
from longreach.memory.pooled import Tiers
from longreach.methods.stock import Stock
from longreach.planning import dial
from longreach.quantities import counted


def report(facts: Facts, memory: Any) -> dict[str, Any]:
    """What was attached, as plain data."""
    reading, layers, chosen = facts.reading, facts.layers, facts.chosen
    method = chosen.method
    weight = facts.model.get_input_embeddings().weight
    dtype = weight.dtype if weight.is_floating_point() else reading.entries[0].dtype
    ours = facts.covered
    rescaled = [i for i in ours if method.rescales and reading.rotaries[i] is not None]
    before, after = (reading.rotaries[rescaled[0]], layers[rescaled[0]].rotary) if rescaled else (None, None)
    others = [layer for layer in layers if layer.index not in ours]
    return {
        "method": method.to_json(),
        "frequencies": None if before is None or after is None else frequencies.change(before, after),
        "context": chosen.context,
        "capacity": chosen.capacity,
        "trained_window": chosen.window.tokens,
        "trained_window_reason": chosen.window.reason,
        "reason": chosen.choice.reason if chosen.choice else "given",
        "profile": _origin(chosen.choice),
        "warning": facts.remark,
        "offer": chosen.choice.offer if chosen.choice else None,
        "recalls": method.sees,
        "layers": len(layers),
        "layers_with_method": ours,
        "encoding": "rotary" if reading.alibi is None else "alibi",
        "layers_in_chunks": [layer.index for layer in others if isinstance(layer.method, Stock) and layer.method.attention_chunk],
        "layers_without_positions": [i for i, r in enumerate(reading.rotaries) if r is None and reading.alibi is None],
        "sliding_window_overridden": reading.trained[0].sliding_window is not None and 0 in ours and not isinstance(method, Stock),
        "backend": "dense reference" if layers[0].dense else kernel_for(device_of(facts.model), dtype).name,
        "dtype": str(dtype).removeprefix("torch."),
        "memory": memory.report() if isinstance(memory, Tiers) else None,
        "exactness": {name: getattr(facts.exactness, name) for name in ("rotary", "logits", "layers", "stock_logits", "stock_layers")},
    }


def describe(facts: Facts, memory: Any) -> str:
    """Method, parameters, layers, capacity, backend and measured exactness, in words."""
    r, reading, chosen = report(facts, memory), facts.reading, facts.chosen
    ours = r["layers_with_method"]
    others = "sliding" if not r["layers_in_chunks"] else "chunked" if len(ours) + len(r["layers_in_chunks"]) == r["layers"] else "sliding and chunked"
    layers = f"all {r['layers']}" if len(ours) == r["layers"] else f"{len(ours)} of {r['layers']} ({ours}); the {others} ones as trained"
    if r["sliding_window_overridden"]:
        layers += f"; their sliding window of {reading.trained[0].sliding_window} is replaced by the method"
    if r["layers_without_positions"]:
        layers += f"; layers without positions: {r['layers_without_positions']}"
    lines = [
        f"method      {chosen.method}",
        f"recalls     {r['recalls']}",
        f"window      {chosen.window.tokens} trained ({chosen.window.reason})",
        f"context     {'not declared' if chosen.context is None else counted(chosen.context, 'token') + ' declared'}",
        f"capacity    {'unlimited' if chosen.capacity is None else counted(chosen.capacity, 'token')}",
        f"layers      {layers}",
        f"backend     {r['backend']}, {r['dtype']}",
        f"exactness   {facts.exactness}",
        f"reason      {r['reason']}",
    ]
    if r["frequencies"]:
        fastest, slowest = r["frequencies"]["divided_by"]
        factor = r["frequencies"]["attention_factor"]
        lines.insert(2, f"frequencies divided by {fastest:.4g} (fastest pair) to {slowest:.4g} (slowest pair), cos and sin times {factor:.5g}")
    if reading.alibi is not None:
        lines.insert(2, f"encoding    ALiBi, slopes from {reading.alibi.slopes.max():.4g} to {reading.alibi.slopes.min():.4g}")
    if r["memory"]:
        lines += [f"{name:12}{line}" for name, line in zip(("memory", *[""] * 9), pooled.said(r["memory"]))]
    if r["offer"]:
        lines.append(f"offer       {r['offer']}")
    if r["warning"]:
        lines.append(f"warning     {r['warning']}")
    return "\n".join(lines)


def _origin(choice: dial.Choice | None) -> dict[str, Any] | None:
    """The profile that a method is from, as plain data; None: no profile chose it."""
    if choice is None or choice.profile is None:
        return None
    profile, entry = choice.profile, choice.profile.choose(choice.context)
    assert entry is not None
    return {"source": profile.source, "model": profile.model, "fingerprint": profile.fingerprint, "context": entry.context, "date": entry.date}
