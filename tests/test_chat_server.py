"""`longreach chat --server`: a conversation with a real server, what it costs there, and what goes wrong on the way."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

import longreach
from commands import Run, refused
from longreach.cli import console, remote
from longreach.running.conversation import Conversation
from served import Served, served


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model, tokenizer = longreach.load("nano")
    folder = tmp_path_factory.mktemp("documents")
    with longreach.extend(model, context=2048) as extension, served(extension, tokenizer, documents=folder) as found:
        yield found


def talked(monkeypatch: pytest.MonkeyPatch, run: Run, lines: list[str], *options: object) -> Any:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return run("chat", *options)


def test_it_says_what_a_conversation_here_says(server: Served, monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Any) -> None:
    book = longreach.shipped_book()[:4000]
    (tmp_path / "book").write_text(book, encoding="utf-8")
    asked = ["What is the red code?", "What is the red code? Say it again."]
    options = ["--server", server.url, "--file", tmp_path / "book", "--hide", "The red code is 5512. Keep it in mind.", "--max-new-tokens", 12]
    found = talked(monkeypatch, run, asked, *options, "--json").json
    document = longreach.running.prompts.hide(book, "The red code is 5512. Keep it in mind.", 0.5)
    model, tokenizer = longreach.load("nano")
    with longreach.extend(model, context=2048) as extension:
        talk = Conversation(model, tokenizer, document, extension=extension)
        assert [turn["answer"] for turn in found["turns"]] == [talk.ask(question, 12).text.strip() for question in asked]
    assert (found["server"], found["model"], "5512" in found["turns"][0]["answer"]) == (server.url, "nano", True)
    first, second = found["turns"]
    assert (
        second["prompt_tokens"] > first["prompt_tokens"] > 1000 and second["cached_tokens"] >= first["prompt_tokens"] and first["finish"] in ("stop", "length")
    )
    plain = talked(monkeypatch, run, asked[:1], *options)
    assert plain.code == 0 and plain.out.strip() == first["answer"]
    assert f"nano at {server.url}" in plain.err and " s to the first token" in plain.err and "cached)" in plain.err


def test_a_document_of_the_server_is_not_sent_again(server: Served, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    text = longreach.running.prompts.hide(longreach.shipped_book()[:4000], "The red code is 5512. Keep it in mind.", 0.5)
    assert httpx.post(f"{server.url}/v1/documents", json={"name": "book", "text": text}, timeout=60).status_code == 201
    with_name = ("--server", server.url, "--document", "book", "--max-new-tokens", 12)
    found = talked(monkeypatch, run, ["What is the red code?", "/reset", "What is the red code?"], *with_name, "--json")
    first, second = found.json["turns"]
    assert "5512" in first["answer"] and second["answer"] == first["answer"] and first["cached_tokens"] > 0.9 * first["prompt_tokens"] > 900
    assert " tokens of book, which the server has read" in found.err
    for options, says in (
        (("--server", server.url, "--document", "novel"), "there is no document 'novel'"),
        (("--server", server.url, "--document", "../book"), "there is nothing at"),
        (("--document", "book"), "--document names one that a server keeps; pass --server URL too"),
        ((*with_name, "--hide", "x"), "leave out --file and --hide, or leave out --document"),
    ):
        refused(run, "chat", *options, says=says)


def test_commands_of_the_conversation(server: Served, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    lines = ["/help", "/facts", "Who?", "/reset", "Who?", "/quit", "Never asked"]
    found = talked(monkeypatch, run, lines, "--server", f"{server.url}/v1/", "--max-new-tokens", 4, "--json")
    assert [turn["question"] for turn in found.json["turns"]] == ["Who?", "Who?"]
    assert len({turn["prompt_tokens"] for turn in found.json["turns"]}) == 1  # nothing of the first is left
    assert "/reset" in found.err and "the turns are forgotten" in found.err and "trained_window" in found.err and '"method": "selfextend"' in found.err
    for line, says in (("/save x", "leave out --server"), ("/what", "unknown command '/what'")):
        wrong = talked(monkeypatch, run, [line, "Who?"], "--server", server.url, "--json")
        assert wrong.code == 2 and says in wrong.json["error"] and wrong.json["turns"] == []


def test_a_sampled_answer_has_a_seed(server: Served, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def answer(*more: object) -> str:
        found = talked(monkeypatch, run, ["Call me"], "--server", server.url, "--max-new-tokens", 12, "--temperature", 1.5, *more, "--json").json
        return str(found["turns"][0]["answer"])

    assert answer("--seed", 1) == answer("--seed", 1) != answer("--seed", 2) and answer() == answer("--seed", 0)
    greedy = talked(monkeypatch, run, ["Call me"], "--server", server.url, "--max-new-tokens", 2, "--seed", 3)
    assert "--seed has no effect" in greedy.err


def test_the_server_says_what_is_wrong(server: Served, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("word " * 3000))
    found = run("chat", "--server", server.url, "--json")
    assert found.code == 2 and "more than the context of 2048 tokens" in found.json["error"]
    wrong = talked(monkeypatch, run, ["Who?"], "--server", server.url, "--system", "Be brief.", "--json")
    assert wrong.code == 2 and "no place for a system message" in wrong.json["error"]
    refused(run, "chat", "--server", server.url, "--model", "other", says="has no model 'other'; pass --model nano")


def test_a_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    model, tokenizer = longreach.load("nano")
    with longreach.extend(model, context=600) as extension, served(extension, tokenizer, key="sesame") as found:
        refused(run, "chat", "--server", found.url, says="name the variable that holds the key with --api-key-env")
        monkeypatch.setenv("OWN_KEY", "sesame")
        assert talked(monkeypatch, run, ["Who?"], "--server", found.url, "--api-key-env", "OWN_KEY", "--max-new-tokens", 2).code == 0
        monkeypatch.setenv("OWN_KEY", "")
        refused(run, "chat", "--server", found.url, "--api-key-env", "OWN_KEY", says="OWN_KEY holds no API key")
    refused(run, "chat", "--api-key-env", "OWN_KEY", says="pass --server URL too")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--context", "4k"], "--context is for the server to decide"),
        (["--method", "stock", "--dtype", "float32"], "--method and --dtype are for the server to decide"),
        (["--group-size", "8"], "--group-size is for the server to decide"),
        (["--memory", "device=1MiB"], "pass to `longreach serve` there, or leave out --server"),
    ],
)
def test_options_of_a_model_here_are_refused(run: Run, options: list[str], says: str) -> None:
    refused(run, "chat", "--server", "http://127.0.0.1:1", *options, says=says)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://", "http://a b", "http://host:port", "http://user:word@host", "http://host/?q", "http://host:0"])
def test_an_address_is_an_address(run: Run, url: str) -> None:
    refused(run, "chat", "--server", url, says="pass one such as http://127.0.0.1:8000")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://127.0.0.1:8000", "http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1", "http://127.0.0.1:8000/v1/"])
def test_an_address_may_be_written_in_several_ways(url: str) -> None:
    found = remote.Server.parse(url, None)
    assert (found.at.hostname, found.at.port, found.base, found.in_the_open) == ("127.0.0.1", 8000, "/v1", False)
    assert remote.Server.parse("http://example.org/api", None).base == "/api" and remote.Server.parse("http://example.org", None).in_the_open
    assert not remote.Server.parse("https://example.org", None).in_the_open


@contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """A server that says these, one to each connection, whatever it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def work() -> None:
            for answer in answers:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        thread = threading.Thread(target=work)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(10)


