"""A memory touches one file: what `memory/layer.py` asks for is all that the engine, the caches and the flat forwards need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import longreach
from families import build, tokens
from longreach import Combined, DualChunk, InfLLM, LMInfinite, Quest, SelfExtend, StreamingLLM, YaRN
from longreach.hf.cache import store_of
from longreach.kernels.protocol import KV, gather
from longreach.memory.steps import Shelf
from test_matrix import chunked, difference

METHODS = [
    SelfExtend(3, 8), LMInfinite(9, 3), StreamingLLM(9, 3), DualChunk(24), Quest(12, 4, 1, "all"), InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=1),
    Combined(YaRN(2.0), LMInfinite(9, 3, distance_limit=14, top_k=2, top_k_from_layer=0, top_k_rows="all")),
]  # fmt: skip


class Ledger:
    """Every entry of every form of every row that was ever read, in a list: nothing is shared, moved or forgotten."""

    at_hand, weigh = True, None

    def __init__(self, placements: Any, forms: Any) -> None:
        rows = len(next(iter(placements.values())).ends)
        self.forms, self.rows, self.new = {**forms}, [{} for _ in range(rows)], {}

    def of(self, row: int, form: Any) -> torch.Tensor:
        return self.new.get((row, form), self.rows[row].get(form))

    def put(self, row: int, form: Any, start: int, new: torch.Tensor) -> None:
        before = self.of(row, form)
        self.new[row, form] = new if before is None else torch.cat([before[:, :start], new], 1)

    def append(self, rows: slice, start: int, keys: Any, values: torch.Tensor) -> None:
        for form, entries in [*keys.items(), ("values", values)]:
            for n, row in enumerate(range(rows.start, rows.stop)):
                self.put(row, form, start, entries[n])

    def append_step(self, step: Any, keys: Any, values: torch.Tensor | None) -> None:
        for form, entries in [*keys.items(), *([] if values is None else [("values", values)])]:
            for n, (row, start) in enumerate(zip(step.rows, step.starts)):
                self.put(row, form, start, entries[n][:, None])

    def append_summaries(self, rows: slice, start: int, new: Any) -> None:
        for form, made in new.items():
            for n, row in enumerate(range(rows.start, rows.stop)):
                self.put(row, form, self.forms[form].entries(start), made[n])

    def view(self, positions: Any, rows: slice, start: int, stop: int, pinned: bool) -> list[KV]:
        k, v = (torch.stack([self.of(row, form)[:, start:stop] for row in range(rows.start, rows.stop)]) for form in (positions, "values"))
        return [KV(k, v, start)]

    def gather(self, positions: Any, rows: slice, start: int, stop: int, columns: torch.Tensor) -> KV:
        return gather(self.view(positions, rows, start, stop, False), start, columns)

    def keys_of(self, positions: Any, rows: slice, start: int, stop: int) -> torch.Tensor:
        return self.view(positions, rows, start, stop, False)[0].k

    def shelves(self, positions: Any, step: Any) -> Iterator[tuple[Shelf, KV]]:
        for n, (row, start) in enumerate(zip(step.rows, step.starts)):
            yield Shelf(0, slice(row, row + 1), (n,), (start,), (0,)), KV(self.of(row, positions)[None], self.of(row, "values")[None])

    def bases(self, positions: Any, step: Any) -> Iterator[Any]:
        return iter(())

    def first_tokens(self, positions: Any, step: Any) -> KV:
        head = self.forms[positions].head
        found = []
        for form in (positions, "values"):
            each = [self.of(row, form)[:, :head] for row in step.rows]
            found.append(torch.stack([torch.nn.functional.pad(x, (0, 0, 0, head - x.shape[1])) for x in each]))
        return KV(*found)

    def summaries(self, form: Any, rows: slice, stop: int, start: int = 0) -> torch.Tensor:
        return torch.stack([self.of(row, form)[:, start:stop] for row in range(rows.start, rows.stop)])

    def shelf_of_summaries(self, form: Any, step: Any, shelf: Shelf, stop: int) -> torch.Tensor:
        return self.of(step.rows[shelf.members[0]], form)[None, :, :stop]

    def release(self) -> None:
        pass

    @property
    def held(self) -> dict[int, int]:
        return {id(tensor): tensor.nbytes for row in self.rows for tensor in row.values()}

    shared = ()

    def settle(self) -> None:
        for (row, form), entries in self.new.items():
            self.rows[row][form] = entries
        self.new = {}

    def discard(self) -> None:
        self.new = {}

    def join(self) -> None:
        self.rows.append({})

    def select(self, index: torch.Tensor) -> None:
        self.rows = [{**self.rows[row]} for row in index.tolist()]

    def freeze(self, place: Any, bases: Any) -> None:
        pass

    def fork(self, placements: Any) -> Ledger:
        other = Ledger(placements, self.forms)
        other.rows = [{**row} for row in self.rows]
        return other


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_it_reads_pads_decodes_forks_and_crops_as_the_one_that_is_built(method):
    model, ids = build("llama"), tokens(3, 75)
    mask = torch.ones_like(ids)
    mask[1, :11] = mask[2, :30] = 0
    found = []
    for memory in ({}, {"memory": Ledger}):
        with longreach.extend(model, method, **memory) as extension:
            parts = [chunked(model, ids, [23, 1, 1, 9, 8, 1, 17, *[1] * 15]), chunked(model, ids, [40, 5, *[1] * 30], mask)[:, 60:]]
            cache = DynamicCache()
            model(ids[:, :60], attention_mask=mask[:, :60], past_key_values=cache, use_cache=True)
            twin = extension.fork(cache)
            cache.crop(50)
            for each, stop in ((cache, 50), (twin, 60), (cache, 51)):
                parts.append(model(ids[:, stop : stop + 1], attention_mask=mask[:, : stop + 1], past_key_values=each).logits)
            cache.reorder_cache(torch.tensor([2, 2, 0]))
            parts.append(model(ids[:, 52:55], attention_mask=mask[[2, 2, 0], :55], past_key_values=cache).logits)
            if memory:
                assert all(isinstance(layer, Ledger) for layer in store_of(cache).layers)
            found.append(parts)
    assert all(difference(theirs, ours) <= 1e-5 for ours, theirs in zip(*found, strict=True))


@torch.no_grad()
def test_many_requests_are_read_from_it():
    model, texts = build("llama"), [tokens(1, n, seed=n)[0] for n in (9, 30, 50)]
    with longreach.extend(model, SelfExtend(3, 8), memory=Ledger) as extension:
        alone = longreach.generate(extension, [text.tolist() for text in texts], 6, at_once=1)
        assert longreach.generate(extension, [text.tolist() for text in texts], 6) == alone
        flat = extension.flat()
        a = flat.join()
        flat.read({a: texts[2]}, "none")
        b = flat.fork(a)
        one = flat.read({a: texts[0][:3], b: texts[1][:1]})
        assert difference(one[b], model(torch.cat([texts[2], texts[1][:1]])[None], use_cache=False).logits[0, -1]) <= 1e-5
        flat.leave(a)
        assert flat.length(b) == 51


def test_it_says_that_it_cannot_be_saved(tmp_path):
    model = build("llama")
    with longreach.extend(model, SelfExtend(3, 8), memory=Ledger) as extension:
        cache = DynamicCache()
        model(tokens(1, 20), past_key_values=cache)
        with pytest.raises(ValueError, match="Ledger cannot be saved to a document"):
            extension.save(cache, tmp_path / "d")
        assert not (tmp_path / "d").exists()
