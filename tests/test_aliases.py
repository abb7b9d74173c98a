"""Module names that the documents of earlier versions used: they still work, and a warning names the new place."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

MOVED = [
    ("loading", "load", "running.loading"),
    ("loading", "shipped_book", "running.loading"),
    ("auto", "recommended", "planning.dial"),
    ("auto", "choose", "planning.dial"),
    ("cost.theory", "concurrency", "planning.theory"),
    ("evals.lm_harness", "evaluate", "evals.lm_eval.harness"),
]


@pytest.mark.parametrize(("old", "name", "new"), MOVED, ids=lambda part: part)
def test_an_old_name_is_the_new_one_and_warns(old, name, new):
    if name == "evaluate":
        pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install 'longreach[eval]'")
    with pytest.warns(DeprecationWarning) as caught:
        found = getattr(import_module(f"longreach.{old}"), name)
    assert found is getattr(import_module(f"longreach.{new}"), name)
    [warning] = caught
    assert str(warning.message) == f"longreach.{old}.{name} will be removed in the next release: import it from longreach.{new}"
    assert warning.filename == __file__  # the line that has to change


def test_from_imports_warn_once_and_work():
    code = "from longreach.loading import load, shipped_book; import longreach.cost.theory; print(load.__module__, len(shipped_book()) > 10**6)"
    done = subprocess.run([sys.executable, "-W", "always::DeprecationWarning", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "longreach.running.loading True\n", done.stderr
    assert done.stderr.count("DeprecationWarning: longreach.loading.") == 2  # one for each name
    assert "longreach.cost.theory" not in done.stderr  # importing is not using


def test_a_name_that_never_was_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'longreach.auto' has no attribute 'nonsense'"):
        _ = import_module("longreach.auto").nonsense


def test_an_old_name_is_an_attribute_of_the_package_as_before():
    code = "import longreach; print(longreach.loading.shipped_book is longreach.shipped_book, longreach.auto.recommended.__module__)"
    done = subprocess.run([sys.executable, "-W", "always::DeprecationWarning", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True longreach.planning.dial\n", done.stderr
    assert done.stderr.count("DeprecationWarning: longreach.loading.shipped_book will be removed") == 1
