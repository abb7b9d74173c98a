"""Small GGUF files of any architecture that Transformers converts: metadata and names by its own tables, random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transformers as t

from tiny import SMALL
from tiny import tokenizer as byte_tokenizer

VOCABULARY = 260
DENSE = {**SMALL, "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "n_ctx": 1024, "bos_token_id": 1, "eos_token_id": 2}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}
MOE = {**DENSE, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 768}  # Transformers does not read this width
# One for every way in which Transformers undoes what llama.cpp did to weights: {name in GGUF: configuration}
ARCHITECTURES = {
    "llama": t.LlamaConfig(**DENSE, tie_word_embeddings=True),
    "qwen2": t.Qwen2Config(**DENSE),
    "gemma2": t.Gemma2Config(**{**DENSE, "head_dim": 256}),  # the width that all but the largest scale queries by
    "starcoder2": t.Starcoder2Config(**DENSE),
    "nemotron": t.NemotronConfig(**DENSE),
    "gpt2": t.GPT2Config(**GPT2),
    "bloom": t.BloomConfig(**BLOOM),
    "qwen3moe": t.Qwen3MoeConfig(**MOE),
}
TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")  # of GPT-2


def write(
    file: Path, architecture: str, kind: str = "F16", config: Any = None, said: dict[str, Any] | None = None, vectors: dict[str, Any] | None = None
) -> dict[str, str]:
    """-> {name in the file: name in the model}, by Transformers' own walk. One-dimensional weights are F32, as llama.cpp writes them.

    said, vectors  more metadata of the architecture, and more tensors: what Transformers does not read.
    """
    import gguf
    from transformers.integrations import GGUF_CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    config = config or ARCHITECTURES[architecture]
    model = t.AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    known = GGUF_CONFIG_MAPPING[architecture if architecture in GGUF_CONFIG_MAPPING else config.model_type]
    facts = {key: getattr(config, attribute, None) for key, attribute in known.items() if attribute}
    if "rope.freq_base" in facts:
        facts["rope.freq_base"] = float(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"])
    for key, value in (facts | (said or {})).items():
        if value is not None and not isinstance(value, bool):
            add = {float: writer.add_float32, str: writer.add_string}.get(type(value), writer.add_uint32)
            add(f"{architecture}.{key}", value)
    vocabulary(writer, config.vocab_size)
    random, state = np.random.default_rng(0), model.state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, target in names.items():
        if target in tied or target not in state:
            continue
        shape = tuple(state[target].shape)
        if architecture == "gpt2" and name.endswith(TRANSPOSED):
            shape = shape[::-1]
        if "_exps" in name:
            name = f"{name}.weight"
            shape = shape if "down" in name else (shape[0], shape[1] // 2, shape[2])
        values = random.standard_normal(shape, np.float32)
        stored = gguf.GGMLQuantizationType[kind if len(shape) > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    for name, vector in (vectors or {}).items():
        writer.add_tensor(name, np.asarray(vector, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return names


def vocabulary(writer: Any, size: int) -> None:
    """Single bytes, then made-up words; Transformers reads a list of one as no list."""
    known = byte_tokenizer().convert_ids_to_tokens(list(range(min(size, VOCABULARY) - 1)))
    names = [*known[:-1], "ĠĠ", "ĠĠĠĠ", *(f"word{i}" for i in range(size - VOCABULARY))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_types([3, 3, 3] + [1] * (len(names) - 3))
    writer.add_token_merges(["Ġ Ġ", "ĠĠ ĠĠ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
