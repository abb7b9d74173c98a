"""A whole model under a method against stock Transformers with SDPA on the same machine: reading a prompt, and a token after it.

    python benchmarks/model.py                                                    # a random 0.5B model on the CPU, fp32
    python benchmarks/model.py --device cuda --model random-8B --dtype bf16 --tokens 8192 32768

Random weights: speed does not depend on them. Rounds alternate between the contestants. No ratio is printed unless the gate holds on the very
model and dtype: plain attention by our engine gives the stock logits over the longest prompt, and each method gives those of the dense truth over a
short one, as far as rounding in that dtype goes.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import DTYPES, ROOT, Timing, facts, table, write_json

import longreach
from longreach import LMInfinite, SelfExtend, Stock

SHAPES: dict[str, dict[str, Any]] = {
    "random-0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936,
                        tie_word_embeddings=True),
    "random-1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                      tie_word_embeddings=True),
    "random-8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}  # root mean square of the difference over that of the logits
SHORT = 600  # tokens of the comparison with the dense truth


def build(name: str, dtype: torch.dtype, device: torch.device, window: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[name], max_position_embeddings=window, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def methods(window: int) -> dict[str, Any]:
    """At eight windows: what the dial would have without its log scale, and the window of LM-Infinite."""
    return {"ours, stock": Stock(), "selfextend": SelfExtend(16, window // 8), "lm-infinite": LMInfinite(window, 10)}


def synchronised(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def answer(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of reading the prompt in one forward, and of every further token, greedily."""
    from transformers import DynamicCache

    device, cache = ids.device, DynamicCache(config=model.config)
    started = synchronised(device)
    token = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    read = synchronised(device)
    for _ in range(new_tokens):
        token = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
    return read - started, (synchronised(device) - read) / new_tokens


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).square().mean() / want.double().square().mean()).sqrt().item()


def gate(model: Any, contestants: dict[str, Any], longest: torch.Tensor) -> tuple[dict[str, float], list[str]]:
    measured, limit = {}, LIMITS[model.dtype]
    want = model(longest, use_cache=False, logits_to_keep=64).logits
    with longreach.extend(model, Stock()):
        measured[f"plain attention against stock, {longest.shape[1]} tokens"] = error(model(longest, use_cache=False, logits_to_keep=64).logits, want)
    short = longest[:, :SHORT]
    for name, method in contestants.items():
        with longreach.extend(model, method, backend="reference"):
            want = model(short, use_cache=False).logits
        with longreach.extend(model, method):
            measured[f"{name} against its dense truth, {SHORT} tokens"] = error(model(short, use_cache=False).logits, want)
    return measured, [f"{name}: {value:.2g}, more than {limit:.2g}" for name, value in measured.items() if not value <= limit]


def rounds(model: Any, contestants: dict[str, Any], ids: torch.Tensor, new_tokens: int, count: int) -> Iterator[tuple[str, float, float]]:
    for turn in range(count + 1):  # the first warms up
        for name, method in {"stock": None, **contestants}.items():
            with nullcontext() if method is None else longreach.extend(model, method):
                times = answer(model, ids, new_tokens)
            gc.collect()
            if turn:
                yield name, *times


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", choices=SHAPES, default="random-0.5B")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096], help="lengths of the prompt, each eight trained windows")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/model-<device>.json)")
    args = parser.parse_args()
    device, dtype = torch.device(args.device, 0 if args.device == "cuda" else None), DTYPES[args.dtype]  # type: ignore[arg-type]
    result: dict[str, Any] = {"benchmark": "model", "model": args.model, "dtype": args.dtype, "machine": facts(device), "cases": []}
    with torch.inference_mode():
        for tokens in args.tokens:
            model, contestants = build(args.model, dtype, device, tokens // 8), methods(tokens // 8)
            ids = torch.randint(1, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
            measured, failures = gate(model, contestants, ids)
            entry: dict[str, Any] = {"tokens": tokens, "gate": {"passed": not failures, "measured": measured, "failures": failures}}
            result["cases"].append(entry)
            print(f"\n{args.model}, {args.dtype}, {tokens} tokens; gate: " + "; ".join(f"{name} {value:.2g}" for name, value in measured.items()))
            if failures:
                print("THE GATE FAILED, nothing is timed: " + "; ".join(failures))
                continue
            prefill = {name: Timing() for name in ("stock", *contestants)}
            decode = {name: Timing() for name in ("stock", *contestants)}
            for name, read, token in rounds(model, contestants, ids, args.new_tokens, args.rounds):
                prefill[name].seconds.append(read)
                decode[name].seconds.append(token)
            rows = []
            for name in prefill:
                ratio = [prefill[name].median / prefill["stock"].median, decode[name].median / decode["stock"].median]
                rows.append([name, f"{prefill[name].median:.3f}", f"{ratio[0]:.2f}", f"{decode[name].median * 1e3:.2f}", f"{ratio[1]:.2f}"])
            entry |= {"methods": {name: method.to_json() for name, method in contestants.items()}}
            entry |= {"prefill": {n: t.to_json() for n, t in prefill.items()}, "token": {n: t.to_json() for n, t in decode.items()}}
            print(table("", ["", "prefill s", "ours/stock", "ms a token", "ours/stock"], rows), flush=True)
            del model
    write_json(args.out or ROOT / "benchmarks" / "results" / f"model-{args.device}.json", result)
    return 0 if all(entry["gate"]["passed"] for entry in result["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
