"""Scores of an answer against references, as the published benchmarks define them. Each is in 0..1 and defined for every string.

Knows texts; not samples, tasks or models. Only Chinese word segmentation needs a package (jieba), and says so.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from longreach.evals.scores import subsequences

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
CHINESE_PUNCTUATION = str.maketrans(
    "",
    "",
    string.punctuation
    + "".join(chr(c + 0xFEE0) for c in map(ord, string.punctuation) if chr(c) != ".")  # the full-width forms; the full stop's is not in the published set
    + "｡。｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏",
)
MOST_STEPS = 989  # of the published recursive ROUGE within Python's limit of 1000 calls; LongBench counts a failure as 0


# -- normal forms -------------------------------------------------------------------------------------------------------------


def squad_norm(text: str) -> str:
    """Lower case, no ASCII punctuation, no articles, single spaces; in this order."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def zh_norm(text: str) -> str:
    """Lower case, no ASCII or Chinese punctuation, no white space."""
    return "".join(text.lower().translate(CHINESE_PUNCTUATION).split())


def first_line(text: str) -> str:
    return text.lstrip("\n").split("\n", 1)[0]


def printable(text: str) -> str:
    """Stripped, with line ends in place of control characters, as RULER reads an answer."""
    return re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip()


def blanked(text: str, marks: str) -> str:
    """With a space in place of every mark."""
    return text.translate(dict.fromkeys(map(ord, marks), " "))


def chinese_words(text: str) -> list[str]:
    """The words that jieba finds. `require_jieba` is for the beginning of a run, so that a missing package costs no answers."""
    require_jieba()
    import jieba

    return list(jieba.cut(text, cut_all=False))


def require_jieba() -> None:
    try:
        import jieba  # noqa: F401
    except ImportError as error:
        raise ValueError("scores of Chinese answers need jieba, which is not installed; run pip install jieba, or leave the Chinese tasks out") from error


# -- words in common ----------------------------------------------------------------------------------------------------------


def overlap_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of tokens."""
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def token_f1(answer: str, reference: str) -> float:
    return overlap_f1(squad_norm(answer).split(), squad_norm(reference).split())


def token_f1_zh(answer: str, reference: str) -> float:
    return overlap_f1(*([word for word in map(zh_norm, chinese_words(text)) if word] for text in (answer, reference)))


def character_f1(answer: str, reference: str) -> float:
    """F1 of the characters, for languages without spaces."""
    return overlap_f1(zh_norm(answer), zh_norm(reference))


def contains_all(answer: str, references: Sequence[str]) -> float:
    """The share of the references that the answer contains, whatever their case."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references) if references else 0.0


def contains_any(answer: str, references: Sequence[str]) -> float:
    return float(any(reference.lower() in answer.lower() for reference in references))


def best(scorer: Any, answer: str, references: Iterable[str]) -> float:
    """The highest score against any of the references."""
    return max((scorer(answer, reference) for reference in references), default=0.0)


# -- numbers, classes, lines of code ------------------------------------------------------------------------------------------


def first_int(answer: str) -> str | None:
    """The first run of digits."""
    found = re.search(r"[0-9]+", answer)
    return found[0] if found else None


def whole(text: str) -> int | None:
    """The number that a word is, as Python reads it; None too for one of thousands of digits."""
    try:
        return int(text)
    except ValueError:
        return None


def count_score(answer: str, reference: str) -> float:
    """The share of the numbers in the answer that are the right one."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval_score(answer: str, reference: str) -> float:
    """`count_score` for the number in "Paragraph 7" or "段落7"."""
    named = re.search(r"(?:Paragraph |段落)(\d+)", reference)
    return count_score(answer, named[1] if named else reference)


def cls_score(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the answer names, if the right one is among them.

    Names within the right name do not count. As published, the list is shortened while it is gone through, so that the entry after one
    that was removed is passed over; published numbers contain this.
    """
    named = [name for name in classes if name in answer]
    at = 0
    while at < len(named):
        if named[at] in reference and named[at] != reference:
            named.remove(named[at])
        at += 1
    return 1 / len(named) if reference in named else 0.0


