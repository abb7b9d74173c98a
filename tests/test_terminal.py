"""The command line as its users treat it: closed and broken streams, Ctrl-C, files that are already there, foreign noise, quiet, progress."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

import longreach
from commands import Run, refused
from longreach.cli import console

SECONDS = 120


def heeding() -> None:
    """In a new process: Ctrl-C is heard there, even where this one was started in the background of a shell, which ignores it for all it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


READING = ["run", "--file", "@book", "--truncate", "right", "--context", "16k", "--prompt", "Who?"]


def shell(line: str, *arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """`line` is the shell's, with "$@" for the command."""
    command = ["sh", "-c", line, "sh", sys.executable, "-m", "longreach.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, **more)


class Program:
    """A real process, read while it runs. With `terminal` all its streams are one, else standard error is read."""

    def __init__(self, *arguments: object, terminal: bool = False) -> None:
        command = [sys.executable, "-m", "longreach.cli", *map(str, arguments)]
        if terminal:
            self.reading, other = os.openpty()
            streams: dict[str, Any] = {"stdin": other, "stdout": other, "stderr": other}
        else:
            self.reading, other = os.pipe()
            streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": other}
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=heeding, env={**os.environ, "TERM": "dumb"}, **streams)
        os.close(other)
        self.seen = ""

    def wait_for(self, words: str) -> str:
        """Everything up to the words, which are then gone."""
        deadline = time.monotonic() + SECONDS
        while words not in self.seen:
            assert time.monotonic() < deadline and self._more(), f"{words!r} did not come: {self.seen}"
        before, _, self.seen = self.seen.partition(words)
        return before + words

    def _more(self) -> bool:
        if select.select([self.reading], [], [], 1)[0]:
            with contextlib.suppress(OSError):  # a terminal whose other end has closed
                if data := os.read(self.reading, 65536):
                    self.seen += data.decode().replace("\r\n", "\n")
                    return True
            return False
        return True

    def type(self, line: str) -> None:
        os.write(self.reading, f"{line}\n".encode())

    def interrupt(self) -> None:
        time.sleep(0.5)  # nobody is so quick that the signal comes between a prompt and the read that waits behind it, where the kernel does not wake it
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        while self._more():
            pass
        return self.process.wait(SECONDS), self.seen


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    started: list[Program] = []

    def start(*arguments: object, terminal: bool = False) -> Program:
        started.append(Program(*arguments, terminal=terminal))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        os.close(each.reading)


# -- streams ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "arguments", "says"),
    [
        ('"$@" <&-', ["run", "--file", "-", "--prompt", "x"], "standard input is closed"),
        ('"$@" </dev/null', ["run", "--file", "-", "--prompt", "x"], "standard input is empty"),
        ('"$@" <&-', ["run"], "nothing to read"),
        ('"$@" <&-', ["chat"], "standard input is closed"),
        ('"$@" >&-', ["methods"], "standard output is closed"),
        ('"$@" >/dev/full', ["methods"], "the output could not be written (No space left on device)"),
    ],
)
def test_a_closed_stream_is_one_sentence(line: str, arguments: list[str], says: str) -> None:
    found = shell(line, *arguments)
    assert found.returncode == 2 and found.stdout == "", found
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1 and says in found.stderr


def test_nothing_to_ask_is_no_error() -> None:
    found = shell('"$@" </dev/null', "chat", "--json")
    assert found.returncode == 0 and json.loads(found.stdout)["turns"] == [] and "Traceback" not in found.stderr
    assert shell('"$@" 2>&-', "run", "--prompt", "x", "--max-new-tokens", 2).returncode == 0


@pytest.mark.parametrize("line", ['("$@"; echo $? >&2) | head -c 1', '("$@" 2>&1; echo $? >&3) 3>&2 2>&1 | head -c 1'], ids=["answer", "notes"])
def test_a_reader_that_has_gone_ends_it_quietly(line: str) -> None:
    found = shell(line, "run", "--prompt", "x", "--max-new-tokens", 300)
    assert len(found.stdout) == 1 and found.stderr.splitlines()[-1] == "0" and "Traceback" not in found.stderr and "Exception" not in found.stderr


