"""lm-evaluation-harness on an extended model. What needs lm_eval is slow, for importing it is, and skipped where it is missing."""

from __future__ import annotations

import importlib.metadata
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import longreach
from longreach.cli import main
from longreach.evals.lm_eval import harness
from longreach.evals.samples.base import Parts, Sample, Settings, Task

METHOD = dict(group_size=8, window=32)


def test_a_missing_or_other_lm_eval_is_said(monkeypatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=r"not installed; run pip install 'longreach\[eval\]'"):
        harness.evaluate(None, None, ["mmlu"])
    for version, good in (("0.4.12", False), ("0.4.13", True), ("0.4.20.dev1", True), ("0.5.0", False), ("1.0", False)):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        if good:
            harness.require()
        else:
            with pytest.raises(ValueError, match=r"0\.4\.13 or a later 0\.4 is needed"):
                harness.require()


def test_tasks_that_cannot_load_are_refused():
    with pytest.raises(ValueError, match="use our own"):
        harness.refuse_broken(["mmlu", "infinitebench_passkey"])


def test_scores_are_rows_of_plain_data():
    found = {
        "results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1, "em_stderr,strict": "N/A", "sample_len": 3}},
        "n-samples": {"t": {"original": 9, "effective": 4}},
    }
    assert harness.scores(found) == [
        {"task": "t", "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.1, "n": 4},
        {"task": "t", "metric": "em", "filter": "strict", "value": 1.0, "stderr": None, "n": 4},
    ]


def test_what_has_no_spread_is_none():
    found = {"results": {"t": {"acc,none": math.nan, "acc_stderr,none": math.nan, "f1,none": True, "f1_stderr,none": math.inf}}}
    assert [(row["value"], row["stderr"], row["n"]) for row in harness.scores(found)] == [(None, None, None), (1.0, None, None)]


# -- the command ----------------------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", "lm-eval", *map(str, arguments), "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)  # type: ignore[no-any-return]


def test_the_command_names_the_extra_to_install_before_a_model_is_loaded(monkeypatch, capsys):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(longreach, "load", lambda *given, **more: pytest.fail("a model was loaded"))
    assert "pip install 'longreach[eval]'" in said(capsys, "--tasks", "mmlu", code=2)["error"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", " , "], "--tasks needs names"),
        (["--tasks", "mmlu", "--limit", "1.5"], "--limit must be a number of documents"),
        (["--tasks", "mmlu", "--limit", "0"], "not 0"),
        (["--tasks", "mmlu", "--gen-kwargs", "max_gen_toks"], "--gen-kwargs must be NAME=VALUE"),
        (["--tasks", "mmlu", "--include-path", "no-such-folder"], "there is no folder"),
        (["--tasks", "mmlu", "--out", "no-such-folder/out.json"], "create it first"),
        (["--tasks", "mmlu", "--out", "."], "is a folder; name a file"),
        (["--tasks", "mmlu", "--group-size", "8"], "name the method too"),
        (["--tasks", "mmlu,infinitebench_passkey"], "use our own"),
    ],
)
def test_the_command_refuses_bad_input(arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(harness, "require", lambda: None)
    monkeypatch.setattr(longreach, "load", lambda *given, **more: pytest.fail("a model was loaded"))
    assert says in said(capsys, *arguments, code=2)["error"]


@pytest.mark.parametrize(
    ("options", "method", "context", "max_length"),
    [
        (["--method", "selfextend", "--group-size", "8", "--window", "32", "--context", "1500"], "selfextend", 1500, None),
        (["--method", "stock"], "stock", None, None),
        (["--method", "stock", "--context", "600"], "stock", None, 600),
        ([], "stock", 512, None),
    ],
)
def test_the_command_hands_on_what_was_asked(options, method, context, max_length, monkeypatch, capsys, tmp_path):
    """With a stand-in for lm-eval: what it is called with, and what becomes of its results."""
    calls: list[dict[str, Any]] = []

    def evaluate(model: Any, tokenizer: Any, tasks: list[str], *, extension: Any, **given: Any) -> dict[str, Any]:
        calls.append(given | {"tasks": tasks, "method": extension.method.name, "context": extension.context})
        assert extension.model is model and extension.attached
        report = {"method": extension.method.to_json(), "max_length": 600, "overflow": given["overflow"], "requests": 9, "shortened_requests": 2}
        return {
            "results": {"arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": math.nan}}, "n-samples": {"arc": {"effective": 4}},
            "configs": {"arc": {"process_docs": evaluate, "spread": math.inf}}, "samples": {"arc": ["long"]}, "longreach": report | {"tokens_left_out": 77},
        }  # fmt: skip

    monkeypatch.setattr(harness, "require", lambda: None)
    monkeypatch.setattr(harness, "evaluate", evaluate)
    file = tmp_path / "out.json"
    more = ["--limit", 4, "--overflow", "middle", "--gen-kwargs", "max_gen_toks=9", "--metadata", "max_seq_lengths=[64]", "--num-fewshot", 2, "--out", file]
    found = said(capsys, "--tasks", "arc, mmlu_*,arc", *more, *options)
    (call,) = calls
    assert call["tasks"] == ["arc", "mmlu_*"] and (call["method"], call["context"], call["max_length"]) == (method, context, max_length)
    assert (call["limit"], call["overflow"], call["num_fewshot"], call["seed"]) == (4, "middle", 2, 0)
    assert call["gen_kwargs"] == {"max_gen_toks": 9} and call["metadata"] == {"max_seq_lengths": [64]}
    assert found["scores"] == [{"task": "arc", "metric": "acc", "filter": "none", "value": 0.25, "stderr": None, "n": 4}]
    assert found["method"]["method"] == method and found["tokens_left_out"] == 77
    written = json.loads(file.read_text())
    assert written["results"]["arc"] == {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": None} and "samples" not in written
    assert written["longreach"]["scores"] == found["scores"] and written["longreach"]["environment"]["torch"]
    assert written["configs"]["arc"]["spread"] is None and "evaluate" in written["configs"]["arc"]["process_docs"]
    capsys.readouterr()
    assert main(["eval", "lm-eval", "--tasks", "arc", *options]) == 0
    shown = capsys.readouterr()
    assert "0.25" in shown.out and "2 of 9 requests were longer than 600 tokens and lost 77" in shown.err
    assert ("beyond the trained window of 512" in shown.err) == (max_length is not None)


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any]:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (pip install 'longreach[eval]')")
    return longreach.load("nano")


