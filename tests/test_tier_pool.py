"""The pool of blocks: which one makes room, what is written once, what is read beside what is computed, and what people may ask for."""

from __future__ import annotations

import errno
import os
import threading
from random import Random
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import longreach
from families import build, tokens
from histories import constants
from longreach import SelfExtend, Tiered, YaRN
from longreach.kernels import kernel_for
from longreach.memory import lane
from longreach.memory.arenas import InFile, Kind, runs
from longreach.memory.shelves import Block
from longreach.memory.tiers import Pool
from test_matrix import difference
from test_tiers import UNIT, budgets

KIND = Kind((1, 2, 4), torch.float32, torch.device("cpu"))


def pool(folder: Any, device: int, host: int = 0, disk: int = 0, **more: Any) -> Pool:
    of = [n * KIND.nbytes for n in (device, host, disk)]
    return Pool(Tiered(of[0], of[1] or None, f"{folder}:{of[2]}" if disk else None, block=2, **more), {KIND: 1})


def put(of: Pool, value: int) -> Block:
    of.require(1)
    return of.put(KIND, torch.full(KIND.shape, float(value)))


def where(of: Pool, block: Block) -> list[str]:
    return [name for name, slot in zip(of.names, block.entry.slots) if slot is not None]


def values(of: Pool, blocks: list[Block]) -> list[float]:
    out = torch.empty(len(blocks), *KIND.shape)
    of.wait(of.read([(blocks, out)]))
    assert all(bool((each == each.flatten()[0]).all()) for each in out)
    return out[:, 0, 0, 0].tolist()


def test_the_one_that_was_used_longest_ago_goes_down_tier_by_tier(tmp_path):
    of = pool(tmp_path, 2, 1, 4)
    blocks = [put(of, n) for n in range(6)]
    assert [where(of, block) for block in blocks] == [["disk"], ["disk"], ["disk"], ["host"], ["device"], ["device"]]
    assert values(of, blocks) == [0, 1, 2, 3, 4, 5] and of.fetched == {"device": 2, "host": 1, "disk": 3}
    assert of.on_device([blocks[0], blocks[4]]) and where(of, blocks[5]) == ["host"] and where(of, blocks[3]) == ["disk"]
    assert values(of, blocks) == [0, 1, 2, 3, 4, 5]


