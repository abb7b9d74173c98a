"""Forks read what they have in common from one frozen base, and go on in tails of their own: exact, and the text is held once."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import longreach
from families import build, tokens
from longreach import LMInfinite, Quest, SelfExtend, Stock
from longreach.engine import chosen
from longreach.hf.cache import cache_bytes, store_of
from longreach.kernels.cpu import CpuKernel
from longreach.kernels.protocol import Spans
from longreach.memory import placement
from methods_matrix import METHODS, context, refusal
from test_flat import Requests, alone

READ, MOST = 230, 300
INVARIANT = [m for m in METHODS if m.cut == 1 and m.eviction is None]
KINDS = [type(m) for m in INVARIANT]
ONE_OF_EACH = [m if n == KINDS.index(type(m)) and type(m) is not longreach.InfLLM else pytest.param(m, marks=pytest.mark.slow) for n, m in enumerate(INVARIANT)]


@pytest.fixture(autouse=True)
def share_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "COPIED", 16)


class Talk:
    """A cache of some rows, and the tokens that each has read."""

    def __init__(self, model: Any, cache: Any, texts: list[torch.Tensor]) -> None:
        self.model, self.cache, self.texts = model, cache, texts

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, lengths: list[int], seed: int = 5) -> Talk:
        texts = [tokens(1, n, seed=seed + row)[0] for row, n in enumerate(lengths)]
        ids = torch.stack([F.pad(text, (max(lengths) - len(text), 0)) for text in texts])
        cache = model(ids, attention_mask=cls.mask_of(ids, texts), use_cache=True).past_key_values
        return cls(model, cache, texts)

    @staticmethod
    def mask_of(ids: torch.Tensor, texts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - len(text)).long() for text in texts])

    def fork(self, extension: Any = None) -> Talk:
        return Talk(self.model, copy.deepcopy(self.cache) if extension is None else extension.fork(self.cache), [*self.texts])

    @torch.no_grad()
    def read(self, count: int, seed: int, limit: float = 1e-5) -> torch.Tensor:
        new = tokens(len(self.texts), count, seed=seed)
        real = store_of(self.cache).real
        mask = torch.ones(len(self.texts), store_of(self.cache).seen, dtype=torch.long) if real is None else real.long()
        logits = self.model(new, attention_mask=F.pad(mask, (0, count), value=1).to(new.device), past_key_values=self.cache).logits
        for row, text in enumerate(self.texts):
            self.texts[row] = torch.cat([text, new[row]])
            want = alone(self.model, self.texts[row])[-count:]
            assert ((logits[row] - want).float().abs().max() / want.float().abs().max()).item() <= limit, (row, count)
        return logits


def bodies(cache: Any) -> set[int]:
    """Where all lies that is kept of every token, own tails left out."""
    buffers = [b for layer in store_of(cache).layers for b in layer.buffers if b.placement.tail is None]
    return {f.entries.data_ptr() for b in buffers for f in b.bases.values()} or {body.data_ptr() for b in buffers for body in b.bodies.values()}


def extended(method: Any, longest: int = 500) -> Any:
    return longreach.extend(build("llama-head8" if refusal("llama", method) else "llama"), method, context=context(method, longest))


@pytest.mark.parametrize("method", ONE_OF_EACH, ids=str)
def test_forks_of_forks_in_turns_are_as_if_alone(method):
    with extended(method) as extension:
        first = Talk.of(extension.model, [READ, 90])
        talks = [first, first.fork(extension), first.fork()]
        for seed in (40, 41):
            for number, talk in enumerate(talks):
                talk.read(1 if seed == 40 else 20, seed + 10 * number)
        talks.append(talks[1].fork(extension))  # its tail is long enough to be frozen too
        talks.append(talks[-1].fork(extension))
        for seed, count in ((70, 1), (71, 9), (72, 1)):
            for number, talk in enumerate(talks):
                talk.read(count, seed + 10 * number)
        if None in store_of(first.cache).placements:  # a form that keeps every token
            assert [len(store_of(talk.cache).placements[None].shares[0]) for talk in talks] == [1, 2, 1, 2, 2]


@pytest.mark.parametrize("method", [SelfExtend(3, 8), LMInfinite(9, 3)], ids=str)
@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "gptj", "deepseek-v3", "falcon-alibi", "bloom", "phi3", "qwen3"])
def test_in_other_families(family, method):
    if refusal(family, method):
        pytest.skip("refused")
    with longreach.extend(build(family), method, context=context(method, 500)) as extension:
        one = Talk.of(extension.model, [200])
        other = one.fork(extension)
        other.cache.batch_repeat_interleave(3)
        other.texts = other.texts * 3
        for talk in (one, other):
            talk.read(9, 50)
            talk.read(1, 51)


def test_in_half_precision():
    with longreach.extend(build("llama", torch.bfloat16), SelfExtend(3, 8)) as extension:
        one = Talk.of(extension.model, [READ])
        for talk in (one, one.fork()):
            talk.read(9, 50, limit=6e-2)
            talk.read(1, 51, limit=6e-2)


@pytest.mark.parametrize("method", [SelfExtend(3, 8), LMInfinite(9, 3), Stock()], ids=str)
def test_twenty_forks_hold_the_document_once(method):
    with longreach.extend(build("llama"), method, trained_window=4096) as extension:
        document = Talk.of(extension.model, [2000])
        alone_bytes, where = cache_bytes(document.cache), bodies(document.cache)
        forks = [document.fork(extension) for _ in range(20)]
        assert cache_bytes(document.cache, *(fork.cache for fork in forks)) == alone_bytes
        for number, fork in enumerate(forks[:3]):
            fork.read(1, 60 + number)
        for fork in forks[3:]:
            with torch.no_grad():
                fork.model(tokens(1, 1), past_key_values=fork.cache)
        together = cache_bytes(document.cache, *(fork.cache for fork in forks))
        if not method.bounded:
            assert bodies(document.cache) == where and all(bodies(fork.cache) == where for fork in forks)
            assert together < 3 * alone_bytes  # each has a tail of 65 columns, and what is bounded
        own = [cache_bytes(document.cache, fork.cache) - cache_bytes(document.cache) for fork in forks]
        assert together == alone_bytes + sum(own) and max(own) == min(own)
        document.read(1, 90)  # the original is a fork like the others now
        if not method.bounded:
            assert bodies(document.cache) == where


def test_memory_goes_with_the_last_who_reads_it():
    with longreach.extend(build("llama"), Stock(), trained_window=4096) as extension:
        document = Talk.of(extension.model, [READ])
        (body,) = store_of(document.cache).layers[0].whole.bodies.values()
        held = weakref.ref(body)
        del body
        fork = document.fork(extension)
        fork.read(1, 50)
        fork.read(1, 51)
        del document
        gc.collect()
        assert held() is not None
        fork.read(1, 52)
        fork.cache.crop(-fork.cache.get_seq_length())
        fork.texts = [text[:0] for text in fork.texts]
        fork.read(5, 53)
        gc.collect()
        assert held() is None and store_of(fork.cache).placements[None].bases == frozenset()


def test_whoever_is_left_alone_writes_where_he_is():
    with longreach.extend(build("llama"), SelfExtend(3, 8)) as extension:
        document = Talk.of(extension.model, [READ])
        where = bodies(document.cache)
        fork = document.fork(extension)
        fork.read(1, 50)
        shares = store_of(document.cache).placements[None].shares
        del fork
        gc.collect()
        document.read(1, 51)
        assert bodies(document.cache) == where and shares == [()]


@pytest.mark.parametrize("method", [SelfExtend(3, 8), SelfExtend(4, 16), Stock(), LMInfinite(9, 3, top_k=2, top_k_from_layer=0, top_k_rows="all")], ids=str)
def test_a_crop_below_the_base_copies_nothing_and_touches_nobody(method):
    with longreach.extend(build("llama"), method, trained_window=4096) as extension:
        document = Talk.of(extension.model, [READ])
        fork, third = document.fork(extension), document.fork(extension)
        fork.read(5, 50)
        where = bodies(fork.cache)
        fork.cache.crop(-45)
        fork.texts = [text[:-45] for text in fork.texts]
        assert bodies(fork.cache) == where and store_of(fork.cache).placements[None].shares[0][0].stop == READ - 40
        fork.read(30, 51)
        assert bodies(fork.cache) == where
        for talk in (document, third, fork):
            talk.read(1, 52)
        before = document.fork(extension)
        document.cache.crop(-3)  # the original, too, and its fork sees it longer
        document.texts = [text[:-3] for text in document.texts]
        document.read(8, 53)
        before.read(4, 54)


@pytest.mark.parametrize("hidden", [(40, 60), (215, 233), (110, 233), (220, 232)])
@torch.no_grad()
def test_masks_hide_tokens_of_the_base(hidden):
    """In the middle, and at the end: there the next token takes the place of the first that is hidden, in a tail of its own."""
    with longreach.extend(build("llama"), SelfExtend(3, 8)) as extension:
        document = Talk.of(extension.model, [READ, READ])
        fork = document.fork(extension)
        fork.read(3, 50)
        mask = torch.ones(2, READ + 3, dtype=torch.long)
        mask[0, slice(*hidden)] = 0
        for count in (1, 6, 1):
            new, mask = tokens(2, count, seed=51), F.pad(mask, (0, count), value=1)
            logits = fork.model(new, attention_mask=mask.to(new.device), past_key_values=fork.cache).logits
            fork.texts = [torch.cat([text, row]) for text, row in zip(fork.texts, new)]
        want = alone(fork.model, fork.texts[1])[-1]
        assert (logits[1, -1] - want).abs().max() <= 1e-5 * want.abs().max()
        if hidden[1] == READ + 3:
            want = alone(fork.model, torch.cat([fork.texts[0][: hidden[0]], fork.texts[0][hidden[1] :]]))[-1]
            assert store_of(fork.cache).placements[None].shares[0][0].stop == min(READ, hidden[0])
        else:
            cache = extension.model(fork.texts[0][None, : READ + 3], use_cache=True).past_key_values
            text, own = fork.texts[0][None, READ + 3 :], mask[:1, : READ + 3]
            for a, b in ((0, 1), (1, 7), (7, 8)):
                own = F.pad(own, (0, b - a), value=1)
                want = extension.model(text[:, a:b], attention_mask=own.to(text.device), past_key_values=cache).logits[0, -1]
        assert (logits[0, -1] - want).abs().max() <= 1e-5 * want.abs().max()
        document.read(2, 55)


@pytest.mark.parametrize("method", [SelfExtend(3, 8), LMInfinite(9, 3)], ids=str)
def test_a_forward_that_fails_leaves_every_fork_as_it_was(method):
    with longreach.extend(build("llama"), method) as extension:
        document = Talk.of(extension.model, [READ, 100])
        fork = document.fork(extension)

        def broken(*anything: Any) -> None:
            raise KeyboardInterrupt

        for layer in extension.model.model.layers:
            for talk in (fork, document):
                hook = layer.self_attn.register_forward_hook(broken)
                with pytest.raises(KeyboardInterrupt):
                    talk.read(7, 50)
                hook.remove()
                assert store_of(talk.cache).lengths == [len(text) for text in talk.texts]
        for talk in (fork, document, fork.fork(extension)):
            talk.read(3, 51)
            talk.read(1, 52)


@pytest.mark.parametrize("method", [SelfExtend(3, 8), LMInfinite(9, 3), Stock()], ids=str)
def test_rows_that_are_repeated_and_reordered_share(method):
    """Beam search on a fork, and on a cache that was never forked."""
    with longreach.extend(build("llama"), method, trained_window=4096) as extension:
        document = Talk.of(extension.model, [READ, 60])
        fork, own = document.fork(extension), Talk.of(extension.model, [READ, 60])
        for talk in (fork, own):
            before = cache_bytes(talk.cache)
            talk.cache.batch_repeat_interleave(4)
            talk.texts = [text for text in talk.texts for _ in range(4)]
            for step, index in enumerate(([0, 0, 3, 2, 5, 5, 4, 6], [1, 3, 3, 0, 7, 7, 7, 4], [0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 1])):
                talk.read(1, 60 + step)
                talk.cache.reorder_cache(torch.tensor(index))
                talk.texts = [talk.texts[row] for row in index]
                if step == 0 and not method.bounded:
                    assert len(store_of(talk.cache).placements[None].bases) == 1 and cache_bytes(talk.cache) < 4 * before
            talk.read(5, 70)
            talk.read(1, 71)
        document.read(2, 72)


def test_a_saved_fork_is_whole(tmp_path):
    with longreach.extend(build("llama"), SelfExtend(3, 8)) as extension:
        fork = Talk.of(extension.model, [READ, 90]).fork(extension)
        other = fork.fork(extension)
        fork.read(3, 50)
        fork.cache.crop(-5)  # below the base
        fork.texts = [text[:-5] for text in fork.texts]
        fork.read(4, 51)
        other.read(1, 52)
        bases = store_of(fork.cache).placements[None].bases
        extension.save(fork.cache, tmp_path / "document.safetensors")
        loaded = Talk(extension.model, extension.load(tmp_path / "document.safetensors").cache, [*fork.texts])
        assert bases and not store_of(loaded.cache).placements[None].bases
        for talk in (loaded, fork):
            talk.read(3, 53)
            talk.read(1, 54)


def test_saving_and_trying_freeze_nothing(tmp_path):
    with longreach.extend(build("llama"), SelfExtend(3, 8)) as extension:
        document = Talk.of(extension.model, [READ])
        where = bodies(document.cache)
        extension.save(document.cache, tmp_path / "document.safetensors")
        document.fork(extension).read(1, 50)
        gc.collect()
        document.read(1, 51)
        assert bodies(document.cache) == where and not store_of(document.cache).placements[None].bases


def test_what_is_short_is_copied(monkeypatch):
    monkeypatch.setattr(placement, "COPIED", READ + 1)
    with longreach.extend(build("llama"), SelfExtend(3, 8)) as extension:
        document = Talk.of(extension.model, [READ])
        fork = document.fork(extension)
        fork.read(1, 50)
        assert bodies(fork.cache) != bodies(document.cache) and not store_of(fork.cache).placements[None].bases
        document.read(1, 51)


# -- flat forwards ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ONE_OF_EACH, ids=str)
def test_requests_that_fork_are_as_if_alone(method):
    with extended(method, 750) as extension:
        requests = Requests(extension, seed=INVARIANT.index(method) + 50)
        document, other = requests.join(), requests.join()
        requests.read({document: 200, other: 190})
        forks = [requests.flat.fork(document) for _ in range(3)]
        for fork in forks:
            requests.texts[fork] = requests.texts[document].clone()
        requests.read({document: 1, other: 1, **dict.fromkeys(forks, 1)})
        requests.read({forks[0]: 30, forks[1]: 1, other: 3})
        second = requests.flat.fork(forks[0])
        requests.texts[second] = requests.texts[forks[0]].clone()
        requests.flat.crop(forks[1], 150)
        requests.texts[forks[1]] = requests.texts[forks[1]][:150]
        requests.read({document: 1, **dict.fromkeys(forks, 1), second: 1})
        requests.flat.leave(document)
        del requests.texts[document]
        for _ in range(15):
            requests.step()


def test_forks_of_one_document_choose_in_one_go(monkeypatch):
    """A fork of a fork holds more that is shared, so it chooses apart."""
    real, members = chosen.ask, []

    def ask(layer: Any, segment: Any, source: Any, q: torch.Tensor, *more: Any) -> Any:
        members.append(q.shape[0])
        return real(layer, segment, source, q, *more)

    with longreach.extend(build("llama"), Quest(48, 16, 0, "all"), trained_window=4096) as extension:
        requests = Requests(extension, seed=3)
        document = requests.join()
        requests.read({document: 650})
        forks = [requests.flat.fork(document) for _ in range(5)]
        requests.texts |= {fork: requests.texts[document].clone() for fork in forks}
        requests.read(dict(zip(forks, (1, 2, 5, 1, 40))))
        monkeypatch.setattr(chosen, "ask", ask)
        layers = len(extension.layers)
        requests.flat.read(new := {fork: requests.fresh(1) for fork in forks})
        assert members == [5] * layers
        requests.texts |= {fork: torch.cat([requests.texts[fork], new[fork]]) for fork in forks}
        requests.read(dict.fromkeys(forks, 1))
        grown = requests.flat.fork(forks[4])
        requests.texts[grown] = requests.texts[forks[4]].clone()
        requests.read(dict.fromkeys((*forks, grown), 1))


@pytest.mark.parametrize("method", [SelfExtend(3, 8), Stock()], ids=str)
def test_a_base_is_one_call_of_a_segment_for_all_who_read_it(method, monkeypatch):
    real, works = CpuKernel.attend, []

    def attend(self: CpuKernel, q: torch.Tensor, kv: Any, work: Any, *more: Any) -> Any:
        works.append((q.shape[0], q.shape[2], kv.k.shape[2], work))
        return real(self, q, kv, work, *more)

    with longreach.extend(build("llama"), method, trained_window=4096) as extension:
        requests = Requests(extension, seed=1)
        document = requests.join()
        requests.read({document: 650})
        before = requests.flat.nbytes
        forks = [requests.flat.fork(document) for _ in range(20)]
        for fork in forks:
            requests.texts[fork] = requests.texts[document].clone()
        requests.read({fork: 12 for fork in forks[:2]})
        requests.read(dict.fromkeys([document, *forks], 1))
        assert requests.flat.nbytes < 8 * before  # tails, and what is bounded
        monkeypatch.setattr(CpuKernel, "attend", attend)
        requests.flat.read({request: [5] for request in (document, *forks)})
        monkeypatch.undo()
        layers = extension.facts.layers
        far = [work for work in works if not isinstance(work[3], Spans)]
        assert {(rows, queries) for rows, queries, _, _ in far} == {(1, 21)} and min(work[2] for work in far) > 600
        assert len(far) == len(layers)  # each key of the document is read once a layer
        assert all(work[3].reach[1] - work[3].reach[0] <= 64 for work in works if work not in far)  # tails, and what only some see of the document
        assert len(works) <= len(layers) * 2 * (3 + 1)


def test_what_leaves_gives_back_what_only_it_has_read():
    with longreach.extend(build("llama"), Stock(), trained_window=4096) as extension:
        flat = extension.flat()
        document, other = flat.join(), flat.join()
        flat.read({document: tokens(1, 600)[0], other: tokens(1, 590)[0]}, "none")
        fork = flat.fork(document)
        flat.read({fork: [5], document: [6], other: [7]}, "none")
        both = flat.nbytes
        flat.leave(other)
        assert flat.nbytes < both - 590 * flat._store.layers[0].whole.bodies[0].shape[1] * 8  # the long row that nobody shares
        flat.leave(document)
        assert len(flat._store.placements[None].bases) == 1
        flat.leave(fork)
        assert flat.nbytes == 0
