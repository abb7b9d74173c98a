"""Random tiny models of real architectures. Weights are large enough that attention is sharp and an error is visible.

Knows Transformers' configurations; not methods. `longreach check --all` and the tests run over them.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as t

VOCABULARY, WINDOW = 96, 64
BASE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=WINDOW,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)
TYPES = ["sliding_attention", "full_attention"]
EXPERTS: dict[str, Any] = dict(num_experts_per_tok=2, moe_intermediate_size=32)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


LLAMA4: dict[str, Any] = dict(
    num_key_value_heads=2, head_dim=16, intermediate_size_mlp=80, num_local_experts=4, num_experts_per_tok=1, attention_chunk_size=24, moe_layers=[1]
)
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12, n_routed_experts=4, n_group=2, topk_group=1,
    n_shared_experts=1, first_k_dense_replace=1, num_experts_per_tok=2, moe_intermediate_size=32,
)  # fmt: skip

# name -> (config class, settings beyond BASE)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", dict(num_key_value_heads=1)),
    "llama-mha": ("LlamaConfig", dict(num_key_value_heads=4)),
    "llama-head8": ("LlamaConfig", dict(num_attention_heads=8, num_key_value_heads=1)),
    "llama3": ("LlamaConfig", rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)),
    "llama-yarn": ("LlamaConfig", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama-linear": ("LlamaConfig", rope("linear", factor=2.0)),
    "llama-dynamic": ("LlamaConfig", rope("dynamic", factor=2.0)),
    "mistral": ("MistralConfig", dict(num_key_value_heads=2, sliding_window=None)),
    "mistral-sliding": ("MistralConfig", dict(num_key_value_heads=2, sliding_window=24)),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=2)),
    "qwen3": ("Qwen3Config", dict(num_key_value_heads=2, head_dim=16)),
    "gemma2": ("Gemma2Config", dict(num_key_value_heads=2, head_dim=16, sliding_window=24, query_pre_attn_scalar=16, layer_types=TYPES)),
    "gemma3": ("Gemma3TextConfig", dict(num_key_value_heads=2, head_dim=16, sliding_window=24, query_pre_attn_scalar=16, layer_types=TYPES)),
    "phi": ("PhiConfig", dict(num_key_value_heads=2, **rope("default", partial_rotary_factor=0.5))),
    "phi3": ("Phi3Config", dict(num_key_value_heads=2)),
    "phi3-longrope": (
        "Phi3Config",
        dict(
            num_key_value_heads=2,
            original_max_position_embeddings=32,
            **rope(
                "longrope", short_factor=[1.0 + 0.1 * i for i in range(8)], long_factor=[1.5 + 0.5 * i for i in range(8)], original_max_position_embeddings=32
            ),
        ),
    ),
    "gpt-neox": ("GPTNeoXConfig", rope("default", partial_rotary_factor=0.25)),
    "olmo2": ("Olmo2Config", dict(num_key_value_heads=2)),
    "stablelm": ("StableLmConfig", dict(num_key_value_heads=2, **rope("default", partial_rotary_factor=0.25))),
    "cohere": ("CohereConfig", dict(num_key_value_heads=2)),
    "gpt-oss": (
        "GptOssConfig",
        dict(
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=24,
            layer_types=TYPES,
            num_local_experts=4,
            num_experts_per_tok=2,
            **rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
        ),
    ),
    "mixtral": ("MixtralConfig", dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3-moe": ("Qwen3MoeConfig", dict(num_key_value_heads=2, head_dim=16, num_experts=4, **EXPERTS)),
    "qwen2-moe": ("Qwen2MoeConfig", dict(num_key_value_heads=2, num_experts=4, shared_expert_intermediate_size=32, **EXPERTS)),
    "llama4": ("Llama4TextConfig", dict(no_rope_layers=[1, 0], **LLAMA4)),
    "llama4-rope": ("Llama4TextConfig", dict(no_rope_layers=[1, 1], layer_types=["chunked_attention", "full_attention"], **LLAMA4)),
    "deepseek-v2": ("DeepseekV2Config", dict(**LATENT, v_head_dim=24)),
    "deepseek-v3": ("DeepseekV3Config", dict(**LATENT, v_head_dim=16)),
    "deepseek-v3-yarn": (
        "DeepseekV3Config",
        dict(**LATENT, v_head_dim=16, **rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)),
    ),
    "cohere2": ("Cohere2Config", dict(num_key_value_heads=2, sliding_window=24, layer_types=TYPES)),
    "glm": ("GlmConfig", dict(num_key_value_heads=2, head_dim=16, **rope("default", partial_rotary_factor=0.5))),
    "glm4": ("Glm4Config", dict(num_key_value_heads=2, head_dim=16, **rope("default", partial_rotary_factor=0.5))),
    "glm4-moe": (
        "Glm4MoeConfig",
        dict(
            num_key_value_heads=2, head_dim=16, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1, **EXPERTS,
            **rope("default", partial_rotary_factor=0.5),
        ),
    ),
    "smollm3": ("SmolLM3Config", dict(num_key_value_heads=2, no_rope_layers=[1, 0])),
    "ernie4.5": ("Ernie4_5Config", dict(num_key_value_heads=2, head_dim=16)),
    "ernie4.5-moe": ("Ernie4_5_MoeConfig", dict(num_key_value_heads=2, moe_num_experts=4, moe_k=2, moe_intermediate_size=32, moe_layer_start_index=1)),
    "nanochat": ("NanoChatConfig", dict(num_key_value_heads=2)),
    "granite": (
        "GraniteConfig",
        dict(num_key_value_heads=2, attention_multiplier=0.4, embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=2.0),
    ),
    # the multiplier of the class, 1, makes random weights so sharp that an embedding off by 1e-7 moves logits by 1e-5
    "granite-moe": ("GraniteMoeConfig", dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, attention_multiplier=0.4)),
    "olmo": ("OlmoConfig", dict(num_key_value_heads=2)),
    "olmo3": ("Olmo3Config", dict(num_key_value_heads=2, sliding_window=24, layer_types=TYPES)),
    "olmoe": ("OlmoeConfig", dict(num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)),
    "starcoder2": ("Starcoder2Config", dict(num_key_value_heads=2, sliding_window=None)),
    "nemotron": ("NemotronConfig", dict(num_key_value_heads=2, head_dim=16, **rope("default", partial_rotary_factor=0.5))),
    "exaone4": ("Exaone4Config", dict(num_key_value_heads=2, sliding_window=24, layer_types=TYPES)),
    "seed-oss": ("SeedOssConfig", dict(num_key_value_heads=2, head_dim=16)),
    "helium": ("HeliumConfig", dict(num_key_value_heads=2, head_dim=16)),
    "arcee": ("ArceeConfig", dict(num_key_value_heads=2)),
    "gemma": ("GemmaConfig", dict(num_key_value_heads=2, head_dim=16)),
    "apertus": ("ApertusConfig", dict(num_key_value_heads=2, **rope("default"))),
    "bitnet": ("BitNetConfig", dict(num_key_value_heads=2)),
    "dots1": (
        "Dots1Config",
        dict(
            num_key_value_heads=2, n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1,
            layer_types=["full_attention"] * 2, **EXPERTS,
        ),
    ),
    "phimoe": ("PhimoeConfig", dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)),
    "minimax-m2": ("MiniMaxM2Config", dict(num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2)),
    "ministral3": (
        "Ministral3Config",
        dict(
            num_key_value_heads=2, head_dim=16, sliding_window=None,
            **rope("yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0),
        ),
    ),
    "gptj": ("GPTJConfig", dict(rotary_dim=8)),
    "codegen": ("CodeGenConfig", dict(rotary_dim=8)),
    "falcon": ("FalconConfig", dict(multi_query=True)),
    "falcon-groups": ("FalconConfig", dict(new_decoder_architecture=True, num_kv_heads=2)),
    # the eager code of this one adds ALiBi twice, see hf/legacy.py
    "falcon-alibi": ("FalconConfig", dict(alibi=True, multi_query=False, parallel_attn=False, bias=True, attn_implementation="sdpa")),
    "falcon-alibi-groups": ("FalconConfig", dict(alibi=True, new_decoder_architecture=True, num_kv_heads=2, attn_implementation="sdpa")),
    "mpt": ("MptConfig", dict(max_seq_len=WINDOW)),
    "bloom": ("BloomConfig", dict(hidden_size=96, num_attention_heads=12)),  # slopes that are not all powers of two
}

# What no method can be attached to: `extend` says why.
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "hunyuan": ("HunYuanDenseV1Config", dict(num_key_value_heads=2, head_dim=16)),
    "minimax": ("MiniMaxConfig", dict(num_key_value_heads=2, head_dim=16, num_local_experts=4, block_size=16)),
    "qwen3-next": (
        "Qwen3NextConfig",
        dict(
            num_hidden_layers=4, num_key_value_heads=2, head_dim=16, num_experts=4, shared_expert_intermediate_size=16, linear_num_key_heads=2,
            linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, **EXPERTS,
        ),
    ),
    "lfm2": ("Lfm2Config", dict(num_key_value_heads=2, layer_types=["conv", "full_attention"])),
    "diffllama": ("DiffLlamaConfig", dict(num_key_value_heads=2)),
    "jamba": ("JambaConfig", dict(num_key_value_heads=2, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=4)),
}  # fmt: skip


def build(family: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A fresh model in eval mode; the same weights each time. Norm weights and sinks are randomised where they exist."""
    name, settings = (FAMILIES | REFUSED)[family]
    settings = {**BASE, **settings, **more}
    implementation = settings.pop("attn_implementation", "eager")  # fused kernels may ignore soft-caps and sinks
    config = getattr(t, name)(**settings)
    torch.manual_seed(7)
    model = t.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "sink" in key:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.to(dtype).eval()


def tokens(rows: int, count: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, count), generator=torch.Generator().manual_seed(seed))

