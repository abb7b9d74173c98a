"""Flat forwards: requests that come and go, read together, equal each of them alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import longreach
from families import FAMILIES, build, tokens
from longreach import LMInfinite, SelfExtend, Stock
from methods_matrix import METHODS, context, refusal, slow_truths

INVARIANT = [m for m in METHODS if m.cut == 1 and m.eviction is None]
LONGEST = 700


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).float().abs().max() / b.float().abs().max()).item()


@torch.no_grad()
def alone(model: Any, text: torch.Tensor) -> torch.Tensor:
    return model(text[None], use_cache=False).logits[0]


class Requests:
    """What is read of every request, beside the requests."""

    def __init__(self, extension: Any, seed: int) -> None:
        self.model, self.flat, self.random, self.seeds = extension.model, extension.flat(), random.Random(seed), iter(range(100, 10_000))
        self.texts: dict[int, torch.Tensor] = {}

    def fresh(self, count: int) -> torch.Tensor:
        return tokens(1, count, seed=next(self.seeds))[0]

    def join(self) -> int:
        request = self.flat.join()
        self.texts[request] = torch.empty(0, dtype=torch.long)
        return request

    def read(self, counts: dict[int, int], logits: str = "last", limit: float = 1e-5) -> None:
        new = {request: self.fresh(count) for request, count in counts.items()}
        found = self.flat.read(new, logits)
        for request, text in new.items():
            before = len(self.texts[request])
            self.texts[request] = torch.cat([self.texts[request].to(text.device), text])
            assert self.flat.length(request) == len(self.texts[request])
            if logits != "none":
                want = alone(self.model, self.texts[request])
                assert off(found[request], want[-1] if logits == "last" else want[before:]) <= limit, (request, counts)

    def step(self) -> str:
        """Something that a scheduler does."""
        known = list(self.texts)
        what = self.random.choice(["join", "read", "read", "decode", "decode", "decode", "fork", "crop", "leave"])
        if what == "join" or not known:
            self.join()
        elif what == "leave" and len(known) > 1:
            gone = self.random.choice(known)
            self.flat.leave(gone)
            del self.texts[gone]
        elif what == "fork" and len(known) < 7:
            old = self.random.choice(known)
            self.texts[self.flat.fork(old)] = self.texts[old].clone()
        elif what == "crop":
            old = self.random.choice(known)
            length = max(0, len(self.texts[old]) - self.random.randint(1, 100))
            try:
                self.flat.crop(old, length)
            except ValueError as error:  # a bounded method, cropped twice
                assert "can be forgotten" in str(error) and self.flat.length(old) == len(self.texts[old])
            else:
                self.texts[old] = self.texts[old][:length]
        else:
            some = self.random.sample(known, self.random.randint(1, len(known)))
            sizes = [1] if what == "decode" else [1, 2, 9, 70, 300]
            counts = {request: self.random.choice(sizes) for request in some}
            counts = {request: n for request, n in counts.items() if len(self.texts[request]) + n <= LONGEST}
            self.read(counts or {some[0]: 1}, self.random.choice(["last", "all"]))
        return what


@pytest.mark.parametrize("method", slow_truths(INVARIANT), ids=str)
def test_requests_that_come_and_go_are_as_if_alone(method):
    model = build("llama-head8" if refusal("llama", method) else "llama")
    with longreach.extend(model, method, context=context(method, LONGEST + 50)) as extension:
        requests = Requests(extension, seed=INVARIANT.index(method))
        for _ in range(30):
            requests.step()
        assert sorted(requests.flat.requests) == sorted(requests.texts)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_more_of_them(seed):
    method = [SelfExtend(3, 8), LMInfinite(9, 3), Stock()][seed % 3]
    with longreach.extend(build("llama"), method, trained_window=4096) as extension:
        requests = Requests(extension, seed)
        for _ in range(120):
            requests.step()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact_or_refused(family):
    model = build(family)
    with longreach.extend(model, Stock(), trained_window=4096) as extension:
        try:
            requests = Requests(extension, seed=1)
        except ValueError as error:
            assert "read them one by one" in str(error) or "read requests one by one" in str(error)
            return
        a, b, c = requests.join(), requests.join(), requests.join()
        requests.read({a: 33, b: 5})
        requests.read({a: 1, b: 1, c: 17})
        requests.read({a: 1, b: 1, c: 1})
        requests.read({b: 4, c: 1}, "all")


def test_in_half_precision():
    with longreach.extend(build("llama", torch.bfloat16), SelfExtend(3, 8)) as extension:
        requests = Requests(extension, seed=1)
        a, b = requests.join(), requests.join()
        requests.read({a: 300, b: 5}, limit=6e-2)
        requests.read({a: 1, b: 1}, limit=6e-2)


def test_a_forward_that_breaks_off_has_read_nothing():
    model = build("llama")
    with longreach.extend(model, LMInfinite(9, 3)) as extension:
        requests = Requests(extension, seed=3)
        a, b = requests.join(), requests.join()
        requests.read({a: 250, b: 40})

        def broken(*anything: Any) -> None:
            raise KeyboardInterrupt

        for layer in model.model.layers:
            hook = layer.self_attn.register_forward_hook(broken)
            with pytest.raises(KeyboardInterrupt):
                requests.flat.read({a: tokens(1, 3)[0], b: tokens(1, 1)[0]})
            hook.remove()
            assert (requests.flat.length(a), requests.flat.length(b)) == (250, 40)
        requests.read({a: 1, b: 1})
        model(tokens(1, 30))  # an ordinary forward between them disturbs nothing
        requests.read({a: 1, b: 9})


def test_a_bounded_method_holds_bounded_memory():
    with longreach.extend(build("llama"), LMInfinite(9, 3)) as extension:
        flat = extension.flat()
        a, b = flat.join(), flat.join()
        sizes = set()
        for _ in range(6):
            flat.read({a: tokens(1, 200)[0], b: tokens(1, 300)[0]}, "none")
            sizes.add(flat.nbytes)
        assert len(sizes) == 1
        flat.leave(a)
        assert flat.nbytes < max(sizes)


def test_what_cannot_be_is_refused():
    model = build("llama")
    with longreach.extend(model, LMInfinite(9, 3)) as extension:
        flat = extension.flat()
        a = flat.join()
        for new in ({}, {a: []}):
            with pytest.raises(ValueError, match="at least one new token of each"):
                flat.read(new)
        with pytest.raises(ValueError, match=r"there is no request 99 .* join\(\) makes one"):
            flat.read({99: [1]})
        flat.read({a: tokens(1, 400)[0]})
        with pytest.raises(ValueError, match=r"the last 1\d\d can be forgotten"):
            flat.crop(a, 10)
        with pytest.raises(ValueError, match="pass a length from 0 to that"):
            flat.crop(a, 401)
        flat.leave(a)
        with pytest.raises(ValueError, match="there is no request"):
            flat.length(a)
        assert flat.requests == [] and flat.join() != a
    with pytest.raises(ValueError, match="taken off"):
        extension.flat()
