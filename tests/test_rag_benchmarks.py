"""benchmarks/rag.py and rag_allocation.py: equal tokens are equal, a run that was cut goes on, and the tables say what the runs say. Measured by hand."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import pytest

import longreach
from longreach.apps.rag import Rag, Run
from longreach.apps.rag.records import read_runs
from longreach.evals.samples.base import Settings
from longreach.evals.tasks import tasks
from scripts import ROOT, scripts

pytest.importorskip("bm25s")


@pytest.fixture(scope="module")
def bench() -> Any:
    return scripts("benchmarks", "rag", "rag_allocation")


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any]:
    return longreach.load("nano")


def test_the_cut_document_has_as_many_tokens_as_the_retrieved_chunks_may_have(bench, nano):
    model, tokenizer = nano
    task = tasks()["niah"]
    [sample] = task.samples(tokenizer, Settings(lengths=(2048,), depths=(0.3,), samples=1, text=longreach.shipped_book()))
    shorter = bench.rag.cut(model, tokenizer, sample, 512)
    config = bench.rag.configured(sample, "cut", 512, None, "bm25")
    rag = Rag(model, tokenizer, shorter, config)
    _, written, state = rag.fitted(bench.rag.question(sample), sample.parts.answer_prefix.strip())
    tokens = len(written.ids(state, bench.rag.question(sample), sample.parts.answer_prefix.strip()))
    assert config.budget == 512 - sample.max_new_tokens and config.budget - 8 <= tokens <= config.budget
    document = sample.parts.document
    assert document.startswith(shorter[:300]) and document.endswith(shorter[-300:]) and len(shorter) < len(document) / 2
    args = argparse.Namespace(chunk_words=40, retriever="bm25")
    row = bench.rag.measure(model, tokenizer, task, [sample], "position", 512, args)
    assert row["score"] == 1.0 and row["tokens"] <= 496 and row["method"].lower().startswith("stock")
    assert "100 % (21 to 100)" in bench.rag.table([row], "niah", [512], 512)


def test_documents_hold_the_facts_that_are_asked_for(bench):
    rng = bench.rag_allocation.Random(1)
    for task in bench.rag_allocation.TASKS:
        text, asked = bench.rag_allocation.document(task, longreach.shipped_book(), 400, rng)
        assert len(asked) == 12 and len(set(asked)) == 12 and all(one.answer in text and one.lead[4:-3] in text for one in asked)


def test_runs_are_kept_after_each_and_a_run_that_was_cut_goes_on(bench, nano, tmp_path, monkeypatch):
    module = bench.rag_allocation
    monkeypatch.setattr(module, "GRID", [(0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 2), (16, 2, 1)])
    monkeypatch.setattr(module, "FACTS", 4)
    monkeypatch.setattr(module, "ASKED", 2)
    args = argparse.Namespace(out=tmp_path / "runs.jsonl", context="1k", tasks=("codes-in-book",), documents=1, words=600)
    started: list[tuple[int, int, int]] = []
    real = module.Measured.run

    def run(self: Any, *theta: int) -> Any:
        started.append(theta)
        if len(started) == 3:
            raise KeyboardInterrupt
        return real(self, *theta)

    monkeypatch.setattr(module.Measured, "run", run)
    with pytest.raises(KeyboardInterrupt):
        module.record(*nano, args, longreach.shipped_book())
    assert [one.theta for one in read_runs(args.out)] == [(0, 0, 1), (1, 0, 1)]
    runs = module.record(*nano, args, longreach.shipped_book())
    assert started[3:] == [(0, 1, 1), (1, 1, 2), (16, 2, 1)]  # the last does not fit into 1k and is left out
    assert [one.theta for one in runs] == [(0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 2)] and read_runs(args.out) == runs
    assert all(one.samples == 2 and one.tokens <= 1024 and 0 <= one.score <= 1 for one in runs) and runs[1].score > runs[0].score


def test_the_tables_compare_the_choice_with_the_best_that_was_found(bench):
    grid = [(k, m, n) for k in (0, 1, 2, 4, 8, 16) for m in (0, 1, 2) for n in (1, 2)]
    runs = [Run(task, k, m, n, 0.1 + slope * (k > 0) + 0.02 * k, 20 + 60 * k * (m + 1) * n) for task, slope in (("a", 0.3), ("b", 0.2)) for k, m, n in grid]
    lines = bench.rag_allocation.budgets(runs).splitlines()[2:]
    assert lines and all(line.startswith(("| a |", "| b |")) for line in lines)
    for line in lines:
        task, seen, count, budget, chosen, _, scored, best, found = (cell.strip() for cell in line.strip("| ").split("|"))
        own = [run for run in runs if run.task == task]
        assert int(count) == sum(run.tokens <= int(seen) for run in own) and int(seen) < int(budget)
        top = max(run.score for run in own if run.tokens <= int(budget))
        assert found == f"{100 * top:.0f} %" and int(scored.split()[0]) <= int(found.split()[0]) and chosen.startswith("(") and best.startswith("(")
    fits = bench.rag_allocation.fits(runs).splitlines()
    assert len(fits) == 2 + 6 and "the paper's sigmoid" in fits[2] and all(len(line.split("|")) == 9 for line in fits)


def test_the_page_shows_what_the_results_hold(bench):
    text = (ROOT / "docs/rag.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"<!-- begin ([\w-]+) -->\n(.*?)\n<!-- end", text, re.S))
    assert shown["equal-tokens"] == bench.rag.page(json.loads((ROOT / "benchmarks/results/rag.json").read_text()))
    recorded = ROOT / "benchmarks/results/rag-allocation.jsonl"
    assert shown["allocation"] == (bench.rag_allocation.page(read_runs(recorded)) if recorded.exists() else "Not measured yet.")
