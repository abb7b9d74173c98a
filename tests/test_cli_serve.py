"""`longreach serve`: what is refused before anything is served, and what is said."""

from __future__ import annotations

import importlib.util
import json
import logging
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from typing import Any

import httpx
import pytest

from commands import Run, refused
from longreach.cli import serve, serve_vllm
from longreach.cli.console import Discard, Output, Terminal
from served import process


@pytest.fixture
def unserved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """-> what would be served, instead of serving it."""
    found: list[Any] = []
    monkeypatch.setattr(serve, "serve", lambda *given: found.append(given))
    return found


def test_without_the_packages_one_command_installs_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name in ("uvicorn", "prometheus_client") else real(name))
    refused(run, "serve", says="serving needs uvicorn and prometheus-client; pip install 'longreach[serve]'")


def test_what_is_refused(run: Run, unserved: list[Any]) -> None:
    refused(run, "serve", "--max-body", "many", says="such as 512MiB or 8GiB")
    refused(run, "serve", "--timeout", "-1s", says="90s, 10m or 1.5h")
    refused(run, "serve", "--host", "no.such.host.invalid", says="cannot be listened at")
    with socket.create_server(("127.0.0.1", 0)) as other:
        refused(run, "serve", "--port", other.getsockname()[1], says="pass another --port, 0 for any that is free")
    refused(run, "serve", "--port", 0, "--context", 4096, "--method", "stock", says="reaches 512 tokens on a trained window of 512")
    assert not unserved


def test_no_argument_serves_nano_in_its_window(run: Run, unserved: list[Any]) -> None:
    found = run("serve", "--port", 0)
    assert (found.code, found.out) == (0, "") and "the context is the trained window of 512 tokens" in found.err and "warning" not in found.err
    [(_, extension, _, name, limits, _, options)] = unserved
    assert (name, extension.context, extension.method.name, limits.waiting, options.host, options.step_ms) == ("nano", 512, "stock", 64, "127.0.0.1", 500)
    assert not extension.attached  # it was taken off again


def test_the_words_of_run(run: Run, unserved: list[Any], folders: dict[str, str]) -> None:
    words = ("--context", 256, "--method", "selfextend", "--group-size", 8, "--window", 16, "--dtype", "float32", "--memory", "device=1GiB")
    assert run("serve", "--port", 0, "--model", folders["chat"], "--name", "mine", "--queue", 3, *words).code == 0
    [(_, extension, _, name, limits, _, _)] = unserved
    assert (extension.context, name, limits.waiting) == (256, "mine", 3)
    assert (extension.method.group_size, extension.method.window, extension.report()["memory"] is not None) == (8, 16, True)
    assert serve.called(folders["chat"]) == "chat" and serve.called("org/model-1.5") == "org/model-1.5"


