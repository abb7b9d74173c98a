"""Keys chosen by content: who chooses, what is clipped, and that every way of reading gives what the truth says."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

import longreach
from families import build, tokens
from longreach import Combined, InfiniteHiP, LMInfinite, Quest, Stock, YaRN
from longreach.core.choice import Choice, Index, Past
from longreach.core.dense import Dense
from longreach.core.segments import PLAIN, Affine, Constant, Identity, Layout, Rank, Segment, Visible
from longreach.engine import chosen, executor
from longreach.methods.base import Method
from longreach.running.prefix import Prefix
from test_matrix import chunked, difference

DECODED = Quest(16, 4, 0)
CUTS = [40, *[1] * 20, 2, *[1] * 13]


@dataclass(frozen=True)
class Odd(Index):
    """Blocks whose number and the number of the head, or of the group, have an odd sum: the latest `keep` of them."""

    keep: int
    heads: int

    width: ClassVar[int] = 1

    def summarise(self, k: torch.Tensor) -> torch.Tensor:
        return k.mean(-2)

    def choose(self, q: torch.Tensor, past: Past) -> torch.Tensor:
        assert past.compared.shape[2] == past.candidates.shape[2] and past.compared.shape[3] == q.shape[3]
        number, head = torch.arange(past.compared.shape[2]), torch.arange(self.heads)[:, None, None]
        fits = past.candidates[:, None] & ((number + head) % 2 == 1)
        best = torch.where(fits, number, -1).sort(-1, descending=True).values[..., : self.keep]
        best[..., self.keep - 1 :].masked_fill_(past.open[:, None], -1)
        return best.expand(q.shape[0], -1, past.candidates.shape[1], -1)


@dataclass(frozen=True)
class Raw(Odd):
    frame: ClassVar[Any] = "raw"


@dataclass(frozen=True)
class Toy(Method):
    """The last `near` keys at their distance; of those before, from `first` on, the chosen blocks at half of it."""

    heads: Any = "group"
    count: int = 2  # choices of a layer
    block: int = 3
    keep: int = 3
    near: int = 7
    first: int = 2
    align: Any = None  # "left", "right": chosen keys get their place as position
    queries: int = 1  # that choose together
    lag: int = 0

    name: ClassVar[str] = "toy"
    paper: ClassVar[str] = "none"
    recalls: ClassVar[str] = "some"

    def layout(self, layer: int = 0) -> Layout:
        choice = Choice((Odd if self.align is None else Raw)(self.keep, self.count), self.keep, self.block, self.heads, queries=self.queries, lag=self.lag)
        far = Segment(Affine(0.5), Affine(0.5), Visible(self.near, first_key=self.first), choice=choice)
        if self.align is not None:
            far = replace(far, query_positions=Constant(40), key_positions=Rank(5 if self.align == "left" else 35, self.align))
        return Layout((Segment(Identity(), Identity(), Visible(0, self.near)), far))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        far = torch.where((i - j >= self.near) & (j >= self.first), (i - j) / 2, torch.nan)
        return torch.where((j <= i) & (i - j < self.near), (i - j).double(), far)

    def truth(self, dense: Dense) -> torch.Tensor:
        i, j, heads = dense.i, dense.j, dense.q.shape[1]
        head = torch.arange(self.count).repeat_interleave(heads // self.count)[:, None, None]
        block, last = (j - self.first) // self.block, i - self.near  # the last key that may be seen
        chooser = (i // self.queries * self.queries).clamp(min=max(int(i[0]), self.near + self.first))  # the first of its group that sees any
        keys = torch.where(i < chooser, last, chooser - self.near) + 1 - self.first
        full = (keys - self.lag).clamp_min(0) // self.block  # blocks
        open_ = keys > full * self.block
        latest = torch.where((full - 1 + head) % 2 == 1, full - 1, full - 2)
        among = (block <= latest) & ((block + head) % 2 == 1) & (block > latest - 2 * (self.keep - open_.long()))
        shown = (j >= self.first) & (j <= last) & (among | (block >= full))
        if self.align is not None:
            shown = shown.expand(heads, *shown.shape[-2:]) & dense.seen
            place = shown.long().cumsum(-1) - 1
            if self.align == "right":  # the last one that the first of a group sees is at 5, as the queries are at 40
                first = (torch.where(i < chooser, i, chooser) - int(i[0]))[:, 0]
                place = place + 1 - shown[..., first, :].sum(-1, keepdim=True)
            near = torch.where((j <= i) & (i - j < self.near), (i - j).double(), torch.nan)
            return torch.where(shown, 40.0 - 5 - place, near)
        return self.distances(i, j).masked_fill(~(shown | (i - j < self.near)), torch.nan)


TOYS = [Toy(), Toy("head", 4, 2, 2), Toy("layer", 1, 5, 1, 1, 0), Toy("group", 2, 1, 4, 3, 1), Toy(align="left"), Toy("head", 4, 2, 4, align="right")]
TOGETHER = [
    Toy(queries=5), Toy("head", 4, 2, 2, queries=4, lag=3), Toy("layer", 1, 5, 1, 1, 0, queries=16, lag=1), Toy(first=1, queries=3, align="left", lag=1),
    Toy("layer", 1, 2, 3, queries=200), Toy(lag=4), Toy("head", 4, 2, 3, queries=5, align="right"),
]  # fmt: skip


@pytest.mark.parametrize("toy", TOYS, ids=str)
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "gpt-oss", "phi", "gptj"])
@torch.no_grad()
def test_any_index_shows_what_it_chooses_and_the_last_block(family, toy):
    """Whole, in chunks, decoded, padded; per head, group and layer; with a gap before the last keys and a first key; ALiBi, soft-caps, sinks."""
    if family in ("bloom", "gptj", "phi"):
        toy = replace(toy, heads="layer", count=1)  # their heads and groups are others
    model, ids = build(family), tokens(2, 75)
    with longreach.extend(model, toy, backend="reference"):
        truth = model(ids, use_cache=False).logits
        assert difference(truth, model(ids[:, :40], use_cache=False).logits.repeat(1, 2, 1)[:, :75]) > 1e-3
    with longreach.extend(model, toy):
        assert difference(model(ids, use_cache=False).logits, truth) <= 1e-5
        assert difference(chunked(model, ids, [23, 1, 1, 9, 8, 1, 17, *[1] * 15]), truth) <= 1e-5
        mask = torch.ones_like(ids)
        mask[1, :11] = 0
        padded = chunked(model, ids, [40, 5, *[1] * 30], mask)
        assert difference(padded[:1], truth[:1]) <= 1e-5
        assert difference(padded[1:, 11:], model(ids[1:, 11:], use_cache=False).logits) <= 1e-5


@pytest.mark.parametrize("toy", TOGETHER, ids=str)
@pytest.mark.parametrize("family", ["llama", "bloom", "gemma2", "gpt-oss"])
@torch.no_grad()
def test_queries_that_choose_together_see_what_was_complete_for_the_first(family, toy):
    """Whole, cut anywhere (a forward has a piece of a group), decoded, padded, rows of unequal lengths that decode together."""
    if family == "bloom":
        toy = replace(toy, heads="layer", count=1)
    model, ids = build(family), tokens(2, 75)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    cuts = [23, 1, 1, 9, 8, 1, 17, *[1] * 15]
    found = []
    for backend in ("reference", "auto"):
        with longreach.extend(model, toy, backend=backend):
            found.append([model(ids, use_cache=False).logits, chunked(model, ids, cuts), chunked(model, ids, [60, *[1] * 15], mask)])
            alone = chunked(model, ids[1:, 11:], [49, *[1] * 15])
            assert difference(found[-1][2][1:, 11:], alone) <= 1e-5
    whole, cut = found[0][:2]
    assert (difference(whole, cut) > 1e-3) == (toy.queries > 1)
    for ours, truth in zip(found[1], found[0]):
        assert difference(ours[:1], truth[:1]) <= 1e-5 and difference(ours[1:, 11:], truth[1:, 11:]) <= 1e-5


@torch.no_grad()
def test_prompts_of_queries_that_choose_together_may_be_cut_between_them(monkeypatch):
    """At multiples of the group, by the caller and by the engine; the choice is made once for all of them."""
    model, ids = build("llama"), tokens(1, 75)
    toy, calls, real = Toy(queries=8), [], chosen.attend
    with longreach.extend(model, toy):
        whole = model(ids, use_cache=False).logits
        for cuts in ([8] * 8 + [11], [16, 40, 19], [64, 11]):
            assert difference(chunked(model, ids, cuts), whole) <= 1e-5
        monkeypatch.setattr(executor, "QUERIES_AT_ONCE", 13)
        monkeypatch.setattr(chosen, "attend", lambda *a: calls.append((a[0].columns.shape[2], a[0].q.shape[2])) or real(*a))
        assert difference(model(ids, use_cache=False).logits, whole) <= 1e-5
    assert calls == [(1, n) for n in (7, *[8] * 7, 3)] * model.config.num_hidden_layers  # the first token sees nothing of it, nor do the next 8


@pytest.mark.parametrize("method", [DECODED, Combined(YaRN(2.0), DECODED), LMInfinite(9, 3, top_k=2, top_k_from_layer=0)], ids=str)
@torch.no_grad()
def test_who_chooses_follows_from_the_forwards(method):
    """A forward of one token chooses; those of longer ones see all (Quest), or the last of them does (LM-Infinite)."""
    model, ids = build("llama"), tokens(2, 75)
    with longreach.extend(model, method, backend="reference"):
        truth, whole = chunked(model, ids, CUTS), model(ids, use_cache=False).logits
    assert difference(truth, whole) > 1e-3
    with longreach.extend(model, method):
        assert difference(chunked(model, ids, CUTS), truth) <= 1e-5
        assert difference(model(ids, use_cache=False).logits, whole) <= 1e-5


@torch.no_grad()
def test_a_prompt_that_is_not_cut_into_single_tokens_is_read_densely():
    model, ids = build("llama"), tokens(1, 75)
    stock = model(ids).logits
    with longreach.extend(model, DECODED, trained_window=75):
        assert difference(chunked(model, ids, [30, 2, 43]), stock) <= 1e-5
        assert difference(chunked(model, ids, [30, 1, 44]), stock) > 1e-3


@torch.no_grad()
def test_rows_of_any_lengths_choose_as_if_they_were_alone():
    """Decoded together, in buckets of keys and of summaries that need not be the same; blocks are completed on the way."""
    lengths = [1, 2, 37, 250, 257, 400, 401, 620]
    model, texts = build("llama"), [tokens(1, n + 6, seed=5 + n)[0] for n in lengths]
    with longreach.extend(model, DECODED) as extension:
        alone = []
        for text in texts:
            cache = model(text[None, :-6], use_cache=True).past_key_values
            alone.append(torch.stack([model(text[None, t : t + 1], past_key_values=cache).logits[0, -1] for t in range(len(text) - 6, len(text))]))
        flat = in_flat_forwards(extension, texts)
        width = max(lengths)
        ids = torch.stack([F.pad(text[:-6], (width - n, 0)) for text, n in zip(texts, lengths)])
        mask = torch.stack([F.pad(torch.ones(n, dtype=torch.long), (width - n, 0)) for n in lengths])
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        for step in range(6):
            mask = F.pad(mask, (0, 1), value=1)
            logits = model(torch.stack([text[step - 6, None] for text in texts]), attention_mask=mask, past_key_values=cache).logits[:, -1]
            for row, want in enumerate(alone):
                assert difference(logits[row], want[step]) <= 1e-5, (row, step)
                assert difference(flat[row][step], want[step]) <= 1e-5, (row, step)


def in_flat_forwards(extension: Any, texts: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The last six tokens of every text one by one."""
    flat = extension.flat()
    names = [flat.join() for _ in texts]
    flat.read({name: text[:-6] for name, text in zip(names, texts)}, "none")
    steps = [flat.read({name: text[step - 6, None] for name, text in zip(names, texts)}) for step in range(6)]
    return [[logits[name] for logits in steps] for name in names]


