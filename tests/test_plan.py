"""plan(): rows, bounds, the nearest request, the dial under memory, calibration, the command, the picture."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from io import StringIO
from pathlib import Path

import platformdirs.macos
import platformdirs.unix
import platformdirs.windows
import psutil
import pytest
import torch
import transformers as t
from rich.console import Console

import longreach
from families import BASE, build
from longreach import DualChunk, LMInfinite, SelfExtend, Stock, StreamingLLM, configs
from longreach.checking import speedtest
from longreach.cli import main, parameters
from longreach.cli import plan as plan_command
from longreach.methods import registry
from longreach.planning import calibration, curves, dial, machine, sizing
from longreach.planning.architecture import read
from longreach.planning.hardware import CARDS, Curve
from longreach.planning.memory import Budget, Schedule, kv_bytes

LLAMA_8B = t.LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    max_position_embeddings=8192, dtype="bfloat16",
)  # fmt: skip
GEMMA = t.Gemma2Config(num_hidden_layers=42, hidden_size=3584, num_attention_heads=16, num_key_value_heads=8, head_dim=256, dtype="bfloat16")
MIXTRAL = t.MixtralConfig(dtype="bfloat16", sliding_window=None)
DEEPSEEK = t.DeepseekV3Config(num_hidden_layers=4, dtype="bfloat16")


def plan(config=LLAMA_8B, context=32768, hardware="A100-80", **more):
    return longreach.plan(config, context, hardware, **more)


@pytest.fixture(autouse=True)
def read_once(monkeypatch):
    """Building a large model on the meta device costs more than all the rest of its plan."""
    monkeypatch.setattr(sizing, "read", lambda config, dtype, read=sizing.read: remembered(config, dtype, read))


def remembered(config, dtype, read):
    known = next((name for name, value in globals().items() if value is config), None)
    if known is None:
        return read(config, dtype)
    if (known, dtype) not in KNOWN:
        KNOWN[known, dtype] = read(config, dtype)
    return KNOWN[known, dtype]


KNOWN = {}


# -- rows ---------------------------------------------------------------------------------------------------------------------------


def test_the_weights_of_known_models():
    assert plan().request.architecture.weights.parameters == 8_030_261_248  # Llama 3 8B
    assert plan(MIXTRAL, 1024).request.architecture.weights.parameters == 46_702_792_704  # Mixtral 8x7B


def test_every_method_that_suggests_parameters_has_a_row_and_they_reach():
    found = plan()
    names = {row.method.name for row in found.rows}
    assert {"stock", "selfextend", "lm-infinite", "streaming-llm", "dual-chunk", "rerope", "leaky-rerope", "block-selfextend", "yarn", "pi"} <= names
    window = found.request.window.tokens
    for kind in registry().values():
        suggested = kind.suggest(window, 32768)
        assert suggested is None or suggested.name in names
        if suggested is not None and kind is not Stock:
            assert (suggested.capacity(window) or 1 << 60) >= 32768, suggested
    assert [row.recall for row in found.rows] == sorted((row.recall for row in found.rows), key=sizing.ORDER.index)
    assert found.rows[0].chosen and found.row("selfextend").method == dial.choose(found.request.window, 32768).method


@pytest.mark.parametrize("window", [1, 2, 3, 5, 64, 512, 8192])
def test_suggestions_are_valid_for_any_window(window):
    for kind in registry().values():
        for context in (1, window, window + 1, 4 * window, 20 * window):
            kind.suggest(window, context)  # raises if its parameters are out of range


def test_rows_hold_the_bytes_of_the_store():
    found = plan(context=20_000, new_tokens=100)
    for row in found.rows:
        assert row.kv_bytes == kv_bytes(found.request.architecture, row.method, Schedule.of(row.method, 20_000, 100))
        assert row.kv_bytes == sum(form["bytes"] for form in row.forms)
    stock = found.row("stock")
    assert 19_999 * 131_072 <= stock.kv_bytes <= 1.125 * 19_999 * 131_072  # what is stored, and the room to grow
    assert stock.peak_bytes == CARDS["A100-80"].reserved + 2 * 8_030_261_248 + stock.temporary_bytes + stock.kv_bytes
    assert stock.users == (CARDS["A100-80"].memory - stock.peak_bytes + stock.kv_bytes) // stock.kv_bytes


def test_what_is_recalled():
    found = plan()
    assert found.row("selfextend").recall == "everything"
    assert found.row("stock").recall == "untrained" and "8192" in found.row("stock").remark
    assert found.row("lm-infinite").recall == "recent only" and "last 8192 and the first 10" in found.row("lm-infinite").remark
    assert plan(context=4096).row("stock").recall == "everything"
    assert plan(method=LMInfinite(100, 4), new_tokens=100).rows[0].recall == "fluent only"  # the end of the prompt is gone by the end
    assert plan(method=LMInfinite(100, 4), new_tokens=99).rows[0].recall == "recent only"
    assert plan(method=LMInfinite(100, 4, top_k=5)).rows[0].recall == "what is retrieved"
    assert plan(method=LMInfinite(100, 4), context=104, new_tokens=8).rows[0].recall == "everything"
    # in Gemma 2 half of the layers slide under every method; what the full ones see decides
    assert plan(GEMMA, 8192).row("stock").recall == "everything"


def test_grouped_latent_sliding_and_expert_models():
    def term(found, name):
        return next(x.value for x in found.terms if x.name == name)

    llama, gemma, mixtral, deepseek = (plan(c, 8192, "H200", method=Stock()) for c in (LLAMA_8B, GEMMA, MIXTRAL, DEEPSEEK))
    assert term(llama, "KV per token") == 2 * 32 * 8 * 128 * 2
    assert term(gemma, "KV per token") == 2 * 42 * 8 * 256 * 2
    assert term(gemma, "KV of one user") == 2 * 21 * 8 * 256 * 2 * (8192 + 4096)  # every other layer slides over 4096
    assert gemma.rows[0].kv_bytes < 2 * 42 * 8 * 256 * 2 * 8192
    assert term(mixtral, "distinct experts") == pytest.approx(2) and mixtral.possible  # 93 GB of weights on 141
    assert not plan(MIXTRAL, 8192, "A100-80", method=Stock()).possible
    assert term(deepseek, "KV per token, latent") == 4 * (512 + 64) * 2
    assert term(deepseek, "KV per token") == 4 * 128 * (192 + 128) * 2
    assert all(x.formula and x.unit for x in deepseek.terms)


def test_more_of_anything_never_costs_less():
    found = [plan(context=n).row("selfextend") for n in (16_384, 32_768, 65_536, 131_072)]
    for attribute in ("kv_bytes", "peak_bytes", "prefill_seconds", "token_seconds"):
        values = [getattr(row, attribute) for row in found]
        assert values == sorted(values)
    few, many = plan(concurrency=1).row("selfextend"), plan(concurrency=4).row("selfextend")
    assert many.token_seconds > few.token_seconds and many.peak_bytes - few.peak_bytes == 3 * few.kv_bytes
    bounded = {plan(context=n).row("lm-infinite").kv_bytes for n in (16_384, 131_072)}
    assert len(bounded) == 1


def test_the_bound_that_binds():
    assert plan(new_tokens=1).row("selfextend").bound == "compute"
    assert plan(context=16_384, hardware="L4", new_tokens=4000).row("selfextend").bound == "memory bandwidth"
    assert plan(context=131_072, hardware="RTX4090").row("selfextend").bound == "capacity"
    slow = replace(CARDS["A100-80"], link=1e9)
    waiting = plan(context=65_536, hardware=slow, concurrency=50, new_tokens=8).row("selfextend")
    assert not waiting.fits and 0 < waiting.users < 50 and waiting.bound == "host link"
    tight = plan(context=65_536, hardware=replace(slow, host_memory=3 * waiting.kv_bytes), concurrency=50, new_tokens=8)
    assert any(f"3 of the {50 - waiting.users} users" in note for note in tight.notes)
    assert waiting.switch_seconds == pytest.approx(2 * waiting.kv_bytes / (1e9 * 0.8))
    assert plan("nano", 1024).row("selfextend").bound == "overhead"


def test_the_command_is_one_that_run_takes():
    for row in plan(context=16_384).rows:
        words = shlex.split(row.command)
        name = words[words.index("--method") + 1]
        between = words[words.index("--method") + 2 : words.index("--dtype")]
        assert parameters.build(name, between) == row.method
    row = plan(method=longreach.Combined(longreach.YaRN(4.0), LMInfinite(512)), trained_window=4096, chunk_size=64).rows[0]
    words = shlex.split(row.command)
    assert words[words.index("--encoding") + 1] == "yarn --factor 4.0" and "--trained-window 4096 --chunk-size 64" in row.command


# -- requests that cannot be met --------------------------------------------------------------------------------------------------------


def test_the_nearest_requests():
    found = plan(context=131_072, hardware="RTX4090")
    assert found.possible and not found.row("selfextend").fits  # what is bounded fits, and forgets
    changes = " | ".join(a.change for a in found.nearest)
    assert "A100-40" in changes and "LMInfinite" in changes  # SirLLM scores every token by its logits, and takes longer
    reach = int(changes.split("a context of ")[1].split()[0])
    assert plan(context=reach, hardware="RTX4090").row("selfextend").fits
    assert not plan(context=reach + 600, hardware="RTX4090").row("selfextend").fits
    assert f"--context {reach} " in next(a.command for a in found.nearest if str(reach) in a.change)
    assert plan().nearest == ()


def test_the_nearest_in_users_and_bits():
    found = plan(context=32_768, concurrency=1000)
    users = found.row("selfextend").users
    assert any(a.change.startswith(f"{users} of 1000 users") for a in found.nearest)
    assert plan(context=32_768, concurrency=users).row("selfextend").fits and not plan(context=32_768, concurrency=users + 1).row("selfextend").fits
    wide = plan(context=16_384, hardware="RTX4090", dtype="float32")
    assert not wide.possible and any("bfloat16" in a.change for a in wide.nearest)
    assert any("A100-40" in a.change for a in wide.nearest)


def test_weights_that_fit_nowhere_and_lengths_beyond_every_rule():
    huge = t.LlamaConfig(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8, vocab_size=128256)
    found = plan(huge, 8192, "H200", dtype="bfloat16", method=Stock(), trained_window=8192)
    assert not found.possible and "weights alone" in found.nearest[-1].change and found.rows[0].users == 0
    far = plan(context=8192 * 100)
    assert any("SelfExtend reaches" in note for note in far.notes) and far.row("rerope").recall == "everything"
    given = plan(context=100_000, hardware="H200", method=SelfExtend(4, 1024))
    assert given.rows[0].recall == "untrained" and not given.possible
    reach = SelfExtend(4, 1024).capacity(8192)
    assert given.nearest[0].change.startswith(f"{reach} tokens") and f"--context {reach} " in given.nearest[0].command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(context=None), "pass context=N"),
        (dict(context=100, new_tokens=100), "at least 101"),
        (dict(context=100, new_tokens=0), "new_tokens must be"),
        (dict(context=1000, concurrency=True), "concurrency must be"),
        (dict(context=1000, dtype="int3"), "unknown dtype"),
        (dict(context=1000, config="absent/config.json"), "cannot read"),
        (dict(context=1000, config={"hidden_size": 3}), "model_type"),
        (dict(context=1000, config={"model_type": "no-such"}), "no configuration that Transformers knows"),
        (dict(context=1000, model=7), "is not a model"),
        (dict(context=1000, model="./no-such-folder"), "there is no folder"),
    ],
    ids=range(10),
)
def test_nonsense_is_refused_with_a_sentence(arguments, says):
    with pytest.raises(ValueError, match=says):
        longreach.plan(**{"hardware": "A100-80", **arguments})


def test_wrappers_and_quantised_checkpoints_are_told_about():
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    wrapper = t.Gemma3Config(text_config={**BASE, "head_dim": 16, "sliding_window": 24}, vision_config=vision, mm_tokens_per_image=4)
    assert any("only its text model" in note for note in plan(wrapper, 60, new_tokens=8).notes)
    quantised = t.LlamaConfig(**BASE)
    quantised.quantization_config = {"quant_method": "gptq", "bits": 4}
    found = plan(quantised, 60, new_tokens=8)
    assert any("quantised" in n for n in found.notes) and found.request.architecture.weights.nbytes == 4 * found.request.architecture.weights.parameters
    assert quantised.quantization_config  # the caller's configuration is left alone


# -- the dial -----------------------------------------------------------------------------------------------------------------------


def budget(free):
    return Budget(read(t.LlamaConfig(**{**BASE, "max_position_embeddings": 512, "num_key_value_heads": 2})), free)


def test_the_dial_looks_at_memory_where_it_binds():
    window = configs.Window(512, "test")
    plain = dial.choose(window, 8192)
    plenty, need = budget(1 << 40), budget(0).needs(plain.method, 8192)
    assert dial.choose(window, 8192, plenty) == plain == dial.choose(window, 8192, budget(need))
    smaller = dial.choose(window, 8192, budget(budget(0).needs(DualChunk(512), 8192)))
    assert smaller.method == DualChunk(512) and "memory binds" in smaller.warning and "a context of at most" in smaller.warning
    recent = dial.choose(window, 8192, budget(need // 2))
    assert recent.method == LMInfinite(512) and "the last n_local tokens" in recent.warning
    reach = int(recent.warning.split("at most ")[1].split()[0])
    assert isinstance(dial.choose(window, reach, budget(need // 2)).method, SelfExtend)
    with pytest.raises(ValueError, match=r"memory binds.*bfloat16 or on a device with more memory"):
        dial.choose(window, 8192, budget(1000))


def test_extend_warns_when_memory_chose(monkeypatch):
    model = build("llama")
    need = dial.budget(model.config, torch.float32, torch.device("cpu")).needs(dial.choose(configs.Window(64, ""), 1000).method, 1000)
    monkeypatch.setattr(dial, "free_memory", lambda device: need - 1)
    with pytest.warns(UserWarning, match="memory binds"), longreach.extend(model, context=1000) as extension:
        assert isinstance(extension.method, LMInfinite) and "memory" not in extension.method.recalls
    monkeypatch.setattr(dial, "free_memory", lambda device: None)
    with longreach.extend(model, context=1000) as extension:
        assert isinstance(extension.method, SelfExtend)


def test_free_memory_is_a_part_of_all():
    free = machine.free_memory(torch.device("cpu"))
    assert free is None or 0 < free <= machine.total_memory()
    assert 1 << 20 < machine.resident_memory() <= 1.05 * machine.peak_memory()


# -- calibration --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A calibration with the real code on small sizes: its numbers mean nothing."""
    monkeypatch.setattr(speedtest, "MATRICES", ((16, 32), (64, 64)))
    monkeypatch.setattr(speedtest, "POOL", 1 << 16)
    monkeypatch.setattr(speedtest, "ROWS", 32)
    monkeypatch.setattr(speedtest, "HEADS", (64,))
    monkeypatch.setattr(speedtest, "OVERHEAD_LAYERS", (1, 2))
    monkeypatch.setattr(speedtest, "FEW", 2)
    monkeypatch.setattr(speedtest, "MANY", 4)
    monkeypatch.setattr(speedtest, "token_seconds", lambda model, method, measure=speedtest.token_seconds: measure(model, method, 1))
    monkeypatch.setattr(speedtest, "seconds", lambda run, device, measure=speedtest.seconds: measure(run, device, 0.0))
    path = tmp_path / "deep" / "calibration.json"
    return speedtest.calibrate("cpu", path=path), path


