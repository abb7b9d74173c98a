"""`longreach check --all` and the page it writes: complete, and what a fresh run measures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from families import FAMILIES, REFUSED
from longreach.checking.exactness import FAST, NEUTRAL, Cell, Family, survey
from longreach.checking.families_page import page
from longreach.cli import main
from longreach.methods import registry

PAGE = Path(__file__).parents[1] / "docs" / "families.md"


def section(text: str, name: str) -> list[list[str]]:
    """The rows of a section's table, its head first."""
    body = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
    return [[part.strip() for part in line.strip("|").split(" | ")] for line in body.splitlines() if line.startswith("|") and "---" not in line]


def test_the_page_lists_every_family_and_method():
    text = PAGE.read_text(encoding="utf-8")
    head, *rows = section(text, "Exactness")
    assert head[1:] == list(registry())
    assert [row[0] for row in rows] == [row[0] for row in section(text, "Layers")[1:]] == list(FAMILIES)
    assert [row[0] for row in section(text, "Refused families")[1:]] == list(REFUSED)
    assert "FAILS" not in text and "\n## Requests read together\n" in text
    reasons = set(re.findall(r"\*\*(R\d+)\*\*", text))
    for row in rows:
        assert len(row) == len(head)
        for cell in row[1:]:
            fast, neutral = (None, None) if cell in reasons else (float(part) for part in cell.split())
            assert fast is None or (fast <= FAST and neutral <= NEUTRAL)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "cohere2", "deepseek-v3-yarn", "nemotron", "hunyuan"])
def test_the_page_agrees_with_a_fresh_run(name):
    """The same combinations are exact, the same refused for the same reason; rounding differs between machines, not by an order of magnitude."""
    text = PAGE.read_text(encoding="utf-8")
    [found] = survey([name])
    fresh = page([found])
    if found.refusal is not None:
        assert [name, found.architecture, found.refusal] in [row[:2] + [" | ".join(row[2:])] for row in section(text, "Refused families")]
        return
    row = lambda text: next(row for row in section(text, "Exactness") if row[0] == name)  # noqa: E731
    sentence = lambda text, number: re.search(rf"\*\*{number}\*\*: (.*)", text)[1]  # noqa: E731
    for committed, now in zip(row(text)[1:], row(fresh)[1:], strict=True):
        if now.startswith("R"):
            assert sentence(text, committed) == sentence(fresh, now)
        else:
            assert all(abs(float(a) - float(b)) <= 10 * max(float(b), 1e-7) for a, b in zip(committed.split(), now.split(), strict=True))


def test_one_method_on_one_family_from_the_command_line(tmp_path, capsys):
    target = tmp_path / "page.md"
    assert main(["check", "--all", "--family", "llama4", "--method", "selfextend", "--markdown", str(target), "--json"]) == 0
    [family] = json.loads(capsys.readouterr().out)["families"]
    [cell] = family["cells"]
    assert family["layers"] == "chunks of 24 | full without positions" and cell["method"] == "selfextend"
    assert cell["passed"] and cell["fast"] <= FAST and cell["neutral"] <= NEUTRAL and "no effect" in cell["remark"]
    assert "| llama4 | Llama4ForCausalLM | chunks of 24, full without positions |" in target.read_text()
    assert "scales queries by the slots of the cache" in family["alone"] and f"- **llama4**: {family['alone']}" in target.read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--all", "--family", "lama"], "unknown family"),
        (["--all", "--method", "yarm"], "did you mean 'yarn'"),
        (["--all", "--method", "yarn", "--factor", "2"], "leave out --factor"),
        (["--all", "--markdown", "nowhere/page.md"], "create it first"),
        (["--family", "llama"], "belong to --all"),
    ],
)
def test_refused_options(arguments, sentence, capsys):
    assert main(["check", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_a_cell_beyond_its_gate_shows():
    bad, good = Cell("llama", "pi", 2e-5, 1e-6), Cell("llama", "yarn", refusal="yarn would scale it again")
    family = Family("llama", "LlamaForCausalLM", "full", cells=[bad, good])
    assert not bad.passed and good.passed and not family.passed and not family.to_json()["passed"]
    text = page([family])
    assert "2e-05 1e-06 FAILS | R1 |" in text and "**R1**: the method would scale it again" in text
