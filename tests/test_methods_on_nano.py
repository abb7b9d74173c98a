"""benchmarks/methods_on_nano.py on a measurement that is made up: what is kept, what is said, what is drawn. The real one is run by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longreach import configs
from scripts import scripts

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["stock", "selfextend", "lm-infinite", "pi"]


@pytest.fixture(scope="module")
def bench() -> Any:
    found = scripts("benchmarks", "methods_on_nano", "methods_figure", "methods_result")
    return SimpleNamespace(run=found.methods_on_nano, figure=found.methods_figure, result=found.methods_result)


@pytest.fixture
def made_up(bench, monkeypatch):
    """Stock and LM-Infinite find near keys, SelfExtend all, PI none; the cells that were measured are noted."""
    measured = []

    def measure(subject, plan, method, length, progress):
        measured.append((method.name, length))
        finds = {"selfextend": 10**9, "pi": 0}.get(method.name, 512)
        distances = [length * step // plan.depths for step in range(plan.depths) for _ in range(plan.keys_at(length))]
        reach = method.capacity(512)
        return {
            "identity": bench.run.identity(subject, plan, method, length), "method": method.name, "class": type(method).__name__, "length": length,
            "parameters": method.brief(), "reach": reach, "beyond_reach": reach is not None and reach < length, "frequencies": method.rescales,
            "bounded": method.bounded, "trials": [{"distance": d, "depth": 0.0, "found": d < finds} for d in distances],
            "loss": [4.0 + (n * 0.1 if method.name == "stock" else 0) for n in range(length // 512)], "seconds": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(bench.run, "measure", measure)
    plan = bench.run.Plan((512, 1024, 2048), (8, 8, 8), 4, 1, 1)
    subject = bench.run.Subject(None, None, "", configs.Window(512, "test"), "mark")
    return measured, plan, subject


def test_a_run_that_was_cut_goes_on(bench, made_up, tmp_path):
    measured, plan, subject = made_up
    path = tmp_path / "cells.jsonl"
    whole = bench.run.run(subject, NAMES, plan, path)
    assert len(measured) == len(whole["cells"]) == 12 and measured[:4] == [("stock", 512), ("stock", 512), ("lm-infinite", 512), ("pi", 512)]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:5]) + "\n" + lines[5][:40])  # cut while a line was written
    measured.clear()
    assert bench.run.run(subject, NAMES, plan, path) == whole and len(measured) == 7
    measured.clear()
    assert bench.run.run(subject, NAMES, plan, path) == whole and not measured
    assert all(json.loads(line) for line in path.read_text().splitlines() if line != lines[5][:40])
    bench.run.run(replace(subject, mark="other weights"), NAMES, plan, path)
    assert len(measured) == 12
    measured.clear()
    bench.run.run(subject, NAMES, replace(plan, keys=(8, 9, 8)), path)
    assert measured == [(name, 1024) for name in NAMES]


def test_what_is_said(bench, made_up, tmp_path):
    _, plan, subject = made_up
    result = bench.run.run(subject, [*NAMES, "longrope"], plan, tmp_path / "cells.jsonl")
    assert list(result["left_out"]) == ["longrope"]
    text = bench.result.tables(result)
    assert "| SelfExtend | 100 % (68 to 100) | 100 % (81 to 100) |" in text and "| PI | 0 % (0 to 32) | 0 % (0 to 19) |" in text
    assert "| Stock | 0 % (0 to 32)* | 0 % (0 to 19)* |" in text  # beyond its reach
    last = bench.result.findings(result)
    assert last[0].startswith("512 tokens: the lowest loss") and "SelfExtend finds 100 % (68 to 100) of 8 far keys, its interval above all others" in last[1]
    assert "LMInfinite, whose memory is constant, found 0 of 24 far keys" in last[-2] and last[-1].startswith("LongRoPE is left out")


def test_intervals(bench):
    share = bench.result.Share
    low, high = share(8, 10).interval  # Wilson's interval of 8 in 10, in the literature as 0.490 to 0.943
    assert abs(low - 49.0) < 0.1 and abs(high - 94.3) < 0.1
    assert share(0, 5).interval[0] == 0 and share(5, 5).interval[1] == 100


def test_the_figure(bench, made_up, tmp_path):
    _, plan, subject = made_up
    for names in (NAMES, ["stock"]):
        result = bench.run.run(subject, names, plan, tmp_path / "cells.jsonl")
        bench.figure.draw(result, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_options(bench, monkeypatch, capsys):
    def given(*arguments):
        monkeypatch.setattr(sys, "argv", ["methods_on_nano.py", *arguments])
        return bench.run.options(512)

    usual = given()
    assert usual.lengths == [512, 1024, 2048, 4096, 8192] and usual.keys == [8, 8, 6, 6, 3]
    assert given("--lengths", "1024", "512", "--keys", "2").keys == [2, 2]
    for wrong, sentence in ((["--lengths", "700"], "pass for example 512"), (["--keys", "1", "2"], "one for each of the 5 lengths")):
        with pytest.raises(SystemExit):
            given(*wrong)
        assert sentence in capsys.readouterr().err
