"""What clients must not do to a server: ask without a key, ask for too much, wait for ever, leave work behind, or read what others have written."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import uvicorn
from tokenizers import Regex, normalizers

import longreach
import tiny
from longreach.running import prompts
from longreach.serving.connections import Connection
from longreach.serving.limits import Limits
from served import Served, process, served

SECRET = "my neighbour's secret"
ASK = {"prompt": SECRET, "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def nano() -> Iterator[tuple[Any, Any]]:
    model, tokenizer = longreach.load("nano")
    with longreach.extend(model, context=1024) as extension:
        yield extension, tokenizer


@pytest.fixture
def server(nano: Any) -> Iterator[Served]:
    with served(*nano) as found:
        yield found


@contextmanager
def held(server: Served) -> Iterator[None]:
    """Inside, the thread of the model does nothing else."""
    begun, over = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        over.wait(30)

    server.service.worker._tell(wait)
    assert begun.wait(30)
    try:
        yield
    finally:
        over.set()


def idle(server: Served) -> bool:
    worker = server.service.worker
    return not worker.on_their_way and worker.stats.running == worker.stats.waiting == 0


# -- who may ask ------------------------------------------------------------------------------------------------------------------


def test_a_key_opens_everything_but_health(nano: Any) -> None:
    with served(*nano, key="sesame") as server:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "sesame"}, {"Authorization": b"Bearer \xff"}):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/nothing"):
                found = httpx.get(server.url + path, headers=given)
                assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert httpx.get(f"{server.url}/v1/models", headers={"Authorization": "bearer sesame"}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client.models.list()
        assert openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame").models.list().data[0].id == "nano"
        document = httpx.get(f"{server.url}/openapi.json", headers={"Authorization": "Bearer sesame"}).json()
        [(name, scheme)] = document["components"]["securitySchemes"].items()
        assert (scheme["type"], scheme["scheme"], document["security"]) == ("http", "bearer", [{name: []}])
        free = {path for path, operations in document["paths"].items() for operation in operations.values() if operation.get("security") == []}
        assert free == {"/health"}


def test_without_a_key_the_document_asks_for_none(server: Served) -> None:
    document = httpx.get(f"{server.url}/openapi.json").json()
    assert "security" not in document and "securitySchemes" not in document["components"]


def test_web_pages_of_others_are_refused(server: Served) -> None:
    """There are no CORS headers, and what a page can send without asking for leave is refused."""
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://["):
        found = httpx.post(f"{server.url}/v1/completions", json=ASK, headers={"Origin": origin})
        assert found.status_code == 403 and "access-control-allow-origin" not in found.headers, origin
    assert httpx.post(f"{server.url}/v1/completions", json=ASK, headers={"Origin": server.url}).status_code == 200
    assert httpx.get(f"{server.url}/health", headers={"Host": "evil.example"}).status_code == 403  # a name that was turned to this machine
    assert httpx.get(f"{server.url}/health", headers={"Host": "localhost:99"}).status_code == 200
    plain = httpx.post(f"{server.url}/v1/completions", content=json.dumps(ASK), headers={"Content-Type": "text/plain"})
    assert plain.status_code == 400
    asked = httpx.options(f"{server.url}/v1/completions", headers={"Origin": server.url, "Access-Control-Request-Method": "POST"})
    assert asked.status_code == 405 and "access-control-allow-origin" not in asked.headers


# -- too much ---------------------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_large(nano: Any) -> None:
    with served(*nano, limits=Limits(body=1000)) as server:
        large = json.dumps({**ASK, "prompt": "x" * 2000}).encode()

        def parts() -> Iterator[bytes]:
            yield large[:600]
            yield large[600:]

        for content in (large, parts()):  # with a Content-Length, and in chunks
            found = httpx.post(f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"})
            assert found.status_code == 413 and "larger than the 1000 bytes" in found.json()["error"]["message"]
        assert httpx.post(f"{server.url}/v1/completions", json=ASK).status_code == 200


def test_a_body_that_does_not_come(nano: Any) -> None:
    with served(*nano, limits=Limits(body_seconds=0.2)) as server:
        place = urlsplit(server.url)
        with socket.create_connection((place.hostname, place.port), timeout=30) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert httpx.post(f"{server.url}/v1/completions", json=ASK).status_code == 200


def test_too_many_at_a_time_are_told_to_come_again(nano: Any) -> None:
    with served(*nano, limits=Limits(waiting=2)) as server:
        with held(server):
            first = threading.Thread(target=httpx.post, args=[f"{server.url}/v1/completions"], kwargs={"json": {**ASK, "n": 2}, "timeout": 60})
            first.start()
            server.until(lambda: server.service.worker.on_their_way == 2)
            found = httpx.post(f"{server.url}/v1/completions", json=ASK)
            assert (found.status_code, found.headers["Retry-After"], found.json()["error"]["type"]) == (429, "1", "rate_limit_error")
            with pytest.raises(openai.RateLimitError):
                server.client.completions.create(model="nano", prompt="x", max_tokens=1)
        first.join()
        assert httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60).status_code == 200
        assert httpx.post(f"{server.url}/v1/completions", json={**ASK, "n": 3}).status_code == 400  # which never fits


def test_an_answer_that_takes_too_long(nano: Any) -> None:
    with served(*nano, limits=Limits(seconds=0.3)) as server:
        endless = {**ASK, "max_tokens": 1000}
        found = httpx.post(f"{server.url}/v1/completions", json=endless, timeout=60)
        assert (found.status_code, found.headers["x-should-retry"]) == (408, "false") and "longer than 0.3 seconds" in found.json()["error"]["message"]
        with pytest.raises(openai.APIError, match="longer than"):
            list(server.client.completions.create(model="nano", prompt="x", max_tokens=1000, temperature=0, stream=True))
        server.until(lambda: idle(server))
        assert server.service.worker.stats.decoded < 1500


def test_a_client_that_does_not_read_holds_nothing_for_longer(nano: Any) -> None:
    """What is sent to it is never taken, as when its window is full."""
    body = json.dumps({**ASK, "max_tokens": 1000, "n": 2, "stream": True}).encode()
    came, stuck = [{"type": "http.request", "body": body}], asyncio.Event()

    async def receive() -> Any:
        return came.pop() if came else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message.get("body"):
            stuck.set()
            await asyncio.Event().wait()

    async def ask(server: Served) -> None:
        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"", "query_string": b"", "headers": headers}
        answering = asyncio.create_task(server.app({**scope, "asgi": {"spec_version": "2.3"}}, receive, send))
        await stuck.wait()
        await asyncio.wait_for(answering, 20)

    with served(*nano, limits=Limits(seconds=0.3)) as server:
        asyncio.run(ask(server))
        server.until(lambda: idle(server))
        assert server.service.worker.stats.decoded < 1500


@contextmanager
def encoding(server: Served, number: int) -> Iterator[None]:
    """Inside, one of the threads for texts does nothing else: 0 that for short ones, 1 that for long ones."""
    begun, over = threading.Event(), threading.Event()
    server.service._encoders[number][0].submit(lambda: (begun.set(), over.wait(30)))
    assert begun.wait(30)
    try:
        yield
    finally:
        over.set()


def test_a_text_that_waits_to_become_tokens_is_counted_and_has_its_time(nano: Any) -> None:
    text = {"messages": [{"role": "user", "content": "x"}]}
    for path, body in (("completions", ASK), ("chat/completions", text), ("../tokenize", text)):
        with served(*nano, limits=Limits(waiting=1, seconds=1.0)) as server, encoding(server, 0):
            found: list[int] = []
            first = threading.Thread(target=lambda: found.append(httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60).status_code))  # noqa: B023
            first.start()
            server.until(lambda: server.service.worker.on_their_way == 1)
            assert httpx.post(f"{server.url}/v1/completions", json=ASK).status_code == 429
            first.join()
            assert found == [408] and server.service.worker.on_their_way == 0


def test_a_client_that_leaves_while_its_text_waits_is_noticed(server: Served) -> None:
    with encoding(server, 0):
        for path, body in (("completions", ASK), ("completions", {**ASK, "stream": True}), ("../tokenize", {"prompt": "x"})):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{server.url}/v1/{path}", json=body, timeout=0.2)
            server.until(lambda: not server.service.worker.on_their_way)
        assert "longreach_cancelled_total 3.0" in httpx.get(f"{server.url}/metrics").text


def test_short_texts_do_not_wait_for_long_ones_and_hopeless_ones_do_not_become_tokens(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with encoding(server, 1):
        assert httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60).status_code == 200
    monkeypatch.setattr(prompts, "encode", lambda *given, **more: pytest.fail("it became tokens"))
    long = "word " * 20_000
    for path, body in (("completions", {"prompt": long}), ("chat/completions", {"messages": [{"role": "user", "content": long}]})):
        error = httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60).json()["error"]
        assert error["code"] == "context_length_exceeded" and error["message"].startswith("the text has 100000 characters, and 1024 tokens")


@pytest.mark.parametrize("collapses", [True, False], ids=["tokenizer", "template"])
def test_a_text_that_fits_is_never_refused_for_its_characters(collapses: bool) -> None:
    """A tokenizer that makes one space of many, and a template that cuts what surrounds a message off."""
    tokenizer, model, many = tiny.tokenizer(chat=not collapses), tiny.llama(), " " * 100_000
    if collapses:
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex(" +"), " ")
    else:
        tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | trim")
    with longreach.extend(model, context=64) as extension, served(extension, tokenizer) as server:
        messages = [{"role": "user", "content": f"a{many}b" if collapses else f"a b{many}"}]
        found = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": messages, "max_tokens": 4}, timeout=60)
        assert found.status_code == 200 and found.json()["usage"]["prompt_tokens"] < 30, found.text
        if collapses:
            assert httpx.post(f"{server.url}/v1/completions", json={"prompt": f"a{many}b", "max_tokens": 4}, timeout=60).status_code == 200
        long = [{"role": "user", "content": "word " * 20_000}]
        error = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": long}, timeout=60).json()["error"]
        assert error["code"] == "context_length_exceeded"


# -- clients that leave -----------------------------------------------------------------------------------------------------------


@contextmanager
def connected(server: Served, send: bytes) -> Iterator[socket.socket]:
    place = urlsplit(server.url)
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        found.settimeout(30)
        found.connect((place.hostname, place.port))
        found.sendall(send)
        yield found


def posted(body: dict[str, Any], *more: str) -> bytes:
    data = json.dumps(body)
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", f"Content-Length: {len(data)}", *more]
    return ("\r\n".join(head) + "\r\n\r\n" + data).encode()


@pytest.mark.parametrize("reads", [False, True])
def test_the_socket_of_a_client_that_does_not_read_is_closed(reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that was given up has more bytes than the system keeps. A client that takes some from time to time gets what was written."""
    monkeypatch.setattr(Connection, "silent", 0.3)
    size = 2**25

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % (2 * size))]})
        await send({"type": "http.response.body", "body": b"x" * size, "more_body": True})

    async def ask() -> int:
        server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", 0, log_config=None, access_log=False, lifespan="off", http=Connection))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1], limit=1000)
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        found = len(await reader.read(1))
        while server.server_state.connections:
            if reads and (part := await reader.read(2**20)):
                found += len(part)
            await asyncio.sleep(0.005)
        writer.close()
        server.should_exit = True
        await serving
        return found

    found = asyncio.run(asyncio.wait_for(ask(), 60))
    assert found > size / 2 if reads else found == 1


