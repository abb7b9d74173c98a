"""A whole model under a method against stock Transformers with SDPA on the same machine: reading a prompt, and a token after it.

    python benchmarks/model.py                                                    # a random 0.5B model on the CPU, fp32
    python benchmarks/model.py --device cuda --model random-8B --dtype bf16 --tokens 8192 32768

Random weights: speed does not depend on them. Rounds alternate between the contestants. No ratio is printed unless the gate holds on the very
model and dtype: over a short prompt the logits of plain attention and of each method are as near to those of its dense truth as the logits of stock
Transformers are to the dense truth of plain attention, within half. Rounding in half precision adds up over many layers of random weights, so that no
fixed limit would tell an error from rounding.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from attention import relative_error
from common import DTYPES, ROOT, Timing, device_of, facts, table, write_json

import longreach
from longreach import LMInfinite, SelfExtend, Stock
from longreach.checking.speedtest import synchronise

SHAPES: dict[str, dict[str, Any]] = {
    "random-1M": dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=1024),
    "random-0.5B": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936,
                        tie_word_embeddings=True),
    "random-1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                      tie_word_embeddings=True),
    "random-8B": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip
ERROR_RATIO, FLOOR = 1.5, 1e-6  # ours over stock's; what is smaller than the floor is fp32 rounding
SAME = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative, of the same keys in another order of summing
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


def options_of(doc: str | None) -> argparse.ArgumentParser:
    """What ragged.py, flat.py and serving.py share."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help=f"nano, one of random weights ({', '.join(SHAPES)}), or a folder or GGUF file")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="the file of results, beside others of the same script; in benchmarks/results if not given")
    return parser


def opened(options: argparse.Namespace) -> Any:
    """The model that is asked for, on its device and with its threads."""
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = device_of(options.device), DTYPES[options.dtype]
    return build(options.model, dtype, device, 2048) if options.model in SHAPES else longreach.load(options.model, dtype=dtype, device=device)[0]


def named(model: str) -> str:
    """Without the folder that its file is in."""
    return Path(model).stem if Path(model).suffix == ".gguf" else Path(model).name


def require_same(error: float, dtype: torch.dtype) -> float:
    """The gate of rows and requests beside others: they are what they are alone, up to the order of summing."""
    if not error <= SAME[dtype]:
        raise SystemExit(f"the gate fails: it differs by {error:.2e} from the same alone, more than {SAME[dtype]:g}; no ratio is printed")
    return error


def keep(options: argparse.Namespace, name: str, content: dict[str, Any]) -> None:
    """Into the file of a script, beside its results for other models."""
    file = options.out or ROOT / f"benchmarks/results/{name}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    write_json(file, {**before, f"{named(options.model)} {options.dtype}": {"facts": facts(device_of(options.device)), **content}})
    print(f"written: {file.name}", file=sys.stderr)


def methods(window: int) -> dict[str, Any]:
    """At eight windows: what the dial would have without its log scale, and the window of LM-Infinite."""
    return {"plain attention, ours": Stock(), "selfextend": SelfExtend(16, window // 8), "lm-infinite": LMInfinite(window, 10)}


def baselines(device: torch.device) -> tuple[str, ...]:
    """On a card PyTorch may choose cuDNN's attention, which prepares itself anew for every number of keys; the faster baseline counts."""
    return ("stock", "stock without cuDNN") if device.type == "cuda" else ("stock",)


def synchronised(device: torch.device) -> float:
    synchronise(device)
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


def gate(model: Any, contestants: dict[str, Any], ids: torch.Tensor) -> tuple[dict[str, float], list[str]]:
    """Root mean square of the difference to the dense truth over that of the logits: of stock under plain attention, of ours under every method."""
    short, measured = ids[:, :SHORT], {}
    stock = model(short, use_cache=False).logits
    for name, method in contestants.items():
        with longreach.extend(model, method, backend="reference"):
            want = model(short, use_cache=False).logits.double()
        if isinstance(method, Stock):
            measured["stock"] = relative_error(stock, want)
        with longreach.extend(model, method):
            measured[name] = relative_error(model(short, use_cache=False).logits, want)
    most = ERROR_RATIO * max(measured["stock"], FLOOR)
    failures = [f"{name} is off by {value:.2g}, more than {most:.2g}" for name, value in measured.items() if not value <= most]
    return {name: value for name, value in measured.items() if math.isfinite(value)}, failures  # JSON has no NaN


def rounds(model: Any, contestants: dict[str, Any], ids: torch.Tensor, new_tokens: int, count: int) -> Iterator[tuple[str, float, float]]:
    for turn in range(count + 1):  # the first warms up
        for name, method in {**dict.fromkeys(baselines(ids.device)), **contestants}.items():
            torch.backends.cuda.enable_cudnn_sdp(name == "stock")
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
    device, dtype = device_of(args.device), DTYPES[args.dtype]
    out = args.out or ROOT / "benchmarks" / "results" / f"model-{args.device}.json"
    result: dict[str, Any] = {"benchmark": "model", "model": args.model, "dtype": args.dtype, "machine": facts(device), "cases": []}
    with torch.inference_mode():
        for tokens in args.tokens:
            model, contestants = build(args.model, dtype, device, tokens // 8), methods(tokens // 8)
            ids = torch.randint(1, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
            measured, failures = gate(model, contestants, ids)
            entry: dict[str, Any] = {"tokens": tokens, "gate": {"passed": not failures, "measured": measured, "failures": failures}}
            result["cases"].append(entry)
            write_json(out, result)
            differences = "; ".join(f"{name} {value:.2g}" for name, value in measured.items())
            print(f"\n{args.model}, {args.dtype}, {tokens} tokens; difference to the dense truth of {SHORT}: {differences}")
            if failures:
                print("THE GATE FAILED, nothing is timed: " + "; ".join(failures), flush=True)
                del model
                continue
            entry |= {"methods": {name: method.to_json() for name, method in contestants.items()}}
            prefill, decode = ({name: Timing() for name in (*baselines(device), *contestants)} for _ in range(2))
            for name, read, token in rounds(model, contestants, ids, args.new_tokens, args.rounds):
                prefill[name].seconds.append(read)
                decode[name].seconds.append(token)
                entry |= {kind: {n: t.to_json() for n, t in timings.items() if t.seconds} for kind, timings in (("prefill", prefill), ("token", decode))}
                write_json(out, result)  # a case may take minutes, and be cut
            rows, best = [], [min(timing[name].median for name in baselines(device)) for timing in (prefill, decode)]
            for name in prefill:
                ratio = [prefill[name].median / best[0], decode[name].median / best[1]]
                rows.append([name, f"{prefill[name].median:.3f}", f"{ratio[0]:.2f}", f"{decode[name].median * 1e3:.2f}", f"{ratio[1]:.2f}"])
            print(table("", ["", "prefill s", "ours/stock", "ms a token", "ours/stock"], rows), flush=True)
            del model
    return 0 if all(entry["gate"]["passed"] for entry in result["cases"]) else 1


if __name__ == "__main__":
    sys.exit(main())
