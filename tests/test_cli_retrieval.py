"""`longreach run --show-retrieval`: the picture and its data say what was chosen, the answer is the same, and what cannot be shown is refused with the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import Run, refused
from longreach.cli import retrieval as shown
from longreach.drawing import canvas, retrieval

INFLLM = ["--method", "infllm", "--n-local", 32, "--n-init", 4, "--block-size", 8, "--topk", 2, "--exc-block-size", 16]


def asked(folders: dict[str, str], book: Path, *more: object) -> list[object]:
    return ["run", "--model", folders["llama"], "--file", book, "--prompt", "and?", "--max-new-tokens", 5, *more]


def test_what_was_chosen_is_shown(run: Run, folders: dict[str, str], book: Path, tmp_path: Path) -> None:
    """Two blocks for each token of the answer, and what it sees anyway."""
    plain = run(*asked(folders, book, *INFLLM, "--json")).json
    data = run(*asked(folders, book, *INFLLM, "--show-retrieval", tmp_path / "out.png", "--json"))
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG") and f"wrote {tmp_path / 'out.png'}" in data.err
    found = data.json["retrieval"]
    assert data.json["answer"] == plain["answer"] and "retrieval" not in plain
    new, tokens = data.json["new_tokens"], data.json["prompt_tokens"] + data.json["new_tokens"] - 1
    assert (found["tokens"], found["queries"], found["method"], found["hidden"]) == (tokens, new, data.json["method"], [])
    assert found["picture"] == str(tmp_path / "out.png") and [layer["layer"] for layer in found["layers"]] == [0, 1]
    for layer in found["layers"]:
        assert (layer["chooses"], layer["queries"], layer["apart"], layer["block"], layer["keep"]) == (True, new, 1, 8, 3)
        assert sum((stop - first) * share for first, stop, share in layer["chosen"]) == pytest.approx(2 * 8)  # topk
        assert all((first - 4) % 8 == (stop - 4) % 8 == 0 and 0 < share <= 1 for first, stop, share in layer["chosen"])
        assert layer["always"][0] == [0, 4, 1.0] and layer["always"][-1][1] == tokens
    again = run(*asked(folders, book, *INFLLM, "--show-retrieval", tmp_path / "out.png"))
    assert again.code == 0 and "will be replaced" in again.err


def test_the_hidden_sentence_is_pointed_at(run: Run, folders: dict[str, str], book: Path, tmp_path: Path) -> None:
    """The tokenizer makes a token of every byte, and one at the beginning."""
    (tmp_path / "text").write_text("some words. " * 16)
    more = ["--hide", "the key is 7", "--depth", 0.5, "--show-retrieval", tmp_path / "out.png", "--json"]
    found = run(*asked(folders, tmp_path / "text", *INFLLM, *more)).json["retrieval"]["hidden"]
    assert found == [[7 * 12 + 11 + 1, 7 * 12 + 11 + 1 + len(" the key is 7")]]  # behind seven sentences, the words of one, and the first token


def test_a_sentence_is_found_by_its_inner_tokens() -> None:
    assert shown.place([1, 2, 3, 4, 5, 3, 4], [9, 3, 4, 9]) == [(1, 5)]
    assert shown.place([1, 2, 3], [9, 4, 9]) == [] == shown.place([1, 2, 3], [1, 2])


def test_a_document_is_asked_too(run: Run, folders: dict[str, str], book: Path, tmp_path: Path) -> None:
    begin = ["run", "--model", folders["llama"], *INFLLM, "--context", 300, "--file", book, "--save-document", tmp_path / "read"]
    refused(run, *begin, "--show-retrieval", tmp_path / "out.png", says="pass --prompt too")
    assert run(*begin).code == 0
    question = ["run", "--model", folders["llama"], "--document", tmp_path / "read", "--prompt", "and?", "--max-new-tokens", 5]
    found = run(*question, "--show-retrieval", tmp_path / "out.png", "--json").json
    assert found["retrieval"]["queries"] == found["new_tokens"] and found["retrieval"]["layers"][1]["chosen"]


def test_who_does_not_choose_sees_everything(run: Run, folders: dict[str, str], book: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The only token of an answer is read with the prompt, where Quest does not choose."""
    titles, draw = [], retrieval.draw
    monkeypatch.setattr(retrieval, "draw", lambda found, title, *more: (titles.append(title), draw(found, title, *more)))
    arguments = asked(folders, book, "--method", "quest", "--budget", 16, "--page-size", 4, "--dense-layers", 1, "--show-retrieval", tmp_path / "out.png")
    (tmp_path / "text").write_text("few words")
    arguments[arguments.index(book)] = tmp_path / "text"
    for new in (1, 3):
        found = run(*arguments, "--max-new-tokens", new, "--force", "--json").json["retrieval"]
        assert found["queries"] == found["layers"][1]["queries"] == new - 1
        assert (found["layers"][1]["always"] == [[0, found["tokens"], 1.0]]) == (new == 1) == (not found["layers"][1]["chosen"])
    assert "no token of the answer chose: each saw all that it may" in titles[0] and "2 tokens of the answer chose" in titles[1]


