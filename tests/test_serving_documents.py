"""Documents of a server: read once, asked often, there after a restart and after `kill -9`, and never outside their folder."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import longreach
import tiny
from commands import Run
from longreach.hf import documents as saved
from longreach.memory.sealed import MANIFEST
from longreach.running.conversation import Conversation
from longreach.serving.limits import Limits
from longreach.serving.protocol import DocumentRequest
from served import Served, process, served

QUESTIONS = ["What is the pass key?", "Who is Ishmael?", "\n\nAnd then?"]


def text() -> str:
    return "The pass key is 48213. Remember it. 48213 is the pass key. " + longreach.shipped_book()[20_000:22_000]


@pytest.fixture(scope="module")
def nano() -> Iterator[tuple[Any, Any, Any]]:
    model, tokenizer = longreach.load("nano")
    with longreach.extend(model, context=1024) as extension:
        yield model, tokenizer, extension


@pytest.fixture
def server(nano: Any, tmp_path: Path) -> Iterator[Served]:
    with served(nano[2], nano[1], documents=tmp_path) as found:
        yield found


def upload(server: Served, name: str = "book", content: str | None = None, **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/documents", json={"name": name, "text": content or text(), **more}, timeout=120)


def ask(url: str, question: str, name: str = "book", **more: Any) -> Any:
    body = {"messages": [{"role": "user", "content": question}], "document": name, "temperature": 0, "max_tokens": 8, **more}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)


def truth(nano: Any, question: str, content: str | None = None) -> str:
    return str(Conversation(nano[0], nano[1], content or text(), extension=nano[2]).ask(question, 8).text)


def test_many_questions_about_one_document_read_it_once(server: Served, nano: Any) -> None:
    made = upload(server)
    assert made.status_code == 201 and made.json()["status"] == "ready"
    tokens = made.json()["tokens"]
    assert tokens == made.json()["read"] > 500 and made.json()["bytes"] > 0
    read = server.service.worker.stats.read
    assert read == tokens
    for question in QUESTIONS[:2]:
        found = ask(server.url, question)
        assert found.json()["choices"][0]["message"]["content"] == truth(nano, question)
        usage = found.json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= tokens and usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] < 20
    server.until(lambda: not server.service.worker.on_their_way)
    assert server.service.worker.stats.read - read < 40
    asked = httpx.post(f"{server.url}/tokenize", json={"messages": [{"role": "user", "content": QUESTIONS[0]}], "document": "book"}).json()
    talk = Conversation(nano[0], nano[1], text(), extension=nano[2])
    assert asked["tokens"] == talk.sequence(QUESTIONS[0])
    assert [one["id"] for one in httpx.get(f"{server.url}/v1/documents").json()["data"]] == ["book"]


def test_a_document_outlives_the_server_and_is_one_of_run(nano: Any, tmp_path: Path, run: Run) -> None:
    with served(nano[2], nano[1], documents=tmp_path) as server:
        assert upload(server).status_code == 201
        expected = ask(server.url, QUESTIONS[1]).json()["choices"][0]["message"]["content"]
    with served(nano[2], nano[1], documents=tmp_path) as server:
        assert httpx.get(f"{server.url}/v1/documents/book").json()["status"] == "ready"
        found = ask(server.url, QUESTIONS[1]).json()
        assert found["choices"][0]["message"]["content"] == expected and found["usage"]["prompt_tokens_details"]["cached_tokens"] > 500
        assert server.service.worker.stats.read < 20
    there = run("run", "--document", tmp_path / "book", "--prompt", QUESTIONS[1], "--max-new-tokens", 8, "--json")
    assert there.json["answer"] == expected
    (tmp_path / "text").write_text(text(), encoding="utf-8")
    assert run("run", "--file", tmp_path / "text", "--context", 1024, "--save-document", tmp_path / "other").code == 0
    with served(nano[2], nano[1], documents=tmp_path) as server:  # and one that run has saved
        assert ask(server.url, QUESTIONS[1], "other").json()["choices"][0]["message"]["content"] == truth(nano, QUESTIONS[1])


def test_names_are_no_paths(server: Served, tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside"
    outside.mkdir(exist_ok=True)
    for name in ("../outside", "..", ".", "a/b", "/etc/passwd", "", "a" * 65, ".hidden", "a\x00b", "a\nb", "book\n", "ä", "~", "C:\\x"):
        assert upload(server, name, "x").status_code == 400, name
        assert ask(server.url, "?", name).status_code == 400, name
        assert httpx.post(f"{server.url}/tokenize", json={"messages": [{"role": "user", "content": "?"}], "document": name}).status_code == 400
    for path in ("..", "%2e%2e", "..%2foutside", "%2fetc%2fpasswd", "a%00b", ".hidden"):
        for method in ("GET", "DELETE"):
            assert httpx.request(method, f"{server.url}/v1/documents/{path}").status_code in (400, 404, 405), path
    assert [*tmp_path.iterdir()] == [] and outside.is_dir()


def test_links_out_of_the_folder_are_no_documents(nano: Any, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    with served(nano[2], nano[1], documents=outside) as server:
        assert upload(server).status_code == 201
    (inside / "book").symlink_to(outside / "book")
    with served(nano[2], nano[1], documents=inside) as server:
        assert httpx.get(f"{server.url}/v1/documents").json()["data"] == []
        assert ask(server.url, "?").status_code == httpx.delete(f"{server.url}/v1/documents/book").status_code == 404
        found = upload(server)
        assert found.status_code == 409 and "is no document; choose another name" in found.json()["error"]["message"]
    assert (outside / "book" / MANIFEST).is_file()


def test_what_is_refused(server: Served, nano: Any, tmp_path: Path) -> None:
    assert upload(server, "long", text() * 4).json()["error"]["code"] == "context_length_exceeded"
    assert upload(server, "system", system="Be brief.").json()["error"]["message"].startswith("this model has no chat template")
    assert httpx.get(f"{server.url}/v1/documents").json()["data"] == [] and ask(server.url, "?").status_code == 404
    assert upload(server, "short", "Call me Ishmael.").status_code == 201
    again = upload(server, "short", "Call me Ishmael.")
    assert again.status_code == 409 and "delete it first" in again.json()["error"]["message"]
    assert httpx.delete(f"{server.url}/v1/documents/short").json() == {"id": "short", "object": "document", "deleted": True}
    assert httpx.delete(f"{server.url}/v1/documents/short").status_code == 404 and ask(server.url, "?", "short").status_code == 404
    assert [*tmp_path.iterdir()] == [] and server.service.worker.stats.documents == ()
    assert upload(server, "short", "Call me Ahab.").status_code == 201
    assert ask(server.url, "Who?", "short").json()["choices"][0]["message"]["content"] == truth(nano, "Who?", "Call me Ahab.")


def test_only_so_many_and_none_without_a_folder(nano: Any, tmp_path: Path) -> None:
    with served(nano[2], nano[1], limits=Limits(documents=1), documents=tmp_path) as server:
        assert upload(server, "one", "x").status_code == 201
        assert "delete one first" in upload(server, "two", "x").json()["error"]["message"]
    with served(nano[2], nano[1]) as server:
        for found in (upload(server), ask(server.url, "?"), httpx.get(f"{server.url}/v1/documents/book"), httpx.delete(f"{server.url}/v1/documents/book")):
            assert found.status_code == 400 and "--documents FOLDER" in found.json()["error"]["message"]
        assert httpx.get(f"{server.url}/v1/documents").json()["data"] == []


def test_one_of_another_method_or_damaged_is_said(nano: Any, tmp_path: Path) -> None:
    with served(nano[2], nano[1], documents=tmp_path) as server:
        assert upload(server).status_code == 201
    model, tokenizer = longreach.load("nano")
    with longreach.extend(model, context=2048) as extension, served(extension, tokenizer, documents=tmp_path) as server:
        found = ask(server.url, "?")
        assert found.status_code == 400 and "cannot be asked" in found.json()["error"]["message"] and str(tmp_path) not in found.text
    for file in (tmp_path / "book").glob("*"):
        if file.name != MANIFEST:
            file.write_bytes(b"damaged")
    with served(nano[2], nano[1], documents=tmp_path) as server:
        found = ask(server.url, "?")
        assert found.status_code == 400 and "upload its text again" in found.json()["error"]["message"] and str(tmp_path) not in found.text
        assert httpx.delete(f"{server.url}/v1/documents/book").status_code == 200


def test_a_damaged_one_does_not_stand_in_the_way_of_others(server: Served, tmp_path: Path) -> None:
    for name in ("bad", "good"):
        assert upload(server, name, "Call me Ishmael.").status_code == 201
    (tmp_path / "bad" / MANIFEST).write_text('{"x":')
    assert [one["id"] for one in httpx.get(f"{server.url}/v1/documents").json()["data"]] == ["good"]
    assert upload(server, "other", "Call me Ahab.").status_code == 201
    found = httpx.get(f"{server.url}/v1/documents/bad")
    assert found.status_code == 400 and "is damaged" in found.json()["error"]["message"] and str(tmp_path) not in found.text
    assert httpx.delete(f"{server.url}/v1/documents/bad").status_code == 200 and not (tmp_path / "bad").exists()


def test_names_of_other_things_in_the_folder_are_taken(server: Served, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "private.jpg").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "odd" / MANIFEST).mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name in ("photos", "notes.txt", "nowhere", "odd"):
        found = upload(server, name)
        said = f"the name {name!r} belongs to something in the server's folder that is no document; choose another name"
        assert (found.status_code, found.json()["error"]["message"]) == (409, said)
        assert httpx.delete(f"{server.url}/v1/documents/{name}").status_code == ask(server.url, "?", name).status_code == 404
    assert server.service.worker.stats.read == 0 and (tmp_path / "photos" / "private.jpg").exists()
    assert upload(server, "empty", "Call me Ishmael.").status_code == 201


@pytest.mark.parametrize("replaced", [False, True])
def test_who_asks_while_it_is_removed_or_replaced_is_told(server: Served, monkeypatch: pytest.MonkeyPatch, replaced: bool) -> None:
    worker, documents = server.service.worker, server.service.documents
    real = worker.ask

    async def late(*given: Any) -> None:
        monkeypatch.setattr(worker, "ask", real)
        await documents.remove("book")
        if replaced:
            async with server.service.admitted(1, progress=True) as asked:
                await documents.add(DocumentRequest(name="book", text="Call me Ahab."), asked)
        await real(*given)

    assert upload(server, "book", "Call me Ishmael.").status_code == 201
    monkeypatch.setattr(worker, "ask", late)
    found = ask(server.url, "Who?")
    assert (found.status_code, found.json()["error"]["code"]) == (404, "document_not_found")
    assert ask(server.url, "Who?").status_code == (200 if replaced else 404)


def test_who_asks_while_it_is_loaded_and_removed_is_told(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = server.service.documents
    real = documents._load

    async def late(name: str) -> Any:
        shutil.rmtree(documents._place(name))
        return await real(name)

    assert upload(server, "book", "Call me Ishmael.").status_code == 201
    documents._known.clear()
    monkeypatch.setattr(documents, "_load", late)
    assert (ask(server.url, "Who?").status_code, documents._known) == (404, {})


@pytest.mark.parametrize("replaced", [False, True])
def test_what_is_removed_while_it_is_listed_is_not_damaged(server: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, replaced: bool) -> None:
    real = saved.size

    def late(place: Path) -> int:
        monkeypatch.setattr(saved, "size", real)
        manifest = (place / MANIFEST).read_bytes()
        (place / MANIFEST).unlink()
        if replaced:
            (place / "new").write_bytes(manifest)
            (place / "new").rename(place / MANIFEST)
        raise ValueError("a file is not there")

    for path, status in (("", 200), ("/book", 200 if replaced else 404)):
        assert upload(server, "book", "Call me Ishmael.").status_code == 201
        monkeypatch.setattr(saved, "size", late)
        found = httpx.get(f"{server.url}/v1/documents{path}")
        assert found.status_code == status and ("data" not in found.json() or len(found.json()["data"]) == replaced)
        shutil.rmtree(tmp_path / "book")


def test_an_upload_that_is_broken_off_leaves_nothing(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = server.service.worker.scheduler
    real = scheduler.step
    monkeypatch.setattr(scheduler, "step", lambda: (time.sleep(0.3), real())[1])
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/documents", json={"name": "book", "text": text()}, timeout=0.2)
    server.until(lambda: not server.service.worker.on_their_way and not server.service.worker.stats.running)
    monkeypatch.undo()
    assert httpx.get(f"{server.url}/v1/documents").json()["data"] == [] and [*tmp_path.iterdir()] == []
    assert upload(server).status_code == 201


def test_a_disk_that_fails_is_told_and_nothing_is_kept(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(snapshot: Any, folder: Path, *given: Any) -> None:
        raise OSError(28, "No space left on device", str(folder / "blocks"))

    monkeypatch.setattr(server.service.worker.scheduler.room.flat, "save", full)
    found = upload(server)
    assert found.status_code == 500 and "No space left on device" in found.json()["error"]["message"] and str(tmp_path) not in found.text
    monkeypatch.undo()
    assert httpx.get(f"{server.url}/v1/documents").json()["data"] == [] and upload(server).status_code == 201


def test_while_it_is_read_its_progress_is_seen_and_others_go_on(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = server.service.worker.scheduler
    real = scheduler.step
    monkeypatch.setattr(scheduler, "step", lambda: (time.sleep(0.2), real())[1])
    made: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: made.append(upload(server)))
    thread.start()
    server.until(lambda: "book" in server.service.documents._reading)
    found = httpx.get(f"{server.url}/v1/documents/book").json()
    assert found["status"] == "reading" and found["read"] <= found["tokens"]
    assert ask(server.url, "?").status_code == 400 and upload(server).status_code == 409
    assert httpx.delete(f"{server.url}/v1/documents/book").status_code == 409
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
    thread.join()
    assert made[0].status_code == 201


def test_a_system_message_belongs_to_the_document(tmp_path: Path) -> None:
    model, tokenizer = tiny.llama(), tiny.tokenizer(chat=True)
    with longreach.extend(model, context=256) as extension, served(extension, tokenizer, documents=tmp_path) as server:
        content = "Some text of a hundred tokens, " * 3
        assert upload(server, "book", content, system="Be brief.").status_code == 201
        body = {"messages": [{"role": "user", "content": "Why?"}], "document": "book"}
        rendered = f"[system]Be brief.[user]{content}\n\nWhy?[assistant]"
        assert httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"] == tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert ask(server.url, "Why?").json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 90
        other = ask(server.url, "Why?", messages=[{"role": "system", "content": "x"}, *body["messages"]])
        assert other.status_code == 400 and "system message of its own" in other.json()["error"]["message"]
        assert "pass a user message" in ask(server.url, "", messages=[{"role": "assistant", "content": "x"}]).json()["error"]["message"]


def lost(url: str) -> None:
    with suppress(httpx.HTTPError):
        httpx.post(url, json={"name": "second", "text": text()}, timeout=120)


def test_kill_9_loses_no_saved_document(tmp_path: Path) -> None:
    options = ("--context", "1024", "--documents", str(tmp_path))
    with process(*options) as (server, url):
        first = httpx.post(f"{url}/documents", json={"name": "first", "text": text()}, timeout=120)
        assert first.status_code == 201
        expected = ask(url.removesuffix("/v1"), QUESTIONS[0], "first").json()["choices"][0]["message"]["content"]
        thread = threading.Thread(target=lost, args=[f"{url}/documents"])
        thread.start()
        time.sleep(0.15)  # wherever that is
        server.send_signal(signal.SIGKILL)
        thread.join()
    with process(*options) as (_, url):
        kept = {one["id"] for one in httpx.get(f"{url}/documents").json()["data"]}
        assert "first" in kept <= {"first", "second"}
        for name in kept:
            assert ask(url.removesuffix("/v1"), QUESTIONS[0], name).json()["choices"][0]["message"]["content"] == expected
        if "second" not in kept:
            assert httpx.post(f"{url}/documents", json={"name": "second", "text": text()}, timeout=120).status_code == 201
