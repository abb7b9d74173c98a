"""Which parts made the answer: on nano, over texts and conversations, as a page and on the command line."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

import longreach
from commands import refused
from longreach import LMInfinite, SelfExtend, SirLLM, Stock
from longreach.apps import parts
from longreach.apps.attribution import page
from longreach.apps.attribution.attribute import Attribution, Evidence, Places, Scored, Work, attribute, encoded, scored, why
from longreach.apps.attribution.scores import ENSEMBLE, PERMUTATIONS, Alone, LeaveOneOut, named
from longreach.apps.attribution.search import TOP
from longreach.apps.parts import Part, cut
from longreach.cli import main
from longreach.cli.attribute import place
from longreach.running import generation
from longreach.running.conversation import Conversation
from scripts import ROOT
from tiny import llama
from tiny import tokenizer as byte_tokenizer

KEY = "The pass key is 48213. Remember it. 48213 is the pass key.\n\n"
QUESTION, ANSWER = "What is the pass key?", "The pass key is 48213."


@pytest.fixture(scope="module")
def nano() -> Any:
    return longreach.load("nano")


def text(after: int = 6, total: int = 12, key: str = KEY) -> str:
    """Paragraphs of the book, one of which is the key."""
    book = longreach.shipped_book()
    words = [" ".join(book[at : at + 160].split()) + ".\n\n" for at in range(30_000, 30_000 + 160 * total, 160)]
    return "".join([*words[:after], key, *words[after:]])


# -- texts --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, LMInfinite(480, 10)], ids=["the dial", "bounded"])
def test_the_planted_paragraph_is_found_however_prompts_are_read(nano, method):
    model, tokenizer = nano
    with longreach.extend(model, method, context=None if method else 1024) as extension:
        how = dict(by="paragraph", scorers=(Alone(), LeaveOneOut()))
        seen: list[tuple[int, int]] = []
        found = attribute(extension, tokenizer, text(7, 9), QUESTION, max_new_tokens=16, progress=lambda *at: seen.append(at), **how)
        single = attribute(extension, tokenizer, text(7, 9), QUESTION, found.answer, at_once=1, chunk_size=64, **how)
    assert found.answer.strip() == ANSWER and found.count == 10 and found.complete
    best = found.parts[0]
    assert best.text == KEY == text(7, 9)[best.start : best.stop] and best.turn is None
    assert {*best.scores} == {"alone", "leave-one-out"} and best.score == max(best.scores["alone"], 2 * best.scores["leave-one-out"]) > 5 > found.parts[1].score
    assert found.evidence.whole > found.evidence.without + 5 and found.evidence.only > found.evidence.nothing + 5
    assert found.work.tokens_read < 0.8 * found.work.tokens_asked and found.work.one_by_one is None
    assert seen[-1][0] == seen[-1][1] and [*sorted(seen)] == seen
    assert [part.text for part in single.parts] == [part.text for part in found.parts]
    assert [part.score for part in single.parts] == pytest.approx([part.score for part in found.parts], abs=1e-3)
    assert dataclasses.astuple(single.evidence) == pytest.approx(dataclasses.astuple(found.evidence), abs=1e-3)
    assert single.work.forwards > found.work.forwards and single.work.tokens_read == found.work.tokens_read


def test_the_value_is_the_log_probability_in_the_prompt_of_run(nano):
    """The same ids as `longreach run` reads, and exhaustive leave-one-out is what the search finds where nothing is pruned."""
    model, tokenizer = nano
    words, pieces = text(1, 3), cut(text(1, 3), "paragraph")
    answer = encoded(tokenizer, ANSWER)

    def value(extension: Any, left: str) -> float:
        import torch

        ids = tokenizer(f"{left}\n\n{QUESTION}" if left else QUESTION)["input_ids"]
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].double().log_softmax(-1)
        return float(rows[range(len(answer)), answer].sum())

    with longreach.extend(model, Stock()) as extension:
        found = attribute(extension, tokenizer, words, QUESTION, ANSWER, by="paragraph", scorers=(LeaveOneOut(),))
        whole = value(extension, words)
        without = {piece.start: value(extension, "".join(p.text for p in pieces if p is not piece).rstrip() + "\n\n") for piece in pieces}
        assert dataclasses.astuple(found.evidence)[::3] == pytest.approx((whole, value(extension, "")), abs=1e-3)
    assert {part.start: part.score for part in found.parts} == pytest.approx({start: 2 * (whole - v) for start, v in without.items()}, abs=1e-3)


def test_a_method_that_evicts_reads_one_prompt_after_the_other(nano):
    model, tokenizer = nano
    with longreach.extend(model, SirLLM(256, 128)) as extension:
        found = attribute(extension, tokenizer, text(3, 5), QUESTION, ANSWER, by="paragraph", scorers=(LeaveOneOut(),), top=2)
    assert found.parts[0].text == KEY and "evicts" in found.work.one_by_one
    assert found.work.tokens_read >= found.work.tokens_asked


def test_copies_of_the_key_are_all_found(nano):
    """Leave-one-out sees none of them, because the other is still there; the ensemble does."""
    model, tokenizer = nano
    twice = text(2, 4) + text(1, 3)
    with longreach.extend(model, context=1024) as extension:
        found = attribute(extension, tokenizer, twice, QUESTION, ANSWER, by="paragraph", top=2)
        blind = attribute(extension, tokenizer, twice, QUESTION, ANSWER, by="paragraph", top=2, scorers=(LeaveOneOut(),))
    assert [part.text for part in found.parts] == [KEY, KEY] and found.parts[0].start != found.parts[1].start
    assert found.evidence.without < found.evidence.whole - 5
    assert [part.text for part in blind.parts] != [KEY, KEY]


def test_a_search_that_is_stopped_says_what_it_has(nano):
    model, tokenizer = nano
    with longreach.extend(model, context=1024) as extension:
        done: list[int] = []
        how = dict(by="paragraph", top=2, scorers=(Alone(),), progress=lambda n, most: done.append(n))
        found = attribute(extension, tokenizer, text(6, 15), QUESTION, ANSWER, stopped=lambda: len(done) >= 7, **how)
        nothing = attribute(extension, tokenizer, text(6, 15), QUESTION, ANSWER, stopped=lambda: True, **how)
    assert not found.complete and found.evidence is None and len(found.parts) == 2
    assert KEY in found.parts[0].text and found.parts[0].text == text(6, 15)[found.parts[0].start : found.parts[0].stop] != KEY
    assert not nothing.complete and nothing.parts == () and nothing.work.forwards == 0
    assert "stopped" in page.verdict(nothing)


def test_one_part_and_parts_of_ones_own(nano):
    model, tokenizer = nano
    with longreach.extend(model, Stock()) as extension:
        one = attribute(extension, tokenizer, KEY, QUESTION, ANSWER, words=1000)
        own = attribute(extension, tokenizer, KEY, QUESTION, ANSWER, parts=parts.at(KEY, [23, 36]), top=1)
    assert len(one.parts) == one.count == 1 and one.parts[0].text == KEY
    assert len(own.parts) == 1 and own.count == 3


def test_what_is_refused(nano):
    model, tokenizer = nano
    with longreach.extend(model, context=600) as extension:
        for says, given, how in [
            ("no text", (" \n", QUESTION), {}),
            ("no question", (KEY, " "), {}),
            ("answer is empty", (KEY, QUESTION, " "), {}),
            ("top must be a whole number of at least 1, not 0", (KEY, QUESTION, ANSWER), dict(top=0)),
            ("top must be a whole number", (KEY, QUESTION, ANSWER), dict(top=1.5)),
            ("words must be a whole number", (KEY, QUESTION, ANSWER), dict(words=2.5)),
            ("max_new_tokens must be a whole number", (KEY, QUESTION), dict(max_new_tokens=0)),
            ("at_once must be at least 1", (KEY, QUESTION, ANSWER), dict(at_once=0)),
            ("do not cover the text", (KEY, QUESTION, ANSWER), dict(parts=[Part(0, 3, KEY[:3])])),
            ("do not cover the text", (KEY, QUESTION, ANSWER), dict(parts=[Part(3, 9, KEY)])),
            ("declared context of 600; shorten the text", (text(3, 30), QUESTION), {}),
            (r"declared context of 600; shorten the answer \(max_new_tokens\)", (KEY, QUESTION), dict(max_new_tokens=2000)),
            ("declared context of 600", (text(3, 30), QUESTION, ANSWER), {}),
            ("10001 parts, more than 10000", ("a " * 10_001, QUESTION, ANSWER), dict(words=1)),
            ("10000 parts would hold more sets.*pass top=50", ("a " * 10_000, QUESTION, ANSWER), dict(words=1, top=5000)),
            ("no chat template", (KEY, QUESTION, ANSWER), dict(system="Be brief.")),
            ("at least one scorer", (KEY, QUESTION, ANSWER), dict(scorers=())),
            ("at least one scorer", (KEY, QUESTION, ANSWER), dict(scorers=("alone",))),
            ("each kind once", (KEY, QUESTION, ANSWER), dict(scorers=(Alone(), Alone()))),
            ("character 3 of the text is half", ("abc\ud800", QUESTION, ANSWER), {}),
            ("character 0 of the answer is half", (KEY, QUESTION, "\ud800"), {}),
            ("the question must be a string", (KEY, 3, ANSWER), {}),
        ]:
            with pytest.raises(ValueError, match=says):
                attribute(extension, tokenizer, *given, **how)


def test_an_extension_that_was_removed_is_refused(nano):
    model, tokenizer = nano
    with longreach.extend(model, context=600) as extension:
        pass
    with pytest.raises(ValueError, match="was removed from its model"):
        attribute(extension, tokenizer, KEY, QUESTION, ANSWER)
    with pytest.raises(ValueError, match="was removed from its model"):
        why(Conversation(model, tokenizer, extension=extension))


def test_a_text_that_does_not_fit_is_refused_before_anything_is_read(nano):
    """Small sets of parts do fit: the search would end, and only then would the whole text be refused. The context that is named is enough for all."""
    model, tokenizer = nano
    with longreach.extend(model, context=600) as extension, pytest.raises(ValueError, match=r"of 600.*context=(\d+)") as refusal:
        attribute(extension, tokenizer, text(3, 30), QUESTION, ANSWER, scorers=(Alone(),), progress=lambda *at: pytest.fail("something was read"))
    with longreach.extend(model, context=int(re.search(r"context=(\d+)", str(refusal.value))[1])) as extension:
        assert attribute(extension, tokenizer, text(3, 30), QUESTION, ANSWER, scorers=(Alone(),)).complete


# -- conversations ------------------------------------------------------------------------------------------------------------------


def test_why_of_a_text_and_of_an_earlier_turn(nano):
    model, tokenizer = nano
    with longreach.extend(model, context=1024) as extension:
        talk = Conversation(model, tokenizer, text(2, 4), extension=extension, limit=1024)
        talk.ask(QUESTION, 16)
        found = why(talk, by="paragraph", scorers=(LeaveOneOut(),), top=2)
        assert found.parts[0].text == KEY and found.count == 5 and found.parts[0].turn is None
        known, turns = talk.known, len(talk.turns)
        talk.document = text(0, 3, key="")
        talk.reset()
        talk.turns.append((KEY.strip(), generation.Answer(" I will.", tokenizer(" I will.", add_special_tokens=False)["input_ids"], "stop", 0, 0, 0, None)))
        talk.ask(QUESTION, 16)
        told = why(talk, by="paragraph", scorers=(LeaveOneOut(),), top=2)
        assert "48213" in talk.turns[-1][1].text and told.parts[0].turn == 1 and told.parts[0].text == f"{KEY.strip()}\n\n I will."
        assert talk.known > 0 and known > 0 and turns == 1 and len(talk.turns) == 2  # nobody has touched the conversation


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "template"])
def test_a_conversation_with_all_its_parts_is_what_was_read(chat):
    from longreach.apps.attribution import attribute as module

    model, tokenizer = llama(), byte_tokenizer(chat)
    with longreach.extend(model, SelfExtend(8, 16)) as extension:
        talk = Conversation(model, tokenizer, "One two. Three four.  ", extension=extension)
        asked = [talk.sequence(question) for question in ("first?", "second?") if talk.ask(question, 4)][:1] + [[]]
        asked[1] = dataclasses.replace(talk, turns=talk.turns[:1]).sequence("second?")
        places = module.of_talk(talk, cut(talk.document, "sentence"))
        assert places.prompt(frozenset(range(3))) == asked[1] and [*places.turns] == [None, None, 1]
        bare = dataclasses.replace(talk, document="", turns=[]).sequence("second?")
        assert places.prompt(frozenset()) == bare
        assert why(talk, by="sentence", scorers=(Alone(),)).count == 3


def test_turns_that_a_stopped_search_has_not_told_apart_are_all_named():
    """A group of the end of the text and of turns must not be reported as the text alone, nor several turns as the first of them."""
    given = [*parts.at("One. Two. ", [5]), Part(0, 3, "Q A"), Part(0, 3, "R B"), Part(0, 3, "S C")]
    places = Places(given, [None, None, 1, 2, 3], lambda who: [])
    found = [scored(places, group, 1.0, {}) for group in (range(2), range(1, 4), range(1, 3), range(2, 5), range(3, 4))]
    assert [(each.start, each.stop, each.text, each.turn, each.upto) for each in found] == [
        (0, 10, "One. Two. ", None, None), (5, 10, "Two. ", None, 2), (5, 10, "Two. ", None, 1), (0, 13, "Q A\n\nR B\n\nS C", 1, 3), (0, 3, "R B", 2, None),
    ]  # fmt: skip
    assert [place(each) for each in found] == ["0 to 10", "5 to 10 and turns 1 to 2", "5 to 10 and turn 1", "turns 1 to 3", "turn 2"]


def test_why_needs_an_answer_and_something_before_it(nano):
    model, tokenizer = nano
    with longreach.extend(model, Stock()) as extension:
        talk = Conversation(model, tokenizer, extension=extension)
        with pytest.raises(ValueError, match="no answer yet"):
            why(talk)
        talk.ask("Who?", 2)
        with pytest.raises(ValueError, match="no text and no earlier turn"):
            why(talk)
    with pytest.raises(ValueError, match="only an extended model"):
        why(Conversation(model, tokenizer))


# -- the page -----------------------------------------------------------------------------------------------------------------------

EVIL = "<script>document.title='taken'</script><img src=x onerror=alert(1)>"
MADE = Evidence(-0.1, -9.0, -0.2, -8.0)


def result(spans: list[tuple[int, int, float]], words: str, evidence: Evidence | None = MADE) -> Attribution:
    found = tuple(Scored(start, stop, words[start:stop], None, score, {"alone": score}) for start, stop, score in spans)
    return Attribution(EVIL, EVIL, 8, found, 9, evidence, Work(9, 9, 900, 500, 1.0, None), True)


def shown(html: str) -> str:
    """The text of the article, without tags."""
    import html as library

    article = re.search(r"<article class=text>(.*)</article>", html, re.S)[1]
    return library.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<span class=badge[^>]*>\d+</span>", "", article)))


def test_the_page_shows_the_text_and_escapes_everything():
    words = f"Before. {EVIL} Marked part.\n\nBetween. Second part. After & done."
    first, second = words.index("Marked"), words.index("Second")
    html = page.render(result([(first, first + 14, 8.0), (second, second + 13, 2.0), (0, 8, -1.0), (8, 20, 0.01)], words), words, EVIL, EVIL)
    assert shown(html) == words
    assert "<script" not in html and "<img" not in html and "http:" not in html and "https:" not in html
    assert re.findall(r"<mark id=\"part-(\d)\"", html) == ["1", "2"]  # not what speaks against the answer, nor what hardly matters
    assert "prefers-color-scheme: dark" in html and "<meta name=generator content=longreach>" in html


def test_of_a_long_text_the_surroundings_are_shown():
    words = "a" * 300_000 + "HERE" + "b" * 300_000
    html = page.render(result([(300_000, 300_004, 8.0)], words), words, "x", "y")
    assert "298,500 characters are not shown" in html and len(html) < 30_000 and "HERE" in shown(html)
    empty = page.render(result([], words), words, "x", "y")
    assert "600,004 characters are not shown" in empty and "does not come from the text" in empty


@pytest.mark.parametrize(
    "evidence,says",
    [
        (Evidence(-0.1, -9.1, -0.2, -8.0), r"8.1e\+03 times less likely; alone, they make it about as likely"),
        (Evidence(-0.1, -40.0, -5.0, -30.0), r"10\^17 times less likely; alone, they do not explain all"),
        (Evidence(-0.1, -0.2, -0.2, -8.0), "Other parts say the same"),
        (Evidence(-54.4, -55.0, -40.5, -37.9), r"the answer 10\^7 times less likely than no text does"),
        (Evidence(-0.1, -0.2, -0.2, -0.4), "nearly the same without the text"),
        (None, "stopped"),
    ],
)
def test_the_verdict_is_that_of_the_evidence(evidence, says):
    assert re.search(says, page.verdict(result([(0, 3, 1.0)], "abc", evidence)))


# -- the command --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = tmp_path_factory.mktemp("texts") / "text.txt"
    made.write_text(text(2, 4))
    return made


def test_the_command_prints_the_parts_and_writes_the_page(run, file, stdin, tmp_path):
    given = ("attribute", "--file", file, "--prompt", QUESTION, "--by", "paragraph", "--scores", "alone, leave-one-out", "--top", 2)
    plain = run(*given, "--max-new-tokens", 16, "--html", tmp_path / "why.html")
    assert plain.code == 0 and ANSWER in plain.out and "Remember it" in plain.out and "whole text" in plain.out
    assert shown((tmp_path / "why.html").read_text()) == file.read_text()
    stdin(file.read_bytes())
    run("attribute", "--file", "-", *given[3:], "--answer", ANSWER, "--html", tmp_path / "piped.html")
    assert "<span>standard input, " in (tmp_path / "piped.html").read_text()
    found = run(*given, "--answer", ANSWER, "--json", "--quiet").json
    assert found["answer"] == ANSWER and found["parts"][0]["text"] == KEY and found["html"] is None and found["complete"]
    assert file.read_text()[found["parts"][0]["start"] : found["parts"][0]["stop"]] == KEY
    assert found["evidence"]["without"] < found["evidence"]["whole"] and found["method"]["method"] == "stock"


def test_the_command_refuses_with_a_sentence(run, file, tmp_path):
    (tmp_path / "mine.html").write_text("<h1>Mine</h1>")
    given = ("attribute", "--file", file, "--prompt", QUESTION)
    for more, says in [
        (("--by", "chapter"), "sentence, paragraph or passage"),
        (("--scores", "best"), "no score 'best'"),
        (("--html", tmp_path / "mine.html"), "no page that Longreach wrote"),
        (("--answer", "  "), "--answer has no words"),
        (("--truncate", "right"), "pass --context N too"),
        (("--context", "100"), "more than the declared context of 100"),
        (("--words", "1", "--top", "999999", "--file", "@book", "--context", "2k", "--truncate", "right"), "would hold more sets of them than fit into memory"),
    ]:
        refused(run, *given, *more, says=says)
    refused(run, "attribute", "--file", file, says="there is no question")
    assert (tmp_path / "mine.html").read_text() == "<h1>Mine</h1>"


def test_in_a_chat(run, file, stdin):
    stdin(f"/why\n{QUESTION}\n".encode())
    early = run("chat", "--file", file)
    assert early.code == 2 and "no answer yet" in early.err
    stdin(b"Who?\n/why\n")
    nothing = run("chat", "--max-new-tokens", 2)
    assert nothing.code == 2 and "no text and no earlier turn" in nothing.err
    stdin(f"{QUESTION}\n/why paragraph\n".encode())
    found = run("chat", "--file", file, "--max-new-tokens", 16, "--json")
    assert found.code == 0 and "Remember it" in found.err and "whole text" in found.err
    assert json.loads(found.out)["turns"][0]["answer"] == ANSWER


def test_the_help_is_quick(capsys):
    assert main(["attribute", "--help"]) == 0
    assert "--answer" in capsys.readouterr().out
    assert named()[0].name == "alone"


def test_the_page_of_the_documentation_is_true(capsys):
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/attribution.md").read_text(encoding="utf-8"), re.S)
    exec(compile(snippet, "docs/attribution.md", "exec"), {})
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].strip() == ANSWER and "The pass key is 48213." in shown[1] and shown[-1].startswith("Evidence(")
    assert ", ".join(ENSEMBLE[:2]) == "alone, leave-one-out" and TOP == 5 and PERMUTATIONS == 5  # what it says of them