@torch.no_grad()
def test_a_decoded_token_beside_a_prompt_chooses_and_the_prompt_does_not():
    model, a, b = build("llama"), tokens(1, 60, seed=1)[0], tokens(1, 80, seed=2)[0]
    with longreach.extend(model, DECODED) as extension:
        want = [chunked(model, text[None], cuts)[0, -1] for text, cuts in ((a, [50, *[1] * 10]), (b, [40, 40]))]
        flat = extension.flat()
        one, two = flat.join(), flat.join()
        flat.read({one: a[:50]}, "none")
        for t in range(50, 59):
            flat.read({one: a[t : t + 1]}, "none")
        flat.read({two: b[:40]}, "none")
        found = flat.read({one: a[59:], two: b[40:]})
        assert difference(found[one], want[0]) <= 1e-5 and difference(found[two], want[1]) <= 1e-5


@pytest.mark.parametrize("method", [Quest(12, 4, 0, "all"), LMInfinite(9, 3, top_k=2, top_k_from_layer=0, top_k_rows="all")], ids=str)
@torch.no_grad()
def test_masks_hide_chosen_keys_and_whole_blocks(method):
    """Tokens that were read and are hidden later: some of a block, all of another, and the last ones, which are read anew."""
    model, ids = build("llama"), tokens(2, 90)
    seen = []
    for backend in ("auto", "reference"):
        with longreach.extend(model, method, backend=backend):
            cache = DynamicCache()
            model(ids[:, :60], past_key_values=cache, use_cache=True)
            mask = torch.ones(2, 90, dtype=torch.long)
            mask[0, 5:7] = mask[0, 16:24] = mask[1, 20:33] = 0
            mask[1, 50:60] = 0  # the end of the second row: its next tokens take the place of what is hidden
            parts = [model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True).logits for a, b in ((60, 71), (71, 72), (72, 90))]
            seen.append(torch.cat(parts, 1))
    assert difference(seen[0], seen[1]) <= 1e-5