def wrapped(nano: tuple[Any, Any], extension: Any = None, **more: Any) -> Any:
    from longreach.evals.lm_eval.model import LongContextLM

    return LongContextLM(*nano, extension=extension, **more)


def pairs(lm: Any, text: str, continuations: list[str]) -> list[Any]:
    return [(None, lm.tok_encode(text), lm.tok_encode(c, add_special_tokens=False)) for c in continuations]


def direct(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One forward, all logits."""
    with torch.no_grad():
        logits = model(torch.tensor([(context + continuation)[:-1]])).logits[0, len(context) - 1 :].double()
    wanted = torch.tensor(continuation)
    return logits.log_softmax(-1).gather(-1, wanted[:, None]).sum().item(), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["stock", "selfextend", "lm-infinite"])
def test_log_likelihoods_are_those_of_one_forward(nano, method):
    model, _ = nano
    text = longreach.shipped_book()[3000:6000]
    made = {"stock": None, "selfextend": longreach.SelfExtend(**METHOD), "lm-infinite": longreach.LMInfinite(n_local=64, n_global=4)}[method]
    extension = None if made is None else longreach.extend(model, made, context=2000)
    try:
        lm = wrapped(nano, extension, chunk_size=37, overflow="left" if made is None else "refuse")
        requests = pairs(lm, text[: 900 if made is None else 3000], [" the whale", " and", " the white whale of the deep and wide sea", "."])
        requests += pairs(lm, text[:200], [" the whale", text[200:700]])
        found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        for (_, context, continuation), (value, greedy) in zip(requests, found):
            expected = direct(model, context, continuation)
            assert value == pytest.approx(expected[0], abs=2e-3) and greedy == expected[1]
    finally:
        if extension is not None:
            extension.remove()


@pytest.mark.slow
@pytest.mark.parametrize("method", [longreach.SelfExtend(**METHOD), longreach.LMInfinite(64, 4)], ids=str)
@torch.no_grad()
def test_requests_that_go_back_further_and_further_are_scored_right(nano, method):
    """A bounded store can undo 128 tokens behind the farthest one, not behind each request: what it cannot undo is read again, and nobody is warned."""
    pytest.importorskip("lm_eval")
    from longreach.evals.lm_eval.model import LongContextLM

    model, tokenizer = nano
    ids = tokenizer("The old harbour lay under the morning fog, and nobody was there to see it. " * 60)["input_ids"][:900]
    with longreach.extend(model, method, context=2000) as extension, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were forgotten.*")
        lm = LongContextLM(model, tokenizer, extension=extension)
        for back in (0, 100, 160, 190, 150, 400, 10):
            context, wanted = ids[: len(ids) - back], [5, 7, 11]
            logits = model(torch.tensor([[*context, *wanted]]), use_cache=False).logits[0, len(context) - 1 : -1].log_softmax(-1)
            total, _ = lm._score(context, wanted)
            assert total == pytest.approx(logits[range(3), wanted].sum().item(), abs=1e-3)


@pytest.mark.slow
def test_a_greedy_continuation_is_called_so_and_rolling_windows_cover_a_text(nano):
    model, _ = nano
    with longreach.extend(model, longreach.SelfExtend(**METHOD), context=300) as extension:
        lm = wrapped(nano, extension, chunk_size=50)
        context = lm.tok_encode(longreach.shipped_book()[3000:3300])
        answer = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[0, len(context) :].tolist()
        assert lm._loglikelihood_tokens([(None, context, answer)], disable_tqdm=True)[0][1]
        text = longreach.shipped_book()[5000:7000]
        ids = lm.tok_encode(text)
        assert len(ids) > 2 * lm.max_length
        (total,) = lm.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
        assert 1 < -total / len(ids) < 1.5 * math.log(model.config.vocab_size)
        assert lm.report()["shortened_requests"] == 0


@pytest.mark.slow
def test_what_is_too_long_is_refused_or_counted(nano):
    model, _ = nano
    text = longreach.shipped_book()[3000:6000]
    with longreach.extend(model, longreach.SelfExtend(**METHOD), context=256) as extension:
        refusing = wrapped(nano, extension)
        assert refusing.max_length == 256, "the declared context, not the window of the configuration"
        with pytest.raises(ValueError, match=r"1 of 2 requests need more than 256 tokens.*declare a context of \d+"):
            refusing._loglikelihood_tokens(pairs(refusing, text, [" a"]) + pairs(refusing, "x", [" a"]), disable_tqdm=True)
        request = SimpleNamespace(args=(text, {"until": ["\n"], "max_gen_toks": 8}), arguments=())
        with pytest.raises(ValueError, match="1 of 1 requests need more than 256"):
            refusing.generate_until([request], disable_tqdm=True)
        for overflow in ("middle", "left"):
            lm = wrapped(nano, extension, overflow=overflow)
            ((_, context, continuation),) = pairs(lm, text, [" a whale"])
            room = 257 - len(continuation)
            cut = context[-room:] if overflow == "left" else context[: (room + 1) // 2] + context[-(room // 2) :]
            (found,) = lm._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)
            assert found[0] == pytest.approx(direct(model, cut, continuation)[0], abs=2e-3)
            assert lm.report()["tokens_left_out"] == len(context) - room
            (answer,) = lm.generate_until([Request(text, 8)], disable_tqdm=True)
            assert isinstance(answer, str) and lm.report()["shortened_requests"] == 2
        with pytest.raises(ValueError, match="max_length=300 is not within the declared context of 256"):
            wrapped(nano, extension, max_length=300)
    with pytest.raises(ValueError, match=r"was removed from its model"):
        wrapped(nano, extension)
    with pytest.warns(UserWarning, match="beyond the 512 tokens that the model reaches"):
        assert wrapped(nano, max_length=600).max_length == 600
    with longreach.extend(model, longreach.LMInfinite(n_local=64)) as extension, pytest.raises(ValueError, match="has no limit of its own"):
        wrapped(nano, extension)


class Request:
    """What lm-eval hands to `generate_until`."""

    def __init__(self, text: str, tokens: int) -> None:
        self.arguments: tuple[Any, ...] = (text, {"until": ["\n\n\n"], "max_gen_toks": tokens, "do_sample": False})

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@pytest.mark.slow
def test_answers_are_those_of_generate(nano):
    model, tokenizer = nano
    text = longreach.shipped_book()[3000:6000]
    with longreach.extend(model, longreach.SelfExtend(**METHOD), context=2000) as extension:
        lm = wrapped(nano, extension, chunk_size=64)
        found = lm.generate_until([Request(text[:n], 12) for n in (40, 3000, 900)], disable_tqdm=True)
        for n, answer in zip((40, 3000, 900), found):
            ids = tokenizer(text[:n], return_tensors="pt").input_ids
            expected = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :], skip_special_tokens=True)
            assert answer == expected.split("\n\n\n")[0]


YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
  cache_dir: {cache}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
"""
METRIC = """
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
"""
CHOICE = 'doc_to_choice: ["alpha", "omega"]\ndoc_to_target: answer' + METRIC.format(metric="acc")
WRITE = 'doc_to_target: "{{target}}"\ngeneration_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 4' + METRIC.format(metric="exact_match")


class Echo(Task):
    """A task of ours, for lm-eval."""

    name = "test-echo"
    metric = "accuracy"

    def samples(self, tokenizer: Any, settings: Settings) -> Iterator[Sample]:
        for index in range(settings.samples):
            yield Sample(f"e{index}", Parts("A long text. " * 20, f"Say {index}.", "Read. ", " I say"), (str(index),), 3 + index)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        return {"accuracy": float(sample.references[0] in prediction), "written": float(bool(prediction))}


@pytest.mark.slow
def test_lm_eval_runs_its_tasks_and_ours(nano, tmp_path: Path):
    model, tokenizer = nano
    book = longreach.shipped_book()
    rows = [{"text": book[n : n + 1200], "answer": n % 2, "target": "x"} for n in range(4000, 4004)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, kind, rest in (("longreach_test_choice", "multiple_choice", CHOICE), ("longreach_test_write", "generate_until", WRITE)):
        text = YAML.format(name=name, file=tmp_path / "rows.jsonl", cache=tmp_path / "cache", kind=kind) + rest
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    with longreach.extend(model, longreach.SelfExtend(**METHOD), context=1500) as extension:
        ours = harness.as_lm_eval_task(Echo(), tokenizer, Settings(samples=3))
        tasks = ["longreach_test_choice", "longreach_test_write", ours]
        found = harness.evaluate(model, tokenizer, tasks, extension=extension, include_path=str(tmp_path), bootstrap_iters=0)
        assert found["longreach"] == {
            "method": extension.method.to_json(), "max_length": 1500, "overflow": "refuse", "requests": 15, "shortened_requests": 0, "tokens_left_out": 0,
        }  # fmt: skip
        lm = wrapped(nano, extension)
        right = 0
        for row in rows:
            values = [direct(model, *request[1:])[0] for request in pairs(lm, row["text"], [" alpha", " omega"])]
            right += int(values[1] > values[0]) == row["answer"]
        assert found["results"]["longreach_test_choice"]["acc,none"] == right / 4
        assert 0 <= found["results"]["longreach_test_write"]["exact_match,none"] <= 1
        mine = found["results"]["longreach_test-echo"]
        assert mine["written,none"] == 1 and 0 <= mine["accuracy,none"] <= 1
        rows = harness.scores(found)
        assert {"task": "longreach_test-echo", "metric": "written", "filter": "none", "value": 1.0, "stderr": None, "n": 3} in rows
        assert len(rows) == 4 and json.loads(json.dumps(rows)) == rows
        prompts = [sample["arguments"][0][0] for sample in found["samples"]["longreach_test-echo"]]
        assert prompts == [sample.parts.text for sample in Echo().samples(tokenizer, Settings(samples=3))]
        with pytest.raises(ValueError, match=r"knows no task no_such_task_at_all"):
            harness.evaluate(model, tokenizer, ["no_such_task_at_all"], extension=extension)
    with longreach.extend(model, longreach.SelfExtend(**METHOD), context=200) as extension:
        with pytest.raises(ValueError, match="8 of 8 requests need more than 200"):
            harness.evaluate(model, tokenizer, tasks[:1], extension=extension, include_path=str(tmp_path), bootstrap_iters=0)
        with pytest.warns(UserWarning, match="8 of 8 requests were longer than 200 tokens"):
            cut = harness.evaluate(model, tokenizer, tasks[:1], extension=extension, include_path=str(tmp_path), overflow="middle", bootstrap_iters=0)
        assert cut["longreach"]["shortened_requests"] == 8


@pytest.mark.slow
def test_the_command_runs_lm_eval(nano, tmp_path: Path, capsys):
    book = longreach.shipped_book()
    rows = [{"text": book[n : n + 1200], "answer": n % 2} for n in range(4000, 4003)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = YAML.format(name="longreach_test_command", file=tmp_path / "rows.jsonl", cache=tmp_path / "cache", kind="multiple_choice") + CHOICE
    (tmp_path / "task.yaml").write_text(task, encoding="utf-8")
    common = ("--tasks", "longreach_test_command", "--include-path", tmp_path, "--limit", 2)
    found = said(capsys, *common, "--context", 1500, "--out", tmp_path / "out.json")
    (row,) = found["scores"]
    assert (row["task"], row["metric"], row["n"]) == ("longreach_test_command", "acc", 2) and row["value"] in (0.0, 0.5, 1.0)
    assert found["context"] == found["max_length"] == 1500 and found["method"]["method"] == "selfextend" and found["requests"] == 4
    assert json.loads((tmp_path / "out.json").read_text())["results"]["longreach_test_command"]["acc,none"] == row["value"]
    assert "4 of 4 requests need more than 200" in said(capsys, *common, "--context", 200, code=2)["error"]
    assert said(capsys, *common, "--context", 200, "--overflow", "middle")["shortened_requests"] == 4
