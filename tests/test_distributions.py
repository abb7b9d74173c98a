""".ci/distributions.py names what is wrong with a wheel or a source distribution. That both are right is checked by .ci/run, which builds them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("distributions", ROOT / ".ci/distributions.py")
assert spec is not None and spec.loader is not None
distributions: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(distributions)

METADATA = b"Name: longreach\nLicense-Expression: Apache-2.0\nDescription-Content-Type: text/markdown\n\n# Longreach\n"
PACKAGE = {"longreach/__init__.py": b"", "longreach/py.typed": b"", **{f"longreach/nano/{name}": b"" for name in distributions.NANO}}
WHEEL = {**PACKAGE, "longreach-1.dist-info/METADATA": METADATA, "longreach-1.dist-info/licenses/LICENSE": b""}
TRACKED = {**{f"src/{name}": data for name, data in PACKAGE.items()}, "README.md": b"# Longreach\n", "tests/test_a.py": b""}


def test_what_is_right_has_no_problems():
    assert distributions.problems(WHEEL, dict(WHEEL), {**TRACKED, "PKG-INFO": METADATA}, TRACKED) == []


@pytest.mark.parametrize(
    ("wheel", "source", "sentence"),
    [
        ({"tests/test_a.py": b""}, {}, "the wheel is not src/longreach: ['tests/test_a.py']"),
        ({"longreach/py.typed": None}, {}, "the wheel lacks ['longreach/py.typed']"),
        ({}, {"README.md": None}, "the source distribution is not what git tracks: ['README.md']"),
        ({"longreach-1.dist-info/METADATA": METADATA.replace(b"text/markdown", b"text/plain")}, {}, "Description-Content-Type is 'text/plain'"),
        ({"longreach-1.dist-info/METADATA": METADATA + b"Old text."}, {}, "the description in the metadata is not README.md"),
        ({"longreach-1.dist-info/licenses/LICENSE": None}, {}, "the wheel lacks the licence"),
    ],
)
def test_every_problem_is_named(wheel, source, sentence):
    changed = lambda files, changes: {name: data for name, data in {**files, **changes}.items() if data is not None}  # noqa: E731
    found = distributions.problems(changed(WHEEL, wheel), changed(WHEEL, wheel), changed(TRACKED, source), TRACKED)
    assert any(sentence in problem for problem in found), found


def test_another_wheel_from_the_source_distribution_is_a_problem():
    [problem] = distributions.problems(WHEEL, {**WHEEL, "longreach/__init__.py": b"1"}, TRACKED, TRACKED)
    assert problem == "the source distribution builds another wheel: ['longreach/__init__.py']"
