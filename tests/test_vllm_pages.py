"""Attention on pages against the dense truth of every method that pages take: chunks of prompts and decoded tokens mixed, pages in any order."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from longreach import LMInfinite, SelfExtend, StreamingLLM, kernels
from longreach.core.encodings import Frequencies, Rope, Rotary
from longreach.core.segments import Constant, Grouped, Identity
from longreach.engine import reference
from longreach.engine.layer import Inputs, Layer
from longreach.hf.frequencies import _Standard
from longreach.methods.stock import Stock
from longreach.vllm.pages import Bound, Paged
from longreach.vllm.requests import Requests
from longreach.vllm.settings import refuse
from methods_matrix import METHODS

HEADS, GROUPS, WIDTH = 4, 2, 16


def takes(method) -> bool:
    try:
        refuse(method)
    except ValueError:
        return False
    return True


PAGED = [method for method in METHODS if takes(method)]


def rotary(method, pairing="half", start=0, width=WIDTH, scaling=1.0) -> Rotary:
    own = Frequencies((1.0 / 10000.0 ** (torch.arange(0, width, 2).float() / width)).double(), scaling)
    if method.rescales:
        own = method.frequencies(Rope(own, 32, 80, _Standard("tiny", 10000.0, own, 32)))
    return Rotary(own.inverse, own.scaling, pairing, start)


class Engine:
    """A scheduler of pages: tokens of requests are read in any pieces, on pages in any order, with NaN wherever nothing was written.

    frees  pages that a bounded method never reads again are others' at once, and hold NaN until then. Tables keep naming them, as vLLM's do.
    """

    def __init__(self, paged: Paged, size: int = 4, pages: int = 64, frees: bool = False) -> None:
        self.paged, self.size, self.frees, self.freed = paged, size, frees, dict[str, int]()
        self.pool = torch.full((pages, GROUPS, 2, size, WIDTH), torch.nan)
        self.free = random.Random(1).sample(range(1, pages), pages - 1)
        self.table: dict[str, list[int]] = {}
        self.text: dict[str, tuple[torch.Tensor, ...]] = {}

    def read(self, new: dict[str, int]) -> dict[str, torch.Tensor]:
        """So many new tokens of each request -> the output [n, H, E] of each."""
        parts, ends, lengths, slots, total = [], [], [], [], 0
        for name, count in new.items():
            qkv = tuple(torch.randn(count, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS))
            before = self.text.get(name)
            self.text[name] = qkv if before is None else tuple(torch.cat(pair) for pair in zip(before, qkv))
            length = len(self.text[name][0])
            pages = self.table.setdefault(name, [])
            while len(pages) * self.size < length:
                pages.append(self.free.pop())
            slots += [pages[i // self.size] * self.size + i % self.size for i in range(length - count, length)]
            total += count
            parts.append(qkv)
            ends.append(total)
            lengths.append(length)
        table = torch.zeros(len(new), max(len(self.table[name]) for name in new), dtype=torch.int32)
        for row, name in enumerate(new):
            table[row, : len(self.table[name])] = torch.tensor(self.table[name])
        requests = Requests.of(ends, lengths, table, torch.tensor(slots), self.size)
        q, k, v = (torch.cat(each) for each in zip(*parts))
        out = self.paged.attend(requests, q, k, v, self.pool)
        for name, length in zip(new, lengths) if self.frees else ():
            self.release(name, length)
        return dict(zip(new, out.split(list(new.values()))))

    def release(self, name: str, read: int) -> None:
        assert self.paged.bound is not None
        first, last = self.paged.bound.gap(read, self.size)
        for page in self.table[name][max(first, self.freed.get(name, 0)) : last]:
            self.pool[page] = torch.nan
            self.free.insert(0, page)
        self.freed[name] = max(first, last)

    def held(self, name: str) -> int:
        """Pages that a request has now."""
        assert self.paged.bound is not None
        return len(self.table[name]) - max(0, self.freed[name] - self.paged.bound.gap(0, self.size)[0])

    def leave(self, name: str) -> None:
        self.free += self.table.pop(name)
        del self.text[name]

    def truth(self, name: str, count: int) -> torch.Tensor:
        """The last `count` tokens of a request, from the paper."""
        layer, inputs = self.paged.layer, self.paged.inputs
        q, k, v = (x.transpose(0, 1)[None] for x in self.text[name])
        n = q.shape[2]
        scale = layer.method.query_scale()
        factor = None if scale is None else scale(torch.arange(n - count, n))
        dense = reference.forward(q[:, :, n - count :], k, layer.rotary, inputs.scale, query_scale=factor, softcap=inputs.softcap)
        return reference.softmax(dense, layer.method.truth(dense), v, inputs.sink)[0][0].transpose(0, 1)


def engine(method, inputs=None, turning: Rotary | None = None, **more) -> Engine:
    inputs = inputs or Inputs(WIDTH**-0.5)
    kernel = kernels.kernel_for(torch.device("cpu"), torch.float32)
    return Engine(Paged(Layer(0, method, turning, written=True), inputs, kernel), **more)


def check(run: Engine, new: dict[str, int]) -> None:
    for name, out in run.read(new).items():
        want = run.truth(name, new[name])
        assert (out - want).abs().max() <= 1e-5 * max(1.0, float(want.abs().max())), (name, new)


HISTORY = [
    {"a": 13, "b": 1}, {"a": 1, "b": 30, "c": 5}, {"c": 1, "a": 1, "b": 1}, {"a": 40, "c": 1, "b": 1}, {"b": 1, "a": 1, "c": 7}, {"a": 1, "b": 1, "c": 1},
]  # fmt: skip
ROTARIES = {
    "interleaved": rotary(Stock(), "interleaved"), "partial": rotary(Stock(), start=4, width=8), "scaled": rotary(Stock(), scaling=1.2), "none": None,
}  # fmt: skip


@pytest.mark.parametrize("method", PAGED, ids=lambda m: m.brief())
def test_mixed_requests_equal_the_dense_truth(method):
    torch.manual_seed(0)
    run = engine(method, turning=rotary(method))
    for new in HISTORY:
        check(run, new)


@pytest.mark.parametrize("turning", ROTARIES.values(), ids=ROTARIES.keys())
@pytest.mark.parametrize("method", [SelfExtend(3, 8, log_scale=16), LMInfinite(9, 3), StreamingLLM(9, 3)], ids=lambda m: m.name)
def test_every_way_of_rotating(method, turning):
    torch.manual_seed(0)
    if turning is None:
        method = LMInfinite(9, 3) if isinstance(method, LMInfinite) else Stock(sliding_window=7)
    run = engine(method, turning=turning)
    for new in HISTORY:
        check(run, new)


@pytest.mark.parametrize("inputs", [Inputs(0.3, softcap=5.0), Inputs(0.3, sink=torch.randn(HEADS))], ids=["softcap", "sink"])
def test_softcap_and_sink(inputs):
    torch.manual_seed(0)
    run = engine(SelfExtend(3, 8), inputs, rotary(Stock()))
    for new in HISTORY:
        check(run, new)


def test_pages_of_requests_that_left_are_used_again():
    """What another request left on a page, NaN too, reaches nobody."""
    torch.manual_seed(0)
    run = engine(SelfExtend(3, 8), turning=rotary(Stock()), pages=20)
    check(run, {"a": 21, "b": 9})
    for page in run.table["a"]:
        run.pool[page] = torch.nan
    run.leave("a")
    for new in ({"c": 10, "b": 1}, {"b": 1, "c": 1}, {"c": 3, "b": 2}):
        check(run, new)


def test_requests_that_share_pages():
    """A prefix that was read once serves others: pages hold no trace of who read them."""
    torch.manual_seed(0)
    run = engine(SelfExtend(3, 8), turning=rotary(Stock()))
    check(run, {"a": 24})
    run.table["b"], run.text["b"] = run.table["a"][:5], tuple(x[:20] for x in run.text["a"])
    check(run, {"b": 9, "a": 1})
    check(run, {"b": 1, "a": 1})


LONG = [
    {"a": 61, "b": 3}, {"b": 40, "a": 1}, {"a": 1, "b": 1, "c": 9}, {"c": 33, "a": 1, "b": 2}, {"a": 30, "b": 1, "c": 1}, {"a": 1, "b": 1, "c": 1},
    {"a": 2, "b": 13, "c": 1}, {"a": 1, "b": 1, "c": 18},
]  # fmt: skip
BOUNDED = [
    LMInfinite(9, 3), LMInfinite(8, 5, distance_limit=10), StreamingLLM(9, 3), StreamingLLM(9, 3, counting="chunkable"), StreamingLLM(5, 0),
    *(method for method in PAGED if method.bounded),
]  # fmt: skip


@pytest.mark.parametrize("size", [1, 4, 7])
@pytest.mark.parametrize("method", BOUNDED, ids=lambda m: m.brief())
def test_freed_pages_are_never_read(method, size):
    """They hold NaN, or what another request wrote there, and a table still names them; so many pages would not do for the whole texts."""
    torch.manual_seed(0)
    run = engine(method, turning=rotary(method), size=size, pages=1 + -(-120 // size), frees=True)
    for new in LONG:
        check(run, new)
    bound = run.paged.bound
    for name, text in run.text.items():
        assert run.held(name) <= -(-bound.sinks // size) + -(-bound.near // size) + 1 < len(text[0]) // size + 2
    assert sum(len(table) for table in run.table.values()) > len(run.pool)


@pytest.mark.parametrize("off", [(0, 1), (-1, 0)], ids=["last", "first"])
@pytest.mark.parametrize("new", [1, 5], ids=["decoded", "chunk"])
def test_a_page_too_many_would_be_noticed(monkeypatch, off, new):
    """The test before this one can fail."""
    torch.manual_seed(0)
    whole = Bound.gap
    monkeypatch.setattr(Bound, "gap", lambda self, *args: tuple(a + b for a, b in zip(whole(self, *args), off)))
    run = engine(LMInfinite(9, 3), turning=rotary(Stock()), frees=True)
    run.read({"a": 40})
    assert run.read({"a": new})["a"].isnan().any()


@pytest.mark.parametrize("method", PAGED, ids=lambda m: m.brief())
def test_a_bounded_method_has_a_bound(method):
    bound = engine(method, turning=rotary(method)).paged.bound
    assert (bound is not None) == method.bounded or isinstance(method, Stock)  # whose sliding layers are vLLM's to free
    if method.bounded:
        i, j = torch.arange(200)[:, None], torch.arange(200)
        assert torch.equal(~method.distances(i, j).isnan(), (j <= i) & ((i - j < bound.near) | (j < bound.sinks)))  # what it sees, and no less


@pytest.mark.parametrize(
    "read, size, gap",
    [(0, 4, (1, 0)), (8, 4, (1, 0)), (12, 4, (1, 1)), (15, 4, (1, 1)), (16, 4, (1, 2)), (100, 4, (1, 23)), (100, 16, (1, 5)), (100, 1, (3, 92))],
)
def test_what_is_between_the_first_tokens_and_the_last_ones(read, size, gap):
    """Of nine near keys, the query's own included, and three first ones. Token `read` is the next query: it sees `read` - 8 and what follows."""
    assert Bound(9, 3).gap(read, size) == gap


