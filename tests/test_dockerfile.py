"""The Dockerfile, which is not built here: what it runs is what the program and the documentation have, and its health check works on a real server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib

import typer

import longreach
from longreach.cli.program import build
from scripts import ROOT
from served import served

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
# instruction and what follows it, in their order
STEPS = [tuple(line.split(" ", 1)) for line in re.sub(r"\\\n\s*", "", TEXT).splitlines() if line and not line.startswith("#")]


def follows(name: str) -> list[str]:
    return [rest for step, rest in STEPS if step == name]


def test_it_runs_the_one_command() -> None:
    [entry] = map(json.loads, follows("ENTRYPOINT"))
    assert entry[:2] == ["longreach", "serve"] and not follows("CMD")
    known = {option: parameter for parameter in typer.main.get_command(build()).commands["serve"].params for option in parameter.opts}  # type: ignore[attr-defined]
    assert {word for word in entry[2:] if word.startswith("--")} == {"--host"} and entry[entry.index("--host") + 1] == "0.0.0.0"
    assert follows("EXPOSE") == [str(known["--port"].default)]
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    shown = [line.removeprefix("#").strip() for line in TEXT.splitlines() if line.startswith("#     docker")]
    assert shown == re.findall(r"^docker .*$", page, re.M) and shown[0] == "docker build -t longreach ."
    for line in shown[1:]:
        before, _, given = line.partition(" longreach")
        assert f"-p 127.0.0.1:{known['--port'].default}:{known['--port'].default}" in before and "--rm" in before
        assert {word for word in shlex.split(given) if word.startswith("--")} <= set(known)


def test_it_installs_what_the_tests_run_with() -> None:
    assert follows("FROM") == ["python:3.11-slim"]
    torch, package = [rest for rest in follows("RUN") if rest.startswith("pip install")]
    assert torch == 'pip install --index-url "$TORCH_INDEX" "$(grep \'^torch==\' constraints.txt)"'
    assert len(re.findall(r"^torch==\S+$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)) == 1
    [extras] = re.findall(r"^pip install -c constraints\.txt '\.\[([\w,]+)\]'$", package)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.split(",")) == {"serve", "interop"} <= set(project["optional-dependencies"])
    copied = {name for rest in follows("COPY") for name in rest.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied) and {project["readme"], *project["license-files"], "pyproject.toml", "src"} <= copied
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored and {line.removeprefix("!") for line in ignored if line.startswith("!")} == copied


def test_it_is_not_root_that_serves() -> None:
    [user] = follows("USER")
    names = [step for step, _ in STEPS]
    assert user == "longreach" and f"useradd --create-home --uid 1000 {user}" in TEXT and "RUN" not in names[names.index("USER") :]


def test_its_health_check_tells_a_server_from_none() -> None:
    [check] = follows("HEALTHCHECK")
    program, *arguments = json.loads(check.split("CMD ", 1)[1])
    assert program == "python" and arguments[0] == "-c" and "http://127.0.0.1:8000/health" in arguments[1]
    model, tokenizer = longreach.load("nano")
    with longreach.extend(model, context=600) as extension, served(extension, tokenizer, key="sesame") as server:
        code = arguments[1].replace("http://127.0.0.1:8000", server.url)
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
        lost = code.replace("/health", "/v1/models")  # which needs the key
        assert subprocess.run([sys.executable, "-c", lost], capture_output=True, check=False).returncode == 1
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 1
