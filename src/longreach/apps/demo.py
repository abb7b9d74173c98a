"""The demonstration: stock, SelfExtend and LM-Infinite read the same book, are asked for keys hidden in it, and say how surprised they are.

Knows models, methods and texts. Prints and draws nothing: the result is plain data, and `verdict` puts it into words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from random import Random
from statistics import fmean, median
from typing import Any

import torch

from longreach import configs
from longreach.evals.samples import haystack
from longreach.hf.extension import Extension, extend
from longreach.hf.interfaces import CausalLM, Tokenizer
from longreach.methods.lm_infinite import LMInfinite
from longreach.planning import dial
from longreach.running import generation, prompts
from longreach.running.reading import stream

NAMES = {"stock": "stock", "selfextend": "SelfExtend", "lm-infinite": "LM-Infinite"}
FIRST_TOKENS = 4  # LM-Infinite's n_global: the first tokens that stay visible
Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Design:
    """What is measured. Lengths are in trained windows.

    lengths      texts of these many windows get a key.
    depths       as many depths, evenly from the beginning to the end.
    keys         trials for every length and depth.
    loss_length  the loss is taken along texts of so many windows.
    stream_length  LM-Infinite reads on to here.
    texts        passages that the loss is averaged over.
    """

    lengths: tuple[int, ...] = (1, 2, 4, 8)
    depths: int = 5
    keys: int = 2
    loss_length: int = 16
    stream_length: int = 64
    texts: int = 1
    seed: int = 1

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be whole numbers of trained windows, such as 1,2,4,8, not {self.lengths}")
        for name in ("depths", "keys", "loss_length", "texts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.stream_length < self.loss_length:
            raise ValueError(f"stream_length ({self.stream_length}) must be at least loss_length ({self.loss_length})")

    def tokens(self, window: int) -> int:
        """Tokens that will be read in all, for the progress."""
        keys = sum(self.lengths) * self.depths * self.keys * len(NAMES)
        return window * (keys + self.texts * (2 * self.loss_length + self.stream_length))


DESIGN = Design()


@contextmanager
def attached(name: str, model: CausalLM, context: int) -> Iterator[tuple[Extension | None, str]]:
    """The method of that name on the model, chosen by the dial where there is a choice -> (extension or None, what it is)."""
    window = configs.trained_window(model.config).tokens
    if name == "stock":
        yield None, "the model as it is"
        return
    method = LMInfinite(window, FIRST_TOKENS) if name == "lm-infinite" else None
    with extend(model, method, context=None if method else context) as extension:
        yield extension, extension.method.brief()


def run(model: CausalLM, tokenizer: Tokenizer, text: str, design: Design = DESIGN, progress: Progress = lambda tokens, what: None) -> dict[str, Any]:
    """All measurements as plain data: `trials`, one row each; `loss`, by window of the text; `cost`, at the longest text.

    progress  called with the tokens just read and what is going on.

    Raises ValueError if the text is too short or the dial cannot reach a length.
    """
    started = time.perf_counter()
    window = configs.trained_window(model.config)
    for n in (*design.lengths, design.loss_length):
        dial.choose(window, n * window.tokens)  # refuses now what could not be read later
    trials, methods = keys(model, tokenizer, text, window.tokens, design, progress)
    loss = losses(model, tokenizer, text, window.tokens, design, progress)
    return {
        "window": window.tokens,
        "plan": asdict(design),
        "methods": methods,
        "trials": trials,
        "loss": loss,
        "cost": cost(trials),
        "seconds": round(time.perf_counter() - started, 1),
    }


def keys(
    model: CausalLM, tokenizer: Tokenizer, text: str, window: int, design: Design, progress: Progress
) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """Every method is asked for the same keys. Found means: the first number that greedy decoding writes is the key."""
    rows, methods = [], {name: {} for name in NAMES}  # type: tuple[list[dict[str, Any]], dict[str, dict[str, str]]]
    room = answer_tokens(tokenizer)
    for length in (n * window for n in design.lengths):
        for name in NAMES:
            rng = Random(design.seed * 1_000_003 + length)
            with attached(name, model, length) as (extension, description):
                methods[name][str(length)] = description
                for step in range(design.depths):
                    for _ in range(design.keys):
                        asked = haystack.trial(tokenizer, text, length, step / max(1, design.depths - 1), rng, answer_tokens=room)
                        found = generation.answer(model, tokenizer, asked.ids, room, extension=extension)
                        rows.append({
                            "method": name, "length": length, "depth": asked.depth, "distance": asked.distance, "prompt_tokens": len(asked.ids),
                            "key": asked.key, "answer": found.text.strip(), "found": haystack.number_in(found.text) == asked.key,
                            "prefill_seconds": found.prefill_seconds, "decode_seconds": found.decode_seconds, "new_tokens": found.tokens,
                            "store_bytes": found.store_bytes,
                        })  # fmt: skip
                        progress(length, f"{NAMES[name]} looks for a key in {length} tokens")
    return rows, methods


def answer_tokens(tokenizer: Tokenizer) -> int:
    """Room for a key of five digits and what closes the sentence, in tokens of this tokenizer."""
    return len(prompts.encode(tokenizer, " 88888.", special=False)) + 3


def losses(model: CausalLM, tokenizer: Tokenizer, text: str, window: int, design: Design, progress: Progress) -> dict[str, Any]:
    """Mean loss (nats per token) in every window of a text, and for each method the length it was followed to."""
    rng = Random(design.seed)
    passages = [passage(tokenizer, text, design.stream_length * window, rng) for _ in range(design.texts)]
    found: dict[str, Any] = {"bin": window, "methods": {}}
    for name in NAMES:
        length = (design.stream_length if name == "lm-infinite" else design.loss_length) * window
        bins = torch.zeros(length // window, dtype=torch.float64)
        with attached(name, model, length) as (extension, _):
            for ids in passages:
                read = [chunk.losses for chunk in stream(extension or model, ids[:length], chunk_size=window) if chunk.losses is not None]
                bins += torch.cat(read).double().nan_to_num(0.0).view(-1, window).sum(1)
                progress(length, f"{NAMES[name]} reads {length} tokens")
        counts = torch.full_like(bins, window)
        counts[0] -= 1  # nothing precedes the first token
        found["methods"][name] = (bins / counts / design.texts).tolist()
    return found


def passage(tokenizer: Tokenizer, text: str, length: int, rng: Random) -> torch.Tensor:
    """`length` tokens of the text from a drawn place on, as one document: with the special tokens that open a text."""
    start = haystack.sentence_start(text, rng.random())
    opening = prompts.encode(tokenizer, "")
    piece = haystack.first_tokens(tokenizer, text, start, length + 8)  # a piece cut from a text may be a few tokens shorter when read alone
    return torch.tensor((opening + prompts.encode(tokenizer, piece, special=False))[:length])


def cost(trials: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians at the longest text: seconds to the first token, milliseconds a further token, bytes of keys and values."""
    longest = max(row["length"] for row in trials)
    found = {}
    for name in NAMES:
        rows = [row for row in trials if row["method"] == name and row["length"] == longest]
        found[name] = {
            "length": longest,
            "prefill_seconds": median(row["prefill_seconds"] for row in rows),
            "decode_ms": 1000 * median(row["decode_seconds"] / max(1, row["new_tokens"] - 1) for row in rows),
            "store_bytes": max(row["store_bytes"] for row in rows),
        }
    return found


