"""Texts are cut where people would cut them, and the parts cover the text exactly, whatever it is."""

from __future__ import annotations

from random import Random

import pytest

from longreach.apps.parts import UNITS, Part, at, cut

SENTENCES = [
    "Mr. J. S. Bach lived in Leipzig. ", "He wrote at 9.30 p.m. every day! ", '"Did he?" ', "They asked... and waited.\n", "Yes (always.) ",
    "A title without a stop\n\n", "The end.",
]  # fmt: skip


def texts(text, **how):
    return [part.text for part in cut(text, **how)]


def test_sentences():
    assert texts("".join(SENTENCES), by="sentence") == SENTENCES
    assert texts("他来了。她说：“走\uff01”他们走了？是。", by="sentence") == ["他来了。", "她说：“走\uff01”", "他们走了？", "是。"]


def test_a_small_letter_of_any_alphabet_goes_on():
    for one in ("Das Schiff ist ca. überall so.", "По ул. ленина он шёл.", "It is approx. all."):
        assert texts(one, by="sentence") == [one]
    assert texts("End.\n\nübrig. 終。über.", by="sentence") == ["End.\n\n", "übrig. ", "終。", "über."]


def test_paragraphs():
    assert texts("One.\nStill one.\n \n\n  Two.\n\nThree", by="paragraph") == ["One.\nStill one.\n \n\n  ", "Two.\n\n", "Three"]


def test_passages():
    assert texts("a b  c\nd e", words=2) == ["a b  ", "c\nd ", "e"]
    assert texts("中文字abc", words=2) == ["中文", "字abc"]
    assert len(cut("word " * 1000)) == 10


@pytest.mark.parametrize("by", UNITS)
@pytest.mark.parametrize("seed", range(40))
def test_the_parts_cover_any_text(by, seed):
    rng = Random(seed)
    text = "".join(rng.choices(["a", "B", ". ", "! ", "\n", "\n\n", " ", "。", "Mr. ", "\u2028", "\r\n", "é", "🙂"], k=rng.randrange(60)))
    parts = cut(text, by, words=rng.randint(1, 5))
    assert "".join(part.text for part in parts) == text
    assert [part.start for part in parts] == [0, *(part.stop for part in parts)][:-1] if parts else not text
    assert all(part.text == text[part.start : part.stop] for part in parts)
    assert len(parts) == 1 or all(part.text.strip() for part in parts)


def test_places_of_ones_own():
    assert at("one  two", [3, 5]) == [Part(0, 5, "one  "), Part(5, 8, "two")]
    assert at("  one", [2]) == [Part(0, 5, "  one")]


def test_a_long_text_is_cut_in_one_pass():
    """Texts of 200 000 characters that tempt an expression to look at everything again and again."""
    for text in (". " * 100_000, "\n" * 200_000, "." * 200_000, "a" * 200_000, " \n" * 100_000):
        for by in UNITS:
            assert "".join(part.text for part in cut(text, by)) == text


def test_what_is_refused():
    with pytest.raises(ValueError, match="sentence, paragraph or passage"):
        cut("text", "chapter")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 word"):
        cut("text", words=0)
