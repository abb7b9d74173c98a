"""Hiding a key: the prompt fits, the key stands where it should, and the same generator gives the same trial."""

from __future__ import annotations

from random import Random

import pytest

import longreach
from longreach.evals.samples import haystack
from longreach.running.loading import shipped_book


@pytest.fixture(scope="module")
def tokenizer():
    return longreach.load("nano")[1]


BOOK = shipped_book()[:200_000]


@pytest.mark.parametrize("length", [120, 511, 2048])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_prompt_fits_and_holds_its_key_once(tokenizer, length, depth):
    made = haystack.trial(tokenizer, BOOK, length, depth, Random(3), answer_tokens=9)
    text = tokenizer.decode(made.ids, skip_special_tokens=True)
    assert length - 40 <= len(made.ids) + 9 <= length
    assert text.count(f"The pass key is {made.key}. Remember it. {made.key} is the pass key.") == 1
    assert text.endswith("\n\nWhat is the pass key? The pass key is")
    assert made.ids[0] == tokenizer.bos_token_id and len(made.key) == 5


def test_distance_counts_the_tokens_after_the_statement(tokenizer):
    for depth in (0.0, 0.5, 1.0):
        made = haystack.trial(tokenizer, BOOK, 700, depth, Random(1))
        after = tokenizer.decode(made.ids[-made.distance :])
        assert "Remember" not in after and tokenizer.decode(made.ids[-made.distance - 1 :]).startswith(".")
    distances = [haystack.trial(tokenizer, BOOK, 700, d / 4, Random(1)).distance for d in range(5)]
    assert distances == sorted(distances, reverse=True) and distances[0] > 600 and distances[-1] < 20


def test_trials_are_functions_of_their_generator(tokenizer):
    one, same = (haystack.trial(tokenizer, BOOK, 300, 0.5, Random(5)) for _ in range(2))
    assert one == same
    assert one.key != haystack.trial(tokenizer, BOOK, 300, 0.5, Random(6)).key


def test_the_lead_can_be_left_to_the_model(tokenizer):
    made = haystack.trial(tokenizer, BOOK, 300, 0.5, Random(5), wording=haystack.Wording(lead=""))
    assert tokenizer.decode(made.ids).endswith("What is the pass key?")


def test_what_cannot_be_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"choose a length of at least \d+"):
        haystack.trial(tokenizer, BOOK, 40, 0.5, Random(0))
    with pytest.raises(ValueError, match="pass a longer text"):
        haystack.trial(tokenizer, "Too short. A text.", 500, 0.5, Random(0))


def test_the_first_number_of_an_answer_counts():
    assert haystack.number_in(" 48213. It is 99999.") == "48213"
    assert haystack.number_in(" 4821 3") == "4821"
    assert haystack.number_in("none") is None