def test_a_folder_for_those_who_are_moved_out_is_there_while_it_is_served(run: Run, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found: list[Any] = []
    monkeypatch.setattr(serve, "listen", lambda out, service, where, options: found.append((service.worker.scheduler.room.reserve, [*tmp_path.iterdir()])))
    for reserve in (0.25, 1):
        assert run("serve", "--port", 0, "--reserve", reserve, "--quiet").code == 0
        assert not [*tmp_path.iterdir()]
    assert [(reserve, len(folders)) for reserve, folders in found] == [(0.25, 1), (1, 0)]
    assert run("serve", "--port", 0, "--reserve", 1.5).code == 2


@pytest.mark.slow
def test_who_came_last_is_moved_out_where_less_is_reserved(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two long answers that have room one after the other are served together at first; the folder goes with the server."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    ask = {"model": "nano", "max_tokens": 400, "temperature": 0}
    with process("--kv-budget", "2500KiB", "--reserve", "0") as (server, url):

        def answer(prompt: str) -> Any:
            found = httpx.post(f"{url}/completions", json={**ask, "prompt": prompt}, timeout=120)
            assert found.status_code == 200, found.text
            return found.json()["choices"][0]["text"]

        alone = [*map(answer, ("Call me", "It was"))]
        with ThreadPoolExecutor(2) as pool:
            together = [*pool.map(answer, ("Call me", "It was"))]
        assert together == alone
        assert "longreach_scheduler_preempted_total 0.0" not in httpx.get(f"{url.removesuffix('/v1')}/metrics").text
        assert len([*tmp_path.glob("longreach-moved-*")]) == 1
        server.terminate()
        assert server.wait(60) == 0 and not [*tmp_path.glob("longreach-moved-*")]


def test_bound_elsewhere_without_a_key_is_said(run: Run, unserved: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "warning: 0.0.0.0 may be reached from other machines" in run("serve", "--host", "0.0.0.0", "--port", 0).err
    monkeypatch.setenv("LONGREACH_API_KEY", "sesame")
    assert "warning" not in run("serve", "--host", "0.0.0.0", "--port", 0).err
    assert [given[-1].api_key for given in unserved] == [None, "sesame"]


def test_a_line_of_the_log_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    serve.log(Output(False, sys.stdout, Terminal(stderr=True, file=sys.stderr)))
    logger = logging.getLogger("longreach.serving")
    try:
        logger.info("answered", extra={"said": {"status": 200, "seconds": 0.5}})
        try:
            raise RuntimeError("two\nlines")
        except RuntimeError:
            logger.exception("failed")
        first, second = map(json.loads, capsys.readouterr().err.splitlines())
        assert (first["event"], first["level"], first["status"], first["seconds"]) == ("answered", "info", 200, 0.5) and first["time"]
        assert second["level"] == "error" and "two\nlines" in second["error"]
        serve.log(Output(False, sys.stdout, Terminal(file=Discard()), quiet=True))
        logger.info("answered")
        assert capsys.readouterr().err == ""
    finally:
        for name in ("longreach.serving", "uvicorn.error"):
            other = logging.getLogger(name)
            other.handlers, other.propagate = [], True
            other.setLevel(logging.NOTSET)


def test_vllm_is_not_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_vllm, "find_spec", lambda name: None)
    refused(run, "serve", "--engine", "vllm", says="vLLM is not installed here")


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """-> what would be executed in place of this process."""
    found: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(serve_vllm, "find_spec", lambda name: name)
    monkeypatch.setattr(serve_vllm, "version", lambda name: "0.32.0")
    monkeypatch.setattr(serve_vllm, "execute", lambda *given: found.append(given))
    return found


def test_the_same_words_are_handed_over_to_vllm(run: Run, handed: list[Any]) -> None:
    words = ("--context", "2k", "--method", "selfextend", "--group-size", 8, "--window", 64, "--port", 9000, "--api-key", "sesame")
    found = run("serve", "--engine", "vllm", *words)
    [(command, environment)] = handed
    assert found.code == 0 and "method: SelfExtend(group_size=8" in found.err
    assert command[1:4] == ["-m", "vllm.entrypoints.cli.main", "serve"] and environment["VLLM_API_KEY"] == "sesame" and "sesame" not in command
    options = dict(zip(command[5::2], command[6::2], strict=True))
    settings = json.loads(options.pop("--additional-config"))["longreach"]
    assert options == {"--served-model-name": "nano", "--host": "127.0.0.1", "--port": "9000", "--max-model-len": "2048", "--dtype": "float32"}
    assert {name: settings[name] for name in ("method", "group_size", "window", "context", "trained_window")} == {
        "method": "selfextend", "group_size": 8, "window": 64, "context": 2048, "trained_window": 512,
    }  # fmt: skip


def test_vllm_in_the_trained_window_and_by_the_dial(run: Run, handed: list[Any], folders: dict[str, str]) -> None:
    found = run("serve", "--engine", "vllm", "--json")
    assert json.loads(found.out)["command"] == ["vllm", *handed[0][0][3:]] and "--additional-config" not in handed[0][0]
    assert run("serve", "--engine", "vllm", "--context", 512).code == run("serve", "--engine", "vllm", "--trained-window", 1024).code == 0
    within, beyond = handed.pop(1)[0], handed.pop(1)[0]
    assert "--additional-config" not in within  # plain attention is vLLM's own, which is faster than ours on its pages
    assert '"method": "stock"' in beyond[-1] and beyond[beyond.index("--max-model-len") + 1] == "1024"  # without it vLLM refuses the length
    assert run("serve", "--engine", "vllm", "--model", folders["chat"], "--context", 256, "--dtype", "bf16").code == 0
    command = handed[1][0]
    assert command[command.index("--dtype") + 1] == "bfloat16" and '"method": "selfextend"' in command[-1] and folders["chat"] in command
    assert run("serve", "--engine", "vllm", "--method", "selfextend", "--group-size", 2, "--window", 64).code == 0
    assert handed[2][0][handed[2][0].index("--max-model-len") + 1] == "960"


def test_the_cpu_build_has_a_server_and_no_command(run: Run, handed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise serve_vllm.PackageNotFoundError(name)

    monkeypatch.setattr(serve_vllm, "version", missing)
    assert run("serve", "--engine", "vllm").code == 0
    assert handed[0][0][1:4] == ["-m", "vllm.entrypoints.openai.api_server", "--model"]


def test_every_option_is_handed_over_to_vllm_or_refused() -> None:
    """A new option of our own server is one of the two, and is not left out without a word."""
    handed = {"model", "declared", "method", "host", "port", "name", "api_key", "dtype", "trained_window", "profile", "no_profile", "engine"}
    ours = set(signature(serve.command).parameters) - {"context", "as_json", "quiet", "verbose"}
    assert handed | set(serve_vllm.OWN) == ours and not handed & set(serve_vllm.OWN)


def test_what_vllm_cannot_be_handed(run: Run, handed: list[Any], tmp_path: Any) -> None:
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("VLLM_PLUGINS", "others")
        refused(run, "serve", "--engine", "vllm", "--context", 2048, says="VLLM_PLUGINS leaves longreach out")
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("LONGREACH_VLLM", '{"method": "selfextend", "group_size": 8, "window": 64}')
        refused(run, "serve", "--engine", "vllm", "--context", 512, says="LONGREACH_VLLM is set")  # the dial would choose plain attention
    refused(run, "serve", "--engine", "vllm", "--queue", 3, "--memory", "device=1GiB", says="--queue and --memory belong to longreach's own server")
    refused(run, "serve", "--engine", "vllm", "--reserve", 0.5, says="--reserve belong")
    refused(run, "serve", "--engine", "vllm", "--method", "lm-infinite", "--n-local", 512, says="pass --context N")
    refused(run, "serve", "--engine", "vllm", "--context", 2048, "--method", "quest", "--budget", 64, says="chooses keys by their content")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(64))
    refused(run, "serve", "--engine", "vllm", "--model", str(tmp_path / "model.gguf"), says="write the model as a folder first")
    assert not handed


def test_vllm_bound_elsewhere_without_a_key_is_said(run: Run, handed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    asked = ("serve", "--engine", "vllm", "--host", "0.0.0.0")
    assert "warning: 0.0.0.0 may be reached from other machines" in run(*asked).err
    assert "warning" not in run(*asked, "--api-key", "sesame").err
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    assert "warning" not in run(*asked).err


def test_what_becomes_of_pages_is_said(run: Run, handed: list[Any]) -> None:
    found = run("serve", "--engine", "vllm", "--context", 2048, "--method", "lm-infinite", "--n-local", 256)
    assert "are freed, and prefix caching is off" in found.err and '"pages": "free"' in handed[0][0][-1]
