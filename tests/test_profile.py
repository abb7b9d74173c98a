"""Profiles: the data and its file, `extend` with one, and how the command line picks one up."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import longreach
from commands import Run, refused
from longreach import DynamicNTK, LMInfinite, Profile, ReRoPE, SelfExtend, Stock, YaRN, extend
from longreach.configs import Window, decoder
from longreach.hf.checks import find_base
from longreach.hf.fingerprint import checkpoint_fingerprint, fingerprint
from longreach.planning import dial
from longreach.planning.memory import Budget
from longreach.planning.profile import LARGEST, Tuned, default_path
from tiny import WINDOW, llama

SHORT = Tuned(128, ReRoPE(16), "found 9 of 10 keys; the old rule 2 of 10", {"recall": [9, 10], "date": "2026-05-04", "loss": 3.5, "chat": None})
LONG = Tuned(512, SelfExtend(16, 16), "found 8 of 10 keys; the old rule 1 of 10", {"seconds": {"a": 1}})
PRINTS = "9" * 64


def profile_of(model: Any, *entries: Tuned, window: int = WINDOW) -> Profile:
    return Profile("tiny", checkpoint_fingerprint(find_base(model)), window, entries or (SHORT, LONG))


# -- the data ---------------------------------------------------------------------------------------------------------------------------


def test_an_entry_serves_contexts_up_to_its_own():
    profile = Profile("tiny", PRINTS, WINDOW, (SHORT, LONG))
    assert [profile.choose(n) for n in (1, 64, 65, 128, 129, 512)] == [None, None, SHORT, SHORT, LONG, LONG]
    says = r"tuned for 128, 512, not for 513 tokens; run longreach tune --model tiny --context 513, or .*--no-profile, profile=None"
    with pytest.raises(ValueError, match=says):
        profile.choose(513)
    assert [profile.reaches(n) for n in (1, 64, 512, 513)] == [True, True, True, False]
    with pytest.raises(ValueError, match="was tuned for no context, not for 65 tokens"):
        Profile("tiny", PRINTS, WINDOW).choose(65)
    with pytest.raises(ValueError, match=r"--model 'a; b' --context 65,"):
        Profile("a; b", PRINTS, WINDOW).choose(65)
    with pytest.raises(ValueError, match=r"--model 'my model' --context 65 --trained-window 64,"):
        Profile("theirs", PRINTS, WINDOW, user=("my model", WINDOW)).choose(65)
    assert Profile("theirs", PRINTS, WINDOW).command(65, "mine", 64) == "longreach tune --model mine --context 65 --trained-window 64"
    assert "user" not in Profile("theirs", PRINTS, WINDOW, user=("mine", None)).to_json()


def test_an_entry_is_added_or_replaced_in_order():
    profile = Profile("tiny", PRINTS, WINDOW).with_entry(LONG).with_entry(SHORT)
    assert profile.entries == (SHORT, LONG)
    other = Tuned(128, YaRN(2.0), "better")
    assert profile.with_entry(other).entries == (other, LONG)
    assert profile.entries == (SHORT, LONG)


def test_evidence_is_a_copy_of_plain_data():
    given: dict[str, Any] = {"counts": (1, 2), "nested": {"a": [1]}}
    entry = Tuned(128, ReRoPE(16), "found", given)
    given["nested"]["a"].append(2)
    assert entry.evidence == {"counts": [1, 2], "nested": {"a": [1]}}
    assert (entry.date, SHORT.date, Tuned(128, ReRoPE(16), "x", {"date": "\x1b[2J"}).date) == (None, "2026-05-04", None)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Tuned(0, ReRoPE(16), "found"), "context of an entry must be a positive number of tokens, not '0'; tune again with longreach tune"),
        (lambda: Tuned(True, ReRoPE(16), "found"), "context of an entry must be a positive number of tokens"),
        (lambda: Tuned(128, "rerope", "found"), "must be a method such as"),  # type: ignore[arg-type]
        (lambda: Tuned(128, ReRoPE(16), ""), "the reason of an entry must be one line"),
        (lambda: Tuned(128, ReRoPE(16), "found\x1b[31m"), "printable characters"),
        (lambda: Tuned(128, ReRoPE(16), "f" * 1001), "at most 1000"),
        (lambda: Tuned(128, ReRoPE(16), "found", {"a": float("nan")}), "must be plain JSON data, and holds float 'nan'"),
        (lambda: Tuned(128, ReRoPE(16), "found", {"a": torch.tensor(1)}), "must be plain JSON data, and holds Tensor"),
        (lambda: Tuned(128, ReRoPE(16), "found", {"a": 2**63}), "must be plain JSON data, and holds int"),
        (lambda: Tuned(128, ReRoPE(16), "found", {1: 2}), "must be plain JSON data, and holds dict"),  # type: ignore[dict-item]
        (lambda: Tuned(128, ReRoPE(16), "found", [1]), "must be an object with named values, not list"),  # type: ignore[arg-type]
        (lambda: Tuned(128, ReRoPE(16), "found", {"a": "x" * 2**18}), "exceeds 262144 bytes; keep summaries"),
        (lambda: Profile("", PRINTS, WINDOW), "the model of a profile must be one line"),
        (lambda: Profile("tiny", "9" * 63, WINDOW), "must be 64 hexadecimal digits"),
        (lambda: Profile("tiny", PRINTS, 64.0), "the window of a profile must be"),  # type: ignore[arg-type]
        (lambda: Profile("tiny", PRINTS, WINDOW, (LONG, SHORT)), "must ascend, each once"),
        (lambda: Profile("tiny", PRINTS, WINDOW, (LONG, LONG)), "must ascend, each once"),
        (lambda: Profile("tiny", PRINTS, 128, (SHORT,)), "inside the trained window of 128"),
        (lambda: Profile("tiny", PRINTS, WINDOW, (Tuned(128, Stock(), "found"),)), "Stock.* does not reach the 128 tokens"),
        (lambda: Profile("tiny", PRINTS, WINDOW, (Tuned(256, YaRN(2.0), "found"),)), "YaRN.* does not reach the 256 tokens"),
        (lambda: Profile("tiny", PRINTS, WINDOW, ("x",)), "must be longreach.planning.profile.Tuned"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_profile_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# -- the file ---------------------------------------------------------------------------------------------------------------------------


def test_a_profile_round_trips_through_its_file(tmp_path):
    combined = Tuned(256, longreach.Combined(YaRN(2.0), LMInfinite(64, 4)), "found")
    profile = Profile("tiny", PRINTS, WINDOW, (SHORT, combined, LONG))
    profile.write(tmp_path / "p.json")
    found = Profile.read(tmp_path / "p.json")
    assert found == profile
    assert found.source == str(tmp_path / "p.json")
    assert Profile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    assert [file.name for file in tmp_path.iterdir()] == ["p.json"]


def test_the_cache_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profile = Profile("tiny", PRINTS, WINDOW, (SHORT,))
    assert profile.keep() == default_path(PRINTS) == tmp_path / "longreach" / "profiles" / f"{'9' * 16}.json"
    assert Profile.read(default_path(PRINTS)) == profile


def change(path: list[Any], value: Any) -> Any:
    data: Any = Profile("tiny", PRINTS, WINDOW, (SHORT,)).to_json()
    data = copy.deepcopy(data)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


HOSTILE = [
    ([], "no profile of longreach"),
    (change(["kind"], "cake"), "no profile of longreach"),
    (change(["version"], True), "a profile of version True, and this longreach reads version 1"),
    (change(["version"], 1.0), "a profile of version 1.0, and this longreach reads version 1"),
    (
        change(["entries", 0, "method"], {"method": "selfextend", "group_size": 4, "window": 16, "shift": "zzz"}),
        "shift must be 'floor' or 'true_division', not 'zzz'",
    ),
    (change(["version"], 2), "version 2, and this longreach reads version 1"),
    (change(["extra"], 1), "'extra' is unknown"),
    (change(["entries", 0, "extra"], 1), "'extra' is unknown"),
    (change(["entries"], {}), "must be a list"),
    (change(["entries"], [1]), "an entry must be an object"),
    (change(["entries"], [{}]), "is missing"),
    (change(["fingerprint"], ["9"]), "64 hexadecimal digits"),
    (change(["window"], "64"), "the window of a profile"),
    (change(["window"], -1), "the window of a profile"),
    (change(["model"], "tiny\n"), "printable"),
    (change(["entries", 0, "context"], 1e9), "context of an entry"),
    (change(["entries", 0, "reason"], None), "reason of an entry"),
    (change(["entries", 0, "evidence"], [1]), "must be an object with named values"),
    (change(["entries", 0, "method"], "rerope"), "an object with its name as 'method'"),
    (change(["entries", 0, "method"], {"method": ["rerope"]}), "an object with its name as 'method'"),
    (change(["entries", 0, "method"], {"method": "cake"}), "unknown method 'cake'"),
    (change(["entries", 0, "method"], {"method": "rerope", "cake": 1}), "has no parameter cake"),
    (change(["entries", 0, "method"], {"method": "pi"}), "parameters of pi cannot be used"),
    (change(["entries", 0, "method"], {"method": "rerope"}), r"ReRoPE\(\) does not reach the 128 tokens"),
    (change(["entries", 0, "method"], {"method": "longrope", "factor": 2, "long_factor": "/etc/hostname"}), "must be numbers in a profile"),
    (change(["entries", 0, "method"], {"method": "longrope", "factor": 2, "long_factor": "README"}), "must be numbers in a profile"),
    (change(["entries", 0, "method"], {"method": "dynamic-ntk", "factor": 1e300}), "factor must be a number of at least 1 and at most 4294967296, not 1e"),
    (change(["entries", 0, "method"], {"method": "infllm", "n_local": 32, "block_size": 2**62}), "block_size must be an integer of at least 1 and at most"),
    (change(["entries", 0, "method"], {"method": "yarn", "factor": 2, "attention_factor": 1e300}), "attention_factor must be a number above 0, from 0.01 to"),
    (change(["entries", 0, "method"], {"method": ["longrope"], "factor": 2, "long_factor": "README"}), "an object with its name"),
    (
        change(["entries", 0, "method"], {"method": "combined", "encoding": {"method": "longrope", "factor": 2, "long_factor": "./x"}, "positions": {}}),
        "must be numbers in a profile",
    ),
]


@pytest.mark.parametrize(("data", "says"), HOSTILE)
def test_a_hostile_file_is_refused_with_its_path(tmp_path, data, says):
    file = tmp_path / "p.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=says) as caught:
        Profile.read(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"kind": NaN}', "holds NaN"),
        (b'{"window": ' + b"9" * 5000 + b"}", "holds a whole number of 5000 digits, which no profile has; tune again"),
        (b" " * (LARGEST + 1), "more than 1048576 bytes"),
    ],
)
def test_what_is_no_json_is_refused(tmp_path, content, says):
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        Profile.read(tmp_path / "p.json")


def test_deep_evidence_and_absent_files_are_refused(tmp_path):
    nested: Any = 1
    for _ in range(40):
        nested = [nested]
    (tmp_path / "deep.json").write_text(json.dumps(change(["entries", 0, "evidence", "x"], nested)))
    for name, says in (("deep.json", "nested more than 12 deep"), ("none.json", "there is no such file; name another, or make"), (".", "no ordinary file")):
        with pytest.raises(ValueError, match=says):
            Profile.read(tmp_path / name)


# -- the fingerprint --------------------------------------------------------------------------------------------------------------------


def test_a_cast_keeps_the_fingerprint_and_another_weight_does_not():
    model = llama().bfloat16()
    half, exact = checkpoint_fingerprint(model), fingerprint(model)
    model.float()
    assert checkpoint_fingerprint(model) == half
    assert fingerprint(model) != exact
    assert checkpoint_fingerprint(llama()) == half  # rounding is what the cast does
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert checkpoint_fingerprint(model) != half


def test_packed_weights_keep_their_dtype():
    first, second = (torch.nn.Module() for _ in range(2))
    first.register_buffer("packed", torch.tensor([1, 2], dtype=torch.int8))
    second.register_buffer("packed", torch.tensor([1, 2], dtype=torch.uint8))
    assert checkpoint_fingerprint(first) != checkpoint_fingerprint(second)


# -- extend -----------------------------------------------------------------------------------------------------------------------------


def test_extend_takes_the_method_of_the_profile(tmp_path):
    model = llama()
    profile = profile_of(model)
    profile.write(tmp_path / "p.json")
    with extend(model, context=100, profile=profile) as extension:
        assert extension.method == ReRoPE(16)
        assert extension.context == 100
        assert extension.report()["profile"] == {
            "source": None, "model": "tiny", "fingerprint": profile.fingerprint, "context": 128, "date": "2026-05-04",
        }  # fmt: skip
        assert "from the profile of tiny, tuned at 128 tokens on 2026-05-04: found 9 of 10 keys" in extension.report()["reason"]
        assert "from the profile of tiny" in extension.describe()
    with extend(model, context="512", profile=str(tmp_path / "p.json")) as extension:
        assert extension.method == SelfExtend(16, 16)
        assert extension.report()["profile"]["source"] == str(tmp_path / "p.json")
    with extend(model, context=WINDOW, profile=tmp_path / "p.json") as extension:
        assert (extension.method, extension.report()["profile"]) == (Stock(), None)
    with extend(model.bfloat16(), context=100, profile=profile) as extension:
        assert extension.method == ReRoPE(16)


def test_an_entry_far_above_the_context_is_used_with_a_warning():
    window = Window(WINDOW, "of the test")
    profile = Profile("tiny", PRINTS, WINDOW, (SHORT, LONG), user=("my model", None))
    for context, says in ((256, None), (255, "tuned at 512 tokens and is used at 255, where it was not measured"), (128, None), (WINDOW, None)):
        warning = dial.choose(window, context, None, profile).warning
        assert (warning is None) == (says is None) and (says is None or says in warning), context
    assert "longreach tune --model 'my model' --context 200 measures that" in (dial.choose(window, 200, None, profile).warning or "")
    model = llama()
    with pytest.warns(UserWarning, match="is used at 200, where it was not measured"), extend(model, context=200, profile=profile_of(model)) as extension:
        assert extension.method == LONG.method


def test_a_comparison_with_a_rule_that_has_changed_is_said():
    window = Window(WINDOW, "of the test")
    today = dial.by_length(window, 128).method

    def reason(evidence: Any) -> str:
        return dial.choose(window, 100, None, Profile("tiny", PRINTS, WINDOW, (Tuned(128, ReRoPE(16), "found", evidence),))).reason

    then = SelfExtend(7, 21)
    assert f"at 128 tokens the dial's rule was {then.brief()} then, with which it was compared, and is {today.brief()} now" in reason({"dial": then.to_json()})
    for same in ({"dial": today.to_json()}, {}, {"dial": None}, {"dial": {"method": "nothing"}}, {"dial": [1]}):
        assert "the dial's rule was" not in reason(same)
    assert Tuned(128, ReRoPE(16), "found", {}).dial is None  # written before that was recorded


def test_frequencies_are_those_that_were_measured():
    """DynamicNTK fixes its frequencies from the declared context: a shorter one would make others."""
    model = llama()
    with extend(model, context=100, profile=profile_of(model, Tuned(128, DynamicNTK(), "found"))) as extension:
        assert (extension.context, extension.capacity) == (128, 128)
        assert extension.report()["profile"]["context"] == 128
        found = model(torch.arange(1, 101)[None]).logits
    with extend(model, DynamicNTK(), context=128):
        assert torch.equal(found, model(torch.arange(1, 101)[None]).logits)
    with extend(model, DynamicNTK(), context=100):
        assert not torch.equal(found, model(torch.arange(1, 101)[None]).logits)


def test_extend_never_looks_into_the_cache():
    model = llama()
    profile_of(model).keep()
    with extend(model, context=100) as extension:
        assert isinstance(extension.method, SelfExtend)
        assert extension.report()["profile"] is None


def test_extend_refuses_a_profile_that_does_not_belong():
    model = llama()
    profile = profile_of(model)
    for arguments, says in (
        ({"context": 600}, "tuned for 128, 512, not for 600 tokens; run longreach tune --model tiny --context 600"),
        ({"context": 100, "method": ReRoPE(16)}, "and no method, or leave the profile out"),
        ({}, "pass context=N"),
        ({"context": 100, "trained_window": 32}, r"trained window of 64 tokens, and 32 is in force .*--trained-window 64"),
    ):
        with pytest.raises(ValueError, match=says):
            extend(model, profile=profile, **arguments)
    with pytest.raises(ValueError, match="not dict"):
        extend(model, context=100, profile={})  # type: ignore[arg-type]
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    for context in (WINDOW, 100):
        with pytest.raises(ValueError, match="tuned for other weights than these"):
            extend(model, context=context, profile=profile)


def test_memory_binds_a_profile_as_it_does_the_rule():
    model = llama()
    budget = Budget(decoder(model.config, torch.float32), 0)
    profile = profile_of(model, LONG)
    window = Window(WINDOW, "of the test")
    least = budget.needs(LMInfinite.suggest(WINDOW, 512) or Stock(), 512)
    assert least < budget.needs(LONG.method, 512)
    choice = dial.choose(window, 512, Budget(budget.architecture, budget.needs(LONG.method, 512) - 1), profile)
    assert choice.method != LONG.method
    assert choice.profile is None
    assert choice.warning is not None
    assert "memory binds: SelfExtend(group_size=16, window=16) needs about" in choice.warning
    assert dial.choose(window, 512, Budget(budget.architecture, budget.needs(LONG.method, 512)), profile).profile is profile


# -- the command line -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(folders) -> Profile:
    """The profile of the tiny Llama, in the cache of this test."""
    model, _ = longreach.load(folders["llama"])
    profile = profile_of(model)
    profile.keep()
    return profile


def ask(run: Run, folders: dict[str, str], *more: object) -> Any:
    return run("run", "-m", folders["llama"], "-p", "a" * 80, "--max-new-tokens", 2, *more)


def test_run_picks_up_the_profile_in_the_cache_and_says_so(run, folders, tuned):
    path = default_path(tuned.fingerprint)
    found = ask(run, folders, "--json")
    assert found.json["method"] == ReRoPE(16).to_json()
    assert found.json["extension"]["profile"] == {
        "source": "cache", "model": "tiny", "fingerprint": tuned.fingerprint, "context": 128, "date": "2026-05-04",
    }  # fmt: skip
    assert f"profile: ReRoPE(window=16) from {path}, tuned at 128 tokens on 2026-05-04; --no-profile ignores it" in found.err
    assert "from the profile of tiny" in found.err
    without = ask(run, folders, "--no-profile", "--json")
    assert without.json["method"]["method"] == "selfextend"
    assert without.json["extension"]["profile"] is None
    assert "profile:" not in without.err
    method = ask(run, folders, "--method", "rerope", "--window", 8, "--json")
    assert method.json["extension"]["profile"] is None
    assert "profile" not in method.err
    assert "profile:" not in ask(run, folders, "--quiet", "--json").err


def test_nothing_is_said_inside_the_window(run, folders, tuned):
    default_path(tuned.fingerprint).write_text("broken")
    found = run("run", "-m", folders["llama"], "-p", "aaa", "--max-new-tokens", 2, "--json")
    assert found.json["method"]["method"] == "stock"
    assert "profile" not in found.err


def test_a_named_profile_that_is_not_used_is_said(run, folders, tuned, tmp_path):
    file = tmp_path / "mine.json"
    tuned.write(file)
    base = ("run", "-m", folders["llama"], "-p", "aaa", "--max-new-tokens", 2, "--json")
    found = run(*base, "--profile", file)
    assert found.json["method"]["method"] == "stock" and found.json["extension"]["profile"] is None
    assert f"the profile {file} is not used: 6 tokens fit the trained window of 64, where plain attention reads them" in found.err
    assert f"the profile {file} is not used: 60 tokens fit" in run(*base, "--profile", file, "--context", 60).err
    assert "is not used" not in run(*base, "--profile", file, "--context", 100).err
    assert "is not used" not in run(*base, "--profile", file, "--context", 600).err  # refused, in words of its own


def test_a_profile_that_does_not_fit_is_said_and_the_rule_chooses(run, folders, tuned, tmp_path):
    path = default_path(tuned.fingerprint)
    beyond = ask(run, folders, "--context", 600, "--json")
    assert beyond.json["method"]["method"] == "selfextend"
    assert beyond.json["extension"]["profile"] is None
    assert f"the profile {path} was tuned for 128, 512, not for 600 tokens; the dial's rule chooses; longreach tune --model " in beyond.err
    assert f"longreach tune --model {folders['llama']} --context 600 tunes for that" in beyond.err  # as the user names it, not the file
    stated = ask(run, folders, "--context", 600, "--trained-window", WINDOW, "--json")
    assert f"--model {folders['llama']} --context 600 --trained-window {WINDOW} tunes for that" in stated.err
    window = ask(run, folders, "--trained-window", 32, "--json")
    assert window.json["extension"]["profile"] is None
    assert "was tuned with a trained window of 64 tokens, and 32 is in force; the dial's rule chooses" in window.err
    assert f"longreach tune --model {folders['llama']} --context" in window.err and " --trained-window 32 tunes for that" in window.err
    path.write_text("{")
    broken = ask(run, folders, "--json", "--quiet")
    assert broken.json["extension"]["profile"] is None
    assert f"warning: the profile {str(path)!r} cannot be used: it is no JSON" in broken.err
    assert "the dial's rule chooses" in broken.err
    other = Profile("other", tuned.fingerprint[:16] + "0" * 48, WINDOW, (SHORT,))
    other.write(path)
    foreign = ask(run, folders, "--json")
    assert foreign.json["extension"]["profile"] is None
    assert "is of another model" in foreign.err


def test_a_profile_that_is_named_is_used_or_refused(run, folders, tuned, tmp_path):
    file = tmp_path / "mine.json"
    profile = Profile("mine", tuned.fingerprint, WINDOW, (Tuned(128, YaRN(2.0), "found"),))
    profile.write(file)
    found = ask(run, folders, "--profile", file, "--json")
    assert found.json["method"]["method"] == "yarn"
    assert found.json["extension"]["profile"]["source"] == str(file)
    assert f"profile: YaRN(factor=2.0) from {file}, tuned at 128 tokens\n" in found.err
    base = ("run", "-m", folders["llama"], "-p", "a" * 80, "--max-new-tokens", 2, "--profile")
    refused(run, *base, file, "--context", 600, says=f"tuned for 128, not for 600 tokens; run longreach tune --model {folders['llama']} --context 600")
    refused(run, *base, file, "--method", "stock", says="leave out --profile, or --method and its parameters")
    refused(run, *base, file, "--no-profile", says="contradict each other")
    refused(run, *base, file, "--trained-window", 32, says="32 is in force")
    refused(run, *base, tmp_path / "none.json", says="there is no such file")
    (tmp_path / "bad.json").write_text("[]")
    refused(run, *base, tmp_path / "bad.json", says="this is no profile of longreach")
    refused(run, *base, file, "--document", tmp_path / "x", says="--document says what it was read with")
    Profile("mine", PRINTS, WINDOW, profile.entries).write(tmp_path / "other.json")
    refused(run, *base, tmp_path / "other.json", says="tuned for other weights")
    assert "profile:" not in run(*base, tmp_path / "other.json").err  # not announced before it is refused
    refused(run, "check", "-m", folders["llama"], "--profile", file, says="pass --context N too")
    refused(run, "check", "--all", "--profile", file, says="leave out --profile")


def test_a_saved_document_keeps_the_method_of_the_profile(run, folders, tuned, book, tmp_path):
    read = run("run", "-m", folders["llama"], "-f", book, "--context", 400, "--save-document", tmp_path / "d.safetensors", "--json")
    assert read.json["extension"]["method"] == SelfExtend(16, 16).to_json()
    assert read.json["extension"]["profile"]["context"] == 512
    again = run("run", "-m", folders["llama"], "--document", tmp_path / "d.safetensors", "-p", "?", "--max-new-tokens", 2, "--json")
    assert again.json["method"] == SelfExtend(16, 16).to_json()
    assert "profile:" not in again.err


def test_a_conversation_that_leaves_the_window_goes_on_with_the_profile(run, folders, tuned, stdin):
    stdin(b"aaaa\n" + b"b" * 60 + b"\n")
    found = run("chat", "-m", folders["llama"], "--max-new-tokens", 4, "--json")
    assert found.json["extension"]["profile"]["context"] == 128
    assert found.json["context"] == 128
    assert found.err.count("profile: ReRoPE(window=16)") == 1
    Profile("tiny", tuned.fingerprint, WINDOW, (Tuned(100, ReRoPE(8), "found"),)).keep()  # twice the window is beyond it, and not needed yet
    stdin(b"aaaa\n" + b"b" * 55 + b"\n")
    nearer = run("chat", "-m", folders["llama"], "--max-new-tokens", 4, "--json")
    assert (nearer.json["context"], nearer.json["extension"]["method"]) == (100, ReRoPE(8).to_json())


def test_evaluations_record_the_profile(run, folders, tuned, tmp_path):
    options = ("-m", folders["llama"], "--lengths", 300, "--samples", 1, "--depths", 0)
    found = run("eval", "run", "passkey", *options, "--out", tmp_path / "out", "--json")
    assert found.json["method"] == LONG.method.to_json(), found.err
    facts = json.loads((tmp_path / "out" / "run.json").read_text())["extension"]["profile"]
    assert (facts["source"], facts["fingerprint"]) == ("cache", tuned.fingerprint)
    assert run("eval", "run", "passkey", *options, "--no-profile", "--out", tmp_path / "rule", "--json").json["method"] != LONG.method.to_json()
    file = tmp_path / "text.txt"
    file.write_text("a" * 300)
    loss = run("eval", "ppl", "-m", folders["llama"], "--text", file, "--lengths", 100, "--out", tmp_path / "ppl", "--json")
    assert loss.json["method"] == ReRoPE(16).to_json()
    assert json.loads((tmp_path / "ppl" / "run.json").read_text())["extension"]["profile"]["context"] == 128
    timed = run("eval", "estimate", "passkey", *options, "--json")
    assert "profile: " in timed.err
    assert timed.json["samples"] == 1


def test_lm_eval_runs_under_the_profile(folders, tuned):
    from longreach.cli import common, eval_lm, profiles

    model, _ = longreach.load(folders["llama"])
    for asked, method in ((profiles.BY_DEFAULT, ReRoPE(16)), (profiles.Asked(None, ignored=True), dial.by_length(Window(WINDOW, "of the test"), 100).method)):
        with common.output(as_json=True) as out, eval_lm.attached(out, model, None, 100, None, asked) as extension:
            assert extension.method == method


def test_check_shows_what_the_profile_chooses(run, folders, tuned):
    found = run("check", "-m", folders["llama"], "--context", 100, "--tokens", 80, "--json").json
    assert found["extension"]["profile"]["source"] == "cache"
    assert [row["method"]["method"] for row in found["dial"][:4]] == ["rerope", "selfextend", "selfextend", "selfextend"]
    assert found["dial"][1]["method"] == LONG.method.to_json()
    assert "from the profile of tiny" in found["dial"][2]["reason"]
    assert "from the profile" not in found["dial"][3]["reason"]


def test_the_public_name():
    assert longreach.Profile is Profile
    assert "Profile" in dir(longreach)


def test_a_profile_is_not_written_where_it_cannot_be(tmp_path: Path):
    profile = Profile("tiny", PRINTS, WINDOW, (SHORT,))
    with pytest.raises(ValueError, match="there is no folder"):
        profile.write(tmp_path / "none" / "p.json")
    entries = tuple(Tuned(100 + n, ReRoPE(16), "found", {"a": "x" * 250_000}) for n in range(5))
    with pytest.raises(ValueError, match="the profile exceeds 1048576 bytes"):
        Profile("tiny", PRINTS, WINDOW, entries).write(tmp_path / "p.json")
    assert list(tmp_path.iterdir()) == []
