"""The server as OpenAI's own client sees it: completions and chat, whole and streamed, with everything that may be asked for."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from pydantic import ValidationError

import longreach
import tiny
from longreach.running.conversation import Conversation
from longreach.running.generation import answer
from longreach.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from served import Served, served

PROMPT = "Call me Ishmael. Some years ago"
QUESTION = [{"role": "user", "content": "The pass key is 48213. What is the pass key?"}]


@pytest.fixture(scope="module")
def nano() -> Iterator[tuple[Any, Any, Any]]:
    model, tokenizer = longreach.load("nano")
    with longreach.extend(model, context=1024) as extension:
        yield model, tokenizer, extension


@pytest.fixture(scope="module")
def server(nano: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(nano[2], nano[1], documents=tmp_path_factory.mktemp("documents")) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Served) -> openai.OpenAI:
    return server.client


def alone(nano: Any, prompt: str, tokens: int) -> Any:
    model, tokenizer, extension = nano
    return answer(model, tokenizer, tokenizer(prompt)["input_ids"], tokens, extension=extension)


def test_a_completion_is_what_run_writes(client: openai.OpenAI, nano: Any) -> None:
    truth = alone(nano, PROMPT, 24)
    found = client.completions.create(model="nano", prompt=PROMPT, max_tokens=24, temperature=0)
    assert (found.object, found.model, found.choices[0].text, found.choices[0].finish_reason) == ("text_completion", "nano", truth.text, "length")
    assert found.usage is not None and found.usage.prompt_tokens_details is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (15, 24, 39)
    parts = list(client.completions.create(model="nano", prompt=PROMPT, max_tokens=24, temperature=0, stream=True))
    assert "".join(part.choices[0].text for part in parts) == truth.text and len(parts) > 10
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert len({part.id for part in parts}) == 1 and parts[0].id.startswith("cmpl-")


def test_a_chat_is_a_conversation(client: openai.OpenAI, nano: Any) -> None:
    talk = Conversation(nano[0], nano[1], extension=nano[2])
    truth = talk.ask(QUESTION[0]["content"], 12)
    found = client.chat.completions.create(model="nano", messages=QUESTION, max_tokens=12, temperature=0)
    assert (found.object, found.choices[0].message.role, found.choices[0].message.content) == ("chat.completion", "assistant", truth.text)
    again = [*QUESTION, {"role": "assistant", "content": truth.text}, {"role": "user", "content": [{"type": "text", "text": "And once more?"}]}]
    second = client.chat.completions.create(model="nano", messages=again, max_completion_tokens=12, temperature=0)
    assert second.choices[0].message.content == talk.ask("And once more?", 12).text
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    parts: Any = list(client.chat.completions.create(model="nano", messages=again, max_tokens=12, temperature=0, **streamed))
    assert parts[0].choices[0].delta.role == "assistant" and parts[0].choices[0].delta.content == ""
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == second.choices[0].message.content
    assert parts[-1].choices == [] and parts[-1].usage is not None and parts[-1].usage.completion_tokens == 12
    assert all(part.usage is None for part in parts[:-1])


def test_token_ids_and_lists_are_prompts_too(client: openai.OpenAI, nano: Any) -> None:
    ids = nano[1](PROMPT)["input_ids"]
    texts = [PROMPT, "It was a dark and stormy night", "The"]
    truth = [alone(nano, text, 8).text for text in texts]
    assert client.completions.create(model="nano", prompt=ids, max_tokens=8, temperature=0).choices[0].text == truth[0]
    found = client.completions.create(model="nano", prompt=texts, max_tokens=8, temperature=0, n=2)
    assert [one.text for one in found.choices] == [text for text in truth for _ in range(2)] and [one.index for one in found.choices] == [*range(6)]
    lists = client.completions.create(model="nano", prompt=[ids, ids[:3]], max_tokens=8, temperature=0)
    assert lists.choices[0].text == truth[0] and lists.usage is not None and lists.usage.prompt_tokens == 15 + 3


def test_log_probabilities_are_those_of_a_forward(client: openai.OpenAI, nano: Any) -> None:
    model, tokenizer, _ = nano
    truth = alone(nano, PROMPT, 6)
    with torch.no_grad():
        scores = model(torch.tensor([tokenizer(PROMPT)["input_ids"] + truth.ids])).logits[0, -7:-1].float().log_softmax(-1)
    own = [float(row[token]) for row, token in zip(scores, truth.ids)]
    plain = client.completions.create(model="nano", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3).choices[0].logprobs
    assert plain is not None and plain.token_logprobs == pytest.approx(own, abs=1e-4) and "".join(plain.tokens or []) == truth.text
    assert plain.text_offset == [sum(map(len, (plain.tokens or [])[:n])) for n in range(6)]
    same = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(model="nano", messages=same, max_tokens=6, temperature=0, logprobs=True, top_logprobs=20)
    entries = chat.choices[0].logprobs
    assert entries is not None and entries.content is not None
    assert [one.logprob for one in entries.content] == pytest.approx(own, abs=1e-4)
    assert b"".join(bytes(one.bytes or []) for one in entries.content).decode() == truth.text
    best = [[other.logprob for other in one.top_logprobs] for one in entries.content]
    assert torch.allclose(torch.tensor(best), scores.topk(20).values, atol=1e-4)
    streamed = client.completions.create(model="nano", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=0, stream=True)
    assert [part.choices[0].logprobs.token_logprobs[0] for part in streamed if part.choices[0].logprobs] == pytest.approx(own, abs=1e-4)


def test_a_stop_string_ends_an_answer_wherever_its_tokens_are_cut(client: openai.OpenAI, nano: Any) -> None:
    truth = alone(nano, PROMPT, 24).text
    end = truth[10:17]  # in the middle of words
    assert end not in truth[:12]
    for stop in (end, ["nowhere", end]):
        found = client.completions.create(model="nano", prompt=PROMPT, max_tokens=24, temperature=0, stop=stop)
        assert (found.choices[0].text, found.choices[0].finish_reason) == (truth[: truth.find(end)], "stop")
        assert found.usage is not None and found.usage.completion_tokens < 24
        parts = client.completions.create(model="nano", prompt=PROMPT, max_tokens=24, temperature=0, stop=stop, stream=True)
        assert "".join(part.choices[0].text for part in parts) == truth[: truth.find(end)]


def test_a_seed_decides_whoever_else_is_served(client: openai.OpenAI) -> None:
    def texts(**given: Any) -> list[str]:
        found = client.completions.create(model="nano", prompt=PROMPT, max_tokens=12, **{"temperature": 1.0, "seed": 7, **given})
        return [choice.text for choice in found.choices]

    one = texts()
    several = texts(n=4)
    assert several[0] == one[0] and len(set(several)) == 4 and texts(n=4) == several
    assert texts(seed=8)[0] == several[1]  # each choice has the next seed
    assert texts(seed=2**63 - 1, n=2) == texts(seed=2**63 - 1, n=2)
    assert texts(temperature=0) == texts(temperature=0, seed=9) == texts(top_p=0) == texts(temperature=1e-30)
    unseeded = client.completions.create(model="nano", prompt=PROMPT, max_tokens=12, n=3, extra_body={"seed": None})
    assert len({choice.text for choice in unseeded.choices}) > 1  # at OpenAI's temperature of 1
    assert texts(top_p=0.2) != one


def test_thirty_two_at_once_are_each_as_if_alone(server: Served, nano: Any) -> None:
    """Greedy, of mixed lengths, some cancelled and some that are too long."""
    book = longreach_book()
    cases = [(f"{number} {book[900 * number : 900 * number + 40 + 60 * (number % 9)]}", 4 + number % 13) for number in range(32)]
    truth = {case: alone(nano, *case).text for number, case in enumerate(cases) if number % 8 not in (3, 6)}

    def ask(number: int) -> str:
        client, (prompt, tokens) = server.client, cases[number]
        if number % 8 == 3:
            with client.completions.create(model="nano", prompt=prompt, max_tokens=400, temperature=0, stream=True) as stream:
                return next(iter(stream)).choices[0].text
        if number % 8 == 6:
            with pytest.raises(openai.BadRequestError, match="more than the context of 1024"):
                client.completions.create(model="nano", prompt=prompt, max_tokens=1024)
            return ""
        return client.completions.create(model="nano", prompt=prompt, max_tokens=tokens, temperature=0).choices[0].text

    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(ask, range(32)))
    assert {case: text for case, text in zip(cases, found) if case in truth} == truth
    server.until(lambda: not server.service.worker.on_their_way)
    server.until(lambda: server.service.worker.stats.running == server.service.worker.stats.waiting == 0)


def test_system_messages_and_half_characters() -> None:
    """A model with a chat template whose tokens are single bytes."""
    model, tokenizer = tiny.llama(), tiny.tokenizer(chat=True)
    with longreach.extend(model, context=64) as extension, served(extension, tokenizer) as server:
        messages: Any = [{"role": "developer", "content": "Öl"}, {"role": "user", "content": "你好"}]
        prompt = "[system]Öl[user]你好[assistant]"
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert httpx.post(f"{server.url}/tokenize", json={"messages": messages}).json()["tokens"] == ids
        for seed in range(4):
            given: Any = dict(model="nano", messages=messages, max_tokens=64 - len(ids), seed=seed, logprobs=True)
            whole = server.client.chat.completions.create(**given)
            entries = whole.choices[0].logprobs
            assert entries is not None and entries.content is not None
            text = b"".join(bytes(one.bytes or []) for one in entries.content).decode("utf-8", "replace").rstrip("\ufffd")
            assert whole.choices[0].message.content == text
            parts = list(server.client.chat.completions.create(**given, stream=True))
            assert "".join(part.choices[0].delta.content or "" for part in parts) == text
        with pytest.raises(openai.BadRequestError, match="the prompt has 34 tokens and with 40 new ones needs 74, more than the context of 64"):
            server.client.chat.completions.create(model="nano", messages=messages, max_tokens=40)


def test_the_examples_of_the_page(server: Served) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs/serving.md").read_text(encoding="utf-8").replace("http://127.0.0.1:8000", server.url)
    [python] = re.findall(r"```python\n(.*?)```", page, re.S)
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "48213" in done.stdout.splitlines()[0], done  # what follows is drawn, and may have lines
    assert httpx.post(f"{server.url}/v1/documents", json={"name": "book", "text": "Call me Ishmael."}).status_code == 201
    asked = [shlex.split(line) for line in re.findall(r"^curl .*$", page.replace("\\\n", ""), re.M)]
    for _, url, _, header, _, data in asked:
        found = httpx.post(url, content=data, headers=dict([header.split(": ")]), timeout=60)
        assert found.status_code == 200 and found.json()["usage"]["completion_tokens"] > 0
    assert len(asked) == 2


def longreach_book() -> str:
    from longreach.running.loading import shipped_book

    return shipped_book()[20000:]


NEVER: Any = {"model": "nano", "messages": QUESTION}


@pytest.mark.parametrize(
    ("given", "param", "says"),
    [
        ({"max_tokens": 2000}, "messages", "the prompt has 20 tokens and with 2000 new ones needs 2020, more than the context of 1024 tokens"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "ask for the format in a message"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "leave it out, or pass 0"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "leave it out"),
        ({"nonsense": 1}, "nonsense", "unrecognized request argument supplied: nonsense"),
        ({"\ud800": 1}, "\\ud800", "unrecognized request argument supplied: \\ud800"),
        ({"x" * 5000: 1}, "x" * 100, "unrecognized request argument supplied: x"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": float("nan")}, "temperature", "finite number"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_logprobs": 3}, "top_logprobs", "pass logprobs too"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "or stream"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "contradict"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"seed": 2**63}, "seed", "less than or equal to"),
        ({"messages": []}, "messages", "at least 1"),
        ({"max_tokens": 10**4000}, "max_tokens", "less than or equal to 2147483647"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0", "the message of the user has no content; pass a text"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system', 'developer', 'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content", "'text'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "surrogate"),
        ({"messages": [{"role": "system", "content": "Be brief."}, *QUESTION]}, "messages", "put its words into the first user message"),
    ],
    ids=lambda value: "-".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, dict) else None,
)
def test_what_cannot_be_is_refused_by_name(server: Served, given: dict[str, Any], param: str, says: str) -> None:
    found = httpx.post(f"{server.url}/v1/chat/completions", content=json.dumps({**NEVER, **given}), headers={"Content-Type": "application/json"})
    error = found.json()["error"]
    assert found.status_code == 400 and error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param) and says in error["message"], error


@pytest.mark.parametrize(
    ("kind", "given", "most"),
    [
        (CompletionRequest, {"prompt": [0.5] * 1000}, 4),
        (CompletionRequest, {"prompt": ["a", *[0.5] * 1000]}, 4),
        (CompletionRequest, {"prompt": [[0.5] * 1000] * 1000}, 4),
        (CompletionRequest, {"prompt": "a", "stop": [0.5] * 1000}, 2),
        (CompletionRequest, {"prompt": "a", **{f"k{number}": 1 for number in range(1000)}}, 1),
        (ChatRequest, {"messages": [{}] * 1000}, 2),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 1000}]}, 3),
        (TokenizeRequest, {"messages": [{f"k{number}": 1 for number in range(1000)}] * 1000}, 3),
    ],
    ids=lambda value: str(value)[:60],
)
def test_only_so_many_errors_are_made_of_a_large_body(kind: Any, given: dict[str, Any], most: int) -> None:
    """One for each of megabytes of wrong items takes seconds, and memory many times that of the body."""
    with pytest.raises(ValidationError) as found:
        kind.model_validate(given)
    assert 1 <= found.value.error_count() <= most


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt": ""}, None),
        ({"prompt": [0.5] * 1000}, "0: Input should be a valid string"),
        ({"prompt": []}, "at least 1"),
        ({"prompt": [[]]}, "makes no tokens"),
        ({"prompt": [5000]}, "a token is a number from 0 to 2047"),
        ({"prompt": [-1]}, "a token is a number from 0"),
        ({"prompt": "x", "echo": True}, "echo is not supported"),
        ({"prompt": "x", "best_of": 3}, "choose among n answers yourself"),
        ({"prompt": "x", "logprobs": 6}, "less than or equal to 5"),
        ({"prompt": ["x"] * 65}, "65 answers at a time are more than the 64 of this server"),
        ({}, "required"),
    ],
    ids=str,
)
def test_prompts_that_cannot_be(server: Served, given: dict[str, Any], says: str | None) -> None:
    found = httpx.post(f"{server.url}/v1/completions", json={"max_tokens": 1, **given})
    if says is None:  # the first token of every text is a prompt
        assert found.status_code == 200 and found.json()["usage"]["prompt_tokens"] == 1
    else:
        assert found.status_code == 400 and says in found.json()["error"]["message"]


def test_bodies_that_no_parser_takes_are_refused_with_a_fix(server: Served) -> None:
    for body in (b'{"seed":' + b"1" * 5000 + b"}", b"[" * 100_000, b'{"prompt":"\xff"}'):
        found = httpx.post(f"{server.url}/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert found.status_code == 400 and found.json()["error"]["message"].endswith("; send it without")
    found = httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, headers={"Content-Encoding": "gzip"})
    assert found.status_code == 415 and "leave out the header" in found.json()["error"]["message"]
    assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, headers={"Content-Encoding": "identity"}).status_code == 200


def test_an_answer_without_content_is_an_empty_one(server: Served) -> None:
    def tokens(content: str | None, **more: Any) -> Any:
        messages = [*QUESTION, {"role": "assistant", "content": content, **more}, {"role": "user", "content": "And then?"}]
        return httpx.post(f"{server.url}/tokenize", json={"messages": messages}).json()["tokens"]

    assert tokens(None, refusal="I will not.") == tokens(None) == tokens("")


def test_models_and_errors_have_openais_shape(client: openai.OpenAI, server: Served) -> None:
    [model] = client.models.list().data
    assert (model.id, client.models.retrieve("nano").id) == ("nano", "nano")
    facts: Any = model
    assert (facts.max_model_len, facts.longreach["trained_window"], facts.longreach["method"]["method"]) == (1024, 512, "selfextend")
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert (missing.value.code, missing.value.param, missing.value.type) == ("model_not_found", "model", "not_found_error")
    for path, status in (("/v1/nothing", 404), ("/v1/models/gpt-4", 404), ("/docs", 404)):
        found = httpx.get(server.url + path)
        assert found.status_code == status and found.json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    assert httpx.post(f"{server.url}/v1/completions", content="{").json()["error"]["message"].startswith("the body is no JSON object")
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": PROMPT}).json()
    assert (tokens["count"], tokens["max_model_len"], len(tokens["tokens"])) == (15, 1024, 15)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
