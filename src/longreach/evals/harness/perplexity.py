"""Perplexity of long texts by the four protocols of the literature, and bits per byte. They measure different things: never mix them in one plot.

    truncated   the first L tokens of every document                          (YaRN's figures)
    sliding     windows of w tokens that advance by s; only new tokens count  (YaRN's script)
    positions   the loss at every position, over documents                    (LM-Infinite)
    streaming   documents one after the other with a carried cache            (LM-Infinite, StreamingLLM)

Knows an extension, or a stock model, and token ids; not tasks, files or pictures. A low perplexity does not imply recall.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from longreach.evals.scores import statistics
from longreach.hf.extension import Extension
from longreach.planning.machine import free_memory
from longreach.quantities import CHUNK_SIZE
from longreach.running import prompts
from longreach.running.reading import stream


@dataclass(frozen=True)
class Document:
    """Token ids, opened by the tokenizer's special tokens, and how many bytes of the text each stands for; None if the tokenizer cannot say."""

    ids: torch.Tensor
    bytes: torch.Tensor | None
    name: str = ""

    def __len__(self) -> int:
        return self.ids.numel()


def document(tokenizer: Any, text: str, name: str = "") -> Document:
    if not prompts.is_fast(tokenizer):
        return Document(torch.tensor(prompts.encode(tokenizer, text)), None, name)
    ids, spans = prompts.encode_with_spans(tokenizer, text)
    sizes, done = [], 0
    for _, end in spans:
        # a character may take several tokens that all end after it: its bytes belong to the first, so that nothing counts twice
        sizes.append(len(text[done:end].encode("utf-8", "surrogatepass")) if end > done else 0)
        done = max(done, end)
    return Document(torch.tensor(ids), torch.tensor(sizes), name)


@dataclass(frozen=True)
class Point:
    """A result at one length: `nll` nats per token, its 95 % interval over documents, and the same as perplexity and bits per byte."""

    length: int
    nll: float
    low: float
    high: float
    documents: int
    tokens: int
    bits_per_byte: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))


@dataclass(frozen=True)
class Curve:
    """The loss by position over documents: mean, variance (of the documents, 0 for one) and count; position p is what p tokens precede."""

    mean: torch.Tensor
    variance: torch.Tensor
    count: torch.Tensor


def losses(model: Extension | Any, ids: torch.Tensor, chunk_size: int = CHUNK_SIZE) -> torch.Tensor:
    """[T] nats, NaN for the first token. `model` is an extension, or a model as it is, which reads in one forward, as a method does
    that allows no cut; all logits exist then at one time. Raises ValueError where they exceed the memory that is free."""
    whole = not isinstance(model, Extension) or model.method.cut is None
    if whole:
        _require_room(model.model if isinstance(model, Extension) else model, ids.numel())
    read = stream(model, ids, chunk_size=max(1, ids.numel()) if whole else chunk_size)
    return torch.cat([chunk.losses for chunk in read if chunk.losses is not None] or [torch.empty(0)])


def _require_room(model: Any, tokens: int) -> None:
    size, free = tokens * model.config.get_text_config().vocab_size * model.dtype.itemsize, free_memory(model.device)
    if free is not None and size > free:
        raise ValueError(
            f"the method reads a text in one forward, and the logits of {tokens} tokens take {size / 2**30:.2f} GiB, where {free / 2**30:.2f} GiB are free; "
            "pass a shorter text, or a method whose result does not depend on how a text is cut"
        )


def positions(
    model: Extension | Any, documents: Sequence[Document], length: int | None = None, chunk_size: int = CHUNK_SIZE
) -> tuple[Curve, list[torch.Tensor]]:
    """P3: the loss at every position up to `length`, over the documents -> (curve, the losses of each document)."""
    each = [losses(model, doc.ids[:length], chunk_size).double() for doc in documents]
    longest = max((len(found) for found in each), default=0)
    if longest < 2:
        raise ValueError("the documents have fewer than 2 tokens, so that there is nothing to predict; pass longer texts")
    table = torch.full((len(each), longest), math.nan, dtype=torch.float64)
    for row, found in zip(table, each):
        row[: len(found)] = found
    count = (~table.isnan()).sum(0)
    mean = table.nanmean(0)
    squares = (table - mean).square().nansum(0)
    variance = torch.where(count > 1, squares / (count - 1).clamp(min=1), 0.0)
    return Curve(mean, variance, count), each


def truncated(documents: Sequence[Document], each: Sequence[torch.Tensor], lengths: Iterable[int]) -> list[Point]:
    """P2 from the losses of `positions`: the mean loss of the first L tokens, averaged over the documents that have so many.

    One pass serves all lengths, because no token sees a later one and a method is fixed for a whole sequence.
    """
    points = []
    for length in sorted(set(lengths)):
        chosen = [(doc, found[:length]) for doc, found in zip(documents, each) if len(found) >= length]
        if not chosen:
            raise ValueError(f"no document has {length} tokens; pass longer texts or shorter lengths")
        points.append(_point(length, chosen))
    return points


def _point(length: int, chosen: list[tuple[Document, torch.Tensor]]) -> Point:
    means = [found.nanmean().item() for _, found in chosen]
    interval = statistics.mean(means)
    tokens = sum(int((~found.isnan()).sum()) for _, found in chosen)
    return Point(length, interval.value, interval.low, interval.high, len(chosen), tokens, bits_per_byte(chosen))


