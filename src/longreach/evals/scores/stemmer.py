"""Porter's stemmer for English (Program 14, 1980), with the departures of NLTK, which the published ROUGE scores with stemming were made with.

Knows single lower-case words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

IRREGULAR = {
    "skies": "sky", "sky": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "innings": "inning", "inning": "inning",
    "outings": "outing", "outing": "outing", "cannings": "canning", "canning": "canning", "howe": "howe", "proceed": "proceed", "exceed": "exceed",
    "succeed": "succeed",
}  # fmt: skip
Condition = Callable[[str], bool]
Rule = tuple[str, str, Condition]


def stem(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) <= 2:
        return word
    for step in (_plural, _past, _final_y, _double_suffix, _adjective, _residual, _final_e, _final_l):
        word = step(word)
    return word


def shape(word: str) -> str:
    """A letter for each letter: v for a vowel, c for a consonant. A y is a vowel after a consonant."""
    kinds: list[str] = []
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and bool(kinds) and kinds[-1] == "c")
        kinds.append("v" if vowel else "c")
    return "".join(kinds)


def measure(word: str) -> int:
    """How often a consonant follows a vowel."""
    return shape(word).count("vc")


def _apply(word: str, rules: Sequence[Rule]) -> str:
    """The first rule whose suffix fits decides, also where its condition then keeps the word as it is."""
    for suffix, replacement, condition in rules:
        if word.endswith(suffix):
            rest = word[: len(word) - len(suffix)]
            return rest + replacement if condition(rest) else word
    return word


def _rules(text: str, condition: Condition) -> list[Rule]:
    """ "ational>ate ness>" -> rules that hold under one condition."""
    return [(suffix, replacement, condition) for suffix, _, replacement in (rule.partition(">") for rule in text.split())]


def _always(rest: str) -> bool:
    return True


def _long(rest: str) -> bool:
    return measure(rest) > 0


def _longer(rest: str) -> bool:
    return measure(rest) > 1


def _has_vowel(rest: str) -> bool:
    return "v" in shape(rest)


def _ends_double(word: str) -> bool:
    return len(word) > 1 and word[-1] == word[-2] and shape(word)[-1] == "c"


def _ends_short(word: str) -> bool:
    """Consonant, vowel, consonant other than w, x, y; or a word of a vowel and a consonant."""
    kinds = shape(word)
    return (kinds.endswith("cvc") and word[-1] not in "wxy") or kinds == "vc"


def _plural(word: str) -> str:
    if len(word) == 4 and word.endswith("ies"):
        return word[:-1]
    return _apply(word, _rules("sses>ss ies>i ss>ss s>", _always))


def _past(word: str) -> str:
    if word.endswith("ied"):
        return word[:-1] if len(word) == 4 else word[:-2]
    if word.endswith("eed"):
        return word[:-1] if _long(word[:-3]) else word
    rest = next((word[: -len(suffix)] for suffix in ("ed", "ing") if word.endswith(suffix) and _has_vowel(word[: -len(suffix)])), None)
    if rest is None:
        return word
    if re.search("(at|bl|iz)$", rest):
        return rest + "e"
    if _ends_double(rest):
        return rest if rest[-1] in "lsz" else rest[:-1]
    return rest + "e" if measure(rest) == 1 and _ends_short(rest) else rest


def _final_y(word: str) -> str:
    return _apply(word, [("y", "i", lambda rest: len(rest) > 1 and shape(rest)[-1] == "c")])


def _double_suffix(word: str) -> str:
    if word.endswith("alli") and _long(word[:-4]):
        return _double_suffix(word[:-2])
    rules = _rules(
        "ational>ate tional>tion enci>ence anci>ance izer>ize bli>ble alli>al entli>ent eli>e ousli>ous ization>ize ation>ate ator>ate alism>al "
        "iveness>ive fulness>ful ousness>ous aliti>al iviti>ive biliti>ble fulli>ful",
        _long,
    )
    return _apply(word, [*rules, ("logi", "log", lambda rest: _long(rest + "l"))])


def _adjective(word: str) -> str:
    return _apply(word, _rules("icate>ic ative> alize>al iciti>ic ical>ic ful> ness>", _long))


def _residual(word: str) -> str:
    before = _rules("al> ance> ence> er> ic> able> ible> ant> ement> ment> ent>", _longer)
    ion: Rule = ("ion", "", lambda rest: _longer(rest) and rest[-1:] in ("s", "t"))
    return _apply(word, [*before, ion, *_rules("ou> ism> ate> iti> ous> ive> ize>", _longer)])


def _final_e(word: str) -> str:
    rest = word[:-1]
    return rest if word.endswith("e") and (_longer(rest) or (measure(rest) == 1 and not _ends_short(rest))) else word


def _final_l(word: str) -> str:
    return _apply(word, [("ll", "l", lambda rest: _longer(rest + "l"))])
