"""The command line: what reaches which stream, every bad input, the published oracles, truncation, and that --help is instant."""

from __future__ import annotations

import json
import lzma
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import longreach
from longreach.checking import measurements
from longreach.cli import COMMANDS, build, main, parameters, text
from longreach.cli.parameters import brief
from longreach.methods import registry
from longreach.methods.base import Method
from longreach.running import generation
from methods_matrix import METHODS
from oracles import BLOCK_SELFEXTEND_2_4, DUAL_CHUNK_7_4, LM_INFINITE_4_2, SELFEXTEND_2_4, SELFEXTEND_3_4, STREAMING_3_2

WINDOW = 64
SMALL: dict[str, Any] = dict(
    vocab_size=259,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=WINDOW,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    initializer_range=0.3,
)
CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


def tokenizer(chat: bool = False) -> Any:
    """Byte level, without merges: one token per byte after <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = t.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.chat_template = CHAT if chat else None
    return made


def save(folder: Path, model: Any, chat: bool = False) -> str:
    model.save_pretrained(folder)
    tokenizer(chat).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """name -> a folder with a tiny model."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = t.LlamaForCausalLM(t.LlamaConfig(**SMALL))
    found = {"llama": save(root / "llama", llama), "chat": save(root / "chat", llama, chat=True)}
    found["bf16"] = save(root / "bf16", llama.bfloat16())
    found["gpt2"] = save(root / "gpt2", t.GPT2LMHeadModel(t.GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=WINDOW)))
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    wrapper = t.Gemma3Config(text_config={**SMALL, "head_dim": 8, "sliding_window": 24}, vision_config=vision, mm_tokens_per_image=4)
    found["multimodal"] = save(root / "multimodal", t.Gemma3ForConditionalGeneration(wrapper))
    hybrid = t.Qwen3NextConfig(
        **SMALL,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    found["hybrid"] = save(root / "hybrid", t.Qwen3NextForCausalLM(hybrid))
    return found


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as the one object that it must be."""
        assert self.out.endswith("}\n") and self.out.count("\n") == 1, self.out
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        return Result(code, *capsys.readouterr())

    return run


def refused(run: Run, *arguments: object, says: str) -> None:
    """Exit code 2, one sentence on standard error, nothing on standard output; with --json exactly one error object."""
    plain = run(*arguments)
    assert (plain.code, plain.out) == (2, ""), plain
    last = plain.err.strip().splitlines()[-1]
    assert last.startswith("error: ") and says in last, plain.err
    assert "Traceback" not in plain.err
    assert run(*arguments, "--json").json == {"error": last.removeprefix("error: ")}


# -- the program ----------------------------------------------------------------------------------------------------------------


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["check", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    heavy = "{'torch', 'transformers', 'matplotlib', 'tokenizers', 'numpy'}"
    found = python(f"import sys; from longreach.cli import main; code = main({arguments!r}); print(code, sorted({heavy} & set(sys.modules)), file=sys.stderr)")
    assert found.stderr.strip() == "0 []"
    assert "Usage: longreach" in found.stdout


def test_help_lists_every_command_and_no_arguments_are_help(run: Run) -> None:
    found = run()
    assert found.code == 0
    assert all(name in found.out for name in COMMANDS)
    assert "longreach methods" in " ".join(run("run", "--help").out.split())


def test_version(run: Run) -> None:
    assert run("--version").out.strip() == longreach.__version__


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "choose one of: demo, run, chat, methods, distances, check"),
        (["distances"], "see longreach distances --help"),
        (["distances", "stock", "--length", "x"], "--length"),
        (["distances", "stock", "--length", 0], "must be a positive number of tokens"),
        (["distances", "stock", "--length", 5000], "between 1 and 4096"),
        (["distances", "--window", 4, "selfextend"], "name the method before its parameters"),
        (["distances", "selfextnd"], f"did you mean 'selfextend'? choose one of: {', '.join(registry())}"),
        (["distances", "selfextend"], "pass --group-size N --window N"),
        (["distances", "selfextend", "--group-size", 2], "selfextend needs --window"),
        (["distances", "selfextend", "--group-size", 0, "--window", 4], "at least 1"),
        (["distances", "selfextend", "--group-size", "two", "--window", 4], "--group-size must be of type int, not 'two'"),
        (["distances", "selfextend", "--group-size", 2, "--window"], "--window needs a value"),
        (["distances", "selfextend", "--group-size", 2, "--window", 4, "--window", 8], "--window is given twice"),
        (["distances", "selfextend", "--group-size", 2, "--window", 4, "--shift", "up"], "--shift must be one of floor | true_division"),
        (["distances", "selfextend", "--grup-size", 2, "--window", 4], "did you mean --group-size?"),
        (["distances", "lm-infinite", "--n-local", -1], "at least 1, not -1"),
        (["distances", "lm-infinite", "--window", 4], "its parameters are: --n-local, --n-global"),
        (["distances", "lm-infinite", "--n-local", 4, "--distance-limit", 2, "--distance", "constant"], "needs distance_limit >= n_local"),
        (["distances", "stock", "7"], "unexpected argument '7'"),
        (["distances", "stock", "--png", "picture.svg"], "picture.png"),
        (["distances", "stock", "--png", "/no/such/folder/picture.png"], "create it first"),
        (["distances", "pi", "--factor", 2, "--trained-window", 64], "add --png FILE"),
        (["methods", "--markdown", "/no/such/page.md"], "there is no page"),
    ],
)
def test_bad_arguments(run: Run, arguments: list[object], says: str) -> None:
    refused(run, *arguments, says=says)


def test_an_interrupt_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "read", interrupt)
    found = run("run", "--prompt", "x")
    assert (found.code, found.out, found.err) == (130, "", "interrupted; nothing was kept\n")
    assert run("run", "--prompt", "x", "--json").json == {"error": "interrupted; nothing was kept"}


def test_a_bug_of_ours_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def bug(*_: object) -> str:
        raise AssertionError("ours")

    monkeypatch.setattr(text, "read", bug)
    with pytest.raises(AssertionError, match="ours"):
        run("run", "--prompt", "x", "--json")
    assert json.loads(capsys.readouterr().out) == {"error": "AssertionError: ours"}


# -- methods and their parameters -----------------------------------------------------------------------------------------------


def test_methods_json_round_trips(run: Run) -> None:
    found = run("methods", "--json").json["methods"]
    assert [m["name"] for m in found] == list(registry())
    for entry in found:
        method = registry()[entry["name"]]
        assert set(entry) == {"name", "class", "paper", "recalls", "bounded", "parameters", "doc"}
        assert all(set(p) == {"name", "option", "type", "default", "required", "help"} for p in entry["parameters"])
        assert all(p["help"] and p["option"] == "--" + p["name"].replace("_", "-") for p in entry["parameters"])
        example = next(m for m in METHODS if m.name == entry["name"]).to_json()
        required = {p["name"]: 256 if p["type"] in ("int", "float") else example[p["name"]] for p in entry["parameters"] if p["required"]}
        made = longreach.from_json({"method": entry["name"], **required, **{p["name"]: p["default"] for p in entry["parameters"] if not p["required"]}})
        assert type(made) is method and getattr(longreach, entry["class"]) is method
        assert longreach.from_json(json.loads(json.dumps(made.to_json()))) == made
        assert entry["bounded"] == made.bounded or isinstance(made, longreach.Combined)  # which has no parts to answer for it
    assert {m["name"] for m in found if m["bounded"]} == {"lm-infinite", "streaming-llm"}


def test_a_parameter_may_be_a_method() -> None:
    made = parameters.build("combined", ["--encoding", "yarn --factor 4", "--positions=lm-infinite --n-local 8"])
    assert made == longreach.Combined(longreach.YaRN(4.0), longreach.LMInfinite(8))
    assert brief(made.to_json()) == 'combined --encoding "yarn --factor 4.0" --positions "lm-infinite --n-local 8"'
    assert parameters.build("combined", shlex.split(brief(made.to_json()))[1:]) == made
    with pytest.raises(ValueError, match="yarn needs --factor"):
        parameters.build("combined", ["--encoding", "yarn", "--positions", "stock"])
    with pytest.raises(ValueError, match='pass --encoding "METHOD --parameter VALUE"'):
        parameters.build("combined", ["--positions", "stock"])
    with pytest.raises(ValueError, match="did you mean 'yarn'"):
        parameters.build("combined", ["--encoding", "yarm", "--positions", "stock"])


def test_longrope_lists_are_numbers_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "factors.json"
    path.write_text("[1, 1.5]")
    want = longreach.LongRoPE(2.0, (1.0, 1.5))
    assert parameters.build("longrope", ["--factor", "2", "--long-factor", "1,1.5"]) == want
    assert parameters.build("longrope", ["--factor", "2", "--long-factor", str(path)]) == want
    assert brief(want.to_json()) == "longrope --factor 2.0 --long-factor 1.0,1.5"


def test_frequency_methods_say_that_distances_are_not_all(run: Run) -> None:
    found = run("distances", "pi", "--factor", "2", "--length", "3", "--json")
    assert found.json["distances"] == [[0, None, None], [1, 0, None], [2, 1, 0]]
    assert "changes the frequencies" in found.err


def test_check_measures_a_frequency_method_itself(run: Run) -> None:
    found = run("check", "--method", "dynamic-ntk", "--context", "2048", "--tokens", "60", "--json").json
    assert found["passed"] and found["groups"][1]["method"] == longreach.DynamicNTK().to_json()
    assert found["extension"]["capacity"] == 2048


def test_methods_table(run: Run) -> None:
    out = run("methods").out
    assert all(p.option in out for method in registry().values() for p in parameters.of(method))


def test_no_parameter_hides_behind_an_option_of_a_command() -> None:
    import typer

    group: Any = typer.main.get_command(build())
    for name in ("run", "check", "distances"):
        own = {option for p in group.commands[name].params for option in p.opts}
        assert not own & {p.option for method in registry().values() for p in parameters.of(method)}


def test_a_new_method_needs_nothing_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "registry", lambda: {"fake": Fake})
    made = parameters.build("fake", "--size 3 --ratio=0.5 --no-steps --layers 1,2 --kind b --most none".split())
    assert made == Fake(3, 0.5, False, (1, 2), "b", None)
    assert parameters.build("fake", ["--size", "1", "--steps"]) == Fake(1, steps=True)
    assert [p.type for p in parameters.of(Fake)] == ["int", "float", "bool", "int,...", "a | b", "int or none"]
    with pytest.raises(ValueError, match=r"--steps must be of type bool, not 'maybe'"):
        parameters.build("fake", ["--size", "1", "--steps", "maybe"])


@dataclass(frozen=True)
class Fake(Method):
    size: int = field(metadata={"help": "a size"})
    ratio: float = 1.0
    steps: bool = True
    layers: tuple[int, ...] = ()
    kind: Literal["a", "b"] = "a"
    most: int | None = 4
    name = "fake"

    def layout(self, layer: int = 0) -> Any:
        raise NotImplementedError

    def distances(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


# -- distances: the published matrices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "oracle"),
    [
        ("selfextend --group-size 2 --window 4", SELFEXTEND_2_4),
        ("selfextend --group-size 3 --window 4", SELFEXTEND_3_4),
        ("lm-infinite --n-local 4 --n-global 2", LM_INFINITE_4_2),
        ("lm-infinite --n-local 4 --n-global 2 --distance-limit 4", LM_INFINITE_4_2),
        ("streaming-llm --n-recent 3 --n-sink 2", STREAMING_3_2),
        ("dual-chunk --pretraining-length 7 --chunk-length 4", DUAL_CHUNK_7_4),
        ("block-selfextend --group-size 2 --window 4", BLOCK_SELFEXTEND_2_4),
    ],
)
def test_distances_are_the_oracles(run: Run, arguments: str, oracle: str) -> None:
    found = run("distances", *arguments.split(), "--length", 10)
    assert found.code == 0
    assert [line.split() for line in found.out.splitlines()] == [line.split() for line in oracle.strip().splitlines()]
    data = run("distances", *arguments.split(), "--length", 10, "--json").json
    assert data["length"] == 10
    assert longreach.from_json(data["method"]).name == arguments.split()[0]
    assert data["distances"] == [[None if cell == "." else int(cell) for cell in line.split()] for line in oracle.strip().splitlines()]


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ("selfextend --group-size 3 --window 4 --shift true_division --length 10", ["5.667 5.667 5.667 4.667 4.667 4.667 3 2 1 0"]),
        (
            "selfextend --group-size 3 --window 5 --length 12",
            ["7 7 7 6 6 4 3 2 1 0 . .", "7 7 7 6 6 6 4 3 2 1 0 .", "7 7 7 6 6 6 5 4 3 2 1 0"],
        ),
        ("stock --length 4", ["2 1 0 .", "3 2 1 0"]),
        ("streaming-llm --n-recent 3 --n-sink 2 --counting chunkable --length 10", ["5 4 . . . . . 2 1 0"]),
        ("rerope --window 4 --length 10", ["4 4 4 4 4 4 3 2 1 0"]),
        ("leaky-rerope --window 4 --factor 2 --length 10", ["6.5 6 5.5 5 4.5 4 3 2 1 0"]),
        ("string --shift 3 --local-window 1 --length 9", ["6 5 4 3 2 1 2 1 0"]),
    ],
)
def test_distances_last_rows(run: Run, arguments: str, rows: list[str]) -> None:
    lines = run("distances", *arguments.split()).out.splitlines()
    assert [line.split() for line in lines[-len(rows) :]] == [row.split() for row in rows]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"


@pytest.mark.parametrize(
    ("distance", "expected"),
    [("min", [(4, 3), (5, 4), (6, 5), (7, 6), (7, 7), (7, 7)]), ("constant", [(7, 3), (7, 7), (7, 7), (7, 7), (7, 7), (7, 7)])],
)
def test_distances_lm_infinite_beyond_its_window(run: Run, distance: str, expected: list[tuple[int, int]]) -> None:
    arguments = f"distances lm-infinite --n-local 4 --n-global 2 --distance-limit 7 --distance {distance} --length 10 --json"
    data = run(*arguments.split()).json["distances"]
    assert [tuple(row[:2]) for row in data[4:]] == expected


def test_late_keys_are_mentioned(run: Run) -> None:
    found = run(*"distances lm-infinite --n-local 4 --top-k 2 --length 6".split())
    assert "from layer 4 on" in found.err and len(found.out.splitlines()) == 6
    assert "note" not in run(*"distances lm-infinite --n-local 4 --length 6".split()).err


@pytest.mark.parametrize("length", [1, 12, 80])
def test_picture(run: Run, tmp_path: Path, length: int) -> None:
    file = tmp_path / "matrix.png"
    found = run("distances", "selfextend", "--group-size", 2, "--window", 4, "--length", length, "--png", file, "--json")
    assert found.json["png"] == str(file) and len(found.json["distances"]) == length
    assert file.read_bytes().startswith(b"\x89PNG")


def test_picture_of_a_frequency_method(run: Run, tmp_path: Path) -> None:
    """The distances alone, or the rotary pairs beside them if the trained window is known."""
    width = lambda path: int.from_bytes(path.read_bytes()[16:20], "big")  # noqa: E731
    arguments = ["distances", "yarn", "--factor", 4, "--length", 128]
    assert "pass --trained-window N to draw them too" in run(*arguments, "--png", tmp_path / "one.png").err
    two = run(*arguments, "--trained-window", 32, "--rotary-dims", 16, "--png", tmp_path / "two.png")
    assert "note" not in two.err and width(tmp_path / "two.png") > 1.5 * width(tmp_path / "one.png")


def test_rotary_dims_come_in_pairs(run: Run, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    refused(run, "distances", "pi", "--factor", 2, "--trained-window", 64, "--rotary-dims", 7, "--png", picture, says="must be even, not 7")
    assert not picture.exists()


# -- run ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 bytes, so 201 tokens as plain text."""
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text("".join(f"{i:04d}," for i in range(40)))
    return file


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
    _, made = longreach.load(folders["chat"])
    assert made.decode(text.encode(made, text.Request("some text", "why?", "be brief"))) == rendered
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


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[bytes], None]]:
    opened = []

    def put(data: bytes) -> None:
        (tmp_path / "stdin").write_bytes(data)
        opened.append((tmp_path / "stdin").open())
        monkeypatch.setattr(sys, "stdin", opened[-1])

    yield put
    for stream in opened:
        stream.close()


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
        ("long.txt", b"x" * 101, ["--max-bytes", 100], "longer than 100 bytes"),
    ],
)
def test_bad_files(run: Run, folders: dict[str, str], tmp_path: Path, name: str, data: bytes | None, more: list[object], says: str) -> None:
    file = tmp_path / name
    if data is not None:
        file.write_bytes(data)
    refused(run, "run", "--model", folders["llama"], "--file", file, "--prompt", "x", *more, says=says)


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
    ids, cut = text.shorten(made, text.Request("0123456789", "why?"), 1 + 4 + 2 + 4, side)
    assert made.decode(ids, skip_special_tokens=True) == f"{kept}\n\nwhy?"
    assert (cut.document_tokens, cut.kept_tokens) == (10, 4)


