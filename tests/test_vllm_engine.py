"""The plugin in vLLM itself: what an engine generates is what `longreach run` does. Needs the environment of constraints-vllm.txt; see CONTRIBUTING.md.

An engine takes ten seconds to start, so that one serves most tests; methods other than its own are put into it layer by layer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch

import longreach
from longreach import (  # fmt: skip
    NTK,
    PI,
    DualChunk,
    DynamicNTK,
    LeakyReRoPE,
    LMInfinite,
    ReRoPE,
    SelfExtend,
    StreamingLLM,
    YaRN,
)

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here: it has an environment of its own (CONTRIBUTING.md)", allow_module_level=True)

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
NANO = str(files("longreach") / "nano")
METHOD = SelfExtend(8, 64)
LONGEST = 1600
PAGES, SIZE = 220, 16
NEAR = 1e-4  # logits of the two best tokens: a divergence there is rounding

METHODS = [
    LMInfinite(256), LMInfinite(256, 10, distance_limit=300), StreamingLLM(250), ReRoPE(128, log_scale=512), LeakyReRoPE(64, 16.0), DualChunk(512),
    SelfExtend(16, 64, above=512, log_scale=512), PI(4.0), NTK(4.0), YaRN(4.0), DynamicNTK(3.2),
]  # fmt: skip


def start(**more):
    from vllm import LLM

    usual = dict(dtype="float32", max_model_len=LONGEST, enforce_eager=True, disable_log_stats=False)
    tight = dict(block_size=SIZE, max_num_batched_tokens=300, max_num_seqs=16, num_gpu_blocks_override=PAGES)
    return LLM(NANO, **{**usual, **tight, **more})


@pytest.fixture(scope="module")
def engine():
    return start(additional_config={"longreach": METHOD.to_json()})


@pytest.fixture(scope="module")
def ids():
    _, tokenizer = longreach.load("nano")
    return tokenizer(longreach.shipped_book()[:60_000])["input_ids"]


@pytest.fixture(scope="module")
def truth():
    model, _ = longreach.load("nano")

    def logits(method, tokens: list[int]) -> torch.Tensor:
        """[T, V] of `longreach.extend`."""
        with longreach.extend(model, method, context=LONGEST if method.needs_context else None), torch.no_grad():
            return model(torch.tensor([tokens])).logits[0].float()

    return logits


def prompt(tokens: list[int]):
    return {"prompt_token_ids": tokens}


def greedy(count: int = 8, **more):
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **more)


def same(found: list[int], tokens: list[int], logits: torch.Tensor) -> None:
    """`logits` [T, V] of the prompt and what was found: each token is the best one after those before it, or as good as that."""
    for step, token in enumerate(found):
        row = logits[len(tokens) + step - 1]
        assert row.max() - row[token] <= NEAR, (step, float(row.max() - row[token]))


def agree(engine, method, prompts: list[list[int]], truth, count: int = 8) -> None:
    for tokens, answer in zip(prompts, engine.generate([prompt(each) for each in prompts], greedy(count), use_tqdm=False)):
        found = [*answer.outputs[0].token_ids]
        assert len(found) == count
        same(found, tokens, truth(method, tokens + found))


def metrics(engine) -> dict[str, float]:
    return {each.name: each.value for each in engine.get_metrics() if hasattr(each, "value")}


def test_sixteen_requests_of_mixed_length_under_a_tight_budget(engine, ids, truth):
    """Chunked prefill, decoding beside it, prefixes that are shared, requests that are aborted, and more pages wanted than there are."""
    lengths = [1500, 40, 700, 1100, 5, 900, 333, 1, 64, 1300, 512, 513, 17, 800, 250, 600]
    prompts = {f"r{n}": ids[(0 if n < 4 else 900 * n) :][:length] for n, length in enumerate(lengths)}
    core, answers = engine.llm_engine, {}
    for name, tokens in prompts.items():
        core.add_request(name, prompt(tokens), greedy(48))
    for step in range(800):
        for answer in core.step():
            if answer.finished:
                answers[answer.request_id.split("-")[0]] = [*answer.outputs[0].token_ids]
        if step == 3:
            core.abort_request(["r3", "r8"])
        if not core.has_unfinished_requests():
            break
    found = metrics(engine)
    assert found["vllm:num_preemptions"] > 0 and found["vllm:prefix_cache_hits"] > 0
    assert set(answers) >= prompts.keys() - {"r3", "r8"}
    for name in prompts.keys() - {"r3", "r8"}:
        assert len(answers[name]) == 48
        same(answers[name], prompts[name], truth(METHOD, prompts[name] + answers[name]))


def test_teacher_forced_log_probabilities(engine, ids, truth):
    tokens = ids[2000:3400]
    answer = engine.generate(prompt(tokens), greedy(1, prompt_logprobs=0), use_tqdm=False)[0]
    found = torch.tensor([row[token].logprob for row, token in zip(answer.prompt_logprobs[1:], tokens[1:])])
    want = truth(METHOD, tokens)[:-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert (found - want).abs().max() <= 1e-3


def test_a_prefix_that_was_read_is_read_again_from_its_pages(engine, ids, truth):
    engine.reset_prefix_cache()
    before = metrics(engine)["vllm:prefix_cache_hits"]
    agree(engine, METHOD, [ids[5000:6100]], truth)
    agree(engine, METHOD, [ids[5000:6000] + ids[100:200]], truth)
    assert metrics(engine)["vllm:prefix_cache_hits"] - before >= 976


def test_pages_are_known_by_the_method_too(engine, ids):
    """What a request is found by has the method in it, beside the salt of its client."""
    from longreach.vllm.seam import plugin

    core = engine.llm_engine.engine_core.engine_core
    seen = []

    def look(_, request):
        seen.append(request.cache_salt)

    plugin._salted(look, core, SimpleNamespace(cache_salt=None))
    plugin._salted(look, core, SimpleNamespace(cache_salt="mine"))
    other = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"longreach": {**METHOD.to_json(), "window": 32}}))
    plugin._salted(look, other, SimpleNamespace(cache_salt=None))
    plugin._salted(look, SimpleNamespace(vllm_config=SimpleNamespace(additional_config={})), SimpleNamespace(cache_salt="mine"))
    assert seen[0].startswith("longreach:") and seen[1] == "mine" + seen[0] and seen[2] not in (None, seen[0]) and seen[3] == "mine"


@contextmanager
def under(engine, method):
    """Another method in the layers of an engine, for a while."""
    from longreach import configs
    from longreach.hf.frequencies import fixed
    from longreach.vllm.pages import Paged

    model = engine.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    text = engine.llm_engine.vllm_config.model_config.hf_text_config
    layers = [module for module in model.modules() if hasattr(module, "impl")]
    before = [module.impl.paged for module in layers]
    engine.reset_prefix_cache()
    try:
        turning = fixed(text, None, before[0].layer.rotary, method, configs.trained_window(text), LONGEST)
        for module, paged in zip(layers, before):
            module.impl.paged = Paged(replace(paged.layer, method=method, rotary=turning), paged.inputs, paged.kernel)
        yield
    finally:
        for module, paged in zip(layers, before):
            module.impl.paged = paged
        engine.reset_prefix_cache()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.brief())
def test_every_method(engine, ids, truth, method):
    with under(engine, method):
        agree(engine, method, [ids[7000:8300], ids[9000:9020], ids[9500:10200]], truth)


def test_another_engine_in_the_process_is_not_disturbed(engine, ids, truth):
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    other = start(max_model_len=512, num_gpu_blocks_override=64, block_size=32)
    model = other.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    layers = [module for module in model.modules() if hasattr(module, "impl")]
    assert layers and all(type(module.impl) is CPUAttentionBackendImpl for module in layers)
    agree(other, longreach.Stock(), [ids[:480], ids[900:950]], truth)
    agree(engine, METHOD, [ids[:1000]], truth)


BUDGET = 100  # pages, as many as one request of LONGEST tokens fills


@pytest.mark.parametrize("method", [LMInfinite(256), StreamingLLM(250)], ids=lambda m: m.name)
def test_bounded_methods_free_the_pages_between(ids, truth, method):
    """More long requests at a time than the budget has pages for one; some are aborted, some pre-empted, and those that go on still say the same."""
    frees = start(additional_config={"longreach": method.to_json()}, max_num_batched_tokens=64, num_gpu_blocks_override=BUDGET, max_num_seqs=8)
    core, answers, used, together = frees.llm_engine, {}, [], 0
    prompts = {f"r{n}": ids[700 * n :][:length] for n, length in enumerate((1500, 1450, 1200, 300, 1400, 40))}
    for name, tokens in prompts.items():
        core.add_request(name, prompt(tokens), greedy(64))
    for step in range(2000):
        for answer in core.step():
            if answer.finished:
                answers[answer.request_id.split("-")[0]] = [*answer.outputs[0].token_ids]
        found = metrics(frees)
        used.append(round(found["vllm:kv_cache_usage_perc"] * (BUDGET - 1)))
        together = max(together, int(found["vllm:num_requests_running"]))
        if step == 30:
            core.abort_request(["r1"])
        if not core.has_unfinished_requests():
            break
    bound = frees.llm_engine.model_executor.driver_worker.worker.model_runner.get_model().model.layers[0].self_attn.attn.impl.paged.bound
    most = -(-bound.sinks // SIZE) + -(-(bound.near - 1 + 64) // SIZE) + 1
    assert together >= 4 and max(used) <= together * most and used[-1] == 0
    assert found["vllm:prefix_cache_queries"] == 0 and answers.keys() >= prompts.keys() - {"r1"}
    for name in prompts.keys() - {"r1"}:
        assert len(answers[name]) == 64
        same(answers[name], prompts[name], truth(method, prompts[name] + answers[name]))


def test_pages_that_are_kept_are_found_again(ids, truth):
    """By a setting: then a prompt needs pages for all of its tokens, and prefix caching is on."""
    method = LMInfinite(256)
    keeps = start(additional_config={"longreach": {**method.to_json(), "pages": "keep"}}, enable_prefix_caching=True)
    agree(keeps, method, [ids[:1400]], truth)
    assert metrics(keeps)["vllm:prefix_cache_hits"] == 0
    agree(keeps, method, [ids[:1400]], truth)
    assert metrics(keeps)["vllm:prefix_cache_hits"] >= 1392


@pytest.mark.slow
def test_code_that_vllm_compiles(ids, truth, monkeypatch, tmp_path):
    """Without enforce_eager: what vLLM compiles has the identity for a rotary, and calls our attention."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    compiled = start(additional_config={"longreach": METHOD.to_json()}, enforce_eager=False)
    assert compiled.llm_engine.vllm_config.compilation_config.mode.name != "NONE"
    agree(compiled, METHOD, [ids[:1300], ids[2000:2040], ids[4000:4700]], truth)


