"""Documents that are saved again: they are appended to, never take anything from another text, and survive a crash between any two operations."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as t

import histories
import longreach
from blocks import BLOCK, HORIZON, content, counted, inputs, more, saved
from families import build, tokens
from longreach import LMInfinite, SelfExtend, Stock
from longreach.hf.cache import store_of
from longreach.memory import sealed, sealing
from methods_matrix import METHODS, context, refusal

pytestmark = pytest.mark.usefixtures("small_blocks")
SAVED = [m for m in METHODS if m.eviction is None]  # the others are refused
KINDS = [type(m) for m in SAVED]
ONE_OF_EACH = [m if n == KINDS.index(type(m)) else pytest.param(m, marks=pytest.mark.slow) for n, m in enumerate(SAVED)]


# -- documents that grow ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ONE_OF_EACH, ids=str)
def test_a_document_that_grows_is_appended_to_and_goes_on_bit_for_bit(method, rows, tmp_path):
    """Saved after every turn, also after turns that were taken back: what was sealed is not written again, and every state loads bit for bit."""
    ids, mask = inputs(rows, 300)
    folder = tmp_path / "d"
    with longreach.extend(build("llama-head8" if refusal("llama", method) else "llama"), method, context=context(method, 300)) as extension:
        model, cache, before = extension.model, t.DynamicCache(), b""
        for turn, stop in enumerate((90, 91, 170, 233, 260)):
            more(model, cache, ids, mask, stop)
            if turn == 3:
                cache.crop(-20)
                more(model, cache, ids, mask, stop)
            extension.save(cache, folder, ids[:, :stop])
            log = counted(folder)
            assert log.startswith(before)
            before = log
            loaded = extension.load(folder)
            assert torch.equal(loaded.ids, ids[:, :stop])
            ends = [extension.fork(cache), loaded.cache]
            assert torch.equal(*(more(model, each, ids, mask, stop + 30) for each in ends))
            if turn == 2:
                cache = loaded.cache  # goes on from the disk, and appends
        unbounded = any(placement.tail is None for placement in store_of(cache).placements.values())
        assert bool(before) == unbounded
        if unbounded:
            lengths = store_of(cache).lengths
            forms = [buffer.placement.kept for _, _, buffer in sealing.buffers(store_of(cache)) if buffer.placement.tail is None]
            wanted = sum(max(0, kept.entries(n) - HORIZON) // BLOCK for kept in forms for n in lengths)
            assert sum(file.records for file in sealed.read(folder).blocks) == wanted


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss", "deepseek-v3", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_widths_and_dtypes_are_sealed(family, dtype, tmp_path):
    """Sliding layers beside others, keys and values of unequal widths, bf16."""
    ids, mask = inputs(2, 260)
    with longreach.extend(build(family, dtype), SelfExtend(6, 8)) as extension:
        cache = t.DynamicCache()
        for stop in (150, 220):
            more(extension.model, cache, ids, mask, stop)
            extension.save(cache, tmp_path / "d", ids[:, :stop])
        log = sealed.Log(tmp_path / "d", sealed.read(tmp_path / "d").blocks)
        widths = {(key.form, record.shape[2], record.dtype) for key, (_, record) in log.index.items()}
        entry = extension.facts.reading.entries[0]
        assert {("values.0", entry.value_width, dtype), ("keys.1", entry.key_width, dtype)} <= widths
        assert torch.equal(*(more(extension.model, each, ids, mask, 260) for each in (extension.load(tmp_path / "d").cache, cache)))


@pytest.fixture(scope="module")
def extension(small_blocks: None) -> Iterator[Any]:
    with longreach.extend(build("llama"), SelfExtend(5, 8)) as made:
        yield made


@pytest.mark.parametrize("back", [30, 60, 100, 128])
def test_a_crop_below_what_is_sealed_drops_whole_records(extension, back, tmp_path):
    cache = saved(extension, tmp_path / "d")
    before = counted(tmp_path / "d")
    index = sealed.Log(tmp_path / "d", sealed.read(tmp_path / "d").blocks).index
    cache.crop(-back)
    torch.manual_seed(3)
    ids = torch.cat([tokens(1, 300)[:, : 200 - back], tokens(1, 300, seed=5)], 1)
    more(extension.model, cache, ids, torch.ones_like(ids), 200 - back + 3)
    extension.save(cache, tmp_path / "d", ids[:, : 203 - back])
    kept = (203 - back - HORIZON) // BLOCK * BLOCK
    left = [key for key in index if key.first < kept]
    log = sealed.Log(tmp_path / "d", sealed.read(tmp_path / "d").blocks)
    shorter = counted(tmp_path / "d")
    assert list(log.index) == left and before.startswith(shorter) and shorter != before
    assert sum((tmp_path / "d" / sealed.blocks_name(f.number)).stat().st_size for f in log.blocks) == len(shorter)  # the disk is given back
    assert torch.equal(*(more(extension.model, each, ids, torch.ones_like(ids), 300) for each in (extension.load(tmp_path / "d").cache, extension.fork(cache))))
    more(extension.model, cache, ids, torch.ones_like(ids), 280)
    extension.save(cache, tmp_path / "d", ids[:, :280])
    assert counted(tmp_path / "d").startswith(shorter)
    assert torch.equal(*(more(extension.model, each, ids, torch.ones_like(ids), 300) for each in (extension.load(tmp_path / "d").cache, cache)))


def test_a_save_makes_nothing_of_what_was_written_before(extension, tmp_path, monkeypatch):
    """What is listed and looked up grows with what is new, and not with the text."""
    cache = saved(extension, tmp_path / "d")
    before = len(sealed.Log(tmp_path / "d", sealed.read(tmp_path / "d").blocks).index)
    ids, listed, real = tokens(1, 300), [], sealing._blocks

    def blocks(*args: Any) -> Iterator[Any]:
        for found in real(*args):
            listed.append(found[0])
            yield found

    monkeypatch.setattr(sealing, "_blocks", blocks)
    more(extension.model, cache, ids, torch.ones_like(ids), 260)
    extension.save(cache, tmp_path / "d", ids[:, :260])
    log = sealed.Log(tmp_path / "d", sealed.read(tmp_path / "d").blocks)
    assert list(log.index)[before:] == listed and len(log.index) > before > 0
    assert torch.equal(*(more(extension.model, each, ids, torch.ones_like(ids), 300) for each in (extension.load(tmp_path / "d").cache, cache)))


@pytest.mark.parametrize("places", [None, 3, [], [3], [{"sealed": "x"}], [{"sealed": [-16]}]])
def test_places_that_make_no_sense_are_not_gone_by(extension, places, tmp_path):
    cache, folder = saved(extension, tmp_path / "d"), tmp_path / "d"
    manifest = sealed.read(folder)
    sealed.commit(folder, replace(manifest, facts={**manifest.facts, "places": places}))
    ids = tokens(1, 300)
    more(extension.model, cache, ids, torch.ones_like(ids), 260)
    extension.save(cache, folder, ids[:, :260])
    assert torch.equal(*(more(extension.model, each, ids, torch.ones_like(ids), 300) for each in (extension.load(folder).cache, cache)))


def test_changed_tokens_below_the_horizon_are_never_taken_from_the_log(extension, tmp_path):
    """Cropped, then other tokens up to more than before: the numbers fit, the content does not."""
    cache = saved(extension, tmp_path / "d")
    cache.crop(-100)
    ids = torch.cat([tokens(1, 300)[:, :100], tokens(1, 300, seed=5)], 1)
    more(extension.model, cache, ids, torch.ones_like(ids), 260)
    extension.save(cache, tmp_path / "d", ids[:, :260])
    assert torch.equal(*(more(extension.model, each, ids, torch.ones_like(ids), 300) for each in (extension.load(tmp_path / "d").cache, cache)))


def test_tokens_that_a_mask_forgets_are_not_taken_from_the_log(extension, tmp_path):
    ids, mask = inputs(2, 300)
    cache = saved(extension, tmp_path / "d", rows=2)
    mask[:, 130:210] = 0
    mask[:, 205:210] = 1
    more(extension.model, cache, ids, mask, 290)
    extension.save(cache, tmp_path / "d", ids[:, :290])
    assert torch.equal(*(more(extension.model, each, ids, mask, 300) for each in (extension.load(tmp_path / "d").cache, cache)))


def test_what_does_not_come_from_the_document_is_written_anew(extension, tmp_path):
    """The same ids read in other chunks, forks of which another was saved since, rows in another order, a document that is damaged."""
    folder, (ids, mask) = tmp_path / "d", inputs(2, 300)

    def anew(cache: Any, stop: int) -> bool:
        names = {file.name for file in folder.glob("blocks-*")}
        extension.save(cache, folder, ids[:, :stop])
        loaded, before = extension.load(folder).cache, extension.fork(cache)
        assert torch.equal(*(more(extension.model, each, ids, mask, 300) for each in (loaded, before)))
        return not names & {file.name for file in folder.glob("blocks-*")}

    cache = saved(extension, folder, rows=2)
    assert not anew(cache, 200)
    fork = extension.fork(cache)
    more(extension.model, fork, ids, mask, 250)
    assert not anew(fork, 250)
    assert anew(cache, 200)  # the fork's is there now
    other = t.DynamicCache()
    for stop in (50, 51, 200):
        more(extension.model, other, ids, mask, stop)
    assert anew(other, 200) and not anew(other, 200)
    other.batch_select_indices(torch.tensor([0, 1]))
    assert anew(other, 200)
    (file,) = sorted(folder.glob("blocks-*"))[:1]
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert anew(other, 200)
    (folder / sealed.MANIFEST).write_text("{}")
    assert anew(other, 200) and len(list(folder.glob("tail-*"))) == 1
    shutil.copytree(folder, tmp_path / "copy")
    folder = tmp_path / "copy"
    assert not anew(other, 200)  # a copy of the document is as good


@pytest.mark.parametrize("method", [Stock(), LMInfinite(9, 3)], ids=str)
def test_a_batch_that_lost_its_rows_is_saved(method, tmp_path):
    """Rows of unequal lengths, one of which is shorter than the horizon."""
    ids, mask = inputs(3, 300)
    mask[2, :280] = 0
    with longreach.extend(build("llama"), method) as extension:
        cache = t.DynamicCache()
        more(extension.model, cache, ids, mask, 290)
        extension.save(cache, tmp_path / "d", ids[:, :290])
        cache.batch_select_indices(torch.tensor([2, 0]))
        extension.save(cache, tmp_path / "d", ids[[2, 0], :290])
        ends = (extension.load(tmp_path / "d").cache, cache)
        assert torch.equal(*(more(extension.model, each, ids[[2, 0]], mask[[2, 0]], 300) for each in ends))


@pytest.mark.parametrize("first", [pytest.param(0, marks=pytest.mark.slow), 6])
def test_histories_of_documents_that_are_saved_again_and_again(first, monkeypatch, tmp_path):
    """Random histories (`histories.py`), saved into two folders in turn after half of what changes a cache: what is loaded is what was saved, to the bit."""
    for module, name, value in ((sealed, "BLOCK", 4), (sealed, "SEALED", 6000), (sealing, "ROLLBACK", 3)):
        monkeypatch.setattr(module, name, value)
    appended = 0

    def save(self: Any) -> None:
        nonlocal appended
        if not any(self.talk.model.rows):
            return
        folder = tmp_path / f"{id(self)}-{self.rng.randrange(2)}"
        before = {file.name for file in folder.glob("blocks-*")}
        self.pair.extension.save(self.talk.cache, folder)
        appended += bool(before & {file.name for file in folder.glob("blocks-*")})
        found = self.pair.extension.load(folder).cache
        own, other = store_of(self.talk.cache).fork(), store_of(found)
        for (_, _, a), (_, _, b) in zip(sealing.buffers(own), sealing.buffers(other), strict=True):
            one, two = (each.entries([0] * own.rows) for each in (a, b))
            assert one.keys() == two.keys() and all(torch.equal(one[part], two[part]) for part in one)
        if self.rng.random() < 0.7:
            self.talk.cache = found

    def saving(change: Callable[[Any], None]) -> Callable[[Any], None]:
        def changed(self: Any) -> None:
            change(self)
            if self.rng.random() < 0.5:
                self.save()

        return changed

    for name in ("append", "decode", "crop", "select", "fork"):
        monkeypatch.setattr(histories.History, name, saving(getattr(histories.History, name)))
    monkeypatch.setattr(histories.History, "save", save)
    for seed in range(60_000 + 2 * first, 60_000 + 2 * first + 12):
        found = histories.run(seed)
        assert "error" not in found, found
    assert appended


# -- crashes --------------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone: nothing after this reaches the disk."""


