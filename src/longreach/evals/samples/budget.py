"""From a sample to the token ids that a model reads: the chat template, and the budget of tokens. Nothing is cut without being counted.

Knows samples and tokenizers; not models or methods.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

from longreach.evals.samples.base import Sample
from longreach.hf.interfaces import Tokenizer
from longreach.quantities import counted
from longreach.running import prompts

ChatMode = Literal["auto", "off"]
DOCUMENT_CUTS = ("middle", "left", "right", "right-words")
PROMPT_CUTS = ("middle-reencode", "suffix-with-head")  # as LongBench and InfLLM published them: they do not spare the question
CUTS = DOCUMENT_CUTS + PROMPT_CUTS


@dataclass(frozen=True)
class Prompt:
    """A sample as the model reads it.

    shared     leading ids that end with the document (or before): what questions about the same document have in common.
    truncated  tokens left out.
    """

    sample: Sample
    text: str
    ids: list[int]
    shared: int
    truncated: int = 0

    @property
    def sha256(self) -> str:
        return hashlib.sha256(" ".join(map(str, self.ids)).encode()).hexdigest()

    @property
    def needs(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.ids) + self.sample.max_new_tokens


def encode(tokenizer: Tokenizer, sample: Sample, chat: ChatMode = "auto") -> Prompt:
    """The whole prompt, however long. `chat` "off" never uses the model's chat template; "auto" does where the task says so."""
    text, document_end, special = _render(tokenizer, sample, chat)
    if prompts.is_fast(tokenizer):
        ids, spans = prompts.encode_with_spans(tokenizer, text, special)
        shared = next((n for n, (_, end) in enumerate(spans) if end > document_end), len(ids))
    else:
        ids, shared = prompts.encode(tokenizer, text, special), 0
    return Prompt(sample, text, ids, min(shared, len(ids) - 1) if sample.parts.query else 0)


def token_count(tokenizer: Tokenizer, sample: Sample) -> int:
    """Tokens of the whole prompt: the larger number of with and without the chat template, so that what is made to fit does either way.

    A template that refuses the prompt does not count; `encode` raises when the prompt is to be read with it.
    """
    plain = len(prompts.encode(tokenizer, sample.parts.text))
    try:
        text, _, special = _render(tokenizer, sample, "auto")
    except ValueError:
        return plain
    return plain if special else max(plain, len(prompts.encode(tokenizer, text, False)))


def fit(tokenizer: Tokenizer, sample: Sample, limit: int | None, truncate: str | None = None, chat: ChatMode = "auto") -> Prompt:
    """The prompt, so that it and its answer are at most `limit` tokens.

    truncate  what may be left out, one of CUTS; None refuses a prompt that is too long.
    """
    if truncate is not None and truncate not in CUTS:
        raise ValueError(f"there is no truncation {truncate!r}; choose one of {', '.join(CUTS)}")
    prompt = encode(tokenizer, sample, chat)
    if limit is None or prompt.needs <= limit:
        return prompt
    if truncate is None:
        raise ValueError(
            f"{sample.id}: {counted(len(prompt.ids), 'token')} of prompt and {sample.max_new_tokens} of answer are more than {limit}; "
            f"declare a context of {prompt.needs} (--context {prompt.needs}), choose shorter lengths, or pass --truncate middle"
        )
    most = limit - sample.max_new_tokens
    if truncate in PROMPT_CUTS:
        return _cut_prompt(tokenizer, prompt, most, truncate)
    return _cut_document(tokenizer, prompt, most, truncate, chat)


def _cut_document(tokenizer: Tokenizer, prompt: Prompt, most: int, truncate: str, chat: ChatMode) -> Prompt:
    sample, document = prompt.sample, prompt.sample.parts.document
    _, spans = prompts.encode_with_spans(tokenizer, document, special=False)

    def make(keep: int) -> tuple[Prompt, int]:
        if truncate == "right-words":
            shorter = prompts.right_words(tokenizer, document, keep)
        else:
            shorter = prompts.keep_tokens(document, spans, keep, truncate)  # type: ignore[arg-type]
        found = encode(tokenizer, replace(sample, parts=replace(sample.parts, document=shorter)), chat)
        return found, len(found.ids) - most

    found = prompts.shrink(len(spans) - (len(prompt.ids) - most), make, least=0)
    if found is None:
        raise ValueError(f"{sample.id}: without its document the prompt still has more than {counted(most, 'token')}; declare a larger context")
    return replace(found, sample=sample, truncated=len(prompt.ids) - len(found.ids))


def _cut_prompt(tokenizer: Tokenizer, prompt: Prompt, most: int, truncate: str) -> Prompt:
    def make(keep: int) -> tuple[list[int], int]:
        ids = prompts.suffix_with_head(prompt.ids, keep) if truncate == "suffix-with-head" else prompts.middle_reencode(tokenizer, prompt.ids, keep)
        ids = prompts.open_ended(tokenizer, ids)
        return ids, len(ids) - most

    ids = prompts.shrink(most, make, least=2)
    if ids is None:
        raise ValueError(f"{prompt.sample.id}: nothing of the prompt fits into {counted(most, 'token')}; declare a larger context")
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return replace(prompt, text=text, ids=ids, shared=0, truncated=len(prompt.ids) - len(ids))


def _render(tokenizer: Tokenizer, sample: Sample, chat: ChatMode) -> tuple[str, int, bool]:
    """-> (what the model reads, the place where its document ends, whether the tokenizer's special tokens are still to be added)."""
    parts = sample.parts
    if chat == "off" or sample.chat == "off" or not prompts.has_template(tokenizer):
        return parts.text, len(parts.prefix) + len(parts.document), True
    begun = parts.answer_prefix if sample.chat == "prefix" else ""
    turn = parts if sample.chat == "user_turn" else replace(parts, answer_prefix="")
    text = prompts.render(tokenizer, [{"role": "user", "content": turn.text}], "pass --chat off")
    at = text.find(parts.document) if parts.document else -1
    return text + begun, at + len(parts.document) if at >= 0 else 0, False
