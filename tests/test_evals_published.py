"""Our scores beside the published rules on thousands of awkward answers.

The truths here are written from the definitions, step by step and slowly, with other means than the scorers; where a published package is at hand
it is the truth. Rules that look like slips are kept: published numbers contain them.
"""

# ruff: noqa: RUF001
# Letters of many scripts are the point here.

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from fractions import Fraction
from itertools import groupby
from math import comb
from time import perf_counter

import pytest

from longreach.evals import tasks as registry
from longreach.evals.samples.base import Parts, Sample
from longreach.evals.scores import scorers, statistics
from longreach.evals.tasks.ancestral_trace import box, boxed_match

COUNT = 3000
PIECES = [
    "A", "B", "C", "D", "AB", "BCD", "e", "a", "the", "an", " ", "  ", "\n", "\n\n", "\t", ".", ":", ",", "-", "*", "`", "'", '"', "?", "!", "{", "}", "#",
    "//", "answer is:", "answer:", "answer is", "is:", "option is", "correct option is:", "Option", "option", "pkg.load", "Ann", "ANN", "Annabel", "Peter Bo",
    "Bo", "42", "-42", "+42", "4_2", "042", "４２", "88", "８８", "88.0", "93.5", "93.50", "71432", "7", "12", "Paragraph 7", "段落7", "x = 1", "return a",
    "None",
    "\x00", "\x07", "\x1c", "\x85", "\u2028", "\u3000", "\ud800", "ß", "İ", "ﬁ", "你好", "北京", "，", "。", "！", "“", "…", "Ａ", "．",
]  # fmt: skip


def text(rng: random.Random, most: int = 8, pieces: Sequence[str] = PIECES) -> str:
    return "".join(rng.choice(pieces) + rng.choice(["", " ", ""]) for _ in range(rng.randrange(most)))


def sample(references: Sequence[str], **meta: object) -> Sample:
    return Sample("x", Parts("d"), tuple(references), 1, meta)


def differences(name: str, cases: Callable[[random.Random], tuple[Sample, str, float]], metric: str | None = None) -> list[tuple[object, ...]]:
    """Answers whose score is not the published one, of a fixed stream of cases; the stream must have right and wrong ones."""
    task, rng, found, seen = registry.task(name), random.Random(name), [], set()
    for _ in range(COUNT):
        asked, answer, published = cases(rng)
        ours = task.score(asked, answer)[metric or task.metric]
        seen.add(published > 0)
        if abs(ours - published) > 1e-9:
            found.append((answer, asked.references, ours, published))
    assert seen == {False, True}, "these cases tell nothing"
    return found


# -- InfiniteBench ------------------------------------------------------------------------------------------------------------


def without(answer: str, marks: Sequence[str]) -> str:
    for mark in marks:
        answer = " ".join(answer.split(mark))
    return answer


def squeezed(answer: str) -> str:
    while "  " in answer:
        answer = answer.replace("  ", " ")
    return answer


def led(answer: str, leads: Sequence[str], accepted: Sequence[str]) -> bool | None:
    for lead in leads:
        at = answer.find(lead)
        if at >= 0:
            rest = answer[at + len(lead) :]
            return len(rest) > 0 and any(rest[1 : 1 + len(one)] == one for one in accepted)
    return None


def code_run(answer: str, value: int) -> bool:
    words = without(answer, list("\n.`'\":")).split()
    try:
        return int(words[-1]) == value
    except (IndexError, ValueError):
        return False


def code_debug(answer: str, letter: str, name: str) -> bool:
    answer = answer.strip()
    if len(answer) > 1 and answer[0] == letter and answer[1] in ".:":
        return True
    answer = squeezed(without(answer, ["\n", "`", "'", '"', "-", "*", "Option", "option"]))
    return bool(led(answer, ["answer is:", "is:", "answer:", "correct option is:"], [letter, name]))


def choice(answer: str, letter: str, option: str) -> bool:
    answer = answer.strip()
    if not answer:
        return False
    if answer[0] in {"A", "B", "C", "D"}:
        return answer[0] in (letter, option)
    if answer in (letter, option):
        return True
    answer = squeezed(without(answer, list("\n\"'.,?!{}")))
    found = led(answer, ["answer is:", "answer:", "answer is", "option is"], [letter, option])
    if found is not None:
        return found
    runs = {"ABCD"[i:j] for i in range(4) for j in range(i + 1, 5)}
    first = [word for word in answer.split() if word in runs][:1]
    return first in ([letter], [option])