def http(body: str, status: str = "200 OK", more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\nConnection: close\r\n{more}\r\n{body}".encode()


MODELS = http('{"data": [{"id": "m"}]}')
HALF = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ((http("", "302 Found", "Location: http://127.0.0.1:9/\r\n"),), "answered with the status 302 and without a reason"),  # a key goes nowhere else
        ((http("<html>"),), "not that of an OpenAI-compatible API"),
        ((http('{"data": []}'),), "names no model"),
        ((http('{"error": "down for a while"}', "503 No"),), "down for a while"),
        ((b"nonsense",), "cannot be reached"),
        ((MODELS, http(HALF)), "the connection broke off"),
        ((MODELS, http(f'{HALF}data: {{"error": {{"message": "the model failed"}}}}\n\n')), "the model failed"),
        ((MODELS, http("data: [1]\n\n")), "not that of an OpenAI-compatible API"),
        ((http("[" * 100_000),), "not that of an OpenAI-compatible API"),
        *(
            ((MODELS, http(f"data: {event}\n\ndata: [DONE]\n\n")), "not that of an OpenAI-compatible API")
            for event in (
                '{"choices": 5}', '{"choices": ["x"]}', '{"choices": [{"delta": "x"}]}', '{"choices": [{"delta": {"content": 5}}]}',
                '{"usage": "x"}', '{"usage": {"prompt_tokens_details": 5}}', "[" * 100_000,
            )
        ),
    ],
)
def test_a_strange_server_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch, run: Run, answers: tuple[bytes, ...], says: str) -> None:
    with answering(*answers) as url:
        found = talked(monkeypatch, run, ["Who?"], "--server", url, "--json")
    assert found.code == 2 and says in found.json["error"] and "Traceback" not in found.err


