"""From texts to the token ids that a model reads: chat templates, special tokens, a document with its question, and what is left out where it is too long.

Knows tokenizers, texts and lists of ids; not files, samples, models or what a method reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from longreach.hf.interfaces import Tokenizer

Side = Literal["left", "middle", "right"]
Span = tuple[int, int]  # where a token begins and ends in its text
Found = TypeVar("Found")
BETWEEN = "\n\n"  # stands between a document, a question and an answer
HEAD = 128  # tokens that `suffix_with_head` keeps of the beginning
WORD_STEP = 250  # words that `right_words` drops at a time


def has_template(tokenizer: Tokenizer) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Tokenizer, messages: list[dict[str, str]], fix: str) -> str:
    """Messages in the tokenizer's chat template, up to where the answer begins. The template writes the special tokens itself.

    fix  what helps where the template refuses them.
    """
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program of its own and may raise anything
        raise ValueError(f"the chat template of this model refuses the messages ({error}); {fix}") from error


def half_pair(text: str) -> int | None:
    """Where a text has the first half of a surrogate pair that stands alone, which no tokenizer takes; None: nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def require_text(piece: object, at: int = 0, what: str = "the text") -> None:
    """Raises ValueError for what no tokenizer takes."""
    if not isinstance(piece, str):
        raise ValueError(f"{what} must be a string, or come in strings, not in {type(piece).__name__}; open a file with encoding='utf-8'")
    if (half := half_pair(piece)) is not None:
        raise ValueError(f"character {at + half} of {what} is half a surrogate pair, which no tokenizer takes; decode it with errors='replace'")


def encode(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """The ids of a text, `special`: with the tokens that the tokenizer puts before every text. What it puts after it is left out."""
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    return open_ended(tokenizer, ids) if special else list(ids)


def encode_with_spans(tokenizer: Tokenizer, text: str, special: bool = True) -> tuple[list[int], list[Span]]:
    """The same ids, and the span of each. Raises ValueError where the tokenizer cannot say it."""
    if not is_fast(tokenizer):
        raise ValueError(
            "cutting a text and hiding a key in it need a fast tokenizer, which this model lacks; shorten the text yourself, or convert the tokenizer with "
            "AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    ids = open_ended(tokenizer, found["input_ids"]) if special else list(found["input_ids"])
    return ids, list(found["offset_mapping"][: len(ids)])


def is_fast(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer knows the spans of its tokens."""
    return bool(getattr(tokenizer, "is_fast", False))


def open_ended(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Some tokenizers end every text, but the model is to go on."""
    ends = {token for token in (tokenizer.eos_token_id, tokenizer.sep_token_id) if token is not None} - {tokenizer.bos_token_id}
    return list(ids[:-1] if ids and ids[-1] in ends else ids)


def about(document: str, question: str) -> str:
    """A document with a question: what a user says."""
    return BETWEEN.join(part for part in (document, question) if part)


def around(tokenizer: Tokenizer, question: str, system: str | None) -> tuple[str, str, bool]:
    """What stands before and behind a document that is asked about, and whether white space at its beginning is left out."""
    if not has_template(tokenizer):
        return "", BETWEEN + question if question else "", False
    mark = "\u2063document\u2063"  # no template, question or system message has it
    messages = [] if system is None else [{"role": "system", "content": system}]
    text = render(tokenizer, [*messages, {"role": "user", "content": about(" " + mark, question)}], "leave out the system message")
    before, found, behind = text.partition(mark)
    if not found or mark in behind:
        raise ValueError(
            "the chat template of this model does not write a message once and as it is, so a text cannot be read in pieces; leave out --resume or --strategy"
        )
    return before.removesuffix(" "), behind, not before.endswith(" ")


def hide(document: str, sentence: str, depth: float) -> str:
    """The document with the sentence after the end of a sentence (or of a word) nearest before `depth` of its length."""
    at = round(depth * len(document))
    if 0 < at < len(document):
        before = max(document.rfind(end, 0, at) + 1 for end in (". ", "? ", "! ", ".\n"))
        at = before if at - before < 500 else max(document.rfind(" ", 0, at), 0)
    head, tail = document[:at].rstrip(), document[at:].lstrip()
    return " ".join(part for part in (head, sentence, tail) if part)


# -- too long ---------------------------------------------------------------------------------------------------------------------


def shrink(keep: int, make: Callable[[int], tuple[Found, int]], least: int = 1) -> Found | None:
    """The first that fits of what `make` makes of `keep` tokens and of fewer; None if `least` are too many.

    make  tokens to keep -> (what is made of them, tokens that it is too long by). The tokens at a seam may be one or two more than they were.
    """
    while keep >= least:
        found, over = make(keep)
        if over <= 0:
            return found
        keep -= over if over < keep else 1  # a character of several tokens is kept as a whole, and may need a smaller step
    return None


def halves(keep: int, side: Side) -> tuple[int, int]:
    """How many of the tokens to keep stand at the beginning and how many at the end; what is left out is at `side`."""
    head = {"left": 0, "middle": (keep + 1) // 2, "right": keep}[side]
    return head, keep - head


def keep_tokens(text: str, spans: list[Span], keep: int, side: Side) -> str:
    """`keep` tokens of a text, cut where tokens begin and end."""
    if keep >= len(spans):
        return text
    head, tail = halves(keep, side)
    return (text[: spans[head - 1][1]] if head else "") + (text[spans[-tail][0] :] if tail else "")


def keep_ids(ids: list[int], keep: int, side: Side) -> list[int]:
    if len(ids) <= keep:
        return ids
    head, tail = halves(keep, side)
    return ids[:head] + ids[len(ids) - tail :]


def middle_reencode(tokenizer: Tokenizer, ids: list[int], most: int) -> list[int]:
    """LongBench's cut of a whole prompt: both halves become text again, without special tokens, which is tokenised anew.

    One token is lost where `most` is odd, and the seam may change the count by a few, upwards too.
    """
    if len(ids) <= most:
        return ids
    parts = (ids[: most // 2], ids[len(ids) - most // 2 :])
    return list(tokenizer("".join(tokenizer.decode(part, skip_special_tokens=True) for part in parts))["input_ids"])


def suffix_with_head(ids: list[int], most: int) -> list[int]:
    """InfLLM's cut of a whole prompt: its first 128 tokens and its end."""
    if len(ids) <= most:
        return ids
    head = min(HEAD, most)
    return ids[:head] + ids[len(ids) - (most - head) :]


def right_words(tokenizer: Tokenizer, document: str, most: int) -> str:
    """L-Eval's cut of a document: 250 words at a time go from its end until it has at most `most` tokens."""
    words = document.split(" ")
    while words and len(encode(tokenizer, " ".join(words), special=False)) > most:
        words = words[:-WORD_STEP]
    return " ".join(words)