def dialogue(answer: str, name: str) -> bool:
    return any(word.upper() == name for word in without(answer, list("\n:\"'.,?!{}")).split())


def first_number(answer: str) -> float | None:
    """Digits of any script; a point counts if there is a digit after it."""
    for i, character in enumerate(answer):
        if character.isdecimal():
            j = i
            while j < len(answer) and answer[j].isdecimal():
                j += 1
            if answer[j : j + 1] == "." and answer[j + 1 : j + 2].isdecimal():
                j += 1
                while j < len(answer) and answer[j].isdecimal():
                    j += 1
            return float(answer[i:j])
    return None


def options(rng: random.Random) -> tuple[str, str]:
    return rng.choice("ABCD"), rng.choice(["Ann", "Bo", "pkg.load", "AB", "Peter Bo", "a B"])


def test_code_run():
    def case(rng):
        value, answer = rng.choice([42, -42, 7, 88]), text(rng)
        return sample([str(value)]), answer, code_run(answer, value)

    assert differences("infinitebench-code-run", case) == []


def test_code_debug():
    def case(rng):
        right, answer = options(rng), text(rng)
        return sample(right), answer, code_debug(answer, *right)

    assert differences("infinitebench-code-debug", case) == []


def test_book_choice():
    def case(rng):
        right, answer = options(rng), text(rng)
        return sample(right), answer, choice(answer, *right)

    assert differences("infinitebench-longbook-choice-eng", case) == []


def test_dialogue():
    def case(rng):
        names, answer = rng.choice([["ANN"], ["BO", "ANN"], ["Ann"], ["MR. BO"], ["SS"], ["FI"]]), text(rng)
        return sample(names), answer, dialogue(answer, names[0])

    assert differences("infinitebench-longdialogue-qa-eng", case) == []


def test_math_find():
    def case(rng):
        value, answer = rng.choice([42, 88, 93.5, 7, 88.0]), text(rng)
        return sample([str(value)]), answer, first_number(answer) == value

    assert differences("infinitebench-math-find", case) == []


@pytest.mark.parametrize("name", ["infinitebench-official-passkey", "infinitebench-official-number-string", "infinitebench-number-string"])
def test_first_digits(name):
    def case(rng):
        key, answer = rng.choice(["42", "71432", "7", "042"]), text(rng)
        runs = "".join(c if c in string.digits else " " for c in answer).split()
        return sample([key]), answer, runs[:1] == [key]

    assert differences(name, case) == []


@pytest.mark.parametrize("name", ["infinitebench-official-kv-retrieval", "infinitebench-kv-retrieval"])
def test_values_among_words(name):
    def case(rng):
        value, answer = rng.choice(["42", "B", "Ann", "你好"]), text(rng)
        return sample([value]), answer, value in without(answer, list("\n:\"'.,?!{}")).split()

    assert differences(name, case) == []


# -- words in common ----------------------------------------------------------------------------------------------------------

CHINESE = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."


def words_of(answer: str) -> list[str]:
    """Lower case, no ASCII punctuation, a blank for every article. An article ends at any character that makes no word, such as a quote of print."""
    kept = "".join(c for c in answer.lower() if c not in string.punctuation)
    runs = ["".join(run) for _, run in groupby(kept, str.isalnum)]
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def f1(a: Sequence[str], b: Sequence[str]) -> float:
    left, common = Counter(b), 0
    for item in a:
        if left[item] > 0:
            left[item], common = left[item] - 1, common + 1
    if not common:
        return 0.0
    precision, recall = Fraction(common, len(a)), Fraction(common, len(b))
    return float(2 * precision * recall / (precision + recall))


@pytest.mark.parametrize("name", ["longbench-qasper", "longbench-triviaqa", "infinitebench-longbook-qa-eng"])
def test_f1_of_words(name):
    def case(rng):
        golds, answer = [text(rng), text(rng)], text(rng)
        line = answer.lstrip("\n").split("\n")[0] if name == "longbench-triviaqa" else answer
        return sample(golds, all_classes=[]), answer, max(f1(words_of(line), words_of(gold)) for gold in golds)

    assert differences(name, case) == []


