"""A pretrained model in vLLM, `pytest -m real`: its GGUF file is written as a folder first. Needs the environment of constraints-vllm.txt, gguf and accelerate.

LONGREACH_REAL_MODEL names the file; LONGREACH_REAL_WINDOW may name a smaller trained window, for a look: texts are 1.5 and 2 windows long. With one of 8192
a test takes up to 16 GiB, which its engine does not give back: run each in a process of its own (`-k selfextend`).
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

import longreach
from longreach import LMInfinite, SelfExtend

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: it has an environment of its own (CONTRIBUTING.md)", allow_module_level=True)

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "6", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}


@pytest.fixture(scope="module")
def model():
    if not (file := os.environ.get("LONGREACH_REAL_MODEL")):
        pytest.skip("LONGREACH_REAL_MODEL names no GGUF file")
    return longreach.load(file)


@pytest.mark.real
@pytest.mark.parametrize("kind", ["selfextend", "lm-infinite"])
def test_four_requests_beyond_the_window(model, kind, tmp_path):
    from vllm import LLM, SamplingParams

    transformer, tokenizer = model
    transformer.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    window = int(os.environ.get("LONGREACH_REAL_WINDOW", 0)) or transformer.config.max_position_embeddings
    method = LMInfinite(window) if kind == "lm-infinite" else SelfExtend(8, window // 8)
    ids = tokenizer(longreach.shipped_book()[: 24 * window])["input_ids"]
    prompts = [ids[n * window // 2 :][:length] for n, length in enumerate((3 * window // 2 - 16, 2 * window - 16) * 2)]
    engine = LLM(
        str(tmp_path), dtype="float32", max_model_len=2 * window, enforce_eager=True,
        additional_config={"longreach": {**method.to_json(), "trained_window": window}},
    )  # fmt: skip
    given = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": each} for each in prompts], given, use_tqdm=False)
    with longreach.extend(transformer, method, trained_window=window), torch.no_grad():
        for tokens, answer in zip(prompts, answers, strict=True):
            found = [*answer.outputs[0].token_ids]
            logits = transformer(torch.tensor([tokens + found]), logits_to_keep=len(found) + 1).logits[0].float()
            for row, token in zip(logits, found):
                assert row.max() - row[token] <= 1e-4, (len(tokens), float(row.max() - row[token]))
