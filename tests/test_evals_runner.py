"""Runs with engines whose answers are known: files, resumption, shards, errors, budgets, statistics, pictures and the page."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

import longreach
from fake_engines import CopyTail, Empty, Failing, First
from longreach.evals import tasks as registry
from longreach.evals.harness import results, runner
from longreach.evals.harness.engine import Reply
from longreach.evals.harness.estimates import Step
from longreach.evals.harness.items import Item, ordered
from longreach.evals.harness.results import Folder
from longreach.evals.report import figures, special_figures, view
from longreach.evals.report import page as written_page
from longreach.evals.report.view import View
from longreach.evals.samples import budget
from longreach.evals.samples.base import Parts, Sample, Settings, Task
from longreach.evals.scores import clusters, statistics
from longreach.running import prompts

CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
SETTINGS = Settings(lengths=(256, 512), depths=(0.0, 0.5, 1.0), samples=2)
CONFIG = {"model": "fake", "method_text": "CopyTail(200)", "context": 512}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return longreach.load("nano")[1]


@pytest.fixture(scope="module")
def items(tokenizer: Any) -> list[Item]:
    return runner.plan({registry.task("passkey"): SETTINGS}, tokenizer)


def run(path: Path, engine: Any, items: list[Item], tokenizer: Any, shard: tuple[int, int] = (0, 1), **more: Any) -> runner.Outcome:
    tasks = runner.describe({registry.task("passkey"): SETTINGS}, more.pop("config", CONFIG))
    folder = Folder(path, shard)
    folder.start({"config": CONFIG, "tasks": tasks, "extension": {"trained_window": 256}, "started": "then", "ended": None})
    outcome = runner.run(items, engine, tokenizer, folder, {name: facts["config_hash"] for name, facts in tasks.items()}, shard=shard, **more)
    folder.finish("now")
    return outcome


def untimed(path: Path) -> list[dict[str, Any]]:
    return [dataclasses.asdict(record) for record in Folder(path).records()]


def test_the_files_of_a_run(tmp_path, items, tokenizer):
    steps: list[Step] = []
    outcome = run(tmp_path, CopyTail(tokenizer, 150), items, tokenizer, progress=steps.append)
    assert outcome == runner.Outcome(12, 0, 0, 0)
    assert [step.done for step in steps] == list(range(13)) and steps[-1].seconds_left == 0 and steps[-1].tokens == sum(item.needs for item in items)
    assert steps[0].what.startswith("reading sample 1 of 12 (passkey, ") and steps[0].seconds_left is None
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    wanted = (
        "bench task task_version sample_id length_target prompt_tokens truncated_tokens depth depth_actual seed prompt_sha256 prediction references metrics "
        "stop_reason n_generated t_prefill tok_per_s peak_mem error"
    ).split()
    assert len(lines) == 12 and all(set(wanted) <= line.keys() and "prompt" not in line for line in lines)
    assert [line["prompt_tokens"] for line in lines] == sorted((line["prompt_tokens"] for line in lines), reverse=True)  # the longest first
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics[0]) == "bench task length depth metric value n ci_low ci_high n_truncated n_errors documents".split()
    whole = next(row for row in metrics if row["length"] is None)
    assert whole["n"] == 12 and whole["value"] == pytest.approx(100 * sum(line["metrics"]["accuracy"] for line in lines) / 12, abs=1e-3)
    deep = [row for row in metrics if row["depth"] == 1.0]
    assert [row["value"] for row in deep] == [100, 100] and {row["value"] for row in metrics if row["depth"] == 0.0} == {0}
    described = json.loads((tmp_path / "run.json").read_text())
    assert described["tasks"]["passkey"]["options"] == {"style": "longreach", "digits": 5} and described["ended"] == "now"
    assert "| passkey | accuracy |" in results.markdown(Folder(tmp_path).metrics())
    assert results.lm_eval(described, Folder(tmp_path).metrics())["results"]["passkey"]["accuracy,none"] == pytest.approx(whole["value"] / 100)


def test_a_disk_that_is_full_in_the_middle_of_a_run(tmp_path, items, tokenizer):
    """The line that did not fit is torn as on a full disk; what was written counts, and the same call goes on from it."""
    run(tmp_path / "whole", First(), items, tokenizer)
    file, (soft, hard) = tmp_path / "cut" / "samples.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: Step) -> None:
        if step.done == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 100, hard))

    try:
        with pytest.raises(ValueError, match=r"cannot be written \(file too large\); free some space and run the same command again"):
            run(tmp_path / "cut", First(), items, tokenizer, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes().count(b"\n") == 3 and not file.read_bytes().endswith(b"\n")
    assert len(Folder(tmp_path / "cut").records()) == 3
    assert run(tmp_path / "cut", First(), items, tokenizer) == runner.Outcome(9, 0, 3, 0)
    unsteady = ("t_prefill", "tok_per_s", "peak_mem")
    whole, cut = ([{k: v for k, v in record.items() if k not in unsteady} for record in untimed(tmp_path / name)] for name in ("whole", "cut"))
    assert whole == cut


def test_a_file_that_could_not_be_replaced_is_the_old_one_and_leaves_nothing_behind(tmp_path, monkeypatch):
    results.write_json(tmp_path / "run.json", {"a": 1})

    def full(*paths: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(ValueError, match=r"no space left on device.*free some space"):
        results.write_json(tmp_path / "run.json", {"a": 2})
    assert results.read_json(tmp_path / "run.json") == {"a": 1} and [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "/dev/null/x"):
        with pytest.raises(ValueError, match="is a file; name a folder for the results"):
            Folder(path).check()
    with pytest.raises(ValueError, match="name one, such as results"):
        Folder("").check()
    with pytest.raises(ValueError, match=r"cannot be written .*; choose another place"):
        Folder("/proc/nothing").start({"config": {}, "tasks": {}})
    Folder(tmp_path / "new" / "deep").check()
    assert not (tmp_path / "new").exists()


def test_what_is_not_a_run_is_said_so(tmp_path):
    """Before: two folders that do not exist had "no sample in common"."""
    good = tmp_path / "good"
    good.mkdir()
    (good / "run.json").write_text('{"config": {}, "tasks": {"passkey": {}}}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name, says in (("none", "there is no folder"), ("file", "there is no folder"), ("empty", "holds no run.json")):
        with pytest.raises(ValueError, match=rf"{says}.*pass a folder that `longreach eval run`"):
            results.compare(Folder(good), Folder(tmp_path / name))
    broken = {"[1]": "no JSON object", '{"tasks": 5}': r"does not describe a run \(tasks\)", "{": "is not JSON", '{"tasks": {}}': "no answers to compare"}
    for text, says in broken.items():
        (tmp_path / "empty" / "run.json").write_text(text)
        with pytest.raises(ValueError, match=says):
            results.compare(Folder(good), Folder(tmp_path / "empty"))
    (good / "samples.jsonl").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match=r"is not text .*remove the file"):
        Folder(good).records()
    (good / "samples.jsonl").unlink()
    (good / "metrics.json").write_text('[{"colour": "red"}]')
    with pytest.raises(ValueError, match="does not hold the rows of a run"):
        Folder(good).metrics()


def test_a_run_that_was_killed_goes_on_to_the_same_result(tmp_path, items, tokenizer):
    run(tmp_path / "whole", First(), items, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Failing(First(), lambda n: KeyboardInterrupt() if n == 5 else None), items, tokenizer)
    file = tmp_path / "cut" / "samples.jsonl"
    assert len(file.read_text().splitlines()) == 4
    file.write_text(file.read_text()[:-30])  # torn while it was written
    again = Failing(First(), lambda n: None)
    assert run(tmp_path / "cut", again, items, tokenizer) == runner.Outcome(9, 0, 3, 0) and again.calls == 9
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    assert (tmp_path / "cut" / "metrics.json").read_text() == (tmp_path / "whole" / "metrics.json").read_text()
    assert run(tmp_path / "cut", again, items, tokenizer) == runner.Outcome(0, 0, 12, 0) and again.calls == 9


def test_shards_give_the_numbers_of_one(tmp_path, items, tokenizer):
    run(tmp_path / "one", CopyTail(tokenizer, 300), items, tokenizer)
    for index in (1, 0):
        assert run(tmp_path / "two", CopyTail(tokenizer, 300), items, tokenizer, (index, 2)).answered == 6
    assert {f.name for f in (tmp_path / "two").glob("*.jsonl")} == {"samples-0-of-2.jsonl", "samples-1-of-2.jsonl"}
    assert untimed(tmp_path / "one") == untimed(tmp_path / "two")
    assert (tmp_path / "one" / "metrics.json").read_text() == (tmp_path / "two" / "metrics.json").read_text()
    with pytest.raises(ValueError, match="counted from 0"):
        Folder(tmp_path, (2, 2))


def test_a_sample_that_fails_is_recorded_and_tried_again(tmp_path, items, tokenizer):
    engine = Failing(First(), lambda n: RuntimeError("no\nmemory") if n in (2, 7) else None)
    assert run(tmp_path, engine, items, tokenizer) == runner.Outcome(10, 2, 0, 0)
    failed = [record for record in Folder(tmp_path).records() if record.error]
    assert [record.error for record in failed] == ["RuntimeError: no memory"] * 2
    whole = next(row for row in Folder(tmp_path).metrics() if row.length is None)
    assert (whole.n, whole.n_errors, whole.value) == (10, 2, 100)
    assert run(tmp_path, First(), items, tokenizer) == runner.Outcome(2, 0, 10, 0)
    assert not [record for record in Folder(tmp_path).records() if record.error]


def test_a_folder_holds_one_run_only(tmp_path, items, tokenizer):
    run(tmp_path, First(), items, tokenizer)
    folder, tasks = Folder(tmp_path), runner.describe({registry.task("passkey"): dataclasses.replace(SETTINGS, seed=1)}, CONFIG)
    with pytest.raises(ValueError, match="frequencies: null there, \"other\" now"):
        folder.start({"config": {**CONFIG, "frequencies": "other"}, "tasks": {}, "started": "then"})
    assert run(tmp_path, First(), items, tokenizer, config={**CONFIG, "context": 1024}).known == 12  # longer samples declare a longer context
    with pytest.raises(ValueError, match="seed: 0 there, 1 now"):
        folder.start({"config": CONFIG, "tasks": tasks, "started": "then"})
    larger = runner.plan({registry.task("passkey"): dataclasses.replace(SETTINGS, depths=(0.0, 0.25, 1.0))}, tokenizer)
    assert run(tmp_path, First(), larger, tokenizer) == runner.Outcome(4, 0, 8, 0)  # a run can be made larger
    (tmp_path / "samples.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1 of"):
        folder.records()
    with pytest.raises(ValueError, match="there is no folder"):
        _ = Folder(tmp_path / "other").run


class Questions(Task):
    """Three questions about one document each."""

    name = "questions"

    def samples(self, tokenizer: Any, settings: Settings) -> Iterator[Sample]:
        for n in range(9):
            parts = Parts(f"Chapter {n % 3}. " + "It rained for days. " * (10 + n % 3), f"\n\nQuestion {n}?", "Read this.\n", " It is")
            yield Sample(f"q{n}", parts, (str(n),), 4, {"length_target": None}, chat="prefix")

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": float(sample.references[0] in prediction)}


def test_questions_about_a_document_stand_together_the_longest_first(tokenizer):
    items = runner.plan({Questions(): Settings()}, tokenizer)
    assert [item.sample.id for item in ordered(items)] == ["q2", "q5", "q8", "q1", "q4", "q7", "q0", "q3", "q6"]


def test_what_is_shared_ends_with_the_document(tokenizer):
    one, other = (budget.encode(tokenizer, sample) for sample in list(Questions().samples(tokenizer, Settings()))[0:4:3])
    assert one.ids[: one.shared] == other.ids[: other.shared] and one.ids != other.ids
    assert tokenizer.decode(one.ids[: one.shared]).rstrip().endswith("for days.") and one.shared < len(one.ids)


def test_too_long_raises_or_is_cut_and_counted(tmp_path, items, tokenizer):
    with pytest.raises(ValueError, match=r"6 of 12 samples need more than 300 tokens.*--context 505"):
        run(tmp_path, First(), items, tokenizer, limit=300)
    assert not (tmp_path / "samples.jsonl").exists()
    assert run(tmp_path, First(), items, tokenizer, limit=300, truncate="middle").truncated == 6
    for record in Folder(tmp_path).records():
        assert record.prompt_tokens + 12 <= 300 and (record.truncated_tokens > 150) == (record.length_target == 512)
    assert {row.n_truncated for row in Folder(tmp_path).metrics() if row.length is None} == {6}


@pytest.mark.parametrize("cut", budget.CUTS)
def test_cuts(cut, tokenizer):
    words = " ".join(f"word{n}" for n in range(900))
    sample = Sample("s", Parts(words, "\n\nWhich?", "Read.\n", " It is"), ("1",), 10)
    whole = budget.encode(tokenizer, sample)
    prompt = budget.fit(tokenizer, sample, 700, cut)
    assert prompt.needs <= 700 and prompt.truncated == len(whole.ids) - len(prompt.ids) and prompt.sample is sample
    if cut in budget.DOCUMENT_CUTS:
        assert prompt.text.startswith("Read.\n") and prompt.text.endswith("\n\nWhich? It is")
        assert ("word0 " in prompt.text, "word899" in prompt.text) == {"middle": (True, True), "left": (False, True)}.get(cut, (True, False))
        assert prompt.needs > (600 if cut != "right-words" else 10)
    assert budget.fit(tokenizer, sample, None, cut) == whole == budget.fit(tokenizer, sample, whole.needs, cut)


def test_cuts_of_ids():
    ids = list(range(1000))
    assert prompts.keep_ids(ids, 7, "middle") == [0, 1, 2, 3, 997, 998, 999] and prompts.keep_ids(ids, 1000, "middle") is ids
    assert prompts.suffix_with_head(ids, 130) == [*range(128), 998, 999] and prompts.suffix_with_head(ids, 5) == [0, 1, 2, 3, 4]

    class Numbers:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            return "".join(f"{n} " for n in ids)

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [int(n) for n in text.split()]}

    assert prompts.middle_reencode(Numbers(), ids, 7) == [0, 1, 2, 997, 998, 999]  # an odd limit loses one


def test_refusals_of_a_budget(tokenizer):
    sample = Sample("s", Parts("A text. " * 50, "\n\n" + "Why? " * 50), ("1",), 10)
    with pytest.raises(ValueError, match="or pass --truncate middle"):
        budget.fit(tokenizer, sample, 100)
    with pytest.raises(ValueError, match="without its document"):
        budget.fit(tokenizer, sample, 60, "middle")
    with pytest.raises(ValueError, match="choose one of middle"):
        budget.fit(tokenizer, sample, 100, "somewhere")
    with pytest.raises(ValueError, match="there are no samples"):
        runner.plan({registry.task("passkey"): Settings()}, tokenizer)


def test_chat_templates(tokenizer):
    chatting = longreach.load("nano")[1]
    chatting.chat_template = CHAT
    for chat, text in [
        ("off", "Read. A text. Why? It is"),
        ("user_turn", "<bos>[user]Read. A text. Why? It is[assistant]"),
        ("prefix", "<bos>[user]Read. A text. Why?[assistant] It is"),
    ]:
        sample = Sample("s", Parts("A text.", " Why?", "Read. ", " It is"), ("1",), 10, chat=chat)  # type: ignore[arg-type]
        prompt = budget.encode(chatting, sample)
        assert prompt.text == text.replace("<bos>", chatting.bos_token)
        assert prompt.ids.count(chatting.bos_token_id) == 1 and prompt.ids[0] == chatting.bos_token_id
        assert chatting.decode(prompt.ids[: prompt.shared]).endswith("A text.")
        assert budget.encode(chatting, sample, "off").text == budget.encode(tokenizer, sample).text == "Read. A text. Why? It is"
    chatting.chat_template = "{{ raise_exception('no users') }}"
    with pytest.raises(ValueError, match="pass --chat off"):
        budget.encode(chatting, sample)


def test_intervals():
    assert statistics.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert statistics.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert statistics.mean([1.0, 0.0, 1.0, 0.0]).low == pytest.approx(statistics.wilson(2, 4)[0])
    rng = Random(0)
    values = [rng.random() for _ in range(400)]
    found = statistics.mean(values)
    assert found == statistics.mean(values) and found.value == pytest.approx(sum(values) / 400)
    assert found.high - found.low == pytest.approx(2 * 1.96 * (1 / 12) ** 0.5 / 20, rel=0.15)  # the normal approximation of a uniform's mean
    with pytest.raises(ValueError, match="no values"):
        statistics.mean([])


def test_paired_tests():
    assert statistics.mcnemar(1, 9) == pytest.approx(2 * 11 / 1024) and statistics.mcnemar(3, 3) == 1.0 and statistics.mcnemar(0, 0) == 1.0
    a, b = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0] * 5, [1.0, 1.0, 0.0, 1.0, 0.0, 1.0] * 5
    found = statistics.compare(a, b)
    assert (found.n, found.only_a, found.only_b) == (30, 5, 15) and found.difference == pytest.approx(1 / 3)
    assert found.low < 1 / 3 < found.high and found.p == pytest.approx(2 * sum(math.comb(20, k) for k in range(6)) / 2**20)
    assert statistics.compare([0.5, 0.2], [0.7, 0.1]).p is None
    with pytest.raises(ValueError, match="the same samples twice"):
        statistics.compare([1.0], [])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, items: list[Item], tokenizer: Any) -> list[Folder]:
    root = tmp_path_factory.mktemp("runs")
    run(root / "first", First(), items, tokenizer)
    run(root / "tail", CopyTail(tokenizer, 200), items, tokenizer)

    class Hostile(Empty):
        def answer(self, prompt: Any) -> Any:
            if prompt.sample.meta["depth"] == 0.5:
                raise RuntimeError("<img src=x onerror=alert(1)>")
            return dataclasses.replace(super().answer(prompt), text="</td><script>alert(1)</script>\ud83d")

    run(root / "hostile", Hostile(), items, tokenizer)
    return [Folder(root / name) for name in ("first", "tail", "hostile")]


def test_two_runs_are_compared_on_the_same_samples(folders, tmp_path):
    rows = results.compare(folders[0], folders[1])
    every = next(row for row in rows if row["length"] is None)
    right = [record.metrics["accuracy"] for record in folders[1].records()]
    assert (every["n"], every["a"], every["only_b"]) == (12, 100, 0) and every["b"] == pytest.approx(100 * sum(right) / 12, abs=1e-3)
    assert every["only_a"] == right.count(0.0) and every["p"] == pytest.approx(2 / 2 ** right.count(0.0))
    assert results.compare(folders[0], folders[2])[0]["n"] == 8  # samples that failed are not compared
    (tmp_path / "run.json").write_bytes((folders[0].path / "run.json").read_bytes())
    with pytest.raises(ValueError, match="no sample in common"):
        results.compare(folders[0], Folder(tmp_path))


LOST = [[1.0] * 5, [1.0, 1.0, 1.0, 0.0, 0.0]]  # 8 of 10 keys of two documents that one run finds, and the other does not


def folder_of(path: Path, documents: list[list[float]], facts: Callable[[int], dict[str, Any]]) -> Folder:
    """A run of `passkeys` with these scores, the keys of a document one after the other."""
    folder = Folder(path)
    tasks = {"passkeys": {"config_hash": "x", "metric": "accuracy"}}
    folder.start({"config": {"method_text": path.name}, "tasks": tasks, "started": "then", "ended": None})
    for n, scores in enumerate(documents):
        for depth, score in enumerate(scores):
            name, more = f"passkeys/512/{n}/{depth}", facts(n)
            made = runner._record(Item(registry.task("passkeys"), Sample(name, Parts(""), ("1",), 4, {"length_target": 512, "depth": depth / 4}), 0, 9), None,
                                  Reply("", 1, "stop"), "x", False)  # fmt: skip
            folder.append(dataclasses.replace(made, metrics={"accuracy": score}, **more))
    folder.finish("now")
    return folder


def clustered(root: Path, facts: Callable[[int], dict[str, Any]]) -> tuple[Folder, Folder]:
    return folder_of(root / "found", LOST, facts), folder_of(root / "lost", [[0.0] * 5] * 2, facts)


@pytest.mark.parametrize(
    "facts",
    [lambda n: {"document": f"text {n}"}, lambda n: {"meta": {"keys": 5}}, lambda n: {"meta": {"document": n}}],
    ids=["by its text", "an earlier run of passkeys", "an earlier run of data"],
)
def test_the_questions_about_one_document_are_not_independent(tmp_path, facts, run):
    found, lost = clustered(tmp_path, facts)
    (row,) = (row for row in results.compare(found, lost) if row["length"] is None)
    paired = clusters.compare(LOST, [[0.0] * 5] * 2)
    effect = clusters.design_effect([[-value for value in scores] for scores in LOST])
    assert (row["n"], row["documents"], row["only_a"], row["only_b"]) == (10, 2, 8, 0) and row["p"] == paired.p == 0.125 and effect > 1.5
    assert (row["low"], row["high"]) == tuple(100 * value for value in statistics.bootstrap([-1.0] * 8 + [0.0] * 2, effect)) and row["high"] > -50
    every = next(row for row in found.metrics() if (row.length, row.depth) == (None, None))
    low, high = (round(100 * value, 4) for value in statistics.wilson(8 / effect, 10 / effect))
    assert (every.n, every.documents, every.ci_low, every.ci_high) == (10, 2, low, high)
    at_a_depth = next(row for row in found.metrics() if row.depth == 1.0)
    assert (at_a_depth.n, at_a_depth.documents) == (2, 2) and at_a_depth.ci_low == round(100 * statistics.wilson(1, 2)[0], 4)
    assert "80 (" in results.markdown(found.metrics()) and ", n=10 in 2 documents)" in results.markdown(found.metrics())
    shown = run("eval", "compare", found.path, lost.path).out
    assert "documents are the units, and intervals and p are those of fewer samples (passkeys: 10 about 2 documents)" in shown
    page = written_page.render([found, lost], [view.view(folder) for folder in (found, lost)], tmp_path / "figures")[0].decode()
    assert "n = 10 in 2 documents for each length" in page and page.count("10 in 2 documents") > 1


def test_questions_about_documents_of_their_own_are_independent(tmp_path, run):
    found, lost = clustered(tmp_path, lambda n: {})
    (row,) = (row for row in results.compare(found, lost) if row["length"] is None)
    same = statistics.compare([*LOST[0], *LOST[1]], [0.0] * 10)
    assert (row["n"], row["documents"], row["p"], row["low"], row["high"]) == (10, 10, same.p, -100, -50) and same.p == 2 / 2**8
    assert "are the units" not in run("eval", "compare", found.path, lost.path).out


def test_a_sample_names_its_document(tmp_path, tokenizer):
    items = runner.plan({Questions(): Settings()}, tokenizer)
    tasks = runner.describe({Questions(): Settings()}, CONFIG)
    folder = Folder(tmp_path)
    folder.start({"config": CONFIG, "tasks": tasks, "started": "then", "ended": None})
    runner.run(items, First(), tokenizer, folder, {name: facts["config_hash"] for name, facts in tasks.items()})
    names = {record.sample_id: record.about for record in folder.records()}
    assert len(set(names.values())) == 3 and names["q0"] == names["q3"] == names["q6"] != names["q1"]
    assert {row.documents for row in folder.metrics()} == {3}


def test_the_page_holds_everything_and_no_foreign_markup(folders, tmp_path):
    text, pictures = written_page.render(folders, [view.view(folder) for folder in folders], tmp_path / "figures")
    page = text.decode("utf-8")
    assert {picture.name for picture in pictures} == {"depth_passkey", "accuracy_passkey", "cost"}
    assert page.count("<img ") == 3 == page.count("data:image/png;base64,") == page.count("data:text/csv;base64,")
    assert page.count("<script>") == 1 and "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&lt;img src=x onerror" in page
    assert "Paired comparison" in page and "Errors and cuts" in page and "prefers-color-scheme: dark" in page
    assert "http://" not in page and "https://" not in page
    for picture in pictures:
        assert picture.png.read_bytes().startswith(b"\x89PNG")
    grid = (tmp_path / "figures" / "depth_passkey.csv").read_text().splitlines()
    assert grid[0] == "run,length,depth,metric,value,n,ci_low,ci_high" and len(grid) == 1 + 6 + 6 + 4
    with pytest.raises(ValueError, match="called the same"):
        written_page.render(folders[:1] * 2, [view.view(folders[0])] * 2, tmp_path)
    with pytest.raises(ValueError, match="no palette"):
        figures.draw([view.view(folders[0])], tmp_path, "rainbow")


def test_the_map_of_selfextends_parameters(tmp_path):
    """One panel for each length beyond the window; what reaches distances beyond 2/3 of it is marked. Fewer than four settings make no map."""

    def made(group: int, window: int) -> View:
        method = {"method": "selfextend", "group_size": group, "window": window}
        rows = [results.Row("x", "passkey", n, None, "accuracy", float(group + window), 5, 0.0, 1.0, 0, 0) for n in (512, 1024, 2048)]
        run = {"config": {"method": method}, "extension": {"trained_window": 512}, "tasks": {"passkey": {"metric": "accuracy"}}}
        return View(f"{group} {window}", run, [], rows, [])

    settings = [(4, 64), (4, 128), (8, 64), (8, 128)]
    picture = special_figures.selfextend_map([made(*s) for s in settings], "passkey", tmp_path, "needle")
    assert picture is not None and picture.png.read_bytes().startswith(b"\x89PNG")
    lines = [line.split(",") for line in picture.csv.read_text().splitlines()[1:]]
    assert {(line[0], line[1], line[2]): line[3] for line in lines}["2048", "4", "128"] == "False"  # 128 + 1920 / 4 = 608 > 341
    assert {(line[0], line[1], line[2]): line[3] for line in lines}["2048", "8", "64"] == "True"  # 64 + 1984 / 8 = 312
    assert [float(line[4]) for line in lines if line[0] == "1024"] == [68.0, 132.0, 72.0, 136.0]
    assert special_figures.selfextend_map([made(*s) for s in settings[:3]], "passkey", tmp_path, "needle") is None


def test_longbench_by_category_and_bin(tmp_path):
    """The mean of the means of a category's tasks, not of its samples; bins likewise."""
    folder = Folder(tmp_path / "run")
    facts = [("a", "QA", "0-4k", 1.0), ("a", "QA", "4-8k", 0.0), ("b", "QA", "0-4k", 1.0), ("c", "code", "8k+", 0.5)]
    records = [
        results.Record("longbench-e", task, "1", f"{task}{n}", None, 9, 0, None, None, 0, "", "", [], {"f1": score}, None, 1, None, None, None, None, "",
                       meta={"category": category, "bin": name})
        for n, (task, category, name, score) in enumerate(facts)
    ]  # fmt: skip
    v = View("run", {"tasks": {task: {"metric": "f1"} for task in "abc"}}, records, [], [])
    picture = special_figures.categories([v], "longbench-e", folder.path.parent)
    assert picture is not None
    assert picture.csv.read_text().splitlines()[1:] == [
        "run,category,QA,75.0", "run,category,code,50.0", "run,bin,0-4k,100.0", "run,bin,4-8k,0.0", "run,bin,8k+,50.0",
    ]  # fmt: skip
