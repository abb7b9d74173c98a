"""What is left out of a text that is too long: the document alone, cut where tokens begin and end, or the published cuts of whole prompts.

Knows tokenizers and lists of ids; not samples, models or limits.
"""

from __future__ import annotations

from typing import Any, Literal

Side = Literal["left", "middle", "right"]
HEAD = 128  # tokens that `suffix_with_head` keeps of the beginning
WORD_STEP = 250  # words that `right_words` drops at a time


def token_spans(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where every token of the text begins and ends."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("cutting a text needs a fast tokenizer, which this model lacks; shorten the text yourself")
    return list(tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])


def keep_tokens(text: str, spans: list[tuple[int, int]], keep: int, side: Side) -> str:
    """`keep` tokens of the text; what is left out is at `side`."""
    if keep >= len(spans):
        return text
    head = {"left": 0, "middle": (keep + 1) // 2, "right": keep}[side]
    tail = keep - head
    return (text[: spans[head - 1][1]] if head else "") + (text[spans[-tail][0] :] if tail else "")


def middle_ids(ids: list[int], most: int) -> list[int]:
    """The first ceil(most / 2) and the last floor(most / 2)."""
    if len(ids) <= most:
        return ids
    return ids[: (most + 1) // 2] + ids[len(ids) - most // 2 :]


def middle_reencode(tokenizer: Any, ids: list[int], most: int, *, odd_tail: bool = False) -> list[int]:
    """LongBench's cut of a whole prompt: both halves become text again, without special tokens, which is tokenised anew.

    One token is lost where `most` is odd, unless `odd_tail` (LongBench v2), and the seam may change the count by a few, upwards too.
    """
    if len(ids) <= most:
        return ids
    tail = -(-most // 2) if odd_tail else most // 2
    halves = (ids[: most // 2], ids[len(ids) - tail :])
    return list(tokenizer("".join(tokenizer.decode(half, skip_special_tokens=True) for half in halves))["input_ids"])


def suffix_with_head(ids: list[int], most: int) -> list[int]:
    """InfLLM's cut of a whole prompt: its first 128 tokens and its end."""
    if len(ids) <= most:
        return ids
    head = min(HEAD, most)
    return ids[:head] + ids[len(ids) - (most - head) :]


def right_words(tokenizer: Any, document: str, most: int, *, from_left: bool = False) -> str:
    """L-Eval's cut of a document: 250 words at a time go from its end (for code from its beginning) until it has at most `most` tokens."""
    words = document.split(" ")
    while words and len(tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]) > most:
        words = words[WORD_STEP:] if from_left else words[:-WORD_STEP]
    return " ".join(words)
