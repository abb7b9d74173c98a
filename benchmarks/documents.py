"""Saving and loading a document of some hundred megabytes, against safetensors, plain writing and plain copying of as many bytes.

    python benchmarks/documents.py                     # 512 MiB of made-up keys and values in bf16
    python benchmarks/documents.py --mebibytes 64      # only to see that it runs

Rounds alternate between the contestants. Whatever is written is also synced. What is read lies in the page cache, so this is the speed of the code and of the
memory, and a disk that is slower is the limit. No speed is printed unless the document that is loaded is the one that was saved, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from common import ROOT, alternate, facts, table, write_json
from safetensors.torch import load_file, save_file

import longreach
from longreach.hf import documents
from longreach.hf.cache import place
from longreach.memory import sealing
from longreach.memory.past import Past
from longreach.memory.store import Store

LAYERS, HEADS, WIDTH, TURN = 8, 8, 128, 300
TOKEN = LAYERS * HEADS * WIDTH * 2 * 2  # bytes of a token's keys and values


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        head_dim=WIDTH, max_position_embeddings=2**20,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def grow(store: Store, tokens: int) -> None:
    """More tokens, as a forward leaves them, of made-up content."""
    start = store.seen
    if not start:
        store.open(1, tokens)
    past = [Past(start)]
    store.reserve(past, [tokens])
    for layer in store.layers:
        keys, values = (torch.randn(1, HEADS, tokens, WIDTH).to(torch.bfloat16) for _ in range(2))
        layer.append(slice(0, 1), start, dict.fromkeys(layer.keys, keys), values)
        layer.release()
    store.advance(None, tokens, past)


def same(store: Store, other: Store) -> bool:
    """Whether two stores hold the same bits."""
    return store.lengths == other.lengths and all(
        torch.equal(a.view(slice(0, 1), 0, store.seen), b.view(slice(0, 1), 0, store.seen))
        for (_, _, a), (_, _, b) in zip(sealing.buffers(store), sealing.buffers(other), strict=True)
    )


def written(path: Path, data: Any) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def synced(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mebibytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/documents.json")
    parser.add_argument("--print", action="store_true", help="Only print: the machine is not quiet.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens = options.mebibytes * 2**20 // TOKEN
    with longreach.extend(model(), longreach.Stock()) as extension, tempfile.TemporaryDirectory(dir=".") as scratch, torch.no_grad():
        folder, store = Path(scratch), extension.forward.new_store()
        cache, _ = place(transformers.DynamicCache(), store, extension.forward.calls)
        grow(store, tokens)
        extension.save(cache, folder / "document")
        size = documents.size(folder / "document")
        if not same(store, documents.store_of(extension.load(folder / "document").cache)):  # type: ignore[arg-type]
            raise SystemExit("the gate fails: what is loaded is not what was saved; no speed is printed")
        tensors = {f"{n}": buffer.view(slice(0, 1), 0, tokens).clone() for n, (_, _, buffer) in enumerate(sealing.buffers(store))}
        flat = torch.cat([each.view(torch.uint8).flatten() for each in tensors.values()])
        room = torch.zeros_like(flat)
        synced(folder / "plain", tensors)

        def anew() -> None:
            shutil.rmtree(folder / "anew", ignore_errors=True)
            extension.save(cache, folder / "anew")

        contestants = {
            "save": anew,
            "safetensors.save_file, synced": lambda: synced(folder / "s", tensors),
            "one write, synced": lambda: written(folder / "w", flat.numpy().data),
            "load": lambda: extension.load(folder / "document"),
            "safetensors.load_file, copied": lambda: {name: each.clone() for name, each in load_file(folder / "plain").items()},
            "one copy to new memory": flat.clone,
            "one copy": lambda: room.copy_(flat),
        }
        timings = alternate(contestants, options.rounds, torch.device("cpu"))
        extension.save(cache, folder / "document")
        turns = []
        for _ in range(options.rounds):
            grow(store, TURN)
            turns.append(alternate({"turn": lambda: extension.save(cache, folder / "document")}, 1, torch.device("cpu"), 0)["turn"].median)
        if not same(store, documents.store_of(extension.load(folder / "document").cache)):  # type: ignore[arg-type]
            raise SystemExit("the gate fails: what is loaded after the turns is not what was saved; no speed is printed")
    turn = sorted(turns)[len(turns) // 2]
    rows = [[name, f"{timing.median:.2f}", f"{size / timing.median / 1e6:.0f}"] for name, timing in timings.items()]
    print(table(f"{size / 1e6:.0f} MB, {tokens} tokens", ["", "s", "MB/s"], [*rows, [f"save again after {TURN} tokens", f"{turn:.2f}", ""]]))
    if not options.print:
        found = {name: timing.to_json() for name, timing in timings.items()}
        write_json(options.out, {"facts": facts(torch.device("cpu")), "bytes": size, "tokens": tokens, "timings": found, "turn": {"seconds": turns}})
        print(f"written: {options.out.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
