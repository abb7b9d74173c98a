"""What `longreach plan` predicts against what is measured: store bytes (exact), peak memory (within 10 %), seconds (within 1.3 times).

    longreach plan --calibrate && python benchmarks/plan_accuracy.py                # nano and random-weight models of 0.5 and 1 billion parameters
    python benchmarks/plan_accuracy.py --models nano --out benchmarks/results/plan-accuracy.json

    longreach plan --calibrate --device cuda && python benchmarks/plan_accuracy.py --device cuda --dtypes bfloat16

Every case is a process of its own, so that its peak memory is its own: the high-water mark of Linux is reset after the model was loaded. On a card
it is what the driver and the libraries take and the most that PyTorch had allocated. Run it on a quiet machine, right after the calibration, with as
many threads; memory of the CPU is read as Linux reports it, so other systems are refused.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, facts, markdown, table, write_json, write_section

import longreach
from longreach.checking.speedtest import reserved_on_card
from longreach.planning.machine import field_of

HALF = dict(model_type="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
            vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None)  # fmt: skip
ONE = dict(model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
           head_dim=64, vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None)  # fmt: skip
MODELS: dict[str, dict[str, Any] | None] = {"nano": None, "random-0.5B": HALF, "random-1B": ONE}  # shapes of Qwen2.5-0.5B and Llama-3.2-1B
WINDOWS = (2, 4)  # contexts, in trained windows
METHODS = ("stock", "selfextend", "lm-infinite", "dual-chunk")
MEMORY_GATE, TIME_GATE = 0.10, 1.3
NEW_TOKENS = 32
LEAST_SECONDS = 5.0  # of a case: what is over in a tenth of a second is measured often


def predicted(model: str, dtype: str, context: int, device: str) -> longreach.Plan:
    return longreach.plan(model if MODELS[model] is None else "nano", context, device, config=MODELS[model], dtype=dtype, new_tokens=NEW_TOKENS)


def window_of(model: str) -> int:
    return 512 if MODELS[model] is None else int(MODELS[model]["max_position_embeddings"])  # type: ignore[index]


def measure(model: str, dtype: str, context: int, name: str, rounds: int, device: str) -> dict[str, Any]:
    """In a process of its own: the answer's store bytes, peak memory, seconds to the first and of every further token."""
    found = predicted(model, dtype, context, device)
    row = found.row(name)
    loaded = build(model, dtype).to(device)
    with longreach.extend(loaded, row.method, context=context if row.method.needs_context else None) as extension:
        ids = torch.randint(3, loaded.config.vocab_size, (context - NEW_TOKENS,), generator=torch.Generator().manual_seed(0)).to(device)
        answer(extension, ids[: min(64, len(ids))], 2)  # the first forward allocates and compiles what later ones reuse
        start_peak(device)
        runs, began = [], time.perf_counter()
        while len(runs) < rounds or time.perf_counter() - began < LEAST_SECONDS:
            runs.append(answer(extension, ids, NEW_TOKENS))
    return {
        "kv_bytes": runs[0]["kv_bytes"],
        "peak_bytes": peak(device),
        "prefill_seconds": statistics.median(run["prefill_seconds"] for run in runs),
        "token_seconds": statistics.median(run["token_seconds"] for run in runs),
        "predicted": {key: getattr(row, key) for key in ("kv_bytes", "peak_bytes", "prefill_seconds", "token_seconds")},
        "bound": row.bound,
        "method": row.method.to_json(),
    }


