"""What a model like nano can do inside its window: questions of every kind, answered greedily, and the loss on prose.

Knows rows of tokens and a model that maps ids to logits. Used along the training and for the card.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import listed_text as lt
import retrieval_text as rt
from training_rows import Rows


def pairs(rng: Random) -> list[rt.Fact]:
    """Six key-value pairs, the first fact being the one asked; the listing is its statement."""
    listing, facts = rt.pairs(rng, 6)
    asked = rng.choice(facts)
    return [rt.Fact(listing, asked.question, asked.answer, asked.name)]


def asked_first(listed: tuple[list[rt.Fact], list[rt.Fact]]) -> list[rt.Fact]:
    hidden, asked = listed
    return [asked[0], *hidden]


# The first fact of a list is asked; all that have a statement are hidden.
KINDS: dict[str, Callable[[Random], list[rt.Fact]]] = {
    "pass key, standard wording": lambda rng: [rt.standard_pass_key(rng)],
    "pass key, all trained wordings": lambda rng: [rt.pass_key(rng)],
    "pass key, held-out wording": lambda rng: [rt.held_out_pass_key(rng)],
    "one of three labelled keys": lambda rng: rt.labelled_keys(rng, 3, standard=1.0, value_first=False),
    "one of three labelled keys, value before name": lambda rng: rt.labelled_keys(rng, 3, standard=1.0, value_first=True),
    "needle sentence": lambda rng: [rt.needle(rng)],
    "needle sentence, held-out form": lambda rng: [rt.needle(rng, rt.HELD_OUT_NEEDLE)],
    "needle sentence from verbs, places and times": lambda rng: [rt.composed_needle(rng)],
    "one of six key-value pairs": pairs,
    "value of one of four keys, in sentences": lambda rng: asked_first(lt.entries(rng, 4, "one")),
    "all values of a key that has several": lambda rng: asked_first(lt.entries(rng, 4, "values")),
    "values of several keys": lambda rng: asked_first(lt.entries(rng, 4, "keys")),
    "one of three JSON records": lambda rng: asked_first(lt.records(rng, 3)),
    "variables set to each other": lambda rng: asked_first(lt.variables(rng, 4)),
}


def trial(rows: Rows, books: np.ndarray, kind: str, rng: Random, length: int, depth: float | None = None) -> tuple[list[int], int]:
    """-> ids of `length` tokens (more, if the facts alone are longer) ending in the answer, and the length of the answer."""
    facts = KINDS[kind](rng)
    hidden = [rows.encode(" " + fact.statement) for fact in facts if fact.statement]
    question, answer = rows.encode("\n\n" + facts[0].question), rows.encode(facts[0].answer)
    room = max(0, length - 1 - sum(map(len, hidden)) - len(question) - len(answer))
    start = rng.randrange(len(books) - room)
    prose = books[start : start + room].tolist()
    gaps = [rows.gap(rng, prose) if depth is None else round(depth * room) for _ in hidden]
    if not facts[0].statement:  # the order of the others is part of the answer
        gaps.sort()
    order = sorted(range(len(hidden)), key=lambda i: (gaps[i], i if not facts[0].statement else rng.random()), reverse=True)
    for i in order:
        prose[gaps[i] : gaps[i]] = hidden[i]
    return [rows.bos, *prose, *question, *answer], len(answer)


@torch.no_grad()
def found(model: Any, trials: list[tuple[list[int], int]], size: int = 16) -> list[bool]:
    """Whether greedy decoding gives the whole answer, for every trial. Rows are padded at their end, which no earlier token sees."""
    result = []
    for first in range(0, len(trials), size):
        part = trials[first : first + size]
        longest = max(len(ids) for ids, _ in part)
        batch = torch.zeros(len(part), longest, dtype=torch.long)
        for row, (ids, _) in enumerate(part):
            batch[row, : len(ids)] = torch.tensor(ids)
        device = next(model.parameters()).device
        guesses = model(batch.to(device), use_cache=False).logits.argmax(-1).cpu()
        result += [guesses[row, len(ids) - n - 1 : len(ids) - 1].tolist() == ids[-n:] for row, (ids, n) in enumerate(part)]
    return result


@torch.no_grad()
def copying(model: Any, rows: Rows, length: int, count: int = 32, seed: int = 0) -> float:
    """Share of right tokens in the second half of <bos> + random tokens + the same again, from its second token on."""
    rng, half = Random(seed), (length - 1) // 2
    spans = [[rng.randrange(3, rows.vocabulary) for _ in range(half)] for _ in range(count)]
    ids = torch.tensor([[rows.bos, *span, *span] for span in spans], device=next(model.parameters()).device)
    guesses = model(ids, use_cache=False).logits[:, :-1].argmax(-1)
    return guesses[:, half + 1 :].eq(ids[:, half + 2 :]).float().mean().item()


@torch.no_grad()
def prose_loss(model: Any, rows: Rows, books: np.ndarray, length: int, tokens: int, seed: int = 1234, size: int = 16) -> float:
    """Nats per token on passages of unseen books, <bos> first."""
    rng, total, count = Random(seed), 0.0, max(1, tokens // length)
    starts = [rng.randrange(len(books) - length) for _ in range(count)]
    for first in range(0, count, size):
        ids = torch.tensor([[rows.bos, *books[s : s + length].tolist()] for s in starts[first : first + size]], device=next(model.parameters()).device)
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / (count * length)


def abilities(model: Any, rows: Rows, books: np.ndarray, length: int, trials: int = 32, seed: int = 1234, tokens: int = 16384) -> dict[str, float]:
    """Loss on unseen prose and the share of right answers by kind of question, at this length."""
    result = {"loss": prose_loss(model, rows, books, length, tokens)}
    for kind in KINDS:
        rng = Random(f"{seed} {kind}")
        result[kind] = sum(found(model, [trial(rows, books, kind, rng, length) for _ in range(trials)])) / trials
    return result
