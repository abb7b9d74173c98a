"""What engines are asked for: the words of everywhere as JSON, and the method that follows. Runs without vLLM."""

from __future__ import annotations

import json

import pytest

from longreach import LMInfinite, SelfExtend, StreamingLLM, YaRN, configs
from longreach.methods.stock import Stock
from longreach.planning.profile import Profile, Tuned
from longreach.vllm.settings import Settings, asked, decide, parse


@pytest.fixture(scope="module")
def config():
    return configs.load("nano")[0]


def test_a_method_by_its_name_with_its_parameters():
    assert parse({"method": "selfextend", "group_size": 8, "window": 64}) == Settings(SelfExtend(8, 64))
    assert parse({"method": "lm-infinite", "n_local": 512, "context": "64k", "trained_window": 1024}) == Settings(LMInfinite(512), 65536, 1024)
    assert parse({"context": 4096}) == Settings(None, 4096) and parse({}) == Settings()


@pytest.mark.parametrize(
    "given, sentence",
    [
        ("selfextend", "must be an object"),
        ([1], "must be an object"),
        ({1: 2}, "must be an object"),
        ({"group_size": 8}, "no method"),
        ({"method": "nonsense"}, "unknown method"),
        ({"method": ["selfextend"]}, '"method" must be the name of a method'),
        ({"method": None}, '"method" must be the name of a method'),
        ({"method": "selfextend", "groups": 8}, "no parameter groups"),
        ({"method": "selfextend", "window": 8}, "group_size"),
        ({"method": "selfextend", "group_size": "8", "window": 8}, "must be an integer"),
        ({"context": "lots"}, "context"),
        ({"context": -1}, "context"),
        ({"context": [4096]}, "context"),
        ({"profile": 3, "context": 4096}, "profile"),
        ({"profile": "p.json", "method": "lm-infinite", "n_local": 5}, "a profile chooses the method"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse(given)


def test_the_environment_says_the_same_or_is_refused():
    variable = {"LONGREACH_VLLM": '{"context": 2048}'}
    assert asked({}, {}) is None and asked({"other": 1}, {}) is None and asked(None, {}) is None
    assert asked({}, variable) == asked({"longreach": {"context": 2048}}, {}) == asked({"longreach": {"context": 2048}}, variable) == Settings(None, 2048)
    for wrong, sentence in (('{"context": 1024}', "different methods"), ("{", "not JSON"), ("[" * 100_000, "characters"), ("[" * 60_000, "not JSON")):
        with pytest.raises(ValueError, match=sentence):
            asked({"longreach": {"context": 2048}}, {"LONGREACH_VLLM": wrong})


def test_the_dial_chooses_for_the_longest_sequence(config):
    found = decide(parse({}), config, 2048)
    assert isinstance(found.method, SelfExtend) and found.context == 2048 and found.window.tokens == 512 and "512" in found.said
    assert decide(parse({}), config, 512).method == Stock()
    assert isinstance(decide(parse({"context": 4096}), config, 2048).method, SelfExtend)
    with pytest.raises(ValueError, match="no usual parameters reach"):
        decide(parse({}), config, 10**7)


def test_vllm_is_left_alone_only_where_its_own_tables_reach(config):
    """Its rotary tables end with the positions of the configuration: behind them it reads what lies in memory."""
    assert decide(parse({}), config, 512).plain and decide(parse({"trained_window": 1024}), config, 512).plain
    beyond = decide(parse({"trained_window": 1024}), config, 1024)
    assert beyond.method == Stock() and not beyond.plain
    assert not decide(parse({"method": "stock"}), config, 512).plain and not decide(parse({}), config, 2048).plain


def test_what_was_decided_decides_the_same_again(config):
    dynamic = {"method": "dynamic-ntk", "factor": 4.0, "context": 2048}
    for given, longest in (({}, 2048), ({"method": "yarn", "factor": 4.0}, 2048), (dynamic, 1600), ({"trained_window": 256}, 1024)):
        found = decide(parse(given), config, longest)
        again = decide(parse(json.loads(json.dumps(found.to_json()))), config, longest)
        assert (again.method, again.context, again.window.tokens) == (found.method, found.context, found.window.tokens)


def test_lengths_that_are_out_of_reach(config):
    with pytest.raises(ValueError, match=r"reaches 960 tokens.*--max-model-len 960"):
        decide(parse({"method": "selfextend", "group_size": 2, "window": 64}), config, 2048)
    with pytest.raises(ValueError, match="beyond the declared context of 1024"):
        decide(parse({"context": 1024}), config, 2048)
    with pytest.raises(ValueError, match="for any text"):
        decide(Settings(LMInfinite(600)), config, 2048)
    with pytest.raises(ValueError, match="reaches 512 tokens"):
        decide(Settings(StreamingLLM(2000)), config, 2048)
    assert "never trained" in (decide(Settings(Stock()), config, 2048).warning or "")
    assert decide(Settings(YaRN(4.0)), config, 2048).warning is None


BOUNDED = {"method": "lm-infinite", "n_local": 400}


def test_a_bounded_method_frees_pages_unless_they_are_to_be_kept(config):
    free, keep = (decide(parse({**BOUNDED, **pages}), config, 2048) for pages in ({}, {"pages": "keep"}))
    assert free.frees and free.memory is not None and "prefix caching is off" in free.memory and '"pages": "keep"' in free.memory
    assert not keep.frees and keep.memory is not None and '"pages": "free"' in keep.memory
    for found in (free, keep):
        assert decide(parse(json.loads(json.dumps(found.to_json()))), config, 2048).to_json() == found.to_json()
    every = decide(parse({"pages": "keep"}), config, 2048)
    assert not every.frees and every.memory is None and "pages" not in every.to_json()
    with pytest.raises(ValueError, match=r"selfextend may see any key.*leave out"):
        decide(parse({"pages": "free"}), config, 2048)
    with pytest.raises(ValueError, match='"pages" must be "free" or "keep"'):
        parse({**BOUNDED, "pages": "drop"})


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"method": "quest", "budget": 64, "page_size": 16}, "chooses keys by their content"),
        ({"method": "sirllm", "start_size": 4, "token_entropy_size": 64, "recent_size": 64}, "evicts tokens"),
        ({"method": "infllm"}, "chooses"),
    ],
)
def test_what_pages_cannot_hold(config, given, sentence):
    from longreach.methods import parameters, registry

    kind = registry()[given["method"]]
    small = kind.small(8)
    assert parameters(kind)
    with pytest.raises(ValueError, match=sentence):
        decide(Settings(small, trained_window=4096), config, 2048)


def test_a_profile_chooses_and_says_that_it_was_not_checked(config, tmp_path):
    tuned = Tuned(2048, SelfExtend(10, 60), "it found most")
    path = tmp_path / "profile.json"
    Profile("nano", "0" * 64, 512, (tuned,)).write(path)
    found = decide(parse({"profile": str(path)}), config, 2048)
    assert found.method == SelfExtend(10, 60) and "cannot be checked here" in (found.warning or "")