def test_any_text_reaches_any_terminal(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "q").write_bytes("é\n".encode())
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    found = shell('"$@" <q', "chat", "--model", folders["llama"], "--max-new-tokens", 2, "--json", cwd=tmp_path, env=environment)
    assert found.returncode == 0 and found.stdout.isascii() and json.loads(found.stdout)["turns"][0]["question"] == "é", found
    plain = shell('"$@" <q', "chat", "--model", folders["llama"], "--max-new-tokens", 12, "--temperature", 9, cwd=tmp_path, env=environment)
    assert plain.returncode == 0 and plain.stdout.isascii(), plain
    (tmp_path / "q").write_bytes(b"\xff\n")
    found = shell('"$@" <q', "chat", "--model", folders["llama"], cwd=tmp_path)
    assert found.returncode == 2 and "a question on standard input is not UTF-8 text" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize("option", ["--prompt", "--system", "--hide"])
def test_words_that_are_no_text(run: Run, folders: dict[str, str], option: str) -> None:
    refused(run, "run", "--model", folders["chat"], "--prompt", "x", option, "\udcff", says=f"{option} is not UTF-8 text")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--file", "/proc/self/mem", "--prompt", "x"], "'/proc/self/mem' could not be read"),
        (["run", "--document", "/tmp", "--prompt", "x"], "'/tmp' is a folder"),
        (["run", "--document", "/no/such", "--prompt", "x"], "there is no document"),
        (["chat", "--file", "/tmp"], "'/tmp' is a folder"),
        (["check", "--all", "--markdown", "/tmp"], "'/tmp' is a folder"),
        (["distances", "stock", "--png", "/tmp"], "'/tmp' is a folder"),
        (["plan", "--context", "1k", "--config", "/tmp"], "cannot read '/tmp'"),
    ],
)
def test_what_is_no_file_is_said_before_a_model_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str) -> None:
    monkeypatch.setattr(longreach, "load", lambda *_, **__: pytest.fail("the work began"))
    refused(run, *arguments, says=says)


@pytest.mark.parametrize("command", ["run", "chat", "check", "plan", "demo"])
def test_an_empty_value_is_refused(run: Run, command: str) -> None:
    for option in ("--model", "--file", "--dtype", "--device", "--png", "--save-document", "--context", "--method", "--hide"):
        refused(run, command, option, "", says=f"{option} is given an empty value")
        refused(run, command, f"{option}=", says=f"{option} is given an empty value")


@pytest.mark.parametrize("arguments", [["run", "--prompt", "x"], ["plan", "--context", "1k", "--hardware", "H200"], ["check"]])
def test_a_narrow_terminal_loses_no_word(run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    monkeypatch.setenv("COLUMNS", "24")
    found = run(*arguments, *(["--max-new-tokens", "2"] if arguments[0] == "run" else []))
    assert found.code == 0 and "512" in "".join((found.err + found.out).split())
    assert "capacity" in "".join(found.err.split()) or arguments[0] != "run"


# -- Ctrl-C -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "when", "kept"),
    [
        (READING, "method: ", "nothing was kept"),
        (["run", "--file", "@book", "--save-document", "d", "--method", "lm-infinite", "--n-local", "256"], "method: ", "nothing was saved"),
        (["demo"], None, "nothing was kept"),
        (["plan", "--calibrate"], "measuring", "nothing was kept"),
        (["eval", "run", "passkey", "--lengths", "16k", "--out", "out"], "reading sample 1 of 25 (passkey, ", "0 of 25 samples kept in "),
    ],
    ids=["run", "save", "demo", "plan", "eval"],
)
def test_an_interrupt_says_what_was_kept(program: Callable[..., Program], tmp_path: Path, arguments: list[str], when: str | None, kept: str) -> None:
    paths = [str(tmp_path / word) if word in ("d", "out") else word for word in arguments]
    if arguments[0] == "demo":
        paths += ["--png", str(tmp_path / "demo.png")]
    running = program(*paths)
    if when is None:
        time.sleep(4)  # nothing is said there before the work
    else:
        running.wait_for(when)
    running.interrupt()
    code, said = running.end()
    lines = said.strip().splitlines()
    assert code == 130 and lines[-1].startswith("interrupted; ") and "Traceback" not in said, said
    assert kept in lines[-1]
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".*"))


