"""The demonstration measures what it says: its trials are stock `generate`, its losses plain forwards, its words its own numbers."""

from __future__ import annotations

import functools
import json
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import longreach
from longreach.apps import demo
from longreach.cli import main
from longreach.cli.demo import cost_table
from longreach.drawing import canvas, reach
from longreach.evals.samples import haystack
from longreach.running.loading import shipped_book

DESIGN = demo.Design((1, 2), depths=2, keys=1, loss_length=2, stream_length=4)


@functools.lru_cache(maxsize=1)
def ran() -> tuple[Any, Any, dict[str, Any], list[int]]:
    model, tokenizer = longreach.load("nano")
    read: list[int] = []
    result = demo.run(model, tokenizer, shipped_book(), DESIGN, lambda tokens, what: read.append(tokens))
    return model, tokenizer, result, read


def test_every_method_is_asked_for_the_same_keys_and_the_model_is_left_as_it_was():
    model, _, result, read = ran()
    asked = {name: [(r["length"], r["depth"], r["key"], r["distance"]) for r in result["trials"] if r["method"] == name] for name in demo.NAMES}
    assert asked["stock"] == asked["selfextend"] == asked["lm-infinite"] and len(asked["stock"]) == 4
    assert sum(read) == DESIGN.tokens(result["window"])
    assert type(model.model.rotary_emb).__module__.startswith("transformers")
    json.dumps(result, allow_nan=False)


def test_a_trial_is_stock_generate():
    model, tokenizer, result, _ = ran()
    row = next(r for r in result["trials"] if r["method"] == "stock" and r["length"] == 512)
    made = haystack.trial(tokenizer, shipped_book(), 512, 0.0, Random(DESIGN.seed * 1_000_003 + 512), answer_tokens=demo.answer_tokens(tokenizer))
    assert made.key == row["key"]
    out = model.generate(torch.tensor([made.ids]), max_new_tokens=demo.answer_tokens(tokenizer), do_sample=False)[0, len(made.ids) :]
    assert tokenizer.decode(out, skip_special_tokens=True).strip() == row["answer"]
    assert row["found"] == (haystack.number_in(row["answer"]) == row["key"])


def test_losses_are_those_of_plain_forwards():
    model, tokenizer, result, _ = ran()
    ids = demo.passage(tokenizer, shipped_book(), 4 * 512, Random(DESIGN.seed))
    assert len(ids) == 4 * 512 and ids[0] == tokenizer.bos_token_id
    with torch.no_grad():
        logits = model(ids[None, :1024], use_cache=False).logits[0].float()
    losses = F.cross_entropy(logits[:-1], ids[1:1024], reduction="none")
    expected = [losses[:511].mean().item(), losses[511:].mean().item()]
    assert result["loss"]["methods"]["stock"] == pytest.approx(expected, abs=1e-4)
    assert [len(curve) for curve in result["loss"]["methods"].values()] == [2, 2, 4]


def test_shares_add_up_and_the_words_say_them():
    _, _, result, _ = ran()
    for name in demo.NAMES:
        near, far, every = (demo.share(result, name, far=f) for f in (False, True, None))
        assert near.asked + far.asked == every.asked == 4 and near.found + far.found == every.found
        words = demo.verdict(result)[name]
        assert f"found {far.found} of {far.asked} keys" in words and f"{near.found} of {near.asked} nearer ones" in words
    assert demo.Share(0, 0).percent is None and str(demo.Share(3, 4)) == "3/4"


def test_the_picture_is_drawn_whole_or_not_at_all(tmp_path: Path):
    reach.draw(ran()[2], demo.NAMES, tmp_path / "reach.png")
    assert (tmp_path / "reach.png").read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == ["reach.png"]


def test_the_picture_shows_the_numbers_of_the_result(monkeypatch: pytest.MonkeyPatch):
    result, drawn = ran()[2], []
    monkeypatch.setattr(canvas, "save", lambda figure, path: drawn.append(figure))
    reach.draw(result, demo.NAMES, "not written")
    curves, *panels = drawn[0].axes
    lines = {line.get_label(): (line.get_color(), line.get_ydata().tolist()) for line in curves.lines[:3]}
    assert lines == {label: (canvas.METHODS[name], result["loss"]["methods"][name]) for name, label in demo.NAMES.items()}
    for (name, label), panel in zip(demo.NAMES.items(), panels, strict=True):
        shares = [[demo.share(result, name, length, depth).percent for length in (512, 1024)] for depth in (0.0, 1.0)]
        assert panel.get_title() == label and panel.images[0].get_array().tolist() == shares
        assert [text.get_text() for text in panel.texts] == [f"{value:.0f}" for row in shares for value in row]
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1x", "2x"]


def test_the_command_prints_tables_or_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["demo", "--lengths", "1,2", "--depths", "1", "--keys", "1", "--loss-length", "1", "--stream-length", "2", "--png", str(tmp_path / "d.png")]
    assert main(options) == 0
    text = capsys.readouterr().out
    assert "SelfExtend" in text and "LM-Infinite" in text and "1024 tokens, 2x" in text and "A low loss is not recall" in text
    assert main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"trials", "loss", "cost", "verdict", "methods"} <= found.keys() and len(found["trials"]) == 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lengths", "one"], "whole numbers with commas"),
        (["--lengths", "0"], "whole numbers of trained windows"),
        (["--lengths", "1000"], "declare at most"),
        (["--stream-length", "4"], "must be at least loss_length"),
        (["--png", "figure.pdf"], "--png writes a PNG picture"),
        (["--file", "there-is-no-book.txt"], "there is no file"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(options: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert main(["demo", *options]) == 2
    assert says in capsys.readouterr().err


def test_the_table_of_costs_breaks_no_word_in_80_columns():
    cost = {"prefill_seconds": 1.0, "decode_ms": 2.0, "store_bytes": 3}
    extended = {"selfextend": "SelfExtend(group_size=15, window=60, log_scale=512)", "lm-infinite": "LMInfinite(n_local=512, n_global=4)"}
    names = {"stock": "the model as it is", **extended}
    result = {"plan": {"lengths": [8]}, "window": 512, "cost": dict.fromkeys(names, cost), "methods": {name: {"4096": text} for name, text in names.items()}}
    console = Console(width=80, file=StringIO())
    console.print(cost_table(result))
    assert {"SelfExtend", "(group_size=15,", "log_scale=512)", "(n_local=512,", "n_global=4)"} <= set(console.file.getvalue().split())
