"""What an index has chosen for some queries, as plain data: which stretches of a text, how often, layer by layer. Knows layers and counts; draws nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from longreach.engine.watch import Choices
from longreach.methods.base import Method
from longreach.methods.infllm import InfLLM

if TYPE_CHECKING:
    from longreach.engine.layer import Layer
    from longreach.hf.facts import Facts


def chooses_nothing(method: Method, window: int) -> str:
    """Why there is nothing to show, with the fix."""
    such = InfLLM.recommended(window, window)
    return (
        f"{method.brief()} chooses no keys by their content in any layer of this model, so there is no retrieval to show; take a method that does, such as "
        f"{such.brief()} (--method {' '.join(such.options())}), Quest or LongHeads"
    )


def retrieved(facts: Facts, choices: Choices, tokens: int, row: int = 0) -> dict[str, Any]:
    """What the queries that were watched have seen of the first `tokens` tokens of a row. `queries`: how many chose in a layer, at most.

    Of every layer: whether it chooses, blocks of how many tokens, at most how many of them, and how many choose `apart` for a query (heads, groups of heads,
    or 1). `chosen`: stretches [first, stop, share] of tokens that its index has shown to the same share of those who chose; `always`: those that queries saw
    whatever the index said; of a layer in which nobody chose, all that the last token may see. A share is above 0.
    """
    layers = []
    for layer, entry in zip(facts.layers, facts.reading.entries, strict=True):
        choice = layer.layout.choice
        asked = int(choices.asked[layer.index][row, 0]) if layer.index in choices.asked else 0
        apart = 1 if choice is None else choice.count(entry.queries, entry.heads)
        found: dict[str, Any] = {"layer": layer.index, "chooses": choice is not None, "queries": asked, "apart": apart}
        found |= {"block": None, "keep": None} if choice is None else {"block": choice.block, "keep": choice.keep}
        found["chosen"] = stretches(choices.chosen.get(layer.index), row, tokens, asked * apart)
        found["always"] = stretches(choices.always.get(layer.index), row, tokens, asked) if asked else everything(layer, tokens)
        layers.append(found)
    queries = max(layer["queries"] for layer in layers if layer["chooses"])
    return {"method": facts.chosen.method.to_json(), "tokens": tokens, "queries": queries, "layers": layers}


def everything(layer: Layer, tokens: int) -> list[list[float]]:
    """What the last token sees where it does not choose."""
    found = Choices(tokens - 1)
    for segment in layer.layout.segments:
        for piece in segment.visible.pieces(tokens - 1, tokens):
            found.show(layer.index, slice(0, 1), piece, torch.device("cpu"))
    return stretches(found.always.get(layer.index), 0, tokens, 1)


def stretches(counts: torch.Tensor | None, row: int, tokens: int, of: int) -> list[list[float]]:
    """counts [B, N] -> [first, stop, share] of the neighbours that have the same share, above 0."""
    if counts is None or row >= counts.shape[0] or not of:
        return []
    values, lengths = torch.unique_consecutive(counts[row, :tokens].cpu(), return_counts=True)
    stops = lengths.cumsum(0).tolist()
    return [[stop - length, stop, count / of] for count, length, stop in zip(values.tolist(), lengths.tolist(), stops) if count]