BY_HAND = ["--method", "selfextend", "--group-size", 16, "--window", 32], ["--method", "lm-infinite", "--n-local", 48, "--top-k", 3]


@pytest.mark.parametrize("method", [[], *BY_HAND])
def test_nothing_to_show(run: Run, folders: dict[str, str], book: Path, tmp_path: Path, method: list[object]) -> None:
    """By the dial, by hand, and one that chooses from a layer on which this model does not have."""
    arguments = asked(folders, book, *method, "--show-retrieval", tmp_path / "out.png")
    refused(run, *arguments, says="--method infllm --n-local 32")
    assert not (tmp_path / "out.png").exists()


def test_the_file_is_looked_at_first(run: Run, folders: dict[str, str], book: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"not ours")
    refused(run, *asked(folders, book, *INFLLM, "--show-retrieval", tmp_path / "mine.png"), says="--force")
    refused(run, *asked(folders, book, *INFLLM, "--show-retrieval", tmp_path / "out.jpg"), says="name the file")
    assert (tmp_path / "mine.png").read_bytes() == b"not ours"


def test_a_column_has_the_largest_share_of_its_tokens() -> None:
    nan, stretches = np.nan, [[[1, 3, 0.25], [3, 4, 0.5], [8, 9, 1.0]], []]
    np.testing.assert_equal(retrieval.matrix(stretches, 10, 1)[0], [nan, 0.25, 0.25, 0.5, nan, nan, nan, nan, 1.0, nan])
    np.testing.assert_equal(retrieval.matrix(stretches, 10, 3), [[0.25, 0.5, 1.0, nan], [nan] * 4])


@pytest.mark.parametrize(("layers", "tokens"), [(1, 12), (4, 4096), (80, 1_000_000)])
def test_it_is_readable_at_any_size(monkeypatch: pytest.MonkeyPatch, layers: int, tokens: int) -> None:
    """No more columns than the picture has pixels, layers as high as a line of text or a picture of a page's height; a single chosen token is still there."""
    drawn: list[Any] = []
    monkeypatch.setattr(canvas, "save", lambda figure, path, colours: drawn.append(figure))
    rows = [{"layer": n, "chosen": [[3, 4, 0.5]], "always": [[0, 2, 1.0], [tokens - 2, tokens, 1.0]]} for n in range(layers)]
    retrieval.draw({"tokens": tokens, "layers": rows}, "a method\n12 tokens", "not written", [(4, 6)])
    (figure,), (axes, bar) = drawn, drawn[0].axes
    anyway, chosen = (image.get_array() for image in axes.images)
    assert chosen.shape == (layers, -(-tokens // -(-tokens // 800))) and chosen.shape[1] <= 800
    assert retrieval.LOWEST <= figure.get_figheight() <= retrieval.HIGHEST
    assert (chosen.max(), chosen.count()) == (0.5, layers) and anyway.count() == 2 * layers * (2 if tokens == 12 else 1)
    assert axes.get_xlim() == (0, tokens) and axes.get_ylim() == (layers - 0.5, -0.5) and figure.get_suptitle() == "a method\n12 tokens"
    assert [text.get_text() for text in axes.texts] == ["▼"] and bar.get_ylabel() == "share of tokens and heads"