def test_calibration_round_trips_and_knows_its_machine(measured, monkeypatch):
    made, path = measured
    assert calibration.hardware("cpu", path) == made and [p.name for p in path.parent.iterdir()] == ["calibration.json"]
    assert set(made.measured) == {"float32", "bfloat16"} and made.memory == machine.total_memory()
    for speeds in made.measured.values():
        assert min(speeds.gemm(1), speeds.gemv(1), speeds.attention(64), speeds.keys, speeds.elementwise, speeds.link) > 0
        assert isinstance(speeds.gemm, Curve) and speeds.forward_seconds >= 0 <= speeds.layer_seconds
    found = longreach.plan("nano", 2048, "cpu", calibration=path)
    assert found.row("selfextend").fits and found.to_json()["speeds"] == "measured"
    with pytest.raises(ValueError, match="measured in float32 and bfloat16 only"):
        longreach.plan("nano", 2048, "cpu", calibration=path, dtype="float16")
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    with pytest.raises(ValueError, match=r"measured with torch .* and now has 0.0.1; run longreach plan --calibrate"):
        calibration.hardware("cpu", path)


def test_no_calibration_and_broken_ones(tmp_path):
    with pytest.raises(ValueError, match="was not measured yet; run longreach plan --calibrate once"):
        calibration.hardware("cpu", tmp_path / "absent.json")
    for text in ("{", "[]", '{"version": 99}'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(ValueError, match="longreach plan --calibrate"):
            calibration.hardware("cpu", tmp_path / "broken.json")


def test_the_cache_folder_follows_the_platform(monkeypatch, tmp_path):
    """The same folders as ever, so that a calibration is found again."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("platformdirs.PlatformDirs", platformdirs.unix.Unix)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "given"))
    assert machine.cache_folder() == tmp_path / "given" / "longreach"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert machine.cache_folder() == tmp_path / ".cache" / "longreach"
    monkeypatch.setattr("platformdirs.PlatformDirs", platformdirs.macos.MacOS)
    assert machine.cache_folder() == tmp_path / "Library" / "Caches" / "longreach"
    monkeypatch.setattr("platformdirs.PlatformDirs", platformdirs.windows.Windows)
    monkeypatch.setattr("platformdirs.windows.get_win_folder", lambda name: {"CSIDL_LOCAL_APPDATA": str(tmp_path / "local")}[name])
    assert machine.cache_folder() == tmp_path / "local" / "longreach"


def test_memory_is_that_of_the_container(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "GROUP", tmp_path)
    whole, free = machine.total_memory(), machine.free_memory(torch.device("cpu"))
    assert whole == psutil.virtual_memory().total and abs(free - psutil.virtual_memory().available) < 1 << 30  # no container
    for name, text in (("memory.max", "1000000"), ("memory.current", "700000"), ("memory.stat", "anon 5\ninactive_file 200000\n")):
        (tmp_path / name).write_text(text)
    assert machine.total_memory() == 1_000_000 and machine.free_memory(torch.device("cpu")) == 500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.total_memory() == whole
    assert machine.free_memory(torch.device("meta")) is None


# -- the command and the picture ----------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    capsys.readouterr()
    code = main(["plan", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_the_command(capsys, tmp_path):
    png, config = tmp_path / "cost.png", tmp_path / "config.json"
    config.write_text(json.dumps({**LLAMA_8B.to_dict(), "dtype": "bfloat16"}))
    code, out, err = run(capsys, "--config", config, "--context", 65536, "--hardware", "RTX4090", "--png", png, "--json")
    found = json.loads(out)
    assert code == 0 and out.count("\n") == 1 and png.stat().st_size > 10_000 and "wrote" in err
    assert found["weights"]["parameters"] == 8_030_261_248 and found["possible"] and found["terms"][0]["name"] == "weights"
    by_name = {row["method"]["method"]: row for row in found["methods"]}
    assert by_name["lm-infinite"]["fits"] and by_name["stock"]["recall"] == "untrained" and by_name["selfextend"]["chosen"]
    code, out, _ = run(capsys, "--config", config, "--context", 200_000, "--hardware", "RTX4090", "--method", "dual-chunk", "--pretraining-length", 8192)
    assert code == 1 and "nearest requests" in out and "dual-chunk --pretraining-length 8192" in out and "context switch" in out
    assert run(capsys, "--context", 1000, "--hardware", "RTX4080")[0] == 2
    assert "pass --context N" in run(capsys, "--hardware", "H200")[2]


@pytest.mark.parametrize("users", [1, 3000])  # the second row says how many fit, and memory bandwidth binds
def test_the_table_breaks_no_word_in_80_columns(users):
    console = Console(width=80, file=StringIO())
    console.print(plan_command.method_table(longreach.plan("nano", 8192, "L4", concurrency=users)))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    cells = {"everything", "recent", "overhead" if users == 1 else "bandwidth", "ms/token", "block-selfextend"}
    assert cells <= set(text.split())


def test_curves_cover_the_request():
    found = plan(context=16_384)
    lengths = curves.lengths_around(16_384, 128)
    assert lengths == sorted(lengths) and 16_384 in lengths and lengths[0] >= 129 and lengths[-1] == 4 * 16_384
    rows = curves.curves(found, [1000, 16_384])
    assert rows["selfextend"].keys() == {16_384} and rows["stock"].keys() == {1000, 16_384}  # the dial takes stock inside the window
    assert rows["lm-infinite"][16_384] == found.row("lm-infinite")
    assert curves.curves(found, [1000], StreamingLLM(100)).keys() == {"streaming-llm"}


def test_the_page_lists_the_cards_as_they_are():
    page = (Path(__file__).resolve().parent.parent / "docs" / "plan.md").read_text(encoding="utf-8")
    listed = page.split("<!-- begin cards -->\n")[1].split("<!-- end cards -->")[0].splitlines()
    assert listed == [
        f"| {c.name} | {c.memory / 1e9:g} GB | {c.peak('bfloat16') / 1e12:g} TFLOP/s | {c.bandwidth / 1e9:g} GB/s | {c.link / 1e9:g} GB/s | {c.source} |"
        for c in CARDS.values()
    ]
