"""The engine reads a shared document once and answers as if it had not; the commands of `eval` from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

import longreach
from longreach import LMInfinite, SelfExtend, Stock
from longreach.cli import main, parameters
from longreach.cli.eval_options import parse_depths, parse_lengths, take_method_options
from longreach.cli.program import build
from longreach.evals.harness.model_engine import ModelEngine, attached, span
from longreach.evals.harness.results import Folder
from longreach.evals.samples import budget
from longreach.evals.samples.base import Parts, Sample
from longreach.methods import registry
from longreach.running import generation
from longreach.running.loading import shipped_book


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any]:
    return longreach.load("nano")


BOOK = shipped_book()[100_000:100_800]


def question(number: int, words: str = "What is the number?", stop: tuple[str, ...] = ()) -> Sample:
    return Sample(f"q{number}", Parts(BOOK, f"\n\n{number}. {words}", "Read.\n", " It is"), ("7",), 6, stop=stop)


@pytest.mark.parametrize(
    ("method", "reused"),
    [
        (SelfExtend(8, 32), True),
        (LMInfinite(64, 4), True),  # the store of a bounded method goes back 128 tokens: enough for a short question
        (LMInfinite(64, 4, top_k=2), False),  # its result depends on how a prompt is cut
    ],
    ids=str,
)
def test_a_shared_document_is_read_once_and_changes_no_answer(nano, method, reused):
    model, tokenizer = nano
    with attached(model, tokenizer, method, 1024) as engine:
        prompts = [budget.encode(tokenizer, question(n)) for n in range(2)]
        replies = [engine.answer(prompt) for prompt in prompts]
        assert [reply.reused for reply in replies] == [0, prompts[0].shared if reused else 0]
        for prompt, reply in zip(prompts, replies):
            alone = ModelEngine(model, tokenizer, engine.extension).answer(prompt)
            plain = generation.answer(model, tokenizer, prompt.ids, 6, extension=engine.extension)
            assert reply.text == alone.text == plain.text and alone.reused == 0
            assert 1 <= reply.tokens <= 6 and reply.prefill_seconds > 0 and reply.peak_memory


def test_a_question_too_long_to_forget_is_read_again(nano):
    model, tokenizer = nano
    with attached(model, tokenizer, LMInfinite(64, 4), 1024) as engine:
        long, short = (budget.encode(tokenizer, question(n, words)) for n, words in ((1, "Why? " * 90), (2, "Why?")))
        assert long.shared == short.shared and len(long.ids) - long.shared > 128
        engine.answer(long)
        again = engine.answer(short)
        assert again.reused == 0 and again.text == ModelEngine(model, tokenizer, engine.extension).answer(short).text


def test_stop_strings_end_an_answer(nano):
    model, tokenizer = nano
    prompt = budget.encode(tokenizer, Sample("s", Parts(BOOK), ("7",), 24))
    whole = generation.answer(model, tokenizer, prompt.ids, 24)
    end = whole.text.strip()[3:5]
    cut = generation.answer(model, tokenizer, prompt.ids, 24, stop=(end, "never"))
    begins = len(whole.text) - len(whole.text.lstrip())
    assert cut.text == whole.text[: whole.text.index(end, begins)] and cut.finish == "stop" and cut.tokens < whole.tokens
    assert generation.answer(model, tokenizer, prompt.ids, 24, stop=("never",)).text == whole.text


def test_how_long_prompts_may_be():
    assert span(None, 512, None, 900) == span(Stock(), 512, None, 900) and span(Stock(), 512, None, 900).limit is None
    assert span(SelfExtend(4, 128), 512, None, 9000).limit == SelfExtend(4, 128).capacity(512) == span(SelfExtend(4, 128), 512, None, 9000).context
    assert span(LMInfinite(512, 4), 512, None, 900).limit is None
    assert (span(Stock(), 512, 700, 900).limit, span(Stock(), 512, 700, 900).context) == (700, 700)


def test_lengths_and_depths():
    assert parse_lengths("2k,512,1.5k,512") == (512, 1536, 2048)
    assert parse_depths("0:1:0.25") == parse_depths("0:100:25") == (0.0, 0.25, 0.5, 0.75, 1.0) and parse_depths("0.5,1") == (0.5, 1.0)
    for text in ("", "x", "0", "-1k", "inf"):
        with pytest.raises(ValueError, match="such as 512,1k,2k"):
            parse_lengths(text)
    for text in ("", "x", "0:1", "0:1:0", "-0.1", "101"):
        with pytest.raises(ValueError, match="from:to:step"):
            parse_depths(text)


def test_no_parameter_of_a_method_hides_behind_an_option():
    group: Any = typer.main.get_command(build()).commands["eval"]  # type: ignore[attr-defined]
    assert set(group.commands) == {"list", "run", "estimate", "ppl", "lm-eval", "report", "compare"}
    for name in ("run", "estimate", "ppl", "lm-eval"):
        own = {option for p in group.commands[name].params for option in p.opts}
        assert not own & {p.option for method in registry().values() for p in parameters.of(method)}


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]):
    assert main(["eval"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("list", "run", "estimate", "ppl", "lm-eval", "report", "compare"))


@pytest.mark.parametrize(
    ("words", "names", "options"),
    [
        ("passkey niah --n-local 64", ["passkey", "niah"], ["--n-local", "64"]),
        ("--n-local=64 passkey", ["passkey"], ["--n-local=64"]),
        ("--a 1 passkey --flag niah --b -2", ["passkey", "niah"], ["--a", "1", "--flag", "--b", "-2"]),
    ],
)
def test_options_of_a_method_among_the_names_of_tasks(words, names, options):
    context: Any = SimpleNamespace(args=[])
    assert take_method_options(context, words.split()) == names and context.args == options


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)  # type: ignore[no-any-return]


def test_the_commands_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert {"passkey", "niah"} <= {task["name"] for task in said(capsys, "eval", "list")["tasks"]}
    common = ("passkey", "--lengths", "160,320", "--depths", "0,1", "--samples", 1)
    found = said(capsys, "eval", "estimate", *common)
    assert found["samples"] == 4 and found["seconds"] > 0 and [part["length"] for part in found["parts"]] == [160, 320]
    for name, method in (("stock", ["--method", "stock"]), ("lambda", ["--method", "lm-infinite", "--n-local", "64"])):
        result = said(capsys, "eval", "run", *common, *method, "--out", tmp_path / name)
        assert (result["answered"], result["failed"]) == (4, 0) and result["metrics"][0]["n"] == 4
    assert said(capsys, "eval", "run", *common, "--method", "stock", "--out", tmp_path / "stock")["known"] == 4
    longer = said(capsys, "eval", "run", "passkey", "--lengths", "400", "--depths", "0", "--samples", 1, "--method", "lm-infinite", "--n-local", "64",
                  "--out", tmp_path / "lambda")  # fmt: skip
    assert (longer["answered"], longer["known"]) == (1, 0)
    dynamic = ("passkey", "--depths", "0", "--samples", 1, "--method", "dynamic-ntk", "--out", tmp_path / "dynamic")
    said(capsys, "eval", "run", *dynamic, "--lengths", "400", "--context", 400)
    refused = said(capsys, "eval", "run", *dynamic, "--lengths", "600", "--context", 600, code=2)["error"]
    assert "frequencies" in refused  # other frequencies give other answers
    described = json.loads((tmp_path / "stock" / "run.json").read_text())
    assert described["config"]["method"]["method"] == "stock" and described["extension"]["trained_window"] == 512 and described["ended"]
    rows = said(capsys, "eval", "compare", tmp_path / "stock", tmp_path / "lambda")["rows"]
    assert {row["n"] for row in rows if row["length"] is None} == {4}
    ppl = said(capsys, "eval", "ppl", "--lengths", "64,128", "--passages", 2, "--out", tmp_path / "ppl")
    assert {(row["length"], row["metric"]) for row in ppl["metrics"]} == {(n, m) for n in (64, 128) for m in ("perplexity", "nll", "bits_per_byte")}
    assert len((tmp_path / "ppl" / "curves.csv").read_text().splitlines()) == 128
    page = said(
        capsys, "eval", "report", *(tmp_path / name for name in ("stock", "lambda", "ppl")), "--html", tmp_path / "r.html", "--markdown", tmp_path / "r.md"
    )
    assert len(page["figures"]) == 5 and "does not imply recall" in (tmp_path / "r.html").read_text()
    written = (tmp_path / "r.md").read_text()
    assert written.count("## ") == 3 and "| passkey | accuracy |" in written and "| truncated | bits_per_byte |" in written
    for protocol in ("sliding", "streaming"):
        rows = said(capsys, "eval", "ppl", "--protocol", protocol, "--lengths", "96", "--stride", 32, "--text", "@book", "--out", tmp_path / protocol,
                    *(["--passages", 1]))["metrics"]  # fmt: skip
        assert rows and all(row["task"] == protocol for row in rows)


def test_a_report_says_which_runs_have_not_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Before: "2 runs, 0 pictures" and nothing else, of a run of perplexities that was interrupted."""
    run = ("--lengths", "64", "--passages", 1, "--method", "stock")
    said(capsys, "eval", "ppl", *run, "--out", tmp_path / "whole")
    begun = json.loads((tmp_path / "whole" / "run.json").read_text()) | {"ended": None}
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text(json.dumps(begun))
    page = tmp_path / "r.html"
    refused = said(capsys, "eval", "report", tmp_path / "begun", "--html", page, code=2)["error"]
    assert refused == f"there is nothing to report: no run in {tmp_path / 'begun'} has results; run it to its end" and not page.exists()
    assert main(["eval", "report", str(tmp_path / "whole"), str(tmp_path / "begun"), "--html", str(page)]) == 0
    found = capsys.readouterr()
    assert found.out == f"{page}: 2 runs, 2 pictures\n" and "whole" not in found.err
    assert f"warning: {tmp_path / 'begun'} holds no results yet: its run has not ended; the command that began it completes it" in found.err


