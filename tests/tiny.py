"""Tiny models and a tokenizer of bytes, for tests that need some model and not a certain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

WINDOW = 64
SMALL: dict[str, Any] = dict(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=WINDOW,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.3,
)
CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


def tokenizer(chat: bool = False) -> Any:
    """Byte level, without merges: one token per byte after <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = t.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = CHAT if chat else None
    return made


def save(folder: Path, model: Any, chat: bool = False) -> str:
    model.save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return str(folder)


def llama() -> Any:
    """The model of SMALL, always with the same weights."""
    torch.manual_seed(0)
    return t.LlamaForCausalLM(t.LlamaConfig(**SMALL)).eval()
