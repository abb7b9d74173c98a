"""A conversation answers as if everything were read anew each time, and reads every token once."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import longreach
from longreach import LMInfinite, SelfExtend, Stock
from longreach.cli import console, main, stored
from longreach.cli.session import Session
from longreach.planning import dial
from longreach.running import generation
from longreach.running.conversation import Conversation
from tiny import SMALL, llama, tokenizer

DOCUMENT = "It was a dark night. Nobody was on the road, and the lamp in the inn had gone out long ago."
QUESTIONS = ["Who was there?", "Why?", "And the lamp?"]
REWRITING = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'][:3] if m['role'] == 'assistant' else m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


MATRIX = [
    pytest.mark.parametrize("method", [None, SelfExtend(8, 16), LMInfinite(48, 4)], ids=["stock", "selfextend", "lm-infinite"]),
    pytest.mark.parametrize("template", ["none", "plain", "rewriting"]),
]


@contextmanager
def talking(model: Any, method: Any, template: str) -> Iterator[Conversation]:
    """A conversation about the document under a method, with a kind of chat template."""
    made = tokenizer(chat=template != "none")
    if template == "rewriting":
        made.chat_template = REWRITING
    with nullcontext() if method is None else longreach.extend(model, method) as extension:
        yield Conversation(model, made, DOCUMENT, extension=extension, chunk_size=32)


def alone(talk: Conversation, question: str) -> list[int]:
    """The ids of the answer to everything so far and the question, read anew."""
    return generation.answer(talk.model, talk.tokenizer, talk.sequence(question), 12, extension=talk.extension).ids


@MATRIX[0]
@MATRIX[1]
def test_every_turn_equals_an_answer_to_the_whole_sequence(model: Any, method: Any, template: str) -> None:
    with talking(model, method, template) as talk:
        talk.read()
        for question in QUESTIONS:
            expected = alone(talk, question)
            assert talk.ask(question, 12).ids == expected
        assert [q for q, _ in talk.turns] == QUESTIONS


@pytest.mark.parametrize("method", [None, SelfExtend(8, 16)], ids=["stock", "selfextend"])
def test_a_family_that_drops_its_cache_at_a_length(method: Any) -> None:
    """Stock Phi-3 reads everything again where its frequencies switch, with a cache of its own: the conversation goes on from that one."""
    torch.manual_seed(0)
    window = len(tokenizer()(DOCUMENT)["input_ids"]) + 20
    ropes = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": window}
    model = t.Phi3ForCausalLM(t.Phi3Config(**{**SMALL, "pad_token_id": 0}, original_max_position_embeddings=window, rope_parameters=ropes)).eval()
    extension = None if method is None else longreach.extend(model, method, trained_window=window)
    talk = Conversation(model, tokenizer(), DOCUMENT, extension=extension, chunk_size=32)
    talk.read()
    for question in QUESTIONS * 3:
        try:
            expected = generation.answer(model, talk.tokenizer, talk.sequence(question), 12, extension=extension)
        except ValueError as error:  # older releases drop the cache and then read the last token only
            assert method is None and "loses the beginning of a text" in str(error)
            return
        found = talk.ask(question, 12)
        assert found.ids == expected.ids and found.cache.get_seq_length() == talk.known
    assert talk.known > window


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


@MATRIX[0]
@MATRIX[1]
def test_an_interrupted_answer_is_a_turn_like_any_other(model: Any, method: Any, template: str) -> None:
    with talking(model, method, template) as talk:
        whole, written = talk.ask(QUESTIONS[0], 12).ids, []
        talk.reset()
        cut = talk.ask(QUESTIONS[0], 12, write=written.append, stopped=lambda: len(written) >= 5)
        assert cut.finish == "interrupted" and 0 < len(cut.ids) < 12 and cut.ids == whole[: len(cut.ids)] and talk.turns[0][1].text == cut.text
        for question in QUESTIONS[1:]:
            expected = alone(talk, question)
            assert talk.ask(question, 12).ids == expected


@pytest.mark.parametrize("method", [SelfExtend(8, 16), LMInfinite(48, 4)], ids=["selfextend", "lm-infinite"])
def test_what_is_interrupted_before_its_first_word_is_no_turn(model: Any, method: Any) -> None:
    made, read = tokenizer(), []
    with longreach.extend(model, method) as extension:
        talk = Conversation(model, made, DOCUMENT, extension=extension, chunk_size=16)
        found = talk.ask(QUESTIONS[0], 12, progress=read.append, stopped=lambda: len(read) >= 3)
        assert (found.finish, found.ids, found.text, talk.turns) == ("interrupted", [], "", []) and read == [16, 32, 48] and talk.known == 48
        for question in QUESTIONS:
            expected = generation.answer(model, made, talk.sequence(question), 12, extension=extension)
            assert talk.ask(question, 12).ids == expected.ids


@pytest.mark.parametrize("template", [False, True], ids=["plain", "template"])
@pytest.mark.parametrize("document", [DOCUMENT, ""], ids=["document", "alone"])
def test_a_conversation_is_saved_with_its_turns(model: Any, tmp_path: Path, template: bool, document: str) -> None:
    made, file = tokenizer(chat=template), tmp_path / "talk"
    with longreach.extend(model, SelfExtend(8, 16), context=400) as extension:
        talk = Conversation(model, made, document, extension=extension, limit=400)
        for question in QUESTIONS[:2]:
            talk.ask(question, 8)
        talk.save(file)
        again = Conversation.open(model, made, extension, file, limit=400)
        assert again.known == talk.known and [(q, a.ids, a.text, a.finish) for q, a in again.turns] == [(q, a.ids, a.text, a.finish) for q, a in talk.turns]
        assert again.ask(QUESTIONS[2], 8).ids == talk.ask(QUESTIONS[2], 8).ids
        for forged in ("[", "[[1, 2, 3, 4]]", '[["a", "b", [100000], "stop"]]', '[["a", "b", [3], "never"]]', '[["\\ud800", "b", [3], "stop"]]', '{"a": 1}'):
            extension.save(talk.prefix.cache, file, talk.prefix.ids, notes={"document": document, "turns": forged})
            with pytest.raises(ValueError, match="damaged or forged"):
                Conversation.open(model, made, extension, file)
        extension.save(talk.prefix.cache, file, talk.prefix.ids, notes={"document": document, "turns": '[["a", "another text", [3], "stop"]]'})
        with pytest.raises(ValueError, match="other tokens of the text"):
            Conversation.open(model, made, extension, file)


def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: list[str], *options: object) -> tuple[dict[str, Any], str]:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    code = main(["chat", *map(str, options), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out), captured.err


@pytest.mark.filterwarnings("ignore:context .* needs distances")
def test_a_conversation_is_plain_until_it_leaves_the_window(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer is that of the method in force to the whole sequence; a change is said, and costs one reading."""
    made, said = tokenizer(), io.StringIO()
    out = console.Output(False, io.StringIO(), console.Terminal(file=said))
    session = Session(out, model, made, stored.Choice(None, None, None, 16), 8)
    session.begin("", None)
    try:
        session.read()
        assert session.extension.method == Stock() and session.talk.limit == 64
        fed: list[int] = []
        model.model.register_forward_pre_hook(lambda m, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
        limits = [64]
        for turn in range(30):
            whole, before, mark = session.talk.sequence(f"Why {turn}?"), said.getvalue(), len(fed)
            found = session.ask(f"Why {turn}?", generation.GREEDY, None)
            read = sum(fed[mark:])
            assert found.ids == generation.answer(model, made, whole, 8, extension=session.extension, chunk_size=16).ids
            news = " ".join(said.getvalue()[len(before) :].split())
            if session.talk.limit != limits[-1]:
                old = "the trained window of 64 tokens" if limits[-1] == 64 else f"its context of {limits[-1]} tokens"
                assert f"the conversation leaves {old}: reading it again with {session.extension.method}" in news
                assert len(whole) + 8 > limits[-1] and session.talk.limit >= min(1.25 * limits[-1], dial.reach(64)[0]) and read >= len(whole)
                limits.append(session.talk.limit)
            else:
                assert "leaves" not in news and read < 40
            assert session.extension.context == session.talk.limit and (session.extension.method == Stock()) == (len(limits) == 1)
        assert len(limits) >= 4
        session.reset()
        assert session.extension.method == Stock() and session.talk.limit == 64
    finally:
        session.end()
        model.model._forward_pre_hooks.clear()


@pytest.mark.parametrize(
    ("options", "name", "context"),
    [
        ([], "stock", 512),
        (["--context", 2048], "selfextend", 2048),
        (["--method", "selfextend", "--group-size", 2, "--window", 64], "selfextend", 960),
        (["--method", "lm-infinite", "--n-local", 128], "lm-infinite", None),
        (["--method", "stock"], "stock", 512),
        (["--method", "yarn", "--factor", 4], "yarn", None),
        (["--method", "dynamic-ntk"], "dynamic-ntk", None),
        (["--file", "TEXT"], "selfextend", None),
    ],
)
def test_what_is_asked_for_is_in_force_from_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[object], name: str, context: int | None
) -> None:
    (tmp_path / "book.txt").write_text("It was a dark night. " * 120)
    given = [tmp_path / "book.txt" if o == "TEXT" else o for o in options]
    found, said = chat(monkeypatch, capsys, ["Who?"], "--max-new-tokens", 4, *given)
    assert found["extension"]["method"]["method"] == name and "leaves" not in said
    assert context is None or found["context"] == context


