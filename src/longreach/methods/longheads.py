"""LongHeads (Lu et al., 2024, arXiv 2402.10685): every head reads few chunks of its own choice, renumbered to follow each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from longreach.core.choice import Choice, Index, Past, stretches
from longreach.core.dense import Dense
from longreach.core.segments import Chunked, Identity, Layout, Rank, Segment, Visible
from longreach.kernels.products import products
from longreach.methods.base import Method, hidden_to_nan, require, require_integer


@dataclass(frozen=True)
class Pooled(Index):
    """For every query head one mean of the keys of a chunk, weighted by what the chunk's mean output asks for."""

    chunks: int  # that are chosen, the first and the last among them

    width: ClassVar[int] = 1
    each: ClassVar[Literal["group", "head"]] = "head"
    frame: ClassVar[Literal["segment", "raw", "block"]] = "block"
    needs: ClassVar[tuple[Literal["q", "v"], ...]] = ("q", "v")

    def require_widths(self, key: int, value: int) -> None:
        require(key == value, f"LongHeads compares keys of {key} dims with an output of {value}; use a method that compares keys only, such as InfLLM")

    def summarise(self, k: torch.Tensor, *args: Any, q: torch.Tensor, v: torch.Tensor, scale: float, **kwargs: Any) -> torch.Tensor:
        asking = q.unflatten(1, (k.shape[1], -1)).float()  # [R, G, g, N, chunk, D]
        keys, values = (x[:, :, None].float() for x in (k, v))
        out = torch.softmax(asking @ keys.transpose(-1, -2) * scale, -1).mean(-2, keepdim=True) @ values  # the mean of the rows of the output
        pooled = torch.softmax(out @ keys.transpose(-1, -2) * scale, -1) @ keys
        return pooled[..., 0, :].to(k.dtype).transpose(2, 3).flatten(3)  # [R, G, N, g D]

    def choose(self, q: torch.Tensor, past: Past) -> torch.Tensor:
        keys = past.compared.unflatten(3, (-1, q.shape[3])).transpose(2, 3).flatten(1, 2)  # [R, H, N, D]
        mean = q.float().unflatten(2, (past.candidates.shape[1], -1)).mean(3).to(q.dtype)  # of those that choose together
        number = torch.arange(keys.shape[2], device=q.device)
        last = past.candidates.long().cumsum(-1).argmax(-1, keepdim=True)
        always = past.candidates & ((number == 0) | (number == last))
        scores = products(mean, keys).float().masked_fill(~past.candidates[:, None], -torch.inf).masked_fill(always[:, None], torch.inf)
        best = scores.topk(min(self.chunks, len(number)))
        return best.indices.masked_fill(best.values.isneginf(), -1)


