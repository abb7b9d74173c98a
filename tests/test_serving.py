"""The server as OpenAI's own client sees it: completions and chat, whole and streamed, with everything that may be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch

import longreach
from longreach.running.conversation import Conversation
from longreach.running.generation import answer
from served import Served, served

PROMPT = "Call me Ishmael. Some years ago"
QUESTION = [{"role": "user", "content": "The pass key is 48213. What is the pass key?"}]


@pytest.fixture(scope="module")
def nano() -> Iterator[tuple[Any, Any, Any]]:
    model, tokenizer = longreach.load("nano")
    with longreach.extend(model, context=1024) as extension:
        yield model, tokenizer, extension


@pytest.fixture(scope="module")
def server(nano: Any) -> Iterator[Served]:
    with served(nano[2], nano[1]) as found:
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
