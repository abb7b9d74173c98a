"""The benchmark of real models: what is measured and in which order, the old rule, and what the page says of given readings."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

import longreach
from longreach import SelfExtend, Stock
from longreach.configs import Window
from longreach.planning import dial
from scripts import scripts

found = scripts("benchmarks", "real_models", "real_models_page")
bench = SimpleNamespace(run=found.real_models, page=found.real_models_page)


def test_every_reading_is_there_once_and_the_ceiling_comes_first():
    plan = list(bench.run.everything())
    assert len(plan) == len(set(plan)) > 400
    assert all(r.setting == "stock" and r.windows <= 1 for r in plan[:4])
    core = {(r.setting, r.windows, r.form) for r in plan if r.task == "passkeys"}
    assert {(name, w, form) for name in bench.run.CORE if name not in bench.page.PAST for w in (1.5, 2.0) for form in ("chat", "raw", "novel")} <= core
    documents = [r.document for r in plan if (r.setting, r.windows, r.form, r.task) == ("dial", 1.5, "chat", "passkeys")]
    assert documents == list(range(4))


def test_the_old_rule_is_the_one_before_the_revision():
    assert bench.run.old_rule(8192, 12288) == SelfExtend(3, 1023, log_scale=8192)
    for context in (600, 1024, 2048, 4096):
        assert bench.run.old_rule(512, context) == dial.choose(Window(512, "nano"), context).method


def test_the_second_rule_is_the_dials_up_to_one_and_a_half_windows():
    for context in (8193, 10000, 12288):
        assert bench.run.second_rule(8192, context) == dial.choose(Window(8192, "", 1e5), context).method
    assert bench.run.second_rule(8192, 16384) == SelfExtend(21, 252) != dial.choose(Window(8192, "", 1e5), 16384).method == SelfExtend(5, 510)


@pytest.fixture(scope="module")
def nano():
    return bench.run.Bench("nano", *longreach.load("nano"))


def test_a_reading_on_nano(nano):
    reading = bench.run.Reading("dial", 2.0, "passkeys", "raw", 1)
    row = nano.measure(reading, nano.method(reading))
    assert row["length"] == 1024 and row["method"]["method"] == "selfextend" and row["bytes"] > 0 and not row["beyond_reach"]
    assert [q["depth"] for q in row["questions"]] == list(bench.run.DEPTHS) and sum(q["score"] for q in row["questions"]) >= 3
    assert all("/1/" in q["id"] for q in row["questions"])  # of the second document
    assert bench.run.key(row) == bench.run.key(nano.identity(reading, nano.method(reading)))
    book = bench.run.Reading("stock", 1.0, "loss", "novel", 0)
    measured = nano.measure(book, Stock())
    assert len(measured["losses"]) == 1 and 2.5 < measured["losses"][0] < 5
    json.dumps([row, measured])


def test_work_goes_on_where_it_was_stopped(nano, tmp_path, monkeypatch):
    first, second = (bench.run.Reading("stock", 1.0, "passkeys", "raw", n) for n in (0, 1))
    monkeypatch.setattr(bench.run, "everything", lambda: iter([first, second]))
    path = tmp_path / "nano.jsonl"
    bench.run.work(nano, path, None, (0, 2), None)
    assert len(bench.run.read_lines(path)) == 1
    with path.open("a") as file:
        file.write('{"setting": "torn')  # a run that was killed while it wrote
    before = path.read_text()
    bench.run.work(nano, path, None, (0, 2), None)
    assert path.read_text() == before
    bench.run.work(nano, path, None, (0, 1), None)
    rows = bench.run.read_lines(path)
    assert sorted(row["document"] for row in rows) == [0, 1]
    path.write_text(json.dumps({**rows[0], "mark": "other"}) + "\n")
    with pytest.raises(SystemExit, match="results of other weights"):
        bench.run.work(nano, path, None, (0, 1), None)


def rows():
    """Two settings, two documents at one and a half windows: the dial finds 9 of 10, stock none."""
    facts = {"cpu": "a processor", "threads": 2, "torch": "2", "transformers": "5", "load_at_start": 0.5, "date": "2026-01-01T00:00:00+00:00"}
    made = []
    for setting, scores in (("stock", [[0] * 5, [0] * 5]), ("dial", [[1] * 5, [1, 1, 1, 1, 0]])):
        for document, found in enumerate(scores):
            questions = [{"id": "", "depth": depth, "score": float(x), "answer": ""} for depth, x in zip(bench.run.DEPTHS, found)]
            made.append({
                "setting": setting, "windows": 1.5, "length": 12288, "task": "passkeys", "form": "raw", "document": document, "questions": questions,
                "parameters": setting.title() + "()", "prefill_seconds": 10.0 + document, "bytes": 2**20, "facts": facts, "dtype": "torch.bfloat16",
            })  # fmt: skip
    for setting, losses in (("stock", [4.0, 3.0] + [6.0] * 14), ("dial", [4.0, 3.0] + [3.5] * 14)):
        made.append({"setting": setting, "windows": 2.0, "length": 16384, "task": "loss", "form": "novel", "document": 0, "losses": losses, "segment": 1024,
                     "facts": facts, "dtype": "torch.bfloat16", "parameters": ""})  # fmt: skip
    return made


def test_the_tables_say_what_was_found():
    found = bench.page.recall([row for row in rows() if row["task"] == "passkeys"])
    assert "| stock | 0 of 10 (0 to " in found and "| **the dial** | 9 of 10 (" in found and "2 documents)" in found and "12288 tokens (1.5x)" in found
    loss = bench.page.losses([row for row in rows() if row["task"] == "loss"])
    assert "| stock | 6.00 | 6.00 | 6.00 | 6.00 |" in loss and "| **the dial** | 3.50 |" in loss and "at 4096 (0.5x)" in loss
    pairs = bench.page.pairs([row for row in rows() if row["task"] == "passkeys"])
    assert "| stock | 9, 0 (p = 0.062) |" in pairs and "dial" not in pairs and "12288 tokens, raw prompt" in pairs
    assert "`Dial()`" in bench.page.methods(rows()[:4]) and "10 s, 1 MiB" in bench.page.methods(rows()[:4])
    assert "6 readings, 2026-01-01; a processor, 2 threads, bfloat16" in bench.page.made(rows())
    mixed = [*rows(), {**rows()[0], "facts": {**rows()[0]["facts"], "cpu": "another", "threads": 1}}]
    assert "a processor or another, 1 thread or 2 threads, bfloat16" in bench.page.made(mixed)


def test_losses_under_one_setting_are_not_shown_for_another():
    """A setting that was read at twice the window only has nothing to say of shorter texts, and one passage is not two."""
    found = [{**row, "document": n} for row in rows() if row["task"] == "loss" for n in (0, 1)]
    shorter = [{**row, "windows": 1.5, "length": 12288, "losses": [5.0] * 12} for row in found if row["setting"] == "dial"]
    lines = bench.page.losses([row for row in found if (row["setting"], row["document"]) != ("stock", 1)] + shorter)
    assert "| stock |  |  |  | 6.00 (1 passage) |" in lines and "| **the dial** | 5.00 | 5.00 | 5.00 | 3.50 |" in lines
    assert "mean of 2 passages, under the setting for 12288 tokens, then under that for 16384" in lines


def test_the_picture_is_drawn(tmp_path):
    bench.page.draw(rows(), tmp_path / "p.png", "a model")
    from PIL import Image

    with Image.open(tmp_path / "p.png") as picture:
        assert picture.width > 700 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_the_pages_are_those_of_the_results():
    for path in sorted(bench.run.RESULTS.glob("*.jsonl")):
        rows = bench.run.read_lines(path)
        keys = [row for row in rows if row["task"] == "passkeys"]
        page, readme = (file.read_text(encoding="utf-8") for file in (bench.page.PAGE, bench.page.README))
        assert len(rows) == len({bench.run.key(row) for row in rows}), "a reading is there twice"
        for name, content in (
            ("recall", bench.page.recall(keys)),
            ("pairs", bench.page.pairs(keys)),
            ("loss", bench.page.losses([row for row in rows if row["task"] == "loss"])),
            ("methods", bench.page.methods(keys)),
            ("settings", bench.page.settings(rows)),
            ("made", bench.page.made(rows)),
        ):
            assert f"<!-- begin {path.stem} {name} -->\n{content.strip()}\n<!-- end" in page, f"{path.stem} {name}: run benchmarks/real_models.py --page"
        if f"<!-- begin {path.stem} -->" in readme:
            assert f"<!-- begin {path.stem} -->\n{bench.page.first_table(rows).strip()}\n<!-- end" in readme


def test_the_profile_of_the_tuned_rows_is_one():
    from longreach import Profile

    for path in sorted(bench.run.RESULTS.glob("*-profile.json")):
        profile = Profile.read(path)
        rows = bench.run.read_lines(bench.run.RESULTS / path.name.replace("-profile.json", ".jsonl"))
        assert {row["mark"][:8] for row in rows} and profile.entries
        for row in rows:
            if row["setting"] == "tuned":
                assert profile.choose(row["length"]).method.to_json() == row["method"]
        assert "/" not in profile.model  # a name, and no folder of whoever made it
