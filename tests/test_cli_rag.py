"""`longreach rag`: an answer with the chunks it was read from, budgets and recorded runs, and one sentence for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import longreach
from commands import Run, refused
from longreach.apps.rag import Run as Recorded
from longreach.apps.rag.records import write_runs
from longreach.running.prompts import hide

pytest.importorskip("bm25s")
QUESTION = ("--prompt", "What is the courier code of Oslo?", "--lead", "The courier code of Oslo is", "--max-new-tokens", 12, "--chunk-words", 40)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A text with the answer, one without, and runs."""
    folder = tmp_path_factory.mktemp("rag")
    found = {name: folder / name for name in ("code.txt", "other.txt", "runs.jsonl", "two.jsonl", "shown.jsonl", "bad.jsonl", "blank.txt")}
    book = longreach.shipped_book()
    found["code.txt"].write_text(hide(book[30_000:40_000].strip(), "The courier code of Oslo is 7654321.", 0.4), encoding="utf-8")
    found["other.txt"].write_text(book[60_000:66_000], encoding="utf-8")
    grid = [(k, m, n) for k in (0, 1, 2, 4, 8) for m in (0, 1) for n in (1, 2)]
    runs = [Recorded("codes", k, m, n, 0.2 + 0.1 * min(k, 4) + 0.05 * m - 0.02 * n, 60 + 90 * k * (m + 1) * n, chunk_words=40) for k, m, n in grid]
    write_runs(found["runs.jsonl"], runs)
    write_runs(found["two.jsonl"], [*runs, *(Recorded("more", *run.theta, run.score**2, run.tokens, chunk_words=40) for run in runs)])
    shown = {"question": "What is the courier code of Oslo?", "answer": "7654321.", "lead": "The courier code of Oslo is"}
    found["shown.jsonl"].write_text(json.dumps(shown) + "\n")
    found["bad.jsonl"].write_text("{}\n")
    found["blank.txt"].write_text(" \n")
    return found


def test_the_answer_comes_with_its_chunks(run: Run, texts: dict[str, Path]) -> None:
    found = run("rag", "--file", texts["code.txt"], "--file", texts["other.txt"], *QUESTION, "--json").json
    assert found["answer"].startswith("7654321") and found["ended"] == "one call" and found["tokens"] == sum(found["calls"]) <= 500
    best = max(found["passages"], key=lambda one: one["score"])
    assert best == found["passages"][-1] and best["document"] == "code.txt" and "7654321" in best["text"]
    assert texts["code.txt"].read_text(encoding="utf-8")[best["start"] : best["stop"]] == best["text"]
    assert found["config"]["chunk_words"] == 40 and found["method"]["method"] == "stock" and found["allocation"] is None
    plain = run("rag", "--file", texts["code.txt"], *QUESTION)
    assert plain.code == 0 and plain.out.startswith("7654321") and "in one call" in plain.err and "characters " in plain.err


def test_a_budget_beyond_the_window_is_read_by_the_extension_and_never_exceeded(run: Run, texts: dict[str, Path]) -> None:
    found = run("rag", "--file", texts["code.txt"], *QUESTION, "--budget", "1k", "--json").json
    assert 800 < found["tokens"] <= 1024 and found["method"]["method"] == "selfextend" and found["answer"].startswith("7654321")
    rounds = run("rag", "--file", texts["code.txt"], *QUESTION, "--rounds", 2, "--top-k", 2, "--budget", "1k", "--json").json
    assert rounds["tokens"] <= 1024 and rounds["ended"] in ("by itself", "rounds", "budget", "no question") and rounds["config"]["rounds"] == 2


def test_recorded_runs_say_how_a_budget_is_spent(run: Run, texts: dict[str, Path]) -> None:
    given = ("rag", "--file", texts["code.txt"], *QUESTION, "--json", "--runs", texts["runs.jsonl"])
    small, shown = run(*given, "--budget", 500).json, run(*given, "--budget", "2k", "--demonstrations", texts["shown.jsonl"]).json
    assert small["allocation"]["tokens"] <= 500 and small["allocation"]["m"] == 0 == small["demonstrations"]
    assert small["top_k"] == small["allocation"]["k"] and shown["allocation"]["predicted"] >= small["allocation"]["predicted"]
    assert shown["demonstrations"] == shown["allocation"]["m"] and shown["tokens"] <= 2048
    assert run(*given[:-1], texts["two.jsonl"], "--budget", "2k", "--task", "more").json["allocation"]["task"] == "more"