@dataclass(frozen=True)
class Share:
    """`found` of `asked`; an empty share has no percentage."""

    found: int
    asked: int

    @property
    def percent(self) -> float | None:
        return 100 * self.found / self.asked if self.asked else None

    def __str__(self) -> str:
        return "-" if not self.asked else f"{self.found}/{self.asked}"


def share(result: dict[str, Any], method: str, length: int | None = None, depth: float | None = None, far: bool | None = None) -> Share:
    """Keys found by a method; `far` asks for those farther than the trained window only, or for the others only."""
    rows = [
        row["found"] for row in result["trials"]
        if row["method"] == method and length in (None, row["length"]) and depth in (None, row["depth"])
        and far in (None, row["distance"] > result["window"])
    ]  # fmt: skip
    return Share(sum(rows), len(rows))


def verdict(result: dict[str, Any]) -> dict[str, str]:
    """What each method did, in the numbers of this run, and why a method of its kind does that."""
    window, loss = result["window"], result["loss"]["methods"]
    longest = max(result["plan"]["lengths"]) * window
    inside = loss["stock"][0]
    why = {
        "stock": f"It was trained on {window} tokens. Beyond them it meets distances it has never seen, and more keys than it ever had to choose from.",
        "selfextend": "It sees every token. Near ones keep their true distance and far ones share one with their neighbours, so that no distance is new to "
        "the model; the order of far tokens inside a group is lost, and memory grows with the text as usual.",
        "lm-infinite": f"It sees the last {window} tokens and the first {FIRST_TOKENS}, nothing else. Text stays fluent at any length and memory constant, but "
        "what has left the window is gone: it cannot be found, however low the loss.",
    }
    words = {}
    for name in NAMES:
        beyond, near = share(result, name, far=True), share(result, name, far=False)
        last = fmean(loss[name][-max(1, len(loss[name]) // 4) :])
        recall = f"found {beyond.found} of {beyond.asked} keys farther away than {window} tokens" if beyond.asked else "no key was farther than the window"
        words[name] = (
            f"{NAMES[name]} {recall} and {near.found} of {near.asked} nearer ones, in texts of up to {longest} tokens; its loss, {inside:.2f} "
            f"inside the window, is {last:.2f} at the end of {len(loss[name]) * window} tokens. {why[name]}"
        )
    return words
