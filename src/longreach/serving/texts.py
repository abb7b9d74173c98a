"""Text out of tokens as they come: whole characters only, and nothing of a stop string, wherever the tokens that write it are cut.

Knows tokenizers and lists of ids; not requests, models or HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from longreach.hf.interfaces import Tokenizer

HALF = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no whole character, or not yet


@dataclass(eq=False)
class Writer:
    """The text of one answer. `push` takes its tokens, `take` hands out what is certain by now; all parts together are the whole text, which is
    `decode(ids)` up to the first stop string, or up to its last whole character.

    Only the last tokens are decoded anew: what an earlier stretch and a new token make together, without what the stretch makes alone, is new. So a token
    costs the same at any length, and a tokenizer that writes the first word of a text differently does so in both. The stretch begins at a whole character and
    has text, or a space behind it would be taken for one at the beginning.
    """

    tokenizer: Tokenizer
    stop: tuple[str, ...] = ()
    stopped: bool = False  # a stop string was written
    _ids: list[int] = field(default_factory=list)  # the last tokens
    _old: int = 0  # so many of them are the earlier stretch
    _sent: int = 0  # characters of these tokens' text that were handed on
    _held: str = ""  # whole characters that may be the beginning of a stop string
    _ready: str = ""

    def push(self, token: int) -> bool:
        """-> whether a stop string ends the answer with this token."""
        self._ids.append(token)
        text = decode(self.tokenizer, self._ids)
        whole = text.rstrip(HALF)
        if len(whole) > self._sent:
            self._add(whole[self._sent :])
            self._sent = len(whole)
        if whole == text and (newer := decode(self.tokenizer, self._ids[self._old :])):
            self._ids, self._old, self._sent = self._ids[self._old :], len(self._ids) - self._old, len(newer)
        return self.stopped

    def take(self, last: bool = False) -> str:
        """What was written since. `last`: no further token comes, so that nothing is held back but half a character, which the answer ends before."""
        if last and not self.stopped:
            self._ready, self._held = self._ready + self._held, ""
        found, self._ready = self._ready, ""
        return found

    def _add(self, text: str) -> None:
        if self.stopped:
            return
        text = self._held + text
        found = min((at for end in self.stop if (at := text.find(end)) >= 0), default=None)
        self.stopped = found is not None
        keep = len(text) if found is not None else max((begun(text, end) for end in self.stop), default=0)
        self._ready += text[:found] if found is not None else text[: len(text) - keep]
        self._held = "" if found is not None else text[len(text) - keep :]


def begun(text: str, end: str) -> int:
    """How many characters at the end of a text may be the beginning of `end`."""
    return next((n for n in range(min(len(text), len(end) - 1), 0, -1) if text.endswith(end[:n])), 0)


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def longest_token(tokenizer: Tokenizer) -> int | None:
    """How many characters of a text a token stands for at most. None where nobody can say: a tokenizer may collapse spaces, drop what it does not know, or make
    one token of any long word. One of all bytes that changes no text before it cuts it does none of this. NFC makes one character of four at most (UAX 15)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return None
    said = json.loads(backend.to_str())
    normalizer, steps, model = said.get("normalizer"), said.get("pre_tokenizer") or {}, said["model"]
    steps = steps.get("pretokenizers", [steps])
    kinds = {step.get("type") for step in steps}
    cuts = "ByteLevel" in kinds and kinds <= {"ByteLevel", "Digits", "Split"} and all(step.get("behavior") != "Removed" for step in steps)
    added = said.get("added_tokens", [])
    takes_more = any(token["lstrip"] or token["rstrip"] for token in added)  # all spaces beside it
    whole = model["type"] == "BPE" and set(bytes_to_unicode().values()) <= model["vocab"].keys() and said.get("truncation") is None
    if not cuts or not whole or takes_more or (normalizer or {"type": "NFC"})["type"] != "NFC":
        return None
    return max(map(len, [*model["vocab"], *(token["content"] for token in added)])) * (4 if normalizer else 1)


def speller(tokenizer: Tokenizer) -> Callable[[int], tuple[str, list[int] | None]]:
    """-> what says how a token is written: its text, special tokens too, and its bytes; None where they are part of a character and the tokenizer does not
    say which."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = {character: byte for byte, character in bytes_to_unicode().items()}

    def spell(token: int) -> tuple[str, list[int] | None]:
        text = str(tokenizer.decode([token], skip_special_tokens=False))
        if HALF not in text:
            return text, list(text.encode())
        piece = str(tokenizer.convert_ids_to_tokens(token))
        if piece.startswith("<0x") and len(piece) == 6:
            return text, [int(piece[3:5], 16)]
        return text, [table[character] for character in piece] if all(character in table for character in piece) else None

    return spell
