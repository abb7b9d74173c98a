"""Attention on pages against the dense truth of every method that pages take: chunks of prompts and decoded tokens mixed, pages in any order."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longreach import LMInfinite, SelfExtend, StreamingLLM, kernels
from longreach.core.segments import Constant, Grouped, Identity
from longreach.engine.layer import Inputs, Layer
from longreach.methods.stock import Stock
from longreach.vllm.pages import Bound, Paged
from longreach.vllm.requests import Requests
from paged_engine import BOUNDED, HEADS, HISTORY, LONG, PAGED, ROTARIES, check, engine, rotary


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
