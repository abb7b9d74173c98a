"""Reading a text of any length in chunks: the loss of every token, or only the state at the end.

Knows an extension (or a stock model, to compare with) and token ids. With a bounded method (LM-Infinite) memory is constant however long the text is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from longreach.hf.cache import cache_bytes
from longreach.hf.checks import require_in_force
from longreach.hf.extension import Extension
from longreach.hf.placement import device_of
from longreach.quantities import CHUNK_SIZE
from longreach.running.resuming import Kept, with_end


@dataclass(frozen=True)
class Chunk:
    """What one chunk of the stream gave.

    start        index of its first token in the stream.
    losses       [n] fp32 on the CPU, nats: -log p(token | all tokens before it). The very first token of a stream has NaN, nothing
                 precedes it. None if losses were not asked for.
    cache        the state after the chunk: hand it to `model.generate(..., past_key_values=cache)` to go on from here.
    store_bytes  bytes allocated for keys and values.
    """

    start: int
    losses: torch.Tensor | None
    cache: Any
    store_bytes: int


def stream(
    extension: Extension | Any,
    ids: torch.Tensor | Iterable[int],
    *,
    chunk_size: int = CHUNK_SIZE,
    losses: bool = True,
    cache: Any = None,
    resume: str | Path | Kept | None = None,
) -> Iterator[Chunk]:
    """Feed `ids` (one sequence: a 1-D tensor or any iterable of ints, endless ones too) in chunks; yields a `Chunk` after each.

    extension   what `extend` returned; or a model without an extension, which reads as stock Transformers does.
    chunk_size  tokens of one forward, >= 1. Results do not depend on it, unless the method allows no cut (`Method.cut`); where it allows few,
                chunks begin there, and the last one is longer rather than too short. Under a method that evicts, the text is read in turns (`Eviction.turn`).
    losses      False skips the language-model head except for the last token of a chunk.
    cache       the `cache` of an earlier chunk, to go on where it ended (its last token's successor has no loss then: NaN).
    resume      a folder to keep what is read, which costs a twentieth of the time at most. If it holds the beginning of this text already, read under the same
                model, method and declared context, the first chunk is what follows. The last chunk is never kept, so the same text always has one left;
                a shorter one that ends where the folder does has none.

    Raises ValueError if ids are no whole numbers, if the method's capacity is passed (stream with a bounded method such as LMInfinite), if the model gives a
    loss that is not finite, or if a folder to resume holds something else or is damaged.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, not {chunk_size}")
    if isinstance(ids, torch.Tensor):
        if ids.dim() == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.dim() != 1:
            raise ValueError(f"a stream is one sequence: pass a 1-D tensor of token ids, not one of shape {list(ids.shape)}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"token ids are whole numbers, not {ids.dtype}; pass ids.long()")
        ids = ids.long()
    if isinstance(extension, Extension):
        require_in_force(extension)
    model = extension.model if isinstance(extension, Extension) else extension
    device = device_of(model)
    last: torch.Tensor | None = None  # logits [V] that predict the next chunk's first token
    kept = None
    if resume is not None:
        if cache is not None or not isinstance(extension, Extension):
            raise ValueError("a text is resumed under an extension and from a folder alone; pass what extend() returned, and leave out cache")
        kept = resume if isinstance(resume, Kept) else Kept(extension, resume)
        cache, last, ids = kept.cache, kept.last, kept.rest(ids)
    cache = DynamicCache() if cache is None else cache
    start = cache.get_seq_length()
    cut = extension.method.cut or 1 if isinstance(extension, Extension) else 1
    if isinstance(extension, Extension) and extension.method.eviction is not None:
        tokens = _turns(extension, cache, ids, chunk_size)
    else:
        tokens = _chunks(ids, max(cut, chunk_size // cut * cut), cut, -start % cut)
    for chunk, ends in zip(tokens, itertools.repeat(False)) if kept is None else with_end(tokens):
        if kept is not None:
            kept.before(chunk, start, last, ends)
        chunk = chunk.to(device)
        with torch.no_grad():
            logits = model(input_ids=chunk[None], past_key_values=cache, use_cache=True, logits_to_keep=0 if losses else 1).logits[0]
        found = None
        if losses:
            found = torch.full((chunk.numel(),), float("nan"))
            if kept is not None and last is not None and last.shape != logits[-1].shape:
                raise kept.forged()
            if last is not None:
                found[:1] = _losses(last[None].to(device), chunk[:1])
            found[1:] = _losses(logits[:-1], chunk[1:])
            require_finite(found if last is not None else found[1:], start + (last is None))
        last = logits[-1].clone()
        yield Chunk(start, found, cache, cache_bytes(cache))
        start += chunk.numel()


def _losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[T] nats on the CPU. In float32 a part at a time, for the logits of a whole text may be gigabytes."""
    parts = zip(logits.split(CHUNK_SIZE), tokens.split(CHUNK_SIZE))
    return torch.cat([F.cross_entropy(part.float(), following, reduction="none").cpu() for part, following in parts])


def require_finite(losses: torch.Tensor, start: int = 0) -> None:
    """NaN says "nothing precedes it" in what `stream` yields, so what a model has made of a token must not be NaN. `start`: index of the first."""
    if bool((wrong := ~losses.isfinite()).any()):
        index = start + int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"the model gives NaN or infinity for token {index}, so there is no loss to report; load it in another dtype (float32, or bfloat16 where float16 "
            "overflows), or check its weights"
        )


def _chunks(ids: torch.Tensor | Iterable[int], size: int, least: int, more: int) -> Iterator[torch.Tensor]:
    """Parts of `size` tokens, the first of them `more` longer; what is left at the end goes with the part before it where it is shorter than `least`."""
    before: torch.Tensor | None = None
    for part in _parts(ids, size, more):
        if least == 1:
            yield part
        elif before is None:
            before = part
        elif len(part) < least:
            before = torch.cat([before, part])
        else:
            yield before
            before = part
    if before is not None:
        yield before


def _turns(extension: Extension, cache: Any, ids: torch.Tensor | Iterable[int], size: int) -> Iterator[torch.Tensor]:
    """Parts of `size` tokens of turns that are as long as the method has them. Each is announced before its first token is read."""
    assert extension.method.eviction is not None
    for turn in _parts(ids, extension.method.eviction.turn, 0):
        extension.turn(cache, turn.numel())
        yield from turn.split(size)


def _parts(ids: torch.Tensor | Iterable[int], size: int, more: int) -> Iterator[torch.Tensor]:
    if isinstance(ids, torch.Tensor):
        yield from (part for part in (ids[: size + more], *ids[size + more :].split(size)) if part.numel())
        return
    iterator = iter(ids)
    while part := list(islice(iterator, size + more)):
        yield torch.tensor(part, dtype=torch.long)
        more = 0
