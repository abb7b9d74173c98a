"""What is asked, in the shapes of OpenAI's API: completions and chat completions; and ours: tokens and documents.

Knows pydantic; not tokenizers, models or HTTP. A field that OpenAI does not have is refused, as OpenAI does; one of theirs that we cannot honour is refused
where it would change the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

LARGEST_SEED = 2**63 - 1
MOST_CHOICES = 16
MOST_TOKENS = 2**31 - 1
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # of a document: never a path, and nothing that is hidden
GREEDY_BELOW = 1e-5  # a temperature that leaves one token, and would overflow the logits


def _whole(text: str) -> str:
    """A lone half of a surrogate pair is no text, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is no valid Unicode: it holds half of a surrogate pair") from None
    return text


def _shown(name: str) -> str:
    return name[:100].encode(errors="backslashreplace").decode()


Text = Annotated[str, AfterValidator(_whole)]
DocumentName = Annotated[str, Field(pattern=NAME, description="1 to 64 letters, digits, dots, hyphens and underscores.")]
T = TypeVar("T")
FirstWrong = Annotated[list[T], Field(fail_fast=True)]  # at the first wrong item of megabytes: every other would become an error too
Some = Annotated[FirstWrong[T], Field(min_length=1)]
StopText = Annotated[Text, Field(min_length=1, max_length=1000)]


class Given(BaseModel):
    """What a client sends."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        """Of the names that are none of ours the first is told, as text and cut. Each of them would become an error, which is ten times as large."""
        if not isinstance(value, dict):
            return value
        first = next((name for name in value if name not in cls.model_fields), None)
        if first is None:
            return value
        return {_shown(first): None} | {name: one for name, one in value.items() if name in cls.model_fields}


class StreamOptions(Given):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Sampled(Given):
    """What both kinds of completion have in common. OpenAI's fields without an effect here are taken; see `UNMET` for the others."""

    model: Text | None = Field(None, description="The name that /v1/models gives; the one model if left out.")
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False, description="1 if left out, 0 is greedy.")
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    seed: int | None = Field(None, ge=-LARGEST_SEED - 1, le=LARGEST_SEED, description="The same request with the same seed gets the same answer.")
    stop: StopText | Annotated[FirstWrong[StopText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    store: Any = None

    @model_validator(mode="after")
    def _met(self) -> Sampled:
        for name, (neutral, fix) in UNMET.items():
            value = getattr(self, name, None)
            if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
                raise Refused(name, f"{name} is not supported by this server; {fix}")
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options", "stream_options goes with stream=true only; leave it out, or stream")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def answers(self) -> int:
        """How many are asked for together."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Refused(ValueError):
    """A field that cannot be honoured, and the sentence that says so."""

    def __init__(self, param: str | None, sentence: str, code: str | None = "unsupported_parameter") -> None:
        super().__init__(sentence)
        self.param, self.code = param, code


class Missing(Exception):
    """There is no such thing: 404."""

    def __init__(self, sentence: str, param: str | None, code: str) -> None:
        super().__init__(sentence)
        self.param, self.code = param, code


class Taken(Exception):
    """There is such a thing already: 409."""


PLAIN = "leave it out, or pass 0"
# OpenAI's field -> the values that change nothing, and what to do with any other
UNMET: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0, 0.0), PLAIN), "presence_penalty": ((0, 0.0), PLAIN), "logit_bias": (({},), "leave it out"),
    "store": ((False,), "nothing is stored; leave it out"),
    "tools": (([],), "no tool is ever called; leave it out, and describe what you want in a message"),
    "tool_choice": (("none", "auto"), "there are no tools; leave it out"), "functions": (([],), "leave it out"),
    "function_call": (("none", "auto"), "leave it out"), "parallel_tool_calls": ((True, False), "leave it out"),
    "response_format": (({"type": "text"},), 'only {"type": "text"} is; leave it out, and ask for the format in a message'),
    "modalities": ((["text"],), 'only ["text"] is; leave it out'), "audio": ((), "leave it out"), "prediction": ((), "leave it out"),
    "reasoning_effort": (("none",), "leave it out"), "verbosity": (("medium",), "leave it out"), "web_search_options": ((), "leave it out"),
    "best_of": ((1,), "leave it out, and choose among n answers yourself"), "echo": ((False,), "leave it out; the prompt is known to whoever asks"),
    "suffix": (("",), "leave it out"),
}  # fmt: skip


class CompletionRequest(Sampled):
    prompt: Text | Some[Text] | Some[int] | Some[FirstWrong[int]] = Field(description="A text, a list of texts, the ids of tokens, or a list of such lists.")
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    @property
    def answers(self) -> int:
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return super().answers * (len(self.prompt) if several else 1)


class Part(Given):
    type: Literal["text"]
    text: Text


class Message(Given):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | FirstWrong[Part] | None
    name: str | None = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _says(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"the message of the {self.role} has no content; pass a text")
        return self

    @property
    def text(self) -> str:
        """An answer of the assistant may have none, as where it refused."""
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Sampled):
    messages: Some[Message]
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    document: DocumentName | None = Field(None, description="Ours: a document of /v1/documents that the first user message is about.")
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("top_logprobs", "top_logprobs goes with logprobs=true only; leave it out, or pass logprobs too", None)
        if self.max_tokens is not None and self.max_completion_tokens is not None and self.max_tokens != self.max_completion_tokens:
            raise Refused("max_tokens", "max_tokens and max_completion_tokens contradict each other; leave out max_tokens, the older of the two", None)
        return self


class TokenizeRequest(Given):
    model: Text | None = None
    prompt: Text | None = Field(None, description="A text as /v1/completions takes it.")
    messages: Some[Message] | None = Field(None, description="Messages as /v1/chat/completions takes them.")
    document: DocumentName | None = None

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise Refused("prompt", "pass either a prompt or messages", None)
        if self.document is not None and self.messages is None:
            raise Refused("document", "a document goes with messages; leave it out, or pass messages", None)
        return self


class DocumentRequest(Given):
    name: DocumentName
    text: Annotated[Text, Field(min_length=1)]
    system: Text | None = Field(None, description="The system message of all questions about it, for models with a chat template.")
