"""The pool when something goes wrong while blocks move: an interrupt at any line, a disk that is full or fails. No block is lost, and the forward can be
repeated."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import longreach
from families import build, tokens
from histories import constants
from longreach import Quest, SelfExtend, SirLLM, Tiered, files
from longreach.hf.cache import store_of
from longreach.memory import shelves, tiers
from longreach.memory.arenas import InFile, InMemory
from longreach.memory.shelves import Block
from longreach.memory.tiers import Pool
from test_matrix import chunked, difference
from test_tier_pool import KIND, pool, put, values
from test_tiers import budgets, checked

WATCHED = {tiers.__file__, shelves.__file__}  # not of a `with` that holds a lock: no signal comes between its body and its end, as a trace does


class Raised(KeyboardInterrupt):
    pass


@contextmanager
def interrupted(at: int, raised: list[int], where: set[str] = WATCHED) -> Iterator[None]:
    """An interrupt before the line of these files that is the `at`th to run."""
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in where or frame.f_code.co_name == "__del__":  # there Python itself swallows it
            return None
        if event == "line":
            count += 1
            if count == at:
                raised.append(frame.f_lineno)
                raise Raised
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def whole(of: Pool, blocks: list[Block]) -> None:
    """Every slot is of one block or free, the books say what the entries say, and every block holds its value."""
    assert values(of, blocks) == list(range(len(blocks)))
    for shelf in of._shelves[KIND]:
        taken = [slot for block in blocks if (slot := block.entry.slots[shelf.tier]) is not None]
        assert sorted([*taken, *shelf.free]) == list(range(shelf.begun))
        assert set(shelf.only) == {block.entry for block in blocks if block.entry.tier == shelf.tier}
        assert set(shelf.copies) == {block.entry for block in blocks if block.entry.tier < shelf.tier and block.entry.slots[shelf.tier] is not None}
    assert sum(len(shelf.only) for shelf in of._shelves[KIND]) == len(blocks)


@pytest.mark.parametrize("policy", ["lru", pytest.param("mass", marks=pytest.mark.slow)])
def test_an_interrupt_at_any_line_loses_no_block(tmp_path, policy):
    """All tiers are full but for the one slot: new blocks, blocks that come to the device, and blocks that nobody holds any more."""
    at, done = 0, False
    while not done:
        at += 1
        of, raised = pool(tmp_path, 3, 2, 5, policy=policy), []
        blocks = [put(of, n) for n in range(8)]
        gone = put(of, 99)

        def work(of: Pool = of, blocks: list[Block] = blocks) -> None:
            of.on_device([blocks[0], blocks[3], blocks[1]])
            if len(blocks) < 9:
                blocks.append(put(of, 8))
            of.on_device([blocks[4], blocks[2]])

        del gone
        try:
            with interrupted(at, raised):
                work()
        except Raised:
            pass
        done = not raised
        work()
        whole(of, blocks)
        slots = of.on_device([blocks[5], blocks[0], blocks[6]])
        assert of.arena(KIND)[slots, 0, 0, 0].tolist() == [5, 0, 6]
        whole(of, blocks)
        of.close()
    assert at > 200, "the work has many lines"


def failing(what: str, kind: type, at: int, error: Callable[[], BaseException], torn: bool = False) -> tuple[Callable[..., Any], list[int]]:
    """A method of an arena that fails when it is called for the `at`th time, `torn`: with half of it done."""
    real, calls = getattr(kind, what), [0]

    def call(arena: Any, slot: int, entries: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == at:
            if torn:
                half = entries.clone()
                half[..., : half.shape[-1] // 2] = -1
                real(arena, slot, half)
            with files.said(Path("spill")):
                raise error()  # a new one: it would hold the frames, and with them the cache
        real(arena, slot, entries)

    return call, calls



def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


FAULTS = [(InFile, "write", full), (InFile, "write", broken), (InFile, "read", broken), (InMemory, "write", KeyboardInterrupt), (InMemory, "read", broken)]


@pytest.mark.parametrize(("kind", "what", "error"), FAULTS, ids=lambda x: getattr(x, "__name__", None) or str(x))
def test_a_transfer_that_fails_can_be_repeated(tmp_path, monkeypatch, kind, what, error):
    at, done = 0, False
    while not done:
        at += 1
        of = pool(tmp_path, 3, 2, 5)
        blocks = [put(of, n) for n in range(9)]
        wanted = [[0, 1, 2], [3, 0], [8, 4, 7], [5, 6]]
        with monkeypatch.context() as patched:
            call, calls = failing(what, kind, at, error, torn=what == "write")
            patched.setattr(kind, what, call)
            for some in wanted:
                try:
                    of.on_device([blocks[n] for n in some])
                except (ValueError, KeyboardInterrupt) as raised:
                    assert isinstance(raised, KeyboardInterrupt) or "cannot be written" in str(raised)
                    whole(of, blocks)
                    slots = of.on_device([blocks[n] for n in some])
                    assert of.arena(KIND)[slots, 0, 0, 0].tolist() == some
            done = calls[0] < at
        whole(of, blocks)
        of.close()
    assert at > 2 or what == "read"


@torch.no_grad()
def test_a_forward_that_was_broken_off_while_blocks_moved_can_be_repeated(tmp_path, monkeypatch):
    """Whatever has failed, the same tokens give the same bits afterwards, in this cache and in others."""
    model, ids = build("llama"), tokens(1, 120)
    method = Quest(16, 16, 0, "all")

    def read(extension: Any, patch: Callable[[], None] = lambda: None) -> tuple[torch.Tensor, int]:
        failed, found = 0, []
        cache = model(ids[:, :100], use_cache=True).past_key_values
        patch()
        for n in range(100, 106):
            while True:
                try:
                    found.append(model(ids[:, n : n + 1], past_key_values=cache).logits)
                    break
                except (ValueError, KeyboardInterrupt):
                    failed += 1
        return torch.cat(found), failed

    with constants(3, 4), longreach.extend(model, method, memory=Tiered("24KiB", "4KiB", f"{tmp_path}:1MiB", block=16), trained_window=2000) as extension:
        want, failed = read(extension)
        assert not failed
        for kind, what, error in FAULTS:
            for at in range(1, 40, 3):
                with monkeypatch.context() as patched:
                    call, calls = failing(what, kind, at, error)
                    found, failed = read(extension, lambda p=patched, k=kind, w=what, c=call: p.setattr(k, w, c))
                    assert torch.equal(found, want) and failed == (calls[0] >= at)
        checked(extension)


@pytest.mark.parametrize("method", [SelfExtend(3, 8), Quest(12, 4, 1, "all")], ids=str)
@torch.no_grad()
def test_tiers_in_bf16(tmp_path, method):
    """As far from fp32 as without tiers: parts are merged in fp32."""
    model, ids, found = build("llama", torch.bfloat16), tokens(2, 75), []
    with constants(3, 4):
        for memory in ({}, {"memory": budgets(tmp_path, 1 if method.choice is None else 8, 1, 200)}):
            with longreach.extend(model, method, trained_window=128, **memory) as extension:
                found.append(chunked(model, ids, [40, 1, 1, 9, *[1] * 24]).float())
                if memory:
                    assert checked(extension)["tiers"]["disk"]["fetched"]
        with longreach.extend(build("llama"), method, trained_window=128) as extension:
            exact = chunked(extension.model, ids, [40, 1, 1, 9, *[1] * 24])
    error = [(each - exact).pow(2).mean().sqrt().item() for each in found]
    assert 0 < error[1] <= 1.1 * error[0]


@torch.no_grad()
def test_a_method_that_evicts_over_tiers(tmp_path):
    """SirLLM's cache is bounded: it has no blocks, and is renumbered as elsewhere."""
    model, text, found = build("llama"), tokens(1, 200), []
    with constants(3, 4):
        for memory in ({}, {"memory": budgets(tmp_path, 2, 1, 20)}):
            with longreach.extend(model, SirLLM(40, 2, 8, decay=0.7), **memory) as extension:
                cache, parts, at = DynamicCache(), [], 0
                for turn in (30, 9, 17, 12, 3, 1, 26, 16, 22, 5, 40):
                    extension.turn(cache, turn)
                    for a, b in ((at, at + turn // 2), (at + turn // 2, at + turn)):
                        if a < b:
                            parts.append(model(text[:, a:b], past_key_values=cache).logits)
                    at += turn
                found.append(torch.cat(parts, 1))
                assert store_of(cache).lengths[0] <= 50
                assert not memory or checked(extension)["apart"]["tails"] > 0 == sum(tier["blocks"] for tier in checked(extension)["tiers"].values())
    assert difference(found[1], found[0]) <= 1e-5
