"""`longreach run`: the answer is that of stock `generate`, what is read and what is left out is as asked, and bad input is a sentence."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as t

import longreach
from commands import Run, refused
from longreach.cli import text
from longreach.methods.base import Method
from longreach.running import generation, prompts
from longreach.running.conversation import Conversation
from tiny import SMALL, tokenizer


def expected_answer(folder: str, method: Method | None, context: int | None, prompt: str, new: int) -> str:
    """Stock `generate` on the extended model, in one go."""
    model, made = longreach.load(folder)
    with longreach.extend(model, method, context=context), torch.no_grad():
        inputs = made(prompt, return_tensors="pt")
        ids = inputs["input_ids"]
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return str(made.decode(found[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("chunk_size", [512, 17])
@pytest.mark.parametrize(
    ("options", "method", "context"),
    [
        (["--context", 256], None, 256),
        (["--method", "selfextend", "--group-size", 16, "--window", 32], longreach.SelfExtend(16, 32), None),
        (["--method", "lm-infinite", "--n-local", 48], longreach.LMInfinite(48), None),
        (["--method", "lm-infinite", "--n-local", 48, "--top-k", 3, "--top-k-from-layer", 0], longreach.LMInfinite(48, top_k=3, top_k_from_layer=0), None),
        (["--method", "stock"], longreach.Stock(), None),
    ],
)
@pytest.mark.filterwarnings("ignore:a sequence of")
def test_run_answers_as_generate_does(
    run: Run, folders: dict[str, str], book: Path, options: list[object], method: Method | None, context: int | None, chunk_size: int
) -> None:
    arguments = ["run", "--model", folders["llama"], "--file", book, "--prompt", "and?", "--max-new-tokens", 10, "--chunk-size", chunk_size, *options]
    data = run(*arguments, "--json").json
    assert data["answer"] == expected_answer(folders["llama"], method, context, f"{book.read_text()}\n\nand?", 10)
    assert data["prompt_tokens"] == 1 + 200 + 2 + 4
    assert data["new_tokens"] <= 10 and data["kv_store_bytes"] > 0 and data["peak_memory_bytes"] > 2**20
    assert data["context"] == (context or 217) and data["context_declared"] == (context is not None)
    assert data["truncated"] is None
    assert longreach.from_json(data["method"]).name == (method.name if method else "selfextend")


def test_run_streams_text_and_reports_on_standard_error(run: Run, folders: dict[str, str], book: Path) -> None:
    arguments = ["run", "--model", folders["llama"], "--file", book, "--max-new-tokens", 12, "--context", 300]
    data, plain = run(*arguments, "--json"), run(*arguments)
    assert plain.code == 0
    assert plain.out == data.json["answer"] + "\n"
    assert "SelfExtend(" in plain.err and "201 tokens" in plain.err and "keys and values" in plain.err
    assert "SelfExtend(" in data.err, "the choice is made known in JSON mode too"


def test_run_without_context_declares_what_it_needs(run: Run, folders: dict[str, str], book: Path) -> None:
    short = run("run", "--model", folders["llama"], "--prompt", "hi", "--max-new-tokens", 4, "--json").json
    assert (short["context"], short["context_declared"], short["method"]["method"]) == (7, False, "stock")
    long = run("run", "--model", folders["llama"], "--file", book, "--max-new-tokens", 4, "--json").json
    assert (long["context"], long["context_declared"], long["method"]["method"]) == (205, False, "selfextend")


def test_stock_beyond_its_window_runs_for_comparison(run: Run, folders: dict[str, str], book: Path) -> None:
    found = run("run", "--model", folders["llama"], "--file", book, "--method", "stock", "--max-new-tokens", 2, "--context", 300, "--json")
    assert "for comparison only" in found.err and "beyond the trained window of 64" in found.json["warning"]


def test_chat_template(run: Run, folders: dict[str, str]) -> None:
    rendered = "[system]be brief[user]some text\n\nwhy?[assistant]"
    model, made = longreach.load(folders["chat"])
    assert made.decode(Conversation(model, made, system="be brief").sequence(text.Request("some text", "why?").user)) == rendered
    data = run("run", "--model", folders["chat"], "--prompt", "why?", "--max-new-tokens", 2, "--json").json
    assert data["prompt_tokens"] == len("[user]why?[assistant]")
    refused(run, "run", "--model", folders["llama"], "--prompt", "why?", "--system", "be brief", says="no chat template")


def test_sampling_is_reproducible(run: Run, folders: dict[str, str]) -> None:
    def sample(*more: object) -> str:
        arguments = ["run", "--model", folders["llama"], "--prompt", "why?", "--max-new-tokens", 12, "--json", *more]
        return str(run(*arguments).json["answer"])

    hot = ["--temperature", 5, "--seed"]
    assert sample(*hot, 1) == sample(*hot, 1) != sample(*hot, 2)
    assert sample("--temperature", 0, "--seed", 1) == sample() == sample("--top-p", 0.000001, "--seed", 3)


def test_piped_text(folders: dict[str, str], book: Path) -> None:
    """One real process: standard input is a pipe, standard output one object, the log of the libraries nowhere."""
    command = [sys.executable, "-m", "longreach.cli", "run", "--model", folders["llama"], "--prompt", "and?", "--max-new-tokens", "3", "--json"]
    found = subprocess.run(command, input=book.read_bytes(), capture_output=True, timeout=120)
    assert found.returncode == 0, found.stderr.decode()
    assert json.loads(found.stdout)["prompt_tokens"] == 207
    lines = found.stderr.decode().splitlines()
    assert lines[0] == "reading the text from standard input" and lines[1].startswith("method: SelfExtend") and len(lines) == 2


def test_dash_is_standard_input(run: Run, folders: dict[str, str], stdin: Callable[[bytes], None]) -> None:
    stdin(b"some text")
    assert run("run", "--model", folders["llama"], "--file", "-", "--max-new-tokens", 2, "--json").json["prompt_tokens"] == 10
    stdin(b"")
    refused(run, "run", "--model", folders["llama"], "--file", "-", says="standard input is empty")


def test_compressed_files(run: Run, folders: dict[str, str], book: Path, tmp_path: Path) -> None:
    packed = tmp_path / "book.txt.xz"
    packed.write_bytes(lzma.compress(book.read_bytes()))
    assert run("run", "--model", folders["llama"], "--file", packed, "--max-new-tokens", 2, "--json").json["prompt_tokens"] == 201
    refused(run, "run", "--model", folders["llama"], "--file", packed, "--max-bytes", 199, says="longer than 199 bytes")
    packed.write_bytes(b"not xz")
    refused(run, "run", "--model", folders["llama"], "--file", packed, says="not a valid .xz file")


@pytest.mark.parametrize(
    ("name", "data", "more", "says"),
    [
        ("missing.txt", None, [], "there is no file"),
        (".", None, [], "is a folder"),
        ("empty.txt", b"", [], "is empty"),
        ("blank.txt", b" \n\t\n", [], "is empty"),
        ("zeros.bin", b"abc\0def", [], "binary (byte 0 at offset 3)"),
        ("latin.txt", "café".encode("latin-1"), [], "not UTF-8 text (byte 0xe9 at offset 3); convert it to UTF-8, or pass --text-encoding NAME"),
        ("wide.txt", "wide and plain".encode("utf-16-le"), [], "looks like UTF-16-LE text; pass --text-encoding utf-16-le"),
        ("wide.txt", "wide and plain".encode("utf-16-be"), [], "looks like UTF-16-BE text; pass --text-encoding utf-16-be"),
        ("odd.txt", b"\xff\xfeabc", [], "is not UTF-16 text"),
        ("plain.txt", b"plain", ["--text-encoding", "klingon"], "there is no encoding 'klingon'; pass --text-encoding utf-8"),
        ("plain.txt", b"plain text", ["--text-encoding", "utf-16"], "is UTF-8 text, not UTF-16; leave out --text-encoding"),
        ("odd.txt", "h\u00e9 plain".encode(), ["--text-encoding", "UTF-16-LE"], "is UTF-8 text, not UTF-16-LE; leave out --text-encoding"),
        ("long.txt", b"x" * 101, ["--max-bytes", 100], "longer than 100 bytes"),
    ],
)
def test_bad_files(run: Run, folders: dict[str, str], tmp_path: Path, name: str, data: bytes | None, more: list[object], says: str) -> None:
    file = tmp_path / name
    if data is not None:
        file.write_bytes(data)
    refused(run, "run", "--model", folders["llama"], "--file", file, "--prompt", "x", *more, says=says)


@pytest.mark.parametrize("text", ["wide and plain", "\u4e2d\u6587 wide", "\u0442\u0435\u043a\u0441\u0442"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be"])
def test_wide_texts_are_read(run: Run, folders: dict[str, str], tmp_path: Path, text: str, encoding: str) -> None:
    (tmp_path / "wide.txt").write_bytes(text.encode(encoding))
    arguments = ["run", "--model", folders["llama"], "--file", tmp_path / "wide.txt", "--text-encoding", encoding, "--max-new-tokens", 1, "--json"]
    assert run(*arguments).json["prompt_tokens"] == 1 + len(text.encode())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--seed", 7], "greedy, and --seed has no effect"),
        (["--temperature", 0, "--top-p", 0.5, "--seed", 0], "greedy, and --seed and --top-p have no effect"),
        (["--temperature", 1, "--seed", 7], None),
        (["--top-p", 0.5, "--seed", 7], None),
        ([], None),
    ],
)
def test_an_option_without_effect_is_said(run: Run, folders: dict[str, str], more: list[object], says: str | None) -> None:
    found = run("run", "--model", folders["llama"], "--prompt", "x", "--max-new-tokens", 2, "-q", *more)
    assert found.code == 0 and (found.err == "" if says is None else f"warning: without a --temperature above 0 the answer is {says}\n" == found.err)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "nothing to read"),
        (["--prompt", "  "], "nothing to read"),
        (["--prompt", "x", "--max-new-tokens", 0], "--max-new-tokens"),
        (["--prompt", "x", "--context", 0], "--context"),
        (["--prompt", "x", "--chunk-size", 0], "--chunk-size"),
        (["--prompt", "x", "--temperature", -1], "--temperature"),
        (["--prompt", "x", "--top-p", 0], "--top-p must be above 0"),
        (["--prompt", "x", "--top-p", 1.5], "--top-p"),
        (["--prompt", "x", "--depth", 0.5], "--depth says where --hide puts its sentence; pass --hide SENTENCE too"),
        (["--prompt", "x", "--truncate", "top"], "--truncate"),
        (["--prompt", "x", "--truncate", "left"], "pass --context N too"),
        (["--prompt", "x", "--group-size", 8], "is a parameter of a method; name the method too: --method block-selfextend or --method selfextend"),
        (["--promt", "x"], "there is no option --promt; did you mean --prompt?"),
        (["--prompt", "x", "stray"], "unexpected argument 'stray'"),
        (["--prompt", "x", "--method", "magic"], "unknown method 'magic'"),
        (["--prompt", "x", "--method", "selfextend", "--group-size", 8], "selfextend needs --window"),
        (["--prompt", "x", "--method", "selfextend", "--group-size", 8, "--window", 0], "at least 1"),
        (["--prompt", "x", "--method", "selfextend", "--group-size", 8, "--window", 8, "--wndow", 3], "did you mean --window?"),
        (["--prompt", "x", "--method", "lm-infinite", "--n-local", 100], "beyond the trained window of 64"),
        (["--prompt", "x", "--method", "selfextend", "--group-size", 2, "--window", 32, "--context", 5000], "exceeds the capacity of 96"),
        (["--prompt", "x", "--method", "quest", "--context", 500], "--encoding 'yarn --factor 8'"),
        (["--prompt", "x", "--context", 100000], "100000 tokens"),
        (["--prompt", "x", "--dtype", "int3"], "unknown dtype"),
        (["--prompt", "x", "--device", "abacus"], "unknown device"),
    ],
)
def test_bad_options_of_run(run: Run, folders: dict[str, str], more: list[object], says: str) -> None:
    refused(run, "run", "--model", folders["llama"], *more, says=says)


@pytest.mark.parametrize(
    ("name", "says"),
    [("gpt2", "no rotary position module"), ("multimodal", "multimodal wrapper"), ("hybrid", "layers of type linear_attention")],
)
@pytest.mark.parametrize("command", [["run", "--prompt", "x"], ["check"]])
def test_models_that_cannot_be_extended(run: Run, folders: dict[str, str], name: str, says: str, command: list[str]) -> None:
    refused(run, *command, "--model", folders[name], says=says)


def test_models_that_do_not_exist(run: Run, tmp_path: Path) -> None:
    refused(run, "run", "--model", "/no/such/folder", "--prompt", "x", says="there is no folder '/no/such/folder'")
    refused(run, "run", "--model", tmp_path, "--prompt", "x", says="could not load")


# -- too long: an error with the numbers, or what the user says may go -----------------------------------------------------------


def test_too_long_is_an_error_with_the_numbers(run: Run, folders: dict[str, str], book: Path) -> None:
    common = ["run", "--model", folders["llama"], "--file", book, "--max-new-tokens", 10]
    numbers = "prompt has 201 tokens and with 10 new ones needs 211, more than the declared context of 210; pass --context 211"
    refused(run, *common, "--context", 210, says=numbers)
    assert run(*common, "--context", 211, "--json").code == 0
    method = ["--method", "selfextend", "--group-size", 2, "--window", 8]
    refused(run, *common, *method, says="the capacity of 120 tokens of SelfExtend(")
    assert run(*common, "--method", "lm-infinite", "--n-local", 64, "--json").code == 0


@pytest.mark.parametrize("side", ["left", "middle", "right"])
def test_truncation_is_reported(run: Run, folders: dict[str, str], book: Path, side: str) -> None:
    arguments = ["run", "--model", folders["llama"], "--file", book, "--prompt", "and?", "--max-new-tokens", 10, "--context", 100, "--truncate", side]
    found = run(*arguments, "--json")
    assert found.json["prompt_tokens"] == 90
    assert found.json["truncated"] == {"side": side, "document_tokens": 200, "kept_tokens": 90 - 1 - 2 - 4}
    assert "117 of the document's 200 tokens were left out" in found.err
    assert run(*arguments[:-4], "--context", 300, "--truncate", side, "--json").json["truncated"] is None


@pytest.mark.parametrize(("side", "kept"), [("left", "6789"), ("right", "0123"), ("middle", "0189")])
def test_what_truncation_keeps(side: text.Side, kept: str) -> None:
    made = tokenizer()
    encode = lambda document: prompts.encode(made, prompts.about(document, "why?"))  # noqa: E731
    document, cut = text.shorten(made, "0123456789", 1 + 4 + 2 + 4, side, encode)
    assert document == kept and len(encode(document)) == 11
    assert (cut.document_tokens, cut.kept_tokens) == (10, 4)


def test_truncation_of_characters_of_several_bytes() -> None:
    """A cut inside a character takes the whole character along, and the result still fits."""
    made = tokenizer()
    for most in range(9, 24):
        encode = lambda document: prompts.encode(made, prompts.about(document, "why?"))  # noqa: E731
        document, _ = text.shorten(made, "ä€ö" * 5, most, "middle", encode)
        assert most - 6 < len(encode(document)) <= most and set(document) <= set("ä€ö")


def test_the_prompt_is_never_cut(run: Run, folders: dict[str, str], book: Path) -> None:
    common = ["run", "--model", folders["llama"], "--file", book, "--truncate", "left"]
    refused(run, *common, "--prompt", "y" * 60, "--max-new-tokens", 10, "--context", 64, says="the prompt alone has 61 tokens")
    refused(run, *common, "--max-new-tokens", 64, "--context", 64, says="leave no room for a prompt")


def test_generation_settings_of_a_checkpoint_do_not_decide_the_cache_or_sampling() -> None:
    model = t.LlamaForCausalLM(t.LlamaConfig(**SMALL))
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, cache_implementation="static", num_beams=3)
    config = generation.generation_config(model, tokenizer(), 5, generation.Sampling())
    assert (config.do_sample, config.num_beams, config.cache_implementation, config.max_new_tokens) == (False, 1, None, 5)
    assert config.temperature is None and config.top_p is None and config.top_k is None
