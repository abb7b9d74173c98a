"""The picture of a tune: what has a loss stands at it, and what has none stands beside, under its name."""

from __future__ import annotations

from typing import Any

import pytest

from longreach.drawing import frontier


def found(measured: int, others: int) -> dict[str, Any]:
    def row(n: int, loss: float | None) -> dict[str, Any]:
        return {"label": f"candidate {n}", "recall": 0.8, "low": 0.4, "high": 0.95, "found": 4, "of": 5, "loss": loss, "chosen": n == 0}

    rows = [row(n, 3.5 + 0.1 * n) for n in range(measured)] + [row(measured + n, None) for n in range(others)]
    untried = {**row(99, None), "recall": None}
    named = {"model": "nano", "context": 1024, "trained_window": 512, "tasks": ["passkeys"], "price": 0.25}
    return {**named, "candidates": [*rows, untried], "ceiling": [{"name": "recall at 1x", "length": 512, "recall": 1.0}]}


def test_what_has_no_loss_is_not_drawn_as_too_dear():
    main, strip = frontier.picture(found(3, 12)).axes
    assert main.get_xlim()[1] < 3.9 and len(main.containers) == 3
    assert [tick.get_text() for tick in strip.get_xticklabels()] == [f"candidate {n}" for n in range(3, 15)]  # all of them can be told
    assert strip.get_title() == "loss not measured" and strip.get_ylim() == main.get_ylim() == (-8, 108)
    assert main.figure.legends[0].get_texts()[0].get_text() == "candidate 0: 4 of 5 (chosen)"


@pytest.mark.parametrize(("measured", "others"), [(2, 0), (0, 3), (0, 0)])
def test_where_there_is_one_kind_only(tmp_path, measured, others):
    assert len(frontier.picture(found(measured, others)).axes) == 1
    frontier.draw(found(measured, others), tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