def test_a_request_without_new_tokens_is_left_out():
    requests = Requests.of([3, 3, 4], [10, 7, 5], torch.arange(12).view(3, 4), torch.tensor([1, 2, 3, 4]), 4)
    assert [rows.rows.start for rows in requests.batch.groups] == [0, 2] and requests.starts == (7, 7, 4)
    assert requests.indices(torch.device("cpu")).tolist() == [7, 8, 9, 4]


def test_keys_are_stored_as_decoding_reads_most_of_them():
    kernel = kernels.kernel_for(torch.device("cpu"), torch.float32)
    stored = lambda method: Paged(Layer(0, method, rotary(Stock()), written=True), Inputs(1.0), kernel).stored  # noqa: E731
    assert stored(SelfExtend(3, 8)) == Grouped(3) and stored(LMInfinite(9, 3)) == stored(Stock()) == Identity()
    assert stored(Stock(sliding_window=5)) == Identity()
    assert Paged(Layer(0, Stock(), None, written=True), Inputs(1.0), kernel).stored == Constant(0)


def test_self_extend_turns_its_neighbours_only():
    """Of a long request a decoded token reads `window` keys and less than a page more at their true positions."""
    torch.manual_seed(0)
    run = engine(SelfExtend(3, 8), turning=rotary(Stock()))
    run.read({"a": 61, "b": 62})
    asked = []
    whole = Requests.turn
    Requests.turn = lambda self, *args: asked.append(args[4] * self.size) or whole(self, *args)  # type: ignore[method-assign]
    try:
        check(run, {"a": 1, "b": 1})
    finally:
        Requests.turn = whole  # type: ignore[method-assign]
    assert asked == [12]


def test_layers_that_write_themselves_make_no_forms():
    layer = Layer(0, SelfExtend(3, 8), rotary(Stock()))
    assert len(layer.forms) == 2 and not dataclasses.replace(layer, written=True).forms
