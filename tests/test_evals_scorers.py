"""Scorers: golden values, a slow truth beside every fast path, the packages whose numbers they reproduce, and every string is scored."""

from __future__ import annotations

import random
import string

import pytest

from longreach.evals.scores import scorers, subsequences

CAT = ("The cat sat on the mat. It was happy.", "A cat was sitting on the mat. The cat was very happy.")


def test_golden_values():
    assert scorers.token_f1("The Eiffel Tower, in Paris!", "Eiffel Tower") == pytest.approx(0.66667, abs=1e-5)
    assert scorers.token_f1("yes", "Yes.") == 1
    assert scorers.rouge_l_set(*CAT).f == pytest.approx(0.73684, abs=1e-5)
    assert scorers.rouge_lsum(*CAT).f == pytest.approx(0.571, abs=1e-3)
    assert scorers.cls_score("Other location", "Other location", ["location", "Other location", "Abbreviation"]) == 1
    assert scorers.cls_score("City and Country", "City", ["City", "Country"]) == 0.5
    assert scorers.count_score("There are 12 unique, out of 30", "12") == 0.5


def test_class_scores_pass_over_the_entry_after_a_removed_one():
    """Both shorter names lie within the right one, but only the first is removed."""
    assert scorers.cls_score("abc", "abc", ["a", "ab", "abc"]) == 0.5
    assert scorers.cls_score("abc", "x", ["a", "ab", "abc"]) == 0


def test_numbers_and_lines():
    assert scorers.retrieval_score("It is paragraph 7, of 30", "Paragraph 7") == 0.5
    assert scorers.retrieval_score("段落7", "段落7") == 1
    assert scorers.first_int("no. 0042-7") == "0042" and scorers.first_int("none") is None
    assert scorers.code_line("\n# a comment\n```\nx = 1\ny = 2") == "x = 1"
    assert scorers.code_sim("```\nreturn a + b\n```", "return a + b") == 1
    assert scorers.edit_ratio("abcd", "bcde") == 0.75
    assert scorers.indel_ratio("kitten", "sitting") == 0.62
    assert scorers.edit_ratio("", "") == scorers.indel_ratio("", "") == 1 and scorers.edit_ratio("", "a") == scorers.indel_ratio("a", "") == 0
    assert scorers.contains_all("Paris and ROME", ["paris", "Rome", "Oslo"]) == pytest.approx(2 / 3) and scorers.contains_any("in oslo", ["Oslo"]) == 1
    assert scorers.first_line("\n\none\ntwo") == "one" and scorers.printable(" a\x00b\n ") == "a\nb"


def test_normal_forms():
    assert scorers.squad_norm("The  U.S.A.: an Answer") == "usa answer"
    assert scorers.zh_norm("“你好”，世界 ABC!") == "你好世界abc"
    assert scorers.character_f1("你好吗", "你好") == pytest.approx(0.8)


# -- slow truths --------------------------------------------------------------------------------------------------------------


def table(a, b):
    lengths = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if x == y else max(lengths[i][j + 1], lengths[i + 1][j])
    return lengths


def backtrack(a, b):
    lengths, i, j, found = table(a, b), len(a), len(b), []
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            found.insert(0, (i, j))
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def some(rng, alphabet="abcd", most=30):
    return [rng.choice(alphabet) for _ in range(rng.randrange(most))]


def test_bits_are_the_table_of_common_subsequences():
    rng = random.Random(0)
    for _ in range(300):
        a, b = some(rng), some(rng)
        assert subsequences.length(a, b) == subsequences.length(b, a) == table(a, b)[-1][-1]
        assert subsequences.pairs(a, b) == backtrack(a, b)


def text(rng):
    words = ["cat", "Cat", "mat", "a", "sat", "running", "happily", "studies"]
    return "".join(rng.choice(words) + rng.choice([" ", " ", " ", ". ", ".\n", "? ", "\n"]) for _ in range(rng.randrange(25)))


def slow_rouge_l_set(answer, reference):
    said, meant = ([s.split() or [""] for s in t.split(".") if s] for t in (answer, reference))
    if not said or not meant:
        return 0.0
    union = {right[i] for right in meant for sentence in said for i, _ in backtrack(right, sentence)}
    precision, recall = (len(union) / len({w for s in sentences for w in s}) for sentences in (said, meant))
    return 2 * precision * recall / (precision + recall + 1e-8)


def test_rouge_of_sets_is_its_definition():
    rng = random.Random(1)
    for _ in range(200):
        answer, reference = text(rng), text(rng)
        assert scorers.rouge_l_set(answer, reference).f == pytest.approx(slow_rouge_l_set(answer, reference), abs=1e-12)


def test_rouge_of_sets_is_that_of_the_package():
    package = pytest.importorskip("rouge", reason="the package whose numbers are reproduced is not installed (pip install rouge)")
    rng = random.Random(4)
    for _ in range(500):
        answer, reference = text(rng), text(rng)
        if not answer.strip(".") or not reference.strip("."):
            continue  # the package raises where there is nothing between full stops
        theirs = package.Rouge().get_scores([answer], [reference])[0]["rouge-l"]
        assert scorers.rouge_l_set(answer, reference) == pytest.approx((theirs["p"], theirs["r"], theirs["f"]))


