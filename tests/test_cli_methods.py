"""`longreach methods` and `distances`: parameters are read from the dataclasses, and the matrices are the published ones."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

import longreach
from commands import Run, refused
from longreach import InfiniteHiP
from longreach.cli import parameters
from longreach.cli.parameters import brief
from longreach.cli.program import build
from longreach.methods import registry
from longreach.methods.base import Method
from methods_matrix import METHODS
from oracles import BLOCK_SELFEXTEND_2_4, DUAL_CHUNK_7_4, LM_INFINITE_4_2, SELFEXTEND_2_4, SELFEXTEND_3_4, STREAMING_3_2


def test_methods_json_round_trips(run: Run) -> None:
    found = run("methods", "--json").json["methods"]
    assert [m["name"] for m in found] == list(registry())
    for entry in found:
        method = registry()[entry["name"]]
        assert set(entry) == {"name", "class", "paper", "recalls", "bounded", "parameters", "doc"}
        assert all(set(p) == {"name", "option", "type", "default", "required", "help"} for p in entry["parameters"])
        assert all(p["help"] and p["option"] == "--" + p["name"].replace("_", "-") for p in entry["parameters"])
        example = next(m for m in METHODS if m.name == entry["name"]).to_json()
        number = lambda name: {"attended": 768}.get(name, 256)  # noqa: E731  a multiple of chunk
        required = {p["name"]: number(p["name"]) if p["type"] in ("int", "float") else example[p["name"]] for p in entry["parameters"] if p["required"]}
        made = longreach.from_json({"method": entry["name"], **required, **{p["name"]: p["default"] for p in entry["parameters"] if not p["required"]}})
        assert type(made) is method and getattr(longreach, entry["class"]) is method
        assert longreach.from_json(json.loads(json.dumps(made.to_json()))) == made
        assert entry["bounded"] == made.bounded or isinstance(made, longreach.Combined)  # which has no parts to answer for it
    assert {m["name"] for m in found if m["bounded"]} == {"lm-infinite", "streaming-llm", "sirllm"}


def test_a_parameter_may_be_a_method() -> None:
    made = parameters.build("combined", ["--encoding", "yarn --factor 4", "--positions=lm-infinite --n-local 8"])
    assert made == longreach.Combined(longreach.YaRN(4.0), longreach.LMInfinite(8))
    assert brief(made.to_json()) == 'combined --encoding "yarn --factor 4.0" --positions "lm-infinite --n-local 8"'
    assert parameters.build("combined", shlex.split(brief(made.to_json()))[1:]) == made
    with pytest.raises(ValueError, match="yarn needs --factor"):
        parameters.build("combined", ["--encoding", "yarn", "--positions", "stock"])
    with pytest.raises(ValueError, match='pass --encoding "METHOD --parameter VALUE"'):
        parameters.build("combined", ["--positions", "stock"])
    with pytest.raises(ValueError, match="did you mean 'yarn'"):
        parameters.build("combined", ["--encoding", "yarm", "--positions", "stock"])


def test_longrope_lists_are_numbers_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "factors.json"
    path.write_text("[1, 1.5]")
    want = longreach.LongRoPE(2.0, (1.0, 1.5))
    assert parameters.build("longrope", ["--factor", "2", "--long-factor", "1,1.5"]) == want
    assert parameters.build("longrope", ["--factor", "2", "--long-factor", str(path)]) == want
    assert brief(want.to_json()) == "longrope --factor 2.0 --long-factor 1.0,1.5"


def test_frequency_methods_say_that_distances_are_not_all(run: Run) -> None:
    found = run("distances", "pi", "--factor", "2", "--length", "3", "--json")
    assert found.json["distances"] == [[0, None, None], [1, 0, None], [2, 1, 0]]
    assert "changes the frequencies" in found.err


def test_check_measures_a_frequency_method_itself(run: Run) -> None:
    found = run("check", "--method", "dynamic-ntk", "--context", "2048", "--tokens", "60", "--json").json
    assert found["passed"] and found["groups"][1]["method"] == longreach.DynamicNTK().to_json()
    assert found["extension"]["capacity"] == 2048


def test_methods_table(run: Run) -> None:
    out = run("methods").out
    assert all(p.option in out for method in registry().values() for p in parameters.of(method))


def test_no_parameter_hides_behind_an_option_of_a_command() -> None:
    import typer

    group: Any = typer.main.get_command(build())
    for name in ("run", "check", "distances"):
        own = {option for p in group.commands[name].params for option in p.opts}
        assert not own & {p.option for method in registry().values() for p in parameters.of(method)}


def test_a_new_method_needs_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "registry", lambda: {"fake": Fake})
    made = parameters.build("fake", "--size 3 --ratio=0.5 --no-steps --layers 1,2 --kind b --most none".split())
    assert made == Fake(3, 0.5, False, (1, 2), "b", None)
    assert parameters.build("fake", ["--size", "1", "--steps"]) == Fake(1, steps=True)
    assert [p.type for p in parameters.of(Fake)] == ["int", "float", "bool", "int,...", "a | b", "int or none"]
    with pytest.raises(ValueError, match=r"--steps must be of type bool, not 'maybe'"):
        parameters.build("fake", ["--size", "1", "--steps", "maybe"])


def test_a_list_without_entries_is_written_none(run: Run) -> None:
    one = InfiniteHiP(16, 0, 16, (8,), (), (4,), 8, (8,), 0)
    for typed in (one.options(), shlex.split(parameters.words(one)), shlex.split(brief(one.to_json()))):
        assert typed[typed.index("--kept") + 1] == "none" and parameters.build(typed[0], typed[1:]) == one
    options = "infinitehip --chunks 8 --strides 4 --refresh 8 --window 16 --sink 0 --budget 16 --length 4".split()
    assert run("distances", *options, "--kept", "none", "--json").json["method"]["kept"] == []
    refused(run, "distances", *options, says="pass none, kept=() or --kept none")
    refused(run, "distances", *options, "--kept", "", says="--kept is given an empty value")


@dataclass(frozen=True)
class Fake(Method):
    size: int = field(metadata={"help": "a size"})
    ratio: float = 1.0
    steps: bool = True
    layers: tuple[int, ...] = ()
    kind: Literal["a", "b"] = "a"
    most: int | None = 4
    name = "fake"

    def layout(self, layer: int = 0) -> Any:
        raise NotImplementedError

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


# -- distances: the published matrices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "oracle"),
    [
        ("selfextend --group-size 2 --window 4", SELFEXTEND_2_4),
        ("selfextend --group-size 3 --window 4", SELFEXTEND_3_4),
        ("lm-infinite --n-local 4 --n-global 2", LM_INFINITE_4_2),
        ("lm-infinite --n-local 4 --n-global 2 --distance-limit 4", LM_INFINITE_4_2),
        ("streaming-llm --n-recent 3 --n-sink 2", STREAMING_3_2),
        ("dual-chunk --pretraining-length 7 --chunk-length 4", DUAL_CHUNK_7_4),
        ("block-selfextend --group-size 2 --window 4", BLOCK_SELFEXTEND_2_4),
    ],
)
def test_distances_are_the_oracles(run: Run, arguments: str, oracle: str) -> None:
    found = run("distances", *arguments.split(), "--length", 10)
    assert found.code == 0
    assert [line.split() for line in found.out.splitlines()] == [line.split() for line in oracle.strip().splitlines()]
    data = run("distances", *arguments.split(), "--length", 10, "--json").json
    assert data["length"] == 10
    assert longreach.from_json(data["method"]).name == arguments.split()[0]
    assert data["distances"] == [[None if cell == "." else int(cell) for cell in line.split()] for line in oracle.strip().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ("selfextend --group-size 3 --window 4 --shift true_division --length 10", ["5.667 5.667 5.667 4.667 4.667 4.667 3 2 1 0"]),
        (
            "selfextend --group-size 3 --window 5 --length 12",
            ["7 7 7 6 6 4 3 2 1 0 . .", "7 7 7 6 6 6 4 3 2 1 0 .", "7 7 7 6 6 6 5 4 3 2 1 0"],
        ),
        ("stock --length 4", ["2 1 0 .", "3 2 1 0"]),
        ("streaming-llm --n-recent 3 --n-sink 2 --counting chunkable --length 10", ["5 4 . . . . . 2 1 0"]),
        ("rerope --window 4 --length 10", ["4 4 4 4 4 4 3 2 1 0"]),
        ("leaky-rerope --window 4 --factor 2 --length 10", ["6.5 6 5.5 5 4.5 4 3 2 1 0"]),
        ("logistic-selfextend --window 4 --growth 0.5 --largest-group 5 --length 12", ["8 7 6 6 5 5 4 4 3 2 1 0"]),
        ("string --shift 3 --local-window 1 --length 9", ["6 5 4 3 2 1 2 1 0"]),
    ],
)
def test_distances_last_rows(run: Run, arguments: str, rows: list[str]) -> None:
    lines = run("distances", *arguments.split()).out.splitlines()
    assert [line.split() for line in lines[-len(rows) :]] == [row.split() for row in rows]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


@pytest.mark.parametrize(
    ("distance", "expected"),
    [("min", [(4, 3), (5, 4), (6, 5), (7, 6), (7, 7), (7, 7)]), ("constant", [(7, 3), (7, 7), (7, 7), (7, 7), (7, 7), (7, 7)])],
)
def test_distances_lm_infinite_beyond_its_window(run: Run, distance: str, expected: list[tuple[int, int]]) -> None:
    arguments = f"distances lm-infinite --n-local 4 --n-global 2 --distance-limit 7 --distance {distance} --length 10 --json"
    data = run(*arguments.split()).json["distances"]
    assert [tuple(row[:2]) for row in data[4:]] == expected


def test_late_keys_are_mentioned(run: Run) -> None:
    found = run(*"distances lm-infinite --n-local 4 --top-k 2 --length 6".split())
    assert "from layer 4 on" in found.err and len(found.out.splitlines()) == 6
    assert "note" not in run(*"distances lm-infinite --n-local 4 --length 6".split()).err


@pytest.mark.parametrize("length", [1, 12, 80])
def test_picture(run: Run, tmp_path: Path, length: int) -> None:
    file = tmp_path / "matrix.png"
    found = run("distances", "selfextend", "--group-size", 2, "--window", 4, "--length", length, "--png", file, "--json")
    assert found.json["png"] == str(file) and len(found.json["distances"]) == length
    assert file.read_bytes().startswith(b"\x89PNG")


def test_picture_of_a_frequency_method(run: Run, tmp_path: Path) -> None:
    """The distances alone, or the rotary pairs beside them if the trained window is known."""
    width = lambda path: int.from_bytes(path.read_bytes()[16:20], "big")  # noqa: E731
    arguments = ["distances", "yarn", "--factor", 4, "--length", 128]
    assert "pass --trained-window N to draw them too" in run(*arguments, "--png", tmp_path / "one.png").err
    two = run(*arguments, "--trained-window", 32, "--rotary-dims", 16, "--png", tmp_path / "two.png")
    assert "note" not in two.err and width(tmp_path / "two.png") > 1.5 * width(tmp_path / "one.png")


def test_rotary_dims_come_in_pairs(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    refused(run, "distances", "pi", "--factor", 2, "--trained-window", 64, "--rotary-dims", 7, "--png", picture, says="must be even, not 7")
    assert not picture.exists()
