"""InfiniteHiP (Lee et al., 2025, arXiv 2502.08910): the last keys, the first few, and small blocks of all others that a search in stages finds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from longreach.core.choice import Choice, Index, Past, Probes, stretches
from longreach.core.dense import Dense
from longreach.core.segments import Chunked, Identity, Layout, Rank, Segment, Visible
from longreach.methods.base import Method, hidden_to_nan, require, require_integer

AT_ONCE = 2**26  # bytes of keys that are looked at in one go
NONE = 2**62  # where a chunk begins that there is not


@dataclass(frozen=True)
class Scan(Index):
    """In every chunk a binary search for one key that answers; the best chunks of all heads together are cut into smaller ones, in which it begins anew."""

    sink: int  # first keys, which are always chosen
    chunks: tuple[int, ...]  # of each stage
    kept: tuple[int, ...]  # keys that each stage leaves
    strides: tuple[int, ...]  # queries whose mean is compared
    distance: int  # at which right halves are compared; left ones are one further away
    ordinal: bool  # instead, chunks lie one position after the other, this far behind the query

    frame: ClassVar[Literal["segment", "raw", "block"]] = "raw"
    probes: ClassVar[bool] = True

    @property
    def first(self) -> int:
        return self.sink

    def choose(self, q: torch.Tensor, past: Past) -> torch.Tensor:
        found = None
        for number in range(len(self.chunks)):
            found = self.stage(number, q, found, past)
        assert found is not None
        return found

    def stage(self, number: int, q: torch.Tensor, before: torch.Tensor | None, past: Past) -> torch.Tensor:
        """Between stages [R, 1, S, n]: where the chunks that are kept begin, in order, NONE for none."""
        size, groups, last = self.chunks[number], past.candidates.shape[1], number == len(self.chunks) - 1
        end = past.complete * self.chunks[-1]  # [1, S] keys
        if before is None:
            first = torch.arange(self.sink, max(self.sink + 1, int(end.max())), size, device=q.device).expand(1, groups, -1)
        else:
            within = torch.arange(0, self.chunks[number - 1], size, device=q.device)
            first = (before[:, 0, :, :, None] + within).flatten(2)
        first = first.masked_fill(first >= end[..., None], NONE)
        if first.shape[2] > (keep := self.kept[number] // size):
            best = self.scores(number, q, first, end, past).sort(dim=-1, descending=True, stable=True)
            found = first.expand_as(best.values).gather(2, best.indices[..., :keep])
            first = found.masked_fill(best.values[..., :keep].isneginf(), NONE).sort(-1).values
        first = first.expand(q.shape[0], -1, -1)[:, None]
        return self.ids(first, past) if last else first

    def compared(self, blocks: int, queries: int) -> tuple[int, ...]:
        """Of each chunk two keys, log2(size) + 1 times, with the means of the queries; a stage that would leave all compares nothing."""
        found, chunks = [], max(1, -(-(blocks * self.chunks[-1] - self.sink) // self.chunks[0]))
        for size, smaller, kept, stride in zip(self.chunks, (*self.chunks[1:], self.chunks[-1]), self.kept, self.strides):
            asks = blocks > 0 and chunks > kept // size
            found.append(asks * chunks * 2 * ((size - 1).bit_length() + 1) * -(-queries // stride))
            chunks = min(chunks, kept // size) * (size // smaller)
        return tuple(found)

    def opened(self, blocks: int) -> tuple[tuple[int, int], ...]:
        keys = max(0, blocks * self.chunks[-1] - self.sink)
        return tuple((min(kept // size, -(-keys // size)), size) for size, kept in zip(self.chunks, self.kept[:-1]))

    def ids(self, first: torch.Tensor, past: Past) -> torch.Tensor:
        """Numbers of the blocks that begin there, and of those of the sink."""
        block, candidates = self.chunks[-1], past.candidates[:, None]
        sink = torch.arange(min(self.sink // block, candidates.shape[3]), device=first.device).expand(*first.shape[:3], -1)
        found = torch.cat([sink, (first // block).masked_fill(first == NONE, -1)], -1)
        return found.masked_fill(~candidates.expand(len(found), -1, -1, -1).gather(3, found.clamp_min(0)), -1)

    def scores(self, number: int, q: torch.Tensor, first: torch.Tensor, end: torch.Tensor, past: Past) -> torch.Tensor:
        """Of the chunks that begin at `first` [R or 1, S, n] and end by `end` [1, S] -> [R, S, n]; -inf where there is none, or a mask hides it."""
        probes, size, (rows, heads, _, width), groups = past.probes, self.chunks[number], q.shape, first.shape[1]
        assert probes is not None
        q = means(q.unflatten(2, (groups, -1)), self.strides[number])  # [R, H, S, p, D]
        asking = self.asking(q, (first < NONE).sum(-1), probes)
        hides = bool((past.candidates.sum(-1) < past.complete).any())
        found, some = [], max(1, min(probes.at_once // size, AT_ONCE // (2 * rows * heads * groups * width * q.element_size())))
        for a in range(0, first.shape[2], some):
            begins = first[..., a : a + some]
            low = begins.where(begins < NONE, 0)
            lookup, low, high = probes.open(low, size, number == 0), low[:, None], (low + size).minimum(end[..., None])[:, None]
            place = torch.arange(a, a + begins.shape[2], device=q.device).repeat(2) if self.ordinal else None
            best = None
            for _ in range((size - 1).bit_length() + 1):
                middle = (low + high) // 2
                probe = torch.cat([(low + middle) // 2, (middle + high) // 2], -1)  # one of the left half, one of the right
                keys = lookup(probe)  # [R, G, S, 2 n, D]
                keys = keys if place is None else probes.turned(keys, place)
                logits = torch.cat([logits_of(x, half) for x, half in zip(asking, keys.chunk(2, 3))], -1)
                if hides:
                    may = past.candidates[:, None].expand(*logits.shape[:3], -1).gather(3, (probe // self.chunks[-1]).expand_as(logits))
                    logits = logits.masked_fill(~may, -torch.inf)
                left, right = logits.chunk(2, 3)
                low, high = torch.where(right >= left, middle, low), torch.where(right >= left, high, middle)
                best = logits.unflatten(3, (2, -1)).amax(3) if best is None else torch.maximum(best, logits.unflatten(3, (2, -1)).amax(3))
            assert best is not None
            found.append(best.amax(1).masked_fill(begins == NONE, -torch.inf))
        return torch.cat(found, -1)

    def asking(self, q: torch.Tensor, chunks: torch.Tensor, probes: Probes) -> tuple[torch.Tensor, torch.Tensor]:
        """q [R, H, S, p, D] un-rotated, who look at so many chunks [R or 1, S] -> the same for left halves and for right ones."""
        rows, _, groups, queries, _ = q.shape
        at = (chunks * self.ordinal + self.distance).expand(rows, -1).flatten().repeat_interleave(queries)
        turned = [probes.turned(q.transpose(0, 1).flatten(1, 3), at + more) for more in (0 if self.ordinal else 1, 0)]
        left, right = (x.unflatten(1, (rows, groups, queries)).transpose(0, 1) for x in turned)
        return left, right


def logits_of(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [R, H, S, p, D], k [R, G, S, n, D] -> the largest of a group and its queries [R, G, S, n]."""
    folded = q.unflatten(1, (k.shape[1], -1)).transpose(2, 3).flatten(3, 4)
    return (folded @ k.transpose(-1, -2)).amax(-2)


