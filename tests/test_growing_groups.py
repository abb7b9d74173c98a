"""SELF: its groups against a plain count of them, one token after another, and what follows for distances and capacity."""

from __future__ import annotations

import math

import pytest
import torch

from families import build, tokens
from longreach import LogisticSelfExtend, SelfExtend, extend
from longreach.core import growing_groups
from longreach.core.matrices import matrices
from longreach.core.segments import GrowingGroups, Identity, Retention, forms

SETTINGS = [(0.02, 33), (0.3, 6), (0.1, 17), (1.5, 100), (9.9, 33), (0.05, 3), (0.004, 12), (0.0, 9), (0.02, 1), (0.5, 2)]


def counted(growth: float, ceiling: int, n: int) -> list[int]:
    """The group of every token, by filling one group after the other: the formula has its numerator multiplied by exp(r k)."""
    found: list[int] = []
    k = 0
    while len(found) < n:
        grown = math.exp(min(700.0, growth * k))
        tokens = max(1, math.floor(ceiling * grown / (grown + ceiling - 1)))
        found += [k] * min(tokens, max(1, ceiling - 1))
        k += 1
    return found[:n]


@pytest.mark.parametrize(("growth", "ceiling"), SETTINGS)
def test_groups_are_those_that_are_filled_one_by_one(growth, ceiling):
    n = 12_000
    want = counted(growth, ceiling, n)
    assert GrowingGroups(growth, ceiling)(torch.arange(n)).tolist() == want
    assert [growing_groups.group_of(growth, ceiling, index) for index in range(0, n, 7)] == want[::7]
    firsts = [index for index in range(n) if index == 0 or want[index] > want[index - 1]]
    assert [growing_groups.tokens_before(growth, ceiling, k) for k in range(len(firsts))] == firsts


def test_the_published_defaults_by_hand():
    """33 / (1 + 32 exp(-0.02 k)) is 2 from 0.02 k = ln(64 / 31) = 0.725 on, 3 from ln(96 / 30) = 1.163 on, and 32 from ln(32 * 32) = 6.93 on."""
    runs = growing_groups.runs(0.02, 33)
    assert runs[:3] == ((0, 0, 1), (37, 37, 2), (37 + 2 * 22, 59, 3))
    assert [run.size for run in runs] == list(range(1, 33)) and runs[-1].group == 347


def test_sizes_never_reach_the_ceiling_and_never_shrink():
    for growth, ceiling in SETTINGS:
        sizes = [run.size for run in growing_groups.runs(growth, ceiling)]
        assert sizes[0] == 1 and sizes == sorted(set(sizes)) and sizes[-1] <= max(1, ceiling - 1)
        assert growing_groups.size(growth, ceiling, 10**6) == (1 if growth == 0 else max(1, ceiling - 1))  # where exp() has vanished


