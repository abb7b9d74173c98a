"""`longreach tune` and `longreach check --recall` on nano: what is written, read back, gone on from, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import longreach
from commands import Run, refused
from longreach.cli import main
from longreach.drawing.canvas import SIGNATURE
from longreach.evals import tasks as registry
from longreach.evals.harness.results import Folder
from longreach.evals.tune import halving, study
from longreach.evals.tune.bench import Refused
from longreach.evals.tune.candidates import DIAL, PLAIN, Candidate, propose
from longreach.evals.tune.study import Asked, ModelBench
from longreach.methods import from_json
from longreach.methods.selfextend import SelfExtend
from longreach.planning.machine import cache_folder
from longreach.planning.profile import Profile, Tuned

CONTEXT, FEW = 1024, ("SelfExtend(16, 16)", DIAL, PLAIN)
AT = ("--context", str(CONTEXT), "--budget", "1h", "--json")


@pytest.fixture(scope="module", autouse=True)
def few():
    """Three candidates and two documents, whatever the speed of the machine."""
    with pytest.MonkeyPatch.context() as patch:
        every = propose

        def three(*arguments: Any) -> Any:
            found = every(*arguments)
            return type(found)(tuple(c for c in found.candidates if c.label in FEW), found.left_out)

        patch.setattr(study, "propose", three)
        patch.setattr(halving, "MOST_DOCUMENTS", 2)
        yield


@pytest.fixture(scope="module")
def nano() -> Any:
    return longreach.load("nano")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch, open(folder / "printed.json", "w") as stream:
        patch.setattr("sys.stdout", stream)
        assert main(["tune", *AT, "--work", str(folder / "work"), "--out", str(folder / "p.json"), "--picture", str(folder / "p.png")]) == 0
    return folder, json.loads((folder / "printed.json").read_text())


def test_what_a_tune_finds(tuned):
    folder, found = tuned
    assert (found["model"], found["context"], found["trained_window"], found["tasks"], found["price"]) == ("nano", 1024, 512, ["passkeys"], 0.25)
    rows = {row["label"]: row for row in found["candidates"]}
    assert set(rows) == set(FEW) and found["plan"]["rungs"] == [[3, 1], [2, 2]]
    assert all(row["of"] == 5 * row["documents"] and row["low"] <= row["recall"] <= row["high"] for row in rows.values())
    assert rows[DIAL]["documents"] == 2 and rows[DIAL]["recall"] >= 0.8 and 3 < rows[DIAL]["loss"] < 5 and rows[PLAIN]["loss"] is None
    assert rows[PLAIN]["recall"] < rows[DIAL]["recall"]
    assert [row["chosen"] for row in rows.values()].count(True) == 1 and rows[found["chosen"]]["chosen"]
    ceiling = {row["name"]: row for row in found["ceiling"]}
    assert ceiling["recall at 1x of the window, plain attention"]["recall"] == 1.0
    assert 3 < ceiling["loss inside the window, 1x"]["loss"] < ceiling["loss inside the window, 0.5x"]["loss"] < 5
    assert ceiling["recall at 0.5x of the window, plain attention"]["length"] == 256 and not found["notes"]
    assert found["sentences"][0].startswith(found["chosen"]) and found["left_out"]
    assert 0 < found["spent"] < 3600 and found["use"].startswith("longreach run --model nano --context 1024 --profile ")
    with Image.open(folder / "p.png") as picture:
        assert picture.width > 1000 and all(picture.info[name] == text for name, text in SIGNATURE.items())


def test_the_profile_is_read_back_and_used(tuned, nano):
    folder, found = tuned
    profile = Profile.read(folder / "p.json")
    entry = profile.choose(CONTEXT)
    assert entry is not None and (profile.model, profile.window, entry.context) == ("nano", 512, CONTEXT)
    assert entry.method == from_json(next(row["method"] for row in found["candidates"] if row["chosen"]))
    assert entry.reason.startswith(f"{found['chosen']}") and "is chosen: it found" in entry.reason
    assert entry.evidence["candidates"] == found["candidates"] and entry.evidence["seed"] == 0
    with longreach.extend(nano[0], context=CONTEXT, profile=profile) as extension:
        assert extension.method == entry.method


def test_every_candidate_is_a_run_that_can_be_reported(tuned, run: Run, tmp_path):
    folders = sorted((tuned[0] / "work/candidates").iterdir())
    assert len(folders) == 3 and all(len(Folder(path).records()) in (5, 10) for path in folders)
    assert Folder(folders[0]).run["config"]["fingerprint"] == tuned[1]["fingerprint"]
    assert run("eval", "compare", *folders[:2], "--json").json["rows"][0]["n"] >= 8
    losses = sorted((tuned[0] / "work/losses").iterdir())
    done = run("eval", "report", *folders, *losses, "--html", tmp_path / "report.html")
    assert done.code == 0 and "selfextend" in (tmp_path / "report.html").read_text()


def test_the_same_again_measures_nothing(tuned, run: Run, monkeypatch):
    folder, found = tuned

    def never(*arguments: Any, **more: Any) -> None:
        raise AssertionError("a model was attached")

    monkeypatch.setattr(study, "attached", never)
    again = run("tune", *AT, "--work", folder / "work", "--out", folder / "p.json").json
    assert [{**row, "seconds": 0} for row in again["candidates"]] == [{**row, "seconds": 0} for row in found["candidates"]]
    assert (again["chosen"], again["ceiling"], again["sentences"]) == (found["chosen"], found["ceiling"], found["sentences"])


def test_other_contexts_are_added_to_a_profile(tuned, run: Run, tmp_path):
    folder, _ = tuned
    profile = Profile.read(folder / "p.json")
    entry = profile.choose(CONTEXT)
    assert entry is not None
    from dataclasses import replace

    both = profile.with_entry(replace(entry, context=900))
    both.write(tmp_path / "both.json")
    assert [e.context for e in Profile.read(tmp_path / "both.json").entries] == [900, CONTEXT]
    again = run("tune", *AT, "--work", folder / "work", "--out", tmp_path / "both.json")
    assert again.code == 0 and f"warning: {tmp_path / 'both.json'} has an entry for 1024 tokens of 20" in again.err
    assert "for passkeys: " in again.err and " in 2 documents" in again.err and "A new choice replaces it" in again.err
    assert [e.context for e in Profile.read(tmp_path / "both.json").entries] == [900, CONTEXT]


def test_the_cache_is_the_default_for_profile_and_work(tuned, nano, run: Run):
    home = cache_folder()
    bench = ModelBench(*nano, "nano", Asked(CONTEXT, (registry.task("passkeys"),)))
    target = study.workplace.default_path(bench._settings())
    assert target.parent == home / "tune" and target.name.startswith(f"{bench.fingerprint[:12]}-1024-") and not target.parent.exists()
    target.parent.mkdir(parents=True)
    (tuned[0] / "work").rename(target)
    try:
        done = run("tune", *AT)
        assert Path(done.json["profile"]).parent == home / "profiles" and "--profile" not in done.json["use"]
        picked = run("check", "--recall", "--context", CONTEXT, "--json")
        assert "profile: " in picked.err
    finally:
        target.rename(tuned[0] / "work")


def test_the_list_measures_nothing_but_a_short_prompt(run: Run, tmp_path):
    done = run("tune", "--context", CONTEXT, "--budget", "1h", "--list", "--json").json
    assert [row["label"] for row in done["candidates"]] == list(FEW) and done["document_seconds"] > 0
    assert done["plan"]["rungs"][0] == [3, 1] and done["candidates"][0]["options"] == ["selfextend", "--group-size", "16", "--window", "16"]
    shown = run("tune", "--context", CONTEXT, "--budget", "1h", "--list")
    assert "SelfExtend(16, 16)" in shown.out and "left out: combined" in shown.out and "a budget of 60 min buys: 3 candidates with 1 document" in shown.out
    assert not (cache_folder() / "tune").exists()
    assert "one document with its questions: about 0 s" not in shown.out and done["notes"] == []
    (tmp_path / "short.txt").write_text("The sea was calm that night. Nobody spoke of the ship. " * 3)
    short = run("tune", "--context", CONTEXT, "--text", tmp_path / "short.txt", "--list")
    assert "fewer than the context, so that the loss is that of the book" in short.out


def test_what_is_refused(run: Run, tmp_path):
    refused(run, "tune", "--context", 512, says="512 tokens fit the trained window of 512")
    refused(run, "tune", "--context", 600, "--task", "nothing", says="there is no task 'nothing'")
    refused(run, "tune", "--context", 1024, "--task", "longbench-v2", says="needs official data")
    refused(run, "tune", "--context", 1024, "--budget", "soon", says="budget must be a time, such as 90s, 10m or 1.5h")
    refused(run, "tune", "--context", 1024, "--budget", 10, says="budget needs a unit; write 10s, 10m or 10h")
    refused(run, "tune", "--context", 1024, "--picture", tmp_path / "p.jpg", says="--picture writes a PNG picture")
    (tmp_path / "mine.json").write_text("{}")
    refused(run, "tune", "--context", 1024, "--out", tmp_path / "mine.json", says="no profile that Longreach wrote")
    refused(run, "check", "--recall", says="--recall looks at a context; pass --context N too")
    refused(run, "check", "--recall", "--all", says="leave out one")


def test_somebody_elses_folder(run: Run, tuned, tmp_path):
    folder, _ = tuned
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    refused(run, "tune", *AT[:-1], "--work", tmp_path / "mine", says="so it is no tune that could go on")
    refused(run, "tune", *AT[:-1], "--seed", 1, "--work", folder / "work", says="holds a tune of other settings (seed: 0 there, 1 now)")
    file = folder / "work/tune.json"
    before = file.read_text()
    try:
        for version, says in (("0.0.7", 'holds what longreach "0.0.7" measured'), (None, "a longreach that did not say its version")):
            noted = json.loads(before)
            noted["settings"]["longreach"] = version
            file.write_text(json.dumps(noted))
            done = run("tune", *AT[:-1], "--work", folder / "work")
            assert done.code == 2 and says in done.err and f'this is "{longreach.__version__}"' in done.err and "choose another --work folder" in done.err
    finally:
        file.write_text(before)
    for content in ("[]", "{", '{"kind": "longreach tune"}', '{"kind": "longreach tune", "settings": {}, "model": "\\u001b[2J"}'):
        (tmp_path / "mine/tune.json").write_text(content)
        assert run("tune", *AT[:-1], "--work", tmp_path / "mine").code == 2
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_a_profile_of_other_weights_is_not_added_to(run: Run, tuned, tmp_path):
    profile = Profile.read(tuned[0] / "p.json")
    Profile("other", "0" * 64, 512, profile.entries).write(tmp_path / "other.json")
    refused(run, "tune", *AT[:-1], "--work", tuned[0] / "work", "--out", tmp_path / "other.json", says="is the profile of other weights (other)")
    Profile("nano", profile.fingerprint, 400, profile.entries).write(tmp_path / "window.json")
    done = run("tune", *AT, "--work", tuned[0] / "work", "--out", tmp_path / "window.json")
    assert done.code == 0 and "entries for a trained window of 400, which will be replaced" in done.err
    assert Profile.read(tmp_path / "window.json").window == 512


def test_the_profile_is_kept_where_the_picture_fails(run: Run, tuned, tmp_path, monkeypatch):
    from longreach.drawing import frontier

    def fails(*arguments: Any) -> None:
        raise ValueError("no room for a picture; make some")

    monkeypatch.setattr(frontier, "draw", fails)
    where = ("--work", tuned[0] / "work", "--out", tmp_path / "p.json", "--picture", tmp_path / "p.png")
    refused(run, "tune", *AT[:-1], *where, says="no room for a picture")
    assert Profile.read(tmp_path / "p.json").choose(CONTEXT) is not None


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda run: {**run, "losses": {"beyond": {"nats": 3.0, "blocks": ["x"], "seconds": 1}}}, "does not hold the losses of a tune"),
        (lambda run: {**run, "losses": {"beyond": {"nats": 3.0, "blocks": [1.0] * 300, "seconds": 1}}}, "does not hold the losses of a tune"),
        (lambda run: {**run, "losses": {"beyond": {"nats": 10**400, "blocks": [1.0], "seconds": 1}}}, "does not hold the losses of a tune"),
        (lambda run: {**run, "losses": {"beyond": {"nats": 3.0, "blocks": [10**400], "seconds": 1}}}, "does not hold the losses of a tune"),
        (lambda run: {**run, "losses": [1]}, "does not hold the losses of a tune"),
        (lambda run: {**run, "config": {**run["config"], "seed": 7}}, "holds a run of other settings (seed: 7 there, 0 now)"),
    ],
)
def test_files_that_were_changed(tuned, run: Run, change, says):
    path = next((tuned[0] / "work/losses").glob("loss-selfextend-group-size-4*")) / "run.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(change(json.loads(before))))
        refused(run, "tune", *AT[:-1], "--work", tuned[0] / "work", "--out", tuned[0] / "p.json", says=says)
    finally:
        path.write_text(before)


def test_answers_that_were_changed(tuned, run: Run):
    path = next((tuned[0] / "work/candidates").glob("selfextend-group-size-4*")) / "samples.jsonl"
    before = path.read_text()
    try:
        path.write_text(before.replace('{"accuracy": 1.0}', '{"accuracy": 17}', 1))
        refused(run, "tune", *AT[:-1], "--work", tuned[0] / "work", "--out", tuned[0] / "p.json", says="holds no accuracy in 0..1")
    finally:
        path.write_text(before)


def test_a_model_that_cannot_have_a_method_says_so(nano, tmp_path):
    bench = ModelBench(*nano, "nano", Asked(CONTEXT, (registry.task("passkeys"),)), tmp_path / "w")
    with pytest.raises(Refused, match=r"reaches 512 tokens on a trained window of 512, less than the declared context of 1024"):
        bench.read(Candidate("short", SelfExtend(1, 64), ""), 0)


@pytest.mark.parametrize("error", [ValueError("logits are not finite"), RuntimeError("out of memory"), MemoryError()])
def test_a_ceiling_whose_loss_fails_is_a_note_and_no_end(nano, tmp_path, monkeypatch, error):
    bench = ModelBench(*nano, "nano", Asked(CONTEXT, (registry.task("passkeys"),)), tmp_path / "w")

    def fails(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(study.perplexity, "losses", fails)
    part = next(part for part in bench.parts if part.name == "loss inside the window")
    assert bench.ceiling(part) == 0.0 and not bench.inside
    assert bench.notes == [f"the ceiling was not measured (loss inside the window): {str(error) or 'MemoryError'}"]


def test_a_short_text_hides_facts_and_the_book_is_predicted(nano, tmp_path):
    asked = Asked(CONTEXT, (registry.task("passkeys"),), "The sea was calm that night. Nobody spoke of the ship. " * 3)
    bench = ModelBench(*nano, "nano", asked, tmp_path / "w")
    assert len(bench.passage) == CONTEXT and "fewer than the context" in bench.notes[0]
    assert "The sea was calm" in bench.document(0)[0].sample.parts.document
    longer = ModelBench(*nano, "nano", Asked(CONTEXT, (registry.task("passkeys"),), longreach.shipped_book()), tmp_path / "v")
    assert not any("fewer than the context" in note for note in longer.notes)


@pytest.mark.parametrize("fails_at, there_are", [(2, 2), (3, 3), (9, 9)])
def test_the_documents_end_at_the_first_that_cannot_be_made(nano, tmp_path, monkeypatch, fails_at, there_are):
    """Document 8 used to end a whole tune of ruler-cwe, because sixteen were planned at a time: every time, and without a choice."""
    every = study.runner.plan

    def plan(work: Any, *more: Any) -> Any:
        if next(iter(work.values())).samples > fails_at:
            raise ValueError(f"sample {fails_at}: the shortest prompt has 1029 tokens; pass a longer --context")
        return every(work, *more)

    monkeypatch.setattr(study.runner, "plan", plan)
    bench = ModelBench(*nano, "nano", Asked(CONTEXT, (registry.task("passkeys"),)), tmp_path / "w")
    assert [bench.has(n) for n in range(there_are + 2)] == [True] * there_are + [False, False]
    assert bench.has(0) and len(bench.notes) == 1
    assert bench.notes[0].startswith(f"the tasks make no more than {there_are} documents, so that no candidate could read another: sample {fails_at}:")


def test_several_tasks_are_answered_together(nano, tmp_path):
    tasks = tuple(registry.task(name) for name in ("passkey", "ruler-niah-single-1", "passkeys"))
    bench = ModelBench(*nano, "nano", Asked(CONTEXT, tasks), tmp_path / "w")
    names = [item.task.name for item in bench.document(1)]
    assert [names.count(task.name) for task in tasks] == [5, 1, 5]  # a pass key at every depth, one needle, one document with five keys
    assert {item.sample.meta["index"] for item in bench.document(1)} == {1}
    rule = next(candidate for candidate in bench.proposal.candidates if candidate.label == DIAL)
    answers = bench.read(rule, 0)
    assert [answers.tasks.count(task.name) for task in tasks] == [5, 1, 5] and len(answers.scores) == len(answers.weights) == 11
    assert sum(weight for weight, task in zip(answers.weights, answers.tasks) if task == "ruler-niah-single-1") == pytest.approx(sum(answers.weights) / 3)


def test_a_quick_look_at_recall(run: Run):
    found = run("check", "--recall", "--context", CONTEXT, "--no-profile", "--json").json
    here, inside = found["recall"]["here"], found["recall"]["inside"]
    assert (here["length"], here["keys"], here["method"]["method"]) == (1024, 5, "selfextend") and here["found"] >= 4
    assert (inside["length"], inside["found"], inside["method"]["method"]) == (512, 5, "stock") and inside["low"] == pytest.approx(0.41965, abs=1e-5)
    shown = run("check", "--recall", "--context", CONTEXT, "--method", "lm-infinite", "--n-local", 256)
    assert "at 1024 tokens this model finds" in shown.out and "5 of 5 inside its window" in shown.out and "lm-infinite" in shown.out


def test_a_look_is_refused_before_anything_is_read(run: Run, nano, tmp_path, monkeypatch):
    """The document inside the window, which takes minutes on a real model, was read before the profile and the method were checked."""

    def never(*arguments: Any) -> None:
        raise AssertionError("a question was read")

    monkeypatch.setattr("longreach.evals.harness.model_engine.ModelEngine.answers", never)
    Profile("other", "0" * 64, 512, (Tuned(CONTEXT, SelfExtend(4, 64), "found"),)).write(tmp_path / "p.json")
    refused(run, "check", "--recall", "--context", CONTEXT, "--profile", tmp_path / "p.json", says="tuned for other weights than these")
    refused(run, "check", "--recall", "--context", CONTEXT, "--method", "selfextend", "--group-size", 1, "--window", 64, says="reaches 512 tokens")
    refused(run, "check", "--recall", "--context", 40, says="tokens")


def test_a_look_inside_the_window_advises_nothing(run: Run):
    shown = run("check", "--recall", "--context", 300)
    assert shown.code == 0 and "a look, not a measurement" in shown.out and "longreach tune" not in shown.out