def test_recorded_runs_that_name_no_chunks_leave_them_as_they_were_asked_for(run: Run, texts: dict[str, Path], tmp_path: Path) -> None:
    """And where there are less chunks than the best run had, all are read: --top-k, which was advised, is not taken beside --runs."""
    best = [Recorded("t", *theta, score, tokens) for theta, score, tokens in (((0, 0, 1), 0.1, 60), ((1, 0, 1), 0.4, 200), ((0, 1, 1), 0.1, 90))]
    write_runs(tmp_path / "runs.jsonl", [*best, Recorded("t", 500, 0, 1, 0.9, 900)])
    (tmp_path / "short.txt").write_text("The courier code of Oslo is 7654321. " + "The sea was calm. " * 20)
    found = run("rag", "--file", tmp_path / "short.txt", *QUESTION, "--json", "--runs", tmp_path / "runs.jsonl", "--budget", "1k")
    assert found.json["config"]["chunk_words"] == 40 == found.json["allocation"]["chunk_words"]
    assert found.json["top_k"] == found.json["chunks"] == len(found.json["passages"]) > 1 and "all of them are read" in found.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--prompt", ""), "there is no question; pass --prompt TEXT"),
        (("--file", "no.txt"), "there is no file 'no.txt'"),
        (("--file", "blank.txt"), "is empty"),
        (("--file", "code.txt", "--file", "code.txt"), "is given twice"),
        (("--file", "code.txt", "--top-k", 5000), "top_k=5000 is more than the"),
        (("--file", "code.txt", "--budget", 5), "more than the 5 that a prompt may have; pass budget="),
        (("--file", "code.txt", "--chunk-words", 0), "not one chunk of all the words fits"),
        (("--file", "code.txt", "--rounds", 2), "pass top_k (--top-k)"),
        (("--file", "code.txt", "--rounds", 1000, "--top-k", 1), "rounds must be a whole number of sub-questions from 0 to 100"),
        (("--file", "code.txt", "--max-new-tokens", 600), "600 new tokens leave no room for a prompt in 512"),
        (("--file", "code.txt", "--retriever", "no/such-model"), "needs the package sentence-transformers, which is not installed"),
        (("--file", "code.txt", "--demonstrations", "bad.jsonl"), "line 1 of"),
        (("--file", "code.txt", "--runs", "runs.jsonl"), "pass --budget TOKENS too"),
        (("--file", "code.txt", "--runs", "runs.jsonl", "--budget", "1k", "--top-k", 3), "--runs chooses what --top-k would say"),
        (("--file", "code.txt", "--runs", "two.jsonl", "--budget", "1k"), "pass --task with the one that is most like yours: codes, more"),
        (("--file", "code.txt", "--runs", "runs.jsonl", "--budget", "1k", "--task", "x"), "no recorded run of the task 'x'"),
        (("--file", "code.txt", "--runs", "runs.jsonl", "--budget", 10), "no recorded run fits into a budget of 10 tokens"),
        (("--file", "code.txt", "--task", "x"), "pass --runs FILE too"),
        (("--file", "code.txt", "--method", "selfextend", "--group-size", 2, "--window", 64, "--budget", "4k"), "more than the capacity of"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(run: Run, texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, options: tuple[object, ...], says: str) -> None:
    monkeypatch.chdir(texts["code.txt"].parent)
    question = () if "--prompt" in options else ("--prompt", "What is the code?")
    refused(run, "rag", *question, *(() if "--max-new-tokens" in options else ("--max-new-tokens", 12)), *options, says=says)


def test_a_missing_retriever_is_said_before_a_model_is_loaded(run: Run, texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(longreach, "load", lambda *_, **__: pytest.fail("the work began"))
    refused(run, "rag", "--file", texts["code.txt"], "--prompt", "Who?", "--retriever", "some/model", says="pip install sentence-transformers, or pass bm25")
