"""Flat forwards: new tokens of many requests in one call of the model, prefill chunks and decoded tokens mixed, each request with a memory of its own.

The model gets one row of tokens that follow each other, request by request; rotary is the identity there and attention is ours, so that a request sees its own
tokens only and is exact without padding. Knows Transformers' forwards, the store and documents; schedules nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import DynamicCache

from longreach.hf import documents
from longreach.hf.cache import place, store_of
from longreach.hf.forward import Forward
from longreach.hf.placement import device_of
from longreach.memory.adopting import adopt
from longreach.memory.declared import Coming, Need, need
from longreach.memory.store import Store, nbytes_of


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What a request has read, kept apart from the requests of forwards; it is not read on."""

    store: Store

    @property
    def length(self) -> int:
        """Tokens."""
        return self.store.lengths[0]

    @property
    def reaches(self) -> int:
        """The smallest length from which a request can go on."""
        return self.store.reaches(0)


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

    def reaches(self, request: int) -> int:
        """The smallest length that it can be cropped to."""
        return self._store.reaches(self._row(request))

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

    # -- what is kept apart ---------------------------------------------------------------------------------------------------------

    @property
    def forgets(self) -> bool:
        """Whether some layers keep the last tokens only: then a request cannot be cropped to any length."""
        self._store.prepare()
        return any(placement.tail for placement in self._store.placements.values())

    def take(self, request: int) -> Snapshot:
        """What a request has read, kept apart from it: where it is long, both read it from one place."""
        store = self._forward.new_store()
        adopt(store, self._store, self._row(request))
        return Snapshot(store)

    def begin(self, snapshot: Snapshot, length: int) -> int:
        """A new request that has read the first `length` tokens of what was kept apart. Raises ValueError where it cannot go back so far."""
        request = self._named(adopt(self._store, snapshot.store, 0))
        try:
            self.crop(request, length)
        except ValueError:
            self.leave(request)
            raise
        return request

    def need(self, totals: Mapping[int, int], coming: Sequence[tuple[int, Snapshot | None, int]] = (), taken: Collection[int] = ()) -> Need:
        """What is held at most until each request has read `totals` tokens in all (of others: what they have read), and so have those that are `coming`:
        (total, the snapshot that it goes on from or None, how many of the tokens of that). Of snapshots, those count that are about to be `taken` of some
        requests; what those that are there add is `beside`, those among them that others go on from.

        It holds in whatever order they come (`begin` or `join`), are taken, each once, read in any forwards, and leave. Whoever crops a request, takes another
        one, or has one more come or read further, asks again."""
        self._store.prepare()
        rows = {self._row(request): total for request, total in totals.items()}
        more = [Coming(total, None if source is None else source.store, begin) for total, source, begin in coming]
        return need(self._store, self._forward.facts.stored, rows, more, [self._row(request) for request in taken])

    def need_alone(self, total: int) -> Need:
        """What one request takes at most until it has read so much, where there is nothing else."""
        store = self._forward.new_store(joins=True)
        store.prepare()
        return need(store, self._forward.facts.stored, {}, [Coming(total)])

    @property
    def tiered(self) -> bool:
        """Whether what is long lies in tiers, which have budgets of their own."""
        return self._store.blocked is not None

    def has_room(self, need: Need, without: Iterable[Snapshot] = ()) -> bool:
        """Whether tiers have room for what goes to their blocks, or would have `without` some snapshots. Contiguous memory has as much as the device."""
        blocked = self._store.blocked
        gone = [layer for snapshot in without for layer in snapshot.store.layers]
        return blocked is None or blocked.has_room(need.blocks, need.summaries, self._store.layers, gone)

    def require_ever(self, need: Need) -> None:
        """Raises ValueError where tiers have no room for it even if nothing else is there."""
        if (blocked := self._store.blocked) is not None:
            blocked.require_ever(need.blocks, need.summaries)

    def held(self, snapshots: Iterable[Snapshot]) -> int:
        """Bytes of requests and snapshots; what they share counts once."""
        return nbytes_of([self._store, *(snapshot.store for snapshot in snapshots)])

    def beside(self, snapshots: Iterable[Snapshot]) -> int:
        """Bytes of snapshots that are not shared with requests."""
        frozen = {key for layer in self._store.layers for key in layer.frozen}
        stores = [snapshot.store for snapshot in snapshots]
        return sum({key: size for store in stores for layer in store.layers for key, size in layer.held.items() if key not in frozen}.values())

    def save(self, snapshot: Snapshot, file: Path, ids: Sequence[int], notes: Mapping[str, str] | None = None) -> None:
        """Write what was read to a folder, as `extension.save` does. `ids`: these tokens."""
        documents.save(self._forward, place(DynamicCache(), snapshot.store, self._forward.calls)[0], file, [*ids], notes or {})

    def load(self, file: Path, max_bytes: int = documents.LARGEST) -> tuple[Snapshot, list[int], dict[str, str]]:
        """What was saved in a folder, its tokens and notes. Raises ValueError for what is not of this model and method, for several rows or pads, and where the
        tokens were not saved with it."""
        document = documents.load(self._forward, file, max_bytes)
        store = store_of(document.cache)
        assert store is not None
        if document.ids is None or store.rows != 1 or document.mask is not None:
            raise ValueError(f"{str(file)!r} is no document of one row with its tokens; save it with extension.save(cache, folder, ids), without padding")
        return Snapshot(store), document.ids[0].tolist(), document.notes

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