def test_a_chat_at_a_terminal_outlives_interrupts(program: Callable[..., Program], tmp_path: Path) -> None:
    (tmp_path / "text").write_text(longreach.shipped_book()[:3000])  # little, so that both answers have room, however far they come before they are stopped
    talk = program("chat", "--file", str(tmp_path / "text"), "--context", "8k", "--max-new-tokens", "3000", terminal=True)
    talk.wait_for("> ")
    for question in ("Tell me about the sea.", "And then?"):
        talk.type(question)
        talk.wait_for(f"{question}\n")
        talk.wait_for(" ")  # a word of the answer
        talk.interrupt()
        assert "Traceback" not in talk.wait_for("stopped, what was written stays in the conversation")
        talk.wait_for("> ")
    talk.type("/help")
    assert "/save FILE" in talk.wait_for("> ") and "/load FILE" in (talk.type("/help"), talk.wait_for("> "))[1]
    talk.type(f"/save {tmp_path / 'talk'}")
    assert "2 turns saved to" in talk.wait_for("> ")
    talk.type("/load /no/such/file")
    assert "error: there is no document" in talk.wait_for("> ")
    talk.type("/save")
    assert "needs the name of a file" in talk.wait_for("> ")
    talk.type(f"/load {tmp_path / 'talk'}")
    assert "2 turns loaded from" in talk.wait_for("> ")
    talk.interrupt()
    assert "Ctrl-C again leaves" in talk.wait_for("> ")
    talk.interrupt()
    code, said = talk.end()
    assert code == 130 and f"interrupted; the conversation is saved in {tmp_path / 'talk'}" in said and "Traceback" not in said


def test_piped_questions_end_with_an_interrupt(folders: dict[str, str]) -> None:
    command = [sys.executable, "-m", "longreach.cli", "chat", "--model", folders["llama"], "--max-new-tokens", "4"]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    assert running.stdin and running.stdout and running.stderr
    running.stdin.write("Who?\n")
    running.stdin.flush()
    while "to the first token" not in running.stderr.readline():
        pass
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    said = running.communicate(timeout=SECONDS)[1]
    assert running.returncode == 130 and said.strip() == "interrupted; 1 question answered, the conversation is not saved"


# -- files that are there already -------------------------------------------------------------------------------------------------


WRITERS: list[tuple[str, list[str]]] = [
    ("--save-document", ["run", "--file", "@book", "--truncate", "right", "--context", "1k"]),
    ("--png", ["demo"]),
    ("--png", ["distances", "stock"]),
    ("--png", ["plan", "--context", "1k"]),
    ("--markdown", ["check", "--all"]),
    ("--html", ["eval", "report", "none"]),
    ("--out", ["eval", "lm-eval", "--tasks", "x"]),
]