def start_peak(device: str) -> None:
    """The high-water mark starts anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    if device == "cuda":
        return reserved_on_card(torch.device(device, 0)) + torch.cuda.max_memory_allocated()
    found = field_of(Path("/proc/self/status"), "VmHWM:")
    assert found is not None
    return 1024 * found


def build(model: str, dtype: str) -> Any:
    if MODELS[model] is None:
        return longreach.load("nano", dtype=dtype)[0]
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**MODELS[model])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def answer(extension: longreach.Extension, ids: torch.Tensor, new_tokens: int) -> dict[str, Any]:
    """As `longreach run` does it: the prompt in chunks, then `generate`; greedy, and never ended early."""
    from transformers import DynamicCache, TextStreamer

    class Clock(TextStreamer):  # type: ignore[misc]
        """When the prompt was put, and every token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    started, cache, clock = time.perf_counter(), DynamicCache(), Clock()
    if len(ids) > 1:
        for _ in longreach.stream(extension, ids[:-1], losses=False, cache=cache):
            pass
    with torch.no_grad():
        extension.model.generate(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], past_key_values=cache, streamer=clock, do_sample=False,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        )  # fmt: skip
    first, last = clock.times[1], clock.times[-1]
    return {"kv_bytes": cache.layers[0].store.nbytes, "prefill_seconds": first - started, "token_seconds": (last - first) / max(1, new_tokens - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="bfloat16 takes hours on processors without instructions for it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS), help="contexts, in trained windows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plan-accuracy.json"))
    parser.add_argument("--docs", action="store_true", help="write the table of docs/plan.md")
    parser.add_argument("--case", nargs=4, metavar=("MODEL", "DTYPE", "CONTEXT", "METHOD"), help="one case, printed as JSON; used by the script itself")
    args = parser.parse_args()
    if args.device == "cpu" and not Path("/proc/self/clear_refs").exists():
        raise SystemExit("peak memory is measured through /proc, which only Linux has; run this on Linux")
    if args.case:
        model, dtype, context, name = args.case
        print(json.dumps(measure(model, dtype, int(context), name, args.rounds, args.device)))
        return
    result: dict[str, Any] = {"facts": facts(torch.device(args.device)), "gates": {"memory": MEMORY_GATE, "time": TIME_GATE}, "cases": []}
    for model in args.models:
        for dtype in args.dtypes:
            for context in (times * window_of(model) for times in args.windows):
                for name in args.methods:
                    case = [model, dtype, str(context), name]
                    command = [sys.executable, __file__, "--rounds", str(args.rounds), "--device", args.device, "--case", *case]
                    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
                    if done.returncode:
                        raise SystemExit(f"{' '.join(case)} failed:\n{done.stderr}")
                    result["cases"].append({"model": model, "dtype": dtype, "context": context, **json.loads(done.stdout.splitlines()[-1])})
                    print(line(result["cases"][-1]), flush=True)
    result["load_at_end"] = round(os.getloadavg()[0], 2)
    print(summary(result))
    write_json(args.out, result)
    if args.docs:
        write_section(ROOT / "docs/plan.md", "accuracy", in_markdown(result))


def in_markdown(result: dict[str, Any]) -> str:
    """Predicted over measured, a line for each case; bold is outside the gate."""

    def shown(value: float, gate: float) -> str:
        return f"{value:.2f}" if 1 / gate <= value <= gate else f"**{value:.2f}**"

    rows = []
    for case in result["cases"]:
        r = ratios(case)
        bytes_, peak_ = f"{r['kv_bytes']:.6f}".rstrip("0").rstrip("."), r["peak_bytes"]
        memory = f"{peak_:.2f}" if abs(peak_ - 1) <= MEMORY_GATE else f"**{peak_:.2f}**"
        speed = [f"{shown(r[key], TIME_GATE)} ({case[key]:.3g} s)" for key in ("prefill_seconds", "token_seconds")]
        rows.append([case["model"], str(case["context"]), case["method"]["method"], bytes_, memory, *speed])
    facts_ = result["facts"]
    head = ["model", "tokens", "method", "store bytes", "peak memory", "prompt (measured)", "token (measured)"]
    where = f"{facts_['cpu']}, {facts_['threads']} threads, {result['cases'][0]['dtype']}, PyTorch {facts_['torch']}"
    return f"Predicted / measured on {where}; load {facts_['load_at_start']} at the start. Bold: outside the aim.\n\n{markdown(head, rows)}"


def ratios(case: dict[str, Any]) -> dict[str, float]:
    """Predicted over measured."""
    return {key: case["predicted"][key] / case[key] for key in case["predicted"]}


def line(case: dict[str, Any]) -> str:
    r = ratios(case)
    return (
        f"{case['model']} {case['dtype']} {case['context']} {case['method']['method']}: bytes {r['kv_bytes']:.6f}, peak {r['peak_bytes']:.3f}, "
        f"prefill {r['prefill_seconds']:.2f}, token {r['token_seconds']:.2f} (predicted / measured)"
    )


def summary(result: dict[str, Any]) -> str:
    found = [ratios(case) for case in result["cases"]]
    rows = []
    for key, low, high in (
        ("kv_bytes", 1.0, 1.0),
        ("peak_bytes", 1 - MEMORY_GATE, 1 + MEMORY_GATE),
        ("prefill_seconds", 1 / TIME_GATE, TIME_GATE),
        ("token_seconds", 1 / TIME_GATE, TIME_GATE),
    ):
        values = [r[key] for r in found]
        inside = sum(low <= v <= high for v in values)
        rows.append([key, f"{min(values):.3f}", f"{statistics.median(values):.3f}", f"{max(values):.3f}", f"{inside} of {len(values)}"])
    load = f"load {result['facts']['load_at_start']} at the start, {result['load_at_end']} at the end"
    return table(f"\npredicted / measured ({load})", ["", "least", "median", "most", "inside the gate"], rows)


if __name__ == "__main__":
    main()