def test_f1_of_characters():
    def characters(answer):
        return [c for c in answer.lower() if not c.isspace() and c not in string.punctuation + CHINESE]

    def case(rng):
        golds, answer = [text(rng), text(rng)], text(rng)
        return sample(golds), answer, max(f1(characters(answer), characters(gold)) for gold in golds)

    assert differences("infinitebench-longbook-qa-chn", case) == []


def test_f1_of_chinese_words():
    jieba = pytest.importorskip("jieba", reason="jieba is not installed (pip install jieba)")

    def cut(answer):
        words = ["".join(c for c in word.lower() if not c.isspace() and c not in string.punctuation + CHINESE) for word in jieba.cut(answer)]
        return [word for word in words if word]

    def case(rng):
        golds, answer = [text(rng), text(rng)], text(rng)
        return sample(golds, all_classes=[]), answer, max(f1(cut(answer), cut(gold)) for gold in golds)

    assert differences("longbench-multifieldqa-zh", case) == []


# -- LongBench: classes, numbers, code ------------------------------------------------------------------------------------------


def test_classes():
    def published(answer, gold, classes):
        named = [name for name in classes if name in answer]
        for name in named:  # the list is shortened while it is gone through
            if name in gold and name != gold:
                named.remove(name)
        return 1 / len(named) if gold in named else 0.0

    def case(rng):
        classes = rng.sample(PIECES, 8)
        gold, answer = rng.choice(classes), text(rng, 12)
        return sample([gold], all_classes=classes), answer, published(answer.lstrip("\n").split("\n")[0], gold, classes)

    assert differences("longbench-trec", case) == []


@pytest.mark.parametrize(("name", "gold"), [("passage-count", "{}"), ("passage-retrieval-en", "Paragraph {}"), ("passage-retrieval-zh", "段落{}")])
def test_shares_of_numbers(name, gold):
    def case(rng):
        number, answer = rng.choice(["7", "12", "42"]), text(rng)
        runs = "".join(c if c.isdecimal() else " " for c in answer).split()
        return sample([gold.format(number)], all_classes=[]), answer, runs.count(number) / len(runs) if runs else 0.0

    assert differences(f"longbench-{name}", case) == []


def code_line(answer: str) -> str:
    while answer[:1] == "\n":
        answer = answer[1:]
    kept = [line for line in answer.split("\n") if line.count("`") + line.count("#") + line.count("//") == 0]
    return kept[0] if kept else ""


def test_code_by_difflib():
    """Rounded to hundredths, a half to the even one."""

    def case(rng):
        gold, answer = text(rng, 20), text(rng, 20)
        line = code_line(answer)
        return sample([gold], all_classes=[]), answer, 1.0 if line == gold else round(100 * SequenceMatcher(None, line, gold).ratio()) / 100

    assert differences("longbench-lcc", case) == []


def test_halves_of_indels():
    """As the C extension has them: 17 of 40 characters in common are 43, which a share of 0.425 would round to 42."""
    assert scorers.indel_ratio("a" * 17 + "b" * 23, "a" * 17 + "c" * 23) == 0.43
    assert scorers.indel_ratio("a" * 23 + "b" * 17, "a" * 23 + "c" * 17) == 0.57  # 57.49999999999999


