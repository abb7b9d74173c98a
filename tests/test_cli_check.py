"""`longreach check`: sound models pass, a wrong fast path fails, and what a method does not promise is skipped."""

from __future__ import annotations

import pytest
import torch

import longreach
from commands import Run, refused
from longreach.checking import measurements
from tiny import WINDOW


def test_check_passes_on_a_sound_model(run: Run, folders: dict[str, str]) -> None:
    found = run("check", "--model", folders["llama"], "--tokens", 90, "--json")
    data = found.json
    assert found.code == 0 and data["passed"] is True
    assert [row["times"] for row in data["dial"]] == [2, 4, 8, 16, 32]
    assert all((row["method"] is None) == (row["refusal"] is not None) for row in data["dial"])
    for row in data["dial"]:
        assert row["method"] is None or row["capacity"] >= row["context"]
    assert [None if g["method"] is None else g["method"]["method"] for g in data["groups"]] == [None, "selfextend", "lm-infinite"]
    values = [m["value"] for g in data["groups"] for m in g["measurements"]]
    assert len(values) == 3 + 4 + 4 and all(v is not None for v in values)
    assert data["extension"]["trained_window"] == WINDOW


def test_check_in_half_precision(run: Run, folders: dict[str, str]) -> None:
    found = run("check", "--model", folders["bf16"], "--tokens", 90, "--method", "selfextend", "--group-size", 4, "--window", 16)
    assert found.code == 0 and "all gates pass" in found.out and "half precision" in found.out
    assert "selfextend --group-size 4 --window 16" in found.out


def test_check_fails_where_the_fast_path_is_wrong(run: Run, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = longreach.SelfExtend.layout
    monkeypatch.setattr(longreach.SelfExtend, "layout", lambda self, layer=0: right(longreach.SelfExtend(self.group_size, self.window + 1)))
    arguments = ["check", "--model", folders["llama"], "--tokens", 60, "--method", "selfextend", "--group-size", 4, "--window", 16]
    found = run(*arguments, "--json")
    assert found.code == 1 and found.json["passed"] is False
    failed = [m["name"] for g in found.json["groups"] for m in g["measurements"] if not m["passed"]]
    assert failed == ["fast path against the dense truth, 60 tokens"]
    plain = run(*arguments)
    assert plain.code == 1 and "FAIL" in plain.out


def test_check_skips_what_a_method_does_not_promise(run: Run, folders: dict[str, str]) -> None:
    arguments = ["check", "--model", folders["llama"], "--tokens", 60, "--method", "lm-infinite", "--n-local", 16, "--top-k", 2, "--top-k-from-layer", 0]
    found = run(*arguments, "--json")
    skipped = [m["note"] for g in found.json["groups"] for m in g["measurements"] if m["value"] is None]
    assert found.code == 0 and skipped == ["this method depends on how a prompt is cut"]


def test_check_over_tiers_says_what_lay_where(run: Run, folders: dict[str, str]) -> None:
    """400 tokens: two blocks of 128 of each of two kinds in two layers, of which the device has room for six."""
    options = ["check", "--model", folders["llama"], "--tokens", 400, "--method", "selfextend", "--group-size", 8, "--window", 16]
    found = run(*options, "--memory", "device=48KiB,host=1MiB", "--json").json
    assert found["passed"] and "memory" not in found["groups"][0]
    tiers = found["groups"][1]["memory"]["tiers"]
    assert list(tiers) == ["device", "host"] and tiers["host"]["blocks"] > 0 < tiers["device"]["blocks"] and tiers["host"]["fetched"] > 0
    shown = " ".join(run(*options, "--memory", "device=48KiB,host=1MiB").out.split())
    assert "in tiers device 48KiB of 48KiB, 6 blocks; 48 fetched, 2 moved on host 16KiB of 1MiB, 2 blocks; 16 fetched" in shown
    assert "75.0% of what was asked for was on the device" in shown and "s waited" in shown
    refused(run, "check", "--model", folders["llama"], "--recall", "--context", 256, "--memory", "device=64KiB", says="leave out --all and --recall")


def test_check_context_decides_what_is_looked_at(run: Run, folders: dict[str, str]) -> None:
    data = run("check", "--model", folders["llama"], "--tokens", 90, "--context", 256, "--json").json
    assert data["extension"]["context"] == 256 and data["groups"][1]["method"] == data["extension"]["method"]
    refused(run, "check", "--model", folders["llama"], "--context", 10**7, says="declare at most")


def test_a_gate_that_is_not_finite_fails() -> None:
    found = measurements.Measurement("x", measurements.difference(torch.tensor([float("nan")]), torch.ones(1)), 1.0)
    assert found.to_json() == {"name": "x", "value": None, "gate": 1.0, "passed": False, "note": "not finite"}


def test_a_method_that_chooses_is_measured_where_it_chooses(run: Run, folders: dict[str, str]) -> None:
    """Decoded tokens against the truth cut in the same way; a budget that covers the text has stand-ins, as the far zone of others has."""
    options = ["check", "--model", folders["llama"], "--json", "--method", "quest", "--dense-layers", 0, "--page-size", 4]
    found = run(*options, "--budget", 16)
    names = [m["name"] for g in found.json["groups"] for m in g["measurements"]]
    assert found.code == 0 and "decoding against the dense truth, cut in the same way, 8 tokens" in names and "Quest(" in found.err
