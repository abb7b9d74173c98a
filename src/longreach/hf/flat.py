"""Flat forwards: new tokens of many requests in one call of the model, prefill chunks and decoded tokens mixed, each request with a memory of its own.

The model gets one row of tokens that follow each other, request by request; rotary is the identity there and attention is ours, so that a request sees its own
tokens only and is exact without padding. Knows Transformers' forwards and the store; schedules nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from transformers import DynamicCache

from longreach.hf.cache import place
from longreach.hf.forward import Forward
from longreach.hf.placement import device_of
from longreach.memory.store import Store


class Flat:
    """Requests that are read together.

        flat = extension.flat()
        a, b = flat.join(), flat.join()
        logits = flat.read({a: prompt_ids, b: other_ids})     # {request: [V]}, of the last token of each
        logits = flat.read({a: [token], b: [token]})          # one forward for both
        flat.leave(a)

    A request is a number that is used once. Whether the model's own code allows it is looked at in `flat_check`, before `extension.flat()` hands this out.
    """

    def __init__(self, forward: Forward) -> None:
        if not forward.modules:
            raise ValueError("the method was taken off this model; extend() it again")
        self._forward = forward
        self._model = cast(Any, forward.facts.model)
        self._parameters = inspect.signature(self._model.forward).parameters
        self._rows: dict[int, int] = {}  # request -> row of the store
        self._last = 0
        self._cache, self._store = place(DynamicCache(), forward.new_store(joins=True), forward.calls)

    # -- requests -------------------------------------------------------------------------------------------------------------------

    @property
    def requests(self) -> list[int]:
        return list(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values; what requests share counts once."""
        return self._store.nbytes

    def length(self, request: int) -> int:
        """Tokens that a request has read."""
        return self._store.lengths[self._row(request)]

    def join(self) -> int:
        """A new request, which has read nothing."""
        return self._named(self._store.join())

    def fork(self, request: int) -> int:
        """A new request that has read what this one has, and goes on by itself. The first fork of a long one moves its tokens to a place that both read;
        further ones copy nothing of it."""
        row = self._row(request)
        self._store.select(torch.tensor([*range(self._store.rows), row]))
        return self._named(self._store.rows - 1)

    def leave(self, request: int) -> None:
        """A request is over; its memory is free for others."""
        row = self._row(request)
        self._store.select(torch.tensor([other for other in range(self._store.rows) if other != row], dtype=torch.long))
        del self._rows[request]
        self._rows = {name: own - (own > row) for name, own in self._rows.items()}

    def crop(self, request: int, length: int) -> None:
        """Forget what a request has read from its token `length` on. Raises ValueError where too little is kept to go on from there."""
        if not 0 <= length <= self.length(request):
            raise ValueError(f"request {request} has read {self.length(request)} tokens; pass a length from 0 to that, not {length}")
        self._store.rewind(self._row(request), length)

    def begin_at(self, starts: Mapping[int, int]) -> None:
        """Requests that have read nothing go on from these indices, and see nothing before them: only where every layer forgets what lies there."""
        go_on_from(self._store, [starts.get(request, 0) for request in sorted(self._rows, key=self._row)], 0)

    def _named(self, row: int) -> int:
        self._last += 1
        self._rows[self._last] = row
        return self._last

    def _row(self, request: int) -> int:
        if request not in self._rows:
            raise ValueError(f"there is no request {request} (there are {self.requests}); join() makes one")
        return self._rows[request]

    # -- a forward ------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, new: Mapping[int, Sequence[int] | torch.Tensor], logits: Literal["last", "all", "none"] = "last") -> dict[int, torch.Tensor]:
        """Read new tokens of some requests in one forward -> for each of them the logits [V] of its last token, or [T, V] of all; {} of none.

        Raises ValueError for requests that do not exist, and for none or empty ones. If the forward fails, no request has read anything.
        """
        ids = {request: torch.as_tensor(tokens).reshape(-1).long() for request, tokens in new.items()}
        if not ids or any(not tokens.numel() for tokens in ids.values()):
            raise ValueError("a flat forward needs at least one request, and at least one new token of each")
        order = sorted(ids, key=lambda request: (ids[request].numel() > 1, self._row(request)))  # single tokens side by side
        asked = [(self._row(request), ids[request].numel()) for request in order]
        ends = torch.tensor([count for _, count in asked]).cumsum(0)
        device = device_of(self._forward.facts.model)
        more: dict[str, Any] = {}
        if logits != "all" and "logits_to_keep" in self._parameters:
            more["logits_to_keep"] = (ends - 1).to(device) if logits == "last" else 1
        self._store.asked = asked
        try:
            found = self._model(
                input_ids=torch.cat([ids[request] for request in order])[None].to(device), past_key_values=self._cache, use_cache=True, **more
            ).logits[0]
        finally:
            self._store.asked = None
        if logits == "none":
            return {}
        if logits == "all":
            return dict(zip(order, found.split([count for _, count in asked]), strict=True))
        return dict(zip(order, found if more else found[ends - 1], strict=True))


def go_on_from(store: Store, starts: Sequence[int], seen: int) -> None:
    """The rows of a store go on from these indices, and nothing is kept of what would lie before. `seen`: the slots that Transformers counts."""
    store.restore([*starts], seen, None)
    for placement in store.placements.values():
        placement.restore(starts, starts)
