"""InfLLM (Xiao et al., NeurIPS 2024, arXiv 2402.04617): the last keys, the first few, and of all others the blocks whose representatives answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from longreach.core.choice import Choice, Index, Past, stretches
from longreach.core.dense import Dense
from longreach.core.segments import Constant, Identity, Layout, Segment, Visible
from longreach.kernels.products import products
from longreach.methods.base import Method, hidden_to_nan, require, require_integer


@dataclass(frozen=True)
class Representatives(Index):
    """For every query head, the keys of a block that got most attention in the window: their mean, or each of them."""

    blocks: int
    keys: int  # of each block
    window: int
    heads: Literal["layer", "head"]
    relevance: Literal["mean", "max"]

    each: ClassVar[Literal["group", "head"]] = "head"

    @property
    def width(self) -> int:
        return 1 if self.relevance == "mean" else self.keys

    @property
    def mass(self) -> int:
        return self.window

    def summarise(self, k: torch.Tensor, *args: Any, mass: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        best = mass.sort(descending=True, stable=True).indices[..., : self.keys].unflatten(1, (k.shape[1], -1))  # [R, G, g, N, keys]; of equal ones the first
        every = k[:, :, None].expand(-1, -1, best.shape[2], -1, -1, -1)
        found = every.gather(4, best[..., None].expand(*best.shape, k.shape[-1]))
        kept = found.float().mean(4).to(k.dtype) if self.relevance == "mean" else found.flatten(4)
        return kept.transpose(2, 3).flatten(3)  # [R, G, N, g S]

    def choose(self, q: torch.Tensor, past: Past) -> torch.Tensor:
        mean = q.float().unflatten(2, (past.candidates.shape[1], -1)).mean(3).to(past.compared.dtype)  # [R, H, choices, D]
        asked = mean.unflatten(1, (past.compared.shape[1], -1))
        scores = self._of_layer(asked, past.compared) if (self.heads, self.relevance) == ("layer", "mean") else self._of_heads(asked, past.compared)
        best = scores.masked_fill(~past.candidates[:, None], -torch.inf).topk(min(self.blocks, scores.shape[3]))
        return best.indices.masked_fill(best.values.isneginf(), -1)

    def _of_layer(self, asked: torch.Tensor, compared: torch.Tensor) -> torch.Tensor:
        """[R, G, g, choices, D], [R, G, N, g D] -> [R, 1, choices, N]: the sum over heads is one product of all heads beside each other."""
        return products(asked.transpose(2, 3).flatten(3), compared).float().sum(1, keepdim=True)

    def _of_heads(self, asked: torch.Tensor, compared: torch.Tensor) -> torch.Tensor:
        """[R, G, g, choices, D], [R, G, N, g width D] -> [R, H or 1, choices, N]."""
        each = []
        for group in range(compared.shape[1]):
            kept = compared[:, group].unflatten(2, (-1, asked.shape[4])).transpose(1, 2)  # [R, g width, N, D], where it lies
            each.append(products(asked[:, group].repeat_interleave(self.width, 1), kept).float().unflatten(1, (-1, self.width)).amax(2))
        scores = torch.cat(each, 1)
        return scores if self.heads == "head" else scores.sum(1, keepdim=True)


@dataclass(frozen=True)
class InfLLM(Method):
    """The window at true distances; the first tokens and what is retrieved at one distance, so that none is untrained. All keys are kept.

        visible:   i - j < n_local,  or  j < n_init,  or  j in a chosen block,  or  j in no complete block yet
        distance:  min(i - j, n_local - 1)
        chosen:    the topk blocks with the largest  sum over heads of (mean of the queries of the execution block) . (representative of the block)
        representative, for every query head: the mean of the repr_topk un-rotated keys of the block that got the largest sum of final
        probabilities from the queries that had them in the window; the queries of the execution block are at position n_local - 1

    heads="head", an option of the official code: every query head chooses its own blocks, by its own product instead of the sum over heads. relevance="max" is
    in neither paper nor code: a block answers as its best representative does, not as their mean, and keeps all of them.

    A block of keys is complete one token after all of it has left the window. Queries of one execution block [n exc_block_size, (n + 1) exc_block_size)
    choose together; a decoded token chooses alone. The official code lets execution blocks begin anew with every call, and shows up to exc_block_size - 1
    keys twice to queries of a prompt, near the edge of the window; here they begin at absolute multiples, and every key is shown once.

    n_local         tokens seen at their true distance; the paper uses 4096 (half of Llama 3's window of 8192).
    n_init          first tokens that always stay visible.
    block_size      tokens of a block.
    topk            blocks that a query reads; replaces the preset's. The paper uses 96 for Mistral.
    preset          "paper": as many blocks as n_local has (32 in the tables for Llama 3). "repository": 16, as in its YAML files.
    repr_topk       keys that represent a block, for every query head.
    exc_block_size  queries of a prompt that choose together. 1: a prompt may be cut anywhere.
    heads           "layer": all heads of a layer see the same blocks. "head": each its own.
    relevance       "mean" or "max" over the representatives of a block.

    Raises ValueError for parameters out of range.
    """

    n_local: int = field(metadata={"help": "tokens seen at their true distance"})
    n_init: int = field(default=128, metadata={"help": "first tokens that stay visible"})
    block_size: int = field(default=128, metadata={"help": "tokens of a block"})
    topk: int | None = field(default=None, metadata={"help": "blocks that a query reads; the preset's if not given"})
    preset: Literal["paper", "repository"] = field(default="paper", metadata={"help": "where topk comes from"})
    repr_topk: int = field(default=4, metadata={"help": "keys that represent a block"})
    exc_block_size: int = field(default=512, metadata={"help": "queries of a prompt that choose together"})

    heads: Literal["layer", "head"] = field(default="layer", metadata={"help": "who chooses blocks: all heads of a layer together, or each its own"})
    relevance: Literal["mean", "max"] = field(default="mean", metadata={"help": "how a block answers: as its representatives' mean, or as the best of them"})

    name: ClassVar[str] = "infllm"
    paper: ClassVar[str] = "arXiv 2402.04617"
    recalls: ClassVar[str] = "the last n_local tokens, the first few, and the blocks that are retrieved"

    def __post_init__(self) -> None:
        require(self.preset in ("paper", "repository"), f"preset must be 'paper' or 'repository', not {self.preset!r}")
        require(self.heads in ("layer", "head"), f"heads must be 'layer' or 'head', not {self.heads!r}")
        require(self.relevance in ("mean", "max"), f"relevance must be 'mean' or 'max', not {self.relevance!r}")
        for name in ("n_local", "block_size", "repr_topk", "exc_block_size"):
            require_integer(name, getattr(self, name), 1)
        require_integer("n_init", self.n_init, 0)
        if self.topk is not None:
            require_integer("topk", self.topk, 1)
        require(self.repr_topk <= self.block_size, f"a block of {self.block_size} keys has no {self.repr_topk} to represent it; lower repr_topk to block_size")

    @classmethod
    def recommended(cls, window: int, context: int) -> InfLLM:
        """Half of the trained window near and half retrieved, in the proportions that the paper has on Llama 3; blocks grow no further than there."""
        block = max(1, min(128, window // 32))
        return cls(max(1, window // 2), block, block, repr_topk=min(4, block), exc_block_size=4 * block)

    @property
    def evidence(self) -> str:  # type: ignore[override]
        if (self.heads, self.relevance) == ("layer", "mean"):
            return "on nano it found 8 of 16 far pass keys at 8 windows and none of 8 at 32, where SelfExtend found all; on SmolLM2 4 of 4 at 2"
        if (self.heads, self.relevance) == ("head", "max"):
            return "on nano it found 12 of 12 far pass keys at 32 windows of filler with four blocks of 64, 3 of 12 in a novel, where LM-Infinite found none"
        return ""

    @property
    def blocks(self) -> int:
        """topk."""
        return self.topk if self.topk is not None else 16 if self.preset == "repository" else max(1, self.n_local // self.block_size)

    def layout(self, layer: int = 0) -> Layout:
        n, far = self.n_local, Constant(self.n_local - 1)
        index = Representatives(self.blocks, self.repr_topk, n, self.heads, self.relevance)
        choice = Choice(index, self.blocks + 1, self.block_size, self.heads, queries=self.exc_block_size, lag=1)
        segments = [Segment(Identity(), Identity(), Visible(0, n))]
        if self.n_init:
            segments.append(Segment(far, Constant(0), Visible(n, last_key=self.n_init)))
        return Layout((*segments, Segment(far, Constant(0), Visible(n, first_key=self.n_init), choice=choice)))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return hidden_to_nan((i - j).clamp(max=self.n_local - 1), j <= i)

    def truth(self, dense: Dense) -> torch.Tensor:
        i, j = dense.i, dense.j
        first, count, every, near = int(i[0]), len(j[0]), self.distances(i, j), (j <= i) & (i - j < self.n_local)
        seen = dense.seen.expand(len(dense.q), 1, len(i), count)
        logits = dense.logits(every.nan_to_num(0)).masked_fill(~seen, -torch.inf)
        asking, keys = dense.turned(dense.q, torch.full_like(i[:, 0], self.n_local - 1)), dense.turned(dense.k, torch.zeros_like(j[0]))
        mass, found = self._mass_before(dense), []
        for start, stop in stretches(first, count, self.exc_block_size):
            block = slice(start - first, stop - first)
            full = max(0, start - self.n_local - self.n_init) // self.block_size  # blocks of keys that are complete for the first query
            shown = near[block] | (j < self.n_init) | (j >= self.n_init + full * self.block_size)
            if full:
                shown = shown | self._retrieved(asking[:, :, block], keys, mass, seen[:, 0, block.start], full)
            choosing = 1 if self.heads == "layer" else dense.q.shape[1]
            found.append(every[block].masked_fill(~shown, torch.nan).expand(len(seen), choosing, -1, -1))
            sums = torch.logsumexp(logits[:, :, block].masked_fill(found[-1].isnan(), -torch.inf), -1, keepdim=True)
            if dense.sink is not None:
                sums = torch.logaddexp(sums, dense.sink.double().view(1, -1, 1, 1))
            paying = near[block] & (seen[:, :, block] | (j > i[block])).all(-1, keepdim=True)  # a query from which something is hidden pays nothing
            mass = mass + torch.exp(logits[:, :, block] - sums).masked_fill(~paying, 0.0).sum(2)
        return torch.cat(found, 2)

    def _retrieved(self, asking: torch.Tensor, k: torch.Tensor, mass: torch.Tensor, seen: torch.Tensor, full: int) -> torch.Tensor:
        """[B, 1 or H, 1, N] of the queries [B, H, t, D] of one execution block."""
        size, first, last = self.block_size, self.n_init, self.n_init + full * self.block_size
        best = mass[:, :, first:last].unflatten(2, (full, size)).sort(descending=True, stable=True).indices[..., : self.repr_topk]
        kept = k[:, :, first:last].unflatten(2, (full, size)).gather(3, best[..., None].expand(*best.shape, k.shape[-1]))
        each = (asking.mean(2)[:, :, None, None] * kept).sum(-1)  # [B, H, blocks, representatives]
        score = each.mean(3) if self.relevance == "mean" else each.amax(3)
        score = score.sum(1, keepdim=True) if self.heads == "layer" else score
        score = score.masked_fill(~seen[:, None, first:last].unflatten(2, (full, size)).any(-1), -torch.inf)
        chosen = (score.argsort(-1, descending=True).argsort(-1) < self.blocks) & ~score.isneginf()
        return torch.nn.functional.pad(chosen.repeat_interleave(size, 2), (first, k.shape[2] - last))[:, :, None]

    def _mass_before(self, dense: Dense) -> torch.Tensor:
        """[B, H, N]: what the queries of earlier forwards have paid to keys in their windows."""
        if not dense.earlier:
            return dense.k.new_zeros(dense.k.shape[:3])
        q, sums = dense.earlier
        behind = torch.arange(q.shape[2], device=q.device)[:, None] - dense.j
        logits = Dense(q, dense.k, dense.rotary, dense.scale, dense.layer, dense.alibi, dense.softcap).logits(behind.clamp(min=0))
        return torch.exp(logits - sums).masked_fill((behind < 0) | (behind >= self.n_local), 0.0).sum(2)

    def capacity(self, window: int) -> int | None:
        """Unlimited if the window is inside the trained one."""
        return None if self.n_local <= window else 0

    @property
    def cut(self) -> int | None:
        return self.exc_block_size

    @classmethod
    def small(cls, pairs: int) -> InfLLM:
        return cls(9, 3, 4, 2, repr_topk=2, exc_block_size=8)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> InfLLM:
        return cls(tokens)
