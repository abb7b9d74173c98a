"""The forwards of one extended model that are under way, and what has to finish before their tokens count.

Knows tensors by identity, batches and stores; holds no model.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from longreach.engine.batch import Batch
from longreach.engine.watch import Watcher
from longreach.memory.store import Store


@dataclass(eq=False)
class HeadCall:
    """A forward of the model around the base model: its tokens count when the head, too, has run."""

    tokens: weakref.ref[torch.Tensor]
    announced: int  # new tokens that may be cropped again
    wanted: Any = None  # which logits its caller wants, where all are made
    used: bool = False  # whether it has called the base model
    finished: Batch | None = None


@dataclass(eq=False)
class BaseCall:
    """A forward of the base model."""

    tokens: weakref.ref[torch.Tensor]
    batch: Batch
    caller: HeadCall | None


class Calls(threading.local):
    """The calls under way in this thread, the innermost last: one may be made from a hook inside another.

    Each is known by the tensor of its tokens, which it alone holds; those whose tensor is gone were broken off, by an interrupt for example.

    watch  who watches the forwards of this thread; last: the layer that they end with. None: nobody, and all layers are computed.
    """

    def __init__(self) -> None:
        self.watch: Watcher | None = None
        self.last: int | None = None
        self.heads: list[HeadCall] = []
        self.bases: list[BaseCall] = []

    @property
    def batch(self) -> Batch | None:
        return self.bases[-1].batch if self.bases else None

    def _prune(self) -> None:
        self.heads = [call for call in self.heads if call.tokens() is not None]
        self.bases = [call for call in self.bases if call.tokens() is not None]

    def enter(self, tokens: torch.Tensor, announced: int, wanted: Any = None) -> None:
        self._prune()
        self.heads.append(HeadCall(weakref.ref(tokens), announced, wanted))

    def leave(self, tokens: torch.Tensor | None) -> HeadCall | None:
        """The call that is over. `finished` is the batch of what it has read; None if there is none, or if it counts already."""
        place = next((place for place, call in enumerate(self.heads) if call.tokens() is tokens is not None), None)
        if place is None:
            return None
        call = self.heads[place]
        del self.heads[place:]
        return call

    def caller(self) -> HeadCall | None:
        """The call that the base model is run for; None where it is called by itself."""
        self._prune()
        return self.heads[-1] if self.heads and not self.heads[-1].used else None

    def refuse_nested(self, store: Store) -> None:
        batches = [*(call.batch for call in self.bases), *(call.finished for call in self.heads if call.finished is not None)]
        if any(batch.store is store for batch in batches):
            raise ValueError("this cache is written to by the forward that is under way; inside it, pass another: extension.fork(cache), or use_cache=False")

    def begin(self, batch: Batch, tokens: torch.Tensor, caller: HeadCall | None) -> None:
        if caller is not None:
            caller.used = True
        self.bases.append(BaseCall(weakref.ref(tokens), batch, caller))

    def end(self, tokens: torch.Tensor | None, finished: bool) -> Batch | None:
        """The batch of the forward that is over, if its tokens count now; None if its caller has to finish first, or if it never began."""
        place = next((place for place, call in enumerate(self.bases) if call.tokens() is tokens is not None), None)
        if place is None:
            if not finished or not self.bases:
                return None
            place = len(self.bases) - 1  # another hook has exchanged the tokens
        call = self.bases[place]
        del self.bases[place:]
        if call.caller is None or call.caller not in self.heads:
            return call.batch
        call.caller.finished = call.batch if finished else None
        return None

    def expects(self, store: Store) -> bool:
        """Whether the forward that is under way writes to `store`."""
        return self.batch is not None and self.batch.store is store

    def clear(self) -> None:
        self.heads, self.bases = [], []

    def __deepcopy__(self, memo: object) -> Calls:
        return self  # a copied cache belongs to the same extension
