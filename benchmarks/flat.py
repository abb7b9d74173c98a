"""Flat forwards against the forwards that they replace: 16 requests that decode, and 15 that decode beside one that reads a chunk of its prompt.

    python benchmarks/flat.py                                          # nano, fp32
    python benchmarks/flat.py --model random-0.5B --dtype bf16 --tokens 500

Rounds alternate between the contestants; what they need is prepared outside the clock. No ratio is printed unless the logits of every request are those of the
same request alone.
"""

from __future__ import annotations

from typing import Any

import torch
from attention import relative_error
from common import DTYPES, Ratio, Timing, device_of, seconds_of, table
from model import keep, opened, options_of, require_same
from transformers import DynamicCache

import longreach
from longreach import LMInfinite, SelfExtend, Stock

REQUESTS, CHUNK = 16, 256


def ids(count: int, seed: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(1, vocabulary, (count,), generator=torch.Generator().manual_seed(seed))


class Bench:
    """Requests of about `tokens` tokens, in flat memory and each in a cache of its own."""

    def __init__(self, extension: Any, tokens: int) -> None:
        self.extension, self.model, self.device = extension, extension.model, next(extension.model.parameters()).device
        self.vocabulary = self.model.config.vocab_size
        self.texts = [ids(tokens + 7 * n, n, self.vocabulary) for n in range(REQUESTS)]
        self.flat = extension.flat()
        self.names = [self.flat.join() for _ in self.texts]
        self.caches = []
        for name, text in zip(self.names, self.texts):
            self.flat.read({name: text}, "none")
            self.caches.append(DynamicCache())
            self.alone(text, self.caches[-1])
        self.extra, self.cache = 0, DynamicCache()
        self.round = 0
        self.ones: list[list[torch.Tensor]] = []  # of the next two forwards that decode
        self.chunked, self.long = ids(CHUNK, 6, self.vocabulary), ids(REQUESTS - 1 + CHUNK, 5, self.vocabulary)

    @torch.no_grad()
    def alone(self, text: torch.Tensor, cache: Any, logits: int = 1) -> torch.Tensor:
        return self.model(text[None].to(self.device), past_key_values=cache, logits_to_keep=logits).logits[0, -1]

    def prepare(self) -> None:
        self.round += 1
        self.ones = [[ids(1, 2000 * n + 2 * self.round + turn, self.vocabulary) for n in range(REQUESTS)] for turn in range(2)]
        if self.extra:
            self.flat.leave(self.extra)
        self.extra = self.flat.join()
        self.flat.read({self.extra: self.texts[0]}, "none")
        self.cache = DynamicCache()
        self.alone(self.texts[0], self.cache)

    # -- contestants ---------------------------------------------------------------------------------------------------------------

    def separately(self) -> list[torch.Tensor]:
        return [self.alone(one, cache) for one, cache in zip(self.ones[0], self.caches)]

    def together(self) -> list[torch.Tensor]:
        found = self.flat.read(dict(zip(self.names, self.ones[0])))
        return [found[name] for name in self.names]

    def chunk(self) -> torch.Tensor:
        """As many tokens of one request, and logits of as many."""
        return self.alone(self.long, self.cache, REQUESTS)

    def mixed(self) -> torch.Tensor:
        return self.flat.read({**dict(zip(self.names[1:], self.ones[1][1:])), self.extra: self.chunked})[self.extra]

    def gate(self) -> float:
        self.prepare()
        worst = max(relative_error(a, b) for a, b in zip(self.together(), self.separately()))
        mixed = self.mixed()
        return max(worst, relative_error(mixed, self.alone(torch.cat([self.texts[0], self.chunked]), DynamicCache())))


def main() -> None:
    parser = options_of(__doc__)
    parser.add_argument("--tokens", type=int, default=1000)
    options = parser.parse_args()
    model, device, dtype = opened(options), device_of(options.device), DTYPES[options.dtype]
    rows, measured = [], {}
    for method in (Stock(), SelfExtend(16, 64), LMInfinite(256, 4)):
        with longreach.extend(model, method, trained_window=8192) as extension:
            bench = Bench(extension, options.tokens)
            error = require_same(bench.gate(), dtype)
            timings = {name: Timing() for name in ("separately", "together", "chunk", "mixed")}
            for number in range(options.rounds + 1):
                bench.prepare()
                for name, timing in timings.items():
                    seconds = seconds_of(getattr(bench, name), device)
                    if number:
                        timing.seconds.append(seconds)
        pairs = {"together": "separately", "mixed": "chunk"}
        ratios = {name: Ratio.of(timings[name], timings[other]) for name, other in pairs.items()}
        for name, what in (("together", f"{REQUESTS} decode"), ("mixed", f"{REQUESTS - 1} decode, {CHUNK} of a prompt")):
            ours, theirs = (f"{1e3 * timings[each].median:.1f}" for each in (name, pairs[name]))
            rows.append([str(method), what, ours, theirs, f"{ratios[name].of_medians:.2f}"])
        measured[method.brief()] = {
            "error": error,
            "timings": {name: timing.to_json() for name, timing in timings.items()},
            "ratios": {name: ratio.to_json() for name, ratio in ratios.items()},
        }
    title = f"{options.model}, {options.dtype}: one flat forward (ms) against the {REQUESTS} that it replaces, or one of as many tokens of one request"
    print(table(title, ["method", "forward", "flat", "other", "ratio"], rows))
    keep(options, "flat", {"tokens": options.tokens, "measured": measured})


if __name__ == "__main__":
    main()
