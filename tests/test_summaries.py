"""What an index gets to summarise: keys, queries, values and masses of complete blocks, however a sequence is read, cropped, forked or saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from transformers import DynamicCache

import longreach
from families import build, tokens
from longreach import Combined, InfLLM, YaRN
from longreach.core.choice import Choice, Index, OfQueries, Past
from longreach.core.segments import Constant, Identity, Layout, Retention, Segment, Summary, Visible, queries
from longreach.engine.batch import Batch
from longreach.engine.executor import execute
from longreach.engine.layer import Inputs, Layer
from longreach.hf.cache import store_of
from longreach.kernels import kernel_for
from longreach.memory.store import Store
from longreach.methods.base import Method
from test_matrix import chunked, difference

CPU = torch.device("cpu")
METHOD = InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=8)
HEAD = Combined(YaRN(2.0), InfLLM(11, 0, 5, 1, repr_topk=3, exc_block_size=4))


@dataclass(frozen=True)
class Spy(Index):
    """Keeps what it got."""

    window: int = 0
    got: list[dict[str, torch.Tensor]] = field(default_factory=list, compare=False)

    width: ClassVar[int] = 1
    needs: ClassVar[Any] = ("q", "v")

    @property
    def mass(self) -> int:
        return self.window

    def summarise(self, k: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert not args
        self.got.append({"k": k, **kwargs})
        return k.mean(-2)

    def choose(self, q: torch.Tensor, past: Past) -> torch.Tensor:
        return torch.full((q.shape[0], 1, past.candidates.shape[1], 1), past.compared.shape[2] - 1).masked_fill(~past.candidates[:, None, :, -1:], -1)


@dataclass(frozen=True)
class Spied(Method):
    """A window of 6, and of what lies before it the last complete block of 4."""

    index: Spy
    lag: int = 0
    queries: int = 1

    def layout(self, layer: int = 0) -> Layout:
        choice = Choice(self.index, 2, 4, "layer", queries=self.queries, lag=self.lag)
        return Layout((Segment(Identity(), Identity(), Visible(0, 6)), Segment(Constant(5), Constant(0), Visible(6, first_key=1), choice=choice)))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def read(method: Method, sizes: list[int], memory: bool = True, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random q [1, 4, n, 8], k and v [1, 2, n, 8] through one layer, in forwards of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, h, sum(sizes), 8, generator=generator) for h in (4, 2, 2))
    layer, start = Layer(0, method, None), 0
    store = Store([layer.kept])
    for size in sizes:
        if memory:
            store.open(1, size)
        batch = Batch.of(1, size, None, CPU, store if memory else None)
        now = slice(start, start + size)
        execute(layer, batch, store.layers[0] if memory else None, kernel_for(CPU, torch.float32), q[:, :, now], k[:, :, now], v[:, :, now], Inputs(0.3))
        if memory:
            store.advance(None, size)
        start += size
    return q, k, v


@pytest.mark.parametrize("sizes", [[70], [1] * 40, [13, 1, 1, 30, 200, *[1] * 9]], ids=str)
def test_an_index_gets_the_keys_values_and_queries_of_every_block_once(sizes):
    for memory in (True, False):
        if memory or len(sizes) == 1:
            index = Spy()
            q, k, v = read(Spied(index), sizes, memory)
            blocks = (sum(sizes) - 1) // 4
            for name, x in (("q", q), ("k", k), ("v", v)):
                got = torch.cat([each[name] for each in index.got], 2)
                assert torch.equal(got, x[:, :, 1 : 1 + 4 * blocks].unflatten(2, (blocks, 4))), name
            assert all(set(each) == {"q", "k", "v", "scale"} for each in index.got)


@pytest.mark.parametrize(("lag", "together"), [(0, 1), (1, 3), (2, 16)])
def test_masses_are_the_final_probabilities_of_the_queries_in_the_window(lag, together):
    """Beside a dense softmax over what the queries see; the window of the masses is shorter than that of the segment."""
    index = Spy(5)
    q, k, _ = read(Spied(index, lag, together), [40, 1, 1, 22, 1])
    n = q.shape[2]
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.3)[0]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    ends, first = [40, 41, 42, 64, 65], []
    for start, stop in zip([0, *ends], ends):
        first += [max(start, t // together * together, min(7, stop - 1)) for t in range(start, stop)]  # query 7 is the first that sees something behind
    complete = ((torch.tensor(first) - 6 - lag).clamp(min=0) // 4)[:, None]
    block = torch.where(j > 0, (j - 1) // 4, -1)
    seen = (j <= i) & ((i - j < 6) | (block >= complete) | ((block == complete - 1) & (j > 0)))
    paid = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1).masked_fill((i - j >= 5) | (j > i), 0.0).sum(1)
    got = torch.cat([each["mass"] for each in index.got], 2)
    blocks = (n - 1 - 4) // 4
    assert got.shape == (1, 4, blocks, 4) and got.dtype == torch.float32
    torch.testing.assert_close(got[0], paid[:, 1 : 1 + 4 * blocks].unflatten(1, (blocks, 4)), rtol=0, atol=1e-5)


def test_a_block_waits_for_its_masses_and_queries_are_kept_as_long():
    (form,) = Layer(0, METHOD, None).summaries
    assert form == Summary(form.index, Constant(0), 4, 3, 8)
    kept = Layer(0, METHOD, None).summaries[form]
    assert [kept.entries(n) for n in (14, 15, 18, 19)] == [0, 1, 1, 2]  # keys 3..6 are in the window of query 14 at last
    assert queries(METHOD.layout()) == {OfQueries("q"): Retention(tail=12), OfQueries("lse"): Retention(tail=12)}
    assert queries(Spied(Spy()).layout()) == {OfQueries("q"): Retention(tail=4)} and queries(longreach.Quest().layout(5)) == {}


def test_masses_that_cannot_be_counted_are_refused():
    far = Segment(Constant(5), Constant(0), Visible(6), choice=Choice(Spy(5), 2, 4))
    for near, behind in (
        (Segment(Identity(), Identity(), Visible(0, 6, chunk=3)), far),  # its end depends on the query
        (Segment(Identity(), Identity(), Visible(0, 6, last_key=9)), far),
        (Segment(Identity(), Identity(), Visible(0, 6)), Segment(Constant(5), Constant(0), Visible(6), choice=Choice(Spy(7), 2, 4))),  # chosen too early
        (Segment(Identity(), Identity(), Visible(0, 6)), Segment(Identity(), Identity(), Visible(6), choice=Choice(Spy(5), 2, 4))),
    ):
        with pytest.raises(ValueError, match="masses are counted of raw keys"):
            Layout((near, behind))


# -- a pure function of the sequence -----------------------------------------------------------------------------------------------------


def summaries(cache: Any, row: int = 0) -> list[torch.Tensor]:
    """Of every layer, all that is complete."""
    store = store_of(cache)
    found = []
    for layer, forms in zip(store.layers, store.forms):
        (form,) = (form for form in forms if isinstance(form, Summary))
        found.append(layer.summaries(form, slice(row, row + 1), forms[form].entries(store.lengths[row])))
    return found


def decode(model: Any, ids: torch.Tensor, cache: Any, start: int, stop: int) -> torch.Tensor:
    return torch.cat([model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(start, stop)], 1)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    for ours, theirs in zip(a, b, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("method", [METHOD, HEAD], ids=str)
@torch.no_grad()
def test_any_way_of_reading_the_same_forwards_gives_the_same_summaries(method):
    """Chunks at multiples of the cut, a crop and the same tokens again, a crop behind what bounded forms have moved, forks, and a document."""
    model, ids, other = build("llama"), tokens(1, 420), tokens(1, 420, seed=3)
    with longreach.extend(model, method):
        want = DynamicCache()
        model(ids[:, :320], past_key_values=want, use_cache=True)
        logits = decode(model, ids, want, 320, 420)
        made = summaries(want)
        assert made[0].shape[2] > 75
        for cuts in ([8, 160, 152], [64] * 5, [304, 16]):
            cache, start = DynamicCache(), 0
            for size in cuts:
                model(ids[:, start : start + size], past_key_values=cache, use_cache=True)
                start += size
            assert difference(decode(model, ids, cache, 320, 400), logits[:, :80]) <= 1e-5
            for back in (1, 9, 70):
                decode(model, other, cache, 400, 410)
                cache.crop(400 - back)
                assert difference(decode(model, ids, cache, 400 - back, 400), logits[:, 80 - back : 80]) <= 1e-5
            assert difference(decode(model, ids, cache, 400, 420), logits[:, 80:]) <= 1e-5
            same(summaries(cache), made)


@torch.no_grad()
def test_forks_and_documents_go_on_with_their_masses(tmp_path):
    model, ids, other = build("llama"), tokens(1, 420), tokens(1, 420, seed=3)
    with longreach.extend(model, METHOD) as extension:
        cache = DynamicCache()
        model(ids[:, :320], past_key_values=cache, use_cache=True)
        decode(model, ids, cache, 320, 335)
        twin, third = extension.fork(cache), extension.fork(cache)
        extension.save(cache, tmp_path / "book", ids[:, :335])
        logits, made = decode(model, ids, cache, 335, 400), summaries(cache)
        decode(model, other, third, 335, 350)
        loaded = extension.load(tmp_path / "book").cache
        for each in (twin, loaded):
            assert difference(decode(model, ids, each, 335, 400), logits) <= 1e-5
            same(summaries(each), made)
        extension.save(loaded, tmp_path / "book", ids[:, :400])
        again = extension.load(tmp_path / "book").cache
        same(summaries(again), made)
        assert difference(decode(model, other, again, 400, 410), decode(model, other, cache, 400, 410)) <= 1e-5


@pytest.mark.parametrize("family", ["llama", "gpt-oss", "gemma2"])
@torch.no_grad()
def test_rows_of_a_batch_and_requests_are_as_if_they_were_alone(family):
    """Left pads, rows that decode together at other lengths, blocks that are complete at other times."""
    lengths, model = [150, 61, 24, 333], build(family)
    texts = [tokens(1, n + 40, seed=n)[0] for n in lengths]
    with longreach.extend(model, METHOD) as extension:
        alone = [DynamicCache() for _ in texts]
        want = []
        for cache, text, n in zip(alone, texts, lengths):
            model(text[None, :n], past_key_values=cache, use_cache=True)
            want.append(decode(model, text[None], cache, n, n + 40)[0])
        width = max(lengths)
        ids = torch.stack([torch.nn.functional.pad(text[:n], (width - n, 0)) for text, n in zip(texts, lengths)])
        mask = torch.stack([torch.nn.functional.pad(torch.ones(n, dtype=torch.long), (width - n, 0)) for n in lengths])
        together = DynamicCache()
        model(ids, attention_mask=mask, past_key_values=together, use_cache=True)
        flat = extension.flat()
        names = [flat.join() for _ in texts]
        flat.read({name: text[:n] for name, text, n in zip(names, texts, lengths)}, "none")
        for step in range(40):
            new = torch.stack([text[n + step, None] for text, n in zip(texts, lengths)])
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            logits = model(new, attention_mask=mask, past_key_values=together, use_cache=True).logits
            found = flat.read(dict(zip(names, new)))
            for row, name in enumerate(names):
                assert difference(logits[row, -1], want[row][step]) <= 1e-5 and difference(found[name], want[row][step]) <= 1e-5, (row, step)
        if family == "llama":
            for row, cache in enumerate(alone):
                same(summaries(together, row), summaries(cache))


@torch.no_grad()
def test_a_query_from_which_something_is_hidden_pays_nothing_and_chooses_no_hidden_block():
    """The dense truth of what it is asked for later, and a fast path that equals it: chunks, decoded tokens, and the end read anew."""
    model, ids = build("llama"), tokens(2, 110)
    mask = torch.ones(2, 110, dtype=torch.long)
    mask[0, 7:19] = mask[0, 40] = mask[1, 20:33] = 0
    mask[1, 50:60] = 0  # the next tokens take the place of what is hidden at the end
    found = []
    for backend in ("reference", "auto"):
        with longreach.extend(model, METHOD, backend=backend):
            cache = DynamicCache()
            parts = [model(ids[:, :60], past_key_values=cache, use_cache=True).logits]
            for a, b in ((60, 71), *((t, t + 1) for t in range(71, 90))):
                parts.append(model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True).logits)
            mask_again = mask.clone()
            mask_again[0] = 1
            parts.append(model(ids[:, 90:], attention_mask=mask_again, past_key_values=cache, use_cache=True).logits)
            found.append(torch.cat(parts, 1))
    assert difference(found[1], found[0]) <= 1e-5


@torch.no_grad()
def test_a_forward_that_fails_leaves_no_masses(monkeypatch):
    model, ids = build("llama"), tokens(1, 120)
    with longreach.extend(model, METHOD):
        want = chunked(model, ids, [64, *[1] * 56])
        cache, parts = DynamicCache(), []
        parts.append(model(ids[:, :64], past_key_values=cache, use_cache=True).logits)
        for t in range(64, 120):
            if t % 7 == 0:
                with mock.patch.object(model.lm_head, "forward", side_effect=RuntimeError("no")), pytest.raises(RuntimeError, match="no"):
                    model(ids[:, t - 20 : t - 1], past_key_values=cache, use_cache=True)
            parts.append(model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits)
        assert difference(torch.cat(parts, 1), want) <= 1e-5
