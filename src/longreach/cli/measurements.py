"""What `longreach check` measures on a model: how far the engine is from the dense truth, from stock, and from itself.

Knows a model, extensions and random token ids; not gates' wording or terminals. Differences are relative to the largest logit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

import torch

from longreach.evals.exactness import FAST, NEUTRAL, difference
from longreach.methods.base import Method
from longreach.methods.lm_infinite import LMInfinite
from longreach.methods.selfextend import SelfExtend
from longreach.methods.stock import Stock
from longreach.seam.extend import Extension, extend

ITSELF, ROTATION, ROTATION_HALF, HALF_RATIO = 1e-4, 1e-4, 2e-2, 1.5
DECODED = 8  # last tokens that are decoded one by one
SHORTER_BY = 37  # the padded row of the batch; odd, so that no border falls together


@dataclass(frozen=True)
class Measurement:
    """One measured value and its gate; value None where it does not apply, with the reason in `note`."""

    name: str
    value: float | None
    gate: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.value is None or self.value <= self.gate

    def to_json(self) -> dict[str, Any]:
        finite = self.value is not None and isfinite(self.value)
        note = self.note if finite or self.value is None else "not finite"
        return {"name": self.name, "value": self.value if finite else None, "gate": self.gate, "passed": self.passed, "note": note}


def random_ids(model: Any, count: int) -> torch.Tensor:
    known = model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, known, (1, count), generator=torch.Generator().manual_seed(0)).to(device_of(model))


def device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None) -> torch.Tensor:
    """fp32 logits [B, T, V]; stateless without a cache."""
    extra = {} if mask is None else {"attention_mask": mask}
    return torch.as_tensor(model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **extra).logits).float()


@contextmanager
def definition(model: Any) -> Iterator[None]:
    """Stock attention as the model's own code defines it: a fused stock kernel may ignore soft-caps or sinks."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def reaches_beyond_plain(method: Method, tokens: int) -> bool:
    """Whether `tokens` tokens are enough to show more than plain causal attention."""
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    plain = torch.where(j <= i, (i - j).double(), torch.nan)
    return not torch.equal(method.distances(i, j).nan_to_num(-1), plain.nan_to_num(-1))


def subjects(method: Method | None, tokens: int) -> list[Method]:
    """The method itself if it has frequencies of its own or if so few tokens reach into its far zone, else small stand-ins that have every zone."""
    if method is not None and (method.rescales or reaches_beyond_plain(method, tokens)):
        return [method]
    near = max(1, tokens // 6)
    return [SelfExtend(3, near), LMInfinite(near, n_global=min(4, near))]


def rotation(extension: Extension) -> Measurement:
    half = next(extension.model.parameters()).dtype != torch.float32
    return Measurement(f"our {extension.exactness.what} against the model's own, all layers", extension.exactness.rotary, ROTATION_HALF if half else ROTATION)


def half_precision(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the stock model and of the engine with neutral parameters in the model's own half precision."""
    stock = logits(model, ids)
    with extend(model, Stock()):
        return stock, logits(model, ids)


def half_ratio(stock: torch.Tensor, ours: torch.Tensor, truth: torch.Tensor) -> Measurement:
    """Our root-mean-square error against the fp32 stock run, as a multiple of the one that stock itself has."""
    errors = [(x - truth).square().mean().sqrt().item() for x in (stock, ours)]
    value = errors[1] / max(errors[0], 1e-30)
    return Measurement("half precision: our error against fp32 stock, as a multiple of stock's own", value, HALF_RATIO)


def neutral(model: Any, ids: torch.Tensor) -> list[Measurement]:
    with definition(model):
        before = logits(model, ids)
        with extend(model, Stock()):
            ours = logits(model, ids)
        after = logits(model, ids)
    return [
        Measurement(f"neutral parameters against stock, {ids.shape[1]} tokens", difference(ours, before), NEUTRAL),
        Measurement("model after remove() against before (bit-identical)", 0.0 if torch.equal(before, after) else difference(after, before) or 1.0, 0.0),
    ]


def consistency(model: Any, method: Method, ids: torch.Tensor, context: int | None = None) -> list[Measurement]:
    """Fast against dense; decode, chunks and padding against one forward. `context` matters where frequencies depend on it."""
    declared = max(context or 0, ids.shape[1]) if method.needs_context else None
    with extend(model, method, context=declared, backend="reference"):
        dense = logits(model, ids)
    with extend(model, method, context=declared):
        fast = logits(model, ids)
        found = [Measurement(f"fast path against the dense truth, {ids.shape[1]} tokens", difference(fast, dense), FAST)]
        if method.chunk_invariant:
            found += [decode(model, ids, fast), chunks(model, ids, fast)]
        else:
            found += [Measurement(name, None, ITSELF, "this method depends on how a prompt is cut") for name in (DECODE, CHUNKS)]
        found.append(padding(model, ids, fast))
    return found


DECODE, CHUNKS, PADDING = "decoding token by token against one forward", "chunked prefill against one forward", "left-padded batch against single rows"


def decode(model: Any, ids: torch.Tensor, whole: torch.Tensor) -> Measurement:
    from transformers import DynamicCache

    cache, before = DynamicCache(), ids.shape[1] - DECODED
    logits(model, ids[:, :before], cache=cache)
    last = torch.cat([logits(model, ids[:, t : t + 1], cache=cache) for t in range(before, ids.shape[1])], dim=1)
    return Measurement(DECODE, difference(last, whole[:, before:]), ITSELF)


def chunks(model: Any, ids: torch.Tensor, whole: torch.Tensor) -> Measurement:
    from transformers import DynamicCache

    cache, n = DynamicCache(), ids.shape[1]
    cuts = [0, 7, n // 3, n // 3 + 1, n]
    parts = [logits(model, ids[:, a:b], cache=cache) for a, b in pairwise(cuts)]
    return Measurement(CHUNKS, difference(torch.cat(parts, dim=1), whole), ITSELF)


def padding(model: Any, ids: torch.Tensor, whole: torch.Tensor) -> Measurement:
    """Two rows, the second SHORTER_BY tokens shorter and filled up on the left."""
    pads = min(SHORTER_BY, ids.shape[1] // 2)
    short = ids[:, pads:]
    batch = torch.cat([ids, torch.cat([torch.zeros_like(ids[:, :pads]), short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :pads] = 0
    both = logits(model, batch, mask)
    worst = max(difference(both[:1], whole), difference(both[1:, pads:], logits(model, short)))
    return Measurement(PADDING, worst, ITSELF)
