"""`kill -9` at random moments of one reading, which is resumed each time: no corrupt folder, and the same end as without.

    python benchmarks/kill.py [--kills 50] [--tokens 200000] [--method infllm] [--memory device=4MiB,host=8MiB,disk=DIR:4GiB] [--out kill.json]

Children are forked from this process, which has loaded the model, and read with `longreach.stream(..., resume=FOLDER)`, saving between any two chunks
(elsewhere a save waits until it costs a twentieth of the time). One child is killed after each random time, so that kills come in forwards, in moves between
tiers and in saves; the last one reads to the end. Compared are the losses of all tokens that a child gave last, and the logits of the last token.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import facts, read_text, write_json

import longreach
from longreach.running import resuming

METHODS = {"infllm": longreach.InfLLM(256, 16, 32, exc_block_size=128), "lm-infinite": longreach.LMInfinite(512), "quest": longreach.Quest(128, queries="all")}


def read(extend: Callable[[], Any], ids: torch.Tensor, chunk_size: int, folder: Path | None, out: Path) -> None:
    """Read to the end, writing the losses of every chunk to a file of its own; at the end the logits of a token that follows."""
    with extend() as extension:
        cache = None
        for chunk in longreach.stream(extension, ids[:-1], chunk_size=chunk_size, resume=folder):
            part = out / f"{chunk.start:09d}.part"
            torch.save(chunk.losses, part)
            os.replace(part, out / f"{chunk.start:09d}.losses")
            cache = chunk.cache
        with torch.no_grad():
            logits = extension.model(ids[None, -1:], past_key_values=cache).logits[0, -1]
        torch.save(logits, out / "logits")


def forked(work: Callable[[], None], seconds: float | None) -> int | None:
    """Do it in a child, which is killed after so many seconds -> how it has ended; None: by the kill."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is None or time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return None if os.waitstatus_to_exitcode(status) == -signal.SIGKILL else os.waitstatus_to_exitcode(status)


def result(out: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of all tokens, and logits at the end. Where a child has read some tokens again, what it gave counts."""
    losses = torch.cat([torch.load(path) for path in sorted(out.glob("*.losses"))])
    return losses, torch.load(out / "logits")


def broken(
    extend: Callable[[], Any], ids: torch.Tensor, chunk_size: int, kills: int, work: Path, rng: random.Random, expected: float, log: Callable[[str], None]
) -> dict[str, Any]:
    """Read with so many kills -> what has happened. `expected`: seconds of a whole reading; a child lives for about its share of it, and to the first save."""
    folder, out = work / "kept", work / "out"
    out.mkdir(parents=True)
    resuming.SHARE = 1e9  # save between any two chunks
    held, share, before = [], expected / (kills + 1), -1
    for number in range(kills):
        code = forked(lambda: read(extend, ids, chunk_size, folder, out), rng.uniform(0, 2 * share) + (share if held and held[-1] == before else 0.0))
        before = held[-1] if held else -1
        if code is not None:
            raise SystemExit(f"child {number} ended with {code} before it was killed; pass more --tokens or fewer --kills")
        held.append(resuming.held(folder))  # raises where the manifest is corrupt
    log(f"killed {kills} times; tokens in the folder after each: {held}")
    begun = time.monotonic()
    if (code := forked(lambda: read(extend, ids, chunk_size, folder, out), None)) != 0:
        raise SystemExit(f"the last child ended with {code}")
    return {"held": held, "last_seconds": time.monotonic() - begun}


def compare(
    extend: Callable[[], Any], ids: torch.Tensor, chunk_size: int, kills: int, seed: int, where: Path, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """An unbroken reading and a broken one."""
    whole = where / "whole"
    whole.mkdir()
    begun = time.monotonic()
    if (code := forked(lambda: read(extend, ids, chunk_size, None, whole), None)) != 0:
        raise SystemExit(f"the unbroken reading ended with {code}")
    seconds = time.monotonic() - begun
    log(f"unbroken: {len(ids)} tokens in {seconds:.1f} s")
    found = broken(extend, ids, chunk_size, kills, where / "broken", random.Random(seed), seconds, log)
    (losses, logits), (again, end) = result(whole), result(where / "broken" / "out")
    assert losses[0].isnan() and again[0].isnan() and len(losses) == len(again) == len(ids) - 1
    return {
        "tokens": len(ids),
        "kills": kills,
        "unbroken_seconds": seconds,
        **found,
        "largest_difference_of_losses": (losses - again)[1:].abs().max().item(),
        "difference_of_last_logits": ((logits - end).abs().max() / logits.abs().max()).item(),
        "equal": torch.equal(losses[1:], again[1:]) and torch.equal(logits, end),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", type=Path, help="the book that comes with nano if not given")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--chunk-size", type=int, default=512)
    parser.add_argument("--method", choices=sorted(METHODS), default="infllm")
    parser.add_argument("--memory", help="budgets, as longreach run has them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a fork has the thread that forks only
    model, tokenizer = longreach.load(args.model)
    text = longreach.shipped_book() if args.text is None else read_text(args.text)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    ids = ids.repeat(-(-args.tokens // len(ids)))[: args.tokens]
    memory = None if args.memory is None else longreach.Tiered.parse(args.memory)
    with tempfile.TemporaryDirectory() as where:
        found = compare(lambda: longreach.extend(model, METHODS[args.method], memory=memory), ids, args.chunk_size, args.kills, args.seed, Path(where))
    print(
        f"largest difference of a loss {found['largest_difference_of_losses']:.2e} nats, of the last logits {found['difference_of_last_logits']:.2e} of the "
        f"largest; {'bit-equal' if found['equal'] else 'not bit-equal'}"
    )
    if args.out is not None:
        write_json(args.out, {"facts": facts(torch.device("cpu")), "model": args.model, "method": str(METHODS[args.method]), "memory": args.memory, **found})
    if max(found["largest_difference_of_losses"], found["difference_of_last_logits"]) > 1e-5:
        raise SystemExit("they differ by more than 1e-5")


if __name__ == "__main__":
    main()