def test_a_conversation_is_saved_and_taken_up_by_chat_and_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, short = tmp_path / "talk", ["--max-new-tokens", 12]
    lines = ["The red code is 5512.", f"/save {file}", "What is the red code?"]
    first, said = chat(monkeypatch, capsys, lines, *short)
    assert f"1 turn saved to {file}" in said
    second, said = chat(monkeypatch, capsys, ["/help", f"/load {file}", "What is the red code?"], *short)
    assert "1 turn loaded from" in said and "/save FILE" in said
    assert second["turns"][0]["answer"] == first["turns"][1]["answer"]
    assert main(["run", "--document", str(file), "--prompt", "What is the red code?", *map(str, short), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"].strip() == first["turns"][1]["answer"]
    (tmp_path / "mine").write_text("mine")
    for line, says in (
        (f"/save {tmp_path / 'mine'}", "is a file, and a document is a folder"),
        (f"/load {tmp_path / 'mine'}", "is a file and no document of Longreach"),
        ("/load", "needs the name of a file"),
        (f"/save {tmp_path}", "exists and is no document that Longreach wrote; name another folder"),
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"Who?\n{line}\n"))
        assert main(["chat", *map(str, short)]) == 2 and says in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_file_that_cannot_be_taken_up_leaves_the_conversation(model: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = t.LlamaForCausalLM(t.LlamaConfig(**SMALL)).eval()
    with longreach.extend(other, SelfExtend(8, 16), context=200) as extension:
        talk = Conversation(other, tokenizer(), DOCUMENT, extension=extension)
        talk.read()
        talk.save(tmp_path / "other")
    session = Session(console.Output(False, io.StringIO(), console.Terminal(file=io.StringIO())), model, tokenizer(), stored.Choice(None, None, None, 16), 8)
    session.begin("", None)
    try:
        session.ask("Who?", generation.GREEDY, None)
        with pytest.raises(ValueError, match="other weights"):
            session.load(tmp_path / "other")
        expected = generation.answer(model, tokenizer(), session.talk.sequence("Why?"), 8, extension=session.extension).ids
        assert session.ask("Why?", generation.GREEDY, None).ids == expected and len(session.talk.turns) == 2
    finally:
        session.end()


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
    lines = "What is the pass key?\n\n/facts\nWhat is the red code?\n/reset\nWhat is the pass key?\n/quit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    options = ["chat", "--file", "@book", "--truncate", "right", "--context", "1536", "--max-new-tokens", "20"]
    hidden = ["--hide", "The pass key is 48213. Remember it. 48213 is the pass key.", "--hide", "The red code is 77120."]
    assert main([*options, *hidden, "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [turn["question"] for turn in found["turns"]] == ["What is the pass key?", "What is the red code?", "What is the pass key?"]
    assert "48213" in found["turns"][0]["answer"] and found["turns"][0]["answer"] == found["turns"][2]["answer"]
    assert found["context"] == 1536 and 1000 < found["document_tokens"] <= 1536 - 384 + 1
    assert "tokens were left out (right)" in captured.err


@pytest.mark.parametrize(("wrong", "says"), [("/nonsense", "unknown command '/nonsense'"), ("/load none", "there is no document"), ("Why? " * 99, "more than")])
def test_a_wrong_line_of_piped_ones_is_the_last_and_loses_no_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str, says: str
) -> None:
    options = ["chat", "--max-new-tokens", "4", *(["--context", "300"] if "Why" in wrong else [])]
    for as_json in ([], ["--json"]):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"Who?\n{wrong}\nnever asked\n"))
        assert main([*options, *as_json]) == 2
        captured = capsys.readouterr()
        last = captured.err.strip().splitlines()[-1]
        assert last.startswith("error: ") and says in last
    found = json.loads(captured.out)
    assert [turn["question"] for turn in found["turns"]] == ["Who?"] and found["turns"][0]["answer"] and found["error"] == last.removeprefix("error: ")


def test_what_a_loaded_conversation_puts_out_of_force_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file, short = tmp_path / "talk", ["--max-new-tokens", 4]
    (tmp_path / "book.txt").write_text(DOCUMENT)
    chat(monkeypatch, capsys, ["Who?", f"/save {file}"], "--context", 600, *short)
    _, said = chat(monkeypatch, capsys, [f"/load {file}", "Why?"], "--context", 600, *short)
    assert "no longer in force" not in said
    found, said = chat(monkeypatch, capsys, [f"/load {file}", "Why?"], "--context", 700, "--file", tmp_path / "book.txt", *short)
    assert "warning: no longer in force: --context, the text before; the conversation goes on with" in said and found["context"] == 600


def test_a_text_that_leaves_no_room_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--file", "@book", "--context", "1024"]) == 2
    assert "or --truncate middle" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("text"))
    assert main(["chat", "--file", "-"]) == 2
    assert "standard input is where the questions come from" in capsys.readouterr().err