def test_every_swap_of_full_tiers_keeps_every_block(tmp_path):
    of, generator = pool(tmp_path, 3, 2, 5), torch.Generator().manual_seed(0)
    blocks = [put(of, n) for n in range(9)]
    with pytest.raises(ValueError, match="no room left"):
        of.require(1)
    for _ in range(200):
        chosen = torch.randperm(9, generator=generator)[: int(torch.randint(1, 4, (), generator=generator))].tolist()
        slots = of.on_device([blocks[n] for n in chosen])
        assert of.arena(KIND)[slots, 0, 0, 0].tolist() == chosen, "whoever was chosen together is there together"
    assert values(of, blocks) == list(range(9))
    held = {name: tier["bytes"] // KIND.nbytes for name, tier in of.tiers().items()}
    assert (held["device"], held["host"]) == (3, 2) and 4 <= held["disk"] <= 5


def test_what_was_written_once_leaves_for_nothing(tmp_path, monkeypatch):
    of, written = pool(tmp_path, 1, 0, 4), []
    write = InFile.write
    monkeypatch.setattr(InFile, "write", lambda arena, slot, entries: (written.append(slot), write(arena, slot, entries)))
    blocks = [put(of, n) for n in range(3)]
    for block in [*blocks, *blocks, *blocks]:
        of.on_device([block])
    assert len(written) == 3 and values(of, blocks) == [0, 1, 2]


def test_the_one_with_the_least_mass_goes_first_and_mass_decays(tmp_path):
    of = pool(tmp_path, 3, 0, 9, policy="mass", decay=0.5)
    a, b, c = (put(of, n) for n in range(3))
    for block, more in ((a, 1.0), (b, 0.1), (c, 0.4)):
        of.touch([block], more)
    d = put(of, 3)
    assert where(of, b) == ["disk"] and where(of, a) == ["device"]
    of.touch([c], 0.5)
    of.touch([d], 5.0)  # c: 0.4 / 2 + 0.5; a: 1.0 / 2
    put(of, 4)
    assert where(of, a) == ["disk"] and where(of, c) == where(of, d) == ["device"]
    assert of.score(c.entry) == pytest.approx(0.7 / 2)


def test_the_order_of_eviction_is_that_of_the_scores_in_plain_python(tmp_path):
    """Random uses, payments and new blocks: what leaves the device is the first of those with the least score in the order of use, none that is chosen."""
    of, random = pool(tmp_path, 5, 40, policy="mass", decay=0.3), Random(1)
    blocks: list[Block] = []
    device: list[Block] = []  # the one that came or was used last at the end
    scores: dict[Block, float] = {}
    left, paid = 0, False

    def comes(block: Block, chosen: list[Block]) -> None:
        nonlocal left
        if len(device) == 5:
            device.remove(min((each for each in device if each not in chosen), key=scores.__getitem__))  # of equal ones, the first
            left += scores[block] > 0
        device.append(block)

    for _ in range(300):
        of.require(1)
        if paid:
            scores = {block: 0.3 * score for block, score in scores.items()}
        paid = False
        for _ in range(random.randrange(3) if len(blocks) >= 3 else 0):
            chosen = random.sample(blocks, 3)
            of.on_device(chosen)
            device.sort(key=lambda block: chosen.index(block) if block in chosen else -1)
            for block in chosen:
                if block not in device:
                    comes(block, chosen)
            mass = [random.choice([0.0, 0.25, random.random()]) for _ in chosen]
            for block, more in zip(chosen, mass):
                of.touch([block], more)
                scores[block] += more
            paid = True
        if len(blocks) < 30 and random.random() < 0.4:
            blocks.append(of.put(KIND, torch.full(KIND.shape, float(len(blocks)))))
            scores[blocks[-1]] = 0.0
            comes(blocks[-1], [])
        assert list(of._shelves[KIND][0].only) == [block.entry for block in device]
    assert [of.score(block.entry) for block in blocks] == pytest.approx([scores[block] for block in blocks])
    assert len(blocks) == 30 and left > 100 and values(of, blocks) == list(range(30))


def test_slots_of_blocks_that_nobody_holds_are_free_again(tmp_path):
    of = pool(tmp_path, 2, 1, 2)
    blocks = [put(of, n) for n in range(4)]
    del blocks[1:3]
    more = [put(of, 7), put(of, 8)]
    assert values(of, [*blocks, *more]) == [0, 3, 7, 8]


def test_runs_of_slots():
    assert runs([3, 4, 5, 9, 8, 9]) == [(0, 3), (3, 4), (4, 6)] and runs([]) == []


@torch.no_grad()
def test_the_next_blocks_are_read_while_these_are_attended_to(tmp_path, monkeypatch):
    """A read of a later part returns only when attention to an earlier one has begun, and that one ends only when the read has: one after the other would
    never end."""
    model, ids = build("llama"), tokens(1, 75)
    begun, done = threading.Event(), threading.Event()
    trace: list[str] = []
    with constants(3, 4), longreach.extend(model, SelfExtend(3, 8), memory=budgets(tmp_path, 1, 0, 99, staging=2 * UNIT)) as extension:
        truth = model(ids, use_cache=False).logits[:, -1]
        cache = DynamicCache()
        model(ids[:, :74], past_key_values=cache)
        run, kind = lane._run, type(kernel_for(torch.device("cpu"), torch.float32))
        attend = kind.attend

        def reading(*arguments: Any) -> Any:
            number = sum("begins" in event for event in trace)
            trace.append(f"read {number} begins")
            if number == 1:
                assert begun.wait(20), "nothing is attended to while this is read"
            found = run(*arguments)
            trace.append(f"read {number} ends")
            if number == 1:
                done.set()
            return found

        def attending(*arguments: Any, **more: Any) -> Any:
            if "read 0 ends" in trace and not begun.is_set():
                begun.set()
                assert done.wait(20), "nothing is read while this is attended to"
                trace.append("attended to 0")
            return attend(*arguments, **more)

        monkeypatch.setattr(lane, "_run", reading)
        monkeypatch.setattr(kind, "attend", attending)
        found = model(ids[:, 74:], past_key_values=cache).logits[:, -1]
        assert trace.index("read 0 ends") < trace.index("read 1 ends") < trace.index("attended to 0")
        assert difference(found, truth) <= 1e-5
        assert extension.report()["memory"]["seconds_waited"] > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(device="a lot"), "device must be a size, such as 512MiB"),
        (dict(device=0), "device must be a size"),
        (dict(device="1MiB", host="-1"), "host must be a size"),
        (dict(device="1MiB", disk="8GiB"), "disk must be a folder and a size, such as 'spill:8GiB'"),
        (dict(device="1MiB", disk="/no/such/folder:8GiB"), "there is no folder '/no/such/folder'"),
        (dict(device="1MiB", block=48), "a block has 1, 2, 4"),
        (dict(device="1MiB", policy="fifo"), "policy must be 'lru' or 'mass'"),
        (dict(device="1MiB", decay=2), "decay is the share"),
        (dict(device="1MiB", decay=0), "decay is the share"),
    ],
    ids=str,
)
def test_budgets_are_checked(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Tiered(**arguments)


def test_budgets_are_read_as_people_write_them(tmp_path):
    found = Tiered.parse(f"device=1.5MiB, host=2GiB,disk={tmp_path}:8KiB")
    assert found.budgets == {"device": 3 * 2**19, "host": 2**31, "disk": 8192} and found.folder == tmp_path
    assert Tiered.parse(str(found)) == found
    assert str(Tiered.parse("device=1MiB,policy=mass")) == "device=1MiB,policy=mass" and Tiered.parse("device=1MiB,policy=mass").policy == "mass"
    for text, sentence in (("512MiB", "is no budget"), ("host=1MiB", "says nothing of the device"), ("device=1MiB,device=2MiB", "budget of its own")):
        with pytest.raises(ValueError, match=sentence):
            Tiered.parse(text)


def test_a_device_that_holds_no_block_is_refused_before_anything_is_read(tmp_path):
    model = build("llama")
    with pytest.raises(ValueError, match=r"device=100B is too small for a block of each kind of keys and values; pass at least 32KiB"):
        longreach.extend(model, SelfExtend(3, 8), memory=Tiered(100))
    assert not hasattr(model, "longreach")


@torch.no_grad()
def test_a_model_that_was_cast_is_refused(tmp_path):
    model = build("llama")
    with longreach.extend(model, SelfExtend(3, 8), memory=budgets(tmp_path, 9)):
        model.bfloat16()
        with pytest.raises(ValueError, match=r"moved or cast after extend\(\)"):
            model(tokens(1, 5), past_key_values=DynamicCache())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system promises no room in a file")
@torch.no_grad()
def test_a_disk_that_is_full_is_met_before_the_forward(tmp_path, monkeypatch):
    model, ids = build("llama"), tokens(1, 75)
    with constants(3, 4), longreach.extend(model, SelfExtend(3, 8), memory=budgets(tmp_path, 2, 0, 99)):
        whole = model(ids[:, :31], use_cache=False).logits[:, -1]
        cache = DynamicCache()
        model(ids[:, :30], past_key_values=cache)

        def full(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", full)
            with pytest.raises(ValueError, match=r"cannot be written \(no space left on device\); free some space, or pass a smaller disk budget"):
                model(tokens(1, 300), past_key_values=cache)
        assert cache.get_seq_length() == 30
        assert difference(model(ids[:, 30:31], past_key_values=cache).logits[:, -1], whole) <= 1e-5


@torch.no_grad()
def test_a_crop_makes_room(tmp_path):
    model, ids = build("llama"), tokens(1, 75)
    with constants(3, 4), longreach.extend(model, YaRN(2.0), memory=budgets(tmp_path, 4, 2, 4)) as extension:
        whole = model(ids[:, :40], use_cache=False).logits[:, -1]
        cache = DynamicCache()
        model(ids[:, :40], past_key_values=cache)
        with pytest.raises(ValueError, match="no room left"):
            model(ids[:, 40:], past_key_values=cache)
        cache.crop(10)
        assert sum(tier["blocks"] for tier in extension.report()["memory"]["tiers"].values()) == 2 * 2 * (10 // 4)
        assert difference(model(ids[:, 10:40], past_key_values=cache).logits[:, -1], whole) <= 1e-5
