"""Numbers of tokens: one parser for Python and the command line, and words that agree with their number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import longreach
from families import build
from longreach.cli import common, text
from longreach.quantities import MOST_TOKENS, counted, seconds_of, token_count


@pytest.mark.parametrize(
    ("given", "tokens"),
    [(4096, 4096), ("4096", 4096), (" 16K ", 16384), ("1.5k", 1536), ("16_384", 16384), (np.int64(7), 7), ("1e3", 1000), (1, 1), ("1m", 2**20)],
)
def test_numbers_of_tokens(given, tokens):
    assert token_count(given) == tokens == common.tokens(given)


@pytest.mark.parametrize("given", ["", "k", "0", 0, -5, "-5", "4.7", "0.3k", 4.0, True, None, "nan", "inf", "1e30", MOST_TOKENS + 1, "4k tokens", b"4k", [4]])
def test_what_is_no_number_of_tokens(given):
    with pytest.raises(ValueError, match=r"trained_window must be a positive number of tokens, such as 4096, '4k' or '1m', not"):
        token_count(given, "trained_window")


def test_python_takes_what_the_command_line_takes():
    model = build("llama")
    with longreach.extend(model, context="1k", trained_window="0.5k") as extension:
        assert extension.context == 1024 and extension.window.tokens == 512
    assert longreach.plan("nano", "4k", "A100-80", new_tokens="1k").request.new_tokens == 1024
    for wrong in ({"context": "many"}, {"context": 0}, {"context": 64, "trained_window": -1}):
        with pytest.raises(ValueError, match=f"{[*wrong][-1]} must be a positive number of tokens"):
            longreach.extend(model, **wrong)


def test_times_as_people_write_them():
    assert [seconds_of(given) for given in ("90", "90s", " 10M ", "1.5h", 30, 0.5)] == [90, 90, 600, 5400, 30, 0.5]
    for wrong in ("", "s", "10 weeks", "-1m", "0", "inf", "nan", "1e9h", True, None):
        with pytest.raises(ValueError, match="budget must be a time, such as 90s, 10m or"):
            seconds_of(wrong)  # type: ignore[arg-type]


def test_words_agree_with_their_number():
    assert [counted(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"] and counted(2, "query") == "2 queries"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_that_says_its_encoding_is_read(tmp_path: Path, encoding: str):
    file, said, written = tmp_path / "t.txt", [], "Call me Ishmael — née 漢字.\n"
    file.write_bytes(written.encode(encoding))
    assert text.read(str(file), 1000, said.append) == written
    assert [encoding.upper() in note for note in said] == ([] if encoding.startswith("utf-8") else [True])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "latin-1", "cp1252"])
def test_text_of_an_encoding_that_is_named_is_read(tmp_path: Path, encoding: str):
    file, written = tmp_path / "t.txt", "Déjà vu."
    file.write_bytes(written.encode(encoding))
    assert text.read(str(file), 1000, lambda note: None, encoding) == written
