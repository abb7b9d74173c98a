"""What an attention mask leaves visible of the tokens that a cache holds. Knows slots and lengths; not what is stored of a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from longreach.memory.slots import Slots, Stretch, runs


@dataclass(frozen=True)
class Past:
    """What a forward may see of the tokens of a row: its new tokens get the indices from `start` on, and of those before it `hidden` are not seen."""

    start: int
    hidden: tuple[Stretch, ...] = ()


def past(slots: Slots, lengths: list[int], reaches: Callable[[int], int], mask: torch.Tensor | None) -> list[Past]:
    """What a mask [B, seen] of the slots so far leaves visible; None: all tokens. `reaches`: the smallest length to which a row can be cut.

    A token that is hidden keeps its index. A new one follows the last token that is visible: what lies behind that is forgotten when the
    forward is finished. Raises ValueError where a slot is shown that holds no token, or where too much would have to be forgotten.
    """
    real = slots.real
    if mask is None or not slots.seen or bool(mask.all() if real is None else torch.equal(mask.cpu(), real)):
        return [Past(length) for length in lengths]
    if any(slots.evicted):
        raise ValueError("attention_mask hides a token in a row from which tokens were evicted; pass ones for all that was read, or read the rest again")
    mask = mask.cpu()
    if real is not None and bool((shown := mask & ~real).any()):
        row, slot = shown.nonzero()[0].tolist()
        raise ValueError(
            f"attention_mask shows slot {slot} of row {row}, whose token was a pad when it was read, so nothing is stored of it; "
            "keep the zeros of earlier calls, or read the text again with a new cache"
        )
    return [_of_row(row, mask[row] if real is None else mask[row][real[row]], reaches(row)) for row in range(len(lengths))]


def _of_row(row: int, visible: torch.Tensor, least: int) -> Past:
    """visible [tokens of the row]."""
    hidden = runs(~visible)
    start = hidden.pop()[0] if hidden and hidden[-1][1] == len(visible) else len(visible)
    if start < least:
        raise ValueError(
            f"attention_mask hides the last {len(visible) - start} tokens of row {row}, and of the tokens before them too little is kept to go on from "
            f"there (this method can go back to token {least}); pass the mask with the call that reads them, or read the text again"
        )
    return Past(start, tuple(hidden))