def test_code_by_indels():
    fuzz = pytest.importorskip("rapidfuzz.fuzz", reason="the package whose numbers are reproduced is not installed (pip install rapidfuzz)")
    for both in range(2, 200):
        for common in range(both // 2 + 1):
            a, b = "a" * common + "b" * (both // 2 - common), "a" * common + "c" * (both - both // 2 - common)
            assert scorers.indel_ratio(a, b) == round(fuzz.ratio(a, b)) / 100, (common, both)

    def case(rng):
        gold, answer = text(rng, 20), text(rng, 20)
        return sample([gold], all_classes=[]), answer, round(fuzz.ratio(code_line(answer), gold)) / 100

    assert differences("longbench-repobench-p", case, "code_sim_indel") == []


@pytest.mark.parametrize(("name", "metric"), [("longbench-gov-report", "f"), ("longbench-samsum", "f"), ("loogle-longdep-qa", "r")])
def test_rouge_of_word_sets(name, metric):
    package = pytest.importorskip("rouge", reason="the package whose numbers are reproduced is not installed (pip install rouge)")

    def published(answer, gold):
        try:
            return package.Rouge().get_scores([answer], [gold])[0]["rouge-l"][metric]
        except ValueError:  # nothing between full stops
            return 0.0

    def case(rng):
        gold, answer = text(rng), text(rng)
        read = {"longbench-samsum": answer.lstrip("\n").split("\n")[0], "loogle-longdep-qa": answer or "None"}.get(name, answer)
        return sample([gold], all_classes=[]), answer, published(read, gold)

    assert differences(name, case) == []


def test_an_empty_answer_to_loogle_is_the_word_none():
    task = registry.task("loogle-longdep-qa")
    assert task.score(sample(["None of it"]), "")["rouge_l_recall"] == pytest.approx(1 / 3) and task.score(sample(["x"]), "")["rouge_l_recall"] == 0


# -- RULER, NeedleBench -------------------------------------------------------------------------------------------------------


def readable(answer: str) -> str:
    return "".join("\n" if ord(c) < 32 else c for c in answer.strip()).strip()


@pytest.mark.parametrize("name", [name for name, task in registry.tasks().items() if task.group == "ruler"])
def test_ruler(name):
    """The share of the references that stand in the answer; for its two tasks of questions whether any does."""

    def case(rng):
        references, answer = [text(rng, 3) or "x" for _ in range(rng.randint(1, 4))], text(rng)
        found = [readable(answer).lower().find(reference.lower()) >= 0 for reference in references]
        return sample(references), answer, any(found) if name.startswith("ruler-qa") else float(Fraction(sum(found), len(found)))

    assert differences(name, case) == []


def inside(answer: str) -> str:
    """What the box that is opened last holds, cleaned of LaTeX in the published order."""
    _, opened, rest = answer.rpartition("\\boxed")
    depth, held = 0, ""
    for at, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if c == "}" and depth == 0:
            held = rest[: at + 1]
            break
    if not opened or not held.startswith("{") or len(held) == 2:
        return ""
    held = held[1:-1]
    if "\n" not in held.removesuffix("\n") and held.startswith("{") and held.removesuffix("\n").endswith("}") and len(held.removesuffix("\n")) > 1:
        held = held.removesuffix("\n")[1:-1]
    for command in ("\\text{", "\\boxed{"):
        done = ""
        while command in held:
            before, _, after = held.partition(command)
            word, closed, later = after.partition("}")
            if closed and word:
                done, held = done + before + word, later
            else:
                done, held = done + before + command, after
        held = done + held
    for mark in ("\\[", "\\]", "\\"):
        held = held.replace(mark, "")
    held = " ".join(held.split())
    return held.replace('"', "").replace("'", "").replace("~", " ").strip()


@pytest.mark.parametrize("name", ["ancestral-trace", "needlebench-multi-reasoning"])
def test_boxes(name):
    pieces = ["\\boxed{", "\\boxed", "\\text{", "}", "{", "Ada Lee", "Ada", "Lee", " ", "~", "'", '"', "\\", "\\[", "\\]", "\n", "\\fbox{", "“", "`",
              "\\boxed{Ada Lee}", "\\boxed{{Ada Lee}}", "\\boxed{\\text{Ada~Lee}}"]  # fmt: skip

    def case(rng):
        answer = "".join(rng.choice(pieces) for _ in range(rng.randrange(8)))
        return sample([box("Ada Lee")]), answer, inside(answer) == "Ada Lee"

    assert differences(name, case) == []
    assert boxed_match("\\boxed{" + "\\text{" * 10**5 + "}" * 10**5 + "}", box("Ada Lee")) == 0.0


# -- statistics ---------------------------------------------------------------------------------------------------------------


def test_mcnemar_is_the_exact_sum():
    rng = random.Random(0)
    pairs = [(0, 0), (0, 1), (1, 0), (5, 5), (0, 2000), (999, 1000), (700, 900), *((rng.randrange(60), rng.randrange(60)) for _ in range(300))]
    for a, b in [*pairs, *((rng.randrange(1500), rng.randrange(1500)) for _ in range(8))]:
        exact = min(1.0, 2 * sum(comb(a + b, k) for k in range(min(a, b) + 1)) / 2 ** (a + b))
        assert statistics.mcnemar(a, b) == exact, (a, b)


def test_mcnemar_is_quick_for_thousands_of_disagreements():
    begun = perf_counter()
    assert 0 < statistics.mcnemar(5200, 5400) < 0.06
    assert statistics.mcnemar(50_000, 50_000) == 1.0
    assert perf_counter() - begun < 1.5