def means(x: torch.Tensor, stride: int) -> torch.Tensor:
    """x [..., T, D] -> the means of `stride` of them, of what is left of those too."""
    whole = x.shape[-2] // stride * stride
    parts = [x[..., :whole, :].unflatten(-2, (-1, stride)).float().mean(-2)] if whole else []
    if whole < x.shape[-2]:
        parts.append(x[..., whole:, :].float().mean(-2, keepdim=True))
    return torch.cat(parts, -2).to(x.dtype)


@dataclass(frozen=True)
class InfiniteHiP(Method):
    """The window at true distances; the first tokens and what a search finds follow each other before it, so that none is untrained. All keys are kept.

        visible:   i - j < window,  or  j < sink,  or  j in a chosen block,  or  j in no complete block yet
        distance:  i - j in the window; else  i - p + window + (how many are seen from j up to p - window) - 1,  p being the first query that chooses with i

    The search goes through what has left the window in stages. In stage s the text is cut into chunks of chunks[s] keys. Of each, log2(chunks[s]) + 1 times,
    one key in the middle of its left half and one in the middle of its right half are compared with the queries, and it goes on in the half with the larger
    logit. A chunk counts as much as the largest logit on the way, of any head; the best chunks, with kept[s] keys, are cut into the next stage's. What the last
    stage leaves is read. Heads that share keys search together, and all heads read the same.

        compared:  at distance w + 1 on the left and w on the right, w = max(0, window - chunks[0]);  in the first layers at w + n - c for chunk c of n
        queries:   of a block [n query_block, (n + 1) query_block) the means of strides[s] each; the largest logit of any counts

    A decoded token searches alone, and not at every index: stage s is asked by the last query at a multiple of refresh[s]. Keys that have left the window since
    are read too. The official code counts steps from the end of the prompt instead, and such keys are not seen until the next refresh; it shows nearly all keys
    to the last queries of every forward, which would depend on where a prompt is cut and is left out here; and it treats the last layer as the first ones.

    window        tokens seen at their true distance; the paper uses 1024.
    sink          first tokens that always stay visible, a multiple of the last of chunks.
    budget        keys that the search leaves, a multiple of the last of chunks.
    chunks        keys of a chunk in every stage, each a multiple of the next.
    kept          keys that each stage but the last leaves, multiples of its chunk; with one stage () or, on the command line, none.
    strides       queries of a prompt of which each stage compares the mean.
    query_block   queries of a prompt that search together; a prompt may be cut at multiples of it.
    refresh       how often each stage is asked anew, in decoded tokens, each a multiple of the next; the serving recipes have 96, 24, 8.
    first_layers  layers with first_budget, which compare at the places of chunks.
    first_budget  keys that the search leaves there; 2 * budget if not given.

    Raises ValueError for parameters out of range.
    """

    window: int = field(default=1024, metadata={"help": "tokens seen at their true distance"})
    sink: int = field(default=256, metadata={"help": "first tokens that stay visible"})
    budget: int = field(default=2048, metadata={"help": "keys that the search leaves"})
    chunks: tuple[int, ...] = field(default=(256, 32, 8), metadata={"help": "keys of a chunk in every stage"})
    kept: tuple[int, ...] = field(default=(32768, 8192), metadata={"help": "keys that each stage but the last leaves"})
    strides: tuple[int, ...] = field(default=(4, 4, 1), metadata={"help": "queries of a prompt whose mean is compared, in every stage"})
    query_block: int = field(default=64, metadata={"help": "queries of a prompt that search together"})
    refresh: tuple[int, ...] = field(default=(32, 16, 8), metadata={"help": "decoded tokens until a stage is asked anew"})
    first_layers: int = field(default=4, metadata={"help": "first layers, which search for more"})
    first_budget: int | None = field(default=None, metadata={"help": "keys that the search leaves there; twice the budget if not given"})

    name: ClassVar[str] = "infinitehip"
    paper: ClassVar[str] = "arXiv 2502.08910"
    recalls: ClassVar[str] = "the last window of tokens, the first few, and the small blocks that a search finds"
    evidence: ClassVar[str] = (
        "on nano it found 16 of 16 far pass keys at 8 windows, as SelfExtend did, and at 32 windows 3 of 4 in Moby-Dick, 10 of 12 by blocks of 8 alone, "
        "and none of 4 in repeated filler"
    )

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("sink", 0), ("budget", 1), ("query_block", 1), ("first_layers", 0)):
            require_integer(name, getattr(self, name), least)
        for name in ("chunks", "kept", "strides", "refresh"):
            value = getattr(self, name)
            require(isinstance(value, tuple | list), f"{name} must be a list of integers, not {value!r}; pass one for each stage")
            object.__setattr__(self, name, tuple(value))
            for entry in value:
                require_integer(name, entry, 1)
        stages = len(self.chunks)
        for name, count in (("chunks", max(1, stages)), ("kept", stages - 1), ("strides", stages), ("refresh", stages)):
            given, of = len(getattr(self, name)), "stage but the last" if name == "kept" else "stage"
            fix = "chunks says how many stages there are" + ("" if count else f"; pass none, {name}=() or --{name} none")
            require(given == count, f"{name} must have one entry for every {of} ({count}), not {given}; {fix}")
        for name in ("chunks", "refresh"):
            pairs = zip(getattr(self, name), getattr(self, name)[1:])
            require(all(a % b == 0 for a, b in pairs), f"every entry of {name} must be a multiple of the next, not {getattr(self, name)}")
        block = self.chunks[-1]
        for name in ("sink", "budget"):
            require(getattr(self, name) % block == 0, f"{name} must be a multiple of the last chunk ({block}), not {getattr(self, name)}; round it")
        if self.first_budget is not None:
            require_integer("first_budget", self.first_budget, block)
            require(self.first_budget % block == 0, f"first_budget must be a multiple of the last chunk ({block}), not {self.first_budget}; round it")
        for size, keep in zip(self.chunks, self.kept):
            require(keep % size == 0, f"kept must be multiples of the chunks ({size}), not {keep}; round it")

    @classmethod
    def recommended(cls, window: int, context: int) -> InfiniteHiP:
        """The proportions that the paper has on Llama 3 (8192). On smaller windows one stage less is enough, and a token asks sooner."""
        if window >= 8192:
            scale = window // 8192
            return cls(1024 * scale, 256 * scale, 2048 * scale, kept=(32768 * scale, 8192 * scale))
        block = max(1, min(8, window // 32))
        near, sink, budget = max(1, window // 4), window // 32 // block * block, max(1, window // 2 // block) * block
        first = max(1, window // 32 // block) * block
        return cls(near, sink, budget, (first, block), (max(1, 4 * window // first) * first,), (4, 1), 2 * block, (block, block), 0)

    @property
    def near(self) -> int:
        """The distance at which right halves are compared."""
        return max(0, self.window - self.chunks[0])

    def of(self, layer: int) -> int:
        """Keys that the search leaves in a layer."""
        return self.budget if layer >= self.first_layers else 2 * self.budget if self.first_budget is None else self.first_budget

    def layout(self, layer: int = 0) -> Layout:
        window, block, budget = self.window, self.chunks[-1], self.of(layer)
        index = Scan(self.sink, self.chunks, (*self.kept, budget), self.strides, self.near, layer < self.first_layers)
        choice = Choice(index, (self.sink + budget) // block + 1, block, "layer", queries=self.query_block, refresh=self.refresh)
        return Layout((
            Segment(Identity(), Identity(), Visible(0, window)),
            Segment(Chunked(self.query_block, shift=window), Rank(window, "right"), Visible(window), choice=choice),
        ))  # fmt: skip

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Of a key that was found, the largest that it can be."""
        return hidden_to_nan((i - j).clamp(max=self.most), j <= i)

    @property
    def most(self) -> int:
        """The largest distance."""
        since = max(self.query_block, self.refresh[0]) - 1
        return self.window + self.sink + max(self.of(0), self.budget) + self.chunks[-1] - 1 + since - 1

    def truth(self, dense: Dense) -> torch.Tensor:
        i, j = dense.i, dense.j
        first, count, window, block = int(i[0]), j.shape[1], self.window, self.chunks[-1]
        seen, q = dense.seen.expand(len(dense.q), 1, len(i), count), torch.cat([*dense.earlier[:1], dense.q], 2)
        found = hidden_to_nan(i - j, (j <= i) & (i - j < window)).repeat(len(q), 1, 1, 1)
        for start, stop in stretches(max(first, window), count, self.query_block):
            asked = [[start // every * every] for every in self.refresh] if len(i) == 1 else [[*range(start, stop)]] * len(self.chunks)
            complete = max(0, (asked[0][0] if len(i) == 1 else start) - window + 1) // block * block
            for row in range(len(q)):
                hidden = ~seen[row, 0, start - first]
                chosen = self._found(replace(dense, alibi=None, softcap=None), q[row], dense.k[row], asked, complete, hidden)
                shown = ((j[0] < self.sink) | (j[0] >= complete) | chosen) & ~hidden
                far = [shown & (j[0] <= i[n] - window) for n in range(start - first, stop - first)]  # of every query
                place = far[-1].long().cumsum(0) - int(far[0].sum())  # 0 for the last one that the first query sees
                for n, own in zip(range(start - first, stop - first), far):
                    found[row, 0, n] = torch.where(own, (n + first - start + window - place).double(), found[row, 0, n])
        return found

    def _found(self, dense: Dense, q: torch.Tensor, k: torch.Tensor, asked: list[list[int]], end: int, hidden: torch.Tensor) -> torch.Tensor:
        """[N] which keys the search finds before `end`, of one row: q [H, N, D], k [H, N, D], the queries of every stage."""
        near, groups, blocked = self.near, dense.groups, torch.zeros_like(hidden)
        for a in range(0, end, self.chunks[-1]):
            blocked[a : a + self.chunks[-1]] = hidden[a : a + self.chunks[-1]].all()
        end = max([a + 1 for a in range(end) if not blocked[a]], default=0)
        begins, before, budget = [self.sink], end, (*self.kept, self.of(dense.layer))
        for size, keep, stride, queries in zip(self.chunks, budget, self.strides, asked):
            begins = [c for b in begins for c in range(b, min(b + before, end), size)]
            before = size
            if len(begins) <= keep // size:
                continue
            pooled = torch.stack([q[:, queries[a : a + stride]].mean(1) for a in range(0, len(queries), stride)], 1)  # [H, p, D]
            ordinal = torch.zeros(len(hidden), dtype=torch.long)
            for c, b in enumerate(begins):
                ordinal[b : b + size] = c
            distances = [near + len(begins) - ordinal] * 2 if dense.layer < self.first_layers else [torch.full_like(ordinal, near + more) for more in (1, 0)]
            logits = [replace(dense, q=pooled[None], k=k[None], barred=None).logits(at.expand(pooled.shape[1], -1))[0] for at in distances]
            sides = [x.amax(1).unflatten(0, (-1, groups)).amax(1).masked_fill(blocked, -math.inf).tolist() for x in logits]
            score = [max(self._searched(left, right, b, min(b + size, end), size) for left, right in zip(*sides)) for b in begins]
            order = sorted(range(len(begins)), key=lambda n: -score[n])[: keep // size]
            begins = sorted(begins[n] for n in order if score[n] > -math.inf)
        chosen = torch.zeros_like(hidden)
        for b in begins:
            chosen[b : min(b + self.chunks[-1], end)] = True
        return chosen

    @staticmethod
    def _searched(left: list[float], right: list[float], low: int, high: int, size: int) -> float:
        """What a chunk counts as for one head of keys, whose largest logits are `left` and `right` of a middle."""
        best = -math.inf
        for _ in range(math.ceil(math.log2(size)) + 1):
            middle = (low + high) // 2
            a, b = left[(low + middle) // 2], right[(middle + high) // 2]
            low, high, best = (middle, high, max(best, b)) if b >= a else (low, middle, max(best, a))
        return best

    def capacity(self, window: int) -> int | None:
        """Unlimited if no distance is beyond the trained window."""
        return None if self.most < window else 0

    def largest_distance(self, tokens: int) -> float:
        return float(min(tokens - 1, self.most))

    @property
    def cut(self) -> int | None:
        return 1 if self.query_block == self.refresh[0] == 1 else max(2, self.query_block)

    @classmethod
    def small(cls, pairs: int) -> InfiniteHiP:
        return cls(8, 4, 8, (8, 4, 2), (24, 12), (2, 2, 1), 8, (8, 4, 2), 1, 10)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> InfiniteHiP:
        return cls(max(16, tokens // 4), 0, -(-tokens // 8) * 8, (16, 8), (1024,), (4, 1), 8, (4, 2))