OPERATIONS = ("open", "write", "fsync", "ftruncate", "truncate", "replace", "unlink", "mkdir", "rmdir")


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, number: int, error: Callable[[], BaseException] = Killed, dead: bool = True) -> Iterator[list[str]]:
    """Operation `number` of the file system does not happen (a write happens by half), and none after it if `dead`. -> what was done."""
    done: list[str] = []

    def counting(name: str, real: Any) -> Any:
        def operation(*args: Any, **kwargs: Any) -> Any:
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return real(*args, **kwargs)
            done.append(name)
            if len(done) - 1 == number and name == "write":
                real(args[0], memoryview(args[1])[: len(args[1]) // 2])
            if len(done) - 1 == number or (dead and len(done) - 1 > number):
                raise error()
            return real(*args, **kwargs)

        return operation

    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, counting(name, getattr(os, name)))
        yield done


@pytest.mark.parametrize("change", ["first", "appended", "cropped", pytest.param("anew", marks=pytest.mark.slow)])
@pytest.mark.parametrize("error", ["killed", "full"])
def test_a_crash_between_any_two_operations_leaves_the_old_document_or_the_new_one(extension, change, error, tmp_path, monkeypatch):
    ids, mask = inputs(1, 300)
    states: dict[str, torch.Tensor | None] = {"old": None}
    original = tmp_path / "original"
    original.mkdir()
    if change == "first":
        cache = t.DynamicCache()
    else:
        cache = saved(extension, original / "d", 90)
        states["old"] = more(extension.model, extension.load(original / "d").cache, ids, mask, 150)[:, -20:]
    if change == "cropped":
        cache.crop(-50)
    if change == "anew":
        cache = t.DynamicCache()
    stop = 85 if change == "cropped" else 130
    more(extension.model, cache, ids, mask, stop)
    goal = extension.fork(cache)
    states["new"] = more(extension.model, extension.fork(goal), ids, mask, 150)[:, -20:]
    seen, number, finished = set(), 0, False
    while not finished:
        folder = tmp_path / f"at{number}"
        shutil.copytree(original, folder)
        try:
            with killed_at(monkeypatch, number, *((Killed, True) if error == "killed" else (lambda: OSError(28, "No space left on device"), False))) as done:
                extension.save(extension.fork(goal), folder / "d", ids[:, :stop], notes={"a": "b"})
            finished = number >= len(done)  # else it went on without: the folder that was not made was there
        except Killed:
            assert error == "killed"
        except ValueError as full:
            assert error == "full" and "free some space" in str(full)
            if done.count("replace") < 2:  # nothing has changed, and nothing is left over
                assert content(folder / "d") == content(original / "d") if states["old"] is not None else not (folder / "d").exists()
        try:
            found = extension.load(folder / "d")
        except ValueError as nothing:
            assert states["old"] is None and "no document" in str(nothing)
            seen.add("nothing")
        else:
            stopped = found.ids.shape[1]
            which = "new" if stopped == stop and found.notes else "old"
            assert torch.equal(more(extension.model, found.cache, ids, mask, 150)[:, -20:], states[which])
            seen.add(which)
        extension.save(extension.fork(goal), folder / "d", ids[:, :stop])  # what is left over is no obstacle, and goes
        named = sealed.read(folder / "d")
        assert len(list((folder / "d").iterdir())) == 2 + len(named.blocks)
        assert sum(file.stat().st_size for file in (folder / "d").iterdir() if file.name != sealed.MANIFEST) == named.nbytes
        if number % 4 == 0:
            assert torch.equal(more(extension.model, extension.load(folder / "d").cache, ids, mask, 150)[:, -20:], states["new"])
        shutil.rmtree(folder)
        number += 1
    assert number > 15 and seen == {"new", "nothing" if states["old"] is None else "old"}


def test_a_half_written_record_behind_what_counts_is_cut_off(extension, tmp_path):
    cache = saved(extension, tmp_path / "d", 150)
    last = tmp_path / "d" / sealed.blocks_name(sealed.read(tmp_path / "d").blocks[-1].number)
    whole = last.read_bytes()
    last.write_bytes(whole + whole[:1000])
    ids, mask = inputs(1, 300)
    assert torch.equal(*(more(extension.model, each, ids, mask, 300) for each in (extension.load(tmp_path / "d").cache, extension.fork(cache))))
    extension.save(cache, tmp_path / "d", ids[:, :150])
    assert last.read_bytes() == whole