@pytest.mark.parametrize(("growth", "ceiling"), [(1e-300, 33), (1e-12, 4096), (1e9, 4096), (0.0, 4096)])
def test_extreme_growth(growth, ceiling):
    """Too slow to be seen in any text, or at once."""
    index = torch.tensor([0, 1, 2, 10**6])
    want = [0, 1, 1, 1 + (10**6 - 1) // 4095] if growth > 1 else index.tolist()
    assert GrowingGroups(growth, ceiling)(index).tolist() == want
    assert LogisticSelfExtend(4, growth, ceiling).distances(torch.tensor([20]), torch.tensor([0])).item() == (5 if growth > 1 else 20)


def test_far_along_groups_are_counted_exactly():
    n = 10**7
    index = torch.arange(n - 64, n)
    runs = growing_groups.runs(0.02, 33)
    first, group = runs[-1].first, runs[-1].group
    assert GrowingGroups(0.02, 33)(index).tolist() == [group + (i - first) // 32 for i in range(n - 64, n)]
    assert GrowingGroups(0.02, 33, delay=100, shift=100)(index).tolist() == [100 + group + (i - 100 - first) // 32 for i in range(n - 64, n)]
    table = torch.tensor(counted(0.02, 33, 6000))
    assert torch.equal(GrowingGroups(0.02, 33)(torch.arange(6000).view(60, 100)).long().flatten(), table)  # any shape


METHODS = [LogisticSelfExtend(w, r, c) for w in (1, 5, 16) for r, c in SETTINGS]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_distances_grow_by_at_most_one_and_join_at_the_border(method):
    n, w = 300, method.window
    found = matrices(method.layout().segments, n).distance
    i = torch.arange(n)
    true = (i[:, None] - i[None, :]).double()
    near = (true >= 0) & (true < w)
    assert torch.equal(found[near], true[near])
    border = found[true == w]
    assert border.numel() == n - w and bool((border == w).all())
    assert found[true >= w].min() == w and not found[true >= 0].isnan().any() and found[true < 0].isnan().all()
    step = -found.diff(dim=1)[true[:, 1:] >= 0]  # from one key to the next
    assert set(step.tolist()) <= {0.0, 1.0}
    later = found.diff(dim=0)[true[:-1] >= 0]  # from one query to the next, for the same key
    assert set(later.tolist()) <= {0.0, 1.0}
    table = counted(method.growth, method.largest_group, n)
    assert all(found[q, k] == w + table[q - w] - table[k] for q in range(w, n, 13) for k in range(0, q - w + 1, 5))


@pytest.mark.parametrize("method", [m for m in METHODS if m.growth == 0 or m.largest_group <= 2], ids=str)
def test_neutral_parameters_are_true_distances(method):
    i = torch.arange(90)
    plain = torch.where(i[None, :] <= i[:, None], (i[:, None] - i[None, :]).double(), torch.nan)
    torch.testing.assert_close(method.distances(i[:, None], i[None, :]), plain, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(matrices(method.layout().segments, 90).distance, plain, equal_nan=True, rtol=0, atol=0)


def test_groups_of_one_size_are_those_of_selfextend():
    """Growth that is over after the first group: from the second group on, the groups of SelfExtend, `group_size - 1` tokens later."""
    size, w = 4, 8
    grown, fixed = LogisticSelfExtend(w, 50.0, size + 1), SelfExtend(size, w)
    n, lead = 120, size - 1
    i, j = torch.arange(w + 1, n)[:, None], torch.arange(1, n - w)[None, :]
    far = i - j >= w
    assert torch.equal(grown.distances(i, j)[far], fixed.distances(i + lead, j + lead)[far])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_capacity_is_exact(method):
    n = 1200
    i = torch.arange(n)
    per_query = method.distances(i[:, None], i[None, :]).nan_to_num(0).max(dim=1).values.tolist()
    for window in (4, 17, 40):
        beyond = next((i for i, d in enumerate(per_query) if d > window - 1), None)
        capacity = method.capacity(window)
        assert capacity == beyond if beyond is not None else capacity > n


@pytest.mark.parametrize(("window", "context"), [(64, 65), (64, 192), (512, 1024), (512, 8192), (4096, 32768), (8192, 12345), (8192, 10**7), (5, 9)])
def test_the_recommended_growth_is_the_slowest_that_the_rule_allows(window, context):
    method = LogisticSelfExtend.recommended(window, context)
    assert method.window == max(1, window // 8) and method.log_scale == window
    assert method.largest_distance(context) <= window * 2 // 3 and method.capacity(window) >= context
    slower = LogisticSelfExtend(method.window, method.growth * 0.9, method.largest_group)
    assert slower.largest_distance(context) > window * 2 // 3


def test_the_recommended_setting_of_a_text_that_fits_is_plain_attention():
    method = LogisticSelfExtend.recommended(512, 512)
    assert method.growth == 0 and method.largest_distance(512) == 511
    for window, context in ((1, 2), (2, 3), (8192, 10**9)):
        with pytest.raises(ValueError, match="declare fewer tokens"):
            LogisticSelfExtend.recommended(window, context)


def test_a_decoded_token_is_the_last_row_of_prefill():
    """Over more than one growth of the groups, one token at a time and in chunks."""
    model = build("llama")
    ids = tokens(2, 70)
    with torch.no_grad(), extend(model, LogisticSelfExtend(6, 0.3, 6)):
        whole = model(ids, use_cache=False).logits
        past = model(ids[:, :23]).past_key_values
        for n in range(23, 60):
            found = model(ids[:, n : n + 1], past_key_values=past).logits[:, -1]
            assert ((found - whole[:, n]).abs().max() / whole.abs().max()).item() <= 1e-5
        rest = model(ids[:, 60:], past_key_values=past).logits
        assert ((rest - whole[:, 60:]).abs().max() / whole.abs().max()).item() <= 1e-5


def test_the_keys_exist_in_two_forms():
    assert forms(LogisticSelfExtend(64).layout()) == {Identity(): Retention(tail=64), GrowingGroups(0.02, 33): Retention(tail=None)}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LogisticSelfExtend(0), "window must be an integer of at least 1"),
        (lambda: LogisticSelfExtend(4, -0.1), "growth must be a number of at least 0"),
        (lambda: LogisticSelfExtend(4, math.nan), "growth must be a number"),
        (lambda: LogisticSelfExtend(4, math.inf), "growth must be a number"),
        (lambda: LogisticSelfExtend(4, largest_group=0), "largest_group must be an integer of at least 1"),
        (lambda: LogisticSelfExtend(4, largest_group=2.5), "largest_group must be an integer"),
        (lambda: LogisticSelfExtend(4, largest_group=4097), "pass largest-group 4096 or less"),
        (lambda: LogisticSelfExtend(4, log_scale=1), "log_scale must be an integer of at least 2"),
    ],
)
def test_bad_parameters_are_refused_with_the_fix(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