def test_truncation_of_characters_of_several_bytes() -> None:
    """A cut inside a character takes the whole character along, and the result still fits."""
    made = tokenizer()
    for most in range(9, 24):
        ids, _ = text.shorten(made, text.Request("ä€ö" * 5, "why?"), most, "middle")
        assert len(ids) <= most and "\ufffd" not in made.decode(ids)


def test_the_prompt_is_never_cut(run: Run, folders: dict[str, str], book: Path) -> None:
    common = ["run", "--model", folders["llama"], "--file", book, "--truncate", "left"]
    refused(run, *common, "--prompt", "y" * 60, "--max-new-tokens", 10, "--context", 64, says="the prompt alone has 61 tokens")
    refused(run, *common, "--max-new-tokens", 64, "--context", 64, says="leave no room for a prompt")


# -- check ----------------------------------------------------------------------------------------------------------------------


def test_check_passes_on_a_sound_model(run: Run, folders: dict[str, str]) -> None:
    found = run("check", "--model", folders["llama"], "--tokens", 90, "--json")
    data = found.json
    assert found.code == 0 and data["passed"] is True
    assert [row["times"] for row in data["dial"]] == [2, 4, 8, 16, 32]
    assert all((row["method"] is None) == (row["refusal"] is not None) for row in data["dial"])
    for row in data["dial"]:
        assert row["method"] is None or row["capacity"] >= row["context"]
    assert [None if g["method"] is None else g["method"]["method"] for g in data["groups"]] == [None, "selfextend", "lm-infinite"]
    values = [m["value"] for g in data["groups"] for m in g["measurements"]]
    assert len(values) == 3 + 4 + 4 and all(v is not None for v in values)
    assert data["extension"]["trained_window"] == WINDOW


