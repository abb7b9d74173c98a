"""Nonsense in every option: exit code 2 and one sentence with its fix, never a traceback; and help texts that lose nothing."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text

from longreach.cli import main
from longreach.cli.program import build

FILES = {
    "t.txt": b"hello",
    "bin.bin": bytes(range(256)),
    "bad.json": b'{"a": 1',
    "list.json": b"[1, 2]",
    "wide.json": b'{"model_type": "llama", "hidden_size": "wide"}',
    "zero.json": b'{"model_type": "llama", "num_attention_heads": 0}',
    "nan.json": b'{"model_type": "llama", "max_position_embeddings": NaN}',
    "huge.json": b'{"model_type": "llama", "vocab_size": 1e400}',
    "bad.toml": b"a = [",
    "cut.gguf": b"GGUF" + bytes(20),
}
PASSKEY = "eval run passkey --samples 1 --depths 0.5 -o out"
PLAN = "plan --context 4k --hardware A100-80"
SELF = "distances selfextend --group-size 2 --window 4"
CASES = [
    ("eval compare nope nope2", "there is no folder 'nope'"),
    ("eval compare t.txt d", "pass a folder that `longreach eval run`"),
    ("eval report d", "holds no run.json"),
    ("eval report nope", "there is no folder"),
    ("eval run passkey -o t.txt", "is a file; name a folder"),
    ("eval run passkey -o t.txt/x", "is a file; name a folder"),
    ('eval run passkey -o ""', "-o is given an empty value"),
    ("eval ppl -o t.txt", "is a file; name a folder"),
    ('eval run "" -o out', "choose one of"),
    (f"{PASSKEY} --lengths 1e30", "such as 512,1k,2k"),
    (f"{PASSKEY} --lengths 999999999999k", "such as 512,1k,2k"),
    (f"{PASSKEY} --lengths 64.5", "such as 512,1k,2k"),
    (f"{PASSKEY} --lengths nan", "such as 512,1k,2k"),
    (f"{PASSKEY} --depths 0:1:nan", "--depths must be"),
    (f"{PASSKEY} --truncate up", "'middle', 'left', 'right', 'right-words', 'middle-reencode', 'suffix-with-head'; see longreach eval run --help"),
    (f'{PASSKEY} --text ""', "--text is given an empty value"),
    (f"{PASSKEY} --text ' '", "there is no file ' '"),
    (f"{PASSKEY} --text bin.bin", "--text-encoding"),
    (f"{PASSKEY} --data nope", "leave it out"),
    (f"{PASSKEY} --model cut.gguf", "could not load 'cut.gguf'"),
    (f"{PASSKEY} --model bin.bin", "does not begin with the letters GGUF"),
    (f"{PASSKEY} --model d", "the folder has no config.json and no tokenizer files"),
    (f'{PASSKEY} --model ""', "--model is given an empty value"),
    (f"{PASSKEY} --model ' '", "without a name"),
    ("run --document t.txt --prompt x", "is a file and no document of Longreach, which is a folder"),
    ("run --document d --prompt x", "is a folder, but no document of Longreach"),
    ("run --document nope --prompt x", "there is no document 'nope'"),
    ("run --file t.txt --context 600 --save-document bad.json", "is a file, and a document is a folder"),
    ("run --file t.txt --context 600 --save-document bad.json --force", "is a file, and a document is a folder"),
    ("run --file t.txt --context 600 --save-document nope/d", "create it first"),
    ("run --file t.txt --context 600 --save-document . --force", "is a folder that holds other things"),
    ("run --file t.txt --prompt x --truncate up", "'left', 'middle', 'right'"),
    ("eval lm-eval --tasks mmlu --limit nan", "--limit must be a number of documents"),
    ("eval lm-eval --tasks mmlu --limit inf", "--limit must be a number of documents"),
    (f"{PLAN} --config wide.json", "could not load 'wide.json'"),
    (f"{PLAN} --config zero.json", "update transformers, or pass that of another model"),
    (f"{PLAN} --config nan.json", "could not load 'nan.json'"),
    (f"{PLAN} --config huge.json", "could not load 'huge.json'"),
    (f"{PLAN} --config bad.json", "is not JSON"),
    (f"{PLAN} --config list.json", "holds no JSON object"),
    (f"{PLAN} --config bin.bin", "is not JSON"),
    (f"{PLAN} --model cut.gguf", "could not load 'cut.gguf'"),
    (f"{PLAN} --model t.txt", "does not begin with the letters GGUF"),
    (f"{PLAN} --hardware bad.toml", "is not TOML"),
    ("plan --context 1e13", "such as 4096, '4k' or '1m'"),
    ("methods --markdown bin.bin", "not text in UTF-8"),
    ("methods --markdown d", "pass docs/methods.md"),
    ("distances lm-infinite --n-local 99999999999999999999999999", "n_local must be an integer of at least 1 and at most 4294967296"),
    ("distances combined --encoding \"yarn --factor '4\" --positions selfextend", "cannot be taken apart (no closing quotation)"),
    ("distances yarn --factor 4 --png y.png --trained-window 8 --rope-base inf", "--rope-base must be a number above 1"),
    ("distances yarn --factor 4 --png y.png --trained-window 8 --rope-base 1", "--rope-base must be a number above 1"),
    ("distances yarn --factor 4 --png y.png --trained-window 8 --rotary-dims 99999999998", "--rotary-dims must be at most"),
    (f"{SELF} --length nan", "such as 4096, '4k' or '1m'"),
    (f"{SELF} --length 5k", "--length must be between"),
]


@pytest.mark.parametrize(("line", "says"), CASES, ids=[line for line, _ in CASES])
def test_nonsense_is_one_sentence(line: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    for name, data in FILES.items():
        Path(name).write_bytes(data)
    Path("d").mkdir()
    assert main(shlex.split(line)) == 2
    found = capsys.readouterr()
    last = found.err.strip().splitlines()[-1]
    assert found.out == "" and last.startswith("error: ") and says in last and "Traceback" not in found.err, found.err
    assert not Path("out").exists()


def commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, f"{path} {name}")


def test_help_texts_lose_no_brackets():
    """Rich takes [eval] for markup and drops it: every bracket that is not a style has to be escaped."""
    seen = 0
    for path, command in commands(typer.main.get_command(build()), "longreach"):
        for written in [command.help, *(getattr(parameter, "help", None) for parameter in command.params)]:
            if written:
                seen += 1
                meant = re.sub(r"\[/?bold\]", "", written).replace("\\[", "[")
                assert Text.from_markup(written).plain == meant, (path, written)
    assert seen > 100


def test_what_is_printed_keeps_its_brackets(capsys: pytest.CaptureFixture[str]):
    """Names of models, files and tasks may hold brackets, on both streams, in tables and in titles."""
    from longreach.cli.common import output, pairs_table

    with output(False) as out:
        out.note("pip install 'longreach[eval]'")
        out.errors.print("models[red]")
        out.finish({}, lambda console: (console.print("runs/[bold]x"), console.print(pairs_table("models[red]", [("files[dim]", "a[b]")]))))  # type: ignore[func-returns-value]
    found = capsys.readouterr()
    assert "longreach[eval]" in found.err and "models[red]" in found.err
    assert all(text in found.out for text in ("runs/[bold]x", "models[red]", "files[dim]", "a[b]"))
