"""The dial: the published rules, refusals, what is declared."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

import longreach
from families import build
from longreach import LMInfinite, SelfExtend, Stock
from longreach.configs import Window, trained_window
from longreach.planning.dial import LARGEST_GROUP, STRETCHED_FAR, WHOLE, choose, declare, limit


@pytest.mark.parametrize("length", [512, 2048, 4096, 8192, 32768])
@pytest.mark.parametrize("times", [2, 4, 8, 16, 24])
def test_the_smallest_group_that_keeps_to_two_thirds(length, times):
    choice = choose(Window(length, "test"), times * length)
    method = choice.method
    assert isinstance(method, SelfExtend) and choice.warning is None
    assert method.window % method.group_size == 0
    assert abs(method.window - length / 8) <= method.group_size / 2
    assert method.capacity(length) >= times * length
    largest = method.window + (times * length - method.window) / method.group_size
    assert largest <= length * 2 / 3
    smaller = method.group_size - 1
    near = round(length / 8 / smaller) * smaller
    assert near + (times * length - near) / smaller > length * 2 // 3


@pytest.mark.parametrize(
    ("length", "times", "near", "far"),
    [(8192, 1.5, 32, 8), (32768, 1.2, 32, 8), (8192, 1.51, 16, 2), (8192, 2, 16, 2), (8192, 8, 16, 2), (32768, 2, 16, 2), (4096, 4, 16, 2)],
)
def test_a_raised_base_keeps_keys_near(length, times, near, far):
    context = int(times * length)
    choice = choose(Window(length, "test", 100_000.0), context)
    method = choice.method
    assert choice.warning is None and method.log_scale is None and abs(method.window - length / near) <= method.group_size / 2
    assert method.window % method.group_size == 0 and method.window + (context - method.window) / method.group_size <= length / far
    fewer = method.group_size - 1
    window = max(1, round(length / near / fewer)) * fewer
    assert window + (context - window) / fewer > length / far
    assert "100000" in choice.reason and "longreach tune" in choice.reason
    assert choose(Window(length, "test", 10_000.0), context).method == choose(Window(length, "test"), context).method != method


def test_what_half_does_not_reach_is_warned_of_and_then_refused():
    late, whole = Window(8192, "test", 500_000.0), Window(8192, "test")
    edge = STRETCHED_FAR.furthest(8192)
    assert choose(late, edge).warning is None
    beyond = choose(late, edge + 100)
    assert beyond.method == replace(choose(whole, edge + 100).method, log_scale=None) and f"at most {edge}" in beyond.warning
    loose = WHOLE.furthest(8192) + 100
    assert choose(late, loose).method == replace(choose(whole, loose).method, log_scale=None) and f"at most {edge}" in choose(late, loose).warning
    assert choose(late, 8192).method == Stock()


def test_a_window_that_is_given_is_believed():
    config = build("llama").config
    config.rope_parameters, config.max_position_embeddings = {**config.rope_parameters, "rope_theta": 1e6}, 1024
    assert trained_window(config).base == 1e6 and trained_window(config, 1024).base is None
    assert choose(trained_window(config), 1500).method == SelfExtend(15, 30)
    assert choose(trained_window(config, 1024), 1500).method == choose(Window(1024, ""), 1500).method


def test_the_tables_of_the_page_are_the_dials():
    """Both, row by row: g and w at some lengths in windows, and how far the rule reaches without a warning."""
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text()
    tables = re.findall(r"^\| L \|.* rule holds up to \|\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert len(tables) == 2
    for table, base, lengths in zip(tables, (None, 1e5), ((2, 4, 8, 16), (1.5, 2, 4, 8, 16)), strict=True):
        for row in table.splitlines():
            length, *cells, furthest = (int(number) for number in re.findall(r"\d+", row))
            window = Window(length, "test", base)
            found = [choose(window, int(times * length)).method for times in lengths]
            assert [(method.group_size, method.window) for method in found] == list(zip(cells[::2], cells[1::2], strict=True)), row
            assert choose(window, furthest).warning is None and choose(window, furthest + 100).warning is not None, row


def test_stock_when_the_context_fits():
    choice = choose(Window(512, "test"), 512)
    assert choice.method == Stock() and "fit" in choice.reason


def test_the_loose_rule_warns_and_beyond_it_is_refused():
    window = Window(512, "test")
    edge = WHOLE.furthest(512)
    assert choose(window, edge).warning is None
    loose = choose(window, edge + 100)
    assert loose.warning and str(edge) in loose.warning
    most = max(SelfExtend(g, max(1, round(64 / g)) * g).capacity(512) for g in range(1, LARGEST_GROUP + 1))
    assert choose(window, most).method.capacity(512) >= most
    with pytest.raises(ValueError, match=f"reaches {most}.*LMInfinite"):
        choose(window, most + 1)


@pytest.mark.parametrize(("length", "context"), [(64, 2048), (24, 2000)])
def test_a_refusal_names_what_can_be_reached(length, context):
    with pytest.raises(ValueError, match="SelfExtend reaches") as refusal:
        choose(Window(length, "test"), context)
    most = int(str(refusal.value).split("SelfExtend reaches ")[1].split()[0])
    with warnings.catch_warnings():
        assert choose(Window(length, "test"), most).method.capacity(length) >= most > 4 * length


@pytest.mark.parametrize("context", [0, -5, 2.5, True, "4096"])
def test_nonsense_contexts(context):
    with pytest.raises(ValueError, match="positive number"):
        choose(Window(512, "test"), context)


def test_the_choice_is_reported():
    model = build("llama")
    with longreach.extend(model, context=300) as extension:
        text = extension.describe()
        assert "SelfExtend(group_size=" in text and "2/3" in text and "300 tokens declared" in text
        report = extension.report()
        assert report["method"]["method"] == "selfextend" and report["trained_window"] == 64 and report["exactness"]["logits"] < 1e-4
    with longreach.extend(model, context=60) as extension:
        assert extension.method == Stock() and "fit the trained window" in extension.describe()
    with pytest.warns(UserWarning, match="poorly trained"):
        longreach.extend(model, context=WHOLE.furthest(64) + 50).remove()


def test_the_trained_window_can_be_given():
    with longreach.extend(build("llama"), LMInfinite(200), trained_window=256) as extension:
        assert extension.capacity is None and "given" in extension.describe()


def test_plain_attention_may_go_beyond_its_window_for_comparison():
    assert limit(None, 64) is limit(Stock(), 64) is limit(LMInfinite(64), 64) is None and limit(SelfExtend(4, 16), 64) == SelfExtend(4, 16).capacity(64)
    with pytest.raises(ValueError, match="choose parameters of at most 64"):
        limit(LMInfinite(100), 64)
    assert declare(Stock(), 64, 64) == (64, None) and declare(Stock(), 64, None) == (None, None)
    context, warning = declare(Stock(), 64, 65)
    assert context is None and warning.startswith("plain attention on 65 tokens, beyond the trained window of 64: ") and "for comparison only" in warning
    assert declare(SelfExtend(4, 16), 64, 900) == (900, None) == declare(None, 64, 900)
