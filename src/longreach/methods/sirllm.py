"""SirLLM (Yao et al., ACL 2024, arXiv 2405.12528): a cache of a fixed size that keeps the tokens which surprised the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from longreach.core.eviction import Eviction
from longreach.core.segments import Constant, Identity, Layout, Segment, Visible
from longreach.methods.base import Method, hidden_to_nan, require, require_integer

AT_ONCE = 256  # rows of logits that are there in fp32


@dataclass(frozen=True)
class BySurprisal(Eviction):
    """The keep rule. Parameters are those of `SirLLM`."""

    start: int
    recent: int
    entropy_size: int
    decay: float
    shifted: bool

    @property
    def most(self) -> int:
        return self.start + self.recent + self.entropy_size

    @property
    def turn(self) -> int:
        return max(1, min(self.most // 4, self.most - self.start))

    def before(self, tokens: int, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        held = len(scores)
        if tokens > self.most - min(self.start, held):
            raise ValueError(
                f"a turn of {tokens} tokens does not fit into a cache of {self.most} tokens beside the first {self.start}; read it in several turns of at most "
                f"{self.turn} tokens, as longreach.stream does (then generate with its cache), or pass a larger entropy_size"
            )
        keep = torch.arange(held)
        if held + tokens > self.most:
            stays = torch.zeros(held, dtype=torch.bool)
            stays[scores.sort(descending=True, stable=True).indices[: max(0, self.entropy_size - tokens)]] = True
            stays[: self.start] = True
            left = self.most - tokens - int(stays.sum())
            others = (~stays).nonzero()[:, 0]
            stays[others[others > 0].flip(0)[:left]] = True
            keep = stays.nonzero()[:, 0]
        return keep, scores[keep] * self.decay

    def after(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        realised = ids[:-1] if self.shifted else ids[1:]
        parts = [F.cross_entropy(a.float(), b, reduction="none").cpu() for a, b in zip(logits.split(AT_ONCE), realised.split(AT_ONCE))]
        return torch.cat(parts) if parts else torch.zeros(0)


@dataclass(frozen=True)
class SirLLM(Method):
    """A cache of C = start + recent + entropy_size tokens. Before each turn, those leave that the model found easiest to predict. Constant memory, dialogues of
    any length.

        score:     surprisal -log p(x_t | x_<t) of a token when it was read, times decay for every turn that came after it; the first token of a turn gets the
                   largest score of that turn
        evicted:   before a turn of m tokens, if the n tokens that are held and the turn exceed C
        kept:      the entropy_size - m tokens with the largest scores, the first `start`, and of all others the newest, until C - m are kept
        distance:  i - j, where i and j are places in the cache: those that stay close ranks

    All layers and heads keep the same tokens. A turn is announced by `extension.turn(cache, tokens)`, as a conversation does for a question and for its
    answer; it may be read in any number of forwards. Where nobody has announced one, a forward of several tokens is a turn, and so are up to 32 tokens that
    come one by one. `longreach.stream` and all that reads with it makes turns of C // 4 tokens of a longer text.

    What was evicted cannot come back: a crop reaches the last turn for which tokens had to leave, and no further. A cache can be forked, reordered and
    padded; it cannot be saved as a document, and several requests cannot be read in one flat forward. Models with layers that see only a window or a chunk
    are refused. In official runs: grocery list 4, 0, 1020, decay 1.0; DailyDialog 4, 0, 508, decay 0.7; rock-paper-scissors 4, 0, 1020, decay 0.9.

    entropy_size  tokens that are kept by their score, >= 1.
    start         first tokens of the cache, which always stay, >= 0; the paper uses 4.
    recent        newest tokens that stay whatever their score, >= 0; the paper uses 0.
    decay         factor on all scores at every turn, above 0 and at most 1.
    alignment     "token": a token is scored by its own surprisal. "official": by that of the token before it, had it come again, as the published code does
                  by an index that is off by one.

    Raises ValueError for parameters out of range.
    """

    entropy_size: int = field(default=1020, metadata={"help": "tokens that are kept by their score"})
    start: int = field(default=4, metadata={"help": "first tokens, which always stay"})
    recent: int = field(default=0, metadata={"help": "newest tokens that stay whatever their score"})
    decay: float = field(default=1.0, metadata={"help": "factor on all scores at every turn"})
    alignment: Literal["token", "official"] = field(
        default="token", metadata={"help": "token (its own surprisal) or official (off by one, as the published code)"}
    )

    name: ClassVar[str] = "sirllm"
    paper: ClassVar[str] = "arXiv 2405.12528"
    recalls: ClassVar[str] = "the tokens that surprised the model most, the first few, and the turn under way"
    bounded: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_integer("entropy_size", self.entropy_size, 1)
        require_integer("start", self.start, 0)
        require_integer("recent", self.recent, 0)
        ok = isinstance(self.decay, int | float) and not isinstance(self.decay, bool) and 0 < self.decay <= 1
        require(ok, f"decay must be above 0 and at most 1, not {self.decay!r}; pass 1 for none")
        require(self.alignment in ("token", "official"), f"alignment must be 'token' or 'official', not {self.alignment!r}")

    @classmethod
    def recommended(cls, window: int, context: int) -> SirLLM:
        """The paper's cache of 1024 tokens, or one that fills a shorter window."""
        return cls(max(1, min(cls.entropy_size, window - cls.start)))

    @property
    def eviction(self) -> BySurprisal:
        return BySurprisal(self.start, self.recent, self.entropy_size, self.decay, self.alignment == "official")

    @property
    def cache(self) -> int:
        return self.start + self.recent + self.entropy_size

    def layout(self, layer: int = 0) -> Layout:
        """Plain attention, for an index is a place and none is beyond the cache; whoever counts true ones finds as many keys. What stays is turned to its new
        place from the un-rotated key: turned from place to place, a key would be rounded at every turn."""
        return Layout((Segment(Identity(), Identity(), Visible(0, self.cache)),), beside=(Constant(0),))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Of places in the cache. Of true indices: if it were the oldest tokens that leave."""
        return hidden_to_nan(i - j, (j <= i) & (i - j < self.cache))

    def capacity(self, window: int) -> int | None:
        """Unlimited where the window holds the cache."""
        return None if self.cache <= window else window

    @classmethod
    def small(cls, pairs: int) -> SirLLM:
        return cls(70, 2, 8)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> SirLLM:
        return cls(tokens, 0)
