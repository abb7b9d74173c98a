"""Adding a method touches one file: a file dropped beside the others is found, typed on the command line, measured and exact."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import longreach
from families import build, tokens
from longreach import kernels, methods
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


INDEX = '''
"""A method that chooses, with an index of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from longreach.core.choice import Choice, Index, Past
from longreach.core.dense import Dense
from longreach.core.segments import Identity, Layout, Segment, Visible
from longreach.methods.base import Method, hidden_to_nan, require_integer

BLOCK = 4


@dataclass(frozen=True)
class Loud(Index):
    """The blocks whose mean key is the longest."""

    keep: int
    width: ClassVar[int] = 1

    def summarise(self, k: torch.Tensor) -> torch.Tensor:
        return k.mean(-2)

    def choose(self, q: torch.Tensor, past: Past) -> torch.Tensor:
        length = past.compared.float().norm(dim=-1)[:, :, None].masked_fill(~past.candidates[:, None], -1)
        best = length.topk(min(self.keep, length.shape[-1]))
        return best.indices.masked_fill(best.values < 0, -1).expand(q.shape[0], -1, q.shape[2], -1)


@dataclass(frozen=True)
class Loudest(Method):
    """The `keep` blocks of 4 keys whose mean is the longest, and the block that is not full.

    keep  blocks.
    """

    keep: int = field(default=8, metadata={"help": "blocks"})

    name: ClassVar[str] = "loudest"
    paper: ClassVar[str] = "none"
    recalls: ClassVar[str] = "what is loud"

    def __post_init__(self) -> None:
        require_integer("keep", self.keep, 1)

    def layout(self, layer: int = 0) -> Layout:
        return Layout((Segment(Identity(), Identity(), Visible(), choice=Choice(Loud(self.keep), self.keep + 1, BLOCK, "group")),))

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return hidden_to_nan(i - j, j <= i)

    def truth(self, dense: Dense) -> torch.Tensor:
        full, keys = dense.j.shape[1] // BLOCK, dense.turned(dense.k, dense.j[0])
        means = keys[:, :, : full * BLOCK].unflatten(2, (full, BLOCK)).mean(3).norm(dim=-1)[:, :, None]
        whole = (torch.arange(full) + 1) * BLOCK <= dense.i + 1
        whole = whole & dense.seen[..., : full * BLOCK].unflatten(-1, (full, BLOCK)).any(-1)
        means = means.masked_fill(~whole, -1)
        chosen = whole & (means.argsort(-1, descending=True).argsort(-1) < self.keep)
        shown = torch.nn.functional.pad(chosen.repeat_interleave(BLOCK, -1), (0, dense.j.shape[1] - full * BLOCK))
        return self.distances(dense.i, dense.j).masked_fill(~(shown | (dense.j // BLOCK * BLOCK + BLOCK > dense.i + 1)), torch.nan)

    @classmethod
    def small(cls, pairs: int) -> Loudest:
        return cls(3)

    @classmethod
    def neutral(cls, tokens: int, pairs: int) -> Loudest:
        return cls(tokens)
'''

KERNEL = '''
"""A kernel of one's own: everything at once, in fp64."""

import torch

from longreach.kernels.protocol import KV, Chosen, Spans


class Whole:
    name = "whole: in fp64"

    def attend(self, q, kv, work, scale, softcap=None, bias=None):
        groups, columns = q.shape[1] // kv.k.shape[1], torch.arange(kv.k.shape[2])
        k, v = (x.double().repeat_interleave(groups, 1) for x in (kv.k, kv.v))
        logits = q.double() @ k.transpose(-1, -2) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        if isinstance(work, Chosen):
            seen = work.seen[:, None]
            logits = logits if work.bias is None else logits + work.bias
        elif isinstance(work, Spans):
            start, stop = (torch.tensor(x)[:, None, None, None] for x in (work.starts, work.stops))
            seen = (columns >= start) & (columns < stop)
        else:
            behind = work.offset + torch.arange(q.shape[2])[:, None] - columns
            seen = (behind >= work.low) & (behind < (work.high if work.high is not None else 2**62))
        if bias is not None:
            logits = logits + bias.slope.view(-1, 1, 1) * (bias.column[None] - bias.row[:, None])
        logits = logits.masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(logits, -1)
        return (torch.exp(logits - lse[..., None]).nan_to_num(0.0) @ v).to(q.dtype), lse.float()


def kernels(device, dtype):
    return [Whole()]
'''


def test_one_file_is_a_method_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loudest.py").write_text(INDEX)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    try:
        for family in survey(["llama", "gemma2", "bloom"], ["loudest"]):
            assert family.passed and family.cells[0].refusal is None
        model, ids = build("llama"), tokens(1, 60)
        with longreach.extend(model, registry()["loudest"](3)):
            assert (model(ids).logits - build("llama")(ids).logits).abs().max() > 1e-3  # it does choose
    finally:
        sys.modules.pop("longreach.methods.loudest", None)
        methods.__dict__.pop("loudest", None)


@torch.no_grad()
def test_one_file_is_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with the name of a type of device, tested against the dense computation before its first use as the others are."""
    (tmp_path / "cpu.py").write_text(KERNEL)
    monkeypatch.setattr(kernels, "__path__", [str(tmp_path), *kernels.__path__])
    before = sys.modules.pop("longreach.kernels.cpu")
    kernels.kernel_for.cache_clear()
    try:
        for family, method in (("llama", longreach.SelfExtend(3, 8)), ("gemma2", longreach.LMInfinite(9, 3)), ("bloom", longreach.Quest(12, 4, 0, "all"))):
            model, ids = build(family), tokens(2, 75)
            with longreach.extend(model, method, backend="reference"):
                truth = model(ids, use_cache=False).logits
            with longreach.extend(model, method) as extension:
                assert extension.report()["backend"] == "whole: in fp64"
                assert (model(ids).logits - truth).abs().max() <= 1e-5 * truth.abs().max()
        (tmp_path / "cpu.py").write_text(KERNEL.replace("* scale", "* scale * 1.01"))
        sys.modules.pop("longreach.kernels.cpu")
        importlib.invalidate_caches()
        kernels.kernel_for.cache_clear()
        with pytest.raises(ValueError, match="passes the self-test on cpu"):
            kernels.kernel_for(torch.device("cpu"), torch.float32)
    finally:
        sys.modules["longreach.kernels.cpu"] = kernels.cpu = before
        kernels.kernel_for.cache_clear()


def test_it_is_gone_without_its_file() -> None:
    assert "half-far" not in registry() and not hasattr(longreach, "HalfFar")
