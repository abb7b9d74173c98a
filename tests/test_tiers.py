"""Tiered memory equals the contiguous one, keeps to its budgets, says when it is full, and leaves nothing behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import longreach
from families import build, tokens
from histories import constants
from longreach import InfLLM, LongHeads, Quest, SelfExtend, Tiered, YaRN, files
from longreach.hf.cache import cache_bytes, store_of
from longreach.memory.arenas import InFile, InMemory
from longreach.memory.bodies import Bodies
from longreach.methods.base import Method
from methods_matrix import METHODS, context, refusal
from test_matrix import chunked, difference

LENGTH, BLOCK = 75, 4
CUTTABLE = [method for method in METHODS if method.cut == 1 and not refusal("llama", method)]
UNIT = 2 * 2 * BLOCK * 16 * 4  # bytes of 4 tokens of "llama" in fp32: 2 layers, a key and a value of one head of 16


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """A rollback of a few tokens, so that short texts reach the blocks."""
    with constants(3, 4):
        yield


def budgets(folder: Any, device: float, host: float = 0, disk: float = 0, **more: Any) -> Tiered:
    """Tiers for so many blocks of one form of keys and of the values."""
    of = [int(n * UNIT) for n in (device, host, disk)]
    return Tiered(of[0], of[1] or None, f"{folder}:{of[2]}" if disk else None, **{"block": BLOCK, "staging": 8 * UNIT, **more})


def checked(extension: Any) -> dict[str, Any]:
    """The report, which no budget is exceeded by; nor are the tensors behind it."""
    found = extension.report()["memory"]
    pool = extension.forward.memory.pool
    for name, tier in found["tiers"].items():
        assert tier["bytes"] + tier.get("summaries", 0) <= tier["budget"], (name, tier)
        arenas = [shelf.arena for shelves in pool._shelves.values() for shelf in shelves if pool.names[shelf.tier] == name]
        assert sum(arena.entries.nbytes if isinstance(arena, InMemory) else arena.allocated for arena in arenas) <= tier["budget"]
    return found


@pytest.mark.parametrize("method", CUTTABLE, ids=str)
@torch.no_grad()
def test_it_equals_the_contiguous_one(method: Method, tmp_path):
    """Odd chunks, decoded tokens, pads, a crop into a block, a fork, other rows: over a device that holds a few blocks, most are elsewhere."""
    model, ids = build("llama"), tokens(2, LENGTH)
    mask, found = torch.ones_like(ids), []
    mask[1, :11] = 0
    choice = method.choice
    device = 4 if choice is None or not choice.index.width else 36 if choice.block > 3 else 128  # half of it is for what an index keeps
    for memory in ({}, {"memory": budgets(tmp_path, device, 2, 200)}):
        with longreach.extend(model, method, context=context(method, LENGTH), **memory) as extension:
            parts = [chunked(model, ids, [23, 1, 1, 9, 8, 1, 17, *[1] * 15]), chunked(model, ids, [40, 5, *[1] * 30], mask)[:, 11:]]
            cache = DynamicCache()
            model(ids[:, :60], past_key_values=cache)
            if memory:
                checked(extension)
            twin = extension.fork(cache)
            start = max(33, *map(store_of(cache).reaches, range(2)))  # bounded forms do not go back farther
            cache.crop(start)
            for each, stop in ((cache, start), (twin, 60), (cache, start + 1)):
                parts.append(model(ids[:, stop : stop + 1], past_key_values=each).logits)
            cache.reorder_cache(torch.tensor([1, 0]))
            rows = [1, 0]
            if "Quest" not in str(method):  # there what an index keeps would not fit
                cache.batch_repeat_interleave(2)
                rows = [1, 1, 0, 0]
            parts.append(model(ids[rows, start + 2 : start + 9], past_key_values=cache).logits)
            parts.append(model(ids[rows[::-1], start + 9 : start + 10], past_key_values=cache).logits)
            if memory:
                tiers = checked(extension)
                if any(kept.place is None for layer in extension.layers for kept in layer.kept.values()):
                    assert device > 60 or (tiers["tiers"]["disk"]["blocks"] and tiers["tiers"]["disk"]["fetched"])
            found.append(parts)
    assert all(difference(theirs, ours) <= 1e-5 for ours, theirs in zip(*found, strict=True))


@torch.no_grad()
def test_what_is_chosen_comes_to_the_device_and_nothing_else_is_fetched(tmp_path):
    """Two blocks a token: the same keys in the same order, so the same bits."""
    model, ids, found = build("llama"), tokens(1, LENGTH), []
    method = Quest(12, 4, 0)
    for memory in ({}, {"memory": budgets(tmp_path, 12, 0, 100)}):
        with longreach.extend(model, method, trained_window=128, **memory) as extension:
            cache = DynamicCache()
            model(ids[:, :60], past_key_values=cache)
            before = extension.report()["memory"]
            found.append(model(ids[:, 60:61], past_key_values=cache).logits)
            after = extension.report()["memory"]
    assert torch.equal(*found)
    fetched = sum(after["tiers"][name]["fetched"] - before["tiers"][name]["fetched"] for name in after["tiers"])
    assert 0 < fetched <= 2 * 2 * 2 * 3  # layers, keys and values, heads, blocks that each may choose
    assert after["tiers"]["disk"]["fetched"] > before["tiers"]["disk"]["fetched"]


@pytest.mark.parametrize("method", [Quest(12, 4, 0), InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=8)], ids=str)
@torch.no_grad()
def test_requests_that_decode_together_fetch_what_they_have_chosen(method, tmp_path):
    model, texts = build("llama"), [tokens(1, n, seed=n)[0] for n in (70, 61)]
    with longreach.extend(model, method, trained_window=128, memory=budgets(tmp_path, 60, 2, 200)) as extension:
        fetched, logits = [], []
        for together in (False, True):
            flat = extension.flat()
            rows = [flat.join() for _ in texts]
            flat.read({row: text[:-1] for row, text in zip(rows, texts)}, "none")
            before = sum(tier["fetched"] for tier in checked(extension)["tiers"].values())
            last = {row: text[-1:] for row, text in zip(rows, texts)}
            found = [flat.read(each) for each in ([last] if together else [{row: token} for row, token in last.items()])]
            fetched.append(sum(tier["fetched"] for tier in checked(extension)["tiers"].values()) - before)
            logits.append(torch.stack([row for each in found for row in each.values()]))
        assert fetched[0] == fetched[1] > 0 and difference(*logits) <= 1e-5


@torch.no_grad()
def test_it_says_when_all_tiers_are_full_and_the_cache_goes_on_as_it_was(tmp_path):
    model, ids = build("llama"), tokens(1, LENGTH)
    with longreach.extend(model, SelfExtend(3, 8), memory=budgets(tmp_path, 4, 2, 5)) as extension:
        whole = model(ids[:, :44], use_cache=False).logits[:, -1]
        cache = DynamicCache()
        model(ids[:, :40], past_key_values=cache)
        before = checked(extension)
        assert [tier["blocks"] for tier in before["tiers"].values()] == [16, 8, 12]
        with pytest.raises(ValueError, match=r"no room left \(device 4KiB of 4KiB, host 2KiB of 2KiB, disk 3KiB of 5KiB\).* 7.25KiB more; pass a larger disk"):
            model(ids[:, 40:75], past_key_values=cache)
        assert cache.get_seq_length() == 40 and checked(extension)["tiers"]["device"]["blocks"] == 16
        assert difference(model(ids[:, 40:44], past_key_values=cache).logits[:, -1], whole) <= 1e-5
        del cache
        gc.collect()
        assert [tier["blocks"] for tier in checked(extension)["tiers"].values()] == [0, 0, 0]
        assert difference(model(ids[:, :44], use_cache=True).logits[:, -1], whole) <= 1e-5


@torch.no_grad()
def test_forks_share_blocks_and_count_them_once(tmp_path):
    model, ids = build("llama"), tokens(1, LENGTH)
    with longreach.extend(model, SelfExtend(3, 8), memory=budgets(tmp_path, 40)) as extension:
        cache = DynamicCache()
        model(ids[:, :60], past_key_values=cache)
        blocks = checked(extension)["tiers"]["device"]["blocks"]
        twins = [extension.fork(cache) for _ in range(3)]
        for n, twin in enumerate(twins):
            model(ids[:, 60 + n : 61 + n], past_key_values=twin)
        assert checked(extension)["tiers"]["device"]["blocks"] == blocks
        each = cache_bytes(cache)
        assert each >= blocks * UNIT // 4
        assert cache_bytes(cache, *twins) < each + 3 * each // 2
        del cache, twins, twin
        gc.collect()
        assert checked(extension)["tiers"]["device"]["blocks"] == 0


@torch.no_grad()
def test_files_have_no_name_and_are_gone_in_the_end(tmp_path):
    model, ids = build("llama"), tokens(1, LENGTH)
    with longreach.extend(model, SelfExtend(3, 8), memory=budgets(tmp_path, 2, 0, 40)) as extension:
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        files = [shelf.arena._file for shelves in extension.forward.memory.pool._shelves.values() for shelf in shelves if shelf.tier == 1]
        assert all(os.fstat(file.fileno()).st_size and not os.fstat(file.fileno()).st_nlink for file in files) and files
        assert os.listdir(tmp_path) == []
    assert all(file.closed for file in files)


@torch.no_grad()
def test_what_a_block_on_disk_was_written_for_once_is_not_written_again(tmp_path, monkeypatch):
    model, ids = build("llama"), tokens(1, LENGTH)
    with longreach.extend(model, Quest(12, 4, 0), trained_window=128, memory=budgets(tmp_path, 12, 0, 60)) as extension:
        cache = DynamicCache()
        model(ids, past_key_values=cache)
        for token in range(5):
            model(ids[:, token : token + 1], past_key_values=cache)
        tiers, pool = checked(extension)["tiers"], extension.forward.memory.pool
        disk = [shelf for shelves in pool._shelves.values() for shelf in shelves if shelf.tier == 1]
        assert tiers["device"]["evicted"] > sum(shelf.begun for shelf in disk), "more left the device than were ever written"
        assert store_of(cache).lengths == [LENGTH + 5]


@torch.no_grad()
def test_it_is_saved_and_loaded_whatever_memory_it_had_before(tmp_path):
    """Blocks come from the files of a document one by one."""
    model, ids, found = build("llama"), tokens(2, 300), []
    method, spec = SelfExtend(8, 40), budgets(tmp_path, 20, 10, 300)
    for kind, memory in (("a", {}), ("b", {"memory": spec})):
        with longreach.extend(model, method, **memory) as extension:
            cache = DynamicCache()
            model(ids[:, :290], past_key_values=cache)
            extension.save(cache, tmp_path / kind)
            found.append(model(ids[:, 290:], past_key_values=cache).logits)
    for kind in "ab":
        for memory in ({}, {"memory": spec}):
            with longreach.extend(model, method, **memory) as extension:
                document = extension.load(tmp_path / kind)
                found.append(model(ids[:, 290:], past_key_values=document.cache).logits)
                if memory:
                    assert checked(extension)["tiers"]["disk"]["blocks"] > 0
                    extension.save(document.cache, tmp_path / "c")
                    del document
                    assert model(ids[:, 299:], past_key_values=extension.load(tmp_path / "c").cache).logits.isfinite().all()
    assert all(difference(each, found[0]) <= 1e-5 for each in found)


@torch.no_grad()
def test_many_requests_are_read_together_from_it(tmp_path):
    model, texts = build("llama"), [tokens(1, n, seed=n)[0].tolist() for n in (9, 30, 50, 62)]
    with longreach.extend(model, SelfExtend(3, 8)) as extension:
        alone = longreach.generate(extension, texts, 9, at_once=1)
    with longreach.extend(model, SelfExtend(3, 8), memory=budgets(tmp_path, 2, 3, 99)) as extension:
        assert longreach.generate(extension, texts, 9) == alone
        assert checked(extension)["tiers"]["disk"]["fetched"]
        flat = extension.flat()
        a = flat.join()
        flat.read({a: texts[3][:50]}, "none")
        b = flat.fork(a)
        found = flat.read({a: texts[3][50:], b: texts[3][50:51]})
        whole = model(torch.tensor([texts[3]]), use_cache=False).logits[0]
        assert difference(found[a], whole[-1]) <= 1e-5 and difference(found[b], whole[50]) <= 1e-5


@torch.no_grad()
def test_requests_that_were_read_alike_and_cut_apart_are_read_together(tmp_path):
    model, text = build("llama"), tokens(1, 62)[0]
    with longreach.extend(model, YaRN(2.0), memory=budgets(tmp_path, 2, 3, 99)) as extension:
        flat = extension.flat()
        a, b = flat.join(), flat.join()
        flat.read({a: text[:50], b: text[:50]}, "none")
        flat.crop(a, 15)
        found = flat.read({a: text[15:16], b: text[50:51]})
        whole = model(text[None], use_cache=False).logits[0]
        assert difference(found[a], whole[15]) <= 1e-5 and difference(found[b], whole[50]) <= 1e-5


def test_the_command_line_says_what_lay_where(run, folders, book, tmp_path):
    (tmp_path / "text").write_text(book.read_text() * 40)
    options = ["--model", folders["llama"], "--file", tmp_path / "text", "--truncate", "right", "--context", 900, "--max-new-tokens", 4, "--json"]
    options += ["--method", "selfextend", "--group-size", 32, "--window", 32]
    with constants(128, 64):
        found = run("run", *options, "--memory", f"device=64KiB,host=32KiB,disk={tmp_path}:64MiB,staging=256KiB").json
        plain = run("run", *options).json
    assert found["answer"] == plain["answer"] and plain["extension"]["memory"] is None
    memory = found["extension"]["memory"]
    assert list(memory["tiers"]) == ["device", "host", "disk"] and memory["tiers"]["disk"]["fetched"] > 0 < memory["apart"]["staging"] <= 2**18
    assert 0 < memory["hit_rate"] < 1 and memory["seconds_waited"] > 0
    assert run("run", *options, "--memory", "512MiB").code == 2


@torch.no_grad()
def test_it_is_described(tmp_path):
    model = build("llama")
    with longreach.extend(model, SelfExtend(3, 8), memory=budgets(tmp_path, 2, 3, 99)) as extension:
        model(tokens(1, LENGTH), past_key_values=DynamicCache())
        words = extension.describe()
    assert "memory      device 0B of 2KiB, 0 blocks" in words and "apart from the budgets" in words


# -- what is broken off -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_forward_that_succeeded_does_not_raise_where_its_blocks_cannot_be_written(tmp_path, monkeypatch):
    model, ids = build("llama"), tokens(1, 120)
    with longreach.extend(model, SelfExtend(3, 8)):
        want = model(ids, use_cache=False).logits
    with longreach.extend(model, SelfExtend(3, 8), memory=budgets(tmp_path, 4, 0, 100)):
        cache, write = DynamicCache(), InFile.write

        def fails(self: InFile, *args: Any) -> None:
            with files.said(self.folder):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(InFile, "write", fails)
        found = [model(ids[:, :60], past_key_values=cache).logits]
        assert cache.get_seq_length() == 60
        with pytest.raises(ValueError, match="free some space and try again"):
            model(ids[:, 60:70], past_key_values=cache)
        monkeypatch.setattr(InFile, "write", write)
        found.append(model(ids[:, 60:], past_key_values=cache).logits)
        assert difference(torch.cat(found, 1), want) <= 1e-5


@torch.no_grad()
def test_a_budget_that_the_machine_does_not_have_is_said(tmp_path):
    model, ids = build("llama"), tokens(1, 80)
    with longreach.extend(model, SelfExtend(3, 8), memory=Tiered("100TiB", block=4)):
        cache = DynamicCache()
        with pytest.raises(ValueError, match="smaller budget"):
            for t in range(0, 80, 40):
                model(ids[:, t : t + 40], past_key_values=cache)


@pytest.mark.parametrize("method", [Quest(4, 1, 0, "all"), LongHeads(3, 3, 1)], ids=str)
def test_an_index_with_blocks_of_one_token_is_refused(method):
    with pytest.raises(ValueError, match="pass a larger block"):
        longreach.extend(build("llama"), method, memory=Tiered("1MiB"))


def test_a_policy_that_nothing_feeds_is_refused():
    model = build("llama")
    for method, backend in ((SelfExtend(3, 8), "auto"), (Quest(12, 4, 2), "auto"), (Quest(12, 4, 1), "reference")):
        with pytest.raises(ValueError, match=r"chooses nothing; leave out policy$"):
            longreach.extend(model, method, trained_window=128, memory=Tiered("1MiB", policy="mass"), backend=backend)
    said = r"LMInfinite\(.*\) chooses nothing; leave out policy; it was chosen with a warning: memory binds: SelfExtend"
    with pytest.raises(ValueError, match=said):  # the tiers were too small for what reads everything
        longreach.extend(model, context=400, trained_window=128, memory=Tiered("8KiB", policy="mass"))
    assert not hasattr(model, "longreach")


@pytest.mark.parametrize("given", [{"block": 2.0}, {"block": True}, {"staging": None}, {"decay": True}, {"device": None}], ids=str)
def test_budgets_of_another_type_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        Tiered(**{"device": "1MiB", **given})


@torch.no_grad()
def test_a_cache_whose_first_forward_was_interrupted_can_be_used(monkeypatch):
    model, ids, cache = build("llama"), tokens(1, 30), DynamicCache()
    with longreach.extend(model, SelfExtend(3, 8)):
        want = model(ids, use_cache=False).logits
        monkeypatch.setattr(Bodies, "__init__", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            model(ids, past_key_values=cache)
        monkeypatch.undo()
        assert difference(model(ids, past_key_values=cache).logits, want) <= 1e-5