def test_long_sentences_count_as_nothing_where_published_code_failed():
    """989 steps through the table are within Python's limit, 990 are not; a step may take a word of both sides."""
    words = [f"w{i}" for i in range(990)]
    fits, long = " ".join(words[:989]), " ".join(words)
    assert scorers.rouge_l_set(fits, fits, compat=True) == scorers.rouge_l_set(fits, fits) and scorers.rouge_l_set(long, long).f == pytest.approx(1)
    assert scorers.rouge_l_set(long, long, compat=True).f == 0
    assert scorers.rouge_l_set(f"z {fits}", "z", compat=True).f == scorers.rouge_l_set("z", f"z {fits}", compat=True).f == 0
    assert scorers.rouge_l_set(f"z. {fits}", "z", compat=True).f > 0 and scorers.rouge_l_set(f"z. {long}", "z", compat=True).f == 0
    assert scorers.rouge_l_set(*CAT, compat=True) == scorers.rouge_l_set(*CAT)


def test_steps_are_those_of_the_walk():
    rng = random.Random(5)
    for _ in range(300):
        a, b = some(rng), some(rng)
        found, steps = subsequences.walk(a, b)
        lengths, i, j, count = table(a, b), len(a), len(b), 0
        while i and j:
            if a[i - 1] == b[j - 1]:
                i, j = i - 1, j - 1
            elif lengths[i - 1][j] > lengths[i][j - 1]:
                i -= 1
            else:
                j -= 1
            count += 1
        assert steps == count and found == subsequences.pairs(a, b)


def test_googles_rouge():
    package = pytest.importorskip("rouge_score.rouge_scorer", reason="the package whose numbers are reproduced is not installed (pip install rouge-score)")
    rng = random.Random(2)
    theirs = package.RougeScorer(["rougeLsum"])
    for _ in range(300):
        answer, reference = text(rng), text(rng)
        assert tuple(scorers.rouge_lsum(answer, reference)) == tuple(theirs.score(reference, answer)["rougeLsum"])


def test_rouge_of_lines_counts_a_word_once():
    assert scorers.rouge_lsum("the cat\nthe dog", "the dog\nthe cat").f == 1
    assert scorers.rouge_lsum("cat cat", "cat\ncat").recall == 1 and scorers.rouge_lsum("cat", "cat\ncat").recall == 0.5


# -- every string -------------------------------------------------------------------------------------------------------------

LONG = 10**6
STRINGS = ["", " ", "\n\n", string.punctuation * 9, "\ud800 \udfff", "ab " * (LONG // 3), "x" * LONG, "a b. c " * (LONG // 7), ". " * (LONG // 2), "9" * LONG]
IDS = ["empty", "space", "lines", "punctuation", "surrogates", "words", "one word", "sentences", "full stops", "digits"]
GOLD = "the cat sat on ab, c. x 9"
SCORES = {
    "token_f1": scorers.token_f1,
    "character_f1": scorers.character_f1,
    "rouge_l_set": lambda a, g: scorers.rouge_l_set(a, g).f,
    "rouge_l_set compat": lambda a, g: scorers.rouge_l_set(a, g, compat=True).f,
    "rouge_lsum": lambda a, g: scorers.rouge_lsum(a, g).f,
    "count": scorers.count_score,
    "retrieval": scorers.retrieval_score,
    "code_sim": scorers.code_sim,
    "code_sim_indel": scorers.code_sim_indel,
    "cls": lambda a, g: scorers.cls_score(a, g, ["the cat", g]),
    "contains": lambda a, g: scorers.contains_any(a, [g]),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("answer", STRINGS, ids=IDS)
def test_every_string_has_a_score(answer, name):
    assert 0 <= SCORES[name](answer, GOLD) <= 1
    if len(answer) < 100:
        assert 0 <= SCORES[name](GOLD, answer) <= 1


@pytest.mark.parametrize("answer", STRINGS, ids=IDS)
def test_normal_forms_stay_as_they_are(answer):
    for norm in (scorers.squad_norm, scorers.zh_norm, scorers.first_line, scorers.printable):
        assert norm(norm(answer)) == norm(answer)


def test_f1_is_symmetric_and_one_for_the_same():
    rng = random.Random(3)
    for _ in range(100):
        a, b = text(rng), text(rng)
        assert scorers.token_f1(a, b) == scorers.token_f1(b, a)
        assert scorers.token_f1(a, a) == float(bool(scorers.squad_norm(a)))
        assert scorers.indel_ratio(a, b) == scorers.indel_ratio(b, a)
        assert all(value <= 1 for score in (scorers.rouge_l_set, scorers.rouge_lsum) for value in score(a, b))


def test_chinese_needs_jieba_and_says_so(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ValueError, match="pip install jieba"):
        scorers.token_f1_zh("你好", "你好")


def test_chinese_words():
    pytest.importorskip("jieba", reason="jieba is not installed (pip install jieba)")
    assert scorers.token_f1_zh("北京是中国的首都。", "北京是中国的首都") == 1
    assert 0 < scorers.token_f1_zh("首都是北京", "北京") < 1
    assert scorers.rouge_l_zh("北京是首都", "北京是首都").f == pytest.approx(1) and scorers.rouge_l_zh("", "北京").f == 0
