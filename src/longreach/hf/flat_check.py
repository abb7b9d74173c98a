"""Whether requests may be read together: compared with each of them alone before anybody's are read, and refused where the model's own code mixes them.

Forwards of a few tokens find what could be wrong: beside a request whose hidden states are enormous, which changes everything that is scaled by the largest
value of a tensor; under the method; and at indices far beyond every threshold of the configuration. Knows flat forwards and configurations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from longreach.core.differences import largest
from longreach.hf.cache import place
from longreach.hf.flat import Flat, go_on_from
from longreach.hf.forward import Forward
from longreach.hf.placement import device_of
from longreach.methods.stock import Stock

PORTIONS = (7, 1, 1), (3, 2, 0), (5, 0, 2)  # tokens of every request in each forward: chunks and decoded tokens beside each other
QUIET, LOUD_TOKENS = 11, 12  # together a prime number that no model has heads or experts of
TOLERANCE, HALF = {torch.float32: 1e-4}, 5e-2  # of the largest logit, in fp32 and in half precision
LOUD = 1e6  # times the largest value of the request beside it: of a scale that both share nothing is left for that one, in eight bits of any kind
CHUNK = 64  # tokens that a layer sees in the check at large indices, so that whatever lies before them need not be there
THRESHOLD = re.compile(r"position|scale|window|chunk|seq_len|context|length")


def require_exact(forward: Forward) -> None:
    """Raise where a request that is read beside others would not be what it is alone. A model is looked at once."""
    if forward.flat_checked:
        return
    watch, forward.calls.watch = forward.calls.watch, None  # who watches the model asks about its texts
    try:
        _require_exact(forward)
    finally:
        forward.calls.watch = watch
    forward.flat_checked = True


def _require_exact(forward: Forward) -> None:
    facts = forward.facts
    name = type(facts.base).__name__
    if facts.slot_scales:
        raise ValueError(f"{name} scales queries by the slots of the cache, which several requests would share; read them one by one")
    limit = TOLERANCE.get(facts.reading.entries[0].dtype, HALF)
    if not (off := _beside_loud(forward)) <= limit:
        raise ValueError(
            f"{name} gives other logits to a request beside one with large activations (by {off:.1e}), as a quantisation of activations with one scale for a "
            "whole tensor does; quantise them per token (per row), or read requests one by one"
        )
    if not (off := _beside(forward, (0, 0, 0))) <= limit:
        raise ValueError(f"{name} gives other logits to a request that is read beside others (by {off:.1e}): its code mixes tokens; read requests one by one")
    far = _far(facts.base.config)
    with _forgetful(forward):
        off = _beside(forward, (3 * far, 0, 5 * far + CHUNK))
    if not off <= limit:
        raise ValueError(
            f"{name} gives other logits to a request at index {5 * far} that is read beside others (by {off:.1e}): its code counts the slots of a cache or the "
            "tokens of a forward in place of position_ids; read requests one by one"
        )


def _beside(forward: Forward, starts: Sequence[int]) -> float:
    """Requests that begin at these indices, read in portions beside each other -> the largest difference of their last logits to those of each alone."""
    portions = [_ids(forward, sum(counts), seed).split(list(counts)) for seed, counts in enumerate(PORTIONS)]
    flat = Flat(forward)
    names = [flat.join() for _ in portions]
    if any(starts):
        flat.begin_at(dict(zip(names, starts)))
    found: dict[int, torch.Tensor] = {}
    for together in zip(*portions):
        found |= flat.read({name: ids for name, ids in zip(names, together) if ids.numel()})
    return max(_off(found[name], _alone(forward, own, start)) for name, own, start in zip(names, portions, starts))


def _beside_loud(forward: Forward) -> float:
    """The same forward twice, the second time with enormous hidden states of one request -> how much that changes the logits of the other."""
    quiet, loud = _ids(forward, QUIET, 3), _ids(forward, LOUD_TOKENS, 4)
    flat, found = Flat(forward), []
    for louder in (False, True):
        one, other = flat.join(), flat.join()
        with _loud(forward.facts.model, slice(0, QUIET), slice(QUIET, QUIET + LOUD_TOKENS)) if louder else ExitStack():
            found.append(flat.read({one: quiet, other: loud}, "all")[one])
    return _off(found[1], found[0])


def _ids(forward: Forward, count: int, seed: int) -> torch.Tensor:
    return torch.randint(1, forward.facts.base.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


def _off(found: torch.Tensor, want: torch.Tensor) -> float:
    return largest(found.float() - want.float()) / max(1e-6, largest(want.float()))


@torch.no_grad()
def _alone(forward: Forward, portions: Sequence[torch.Tensor], start: int) -> torch.Tensor:
    """The last logits of ordinary forwards of the same portions, which rounding treats alike, with a cache that has counted `start` tokens."""
    cache, store = place(DynamicCache(), forward.new_store(), forward.calls)
    if start:
        go_on_from(store, [start], start)
    model: Any = forward.facts.model
    for ids in portions:
        if ids.numel():
            logits: torch.Tensor = model(input_ids=ids[None].to(device_of(model)), past_key_values=cache, use_cache=True).logits[0, -1]
    return logits


# -- large indices ------------------------------------------------------------------------------------------------------------------------


def _far(config: Any) -> int:
    """A multiple of CHUNK beyond every length that a configuration speaks of: trained windows, steps of a scaling, sliding windows."""
    return -(-max(CHUNK, *_lengths(config.to_dict())) // CHUNK) * CHUNK


def _lengths(config: Mapping[str, Any]) -> Iterator[int]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _lengths({str(key): own for key, own in value.items()})
        elif isinstance(value, int | float) and not isinstance(value, bool) and THRESHOLD.search(name) and 0 < value < 2**31:
            yield int(value)


@contextmanager
def _forgetful(forward: Forward) -> Iterator[None]:
    """Inside, every layer sees the tokens of a chunk only, so that a sequence may begin at any index and costs no memory; and no context is declared."""
    facts = forward.facts
    layers = tuple(replace(layer, method=Stock(attention_chunk=CHUNK), dense=False) for layer in facts.layers)
    forward.facts = replace(facts, layers=layers, chosen=replace(facts.chosen, context=None, capacity=None))
    try:
        yield
    finally:
        forward.facts = facts


# -- a loud neighbour ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _loud(model: Any, quiet: slice, loud: slice) -> Iterator[None]:
    """Inside, the tokens `loud` of a flat forward come to every module with values LOUD times as large as those of the tokens `quiet`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        given = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(given, torch.Tensor) or not given.is_floating_point():
            return None
        if given.shape[:1] == (loud.stop,):
            axis = 0
        elif given.dim() > 2 and given.shape[:2] == (1, loud.stop):
            axis = 1
        else:
            return None
        turned = given.clone()
        ours, theirs = (turned.narrow(axis, part.start, part.stop - part.start) for part in (quiet, loud))
        size = min(LOUD * largest(ours), torch.finfo(given.dtype).max / 64)
        sane = theirs.nan_to_num(0.0, 1.0, -1.0)  # in half precision the last module may have overflowed
        theirs.copy_(sane / max(1e-6, largest(sane)) * size)
        return ((turned, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": turned})

    with ExitStack() as hooks:
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