def code_line(answer: str) -> str:
    """The first line that is neither a comment nor a fence."""
    lines = answer.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")


def edit_ratio(a: str, b: str) -> float:
    """Matching blocks of difflib, rounded to hundredths as the published scores are."""
    if a == b:
        return 1.0
    if not a or not b or 2 * min(len(a), len(b)) < 0.005 * (len(a) + len(b)):  # rounds to 0; difflib would take minutes for a line of a million characters
        return 0.0
    return round(100 * SequenceMatcher(None, a, b).ratio()) / 100


def indel_ratio(a: str, b: str) -> float:
    """What the same package gives with its C extension: 1 minus insertions and deletions over both lengths, rounded to hundredths.

    In this order of operations: it decides about halves. 17 common characters of 40 and 40 are 0.43, where their share, 34/80, would be 0.42.
    """
    if a == b:
        return 1.0
    both = len(a) + len(b)
    return round(100 * (1 - (both - 2 * subsequences.length(a, b)) / both)) / 100


def code_sim(answer: str, reference: str) -> float:
    return edit_ratio(code_line(answer), reference)


def code_sim_indel(answer: str, reference: str) -> float:
    return indel_ratio(code_line(answer), reference)


# -- ROUGE --------------------------------------------------------------------------------------------------------------------


class Rouge(NamedTuple):
    precision: float
    recall: float
    f: float


NOTHING = Rouge(0.0, 0.0, 0.0)


def rouge_l_set(answer: str, reference: str, *, compat: bool = False) -> Rouge:
    """ROUGE-L as LongBench, LooGLE and M4LE report it: of sets of words, in sentences that end at full stops only.

    compat  nothing at all if the way through one pair of sentences is too long for the published recursive code, as LongBench's numbers contain it.
    """
    said, meant = _sentences(answer), _sentences(reference)
    words = {word for sentence in said for word in sentence}
    wanted = {word for sentence in meant for word in sentence}
    if not words or not wanted:
        return NOTHING
    common: set[str] = set()
    for right in dict.fromkeys(meant):
        known = set(right)
        for sentence in dict.fromkeys(said):
            found, steps = ([], len(sentence)) if known.isdisjoint(sentence) else subsequences.walk(right, sentence)
            if compat and steps > MOST_STEPS:
                return NOTHING
            common.update(right[i] for i, _ in found)
    precision, recall = len(common) / len(words), len(common) / len(wanted)
    return Rouge(precision, recall, 2 * precision * recall / (precision + recall + 1e-8))


def rouge_l_zh(answer: str, reference: str, *, compat: bool = False) -> Rouge:
    """`rouge_l_set` of the words that jieba finds."""
    return rouge_l_set(*(" ".join(chinese_words(text)) for text in (answer, reference)), compat=compat)


def rouge_lsum(answer: str, reference: str) -> Rouge:
    """ROUGE-Lsum as Google's package defines it, without stems: of lower-case words of a to z and digits; every line is a sentence, and a word
    counts no more often than both texts have it. (The package gives the same numbers, but brings NLTK and is fifteen times as slow.)"""
    said, meant = ([re.findall("[a-z0-9]+", line.lower()) for line in text.split("\n") if line] for text in (answer, reference))
    left, missing = (Counter(term for sentence in text for term in sentence) for text in (said, meant))
    terms, wanted = left.total(), missing.total()
    hits = 0
    for right in meant:
        union: set[int] = set()
        for sentence in dict.fromkeys(map(tuple, said)):
            union.update(j for _, j in subsequences.pairs(sentence, right))
        for j in sorted(union):
            if left[right[j]] > 0 and missing[right[j]] > 0:
                left[right[j]] -= 1
                missing[right[j]] -= 1
                hits += 1
    if not hits:
        return NOTHING
    precision, recall = hits / terms, hits / wanted
    return Rouge(precision, recall, 2 * precision * recall / (precision + recall))


def _sentences(text: str) -> list[tuple[str, ...]]:
    """What stands between full stops. Blanks alone, as after a last full stop, are a sentence of one empty word: published numbers count it."""
    return [tuple(part.split()) or ("",) for part in text.split(".") if part]
