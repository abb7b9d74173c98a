"""What is answered, in the shapes of OpenAI's API.

Knows pydantic; not tokenizers, models or HTTP.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class PromptDetails(BaseModel):
    cached_tokens: int = Field(0, description="Tokens of the prompt that had been read before.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Head(BaseModel):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


Finish = Literal["stop", "length"]


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    finish_reason: Finish
    logprobs: ChatLogprobs | None


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: Finish
    logprobs: TextLogprobs | None


class ChatCompletion(Head):
    choices: list[ChatChoice]
    usage: Usage


class Completion(Head):
    choices: list[TextChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatDelta(BaseModel):
    index: int
    delta: Delta
    finish_reason: Finish | None = None
    logprobs: ChatLogprobs | None = None


class TextDelta(BaseModel):
    index: int
    text: str
    finish_reason: Finish | None = None
    logprobs: TextLogprobs | None = None


class ModelFacts(BaseModel):
    """Ours: what is attached to the model."""

    method: dict[str, Any]
    reason: str
    context: int | None
    trained_window: int
    dtype: str
    backend: str


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "longreach"
    max_model_len: int | None = Field(description="Tokens of a prompt and its answer together; null: any number.")
    longreach: ModelFacts


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(BaseModel):
    count: int
    max_model_len: int | None
    tokens: list[int]


class Document(BaseModel):
    id: str
    object: Literal["document"] = "document"
    status: Literal["reading", "ready"]
    tokens: int
    read: int
    bytes: int


class Documents(BaseModel):
    object: Literal["list"] = "list"
    data: list[Document]


class Deleted(BaseModel):
    id: str
    object: Literal["document"] = "document"
    deleted: bool = True


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Problem(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    error: Problem
