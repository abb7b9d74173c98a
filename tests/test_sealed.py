"""Sealed blocks: what a record says, damage anywhere, and hostile folders."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import longreach
from blocks import BLOCK, content, inputs, more, saved
from families import build
from longreach import SelfExtend
from longreach.cli import targets
from longreach.hf import documents
from longreach.memory import records, sealed
from longreach.memory.records import Damaged, Key

pytestmark = pytest.mark.usefixtures("small_blocks")


@pytest.fixture(scope="module")
def extension(small_blocks: None) -> Iterator[Any]:
    with longreach.extend(build("llama"), SelfExtend(5, 8)) as made:
        yield made


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


# -- what a broken off save leaves ------------------------------------------------------------------------------------------------------

PART = f".tail-{1:08d}.{'0' * 16}.partial"


def test_what_safetensors_leaves_of_a_tail_is_no_obstacle_and_goes(extension, tmp_path):
    """It writes into a file of its own first: a kill leaves that beside the part. Without a part, or as a link, such a name is somebody else's."""
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / ".tmpAb12Cd").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"holds other things, such as .\.tmpAb12Cd"):
        documents.writable(folder)
    (folder / PART).touch()
    documents.writable(folder)
    saved(extension, folder, 90)
    assert not list(folder.glob(".*"))
    (folder / ".tmpAb12Cd").write_bytes(b"mine")
    sealed.recover(folder)
    assert (folder / ".tmpAb12Cd").exists()
    (folder / ".tmpLonger1").touch()
    (folder / ".tmpLinke1").symlink_to(tmp_path / "elsewhere")
    (folder / PART).touch()
    sealed.recover(folder)
    assert {path.name for path in folder.glob(".*")} == {".tmpLonger1", ".tmpLinke1"}


def test_the_part_goes_last(tmp_path, monkeypatch):
    """Else a kill between the two would leave a file that nobody knows."""
    gone = []
    for name in (PART, ".tmpAb12Cd", f"blocks-{1:08d}"):
        (tmp_path / name).touch()
    monkeypatch.setattr(os, "unlink", gone.append)
    sealed.recover(tmp_path)
    assert Path(gone[0]).name == ".tmpAb12Cd" and len(gone) == 3


def test_a_folder_of_leftovers_takes_a_document_on_the_command_line(tmp_path):
    (tmp_path / PART).touch()
    (tmp_path / ".tmpAb12Cd").touch()
    targets.refuse(tmp_path, targets.DOCUMENT, force=False)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is no document that Longreach wrote"):
        targets.refuse(tmp_path, targets.DOCUMENT, force=False)
