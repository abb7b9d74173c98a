"""The plugin on models of several families, and vLLM's own rotary modules of every kind that it reads. Needs the environment of constraints-vllm.txt."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import transformers as t

import longreach
from longreach import LMInfinite, SelfExtend, Stock
from tiny import SMALL

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: it has an environment of its own (CONTRIBUTING.md)", allow_module_level=True)

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
WINDOW = SMALL["max_position_embeddings"]
BASE = {"rope_theta": 10000.0}
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0 + n for n in range(16)], "original_max_position_embeddings": 512},
}  # fmt: skip


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "gptj"])
@pytest.mark.parametrize("kind", KINDS)
def test_rotary_modules_of_every_kind(kind, neox):
    from types import SimpleNamespace

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    from longreach.core.differences import relative
    from longreach.vllm.rotary import read

    if kind == "longrope" and not neox:
        pytest.skip("vLLM has none")
    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=4096) if kind == "longrope" else None
    with set_current_vllm_config(config):
        module = get_rope(32, 2048, neox, {**BASE, **KINDS[kind]}, dtype=torch.float32)
    rotary, positions = read(module), torch.tensor([0, 1, 7, 300, 1999])
    q, k = torch.randn(5, 4 * 32), torch.randn(5, 2 * 32)
    forward = module.forward if kind == "longrope" else module.forward_native
    table = rotary.table(positions)
    for given, turned in zip((q, k), forward(positions, q.clone(), k.clone())):
        ours = table.rotate(given.view(5, -1, 32).transpose(0, 1)).transpose(0, 1).reshape(5, -1)
        assert relative(ours, turned) < 5e-5


def gemma2() -> t.PreTrainedModel:
    """Soft-capped logits; every other layer slides."""
    return t.Gemma2ForCausalLM(t.Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=24, attn_logit_softcapping=20.0))


def mistral() -> t.PreTrainedModel:
    """Every layer slides, so the method takes them all."""
    return t.MistralForCausalLM(t.MistralConfig(**SMALL, sliding_window=32))


def qwen3() -> t.PreTrainedModel:
    """Norms of queries and keys, other frequencies with a factor."""
    rope = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 2.0, "original_max_position_embeddings": 32}
    return t.Qwen3ForCausalLM(t.Qwen3Config(**SMALL, head_dim=16, rope_parameters=rope))


def glm4() -> t.PreTrainedModel:
    """Half of a head is turned, in pairs of neighbours."""
    return t.Glm4ForCausalLM(t.Glm4Config(**SMALL, head_dim=16, partial_rotary_factor=0.5, attention_bias=True))


def gptj() -> t.PreTrainedModel:
    """Another name for positions; half of a head is turned."""
    return t.GPTJForCausalLM(t.GPTJConfig(vocab_size=259, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=WINDOW, initializer_range=0.3))


EXTENDING = SelfExtend(8, 16)
FAMILIES = [
    (gemma2, EXTENDING), (gemma2, LMInfinite(24, 4)),  # as wide as its sliding layers, which keep no first tokens
    (mistral, LMInfinite(30, 4)), (mistral, Stock()),  # which leaves the layers as they are
    (qwen3, EXTENDING), (glm4, EXTENDING), (gptj, EXTENDING),
]  # fmt: skip


@pytest.mark.parametrize("family, method", FAMILIES, ids=[f"{family.__name__}-{method.name}" for family, method in FAMILIES])
def test_families(family, method, tmp_path):
    """What it says after texts of up to five windows is what `longreach.extend` says."""
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    model = family().eval()
    model.save_pretrained(tmp_path)
    more = {"trained_window": 300} if isinstance(method, Stock) else {}  # vLLM would be left alone otherwise
    engine = LLM(
        str(tmp_path), dtype="float32", max_model_len=300, enforce_eager=True, block_size=16, max_num_batched_tokens=64, max_num_seqs=8,
        num_gpu_blocks_override=30, skip_tokenizer_init=True, additional_config={"longreach": {**method.to_json(), **more}},
    )  # fmt: skip
    planned = {type(each).__name__ for each in engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.coordinator.single_type_managers}
    sliding = {"SlidingWindowManager"} if family is gemma2 or more else set()
    assert planned == (sliding if more else sliding | {"BoundedManager" if method.bounded else "FullAttentionManager"})
    prompts = [torch.randint(3, 259, (n,)).tolist() for n in (280, 33, 150, 1, 250, 90)]
    given = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": each} for each in prompts], given, use_tqdm=False)
    with longreach.extend(model, method, **more), torch.no_grad():
        for tokens, answer in zip(prompts, answers, strict=True):
            found = [*answer.outputs[0].token_ids]
            logits = model(torch.tensor([tokens + found])).logits[0].float()
            for step, token in enumerate(found):
                row = logits[len(tokens) + step - 1]
                assert row.max() - row[token] <= 1e-4, (step, float(row.max() - row[token]))


def test_a_model_that_cannot_be_verified_is_refused(tmp_path):
    """vLLM runs it through Transformers' code, whose layers have no rotary modules of its own."""
    from vllm import LLM

    torch.manual_seed(0)
    t.GlmForCausalLM(t.GlmConfig(**SMALL, head_dim=16, partial_rotary_factor=0.5)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot verify it on vLLM"):
        LLM(
            str(tmp_path), dtype="float32", max_model_len=300, enforce_eager=True, skip_tokenizer_init=True, num_gpu_blocks_override=64,
            additional_config={"longreach": SelfExtend(8, 16).to_json()},
        )  # fmt: skip
