"""`longreach chat --server URL`: the conversation is here, the model is behind an HTTP API in the words of OpenAI's.

Knows HTTP and server-sent events, by the standard library: nothing is followed elsewhere, so that a key goes only where it was meant for. Knows no models.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from longreach.cli import talking
from longreach.cli.console import Output
from longreach.quantities import counted
from longreach.serving.limits import LOCAL

CONNECT, SILENCE = 10.0, 900.0  # seconds
LONGEST_LINE = 2**20  # bytes of one event
MOST_SAID = 2000  # characters of an error that is not ours
COMMANDS = {
    "/help": "these lines",
    "/reset": "forget the turns and keep the text",
    "/facts": "what the server says of its model",
    "/quit": "end, as Ctrl-D does",
}
STRANGE = "the server's answer is not that of an OpenAI-compatible API; pass the address of one, such as http://127.0.0.1:8000"
BROKEN = "the connection broke off before the answer was whole; look whether the server is still there, and ask again"


@dataclass(frozen=True)
class Server:
    """Where the API is. `base` is the path that stands before its routes."""

    url: str
    at: SplitResult
    base: str
    key: str | None

    @classmethod
    def parse(cls, url: str, key: str | None) -> Server:
        try:
            at = urlsplit(url if "://" in url else f"http://{url}")
            known = at.scheme in ("http", "https") and bool(at.hostname) and at.port != 0  # a port that is none raises here
        except ValueError:
            known = False
        if not known or at.username is not None or at.query or at.fragment or not url.isascii() or " " in url:
            raise ValueError(f"--server {url!r} is no address of a server; pass one such as http://127.0.0.1:8000")
        return cls(url, at, at.path.rstrip("/") or "/v1", key)

    @property
    def in_the_open(self) -> bool:
        """Whether others on the way can read what is sent."""
        return self.at.scheme == "http" and self.at.hostname not in LOCAL

    def ask(self, path: str, body: dict[str, Any] | None = None) -> HTTPResponse:
        """Raises ValueError, in the server's own words where it has some. Closing the answer ends the connection."""
        host, port = str(self.at.hostname), self.at.port
        connection = (
            HTTPSConnection(host, port, timeout=CONNECT, context=ssl.create_default_context())
            if self.at.scheme == "https"
            else HTTPConnection(host, port, timeout=CONNECT)
        )
        headers = {"Accept": "application/json, text/event-stream", "Connection": "close"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.connect()
            connection.sock.settimeout(SILENCE)
            connection.request("GET" if body is None else "POST", self.base + path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
        except (OSError, HTTPException) as error:
            connection.close()
            raise ValueError(f"{self.url} cannot be reached ({_reason(error)}); start `longreach serve` there, or pass its address as --server") from None
        if answer.status != 200:
            with closing(answer):
                raise ValueError(_told(answer, self.url))
        return answer

    def json(self, path: str) -> dict[str, Any]:
        with closing(self.ask(path)) as answer:
            return _object(answer.read(LONGEST_LINE))

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What comes of a streamed request, until it is whole."""
        with closing(self.ask(path, {**body, "stream": True})) as answer:
            while True:
                try:
                    line = answer.readline(LONGEST_LINE)
                except TimeoutError:
                    raise ValueError(f"nothing came from {self.url} for {SILENCE:.0f} seconds; look whether it still works, and ask again") from None
                except (OSError, HTTPException):
                    raise ValueError(BROKEN) from None
                if not line:
                    raise ValueError(BROKEN)
                name, _, data = line.decode("utf-8", "replace").strip().partition(":")
                if name != "data":
                    continue
                if data.strip() == "[DONE]":
                    return
                found = _object(data)
                if "error" in found:
                    raise ValueError(_message(found) or BROKEN)
                yield found


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _object(data: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(STRANGE)
    return found


def _part(event: dict[str, Any]) -> tuple[str, str | None, dict[str, int]]:
    """What an event adds to an answer: text, why it ends, and counts of tokens by their names. Raises ValueError for what has another form."""
    try:
        choices, usage = [*(event.get("choices") or ())], event.get("usage") or {}
        text = "".join((choice.get("delta") or {}).get("content") or "" for choice in choices)
        finish = next((str(choice["finish_reason"]) for choice in choices if choice.get("finish_reason")), None)
        counts = {**usage, **(usage.get("prompt_tokens_details") or {})}
    except (AttributeError, TypeError):
        raise ValueError(STRANGE) from None
    return text, finish, {name: count for name, count in counts.items() if type(count) is int}


def _message(found: Any) -> str | None:
    error = found.get("error") if isinstance(found, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message[:MOST_SAID] if isinstance(message, str) and message else None


def _told(answer: HTTPResponse, url: str) -> str:
    try:
        said = _message(json.loads(answer.read(LONGEST_LINE)))
    except (ValueError, OSError, HTTPException):
        said = None
    said = said or f"{url} answered with the status {answer.status} and without a reason; look whether it is an OpenAI-compatible API"
    return f"{said}; name the variable that holds the key with --api-key-env" if answer.status == 401 else said


def key_of(name: str | None) -> str | None:
    """The key in an environment variable; never on the command line, where others can read it."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key or not (key.isascii() and key.isprintable()):
        raise ValueError(f"the environment variable {name} holds no API key; set it, or leave out --api-key-env")
    return key


# -- the conversation -----------------------------------------------------------------------------------------------------------------


@dataclass
class Talk:
    """A conversation with a model of a server. `settings` goes with every request."""

    out: Output
    server: Server
    model: str
    document: str
    system: str | None
    settings: dict[str, Any]
    said: list[dict[str, str]] = field(default_factory=list)  # user and assistant in turn

    def messages(self, question: str) -> list[dict[str, str]]:
        from longreach.running import prompts

        found = [*self.said, {"role": "user", "content": question}]
        found[0] = {"role": "user", "content": prompts.about(self.document, found[0]["content"])}
        return found if self.system is None else [{"role": "system", "content": self.system}, *found]

    def ask(self, question: str, asking: bool) -> dict[str, Any] | None:
        """The answer, written as it comes; None where it was given up. At a terminal Ctrl-C stops it, and what was written stays in the conversation."""
        parts: list[str] = []
        usage: dict[str, int] = {}
        begun, first, finish = time.perf_counter(), 0.0, None
        body = {"model": self.model, "messages": self.messages(question), "stream_options": {"include_usage": True}, **self.settings}
        try:
            for event in self.server.events("/chat/completions", body):
                part, end, counts = _part(event)
                usage, finish = counts or usage, end or finish
                if part:
                    first = first or time.perf_counter()
                    parts.append(part)
                    self.out.write(part)
        except KeyboardInterrupt:
            if not asking:
                raise
            finish = "interrupted"
        except ValueError:
            if parts:
                self.out.write("\n")
            raise
        ended, answer = time.perf_counter(), "".join(parts)
        self.out.write("\n")
        if finish == "interrupted" and not answer:
            self.out.note("stopped before the first word; the question is forgotten")
            return None
        self.said += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        found = {
            "question": question, "answer": answer.strip(), "finish": finish, "new_tokens": usage.get("completion_tokens"),
            "prompt_tokens": usage.get("prompt_tokens"), "cached_tokens": usage.get("cached_tokens"),
            "first_seconds": round((first or ended) - begun, 4), "decode_seconds": round(ended - (first or ended), 4),
        }  # fmt: skip
        self.out.note(_cost(found))
        return found

    def obey(self, name: str, rest: str) -> None:
        if name == "/help":
            self.out.say(talking.help_lines(COMMANDS))
        elif name == "/reset":
            self.said.clear()
            self.out.note("the turns are forgotten; the text stays")
        elif name == "/facts":
            self.out.say(facts(self.server, self.model))
        elif name in ("/save", "/load"):
            raise ValueError(f"{name} keeps what a model has read, which is with the server; leave out --server for a conversation that can be saved")
        else:
            raise ValueError(f"unknown command {name!r}; {talking.HINT}")


def _cost(found: dict[str, Any]) -> str:
    said = [f"{found['first_seconds']:.2f} s to the first token"]
    if found["new_tokens"] and found["new_tokens"] > 1 and found["decode_seconds"]:
        said.append(f"{(found['new_tokens'] - 1) / found['decode_seconds']:.0f} tokens/s")
    if found["prompt_tokens"] is not None and found["cached_tokens"] is not None:
        said.append(f"{found['cached_tokens']} of {counted(found['prompt_tokens'], 'token')} cached")
    stop = "stopped, what was written stays in the conversation; " if found["finish"] == "interrupted" else ""
    return f"({stop}{', '.join(said)})"


def models(server: Server) -> list[dict[str, Any]]:
    data = server.json("/models").get("data")
    found = [one for one in data if isinstance(one, dict) and isinstance(one.get("id"), str)] if isinstance(data, list) else []
    if not found:
        raise ValueError(f"{server.url} names no model; look whether it is an OpenAI-compatible API")
    return found


def facts(server: Server, model: str) -> str:
    own = next((one for one in models(server) if one["id"] == model), {})
    lines = [("model", model), ("context", own.get("max_model_len")), *(own.get("longreach") or {}).items()]
    return "\n".join(f"{name:16}{json.dumps(value) if isinstance(value, dict) else value}" for name, value in lines if value is not None)


def chat(
    out: Output,
    server: Server,
    model: str | None,
    document: str,
    name: str | None,
    system: str | None,
    max_new_tokens: int,
    temperature: float | None,
    seed: int | None,
) -> tuple[dict[str, Any], str | None]:
    """The conversation from its first line to its last -> the result, and what went wrong. `name`: of a document that the server keeps, in the place of one
    that is sent with every question."""
    names = [one["id"] for one in models(server)]
    if model is not None and model not in names:
        raise ValueError(f"{server.url} has no model {model!r}; pass --model {names[0]}, or leave it out")
    if server.key is not None and server.in_the_open:
        out.warn(f"the API key and the text go to {server.at.hostname} unencrypted; pass an https address if it has one")
    if seed is not None and not temperature:
        out.warn("without a --temperature above 0 the answer is greedy, and --seed has no effect")
    settings: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature or 0, **({"seed": seed or 0} if temperature else {})}
    if name is not None:
        kept = server.json(f"/documents/{quote(name, safe='')}")
        if type(tokens := kept.get("tokens")) is not int:
            raise ValueError(f"{server.url} keeps no documents as longreach serve does; pass the address of one that does, or --file")
        out.note(f"{counted(tokens, 'token')} of {name}, which the server has read")
        settings["document"] = name
    talk = Talk(out, server, model or names[0], document, system, settings)
    out.note(f"{talk.model} at {server.url}; {talking.HINT}")
    asking = sys.stdin.isatty()
    turns, wrong = talking.converse(out, talking.questions(out, asking), asking, lambda line: talk.ask(line, asking), talk.obey)
    return {"server": server.url, "model": talk.model, "turns": turns}, wrong