@pytest.mark.parametrize(
    "command", ["ppl --lengths 64 --passages 1 --out out", "estimate passkey --lengths 160 --samples 1", "run passkey --lengths 160 --samples 1 --out out"]
)
def test_quiet_means_quiet(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *command.split(), "--method", "stock", "--quiet"]) == 0
    found = capsys.readouterr()
    assert found.err == "" and found.out


def test_help_cuts_no_name_of_an_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("list", "run", "estimate", "ppl", "lm-eval", "report", "compare"):
        assert main(["eval", name, "--help"]) == 0
        assert "…" not in capsys.readouterr().out, name


@pytest.mark.slow
def test_a_killed_process_and_two_processes_give_the_numbers_of_one(tmp_path: Path):
    """With a real model: one run to its end, one that is killed and started again, and two that share a folder at the same time."""

    def start(out: str, *more: str) -> subprocess.Popen[bytes]:
        asked = ("passkey", "ruler-niah-single-1", "--lengths", "400,800", "--depths", "0,0.5,1", "--samples", "3", "--method", "selfextend")
        command = [sys.executable, "-m", "longreach.cli", "eval", "run", *asked, "--group-size", "4", "--window", "64", "--out", str(tmp_path / out), *more]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def ended(process: subprocess.Popen[bytes]) -> None:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()

    def result(out: str) -> tuple[list[dict[str, Any]], Any]:
        unsteady = ("t_prefill", "tok_per_s", "peak_mem", "reused_tokens", "together")  # clocks, memory, what stood in the cache, and who was read beside
        records = [{k: v for k, v in asdict(r).items() if k not in unsteady} for r in Folder(tmp_path / out).records()]
        return records, json.loads((tmp_path / out / "metrics.json").read_text())

    ended(start("whole"))
    cut, file = start("cut"), tmp_path / "cut" / "samples.jsonl"
    deadline = time.monotonic() + 300
    while not (file.exists() and file.read_bytes().count(b"\n") >= 4):
        assert cut.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    cut.kill()
    cut.communicate()
    with file.open("ab") as half:  # a line that was being written when the power went
        half.write(b'{"bench": "pass')
    known = file.read_bytes().count(b"\n")
    assert 4 <= known < 24
    ended(start("cut"))
    shards = [start("shards", "--shard", f"{n}/2") for n in range(2)]
    for shard in shards:
        ended(shard)
    want, metrics = result("whole")
    assert len(want) == 24
    for out in ("cut", "shards"):
        got, found = result(out)
        assert got == want and found == metrics, out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "nothing"], "there is no task"),
        (["run", "--n-local", "7"], "name a task"),
        (["run", "passkey", "--n-local", "7"], "is a parameter of a method; name the method too"),
        (["run", "passkey", "--option", "colour=red"], "they know digits, style"),
        (["run", "passkey", "--shard", "2/2"], "--shard must be i/n"),
        (["run", "passkey", "--lengths", "300", "--context", "200"], "25 of 25 samples need more than 200 tokens"),
        (["run", "passkey", "--lengths", "30"], "choose a length of at least"),
        (["run", "passkey", "--truncate", "middle"], "pass --context N too"),
        (["ppl", "--text", "there-is-no-book.txt"], "there is no file"),
    ],
)
def test_bad_input_is_refused(arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert said(capsys, "eval", *arguments, "--out", tmp_path / "out", code=2)["error"].count(says)
    assert not (tmp_path / "out").exists()
