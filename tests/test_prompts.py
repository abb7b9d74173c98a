"""From texts to ids: templates, special tokens at the end, what is left out of a text that is too long, and a sentence hidden in it."""

from __future__ import annotations

from typing import Any

import pytest

import longreach
from longreach.cli.text import Request
from longreach.evals.samples import budget
from longreach.evals.samples.base import Parts, Sample
from longreach.running import prompts
from longreach.running.conversation import Conversation
from tiny import tokenizer

TEXT = "One is here. Two is here. Three is here. Four is here."


@pytest.fixture(scope="module")
def nano() -> Any:
    return longreach.load("nano")[1]


class Ending:
    """Ends every text, as some tokenizers do, with the id 2; words are their lengths."""

    bos_token_id, eos_token_id, sep_token_id = 1, 2, None
    is_fast, chat_template = False, "a template"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [2 if word == "</s>" else 10 + len(word) for word in text.split()]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    def apply_chat_template(self, messages: list[dict[str, str]], **given: Any) -> str:
        return " ".join(message["content"] for message in messages) + " </s>"


def test_what_a_tokenizer_puts_at_the_end_is_left_out_and_what_a_template_writes_stays() -> None:
    assert prompts.encode(Ending(), "a bc") == [1, 11, 12] and prompts.encode(Ending(), "a bc", special=False) == [11, 12]
    sample = Sample("s", Parts("a bc"), ("7",), 4, chat="user_turn")
    assert budget.encode(Ending(), sample).ids == [11, 12, 2] and budget.encode(Ending(), sample, "off").ids == [1, 11, 12]
    assert Conversation(None, Ending()).sequence("a bc") == [11, 12, 2]  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [TEXT, f"{TEXT}\n\nWhat?", "two  spaces\n", " é€ö", ""])
def test_a_conversation_of_one_question_has_the_ids_of_its_text(nano: Any, text: str) -> None:
    assert Conversation(None, nano).sequence(text) == prompts.encode(nano, text) and text in nano.decode(prompts.encode(nano, text))  # type: ignore[arg-type]


def test_a_template_that_refuses_says_what_helps() -> None:
    made = tokenizer(chat=True)
    assert prompts.render(made, [{"role": "user", "content": "Why?"}], "") == "[user]Why?[assistant]"
    made.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(ValueError, match=r"refuses the messages \(no users\); leave it"):
        prompts.render(made, [{"role": "user", "content": "x"}], "leave it")


def test_spans_are_those_of_the_ids(nano: Any) -> None:
    ids, spans = prompts.encode_with_spans(nano, TEXT, special=False)
    assert ids == prompts.encode(nano, TEXT, special=False) and "".join(TEXT[a:b] for a, b in spans) == TEXT
    with pytest.raises(ValueError, match="need a fast tokenizer"):
        prompts.encode_with_spans(Ending(), TEXT)  # type: ignore[arg-type]


@pytest.mark.parametrize(("side", "kept"), [("left", "6789"), ("right", "0123"), ("middle", "0189")])
def test_what_is_kept(side: prompts.Side, kept: str) -> None:
    spans = [(n, n + 1) for n in range(10)]
    assert prompts.keep_tokens("0123456789", spans, 4, side) == kept and prompts.keep_ids(list(range(10)), 4, side) == list(map(int, kept))
    assert prompts.keep_tokens("0123456789", spans, 0, side) == "" and prompts.keep_tokens("0123456789", spans, 10, side) == "0123456789"


@pytest.mark.parametrize(("seam", "found", "tried"), [(0, 7, [7]), (2, 5, [7, 5]), (7, 1, [7, 6, 5, 4, 3, 2, 1]), (9, None, [7, 6, 5, 4, 3, 2, 1])])
def test_it_is_cut_until_it_fits(seam: int, found: int | None, tried: list[int]) -> None:
    """Seven tokens fit; `seam` more than were kept come of it, or six less where little is kept."""
    asked: list[int] = []

    def make(keep: int) -> tuple[int, int]:
        asked.append(keep)
        return keep, keep + seam - 7 if seam < 7 else (0 if keep == 1 and seam == 7 else 9)

    assert prompts.shrink(7, make) == found and asked == tried


def test_a_sentence_is_hidden_between_sentences() -> None:
    text, hide = TEXT, prompts.hide
    assert hide(text, "Key.", 0.0) == f"Key. {text}" and hide(text, "Key.", 1.0) == f"{text} Key."
    assert hide(text, "Key.", 0.5) == "One is here. Two is here. Key. Three is here. Four is here."
    assert hide("", "Key.", 0.5) == "Key."
    assert hide("nosentences" * 100, "Key.", 0.5).replace(" Key. ", "") in ("nosentences" * 100, "Key. " + "nosentences" * 100)
    assert Request(text, "What?", hidden=" Key. ", depth=1.0).user == f"{text} Key.\n\nWhat?"
