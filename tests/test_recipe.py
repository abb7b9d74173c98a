"""The recipe of nano: what is held out stays out, rows are whole and a function of their seed, a run that was cut goes on as if it were not."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import longreach
from longreach.running.loading import shipped_book
from scripts import scripts

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def recipe() -> Any:
    found = scripts("recipes", "abilities", "initialisation", "muon", "retrieval_text", "train_nano", "training_rows")
    return SimpleNamespace(
        text=found.retrieval_text,
        rows=found.training_rows,
        abilities=found.abilities,
        muon=found.muon,
        initialise=found.initialisation.initialise,
        train=found.train_nano,
    )


@pytest.fixture(scope="module")
def rows(recipe: Any) -> Any:
    tokenizer = longreach.load("nano")[1].backend_tokenizer
    books = np.asarray(tokenizer.encode(shipped_book()[:200_000], add_special_tokens=False).ids, dtype=np.uint16)
    return recipe.rows.Rows(tokenizer, books)


def test_held_out_wordings_are_never_drawn(recipe: Any) -> None:
    text, rng = recipe.text, Random(0)
    facts = [f for _ in range(400) for f in text.facts(rng, 8)]
    for fact in facts:
        whole = f"{fact.statement} {fact.question}"
        assert "magic" not in whole and "Can you tell me" not in whole and "Please note" not in whole and "travelled" not in whole
    held = text.held_out_pass_key(rng)
    assert held.statement.startswith("Please note: the magic number is ") and held.question == "Can you tell me the magic number?"


def test_a_question_has_one_right_answer(recipe: Any) -> None:
    """Within a text no two facts share a name, and the form of a question decides the form of its answer."""
    rng, forms = Random(1), {}
    for _ in range(300):
        facts = recipe.text.facts(rng, 6)
        assert len({f.name for f in facts}) == len(facts)
        for fact in facts:
            if fact.name != fact.question:  # needles are asked by a question of their own
                form, answer = (part.replace(fact.name, "N").replace(fact.name.capitalize(), "N") for part in (fact.question, fact.answer))
                assert forms.setdefault(form, any(c.isalpha() for c in answer.replace("N", ""))) == any(c.isalpha() for c in answer.replace("N", ""))


@pytest.mark.parametrize("length", [64, 128, 256, 512])
def test_rows_are_whole_begin_with_bos_and_repeat(rows: Any, length: int) -> None:
    ids, weights = rows.batch(Random(7), 64, length, 0.2, 0.3, 0.4)
    again, _ = rows.batch(Random(7), 64, length, 0.2, 0.3, 0.4)
    assert ids.shape == weights.shape == (64, length + 1) and torch.equal(ids, again)
    assert (ids[:, 0] == rows.bos).all() and (ids[:, 1:] != rows.bos).all() and ids.max() < 2048
    assert set(weights.unique().tolist()) == {rows.digit_weight, 1.0, rows.answer_weight}
    assert 0.03 < (weights == rows.answer_weight).float().mean() < 0.3


def test_a_trial_ends_in_its_answer(recipe: Any, rows: Any) -> None:
    for kind in recipe.abilities.KINDS:
        ids, size = recipe.abilities.trial(rows, rows.books, kind, Random(2), 300)
        assert len(ids) == 300 and ids[0] == rows.bos and 1 <= size < 40


def test_a_model_that_knows_the_answers_scores_full_marks_and_another_none(recipe: Any, rows: Any) -> None:
    trials = [recipe.abilities.trial(rows, rows.books, "one of three labelled keys", Random(n), 200) for n in range(5)]

    class Oracle(torch.nn.Module):
        def __init__(self, shift: int) -> None:
            super().__init__()
            self.shift, self.p = shift, torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids: torch.Tensor, use_cache: bool) -> Any:
            following = torch.roll(ids, -1, 1) + self.shift
            return type("Out", (), {"logits": torch.nn.functional.one_hot(following, 2049).float()})

    assert all(recipe.abilities.found(Oracle(0), trials)) and not any(recipe.abilities.found(Oracle(1), trials))


def test_the_initialisation_can_copy_before_any_training(recipe: Any, rows: Any) -> None:
    """Random tokens that come a second time are foreseen, at any length of the window; without the initialisation they are not."""
    torch.manual_seed(1)
    tokenizer = longreach.load("nano")[1].backend_tokenizer
    model = recipe.train.LlamaForCausalLM(recipe.train.configuration(tokenizer)).eval()
    assert recipe.abilities.copying(model, rows, 128, count=4) < 0.05
    recipe.initialise(model)
    for length in (64, 512):
        assert recipe.abilities.copying(model, rows, length, count=4) > 0.6


def test_orthogonalised_matrices_have_singular_values_near_one(recipe: Any) -> None:
    torch.manual_seed(0)
    for shape in ((3, 40, 96), (2, 96, 40), (1, 32, 32)):
        values = torch.linalg.svdvals(recipe.muon.orthogonalise(torch.randn(shape)))
        assert values.min() > 0.4 and values.max() < 1.4  # the quintic iteration ends near one, not at it


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    text = shipped_book()
    for split, part in (("train", text[:300_000]), ("validation", text[300_000:400_000])):
        (tmp_path / "corpus" / split).mkdir(parents=True)
        (tmp_path / "corpus" / split / "a.txt.xz").write_bytes(lzma.compress(part.encode()))

    def train(work: str, steps: int, *more: str) -> None:
        command = [sys.executable, str(ROOT / "recipes" / "train_nano.py"), "--corpus", str(tmp_path / "corpus"), "--work", str(tmp_path / work)]
        done = subprocess.run([*command, "--steps", str(steps), "--every", "2", *more], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr

    train("whole", 4, "--export", str(tmp_path / "model"))
    train("cut", 4)
    state = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    # steps 1 and 2 of a run of 4, then the rest
    train("again", 4, "--stop-after", "2")
    train("again", 4)
    again = torch.load(tmp_path / "again" / "checkpoint.pt", weights_only=True)
    assert state["step"] == again["step"] == 4 and all(torch.equal(state["model"][k], again["model"][k]) for k in state["model"])
    lines = [json.loads(line) for line in (tmp_path / "again" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    model, tokenizer = longreach.load(str(tmp_path / "model"))
    assert model.config.max_position_embeddings == 512 and tokenizer("12").input_ids[0] == tokenizer.bos_token_id