@pytest.mark.parametrize(("option", "arguments"), WRITERS, ids=[" ".join(a[:2]) for _, a in WRITERS])
@pytest.mark.parametrize("what", ["text", "folder", "device", "nowhere"])
def test_a_file_of_the_user_is_refused_before_the_work(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    option: str,
    arguments: list[str],
    what: str,
) -> None:
    def work(*_: Any, **__: Any) -> Any:
        raise AssertionError("the work began")

    monkeypatch.setattr(longreach, "load", work)
    if "--truncate" in arguments:
        arguments = [a for a in arguments if a not in ("--truncate", "right")]
    target = tmp_path / "mine.png"
    if what == "text":
        target.write_text("mine")
    elif what == "folder":
        target.mkdir()
        (target / "mine").write_text("mine")  # a document may be saved to an empty one
    elif what == "device":
        target.symlink_to("/dev/null")
    else:
        target = tmp_path / "none" / "mine.png"
    says = {"text": "pass --force to overwrite it", "folder": "is a folder; name a file", "device": "is not an ordinary file", "nowhere": "create it first"}
    if option == "--save-document":
        says |= {"text": "a document is a folder; name another one", "folder": "no document that Longreach wrote; name another folder", "device": "a file"}
    refused(run, *arguments, option, target, says=says[what])
    assert what != "text" or target.read_text() == "mine"


def test_ours_is_replaced_and_force_replaces_anything(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    arguments = ["distances", "stock", "--png", picture]
    assert run(*arguments).code == 0
    first = picture.read_bytes()
    again = run(*arguments, "--length", 20)
    assert again.code == 0 and "and will be replaced" in again.err and picture.read_bytes() != first
    picture.write_text("mine")
    assert run(*arguments, "--force").code == 0 and picture.read_bytes() == first
    from PIL import Image

    Image.new("RGB", (4, 4)).save(picture)  # a picture of somebody else
    refused(run, *arguments, says="is no picture that Longreach wrote")
    cost = tmp_path / "cost.png"
    for _ in range(2):
        assert run("plan", "--context", "1k", "--hardware", "H200", "--png", cost).code == 0


def test_a_document_is_replaced_by_a_document_only(run: Run, folders: dict[str, str], book: Path, tmp_path: Path) -> None:
    folder = tmp_path / "d"
    arguments = ["run", "--model", folders["llama"], "--file", book, "--context", 400, "--save-document", folder]
    assert run(*arguments).code == 0
    found = run(*arguments, "--prompt", "and?")
    assert found.code == 0 and "is a document that Longreach wrote, and will be replaced" in found.err
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "weights").write_text("mine")
    for more in ((), ("--force",)):  # a folder of somebody else is never emptied
        refused(run, *arguments[:-1], mine, *more, says="name a new folder" if more else "name another folder")
        assert [file.name for file in mine.iterdir()] == ["weights"] and (mine / "weights").read_text() == "mine"


def test_a_folder_of_somebody_else_takes_no_run(run: Run, tmp_path: Path) -> None:
    arguments = ["eval", "run", "passkey", "--lengths", "256", "--samples", 1, "--depths", "0", "--out", tmp_path]
    (tmp_path / "metrics.json").write_text("[1]")
    refused(run, *arguments, says="holds metrics.json but no run.json")
    (tmp_path / "run.json").write_text("[1]")
    refused(run, *arguments, says="was not written by Longreach")
    assert (tmp_path / "run.json").read_text() == "[1]" == (tmp_path / "metrics.json").read_text()


def test_a_report_takes_the_place_of_a_report_only(run: Run, tmp_path: Path) -> None:
    folder, page = tmp_path / "run", tmp_path / "page.html"
    assert run("eval", "run", "passkey", "--lengths", "256", "--samples", 1, "--depths", "0,1", "--out", folder, "--quiet").code == 0
    arguments = ["eval", "report", folder, "--html", page, "--markdown", tmp_path / "page.md"]
    first = run(*arguments, "--json").json
    assert run(*arguments).code == 0 and all(Path(p[name]).is_file() for p in first["figures"] for name in ("png", "csv"))
    mine = Path(first["figures"][0]["png"])
    mine.write_text("mine")
    refused(run, *arguments, says="is no picture that Longreach wrote")
    assert mine.read_text() == "mine" and not list(tmp_path.glob(".*"))
    assert run(*arguments, "--force").code == 0 and mine.read_bytes().startswith(b"\x89PNG")


