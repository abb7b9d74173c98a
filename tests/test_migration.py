"""docs/migration.md: its snippets run, its links lead somewhere, and what it says about the arithmetic of others is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from longreach import DualChunk, LMInfinite, LogisticSelfExtend, SelfExtend, StreamingLLM
from longreach.methods.base import Method

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/migration.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: next(re.finditer(r"longreach\.[A-Z]\w+", s))[0])
def test_snippets_run(snippet, capsys):
    exec(compile(snippet, "docs/migration.md", "exec"), {"__name__": "snippet"})
    assert capsys.readouterr().out.strip()


def test_links():
    anchors = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^##+ (.*)$", PAGE, re.M)}
    assert {target for target in re.findall(r"\]\(#([^)]+)\)", PAGE)} <= anchors
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#]+)#?([^)]*)\)", PAGE):
        text = (ROOT / "docs" / file).read_text(encoding="utf-8")
        assert not anchor or f"## {anchor}\n" in text.lower()


def test_every_parameter_named_on_our_side_exists():
    known = {
        name
        for method in (SelfExtend, LMInfinite, StreamingLLM, DualChunk, LogisticSelfExtend)
        for name in re.findall(r"`(\w+)`", str(method.__doc__)) + list(method.__dataclass_fields__)
    } | {"factor", "log_scale", "group_size", "window"}
    rows = re.findall(r"^\| `[^|]+\| `(\w+)`[^|]*\|", PAGE, re.M)
    ours = {name for name in rows if name.islower()}
    assert len(ours) > 8 and ours - known <= {"context", "chunk_size"}  # of extend() and stream()


def rows(method: Method, n: int) -> torch.Tensor:
    i = torch.arange(n)
    return method.distances(i[:, None], i[None, :])


@pytest.mark.parametrize(("chunk_size", "local"), [(12, 2), (12, 4), (9, 3), (20, 5)])
def test_chunkllama_with_its_own_two_numbers(chunk_size, local):
    """Keys at j mod chunk_len; queries at i mod chunk_len, that plus chunk_len but at most chunk_size, and the last of those."""
    n, chunk_len = 75, chunk_size - local
    ours = rows(DualChunk(chunk_size + 1, chunk_length=chunk_len, local_window=local + 1), n)
    after = [min(place + chunk_len, chunk_size) for place in range(chunk_len)]
    for i in range(n):
        for j in range(i + 1):
            behind = i // chunk_len - j // chunk_len
            query = i % chunk_len if behind == 0 else after[i % chunk_len] if behind == 1 else after[-1]
            assert ours[i, j] == query - j % chunk_len


def test_the_shift_matters_only_where_the_group_does_not_divide_the_window():
    assert torch.equal(rows(SelfExtend(4, 8), 40).nan_to_num(-1), rows(SelfExtend(4, 8, shift="true_division"), 40).nan_to_num(-1))
    assert not torch.equal(rows(SelfExtend(3, 8), 40).nan_to_num(-1), rows(SelfExtend(3, 8, shift="true_division"), 40).nan_to_num(-1))


def test_self_groups_are_one_token_later():
    """Tokens of one size, the first at `start`, have the last number before them plus their place divided by the size, rounded up."""
    n, window, sizes = 60, 4, [1, 1, 2, 2, 3, 3, *[4] * 20]  # of LogisticSelfExtend(4, 0.5, 5), by hand in test_position_methods.py
    number, start, before = [], 0, -1
    for size in sorted(set(sizes)):
        number += [before + -(-place // size) for place in range(size * sizes.count(size))]
        start, before = start + size * sizes.count(size), before + sizes.count(size)
    ours = rows(LogisticSelfExtend(window, 0.5, 5), n)
    assert number[0] == -1
    for i in range(window + 1, n):
        for j in range(1, i - window + 1):
            assert window + number[i - window] - number[j] == ours[i - 1, j - 1]


def test_infllm_baselines():
    """infinite-lm: window of n_local, the first n_init beyond it at n_local - 1. stream-lm: sinks one farther here than there."""
    n, n_local, n_init = 40, 8, 3
    infinite = rows(LMInfinite(n_local, n_global=n_init, distance_limit=n_local - 1), n)
    stream = rows(StreamingLLM(n_local, n_sink=n_init, counting="chunkable"), n)
    for i in range(n):
        for j in range(i + 1):
            near = i - j < n_local
            if not near and j >= n_init:
                assert infinite[i, j].isnan() and stream[i, j].isnan()
            else:
                assert infinite[i, j] == (i - j if near else n_local - 1)
                assert stream[i, j] == (i - j if near else (n_local + n_init - 1 - j) + 1)