@dataclass(frozen=True)
class LongHeads(Method):
    """Plain attention for the first tokens; a later one attends, in each head, to few chunks as if they were all of the text. All keys are kept.

        seen by query i >= begin:   its own chunk c = floor(i / chunk) up to itself, chunks 0 and c - 1, and of the others the attended / chunk - 3 with the
                                    largest  q . representation  (query un-rotated)
        positions:                  chosen keys 0, 1, 2, ... in their order; the query is at attended - chunk + (i mod chunk), which is the last of them
        representation:             softmax(o k^T scale) k,  o = mean over the chunk of softmax(q k^T scale) v  without causality, q and k at positions that
                                    begin with 0 in the chunk

    No distance is longer than `attended`. The authors' first setting, attended = begin = the trained window, is reported to end in gibberish; half of it
    works. The official code hides a query of a prompt from itself, and forgets to force chunk c - 1 where a decoded token completes a chunk; here every query
    sees itself and both. It fails where a prompt ends before `begin` and its answer goes beyond, which works here. Of grouped heads, each query head chooses.

    attended    keys that a head reads at most, a multiple of chunk and at least 3 of them.
    begin       first queries, which attend to all before them; at least attended - chunk; None is attended.
    chunk       tokens of a chunk; the paper uses 256.
    together    queries of a prompt that choose together by their mean, as those of a block of so many do. 1 is the paper's; more is faster and no longer the
                paper's, and a prompt may then be cut at multiples of it only.

    Raises ValueError for parameters out of range, and where keys and values differ in width.
    """

    attended: int = field(metadata={"help": "keys that a head reads"})
    begin: int | None = field(default=None, metadata={"help": "first queries, which attend to all; attended if not given"})
    chunk: int = field(default=256, metadata={"help": "tokens of a chunk"})
    together: int = field(default=1, metadata={"help": "queries of a prompt that choose together (1 is the paper's)"})

    name: ClassVar[str] = "longheads"
    paper: ClassVar[str] = "arXiv 2402.10685"
    recalls: ClassVar[str] = "the chunks that each head chooses, the first and the latest among them"
    evidence: ClassVar[str] = "on nano at 8 windows it found 3 of 10 pass keys, 4 of 10 with twice the keys, where YaRN(8.0) found all"

    def __post_init__(self) -> None:
        for name in ("attended", "chunk", "together"):
            require_integer(name, getattr(self, name), 1)
        require(
            self.attended % self.chunk == 0 and self.attended >= 3 * self.chunk,
            f"attended must be a multiple of chunk ({self.chunk}), at least 3 of them, not {self.attended}; the first, the last and its own are always read",
        )
        if self.begin is not None:
            require_integer("begin", self.begin, 1)
            least = self.attended - self.chunk
            require(self.begin >= least, f"begin must be at least attended - chunk ({least}), not {self.begin}; earlier queries have too few chunks")
        require(self.chunk % self.together == 0, f"chunk ({self.chunk}) must be a multiple of together ({self.together}); queries of one chunk choose together")

    @classmethod
    def recommended(cls, window: int, context: int) -> LongHeads:
        """Half of the trained window in eight chunks, as the authors' working setting has it."""
        chunk = max(1, min(256, window // 16))
        return cls(max(3, window // 2 // chunk) * chunk, chunk=chunk)

    @property
    def dense(self) -> int:
        """Queries that attend to all."""
        return self.attended if self.begin is None else self.begin

    def layout(self, layer: int = 0) -> Layout:
        chunks = self.attended // self.chunk
        choice = Choice(Pooled(chunks - 1), chunks, self.chunk, "head", queries=self.together, lag=1)
        return Layout((
            Segment(Identity(), Identity(), Visible(last_query=self.dense)),
            Segment(Chunked(self.chunk, shift=self.attended - self.chunk), Rank(), Visible(first_query=self.dense), choice=choice),
        ))  # fmt: skip

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Of a chunk in the middle, the largest that it can be."""
        last = self.attended - self.chunk + i % self.chunk  # where the query is
        return hidden_to_nan(torch.where(i < self.dense, i - j, torch.minimum(i - j, last - j.clamp(max=self.chunk))), j <= i)

    def truth(self, dense: Dense) -> torch.Tensor:
        i, j, size = dense.i, dense.j, self.chunk
        first, count = int(i[0]), j.shape[1]
        seen, q = dense.seen.expand(len(dense.q), 1, len(i), count), torch.cat([*dense.earlier[:1], dense.q], 2)
        found = (i - j).double().masked_fill((i < j) | (i >= self.dense), torch.nan).repeat(*q.shape[:2], 1, 1)
        represented = [self._representation(dense, q, n) for n in range(count // size)]
        for start, stop in stretches(max(first, self.dense), count, self.together):
            own = start // size
            visible = seen[:, :, start - first, : own * size].unflatten(2, (own, size)).any(-1)  # [B, 1, chunks]; a mask may hide all of one
            number = torch.arange(own, device=q.device)
            score = torch.stack([(q[:, :, start:stop].mean(2) * represented[n]).sum(-1) for n in range(own)], -1)
            always = (number == 0) | (number == number.where(visible, -1).amax(-1, keepdim=True))
            score = score.masked_fill(always, torch.inf).masked_fill(~visible, -torch.inf)
            chosen = (score.argsort(-1, descending=True).argsort(-1) < self.attended // size - 1) & visible
            shown = chosen.repeat_interleave(size, 2)
            shown = torch.cat([shown, shown.new_ones(*shown.shape[:2], stop - own * size)], 2) & seen[:, :, stop - 1 - first, :stop]
            place = (shown.cumsum(-1) - 1)[:, :, None]
            at = (self.attended - size + i[start - first : stop - first] % size - place).double()
            found[:, :, start - first : stop - first, :stop] = at.masked_fill(~shown[:, :, None] | (j[:, :stop] > i[start - first : stop - first]), torch.nan)
        return found

    def _representation(self, dense: Dense, q: torch.Tensor, number: int) -> torch.Tensor:
        """[B, H, D] of a chunk; q of all tokens."""
        assert dense.v is not None
        part, place = slice(number * self.chunk, (number + 1) * self.chunk), torch.arange(self.chunk, device=q.device)
        q, k = dense.turned(q[:, :, part], place), dense.turned(dense.k[:, :, part], place)
        out = (torch.softmax(q @ k.transpose(-1, -2) * dense.scale, -1) @ dense.v[:, :, part]).mean(2, keepdim=True)
        return (torch.softmax(out @ k.transpose(-1, -2) * dense.scale, -1) @ k)[:, :, 0]

    def capacity(self, window: int) -> int | None:
        """Unlimited if no distance is beyond the trained window."""
        return None if max(self.attended, self.dense) <= window else 0

    def largest_distance(self, tokens: int) -> float:
        """The last of the first queries may have it."""
        return float(min(tokens, max(self.attended, self.dense)) - 1)

    @property
    def cut(self) -> int | None:
        return self.together

    @classmethod
    def small(cls, pairs: int) -> LongHeads:
        return cls(12, 10, 3)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> LongHeads:
        return cls(3, max(2, tokens), 1)
