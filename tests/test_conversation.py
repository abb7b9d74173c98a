"""A conversation answers as if everything were read anew each time, and reads every token once."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch
import transformers as t

import longreach
from longreach import LMInfinite, SelfExtend, generation
from longreach.cli import main
from longreach.conversation import Conversation
from test_cli import SMALL, tokenizer

DOCUMENT = "It was a dark night. Nobody was on the road, and the lamp in the inn had gone out long ago."
QUESTIONS = ["Who was there?", "Why?", "And the lamp?"]
REWRITING = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'][:3] if m['role'] == 'assistant' else m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return t.LlamaForCausalLM(t.LlamaConfig(**SMALL)).eval()


@pytest.mark.parametrize("method", [None, SelfExtend(8, 16), LMInfinite(48, 4)], ids=["stock", "selfextend", "lm-infinite"])
@pytest.mark.parametrize("template", ["none", "plain", "rewriting"])
def test_every_turn_equals_an_answer_to_the_whole_sequence(model: Any, method: Any, template: str) -> None:
    made = tokenizer(chat=template != "none")
    if template == "rewriting":
        made.chat_template = REWRITING
    extension = None if method is None else longreach.extend(model, method)
    try:
        talk = Conversation(model, made, DOCUMENT, extension=extension, chunk_size=32)
        talk.read()
        for question in QUESTIONS:
            whole = talk.sequence(question)
            expected = generation.answer(model, made, whole, 12, extension=extension)
            assert talk.ask(question, 12).ids == expected.ids
        assert [q for q, _ in talk.turns] == QUESTIONS
    finally:
        if extension is not None:
            extension.remove()


@pytest.mark.parametrize("document", [DOCUMENT, ""])
def test_a_question_costs_only_its_own_tokens(model: Any, document: str) -> None:
    made, fed = tokenizer(), []
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        talk = Conversation(model, made, document, extension=extension)
        read = talk.read()
        hook = model.model.register_forward_pre_hook(lambda m, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
        answers = [talk.ask(q, 8) for q in QUESTIONS]
        hook.remove()
    assert read == len(made(document)["input_ids"])
    written = sum(len(a.ids) for a in answers)
    between = 2 * (len(QUESTIONS) - (not document))
    assert sum(fed) == sum(map(len, QUESTIONS)) + between + written - 1  # the very last token is not read


def test_reset_forgets_the_turns_and_keeps_the_document(model: Any) -> None:
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        talk = Conversation(model, tokenizer(), DOCUMENT, extension=extension)
        first = talk.ask(QUESTIONS[0], 10).ids
        talk.ask(QUESTIONS[1], 10)
        talk.reset()
        assert not talk.turns and talk.ask(QUESTIONS[0], 10).ids == first


def test_what_does_not_fit_is_refused_and_changes_nothing(model: Any) -> None:
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        talk = Conversation(model, tokenizer(), DOCUMENT, extension=extension, limit=140)
        with pytest.raises(ValueError, match=r"more than its context of 140; declare a larger context"):  # there are no turns to forget
            talk.ask("Who was it that was there?", 100)
        answer = talk.ask("Who?", 10).ids
        with pytest.raises(ValueError, match=r"more than its context of 140; forget the earlier turns \(/reset\)"):
            talk.ask("Who was it that was there?", 100)
        assert len(talk.turns) == 1 and talk.turns[0][1].ids == answer
    with pytest.raises(ValueError, match="no chat template"):
        Conversation(model, tokenizer(), DOCUMENT, system="Be brief.")


def test_the_command_reads_once_and_answers_line_by_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "What is the pass key?\n\n/facts\nWhat is the red code?\n/reset\nWhat is the pass key?\n/nonsense\n/quit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    options = ["chat", "--file", "@book", "--truncate", "right", "--context", "1536", "--max-new-tokens", "20"]
    hidden = ["--hide", "The pass key is 48213. Remember it. 48213 is the pass key.", "--hide", "The red code is 77120."]
    assert main([*options, *hidden, "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [turn["question"] for turn in found["turns"]] == ["What is the pass key?", "What is the red code?", "What is the pass key?"]
    assert "48213" in found["turns"][0]["answer"] and found["turns"][0]["answer"] == found["turns"][2]["answer"]
    assert found["context"] == 1536 and 1000 < found["document_tokens"] <= 1536 - 384 + 1
    assert "unknown command '/nonsense'" in captured.err and "tokens were left out (right)" in captured.err


def test_a_text_that_leaves_no_room_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--file", "@book", "--context", "1024"]) == 2
    assert "or --truncate middle" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("text"))
    assert main(["chat", "--file", "-"]) == 2
    assert "standard input is where the questions come from" in capsys.readouterr().err
