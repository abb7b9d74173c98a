"""What `longreach check` measures on a model: how far the engine is from the dense truth, from stock, and from itself.

Knows a model, extensions and texts; not gates' wording or terminals. Differences are relative to the largest logit. What is measured is real text, in
several places of a book: on random ids a trained model is in states that no text brings about, where rounding decides what no text lets it decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from typing import Any

import torch

from longreach.checking.exactness import FAST, NEUTRAL
from longreach.core.differences import TINY
from longreach.core.differences import relative as difference
from longreach.hf import selfcheck
from longreach.hf.extension import Extension, extend
from longreach.hf.placement import device_of, ordinary
from longreach.memory.budgets import Tiered
from longreach.methods.base import Method
from longreach.methods.lm_infinite import LMInfinite
from longreach.methods.selfextend import SelfExtend
from longreach.methods.stock import Stock
from longreach.running.loading import shipped_book

ITSELF, ROTATION, ROTATION_HALF, HALF_RATIO = 1e-4, 1e-4, 2e-2, selfcheck.RATIO
TEXTS = 4  # places of the book
CHARACTERS = 8  # of the book for a token, to begin with
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
        note = self.note if finite or self.value is None else self.note or "not finite"
        return {"name": self.name, "value": self.value if finite else None, "gate": self.gate, "passed": self.passed, "note": note}


def texts(model: Any, tokenizer: Any, count: int) -> torch.Tensor:
    """[TEXTS, count] the tokens of as many places of the shipped book, each beginning as the tokenizer begins a text."""
    book, rows = shipped_book(), []
    for number in range(TEXTS):
        start, length = len(book) * number // TEXTS, CHARACTERS * count
        while len(ids := tokenizer(book[start : start + length])["input_ids"]) < count:
            length *= 2
            if start + length > len(book):
                raise ValueError(f"the tokenizer makes {len(ids)} tokens of a quarter of a book, and {count} are to be measured; pass fewer --tokens")
        rows.append(ids[:count])
    return torch.tensor(rows).to(device_of(model))


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, cache: Any = None) -> torch.Tensor:
    """fp32 logits [B, T, V]; stateless without a cache."""
    extra = {} if mask is None else {"attention_mask": mask}
    return torch.as_tensor(model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **extra).logits).float()


@contextmanager
def implementation(model: Any, name: str) -> Iterator[None]:
    """Stock attention with one of its kernels."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def definition(model: Any) -> AbstractContextManager[None]:
    """Stock attention as the model's own code defines it: a fused stock kernel may ignore soft-caps or sinks."""
    return implementation(model, "eager")


def reaches_beyond_plain(method: Method, tokens: int) -> bool:
    """Whether `tokens` tokens are enough to show more than plain causal attention: other distances, or fewer keys for a token that chooses."""
    if method.choice is not None and method.choice.shown(tokens) < tokens:
        return True
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


def require_ordinary(model: Any) -> None:
    if not ordinary(model):
        raise ValueError(
            "the weights of this model are quantised or kept elsewhere, so there is no fp32 to measure against; check the model it was made from, or read "
            "the measured exactness of this one in extend(model, ...).describe()"
        )


def half_precision(model: Any, ids: torch.Tensor) -> Measurement:
    """Root-mean-square error of neutral parameters in the model's own half precision against stock in fp32, over that of the better stock kernel."""
    kernels = ["sdpa", "eager"] if getattr(model, "_supports_sdpa", False) else ["eager"]
    squares = dict.fromkeys(["ours", *kernels], 0.0)
    for row in ids.split(1):  # logits of a large vocabulary are large
        with definition(model), selfcheck.in_fp32(model):
            truth = logits(model, row)
        for name in kernels:
            with implementation(model, name):
                squares[name] += square(logits(model, row) - truth)
        with extend(model, Stock()):
            squares["ours"] += square(logits(model, row) - truth)
    stock, best = min((squares[name] if isfinite(squares[name]) else inf, name) for name in kernels)
    name = "half precision: our error against fp32 stock, as a multiple of the better stock kernel's"
    if stock == inf:
        return Measurement(name, inf, HALF_RATIO, f"stock itself is NaN or infinite in {next(model.parameters()).dtype}")
    return Measurement(f"{name} ({best})", (squares["ours"] / max(stock, TINY)) ** 0.5, HALF_RATIO)


def square(x: torch.Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64 if x.device.type != "mps" else None).item())


def neutral(model: Any, ids: torch.Tensor) -> list[Measurement]:
    """Of all texts the worst."""
    worst, same, moved = 0.0, True, 0.0
    for row in ids.split(1):
        with definition(model):
            before = logits(model, row)
            with extend(model, Stock()):
                ours = logits(model, row)
            after = logits(model, row)
        worst, same, moved = max(worst, difference(ours, before)), same and torch.equal(before, after), max(moved, difference(after, before))
    return [
        Measurement(f"neutral parameters against stock, {len(ids)} texts of {ids.shape[1]} tokens", worst, NEUTRAL),
        Measurement("model after remove() against before (bit-identical)", 0.0 if same else moved or 1.0, 0.0),
    ]


def consistency(model: Any, method: Method, ids: torch.Tensor, context: int | None = None, memory: Tiered | None = None) -> list[Measurement]:
    """Fast against dense; decode, chunks and padding against one forward. `context` matters where frequencies depend on it, `memory` is of the fast path."""
    declared = max(context or 0, ids.shape[1]) if method.needs_context else None
    with extend(model, method, context=declared, backend="reference"):
        dense = logits(model, ids)
        stepped = None if method.cut == 1 else decoded(model, ids)
    with extend(model, method, context=declared, memory=memory):
        fast = logits(model, ids)
        found = [Measurement(f"fast path against the dense truth, {ids.shape[1]} tokens", difference(fast, dense), FAST)]
        if method.cut == 1:
            found += [decode(model, ids, fast), chunks(model, ids, fast)]
        else:
            assert stepped is not None
            found.append(Measurement(f"{DECODE_DENSE}, {DECODED} tokens", difference(decoded(model, ids), stepped), FAST))
            found.append(Measurement(CHUNKS, None, ITSELF, "this method depends on how a prompt is cut"))
        found.append(padding(model, ids, fast))
    return found


def kept(model: Any, method: Method, ids: torch.Tensor, context: int | None, memory: Tiered) -> Any:
    """What lies where when the tokens have been read, the last of them one by one, and what was fetched for that: `report()["memory"]`."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with extend(model, method, context=max(context or 0, ids.shape[1]) if method.needs_context else None, memory=memory) as extension:
        decoded(model, ids, cache)
        return extension.report()["memory"]


DECODE_DENSE = "decoding against the dense truth, cut in the same way"
DECODE, CHUNKS, PADDING = "decoding token by token against one forward", "chunked prefill against one forward", "left-padded batch against single rows"


def decode(model: Any, ids: torch.Tensor, whole: torch.Tensor) -> Measurement:
    return Measurement(DECODE, difference(decoded(model, ids), whole[:, ids.shape[1] - DECODED :]), ITSELF)


def decoded(model: Any, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    """Logits of the last tokens, read one by one after all others in one forward."""
    from transformers import DynamicCache

    cache, before = DynamicCache() if cache is None else cache, ids.shape[1] - DECODED
    logits(model, ids[:, :before], cache=cache)
    return torch.cat([logits(model, ids[:, t : t + 1], cache=cache) for t in range(before, ids.shape[1])], dim=1)


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
