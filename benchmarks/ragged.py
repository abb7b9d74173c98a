"""Decoding one token for each of 16 rows of unequal lengths, against 16 rows of equal length with the same tokens in all.

    python benchmarks/ragged.py                                        # nano, fp32
    python benchmarks/ragged.py --model random-0.5B --dtype bf16

Keys and values are random and put into memory directly: speed does not depend on them, and reading 16 prompts of thousands of tokens takes long. Rounds
alternate between the batches. No ratio is printed unless the gate holds: the logits of the shortest, a middle and the longest row are those of the same row
alone.
"""

from __future__ import annotations

from typing import Any

import torch
from attention import relative_error
from common import DTYPES, Ratio, alternate, device_of, table
from model import keep, opened, options_of, require_same
from transformers import DynamicCache

import longreach
from longreach import LMInfinite, SelfExtend, Stock
from longreach.hf.cache import place
from longreach.hf.extension import Extension
from longreach.memory.past import Past

ROWS = 16


def spread(first: int, last: int) -> list[int]:
    """Rows from one length to another, in an order that is none."""
    lengths = [first + (last - first) * n // (ROWS - 1) for n in range(ROWS)]
    return [lengths[7 * n % ROWS] for n in range(ROWS)]


def filled(extension: Extension, lengths: list[int], seeds: list[int]) -> tuple[DynamicCache, torch.Tensor]:
    """-> a cache with random keys and values of so many tokens in each row, and its attention mask. A row depends on its seed and length alone."""
    facts, rows, columns = extension.facts, len(lengths), max(lengths)
    cache, store = place(DynamicCache(), extension.forward.new_store(), extension.forward.calls)
    real = torch.arange(columns)[None, :] >= columns - torch.tensor(lengths)[:, None]
    store.open(rows)
    store.reserve([Past(0)] * rows, lengths)
    for row, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        for index, (entry, layer) in enumerate(zip(facts.reading.entries, facts.layers, strict=True)):
            generator = torch.Generator().manual_seed(1000 * seed + index)

            def draw(tokens: int, width: int, entry: Any = entry, generator: torch.Generator = generator) -> torch.Tensor:
                return torch.randn(1, entry.heads, tokens, width, generator=generator).to(entry.device, entry.dtype)

            values = draw(length, entry.value_width)
            keys = {p: draw(min(length, kept.head) if kept.tail == 0 else length, entry.key_width) for p, kept in layer.forms.items()}
            store.layers[index].append(slice(row, row + 1), 0, keys, values)
            store.layers[index].release()
    store.advance(real, columns)
    return cache, real.long()


class Rows:
    """A batch that decodes."""

    def __init__(self, extension: Extension, lengths: list[int], seeds: list[int] | None = None) -> None:
        self.model, self.seeds = extension.model, list(range(len(lengths))) if seeds is None else seeds
        self.cache, mask = filled(extension, lengths, self.seeds)
        self.mask = mask.to(self.model.device)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        ids = torch.tensor([[seed + 5] for seed in self.seeds], device=self.model.device)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        return self.model(ids, attention_mask=self.mask, past_key_values=self.cache, logits_to_keep=1).logits[:, -1]


def gate(extension: Extension, lengths: list[int], dtype: torch.dtype) -> float:
    """The largest relative difference to rows alone. Raises SystemExit where it exceeds the limit."""
    batch = Rows(extension, lengths)
    found = [batch.step() for _ in range(2)][-1]
    worst = 0.0
    for row in (lengths.index(min(lengths)), 0, lengths.index(max(lengths))):
        alone = Rows(extension, [lengths[row]], [row])
        want = [alone.step() for _ in range(2)][-1]
        worst = max(worst, relative_error(found[row : row + 1], want))
    return require_same(worst, dtype)


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--longest", type=int, default=8000)
    options = parser.parse_args()
    model, device, dtype = opened(options), device_of(options.device), DTYPES[options.dtype]
    wide = spread(options.longest // 80, options.longest)
    mean = sum(wide) // ROWS
    batches = {"equal": [mean] * ROWS, "within a tenth": spread(mean * 95 // 100, mean * 105 // 100), "from 1 to 80": wide}
    rows, measured = [], {}
    for method in (Stock(), SelfExtend(16, 512), LMInfinite(2048, 4)):
        with longreach.extend(model, method, trained_window=8192) as extension:
            errors = {name: gate(extension, lengths, dtype) for name, lengths in batches.items()}
            contestants = {name: Rows(extension, lengths).step for name, lengths in batches.items()}
            timings = alternate(contestants, options.rounds, device)
        own = {}
        for name, timing in timings.items():
            ratio = Ratio.of(timing, timings["equal"])
            own[name] = {"lengths": batches[name], "relative_error": errors[name], "ratio": ratio.to_json(), "timing": timing.to_json()}
            rows.append([str(method), name, f"{1e3 * timing.median:.1f}", f"{ratio.of_medians:.2f}", f"{errors[name]:.0e}"])
        measured[method.brief()] = own
    print(table(f"{options.model}, {options.dtype}, {ROWS} rows of {mean} tokens on average", ["method", "lengths", "ms", "ratio", "error"], rows))
    keep(options, "ragged", {"measured": measured})


if __name__ == "__main__":
    main()