def test_check_in_half_precision(run: Run, folders: dict[str, str]) -> None:
    found = run("check", "--model", folders["bf16"], "--tokens", 90, "--method", "selfextend", "--group-size", 4, "--window", 16)
    assert found.code == 0 and "all gates pass" in found.out and "half precision" in found.out
    assert "selfextend --group-size 4 --window 16" in found.out


def test_check_fails_where_the_fast_path_is_wrong(run: Run, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = longreach.SelfExtend.layout
    monkeypatch.setattr(longreach.SelfExtend, "layout", lambda self, layer=0: right(longreach.SelfExtend(self.group_size, self.window + 1)))
    arguments = ["check", "--model", folders["llama"], "--tokens", 60, "--method", "selfextend", "--group-size", 4, "--window", 16]
    found = run(*arguments, "--json")
    assert found.code == 1 and found.json["passed"] is False
    failed = [m["name"] for g in found.json["groups"] for m in g["measurements"] if not m["passed"]]
    assert failed == ["fast path against the dense truth, 60 tokens"]
    plain = run(*arguments)
    assert plain.code == 1 and "FAIL" in plain.out


def test_check_skips_what_a_method_does_not_promise(run: Run, folders: dict[str, str]) -> None:
    arguments = ["check", "--model", folders["llama"], "--tokens", 60, "--method", "lm-infinite", "--n-local", 16, "--top-k", 2, "--top-k-from-layer", 0]
    found = run(*arguments, "--json")
    skipped = [m["note"] for g in found.json["groups"] for m in g["measurements"] if m["value"] is None]
    assert found.code == 0 and skipped == ["this method depends on how a prompt is cut"] * 2


def test_check_context_decides_what_is_looked_at(run: Run, folders: dict[str, str]) -> None:
    data = run("check", "--model", folders["llama"], "--tokens", 90, "--context", 256, "--json").json
    assert data["extension"]["context"] == 256 and data["groups"][1]["method"] == data["extension"]["method"]
    refused(run, "check", "--model", folders["llama"], "--context", 10**7, says="declare at most")


def test_a_gate_that_is_not_finite_fails() -> None:
    found = measurements.Measurement("x", measurements.difference(torch.tensor([float("nan")]), torch.ones(1)), 1.0)
    assert found.to_json() == {"name": "x", "value": None, "gate": 1.0, "passed": False, "note": "not finite"}


def test_generation_settings_of_a_checkpoint_do_not_decide_the_cache_or_sampling() -> None:
    model = t.LlamaForCausalLM(t.LlamaConfig(**SMALL))
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, cache_implementation="static", num_beams=3)
    config = generation.generation_config(model, tokenizer(), 5, generation.Sampling())
    assert (config.do_sample, config.num_beams, config.cache_implementation, config.max_new_tokens) == (False, 1, None, 5)
    assert config.temperature is None and config.top_p is None and config.top_k is None


def test_a_sentence_is_hidden_between_sentences():
    from longreach.cli.text import Request
    from longreach.evals.samples.haystack import hide

    text = "One is here. Two is here. Three is here. Four is here."
    assert hide(text, "Key.", 0.0) == f"Key. {text}" and hide(text, "Key.", 1.0) == f"{text} Key."
    assert hide(text, "Key.", 0.5) == "One is here. Two is here. Key. Three is here. Four is here."
    assert hide("", "Key.", 0.5) == "Key."
    assert hide("nosentences" * 100, "Key.", 0.5).replace(" Key. ", "") in ("nosentences" * 100, "Key. " + "nosentences" * 100)
    assert Request(text, "What?", hidden=" Key. ", depth=1.0).user == f"{text} Key.\n\nWhat?"