def test_connections_without_a_request_are_let_go(nano: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, half a head, and a body without end behind an answer that is there, also where a byte comes from time to time. An answer on its way is waited
    for."""
    monkeypatch.setattr(Connection, "idle", 0.4)
    endless = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with served(*nano) as server, ExitStack() as stack:
        idle = [stack.enter_context(connected(server, send)) for send in (b"", b"GET /health HTTP/1.1\r\nHost: loc", endless)]
        answer = stack.enter_context(connected(server, posted({**ASK, "max_tokens": 300}, "Connection: close")))
        for _ in range(30):
            for one in idle[1:]:
                with suppress(OSError):
                    one.sendall(b"a" if one is idle[1] else b"1\r\na\r\n")
            time.sleep(0.05)
        for one in idle:
            with suppress(ConnectionResetError):
                while one.recv(1000):
                    pass
        whole = b"".join(iter(lambda: answer.recv(1000), b""))
        assert whole.startswith(b"HTTP/1.1 200 ") and json.loads(whole.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 300


def test_a_request_has_one_length(server: Served) -> None:
    """What a proxy in front may understand in another way is refused, and the connection with it."""
    hidden = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for more in ("Content-Length: 5\r\nTransfer-Encoding: chunked", "Content-Length: 5\r\nContent-Length: 0", "Transfer-Encoding: xchunked",
                 "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity", "Content-Length: +5", "Transfer-Encoding : chunked"):  # fmt: skip
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}\r\n\r\n".encode()
        with connected(server, head + hidden) as one:
            said = b"".join(iter(lambda: one.recv(1000), b""))
        assert said.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")) and said.count(b"HTTP/1.1") == 1 and b'"id":"nano"' not in said, (more, said)


def test_nothing_is_computed_for_clients_that_have_left(server: Served) -> None:
    with server.client.completions.create(model="nano", prompt=SECRET, max_tokens=1000, temperature=0, stream=True) as stream:
        next(iter(stream))
    server.until(lambda: idle(server))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={**ASK, "max_tokens": 1000, "n": 2}, timeout=0.3)
    server.until(lambda: idle(server))
    assert 0 < server.service.worker.stats.decoded < 2500
    with held(server), pytest.raises(httpx.ReadTimeout):  # one that has not begun
        httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=0.3)
    server.until(lambda: idle(server))
    with held(server), pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json={**ASK, "stream": True}, timeout=0.3)
    server.until(lambda: idle(server))
    assert "longreach_cancelled_total 4.0" in httpx.get(f"{server.url}/metrics").text


def test_answers_that_end_well_are_not_counted_as_cancelled(server: Served) -> None:
    for _ in range(3):
        for stream in (True, False):
            assert httpx.post(f"{server.url}/v1/completions", json={**ASK, "stream": stream}).status_code == 200
        list(server.client.completions.create(model="nano", prompt="x", max_tokens=4, stream=True))
    server.until(lambda: idle(server))
    assert "longreach_cancelled_total 0.0" in httpx.get(f"{server.url}/metrics").text


# -- failures ---------------------------------------------------------------------------------------------------------------------


def test_a_failure_is_told_and_the_server_goes_on(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = server.service.worker.scheduler
    real = scheduler.step

    def fails() -> Any:
        monkeypatch.setattr(scheduler, "step", real)
        raise RuntimeError("lightning")

    monkeypatch.setattr(scheduler, "step", fails)
    found = httpx.post(f"{server.url}/v1/completions", json=ASK)
    assert found.status_code == 500 and found.json()["error"]["type"] == "server_error" and "lightning" in found.json()["error"]["message"]
    monkeypatch.setattr(scheduler, "step", fails)
    with pytest.raises(openai.APIError, match="lightning"):
        list(server.client.completions.create(model="nano", prompt="x", max_tokens=4, stream=True))
    assert httpx.post(f"{server.url}/v1/completions", json=ASK).status_code == 200
    server.until(lambda: idle(server))


def test_what_the_scheduler_refuses_is_told_before_a_stream_begins(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = server.service.worker.scheduler
    real, added = scheduler.add, []

    def refuses(job: Any) -> None:
        if len(added) == 1:
            raise ValueError("the memory is too small; ask for less")
        added.append(job)
        real(job)

    monkeypatch.setattr(scheduler, "add", refuses)
    for stream in (False, True):
        added.clear()
        found = httpx.post(f"{server.url}/v1/completions", json={**ASK, "n": 2, "stream": stream})
        assert found.status_code == 400 and found.json()["error"]["message"] == "the memory is too small; ask for less"
        server.until(lambda: idle(server))


def test_what_the_scheduler_refuses_later_is_no_failure_of_the_model(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*place: Any, **more: Any) -> Any:
        raise ValueError("documents leave no room for this job; release one")

    monkeypatch.setattr(server.service.worker.scheduler.room, "enter", full)
    found = httpx.post(f"{server.url}/v1/completions", json=ASK)
    assert found.status_code == 400 and found.json()["error"]["message"] == "documents leave no room for this job; release one"
    stream = httpx.post(f"{server.url}/v1/completions", json={**ASK, "stream": True}).text
    assert json.loads(stream.removeprefix("data: "))["error"]["message"] == "documents leave no room for this job; release one"


def test_a_forward_that_raises_valueerror_is_a_failure(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a library beneath us: whoever asked cannot mend it."""

    def fails(*given: Any) -> Any:
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr(server.service.worker.scheduler.room.flat, "read", fails)
    found = httpx.post(f"{server.url}/v1/completions", json=ASK)
    assert found.status_code == 500 and "ValueError: not enough values to unpack" in found.json()["error"]["message"]


# -- what is noted ----------------------------------------------------------------------------------------------------------------


def test_logs_have_numbers_and_no_texts(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    found = httpx.post(f"{server.url}/v1/completions", json=ASK)
    httpx.post(f"{server.url}/v1/completions", json={**ASK, "nonsense": SECRET})
    httpx.get(f"{server.url}/{SECRET}")
    [said] = [record.said for record in caplog.records if getattr(record, "said", {}).get("status") == 200]  # type: ignore[attr-defined]
    assert said["request"] == found.headers["x-request-id"] and (said["route"], said["method"]) == ("/v1/completions", "POST")
    assert (said["prompt_tokens"], said["new_tokens"], said["cached_tokens"]) == (found.json()["usage"]["prompt_tokens"], 4, 0) and said["seconds"] > 0
    everything = " ".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records if record.name.startswith("longreach"))
    assert SECRET not in everything and found.json()["choices"][0]["text"] not in everything


def test_metrics_count(server: Served) -> None:
    def value(name: str) -> float:
        [line] = [line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if line.startswith(name + " ")]
        return float(line.split()[-1])

    for _ in range(3):
        prompt = httpx.post(f"{server.url}/v1/completions", json=ASK).json()["usage"]["prompt_tokens"]
    httpx.post(f"{server.url}/v1/completions", json={"nonsense": 1})
    server.until(lambda: idle(server))
    assert (value("longreach_prompt_tokens_total"), value("longreach_new_tokens_total")) == (3 * prompt, 12)
    assert (value("longreach_first_token_seconds_count"), value("longreach_between_tokens_seconds_count")) == (3, 9)
    assert value("longreach_scheduler_decoded_total") == 12 and value("longreach_scheduler_running") == 0
    assert value('longreach_http_requests_total{path="/v1/completions",status="200"}') == 3
    assert value('longreach_http_requests_total{path="/v1/completions",status="400"}') == 1


# -- the end ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=["SIGTERM", "SIGINT"])
def test_answers_end_before_the_server_does(number: int) -> None:
    with process("--context", "1024") as (server, url):
        client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
        given: Any = dict(model="nano", prompt=SECRET, max_tokens=150, temperature=0)
        truth = client.completions.create(**given).choices[0].text
        stream = client.completions.create(**given, stream=True)
        found = [next(stream).choices[0].text]
        server.send_signal(number)
        found += [part.choices[0].text for part in stream]
        assert "".join(found) == truth
        out, err = server.communicate(timeout=60)
        assert (server.returncode, out) == (0, ""), err
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        lines = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
        assert [line["new_tokens"] for line in lines if line["event"] == "answered"][-1] == 150 and SECRET not in err


@pytest.mark.slow
def test_an_answer_that_outlasts_the_drain_is_broken_off() -> None:
    with process("--context", "1024", "--drain", "1s") as (server, url):
        client = openai.OpenAI(base_url=url, api_key="unused", max_retries=0)
        stream = client.completions.create(model="nano", prompt=SECRET, max_tokens=1000, temperature=0, n=16, stream=True)
        parts = [next(stream)]
        begun = time.monotonic()
        server.send_signal(signal.SIGTERM)
        with suppress(Exception):  # what a client makes of a connection that ends is its own
            parts += stream
        assert server.wait(timeout=60) == 0 and time.monotonic() - begun < 30
        assert len(parts) > 16 and all(choice.finish_reason is None for part in parts for choice in part.choices)
