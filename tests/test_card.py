"""benchmarks/card.py without a card: what is kept of a run that the card, a crash or the clock cuts short."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts import scripts

ROOT = Path(__file__).resolve().parent.parent
BROKEN = """
import os, time

def test_first(): pass
def test_wrong(): assert 1 == 2, "not of the card"
def test_card():
    blocking = os.environ.get("CUDA_LAUNCH_BLOCKING")
    try:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    except RuntimeError as error:
        raise ValueError(f"no backend passes, launch blocking is {blocking}") from error
def test_after(): pass
def test_crash(): os._exit(3)
def test_last(): assert os.environ["LONGREACH_TEST_DEVICE"] == "cpu"
"""
SLOW = """
import time

def test_quick(): pass
def test_slow(): time.sleep(600)
def test_never(): pass
"""


@pytest.fixture(scope="module")
def bench() -> Any:
    return scripts("benchmarks", "attention", "card", "common", "model")


@pytest.mark.parametrize("name", [f"{folder}/{path.stem}" for folder in ("benchmarks", "recipes") for path in sorted((ROOT / folder).glob("*.py"))])
def test_every_script_finds_what_it_imports(name):
    folder, script = name.split("/")
    assert getattr(scripts(folder, script), script).__doc__


def tried(bench: Any, folder: Path, content: str, seconds: float) -> dict[str, Any]:
    file = folder / "target" / "test_fake.py"
    file.parent.mkdir()
    file.write_text(content, encoding="utf-8")
    whole = seconds * sum(bench.card.SHARES.values()) / bench.card.SHARES["tests"]
    return bench.card.tests(bench.card.Run(folder, "cpu", False, time.monotonic() + whole), [str(file)], "test")


def test_an_error_of_the_card_ends_a_process_and_not_the_tests(bench, tmp_path):
    """The first such test runs again with launch blocking; those after it, and after a crash, still get their result."""
    found = tried(bench, tmp_path, BROKEN, 120)
    lines = bench.card.card_tests.read(tmp_path / "tests.jsonl")
    outcomes = {name.rpartition("::")[2]: line["outcome"] for name, line in lines.items()}
    assert outcomes == {
        "test_first": "passed", "test_wrong": "failed", "test_card": "failed", "test_after": "passed", "test_crash": "ended the process", "test_last": "passed",
    }  # fmt: skip
    assert [name.rpartition("::")[2] for name, line in lines.items() if line.get("card_error")] == ["test_card"]
    assert not found["passed"] and found["finished"] and found["processes"] == 3 and [name.rpartition("::")[2] for name in found["failed"]] == [
        "test_wrong", "test_card", "test_crash",
    ]  # fmt: skip
    log, again = ((tmp_path / name).read_text(encoding="utf-8") for name in ("tests.log", "tests-blocking.log"))
    assert all(f"::{name}" in log for name in outcomes) and "launch blocking is None" in log and "illegal memory access" in log
    assert found["blocking"]["test"].endswith("::test_card") and found["blocking"]["exit_code"] == 1
    assert again.startswith("$ CUDA_LAUNCH_BLOCKING=1 python") and "launch blocking is 1" in again and "test_first" not in again


def test_the_clock_leaves_what_was_done(bench, tmp_path):
    begun = time.monotonic()
    found = tried(bench, tmp_path, SLOW, 5)
    assert time.monotonic() - begun < 40
    assert found["timed_out"] and not found["passed"] and not found["finished"] and found["blocking"] is None
    assert found["outcomes"] == {"passed": 1, "cut": 1} and found["failed"] == []
    assert "test_quick PASSED" in (tmp_path / "tests.log").read_text(encoding="utf-8")


def test_a_step_may_take_what_is_left_but_for_the_shares_of_the_next(bench, tmp_path):
    run = bench.card.Run(tmp_path, "cpu", True, time.monotonic() + 1200)
    assert [round(run.limit(step)) for step in ("tests", "attention", "model")] == [400, 450, 1200]
    assert bench.card.Run(tmp_path, "cpu", True, time.monotonic() - 1).limit("model") == 0


def test_every_step_is_reported(bench, tmp_path, monkeypatch, capsys):
    commands: list[list[str]] = []

    def python(self: Any, arguments: list[str], log: str, seconds: float, more: Any = None) -> dict[str, Any]:
        commands.append(list(arguments))
        return {"exit_code": 0 if "model.py" not in arguments[0] else 1, "timed_out": False, "seconds": 1.0, "limit_seconds": seconds, "log": log}

    monkeypatch.setattr(bench.card.Run, "python", python)
    assert bench.card.main(["--out", str(tmp_path / "new"), "--device", "cpu", "--minutes", "1"]) == 1
    steps = json.loads((tmp_path / "new" / "card.json").read_text())["steps"]
    assert [(name, step["passed"]) for name, step in steps.items()] == [("tests", False), ("attention", True), ("model", False)], "no test is no success"
    assert "--no-cudnn" in commands[1] and commands[2][-4:] == ["random-8B", "--tokens", "8192", "32768"] and "bf16" in commands[2]
    assert "model: FAILED (exit code 1)" in capsys.readouterr().out
    for arguments, says in ((["--out", str(tmp_path / "new")], "not an empty folder"), (["--out", str(tmp_path / "x"), "--minutes", "0"], "more than 0")):
        with pytest.raises(SystemExit):
            bench.card.main([*arguments, "--device", "cpu"])
        assert says in capsys.readouterr().err


# -- the benchmarks it runs ---------------------------------------------------------------------------------------------------


def test_attention_is_kept_case_by_case(bench, tmp_path, monkeypatch):
    def measure(case: Any, dtype: str, *rest: Any) -> dict[str, Any]:
        if dtype == "fp16":
            raise KeyboardInterrupt
        return {"case": case.name, "dtype": dtype, "tokens": 1, "gate": {"passed": False, "measured": {"error": float("nan")}, "failures": ["it is nan"]}}

    monkeypatch.setattr(bench.attention, "measure", measure)
    monkeypatch.setattr(bench.attention, "read_bandwidth", lambda device: 1.0)
    monkeypatch.setattr(sys, "argv", ["attention.py", "--dtype", "bf16,fp16", "--case", "selfextend-decode", "--out", str(tmp_path / "a.json")])
    with pytest.raises(KeyboardInterrupt):
        bench.attention.main()
    (entry,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert entry["dtype"] == "bf16" and entry["gate"]["measured"] == {"error": "nan"}


def test_a_model_is_kept_measurement_by_measurement(bench, tmp_path, monkeypatch):
    def rounds(*arguments: Any) -> Any:
        yield "stock", 2.0, 0.5
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.model, "rounds", rounds)
    monkeypatch.setattr(bench.model, "gate", lambda *_: ({"stock": 0.01}, []))
    monkeypatch.setattr(sys, "argv", ["model.py", "--model", "random-1M", "--tokens", "64", "--out", str(tmp_path / "m.json")])
    with pytest.raises(KeyboardInterrupt):
        bench.model.main()
    (entry,) = json.loads((tmp_path / "m.json").read_text())["cases"]
    assert entry["gate"]["passed"] and entry["prefill"]["stock"]["seconds"] == [2.0] and entry["token"]["stock"]["median"] == 0.5


def test_what_is_ended_is_ended_with_its_children(bench, tmp_path):
    beats = tmp_path / "beats"
    child = f"import time\nwhile True:\n    print('x', file=open({str(beats)!r}, 'a'))\n    time.sleep(0.05)"
    script = tmp_path / "parent.py"
    script.write_text(f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\nprint('up', flush=True)\ntime.sleep(600)")
    begun = time.monotonic()
    found = bench.card.Run(tmp_path, "cpu", True, begun + 60).python([str(script)], "parent.log", 2.0)
    assert found["timed_out"] and time.monotonic() - begun < 20 and "up" in (tmp_path / "parent.log").read_text()
    counted = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == counted > 0