# -- noise, quiet, progress -------------------------------------------------------------------------------------------------------


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `load` under which libraries make every noise they know."""
    load = longreach.load

    def loud(*arguments: Any, **options: Any) -> Any:
        print("noise on standard output")
        print("noise on standard error", file=sys.stderr)
        warnings.warn("noise as a warning", stacklevel=1)
        logging.getLogger("a.library").warning("noise in a log")
        logging.getLogger("torchao").warning("noise in a log")
        list(tqdm(range(3), desc="noise as a bar"))
        return load(*arguments, **options)

    monkeypatch.setattr(longreach, "load", loud)


def test_libraries_are_heard_with_verbose_only(run: Run, noisy: None, folders: dict[str, str]) -> None:
    arguments = ["run", "--model", folders["llama"], "--prompt", "x", "--max-new-tokens", 2]
    plain, loud = run(*arguments), run(*arguments, "--verbose")
    assert "noise" not in plain.err + plain.out
    assert plain.out == loud.out and loud.err.count("noise on") == 2 and "noise as a bar" in loud.err
    assert run(*arguments, "--json").json["new_tokens"] <= 2


def test_quiet_leaves_errors_and_warnings(run: Run, folders: dict[str, str], stdin: Callable[[bytes], None], tmp_path: Path) -> None:
    model = ["--model", folders["llama"], "-q"]
    stdin(b"Who?\n")
    evaluation = ["eval", "run", "passkey", *model, "--lengths", 60, "--samples", 1, "--depths", 0, "--option", "style=yarn"]
    commands: list[list[object]] = [
        ["chat", *model, "--max-new-tokens", 2],
        ["run", *model, "--prompt", "x", "--max-new-tokens", 2],
        ["check", *model, "--tokens", 60],
        ["plan", "-q", "--hardware", "H200", "--context", "1k", "--png", tmp_path / "p.png"],
    ]
    for command in commands:
        found = run(*command)
        assert (found.code, found.err) == (0, "") and found.out, (command, found)
    assert "--quiet" in run(*evaluation[:2], "--help").out and "--quiet" in run("demo", "--help").out
    warned = run("run", *model, "--prompt", "x" * 100, "--method", "stock", "--max-new-tokens", 2)
    assert warned.err.startswith("warning: ") and warned.err.count("\n") == 1
    both = run("run", *model, "--prompt", "x", "--verbose")
    assert both.code == 2 and "contradict each other" in both.err


def test_progress_without_a_terminal_is_lines_now_and_then(
    run: Run,
    folders: dict[str, str],
    book: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    arguments = ["run", "--model", folders["llama"], "--file", book, "--chunk-size", 50, "--max-new-tokens", 2]
    monkeypatch.setattr(console, "LONG", 100)
    assert "reading:" not in run(*arguments).err, "what is quick needs no lines"
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    lines = [line for line in run(*arguments).err.splitlines() if line.startswith("reading: ")]
    assert [line.split(" (")[0] for line in lines] == [f"reading: {n} of 201 tokens" for n in (50, 100, 150, 200)]
    assert "reading:" not in run(*arguments, "--quiet").err
    found = run("eval", "run", "passkey", "--lengths", 256, "--samples", 2, "--depths", 0, "--out", tmp_path)
    assert "reading sample 1 of 2 (passkey, " in found.err and "reading sample 2 of 2 (" in found.err
    options = ["--lengths", "1", "--depths", "1", "--keys", "1", "--loss-length", "1", "--stream-length", "2", "--png", tmp_path / "d.png"]
    assert "SelfExtend reads" in run("demo", *options).err


# -- what users met ---------------------------------------------------------------------------------------------------------------


def test_an_interrupt_in_a_command_keeps_the_conversation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    class Interrupted:
        saved = None

        def __init__(self, out: console.Output) -> None:
            self.out, self.resets, self.talk = out, 0, type("Talk", (), {"turns": []})()

        def load(self, file: Path) -> None:
            raise KeyboardInterrupt

        def reset(self) -> None:
            self.resets += 1

    from longreach.cli import chat
    from longreach.running.generation import GREEDY

    monkeypatch.setattr(chat, "questions", lambda out, asking: iter(["/load talk", "/what", "/reset"]))
    monkeypatch.setattr(sys, "stdin", Terminal())
    with console.output(as_json=False, quiet=True) as out:
        session: Any = Interrupted(out)
        assert chat.converse(session, GREEDY) == ([], None) and session.resets == 1
        assert "error: unknown command '/what'" in capsys.readouterr().err  # in quiet mode too
        monkeypatch.setattr(Terminal, "isatty", lambda self: False)
        with pytest.raises(KeyboardInterrupt):
            chat.converse(session, GREEDY)


def test_loading_says_that_turns_are_lost(capsys: pytest.CaptureFixture[str]) -> None:
    from longreach.cli import chat

    talk = type("Talk", (), {"turns": [1, 2], "known": 9})()
    with console.output(as_json=False, quiet=True) as out:
        for saved, says in ((None, "warning: 2 turns of the conversation before, not saved, went"), (Path("f"), "")):
            session: Any = type("Session", (), {"out": out, "saved": saved, "talk": talk, "load": lambda self, file: None})()
            chat.obey(session, "/load", "f")
            assert says in (said := capsys.readouterr().err) and (said == "" or says)


def test_a_document_never_takes_the_place_of_its_text(run: Run, folders: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("words " * 20)
    (tmp_path / "link").symlink_to(file)
    for name in ("text", "link"):
        arguments = ["--model", folders["llama"], "--file", str(file), "--context", "128", "--save-document", str(tmp_path / name), "--force"]
        refused(run, "run", *arguments, says="would take the place of the text itself")
    assert file.read_text() == "words " * 20


def test_an_encoding_without_a_text_is_refused(run: Run, folders: dict[str, str]) -> None:
    for more in (["run", "--prompt", "x"], ["run", "--document", "d", "--prompt", "x"], ["chat"]):
        refused(run, *more, "--model", folders["llama"], "--text-encoding", "utf-16", says="--text-encoding says how a text is written")


def test_a_seed_that_is_too_large_is_a_sentence(run: Run, folders: dict[str, str]) -> None:
    refused(run, "run", "--model", folders["llama"], "--prompt", "x", "--temperature", 1, "--seed", 10**23, says="the seed must be")


def test_what_a_document_saved_was_not_read_again(run: Run, folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("words " * 20)
    file = tmp_path / "d"
    assert run("run", "--model", folders["llama"], "--file", tmp_path / "text", "--context", 128, "--save-document", file).code == 0
    found = run("run", "--model", folders["llama"], "--document", file, "--prompt", "x", "--max-new-tokens", 2, "--json")
    result = json.loads(found.out)
    read = result["prefill_tokens_per_second"] * result["prefill_seconds"]
    assert read == pytest.approx(result["prompt_tokens"] - result["document_tokens"], rel=0.2)


def test_a_comparison_on_a_narrow_terminal_loses_no_digit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from longreach.cli.eval import show_comparison

    monkeypatch.setenv("COLUMNS", "60")
    row = {"task": "passkey", "metric": "accuracy", "length": 1024, "n": 20, "a": 100.0, "b": 75.0, "difference": -25.0, "low": -45.0, "high": -10.0}
    with console.output(as_json=False) as out:
        show_comparison(out.tables, Path("a"), Path("b"), [{**row, "only_a": 5, "only_b": 0, "p": 0.0625}])
    assert "…" not in capsys.readouterr().out


def test_a_picture_that_cannot_be_written_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from longreach.drawing import canvas

    def full(figure: Any, path: Path, colours: int | None) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(canvas, "_draw", full)
    with pytest.raises(ValueError, match=r"x.png' cannot be written \(no space left on device\); free some space"):
        canvas.save(None, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