@pytest.mark.parametrize("kept", ['{}', '{"tokens": "many"}', '{"tokens": [5]}'])
def test_a_server_without_documents_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch, run: Run, kept: str) -> None:
    with answering(MODELS, http(kept)) as url:
        found = talked(monkeypatch, run, ["Who?"], "--server", url, "--document", "book", "--json")
    assert found.code == 2 and "keeps no documents as longreach serve does" in found.json["error"]


def test_others_of_its_kind_are_understood(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    """One that names no cached tokens, has empty choices, comments and fields of its own."""
    events = ': hello\n\nevent: x\ndata: {"choices": []}\n\n' + HALF + 'data:{"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    with answering(MODELS, http(events)) as url:
        [turn] = talked(monkeypatch, run, ["Who?"], "--server", url, "--json").json["turns"]
    assert (turn["answer"], turn["finish"], turn["cached_tokens"], turn["new_tokens"]) == ("half", "stop", None, None)


def test_a_server_that_is_not_there(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        url = f"http://127.0.0.1:{gone.getsockname()[1]}"
    refused(run, "chat", "--server", url, says=f"{url} cannot be reached (Connection refused); start `longreach serve` there")


def test_an_interrupt_stops_the_answer_here_and_there(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with console.output(as_json=False, quiet=True) as out:
        talk = remote.Talk(out, remote.Server.parse(server.url, None), "nano", "", None, {"max_tokens": 1500, "temperature": 0})
        seen: list[str] = []

        def write(part: str) -> None:
            seen.append(part)
            if len(seen) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(out, "write", write)
        found = talk.ask("Call me Ishmael.", asking=True)
        assert found is not None and found["finish"] == "interrupted" and found["answer"] == "".join(seen[:3]).strip()
        server.until(lambda: server.service.worker.on_their_way == 0 and server.service.worker.stats.running == 0)
        assert [one["role"] for one in talk.said] == ["user", "assistant"]  # what was written stays
        talk.settings["max_tokens"] = 3
        again = talk.ask("Go on.", asking=True)
        assert again is not None and again["new_tokens"] == 3 and json.dumps(again)
        monkeypatch.setattr(out, "write", lambda part: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # where lines are piped in, it ends the program
            talk.ask("And?", asking=False)
        assert len(talk.said) == 4
