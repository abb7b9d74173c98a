"""Sealed blocks: documents that grow in place, crashes between any two operations of the file system, and damage anywhere."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import histories
import longreach
from blocks import BLOCK, HORIZON
from families import build, tokens
from longreach import LMInfinite, SelfExtend, Stock
from longreach.hf import documents
from longreach.hf.cache import store_of
from longreach.memory import records, sealed, sealing
from longreach.memory.records import Damaged, Key
from methods_matrix import METHODS, context, refusal

pytestmark = pytest.mark.usefixtures("small_blocks")
KINDS = [type(m) for m in METHODS]
ONE_OF_EACH = [m if n == KINDS.index(type(m)) else pytest.param(m, marks=pytest.mark.slow) for n, m in enumerate(METHODS)]


# -- records ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", records.DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 16, 5), (2, 7, 64)], ids=str)
def test_a_record_says_what_it_is_and_its_entries_are_in_the_file(dtype, shape, tmp_path):
    torch.manual_seed(1)
    one, other = (torch.randn(shape).to(dtype) for _ in range(2))
    keys = [Key(3, 0, "keys.1", 32), Key(3, 1, "values.0", 2**40)]
    with sealed.Writer(tmp_path, (), ()) as writer:
        for key, entries in zip(keys, (one, other)):
            writer.append(key, entries.transpose(0, 1).contiguous().transpose(0, 1))  # of any strides
        (file,) = writer.finish()
    assert file.bytes % records.ALIGNMENT == 0 and file.bytes == (tmp_path / "blocks-00000001").stat().st_size and file.records == 2
    log = sealed.Log(tmp_path, [file])
    assert list(log.index) == keys
    for key, entries in zip(keys, (one, other)):
        record, found = log.index[key][1], log.read(key)
        assert record.shape == shape and record.dtype == dtype and record.last == key.first + shape[1]
        assert torch.equal(found, entries) and found.data_ptr() % records.ALIGNMENT == 0
        found.zero_()  # a private mapping: the file has what it had
    assert torch.equal(sealed.Log(tmp_path, [file]).read(keys[0]), one)


def test_every_byte_of_a_header_is_checked():
    parts = records.packed(Key(1, 2, "keys.0", 48), torch.ones(2, 16, 4))
    whole = b"".join(parts)
    record, _ = records.header(whole, 0, len(whole))
    assert (record.key, record.shape, record.stop) == (Key(1, 2, "keys.0", 48), (2, 16, 4), len(whole))
    for place in range(records.SIZE):
        broken = bytearray(whole)
        broken[place] ^= 0x10
        with pytest.raises(Damaged, match="checksum"):
            records.header(bytes(broken), 0, len(broken))
    for stop, says in ((records.SIZE - 1, "within a header"), (len(whole) - 1, "within a record")):
        with pytest.raises(Damaged, match=says):
            records.header(whole, 0, stop)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({7: 0, 8: 0}, "contradicts itself"),
        ({6: 2**31, 7: 2**31, 8: 2**31}, "contradicts itself"),
        ({1: 1}, "contradicts itself"),
        ({1: 2**63}, "contradicts itself"),
        ({2: 2**62}, "contradicts itself"),
        ({3: 2**63}, "counts too far"),
        ({9: b"F8"}, "unknown dtype or form"),
        ({10: b"../../x"}, "unknown dtype or form"),
        ({10: b"\xff"}, "unknown dtype or form"),
        ({0: b"LRblock2"}, "checksum"),
    ],
)
def test_a_header_that_lies_under_a_right_checksum_is_refused(fields, says):
    whole = b"".join(records.packed(Key(1, 2, "keys.0", 48), torch.ones(2, 16, 4)))
    values = [*records.HEADER.unpack_from(whole)]
    for place, value in fields.items():
        values[place] = value
    header = records.HEADER.pack(*values).ljust(records.SIZE - 4, b"\0")
    forged = header + records.CHECKSUM.pack(records.zlib.crc32(header)) + whole[records.SIZE :]
    with pytest.raises(Damaged, match=says):
        records.header(forged, 0, len(forged))


# -- documents that grow ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def more(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor, stop: int) -> torch.Tensor:
    """Read up to `stop` -> logits."""
    return model(ids[:, cache.get_seq_length() : stop], attention_mask=mask[:, :stop], past_key_values=cache).logits


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def counted(folder: Path) -> bytes:
    """The records that count, in their order."""
    return b"".join((folder / sealed.blocks_name(file.number)).read_bytes()[: file.bytes] for file in sealed.read(folder).blocks)


def inputs(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(rows, length)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 37 * row] = 0
        mask[row, 120 : 120 + 5 * row] = 0
    return ids, mask


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


def saved(extension: Any, folder: Path, stop: int = 200, rows: int = 1, cache: Any = None) -> Any:
    ids, mask = inputs(rows, 300)
    cache = t.DynamicCache() if cache is None else cache
    more(extension.model, cache, ids, mask, stop)
    extension.save(cache, folder, ids[:, :stop])
    return cache


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


# -- damage -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_damage_anywhere_is_refused(extension, seed, tmp_path):
    """Bytes that are turned, files that are cut, longer, exchanged or gone: a sentence, or the document bit for bit."""
    random.seed(seed)
    saved(extension, tmp_path / "d", 230)
    ids, mask = inputs(1, 300)
    want = more(extension.model, extension.load(tmp_path / "d").cache, ids, mask, 260)
    names = sorted(file.name for file in (tmp_path / "d").iterdir())
    assert len(names) >= 4
    refusals = 0
    for round_ in range(60):
        folder = tmp_path / f"{round_}"
        shutil.copytree(tmp_path / "d", folder)
        name = names[round_ % len(names)]
        data = bytearray((folder / name).read_bytes())
        kind = random.choice(["turn", "turn", "turn", "cut", "gone", "zero", "longer", "other"])
        if kind == "turn":
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        elif kind == "cut":
            del data[random.randrange(len(data)) :]
        elif kind == "zero":
            start = random.randrange(len(data))
            data[start : start + 64] = bytes(len(data[start : start + 64]))
        elif kind == "longer":
            data += b"x" * 100
        elif kind == "other":
            data = bytearray((folder / names[(round_ + 1) % len(names)]).read_bytes())
        (folder / name).unlink()
        if kind != "gone":
            (folder / name).write_bytes(data)
        try:
            found = extension.load(folder)
        except ValueError as error:
            refusals += 1
            assert "damaged or forged" in str(error) or "no document" in str(error) or "has format" in str(error), error
        else:
            same = bytes(data) == (tmp_path / "d" / name).read_bytes()
            padding = name.startswith("blocks") and kind in ("longer", "zero", "turn")
            assert same or padding or (name == sealed.MANIFEST and kind == "turn"), (name, kind)
            assert torch.equal(more(extension.model, found.cache, ids, mask, 260), want)
        shutil.rmtree(folder)
    assert refusals > 40


def test_links_and_pipes_are_never_opened(extension, tmp_path):
    saved(extension, tmp_path / "d", 150)
    cache = saved(extension, tmp_path / "e", 150)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in sorted(file.name for file in (tmp_path / "d").iterdir()):
        for make in (lambda path: path.symlink_to(victim), os.mkfifo, Path.mkdir, lambda path: path.symlink_to(tmp_path / "e" / path.name)):
            folder = tmp_path / "broken"
            shutil.copytree(tmp_path / "d", folder)
            (folder / name).unlink()
            make(folder / name)
            with pytest.raises(ValueError, match="damaged or forged"):
                extension.load(folder)
            with pytest.raises(ValueError, match="is a link or a folder where a file of a document should be"):
                extension.save(cache, folder)
            shutil.rmtree(folder)
    assert victim.read_text() == "mine" and len(list((tmp_path / "e").iterdir())) >= 3


@pytest.mark.parametrize(
    "content",
    [
        {"blocks": [{"number": "../../x", "bytes": 1, "records": 1, "checksum": 0}], "tail": None, "facts": {}},
        {"blocks": [{"number": 0, "bytes": 1, "records": 1, "checksum": 0}], "tail": None, "facts": {}},
        {"blocks": [{"number": 1, "bytes": -1, "records": 1, "checksum": 0}], "tail": None, "facts": {}},
        {"blocks": [{"number": True, "bytes": 1, "records": 1, "checksum": 0}], "tail": None, "facts": {}},
        {"blocks": [{"number": 1, "bytes": 1, "records": 1, "checksum": 0}] * 2, "tail": None, "facts": {}},
        {"blocks": [{"number": 1, "bytes": 1, "records": 1, "checksum": 0, "name": "x"}], "tail": None, "facts": {}},
        {"blocks": [[1, 2, 3, 4]], "tail": None, "facts": {}},
        {"blocks": [], "tail": None, "facts": []},
        {"blocks": [], "tail": [], "facts": {}},
        {"blocks": []},
        [],
        None,
    ],
)
def test_a_manifest_that_lies_is_refused(content, tmp_path):
    text = sealed.json.dumps({"format": 3, "checksum": sealed.zlib.crc32(sealed._canonical(content)), "content": content})
    (tmp_path / sealed.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.longreach contradicts itself"):
        sealed.read(tmp_path)
    (tmp_path / sealed.MANIFEST).write_text(text.replace('"format": 3', '"format": 4'))
    with pytest.raises(ValueError, match="has format 4 and this version of Longreach reads 3"):
        sealed.read(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "9" * 5000, "[" * 100_000, '{"format": NaN}', '{"format": 3, "checksum": 1, "content": NaN}'])
def test_what_is_no_manifest_is_refused(text, tmp_path):
    (tmp_path / sealed.MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"damaged or forged: manifest\.longreach does not have its checksum"):
        sealed.read(tmp_path)


def test_a_block_in_two_files_or_of_another_shape_is_refused(extension, tmp_path):
    saved(extension, tmp_path / "d", 150)
    found = sealed.read(tmp_path / "d")
    with sealed.Writer(tmp_path / "d", found.blocks, ()) as writer:
        key, (_, record) = next(iter(sealed.Log(tmp_path / "d", found.blocks).index.items()))
        writer.append(key, torch.zeros(record.shape))
        sealed.commit(tmp_path / "d", sealed.Manifest(writer.finish(), found.tail, found.facts))
    with pytest.raises(ValueError, match="holds a block twice"):
        extension.load(tmp_path / "d")
    with sealed.Writer(tmp_path / "d", found.blocks, ()) as writer:
        writer.append(Key(0, 0, "keys.7", 0), torch.zeros(2, BLOCK, 16))
        sealed.commit(tmp_path / "d", sealed.Manifest(writer.finish(), found.tail, found.facts))
    with pytest.raises(ValueError, match="blocks that belong nowhere"):
        extension.load(tmp_path / "d")
    log = sealed.Log(tmp_path / "d", found.blocks)
    for change in (lambda x: x[:, :, :-1], lambda x: x.half(), lambda x: x[:, :-1]):
        with sealed.Writer(tmp_path / "d", (), ()) as writer:
            for key in log.index:
                writer.append(key, change(log.read(key)))
            sealed.commit(tmp_path / "d", sealed.Manifest(writer.finish(), found.tail, found.facts))
        with pytest.raises(ValueError, match="a block has another shape or dtype"):
            extension.load(tmp_path / "d")


def test_a_folder_of_a_document_is_written_by_one_at_a_time(extension, tmp_path):
    """Another process that reads it is waited for."""
    from longreach import files

    cache = saved(extension, tmp_path / "d", 150)
    before, ids = content(tmp_path / "d"), inputs(1, 300)[0]
    with files.held(tmp_path / "d", shared=True):
        extension.load(tmp_path / "d")
        other = threading.Thread(target=extension.save, args=(cache, tmp_path / "d", ids[:, :150]))
        other.start()
        other.join(0.2)
        assert other.is_alive() and content(tmp_path / "d") == before
    other.join()
    assert content(tmp_path / "d") != before and documents.size(tmp_path / "d") == sealed.read(tmp_path / "d").nbytes


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


@pytest.mark.parametrize("first", [0, 6])
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
