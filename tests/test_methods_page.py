"""docs/methods.md is what the command writes, its pictures are small, and what they are drawn from is right."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import longreach
from longreach import configs
from longreach.cli import methods_page
from longreach.core.matrices import matrices
from longreach.drawing import canvas, distances
from longreach.hf import frequencies
from longreach.methods import registry
from longreach.methods.base import Method
from longreach.planning import dial

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/methods.md"
WITHOUT_SETTING = {"combined", "longrope"}  # need parts, or lists that were searched for a model
SHORT = {"stock", "string", "quest"}  # not made for longer texts by themselves


def test_the_page_is_what_the_command_writes():
    text = PAGE.read_text(encoding="utf-8")
    assert methods_page.filled(text) == text, "run: longreach methods --markdown docs/methods.md"


def test_every_method_has_its_picture():
    pictures = {path.stem: path for path in (ROOT / "docs" / methods_page.FOLDER).glob("*.png")}
    assert set(pictures) == set(registry())
    for path in (*pictures.values(), *(ROOT / "docs" / methods_page.FOLDER).glob("*/*.png")):
        assert path.read_bytes().startswith(b"\x89PNG") and 2_000 < path.stat().st_size < 40_000, path


def test_writing_keeps_what_is_written_by_hand(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(methods_page, "draw", lambda shown, path: drawn.append(path))
    page = tmp_path / "methods.md"
    page.write_text("by hand\n" + "".join(f"## {name}\n<!-- begin {name} -->STALE<!-- end {name} -->\nkept {name}\n" for name in ("gallery", *registry())))
    assert methods_page.write(page) == [page, *drawn] and len(drawn) == len(registry())
    text = page.read_text(encoding="utf-8")
    assert "STALE" not in text and text.startswith("by hand\n") and all(f"kept {name}\n" in text for name in registry())
    page.write_text("nothing")
    with pytest.raises(ValueError, match="add the lines <!-- begin gallery -->"):
        methods_page.write(page)


@pytest.mark.parametrize("name", ["string", "ntk"])
def test_pictures_are_small(tmp_path, name):
    path = tmp_path / "picture.png"
    methods_page.draw(methods_page.example(registry()[name]), path)
    assert path.read_bytes().startswith(b"\x89PNG") and 2_000 < path.stat().st_size < 40_000


def test_a_picture_shows_the_distances_it_is_given(monkeypatch: pytest.MonkeyPatch):
    drawn: list[Any] = []
    monkeypatch.setattr(canvas, "save", lambda figure, path, colours: drawn.append((figure, colours)))
    matrix = matrices(longreach.LMInfinite(4, 1).layout().segments, 8).distance
    distances.draw(matrix, "a title", "not written", trained=3)
    (figure, colours), (axes, bar) = drawn[0], drawn[0][0].axes
    assert colours == canvas.REDUCED and figure.get_suptitle() == "a title"
    shown = axes.images[0].get_array()
    assert shown.filled(-1).tolist() == matrix.nan_to_num(-1).tolist() and axes.images[0].norm.vmax == 3
    assert [text.get_text() for text in axes.texts] == [f"{d:g}" for d in matrix.flatten().tolist() if d == d]
    assert [text.get_text() for text in axes.get_legend().texts] == ["not visible", "never trained"] and bar.get_ylabel() == "effective distance (tokens)"
    distances.draw(matrix, "", "not written", trained=4)  # no distance is farther
    assert [text.get_text() for text in drawn[1][0].axes[0].get_legend().texts] == ["not visible"]


def test_a_parameter_without_a_meaning_is_refused():
    @dataclass(frozen=True)
    class Silent(longreach.Stock):
        """Says nothing of what it takes.

        sliding_window   is explained.
        attention_chunk  too.
        """

        depth: int = field(default=1, metadata={"help": "a depth"})

    with pytest.raises(ValueError, match="does not explain depth; add a line"):
        methods_page.read_doc(Silent)


def test_docstrings_are_read_whole():
    doc = methods_page.read_doc(longreach.SelfExtend)
    assert "    i - j <  window:  d = i - j\n" in doc.body and "Raises" not in doc.body
    assert doc.meanings["above"].startswith("group only queries at index >= `above`") and doc.meanings["above"].endswith("(None)")


@pytest.mark.parametrize("kind", [kind for name, kind in registry().items() if name not in WITHOUT_SETTING], ids=lambda kind: kind.name)
@pytest.mark.parametrize(("window", "context"), [(64, 64), (64, 192), (512, 8192), (4096, 8192), (4096, 32768), (8192, 12345)])
def test_recommended_settings_reach_the_context(kind: type[Method], window: int, context: int):
    method = dial.recommended(kind, configs.Window(window, "test"), context)
    reach = method.capacity(window)
    assert isinstance(method, kind) or (kind is longreach.SelfExtend and context <= window)
    assert reach is None or reach >= context or kind.name in SHORT


def test_no_recommended_setting_is_a_sentence():
    for name in WITHOUT_SETTING:
        with pytest.raises(ValueError, match="name its parameters"):
            dial.recommended(registry()[name], configs.Window(512, "test"), 1024)
    with pytest.raises(ValueError, match="no group size of block-selfextend reaches"):
        longreach.BlockSelfExtend.recommended(64, 10**6)


@pytest.mark.parametrize("method", [longreach.SelfExtend(4, 16), longreach.LMInfinite(32, 4), longreach.StreamingLLM(20), longreach.DualChunk(48)], ids=str)
def test_cost_counts_what_is_seen_and_kept(method: Method):
    n = 200
    found = methods_page.cost(method, n)
    seen = matrices(method.layout().segments, n + 60).distance
    assert found.read == int((~seen[n - 1].isnan()).sum())
    later = (~seen[n:, :n].isnan()).any(0)
    assert found.values >= int(later.sum())  # no later query needs more
    assert found.values <= found.keys <= 2 * n


def pairs(method: Method, window: int, context: int, base: float = 1e4, width: int = 128) -> distances.Pairs:
    own, new = frequencies.without_model(method, window, context, base, width)
    return distances.Pairs(own.inverse, new.inverse, window, context, method.largest_distance(context), new.scaling)


def test_what_is_marked_as_untrained():
    assert pairs(longreach.Stock(), 512, 2048).reach == 512
    assert pairs(longreach.Stock(), 512, 512).reach is None
    assert pairs(longreach.PI(4.0), 512, 2048).reach is None
    assert pairs(longreach.YaRN(4.0), 512, 2048).reach is None
    assert pairs(longreach.PI(2.0), 512, 2048).reach == 1024
    assert pairs(longreach.Combined(longreach.PI(2.0), longreach.LMInfinite(512)), 512, 4096).reach is None  # its distances stay below
    found = pairs(longreach.YaRN(4.0), 512, 2048)
    assert math.isclose(found.scaling, 1.13863, rel_tol=1e-5) and not bool(found.untrained.any())


@pytest.mark.parametrize(("window", "base", "reach"), [(2048, 1e4, [1.57, 2.46, 3.87, 6.08]), (8192, 5e5, [1.47, 2.16, 3.17, 4.67])])
def test_ntk_reaches_as_far_as_the_page_says(window, base, reach):
    for factor, share in zip((2, 4, 8, 16), reach):
        found = pairs(longreach.NTK(float(factor)), window, factor * window, base).reach
        assert found is not None and abs(found / window - share) < 0.01