def bits_per_byte(chosen: Iterable[tuple[Document, torch.Tensor]]) -> float | None:
    """What the scored tokens cost, in bits for a byte of their text: comparable between tokenizers."""
    bits = size = 0.0
    for doc, found in chosen:
        if doc.bytes is None:
            return None
        scored = ~found.isnan()
        bits += found[scored].sum().item() / math.log(2)
        size += doc.bytes[: len(found)][scored].sum().item()
    return bits / size if size else None


def sliding(
    model: Extension | Any,
    documents: Sequence[Document],
    window: int,
    stride: int = 256,
    *,
    bos: int | None = None,
    weighting: Literal["token", "window"] = "token",
    chunk_size: int = CHUNK_SIZE,
) -> Point:
    """P1: every window reads at most `window` tokens afresh, the last `stride` of them new; only new ones count.

    bos        a token put before every window, as part of it; the document's own is left out then. Without it the first token of
               a document has no loss.
    weighting  "token" is the mean over tokens; "window" the published script's mean over windows, where the first, which scores all its
               tokens, weighs as much as any other.

    The interval is over documents, or over pieces of one stride where there is only one.
    """
    body = window - (bos is not None)  # tokens of the text in a window
    if not 1 <= stride <= body:
        raise ValueError(f"the stride must be 1 to {body}, the tokens of the text in a window of {window}, not {stride}")
    scored, means = [], []
    for doc in documents:
        own = int(bos is not None and len(doc) > 0 and int(doc.ids[0]) == bos)
        text = Document(doc.ids[own:], None if doc.bytes is None else doc.bytes[own:], doc.name)
        found, of_windows = _slide(model, text.ids, body, stride, bos, chunk_size)
        scored.append((text, found))
        means += of_windows
    if not means:
        raise ValueError("the texts have fewer than 2 tokens, so that there is nothing to predict; pass longer ones")
    every = torch.cat([found[~found.isnan()] for _, found in scored])
    nll = every.mean().item() if weighting == "token" else math.fsum(means) / len(means)
    pieces = [found for _, found in scored] if len(scored) > 1 else list(scored[0][1].split(stride))
    interval = statistics.mean([piece.nanmean().item() for piece in pieces if not piece.isnan().all()])
    return Point(window, nll, min(nll, interval.low), max(nll, interval.high), len(documents), len(every), bits_per_byte(scored))


def _slide(model: Extension | Any, ids: torch.Tensor, body: int, stride: int, bos: int | None, chunk_size: int) -> tuple[torch.Tensor, list[float]]:
    """-> (the loss of every token of a text, the mean of every window)."""
    found, means = torch.full((len(ids),), math.nan, dtype=torch.float64), []
    before = 0
    for end in _ends(len(ids), body, stride):
        begin = max(0, end - body)
        read = ids[begin:end] if bos is None else torch.cat([torch.tensor([bos]), ids[begin:end]])
        last = last_losses(model, read, end - before, chunk_size)
        found[before:end] = last
        if not last.isnan().all():
            means.append(last.nanmean().item())
        before = end
    return found, means


def _ends(length: int, body: int, stride: int) -> Iterator[int]:
    end = min(length, body)
    yield end
    while end < length:
        end = min(length, end + stride)
        yield end


def last_losses(model: Extension | Any, ids: torch.Tensor, count: int, chunk_size: int) -> torch.Tensor:
    """Losses of the last `count` tokens; what comes before them is read without the language-model head."""
    early = len(ids) - count - 1  # the token before the first scored one predicts it
    cut = model.method.cut if isinstance(model, Extension) else None
    early = early // cut * cut if cut else 0
    if early < 1:
        return losses(model, ids, chunk_size)[-count:].double()
    *_, state = stream(model, ids[:early], chunk_size=chunk_size, losses=False)
    late = [chunk.losses for chunk in stream(model, ids[early:], chunk_size=chunk_size, cache=state.cache) if chunk.losses is not None]
    return torch.cat(late)[-count:].double()


@dataclass(frozen=True)
class Stretch:
    """A part of a stream: the tokens up to `end`, their mean loss, and the bytes that keys and values took."""

    end: int
    nll: float
    tokens: int
    store_bytes: int


def streaming(model: Extension | Any, ids: torch.Tensor | Iterable[int], *, every: int = 4096, chunk_size: int = CHUNK_SIZE) -> Iterator[Stretch]:
    """Losses of an endless text, averaged over stretches of `every` tokens. With a bounded method memory does not grow."""
    if every < 1:
        raise ValueError(f"every must be at least 1, not {every}")
    total, count, end, store = 0.0, 0, 0, 0
    for chunk in stream(model, ids, chunk_size=min(chunk_size, every)):
        assert chunk.losses is not None
        for part in _split(chunk.losses.double(), every - end % every, every):
            total, count, end = total + part.nansum().item(), count + int((~part.isnan()).sum()), end + len(part)
            store = chunk.store_bytes
            if end % every == 0:
                yield Stretch(end, total / count if count else math.nan, count, store)
                total, count = 0.0, 0
    if count:
        yield Stretch(end, total / count, count, store)


def _split(values: torch.Tensor, first: int, size: int) -> Iterator[torch.Tensor]:
    """Pieces that end where a stretch ends."""
    yield values[:first]
    yield from values[first:].split(size) if len(values) > first else ()
