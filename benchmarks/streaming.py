"""A million tokens through LM-Infinite: loss, store bytes and speed, beside stock re-run on a sliding window, and plain stock.

    python benchmarks/streaming.py --text BOOK ... [--model nano] [--tokens 1000000] [--out benchmarks/results/streaming.json]

The comparison: at sampled positions, stock reads <bos> and the window - 1 tokens before a token afresh and predicts it. LM-Infinite has
to come within 2 % of that mean loss. Plain stock reads one text as far as it fits into memory, to show where it diverges.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from common import facts, read_text, write_json

import longreach


@torch.no_grad()
def sliding_window_losses(model: Any, ids: torch.Tensor, positions: list[int], window: int, bos: int, batch: int = 16) -> torch.Tensor:
    """Loss of stock at each position, given <bos> and the window - 1 tokens before it."""
    found = []
    for first in range(0, len(positions), batch):
        part = positions[first : first + batch]
        rows = torch.stack([torch.cat([torch.tensor([bos]), ids[p - window + 1 : p]]) for p in part])
        logits = model(rows, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        found.append(F.cross_entropy(logits, ids[part], reduction="none"))
    return torch.cat(found)


@torch.no_grad()
def plain_losses(model: Any, ids: torch.Tensor, window: int) -> list[float]:
    """Mean loss of plain stock per window of one long text."""
    logits = model(ids[None], use_cache=False).logits[0, :-1].float()
    losses = F.cross_entropy(logits, ids[1:], reduction="none")
    return [part.mean().item() for part in losses.split(window)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="plain or .xz texts, read one after the other and again if they end")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--n-local", type=int, help="the trained window if not given")
    parser.add_argument("--n-global", type=int, default=4)
    parser.add_argument("--chunk-size", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/streaming.json"))
    args = parser.parse_args()
    model, tokenizer = longreach.load(args.model)
    window = model.config.max_position_embeddings
    n_local = args.n_local or window
    ids = torch.cat([torch.tensor(tokenizer.encode(read_text(p), add_special_tokens=False)) for p in args.text])
    ids = ids.repeat(-(-args.tokens // len(ids)))[: args.tokens]
    ids[0] = tokenizer.bos_token_id
    rng = Random(1)
    positions = sorted(rng.sample(range(2 * window, args.tokens), args.samples))
    stock = sliding_window_losses(model, ids, positions, window, tokenizer.bos_token_id)
    plain = plain_losses(model, ids[: 16 * window], window)

    sizes: set[int] = set()
    losses = torch.empty(args.tokens)
    started = time.perf_counter()
    with longreach.extend(model, longreach.LMInfinite(n_local, args.n_global)) as extension:
        for chunk in longreach.stream(extension, ids, chunk_size=args.chunk_size):
            assert chunk.losses is not None
            losses[chunk.start : chunk.start + len(chunk.losses)] = chunk.losses
            sizes.add(chunk.store_bytes)
            if (chunk.start // args.chunk_size) % 50 == 0:
                print(f"{chunk.start:9d} tokens  loss {chunk.losses[1:].mean():.3f}  store {chunk.store_bytes / 1e6:.2f} MB", flush=True)
        method = str(extension.method)
    seconds = time.perf_counter() - started
    ours = losses[positions]
    difference = (ours.mean() - stock.mean()).item()
    tenths = [part.mean().item() for part in losses[1:].split(args.tokens // 10) if len(part) > 1]
    percent = 100 * difference / stock.mean().item()
    result = {
        "facts": facts(torch.device("cpu")),
        "model": args.model,
        "window": window,
        "method": method,
        "tokens": args.tokens,
        "seconds": seconds,
        "tokens_per_second": args.tokens / seconds,
        "store_bytes": sorted(sizes),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "samples": args.samples,
        "loss_lm_infinite": ours.mean().item(),
        "loss_stock_sliding_window": stock.mean().item(),
        "difference_percent": percent,
        "standard_error_of_difference": ((ours - stock).std() / args.samples**0.5).item(),
        "loss_by_tenth": tenths,
        "plain_stock_loss_by_window": plain,
    }
    print(f"{method}: {args.tokens} tokens in {seconds:.0f} s ({args.tokens / seconds:,.0f} tokens/s)")
    print(f"store sizes seen, in bytes: {sorted(sizes)}")
    print(f"at {args.samples} sampled positions: LM-Infinite {ours.mean():.4f}, stock on a sliding window {stock.mean():.4f} ({percent:+.2f} %)")
    print(f"plain stock by window of {window}: {' '.join(f'{x:.2f}' for x in plain)}")
    write_json(args.out, result)


if __name__ == "__main__":
    main()
