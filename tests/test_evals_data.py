"""Loading of data sets: official formats, folders, archives, the Hub; hostile and broken files are refused with the place."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from longreach.evals.samples import data
from longreach.evals.samples.base import Settings
from longreach.evals.samples.data import Source

SOURCE = Source("owner/set", ("rows.jsonl", "rows*.parquet"), {"a": str, "b": (int, list)}, archive="data.zip")
ROWS = [{"a": "one", "b": 1}, {"a": "two", "b": [2]}, {"a": "drei – 三", "b": 3}]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)


def read(path: Path | str, source: Source = SOURCE, group: str = "") -> list[data.Row]:
    return data.rows(source, Settings(data=str(path)), group)


def zipped(path: Path, **members: str | bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_files_folders_and_archives(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "rows.jsonl").write_text("\ufeff" + TEXT + "\n\n", encoding="utf-8")  # a byte order mark and empty lines
    (tmp_path / "list.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "z").mkdir()
    zipped(tmp_path / "z" / "data.zip", **{"data/rows.jsonl": TEXT, "__MACOSX/data/rows.jsonl": "junk", "data/other.jsonl": "x"})
    for path in ("deep/er/rows.jsonl", "deep", "list.json", "z", "z/data.zip"):
        assert read(tmp_path / path) == ROWS, path


def test_the_folder_of_the_group_is_looked_at_first(tmp_path):
    for name in ("leval", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps({"a": name, "b": 1}), encoding="utf-8")
    assert read(tmp_path, group="leval")[0]["a"] == "leval"
    with pytest.raises(ValueError, match=r"more than one rows\.jsonl"):
        read(tmp_path)


def test_tables(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (pip install pyarrow)")
    import pyarrow

    rows = [{"a": row["a"], "b": [1]} for row in ROWS]
    (tmp_path / "x").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), tmp_path / "x" / "rows-0.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows[2:]), tmp_path / "x" / "rows-1.parquet")
    assert read(tmp_path) == rows
    (tmp_path / "x" / "rows-1.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=r"rows-1.parquet.*parquet"):
        read(tmp_path)


BROKEN = {
    "no json": (b'{"a": "x", "b": 1}\n{"a": "x"', "line 2"),
    "no object": (b'{"a": "x", "b": 1}\n\n[1]', "line 3: expected an object"),
    "field missing": (b'{"a": "x"}', "line 1: there is no field 'b', only a"),
    "wrong type": (b'{"a": 3, "b": 1}', "line 1: the field 'a' holds int"),
    "no utf-8": (b'{"a": "x", "b": 1}\n{"a": "\xff", "b": 1}', "line 2: cannot be read"),
    "too deep": (b"[" * 200_000, "line 1: cannot be read"),
    "nothing": (b"\n\n", "has no rows"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lines_are_named(tmp_path, name):
    content, sentence = BROKEN[name]
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        read(zipped(tmp_path / "data.zip", **{"rows.jsonl": content}))


def test_sizes_are_bounded(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(TEXT, encoding="utf-8")
    bomb = zipped(tmp_path / "data.zip", **{"rows.jsonl": b'{"a": "' + b"0" * 10**6 + b'", "b": 1}'})
    assert bomb.stat().st_size < 10**4
    monkeypatch.setattr(data, "LINE_BYTES", 10**5)
    with pytest.raises(ValueError, match=r"line 1.*longer than 100000 bytes"):
        read(bomb)
    monkeypatch.setattr(data, "FILE_BYTES", 10**5)
    with pytest.raises(ValueError, match="more than the 100000 that any published file has"):
        read(bomb)
    monkeypatch.setattr(data, "FILE_BYTES", 10)
    with pytest.raises(ValueError, match="more than the 10 "):
        read(tmp_path / "rows.jsonl")


def test_names_within_an_archive_lead_nowhere(tmp_path):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    archive = zipped(inside / "data.zip", **{"../../rows.jsonl": TEXT})
    before = sorted(tmp_path.rglob("*"))
    assert read(archive) == ROWS
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_no_archive_or_has_not_the_file(tmp_path):
    (tmp_path / "data.zip").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="not a zip file"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"has no rows\.jsonl"):
        read(zipped(tmp_path / "data.zip", **{"x.jsonl": TEXT}))
    with pytest.raises(ValueError, match=r"more than one rows\.jsonl"):
        read(zipped(tmp_path / "data.zip", **{"x/rows.jsonl": TEXT, "y/rows.jsonl": TEXT}))
    (tmp_path / "data.zip").unlink()
    with pytest.raises(ValueError, match=r"has no rows\.jsonl or .*owner/set from the Hub"):
        read(tmp_path)
    (tmp_path / "rows.csv").write_text("a,b", encoding="utf-8")
    with pytest.raises(ValueError, match="not one of"):
        read(tmp_path / "rows.csv")
    with pytest.raises(ValueError, match="there is no file or folder"):
        read("./nowhere/at/all")


def test_the_hub(tmp_path, monkeypatch):
    """Without a network: the client is asked for the right files, and what it cannot get is said with the way round."""
    import huggingface_hub

    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows.jsonl").write_text(TEXT, encoding="utf-8")
    asked = []

    def snapshot(repo, **options):
        asked.append((repo, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert data.rows(SOURCE, Settings()) == ROWS and data.rows(SOURCE, Settings(data="copy/of-it")) == ROWS
    assert [repo for repo, _ in asked] == ["owner/set", "copy/of-it"]
    assert asked[0][1]["repo_type"] == "dataset" and {"rows.jsonl", "*/rows.jsonl", "data.zip"} <= set(asked[0][1]["allow_patterns"])

    def missing(repo, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline, and not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(ValueError, match=r"owner/set from the Hub: offline.*--data FOLDER"):
        data.rows(SOURCE, Settings())


def test_a_long_reason_of_the_hub_ends_with_a_sentence(monkeypatch):
    import huggingface_hub

    def missing(repo, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"The first sentence is {'very ' * 30}long. The second {'is longer ' * 30}than that.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", missing)
    with pytest.raises(ValueError, match=r"very long; download rows\.jsonl.* elsewhere and pass its folder \(--data FOLDER\)$"):
        data.rows(SOURCE, Settings())


def test_offline_mode_of_the_hub(tmp_path, monkeypatch):
    """The real client, told not to use the network: no connection is tried, and the sentence has the way round."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="pass its folder"):
        data.rows(SOURCE, Settings())


def test_fewer_are_among_more():
    items = list(range(100))
    picked = [data.pick(items, Settings(samples=n, seed=4), "t") for n in (5, 20, 100, 0, 200)]
    assert [len(p) for p in picked] == [5, 20, 100, 100, 100]
    assert set(picked[0]) < set(picked[1]) and all(p == sorted(p) for p in picked)
    assert data.pick(items, Settings(samples=5, seed=5), "t") != picked[0] != data.pick(items, Settings(samples=5, seed=4), "u")
    with pytest.raises(ValueError, match="0 \\(all\\) or more"):
        data.pick(items, Settings(samples=-1), "t")


def test_data_as_text_is_read_and_never_run():
    assert data.literal("[{'Q': 'it\\'s', 'A': None}]", "here") == [{"Q": "it's", "A": None}]
    assert data.literal('[{"Q": null}]', "here") == [{"Q": None}] and data.literal([1], "here") == [1]
    for text in ("__import__('os').getcwd()", "[1, 2", "(" * 5000, "f()"):
        with pytest.raises(ValueError, match="here: neither JSON nor a Python literal"):
            data.literal(text, "here")
