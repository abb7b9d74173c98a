"""From a request to jobs: the ids of its prompts, whether they fit, and how every answer is sampled.

Knows requests, tokenizers and the declared context; not threads, HTTP or files.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from longreach.hf.interfaces import Tokenizer
from longreach.running import prompts
from longreach.running.prefix import common
from longreach.running.sampling import Sampling
from longreach.serving.protocol import GREEDY_BELOW, ChatRequest, CompletionRequest, Message, Refused, Sampled, TokenizeRequest

COMPLETION_TOKENS = 16  # OpenAI's own, where a completion names none


@dataclass(frozen=True)
class Prompts:
    """What is asked: the ids of every prompt, the new tokens that each answer may have, and how they are drawn. Answer k of prompt p is number p * n + k.
    `shared`: so many of the first ids are likely to come again. `document`: the name of one that all of them begin with, and `held` how many ids that are."""

    ids: list[list[int]]
    new: list[int]
    n: int
    samplings: list[Sampling]
    logprobs: int | None
    stop: tuple[str, ...]
    shared: int = 0
    document: str | None = None
    held: int = 0


@dataclass(frozen=True)
class Room:
    """What fits. `context`: tokens of a prompt and its answer together, None: any number. `answer`: new tokens where none are named. `longest`: characters of
    a token at most,
    None: nobody knows."""

    context: int | None
    vocabulary: int
    answer: int
    longest: int | None

    def check(self, characters: int, param: str) -> None:
        """Refuse a text that cannot fit whatever its tokens are, before they are made, which takes seconds for megabytes. It is the very text that becomes
        tokens: a template may leave something out of what was sent."""
        if self.context is not None and self.longest is not None and characters > self.context * self.longest:
            raise Refused(
                param,
                f"the text has {characters} characters, and {self.context} tokens, the context, have at most {self.context * self.longest}; shorten it, or "
                "start the server with a larger --context",
                "context_length_exceeded",
            )


@dataclass(frozen=True)
class About:
    """A document that was read before: its text, the system message that it was read with, and the ids that questions about it begin with."""

    text: str
    system: str | None
    ids: list[int] = field(default_factory=list)


def opening(tokenizer: Tokenizer, about: About, room: Room) -> list[int]:
    """The ids that every question about a document begins with."""
    if not prompts.has_template(tokenizer):
        return chat_ids(tokenizer, [], about, room, "text")
    one, other = (chat_ids(tokenizer, [Message(role="user", content=text)], about, room, "text") for text in ("a", "Why?"))
    return one[: common(one, other)]


def completion(request: CompletionRequest, tokenizer: Tokenizer, room: Room) -> Prompts:
    given = request.prompt
    ids: list[list[int]]
    if isinstance(given, str):
        ids = [prompts.encode(tokenizer, given)]
    else:
        texts = [one for one in given if isinstance(one, str)]
        numbers = [one for one in given if isinstance(one, int)]
        lists = [one for one in given if isinstance(one, list)]
        ids = [prompts.encode(tokenizer, text) for text in texts] or ([numbers] if numbers else lists)
    return _prompts(request, ids, request.max_tokens or COMPLETION_TOKENS, request.logprobs, room, "prompt")


def chat(request: ChatRequest, tokenizer: Tokenizer, room: Room, about: About | None = None) -> Prompts:
    ids, shared = chat_ids(tokenizer, request.messages, about, room), 0
    if len(request.messages) > 1:  # the turns before the last one
        last = request.messages[-1]
        other = last.model_copy(update={"content": "b" if last.text.startswith("a") else "a"})
        shared = common(ids, chat_ids(tokenizer, [*request.messages[:-1], other], about))
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    found = _prompts(request, [ids], request.max_completion_tokens or request.max_tokens, logprobs, room, "messages")
    if about is not None and (held := len(about.ids)) < len(ids) and ids[:held] == about.ids:
        return replace(found, document=request.document, held=held, shared=max(0, shared - held))
    return replace(found, shared=shared)


def chat_ids(tokenizer: Tokenizer, messages: Sequence[Message], about: About | None = None, room: Room | None = None, param: str = "messages") -> list[int]:
    """The ids of a conversation up to where the answer begins, those that `Conversation` makes of the same turns. A document opens the first user message.
    `room`: that they have to fit in.

    Without a chat template there are questions between empty lines, each followed by its answer as it was written.
    """
    said = [{"role": "system" if one.role == "developer" else one.role, "content": one.text} for one in messages]
    document = "" if about is None else about.text
    if about is not None and about.system is not None:
        if any(one["role"] == "system" for one in said):
            raise Refused("messages", "the document was read with a system message of its own; leave out the other one, or upload the text again with it", None)
        said.insert(0, {"role": "system", "content": about.system})
    if not prompts.has_template(tokenizer):
        if any(one["role"] == "system" for one in said):
            raise Refused(
                "messages", "this model has no chat template, so there is no place for a system message; put its words into the first user message", None
            )
        if room is not None:
            room.check(len(document) + sum(len(one["content"]) for one in said), param)
        ids, between = prompts.encode(tokenizer, document), prompts.BETWEEN if document else ""
        for one in said:
            ids += prompts.encode(tokenizer, one["content"] if one["role"] == "assistant" else between + one["content"], special=False)
            between = prompts.BETWEEN
        return ids
    if document:
        first = next((one for one in said if one["role"] == "user"), None)
        if first is None:
            raise Refused("messages", "a document needs a question about it; pass a user message", None)
        first["content"] = prompts.about(document, first["content"])
    try:
        text = prompts.render(tokenizer, said, "pass messages that it takes")
    except ValueError as error:
        raise Refused("messages", str(error), None) from error
    if room is not None:
        room.check(len(text), param)
    return prompts.encode(tokenizer, text, special=False)


def _prompts(request: Sampled, ids: list[list[int]], wanted: int | None, logprobs: int | None, room: Room, param: str) -> Prompts:
    new = []
    for one in ids:
        if not one:
            raise Refused(param, "the tokenizer makes no tokens of this text; pass a text that is not empty", None)
        if not all(0 <= token < room.vocabulary for token in one):
            raise Refused(param, f"a token is a number from 0 to {room.vocabulary - 1} for this model; pass the ids of its own tokenizer", None)
        new.append(_new(len(one), wanted, room, param))
    n, temperature = request.n or 1, 1.0 if request.temperature is None else request.temperature
    seed = secrets.randbits(62) if request.seed is None else request.seed
    if temperature < GREEDY_BELOW or request.top_p == 0:
        samplings = [Sampling()] * (len(ids) * n)
    else:
        samplings = [Sampling(temperature, request.top_p, (seed + number + 2**63) % 2**64 - 2**63) for number in range(len(ids) * n)]
    return Prompts(ids, new, n, samplings, logprobs, request.stops)


def _new(prompt: int, wanted: int | None, room: Room, param: str) -> int:
    if room.context is None:
        return wanted or room.answer
    new = wanted or max(1, min(room.answer, room.context - prompt))
    if prompt + new > room.context:
        raise Refused(
            param,
            f"the prompt has {prompt} tokens and with {new} new ones needs {prompt + new}, more than the context of {room.context} tokens; "
            "shorten the prompt or the answer, or start the server with a larger --context",
            "context_length_exceeded",
        )
    return new


def tokens(request: TokenizeRequest, tokenizer: Tokenizer, about: About | None = None) -> list[int]:
    if request.messages is not None:
        return chat_ids(tokenizer, request.messages, about)
    return prompts.encode(tokenizer, request.prompt or "")