@torch.no_grad()
def test_a_crop_into_a_block_makes_its_summary_anew():
    model, ids, other = build("llama"), tokens(1, 70), tokens(1, 70, seed=9)
    with longreach.extend(model, Quest(12, 4, 0, "all")):
        for stop in (31, 32, 33, 35):
            cache = DynamicCache()
            model(ids[:, :45], past_key_values=cache, use_cache=True)
            cache.crop(stop)
            found = torch.cat([model(other[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(stop, 60)], 1)
            want = model(torch.cat([ids[:, :stop], other[:, stop:60]], 1), use_cache=False).logits[:, stop:]
            assert difference(found, want) <= 1e-5, stop


@torch.no_grad()
def test_thirty_rows_choose_in_few_calls(monkeypatch):
    model, lengths = build("llama"), [20 + 3 * row for row in range(10)] + [300 + row for row in range(10)] + [450 + row for row in range(10)]
    texts, calls, real = [tokens(1, n + 2, seed=n)[0] for n in lengths], [], chosen.attend
    monkeypatch.setattr(chosen, "attend", lambda *a: calls.append(a[0].columns.shape[0]) or real(*a))
    with longreach.extend(model, DECODED) as extension:
        flat = extension.flat()
        names = [flat.join() for _ in texts]
        calls.clear()
        flat.read({name: text[:-2] for name, text in zip(names, texts)}, "none")
        assert not calls
        flat.read({name: text[-2:-1] for name, text in zip(names, texts)}, "none")
    layers = model.config.num_hidden_layers
    assert sum(calls) == 30 * layers and len(calls) == 3 * layers


@torch.no_grad()
def test_long_prompts_choose_in_parts(monkeypatch):
    """So that what is gathered at one time is bounded."""
    model, ids = build("llama"), tokens(1, 75)
    with longreach.extend(model, Quest(12, 4, 0, "all")):
        want = model(ids, use_cache=False).logits
        sizes, real = [], chosen.attend
        monkeypatch.setattr(chosen, "attend", lambda *a: sizes.append(a[0].columns.shape[2]) or real(*a))
        monkeypatch.setattr(chosen, "AT_ONCE", 2**17)
        assert difference(model(ids, use_cache=False).logits, want) <= 1e-6
    assert len(sizes) > 2 * model.config.num_hidden_layers and sum(sizes) == 75 * model.config.num_hidden_layers


def test_what_cannot_be_said_is_refused():
    index = Quest(16, 4, 0).layout(0).choice.index
    with pytest.raises(ValueError, match="index without summaries has blocks of one key"):
        Choice(LMInfinite(9, 3, top_k=2).layout(9).choice.index, 2, 4)
    for band in (Visible(0, 9), Visible(last_key=4), Visible(chunk=3), Visible(last_query=9)):
        with pytest.raises(ValueError, match="among all keys from first_key on"):
            Segment(Identity(), Identity(), band, choice=Choice(index, 2, 4))
    for wrong in (dict(queries=0), dict(lag=-1), dict(queries=2, who="single")):
        with pytest.raises(ValueError, match="leave out who, or queries"):
            Choice(index, 2, 4, **wrong)
    for wrong in ((32, 16, 5), (8, 16), (0,)):
        with pytest.raises(ValueError, match="each a multiple of the next"):
            Choice(InfiniteHiP(9, 0).layout(0).choice.index, 2, 4, refresh=wrong)
    with pytest.raises(ValueError, match="others do not"):
        Choice(index, 2, 4, refresh=(8,))
    one = Segment(Identity(), Identity(), Visible(), choice=Choice(index, 2, 4))
    with pytest.raises(ValueError, match="only the last segment of a layout may choose"):
        Layout((one, PLAIN))
    for wrong in (dict(budget=8), dict(budget=40), dict(page_size=0), dict(dense_layers=-1), dict(queries="some")):
        with pytest.raises(ValueError, match=r"budget|page_size|dense_layers|queries"):
            Quest(**wrong)


def test_a_choice_that_sees_all_is_everything():
    assert Stock().layout(3).choice is None and Quest().layout(1).choice is None and Quest().layout(2).choice is not None
    assert Quest(16, 16).pages == 3  # at least three


@torch.no_grad()
def test_a_request_that_joins_with_one_token_while_others_decode():
    """No page is completed in that forward, so nothing is written to the summaries."""
    model, texts = build("llama"), [tokens(1, n, seed=n)[0] for n in (21, 21, 1)]
    with longreach.extend(model, Quest(48, 16, 0)) as extension:
        flat = extension.flat()
        a, b = flat.join(), flat.join()
        flat.read({a: texts[0][:20], b: texts[1][:20]}, "none")
        c = flat.join()
        found = flat.read({a: texts[0][20:], b: texts[1][20:], c: texts[2]})
        for name, text, cuts in ((a, texts[0], [20, 1]), (b, texts[1], [20, 1]), (c, texts[2], [1])):
            assert difference(found[name], chunked(model, text[None], cuts)[0, -1]) <= 1e-5
        prompts = [text.tolist() for text in (tokens(1, 21)[0], tokens(1, 22)[0], tokens(1, 20)[0], texts[2])]
        assert longreach.generate(extension, prompts, 9, at_once=2) == longreach.generate(extension, prompts, 9, at_once=1)


def counted(model: Any, lengths: list[int]) -> Any:
    return model.register_forward_pre_hook(lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)


@torch.no_grad()
def test_readers_never_read_one_token_of_a_prompt_alone():
    """From the beginning and from any cache, whatever the chunk: parts begin at multiples of the cut, and the last is not shorter than it."""
    model, ids = build("llama"), tokens(1, 64)[0]
    with longreach.extend(model, DECODED) as extension:
        for held in (0, 1, 2, 7, 20):
            for length in range(held + 2, held + 14):
                for chunk in (1, 2, 3, 4, 5):
                    lengths: list[int] = []
                    cache = DynamicCache()
                    if held:
                        model(ids[None, :held], past_key_values=cache)
                    hook = counted(model, lengths)
                    list(longreach.stream(extension, ids[held:length], chunk_size=chunk, losses=False, cache=cache))
                    hook.remove()
                    ends = [held + sum(lengths[: n + 1]) for n in range(len(lengths))]
                    assert ends[-1] == length and min(lengths) >= 2 and all(end % 2 == 0 for end in ends[:-1]), (held, length, chunk, lengths)
        prefix = Prefix()
        prefix.read(extension, ids[:41].tolist())
        lengths.clear()
        hook = counted(model, lengths)
        assert prefix.read(extension, ids[:42].tolist()) == 40 and lengths == [2]
        assert prefix.read(extension, ids[:42].tolist()) == 42 and lengths == [2]
        hook.remove()


def test_what_it_recalls_depends_on_the_parameters():
    assert LMInfinite(9, top_k=2, top_k_rows="all", top_k_from_layer=3).sees.endswith("and the 2 others that each query fits best in layers from 3 on")
    assert LMInfinite(9).sees == LMInfinite.recalls == Combined(YaRN(2), LMInfinite(9)).sees
