"""What kind of attention each layer was trained with, and what follows from it for a method.

Knows attention calls and modules; not forwards, caches or rotary modules.
"""

from __future__ import annotations

from typing import Any

from longreach import configs
from longreach.engine.batch import Batch
from longreach.hf.rotary import Seen
from longreach.methods.base import Method
from longreach.methods.stock import Stock


def as_trained(config: Any, index: int, seen: Seen) -> Stock:
    """How one layer attends by itself: as its call is told, else as the configuration states for this very layer."""
    if isinstance(window := seen.kwargs.get("sliding_window"), int):
        return Stock(sliding_window=window)
    return Stock() if configs.layer_types(config)[index] is None else configs.trained_layers(config)[index]


def refuse_uncovered(name: str, method: Method, covered: list[int]) -> None:
    """A method needs layers to act on; `Stock` leaves every layer as it is anyway."""
    if not covered and not isinstance(method, Stock):
        raise ValueError(
            f"every layer of {name} attends in chunks or in a window, so no distance grows with the text and {type(method).__name__} has nothing to act "
            "on; use extend(model, Stock())"
        )


def refuse_partly(name: str, method: Method, covered: list[int], layers: int) -> None:
    """Where tokens are renumbered, all layers have to keep the same ones."""
    if method.eviction is not None and len(covered) < layers:
        raise ValueError(
            f"{type(method).__name__} evicts tokens in all layers, and {layers - len(covered)} of the {layers} layers of {name} see only a window or a chunk; "
            "use StreamingLLM or LMInfinite, which forget by place"
        )


def refuse_unrotated(name: str, method: Method) -> None:
    """Other frequencies mean nothing where nothing rotates."""
    if method.rescales:
        raise ValueError(
            f"the full-attention layers of {name} rotate nothing, so {type(method).__name__} would change nothing: its layers that do rotate see a "
            "window or a chunk only and stay as trained; use Stock(), or LMInfinite to bound the memory"
        )


def unrotated_remark(covered: list[int]) -> str:
    layers = "layer" if len(covered) == 1 else "layers"
    return (
        f"no layer that takes the method encodes positions ({layers} {', '.join(map(str, covered))}), so its distances have no effect there; "
        "only what it hides and how it scales queries has. Stock() needs no method at any length"
    )


def slot_scales(modules: list[Any]) -> set[int]:
    """Steps of the query scaling that layers without positions compute from the slots seen, pads included."""
    tuned = (m for m in modules if getattr(m, "attn_temperature_tuning", False) and not getattr(m, "use_rope", True))
    return {int(m.floor_scale) for m in tuned}


def refuse_shifted(steps: set[int], batch: Batch) -> None:
    """Pads move a row's slots away from its indices: refuse as soon as the model would scale a query of it by another step."""
    seen = 0 if batch.store is None else batch.store.seen
    for rows in batch.groups:
        if not steps or (batch.real is None and rows.start == seen):
            continue
        columns = range(batch.columns) if batch.real is None else batch.real[rows.rows.start].nonzero()[:, 0].tolist()
        for index, column in enumerate(columns, rows.start):
            if any((seen + column + 1) // step != (index + 1) // step for step in steps):
                raise ValueError(
                    f"this model scales queries by the number of slots seen, so the pads of row {rows.rows.start} would change its result from token "
                    f"{index} on; run rows of unequal length one by one"
                )
