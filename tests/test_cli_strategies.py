"""`--strategy infiniretri` of `run` and `eval run`: what is said is what the library finds, and options that do not go with it are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import longreach
from commands import Run, refused
from longreach.apps import InfiniRetri

KEY, QUESTION = "The pass key is 48213. Remember it. 48213 is the pass key.", "What is the pass key? The pass key is"


@pytest.fixture(scope="module")
def novel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = longreach.shipped_book()[5000:11_000]
    at = text.find(". ", 2000) + 2
    file = tmp_path_factory.mktemp("text") / "novel.txt"
    file.write_text(f"{text[:at]}{KEY} {text[at:]}", encoding="utf-8")
    return file


def test_run_answers_and_names_the_sentences(run: Run, novel: Path, stdin: Callable[[bytes], None]) -> None:
    arguments = ["run", "--strategy", "infiniretri", "--prompt", QUESTION, "--max-new-tokens", 8]
    data = run(*arguments, "--file", novel, "--json").json
    text = novel.read_text(encoding="utf-8")
    want = InfiniRetri(*longreach.load("nano")).ask(text, QUESTION, max_new_tokens=8)
    assert data["answer"] == want.answer and "48213" in data["answer"] and data["strategy"] == "infiniretri"
    assert [(s["start"], s["stop"]) for s in data["sentences"]] == [(s.start, s.stop) for s in want.sentences]
    assert all(text[s["start"] : s["stop"]] == s["text"] for s in data["sentences"])
    assert data["chunks"] == want.chunks > 3 and data["text_tokens"] == want.tokens and data["chunk_tokens"] == want.sizes.chunk
    assert data["method"]["method"] == "stock" and data["layer"] == want.layer == 1 and data["peak_memory_bytes"] > 2**20 and data["reading_seconds"] > 0
    stdin(novel.read_bytes())
    plain = run(*arguments)
    assert plain.code == 0 and plain.out == data["answer"] + "\n"
    assert f"{data['chunks']} chunks" in plain.err and "Stock" in plain.err and "The pass key is 48213." in plain.err


def test_chunks_are_longer_under_a_method_and_a_sentence_can_be_hidden(run: Run, novel: Path) -> None:
    arguments = ["run", "--strategy", "infiniretri", "--file", novel, "--hide", "The red code is 77.", "--prompt", "What is the red code?", "--json"]
    data = run(*arguments, "--context", 1500, "--memory-tokens", 256, "--max-new-tokens", 4).json
    assert data["method"]["method"] == "selfextend" and data["chunk_tokens"] == 1024 and data["memory_tokens"] == 256 and data["chunks"] < 4
    assert any("The red code is 77." in sentence["text"] for sentence in data["sentences"])
    found = run(*arguments, "--context", 1500, "--max-new-tokens", 4)
    assert f"layer {found.json['layer']} is looked at" in found.err and found.json["layer"] in (1, 2, 3)
    assert run(*arguments, "--context", 1500, "--layer", "last", "--max-new-tokens", 4).json["layer"] == 3
    small = run(*arguments, "--method", "lm-infinite", "--n-local", 200, "--chunk-tokens", 100, "--max-new-tokens", 4).json
    assert (small["chunk_tokens"], small["prompt_tokens"], small["method"]["method"]) == (100, 200, "lm-infinite")


def test_a_chat_template_has_its_place(run: Run, folders: dict[str, str], novel: Path) -> None:
    arguments = ["run", "--model", folders["chat"], "--strategy", "infiniretri", "--file", novel, "--trained-window", 500, "--max-new-tokens", 2, "--json"]
    found = run(*arguments, "--prompt", "Why?", "--system", "Be kind.", "--chunk-tokens", 300, "--memory-tokens", 64).json
    assert found["chunks"] == pytest.approx(6060 / 300, abs=4) and found["sentences"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--file", "@book"], "needs a question; pass --prompt"),
        (["--file", "@book", "--prompt", "a", "--resume", "folder"], "--resume cannot be used with it"),
        (["--file", "@book", "--prompt", "a", "--truncate", "left", "--document", "folder"], "--document and --truncate cannot be used with it"),
        (["--file", "@book", "--prompt", "a", "--chunk-size", "64"], "--chunk-size cannot be used with it"),
        (["--prompt", "a"], "the text is empty"),
        (["--file", "@book", "--prompt", "a " * 2000], "a prompt may have 512 tokens here"),
        (["--file", "@book", "--prompt", "a", "--chunk-tokens", "4k"], "no room for chunks of 4096"),
        (["--file", "@book", "--prompt", "a", "--chunk-tokens", "8"], "chunk_tokens must be a whole number of at least 32"),
        (["--file", "@book", "--prompt", "a", "--layer", "7"], "layer must be one of the 4"),
        (["--file", "@book", "--prompt", "a", "--layer", "first"], "it must be the number of a layer, last or auto"),
        (["--file", "nowhere.txt", "--prompt", "a"], "there is no file"),
    ],
)
def test_what_does_not_go_together_is_refused(run: Run, options: list[str], says: str) -> None:
    refused(run, "run", "--strategy", "infiniretri", *options, says=says)


def test_a_file_that_is_no_text_is_said_before_the_work_begins(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longreach, "load", lambda *_, **__: pytest.fail("the work began"))
    (tmp_path / "latin").write_bytes("Ein schöner Tag. ".encode("latin-1") * 9)
    for file, says in (("nowhere.txt", "there is no file"), (tmp_path / "latin", "is not UTF-8"), (tmp_path, "is a folder")):
        refused(run, "run", "--strategy", "infiniretri", "--file", file, "--prompt", "a", says=says)


def test_its_options_need_a_strategy(run: Run, tmp_path: Path) -> None:
    refused(run, "run", "--file", "@book", "--prompt", "a", "--memory-tokens", 64, says="--memory-tokens says how a strategy reads")
    refused(run, "eval", "run", "passkey", "--chunk-tokens", 64, "--out", tmp_path / "run", says="--chunk-tokens says how a strategy reads")
    refused(run, "eval", "run", "passkey", "--strategy", "infiniretri", "--truncate", "left", "--out", tmp_path / "run", says="--truncate cannot be used")
    refused(run, "eval", "run", "passkey", "--strategy", "infiniretri", "--chunk-size", 64, "--out", tmp_path / "run", says="--chunk-size cannot be used")


def test_an_evaluation_has_its_row(run: Run, tmp_path: Path) -> None:
    """Prompts of any length, without a method that reaches so far; another strategy is another run."""
    common = ["eval", "run", "passkey", "passkeys", "--lengths", "1200", "--depths", "0,0.5", "--samples", 1, "--json"]
    found = run(*common, "--strategy", "infiniretri", "--out", tmp_path / "retri").json
    assert (found["answered"], found["failed"]) == (4, 0)
    records = [json.loads(line) for line in (tmp_path / "retri/samples.jsonl").read_text().splitlines()]
    assert all(record["prompt_tokens"] > 1000 and record["prediction"] and record["t_prefill"] > 0 for record in records)
    assert sum(record["metrics"]["accuracy"] for record in records) >= 2
    config = json.loads((tmp_path / "retri/run.json").read_text())["config"]
    assert config["strategy"]["strategy"] == "infiniretri" and config["method"]["method"] == "stock"
    assert run(*common, "--strategy", "infiniretri", "--out", tmp_path / "retri").json["known"] == 4
    other = [*common[:-1], "--strategy", "infiniretri", "--chunk-tokens", 200, "--out", tmp_path / "retri"]
    refused(run, *other, says="holds a run of other settings (strategy")