PARALLEL = """
import json, sys
from importlib.resources import files
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    more, settings, prompts = json.load(sys.stdin)
    usual = dict(dtype="float32", max_model_len=1600, block_size=16, max_num_batched_tokens=64, num_gpu_blocks_override=100)
    engine = LLM(str(files("longreach") / "nano"), additional_config={"longreach": settings}, **usual, **more)
    given = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answers = engine.generate([{"prompt_token_ids": each} for each in prompts], given, use_tqdm=False)
    print("FOUND", json.dumps([[*each.outputs[0].token_ids] for each in answers]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [{"tensor_parallel_size": 2, "enforce_eager": True}, {"pipeline_parallel_size": 2}], ids=["tensor", "pipeline"]
)  # vLLM 0.32 cannot run a pipeline on a CPU with enforce_eager, ours or not
def test_two_processes(ids, truth, tmp_path, more):
    """Workers in processes of their own, the scheduler in another: pages are freed there too, on fewer than one long request would fill."""
    method, prompts, script = LMInfinite(256), [ids[:1300], ids[2000:2040], ids[4000:5400]], tmp_path / "parallel.py"
    script.write_text(PARALLEL)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CACHE_ROOT": str(tmp_path)}
    given = json.dumps([more, method.to_json(), prompts])
    done = subprocess.run([sys.executable, str(script)], input=given, env=environment, capture_output=True, text=True, timeout=500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stderr[-3000:]
    for tokens, found in zip(prompts, json.loads(lines[0].removeprefix("FOUND")), strict=True):
        same(found, tokens, truth(method, tokens + found))


def test_drafts_from_the_text_itself(ids, truth):
    """Several tokens of a request at once, some of which are taken back, while pages are freed; and with a method that sees every key, before any is.

    One engine, and the last of a process: with the compiler of the drafts in memory, vLLM 0.32 starts no other.
    """
    method = LMInfinite(256)
    drafting = start(
        additional_config={"longreach": method.to_json()}, speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    )
    agree(drafting, method, [ids[:900] + ids[100:160], ids[2000:2100] * 6], truth, 24)
    with under(drafting, METHOD):
        agree(drafting, METHOD, [ids[:150] + ids[100:150], ids[2000:2050] * 4], truth, 24)
    found = metrics(drafting)
    assert found["vllm:spec_decode_num_draft_tokens"] > found["vllm:spec_decode_num_accepted_tokens"] > 0


REFUSED = {
    "quantised": (dict(kv_cache_dtype="fp8"), "quantised pages"),
    "choosing": (dict(additional_config={"longreach": {"method": "quest", "budget": 64}}), "chooses keys by their content"),
    "evicting": (dict(additional_config={"longreach": {"method": "sirllm"}}), "evicts tokens"),
    "cut": (dict(additional_config={"longreach": {"method": "lm-infinite", "n_local": 64, "top_k": 3}}), "chooses keys by their content"),
    "reach": (dict(additional_config={"longreach": {"method": "selfextend", "group_size": 2, "window": 64}}), "reaches 960 tokens"),
    "length": (dict(additional_config={"longreach": {"context": 1024}}), "beyond the declared context of 1024"),
    "worker": (dict(worker_cls="longreach.files.Worker"), "does not know the worker"),
    "drafts": (dict(speculative_config={"model": NANO, "num_speculative_tokens": 2}), "drafts of draft_model"),
    "adapters": (dict(enable_lora=True), "merge the adapter into the model"),
    "caching": (dict(additional_config={"longreach": LMInfinite(64).to_json()}, enable_prefix_caching=True), "leave out --enable-prefix-caching"),
    "freeing": (dict(additional_config={"longreach": {**METHOD.to_json(), "pages": "free"}}), "may see any key"),
    "transfer": (dict(kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"}), "other engines or to disk"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_apply_is_refused_before_anything_starts(case):
    from vllm.engine.arg_utils import EngineArgs

    more, sentence = REFUSED[case]
    usual = dict(dtype="float32", max_model_len=LONGEST, additional_config={"longreach": METHOD.to_json()})
    with pytest.raises(ValueError, match=sentence):
        EngineArgs(NANO, **{**usual, **more}).create_engine_config()


@pytest.mark.parametrize(
    "where, wrong, sentence",
    [
        ("parallel_config", {"decode_context_parallel_size": 2}, "cannot split a sequence over devices"),
        ("parallel_config", {"prefill_context_parallel_size": 2}, "cannot split a sequence over devices"),
        ("model_config", {"use_mla": True}, "latents instead of keys"),
        ("model_config", {"uses_mrope": True}, "several dimensions"),
        ("model_config", {"is_mm_prefix_lm": True}, "attend to what comes after them"),
        ("model_config", {"rswa_window": 64}, "R-SWA"),
    ],
)
def test_engines_that_need_other_machines_or_models(where, wrong, sentence):
    from longreach.vllm.seam import plugin

    parts = {
        "cache_config": {"cache_dtype": "auto"}, "model_config": {"dtype": torch.float32, "use_mla": False, "uses_mrope": False},
        "parallel_config": {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1},
    }  # fmt: skip
    none = dict.fromkeys(("speculative_config", "kv_transfer_config", "lora_config"))
    made = lambda parts: SimpleNamespace(**none, **{name: SimpleNamespace(**each) for name, each in parts.items()})  # noqa: E731
    plugin.refuse(made(parts))
    parts[where] |= wrong
    with pytest.raises(ValueError, match=sentence):
        plugin.refuse(made(parts))


def test_the_dial_and_the_environment(monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setenv("LONGREACH_VLLM", '{"context": "2k"}')
    config = EngineArgs(NANO, dtype="float32").create_engine_config()
    found = config.additional_config["longreach"]
    assert config.model_config.max_model_len == 2048 == found["context"] and found["method"] == "selfextend"
    assert config.parallel_config.worker_cls == "longreach.vllm.seam.worker.CPUWorker" and "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in os.environ
    monkeypatch.setenv("LONGREACH_VLLM", '{"context": 512}')
    config = EngineArgs(NANO, dtype="float32").create_engine_config()
    assert "longreach" not in config.additional_config and config.parallel_config.worker_cls.startswith("vllm.")  # plain attention is vLLM's own


def test_plain_attention_beyond_the_positions_of_the_configuration_is_ours():
    """A trained window that a user knows better than the configuration: vLLM's own rotary table ends before it, and vLLM reads behind it."""
    from vllm.engine.arg_utils import EngineArgs

    asked = {"longreach": {"context": 1024, "trained_window": 1024}}
    config = EngineArgs(NANO, dtype="float32", max_model_len=-1, additional_config=asked).create_engine_config()
    assert config.model_config.max_model_len == 1024 and config.additional_config["longreach"]["method"] == "stock"
    assert config.parallel_config.worker_cls == "longreach.vllm.seam.worker.CPUWorker"
