"""Adding a method touches one file: a file dropped beside the others is found, typed on the command line, measured and exact."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import longreach
from longreach import methods
from longreach.checking.exactness import survey
from longreach.cli import main
from longreach.methods import from_json, registry

FILE = '''
"""A method of one's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.methods.base import Method, require_integer
from longreach.core.segments import Affine, Identity, Layout, Segment, Visible


@dataclass(frozen=True)
class HalfFar(Method):
    """d = i - j below `window`, else (i - j + window) / 2.

    window  tokens kept at their true distance.
    """

    window: int = field(default=64, metadata={"help": "tokens kept at their true distance"})

    name: ClassVar[str] = "half-far"
    paper: ClassVar[str] = "none"
    recalls: ClassVar[str] = "everything"

    def __post_init__(self) -> None:
        require_integer("window", self.window, 1)

    def layout(self, layer: int = 0) -> Layout:
        return Layout((Segment(Identity(), Identity(), Visible(0, self.window)), Segment(Affine(0.5, self.window / 2), Affine(0.5), Visible(self.window))))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        exact = (i - j).double()
        return torch.where(j <= i, torch.where(exact < self.window, exact, (exact + self.window) / 2), torch.nan)

    @classmethod
    def small(cls, pairs: int) -> HalfFar:
        return cls(8)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> HalfFar:
        return cls(tokens)
'''


@pytest.fixture
def one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "half_far.py").write_text(FILE)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    yield
    sys.modules.pop("longreach.methods.half_far", None)
    if hasattr(methods, "half_far"):
        del methods.half_far


def test_one_file_is_a_method(one_file: None, capsys: pytest.CaptureFixture[str]) -> None:
    method = registry()["half-far"](window=3)
    assert longreach.HalfFar is type(method) and from_json(method.to_json()) == method
    for family in survey(["llama", "gemma2", "gptj", "bloom"], ["half-far"]):
        assert family.passed and len(family.cells) == 1 and family.cells[0].refusal is None
    assert main(["methods", "--json"]) == 0
    assert "half-far" in {entry["name"] for entry in json.loads(capsys.readouterr().out)["methods"]}
    assert main(["distances", "half-far", "--window", "2", "--length", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["distances"][-1] == [3.0, 2.5, 2.0, 1.0, 0.0]


def test_it_is_gone_without_its_file() -> None:
    assert "half-far" not in registry() and not hasattr(longreach, "HalfFar")
