"""What we call of a model and a tokenizer, as types. Transformers' own classes have all of it; so have the small stand-ins of tests what they need.

Knows names and signatures only, and imports nothing: the command line reads it before it needs a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn


class CausalLM(Protocol):
    """A model for text, with or without an extension on it."""

    config: Any
    generation_config: Any

    def __call__(self, input_ids: Any = ..., **given: Any) -> Any: ...

    def generate(self, **given: Any) -> Any: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def get_input_embeddings(self) -> Any: ...


class Tokenizer(Protocol):
    chat_template: Any
    bos_token_id: int | None
    eos_token_id: Any
    sep_token_id: int | None
    pad_token_id: int | None

    def __call__(self, text: str, **given: Any) -> Mapping[str, Any]: ...

    def decode(self, ids: Sequence[int] | torch.Tensor, *, skip_special_tokens: bool = ...) -> str: ...

    def apply_chat_template(self, messages: list[dict[str, str]], **given: Any) -> Any: ...

    def convert_ids_to_tokens(self, ids: Any) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...
