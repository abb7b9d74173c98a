"""A million tokens in bounded memory: the pass key at their middle, anonymous memory against the budgets, seconds, and bytes by tier.

    python benchmarks/million.py --disk DIR:8GiB [--tokens 1000000] [--device 256MiB] [--host 512MiB] [--out results/million.json]

nano reads filler under InfLLM and is asked for the key. Anonymous memory is the process's own (RssAnon), not pages of files; it is read after every chunk.
Without --out nothing is written.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import facts, write_json

import longreach
from longreach.evals import tasks
from longreach.evals.samples.base import Settings

METHOD = longreach.InfLLM(256, 16, 128, topk=2, repr_topk=3, exc_block_size=128, heads="head", relevance="max")


def anonymous() -> int:
    """Bytes of memory of this process that no file stands behind."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--depth", type=float, default=0.5)
    parser.add_argument("--device", default="256MiB")
    parser.add_argument("--host", default="512MiB")
    parser.add_argument("--disk", required=True, help="FOLDER:SIZE")
    parser.add_argument("--chunk-size", type=int, default=2048)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    model, tokenizer = longreach.load("nano")
    sample = next(iter(tasks.task("passkey").samples(tokenizer, Settings(lengths=(args.tokens,), depths=(args.depth,), samples=1))))
    ids = torch.tensor(tokenizer(sample.parts.text)["input_ids"])
    before, most, cpu, started = anonymous(), 0, time.process_time(), time.perf_counter()
    memory = longreach.Tiered(device=args.device, host=args.host, disk=args.disk)
    with longreach.extend(model, METHOD, memory=memory) as extension:
        cache = None
        for chunk in longreach.stream(extension, ids[:-1], chunk_size=args.chunk_size, losses=False):
            most, cache = max(most, anonymous()), chunk.cache
            if chunk.start // args.chunk_size % 32 == 0:
                print(f"{chunk.start:9d} tokens  {time.perf_counter() - started:7.1f} s  {(most - before) / 2**20:7.1f} MiB", flush=True)
        answer, token = [], ids[-1:]
        for _ in range(12):
            token = model(token[None], past_key_values=cache).logits[0, -1:].argmax(-1)
            answer.append(int(token))
        seconds, cpu, report = time.perf_counter() - started, time.process_time() - cpu, extension.report()["memory"]
    said = tokenizer.decode(answer)
    found = tasks.task("passkey").score(sample, said)[tasks.task("passkey").metric] == 1
    print(f"{METHOD.brief()}: {len(ids)} tokens in {seconds:.0f} s ({cpu:.0f} s of processor time)")
    print(f"the key {sample.references[0]} is {'' if found else 'not '}found; said: {said!r}")
    print(f"anonymous memory grew by {(most - before) / 2**20:.0f} MiB; {report}")
    if args.out is not None:
        result = {"facts": facts(torch.device("cpu")), "method": METHOD.to_json(), "tokens": len(ids), "depth": args.depth, "found": found, "said": said}
        write_json(args.out, {**result, "seconds": seconds, "processor_seconds": cpu, "anonymous_bytes": most - before, "memory": report})


if __name__ == "__main__":
    main()
