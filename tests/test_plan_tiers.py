"""Plans over tiers are what the tiers then do; the dial offers what reads less of them, with what that costs in recall; the cost model knows turns."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as t

import longreach
from families import BASE, WINDOW, build, tokens
from longreach import Combined, DualChunk, InfiniteHiP, InfLLM, LMInfinite, LongHeads, Quest, ReRoPE, SelfExtend, SirLLM, Stock, Tiered, YaRN, configs
from longreach.cli import main, parameters
from longreach.engine.batch import Batch
from longreach.hf.cache import cache_bytes
from longreach.methods.base import UNMEASURED, Method
from longreach.planning import dial, needs, offers, tiers, timing
from longreach.planning.architecture import read
from longreach.planning.hardware import CARDS
from longreach.planning.memory import Schedule, kv_bytes, temporary_bytes
from longreach.running.reading import stream

LLAMA_8B = t.LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
    max_position_embeddings=8192, dtype="bfloat16",
)  # fmt: skip
NANO = configs.Window(512, "test")
STATIC = [SelfExtend(16, 32), ReRoPE(32), YaRN(16.0), DualChunk(24), LMInfinite(32)]
CHOOSING = [
    Combined(YaRN(16.0), Quest(64, 16, 0)), Combined(YaRN(16.0), Quest(64, 16, 1)), InfLLM(32, 4, 16, 2, repr_topk=2, exc_block_size=16),
    LongHeads(48, chunk=16, together=16), LMInfinite(9, 3, top_k=2, top_k_from_layer=1, top_k_rows="all"),
    InfiniteHiP(48, 16, 32, (16, 8), (128,), (4, 1), 16, (8, 8), 0), InfiniteHiP(16, 0, 8, (32, 8, 1), (512, 256), (1, 1, 1), 16, (1, 1, 1), 0),
]  # fmt: skip


def done(method: Method, schedule: Schedule, memory: Tiered) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Bytes of blocks by tier after the schedule, and those that one more token and the prompt have brought from every tier."""
    model = build("llama")
    with longreach.extend(model, method, memory=memory) as extension, torch.no_grad():
        cache, ids = t.DynamicCache(), tokens(1, schedule.stored + 1)

        def of(name: str) -> dict[str, int]:
            return {tier: found[name] for tier, found in extension.report()["memory"]["tiers"].items()}

        for start, new in schedule.reads():
            model(ids[:, start : start + new], past_key_values=cache)
        prompt = of("fetched")
        for start in range(schedule.prompt, schedule.stored):
            model(ids[:, start : start + 1], past_key_values=cache)
        held, before = of("bytes"), of("fetched")
        model(ids[:, schedule.stored :], past_key_values=cache)
        after = of("fetched")
        size = next((kind.nbytes for kind in extension.forward.memory.pool.kinds), 0)  # keys and values are of one width here
    return held, {name: size * (after[name] - before[name]) for name in after}, {name: size * prompt[name] for name in prompt}


@pytest.mark.parametrize("method", STATIC, ids=str)
def test_what_lies_where_and_what_moves_is_exact(method, tmp_path):
    schedule = Schedule.of(method, 1000, 3, 200)
    for memory in (Tiered("80KiB", host="32KiB", disk=f"{tmp_path}:4MiB"), Tiered("1MiB", host="1MiB")):
        found = tiers.spread(read(build("llama").config, torch.float32), method, schedule, memory)
        held, token, prompt = done(method, schedule, memory)
        assert found.held == held and found.fits() and not found.at_most and sum(held.values()) == found.blocks
        for name in ("host", "disk"):
            assert (found.token.get(name, 0), found.prefill.get(name, 0)) == (token.get(name, 0), prompt.get(name, 0))
        assert found.moved == sum(token.values()) - token["device"]


@pytest.mark.parametrize("method", CHOOSING, ids=str)
def test_what_a_choice_brings_is_at_most_what_is_said(method, tmp_path):
    schedule = Schedule.of(method, 1000, 3, 200)
    for memory in (Tiered("80KiB", host="32KiB", disk=f"{tmp_path}:4MiB"), Tiered("1MiB", host="1MiB")):
        found = tiers.spread(read(build("llama").config, torch.float32), method, schedule, memory)
        held, token, prompt = done(method, schedule, memory)
        assert found.at_most and found.held["device"] == held["device"] and sum(found.held.values()) == found.blocks <= sum(held.values())  # copies lie lower
        assert found.moved >= sum(token.values()) - token["device"] and sum(found.prefill.values()) >= sum(prompt.values()) - prompt["device"]
    assert found.moved == 0 == sum(found.prefill.values())  # where all is on the device nothing moves


def test_blocks_that_have_no_room_are_missing():
    """27 blocks are sealed at the end, of four kinds of buffers; three users have three times as many."""
    method, architecture = YaRN(64.0), read(build("llama").config, torch.float32)
    schedule, memory = Schedule.of(method, 3600, 3), Tiered("80KiB", host="32KiB")
    one = tiers.spread(architecture, method, schedule, memory)
    assert one.blocks == 27 * 4 * 128 * 2 * 8 * 4 and one.missing == one.blocks - 104 * 1024 and not one.fits()  # one slot of 8 KiB stays free
    assert tiers.spread(architecture, method, schedule, memory, 3).missing == 3 * one.blocks - 104 * 1024
    assert tiers.spread(architecture, method, schedule, Tiered("112KiB")).missing == one.blocks - 112 * 1024  # nothing moves


def planned(context: int = 262_144, hardware: Any = "RTX4090", **more: Any) -> Any:
    return longreach.plan(LLAMA_8B, context, hardware, **more)


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Tiered:
    return Tiered(device="2GiB", host="16GiB", disk=f"{tmp_path_factory.mktemp('spill')}:64GiB")


def test_a_plan_has_rows_by_tier_with_the_traffic_and_the_bound(memory, tmp_path):
    found, without = planned(memory=memory), planned()
    static, chooses, bounded = found.row("selfextend"), found.row("infllm"), found.row("lm-infinite")
    assert static.fits and not without.row("selfextend").fits and without.row("selfextend").tiers is None
    assert static.tiers.held == pytest.approx({"device": 2 << 30, "host": 16 << 30, "disk": static.tiers.blocks - (18 << 30)}, rel=1e-3)
    read_of = {name: static.tiers.held[name] * (262_144 - static.method.window) / 262_144 for name in ("host", "disk")}  # near keys are a form of their own
    assert static.tiers.token == pytest.approx(read_of, rel=1e-2)
    link, disk = static.tiers.token["host"] / (32e9 * 0.8), static.tiers.token["disk"] / 2e9
    assert (static.moved.link, static.moved.disk, static.bound) == (pytest.approx(link), pytest.approx(disk), "disk")
    assert static.token_seconds == pytest.approx(timing.decode(
        found.request.architecture, static.method, Schedule.of(static.method, 262_144, 128), found.request.hardware.speeds("bfloat16")
    ).total + link + disk)  # fmt: skip
    assert chooses.recall == "what is retrieved" and "8 of 16 far pass keys" in chooses.remark and 0 < chooses.tiers.moved < static.tiers.moved / 20
    assert chooses.token_seconds < static.token_seconds / 10 and (bounded.tiers.blocks, bounded.tiers.moved, bounded.moved.total) == (0, 0, 0)
    assert found.row("combined").method == Combined(YaRN(32.0), Quest()) and found.row("combined").recall == "what is retrieved"
    data = json.loads(json.dumps(found.to_json()))
    row = next(row for row in data["methods"] if row["method"]["method"] == "infllm")
    assert data["memory"] == memory.budgets and row["tiers"]["token"] == chooses.tiers.token and row["tiers"]["moved"] == chooses.tiers.moved
    assert row["moved"]["bound"] == "disk" and f"--memory {memory}" in static.command
    words = shlex.split(static.command)
    assert parameters.build("selfextend", words[words.index("selfextend") + 1 : words.index("--dtype")]) == static.method


WHY = [(InfLLM(4096), "device=16MiB,host=64GiB", "the index of all users takes"), (SelfExtend(64, 1024), "device=1GiB", r"[0-9.]+GiB of blocks")]


@pytest.mark.parametrize(("method", "given", "why"), WHY, ids=["index", "blocks"])
def test_the_command_says_why_a_method_does_not_fit(capsys, tmp_path, method, given, why):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B.to_dict()))
    options = ["plan", "--config", tmp_path / "config.json", "--context", "64k", "--hardware", "RTX4090", "--memory", given]
    assert main([str(option) for option in [*options, "--method", *method.options()]]) == 1
    assert re.search(f"it does not fit: {why}", capsys.readouterr().out)


def test_tiers_are_of_all_users_together(memory):
    """Of 32 GiB each, the tiers hold those of two; a third has no room anywhere, however large the device is."""
    two, three = (planned(memory=memory, concurrency=n, method=YaRN(32.0)).rows[0] for n in (2, 3))
    assert (two.users, two.fits, three.users, three.fits, three.bound) == (2, True, 2, False, "disk")
    assert two.tiers.held["device"] == pytest.approx(2**30, rel=1e-3) and two.tiers.moved == two.tiers.blocks - 2**30  # each has half of what is on the device
    small = replace(CARDS["RTX4090"], memory=17 * 2**30)
    assert not planned(memory=memory, hardware=small, method=YaRN(32.0)).rows[0].users  # the device's own budget counts there
    with pytest.raises(ValueError, match="host=16GiB is more than the 8GiB of the host; pass a smaller budget"):
        planned(memory=memory, hardware=replace(small, host_memory=8 << 30))


def test_a_file_says_how_fast_its_disk_is(tmp_path, memory):
    file = tmp_path / "mine.toml"
    file.write_text('memory = "24 GiB"\nflops = 165e12\nmemory_bandwidth = "1008 GB/s"\nhost_link = "32 GB/s"\ndisk = "4 GB/s"\n')
    slow, fast = (planned(memory=memory, hardware=str(name), method=YaRN(32.0)).rows[0] for name in ("RTX4090", file))
    assert fast.moved.disk == pytest.approx(slow.moved.disk / 2) and fast.moved.link == slow.moved.link
    cpu = replace(CARDS["RTX4090"], device="cpu", memory=100 << 30)
    assert planned(memory=memory, hardware=cpu, method=YaRN(32.0)).rows[0].moved.link == 0  # the host's memory is its own


def test_the_command_shows_what_lies_where(capsys, memory, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B.to_dict()))
    options = ["plan", "--config", tmp_path / "config.json", "--context", "256k", "--hardware", "RTX4090", "--memory", memory]
    options += ["--method", "infllm", "--n-local", 4096]
    assert main([str(option) for option in options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "a token brings" in shown and "at most 576.0 MiB" in shown and "how long that takes by bandwidth" in shown


# -- the dial -----------------------------------------------------------------------------------------------------------------------


def of_nano(free: int, memory: Tiered) -> tiers.InTiers:
    return tiers.InTiers(read(t.LlamaConfig(**{**BASE, "max_position_embeddings": 512, "num_key_value_heads": 2}), torch.float32), free, memory, True)


def test_the_dial_offers_what_brings_less_and_says_what_it_costs():
    """What recalls everything stays the choice."""
    memory = Tiered("2MiB", host="1GiB")
    found = dial.choose(NANO, 65_536 // 4, of_nano(1 << 40, memory))
    plain = dial.choose(NANO, 65_536 // 4)
    assert found.method == plain.method and found.warning is None and isinstance(found.method, SelfExtend)
    assert "every token brings" in found.offer and "InfLLM(" in found.offer and "none of 8 at 32, where SelfExtend found all" in found.offer
    words = shlex.split(found.offer[found.offer.rindex("(--method") + 1 : -1])
    assert parameters.build(words[1], words[2:]) == InfLLM.recommended(512, 16_384)
    assert dial.choose(NANO, 16_384, of_nano(1 << 40, Tiered("1GiB", host="1GiB"))).offer is None  # nothing moves
    assert plain.offer is None and dial.choose(NANO, 500, of_nano(1 << 40, memory)).offer is None


def test_the_cheapest_is_offered_if_it_halves_what_moves():
    budget = of_nano(1 << 40, Tiered("2MiB", host="1GiB"))
    methods = [method for method in offers.known(512, 16_384) if budget.fits(method, 16_384)]
    every = {method: budget.spread(method, 16_384).moved for method in methods if not isinstance(method, LongHeads)}  # whose prompt would take too long
    assert {Combined, InfLLM, LongHeads} <= {type(method) for method in methods}
    least = min(every.values())
    cheapest = offers.cheapest(budget, 512, 16_384, 2 * least)
    assert every[cheapest.method] == cheapest.moved == least
    assert offers.cheapest(budget, 512, 16_384, 2 * least - 1) is None is offers.cheapest(budget, 512, 16_384, 0)


def test_tiers_that_are_full_bind():
    small = dial.choose(NANO, 16_384, of_nano(1 << 40, Tiered("64KiB", host="64KiB")))
    assert small.method == LMInfinite(512) and "for which the tiers (device=64KiB,host=64KiB) have no room" in small.warning
    assert "to remember everything, pass tiers that hold" in small.warning
    with pytest.raises(ValueError, match=r"no method that keeps less fits either.*to remember everything"):
        dial.choose(NANO, 16_384, of_nano(1000, Tiered("64KiB", host="64KiB")))


@pytest.mark.parametrize(("device", "host", "context"), [("150KiB", "", 1000), ("64KiB", "host=160KiB", 1050), ("40KiB", "host=88KiB", 700)])
@pytest.mark.filterwarnings("ignore:memory binds", "ignore:context")
def test_what_the_warning_says_can_be_read_to_the_last_token(device, host, context):
    """With real tiers: the largest context that it names, no token more, and the tiers that it asks for, however they are divided."""

    def tried(context: int, memory: Tiered) -> str | None:
        with longreach.extend(model, context=context, memory=memory) as extension:
            if isinstance(extension.method, SelfExtend):
                list(stream(extension, tokens(1, context)[0], chunk_size=128, losses=False))
        return extension.choice.warning if "memory binds" in (extension.choice.warning or "") else None

    model, given = build("llama"), Tiered.parse(f"device={device}" + (f",{host}" if host else ""))
    said = tried(context, given)
    most, enough = re.search(r"at most (\d+) fits.* tiers that hold ([0-9.]+)KiB together", said).groups()
    assert tried(int(most), given) is None is not tried(int(most) + 1, given)
    refused = dial.by_length(configs.Window(WINDOW, "test"), int(most) + 1).method
    with longreach.extend(model, refused, memory=given) as extension, pytest.raises(ValueError, match="no room left"):
        list(stream(extension, tokens(1, int(most) + 1)[0], chunk_size=128, losses=False))
    whole = int(float(enough) * 1024)
    for part in (0, 64 * 1024, whole // 2, whole - 64 * 1024):
        assert tried(context, Tiered(whole - part, host=part or None)) is None


BY_HAND = [
    (InfLLM(32, 4, 16, 2, repr_topk=8, exc_block_size=16), "device=48KiB,host=4MiB", "an index of"),
    (SelfExtend(40, 20), "device=96KiB,host=96KiB", "have no room"),
]


@pytest.mark.parametrize(("method", "given", "says"), BY_HAND, ids=["index", "blocks"])
def test_a_method_by_hand_is_told_what_its_tiers_cannot_keep(method, given, says):
    """Before anything is read; up to what the warning names it is read, and the tiers that it asks for hold all."""
    model, context = build("llama"), 1040

    def read_with(memory: Tiered, count: int, declared: int) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            with longreach.extend(model, method, context=declared, memory=memory) as extension:
                list(stream(extension, tokens(1, count)[0], chunk_size=128, losses=False))
        return [str(one.message) for one in found if "pass tiers that hold" in str(one.message)]

    with pytest.raises(ValueError, match="what the method's index keeps would take" if "index" in says else "no room left"):
        read_with(Tiered.parse(given), context, context)
    with pytest.warns(UserWarning, match=says):
        longreach.extend(model, method, context=context, memory=Tiered.parse(given)).remove()
    (said,) = read_with(Tiered.parse(given), 10, context)
    most, enough, device = re.search(r"at most (\d+) tokens can.* hold ([0-9.]+)KiB together(?:, of which the device at least ([0-9.]+)KiB)?", said).groups()
    assert read_with(Tiered.parse(given), int(most), int(most)) == []
    least = f"device={device or 64}KiB,host={float(enough) - float(device or 64):g}KiB"
    assert read_with(Tiered.parse(least), context, context) == []


def test_where_memory_binds_tiers_are_offered():
    budget = dial.Budget(of_nano(0, Tiered("64KiB")).architecture, 0)
    need = budget.needs(dial.choose(NANO, 8192).method, 8192)
    found = dial.choose(NANO, 8192, replace(budget, free=need // 2))
    assert found.method == LMInfinite(512) and "to remember everything, keep its 0.00 GiB in tiers: memory=Tiered(" in found.warning


def test_extend_asks_the_tiers_it_is_given(monkeypatch):
    """Memory that would bind without tiers does not with them, and the offer is part of the report."""
    model = build("llama")
    monkeypatch.setattr(dial, "free_memory", lambda device: 4 << 20)
    with longreach.extend(model, context=1000, memory=Tiered("48KiB", host="1MiB", staging="64KiB")) as extension:
        assert isinstance(extension.method, SelfExtend) and extension.report()["offer"] == extension.choice.offer
        assert extension.choice.offer is None or extension.choice.offer in extension.describe()


def test_beyond_every_group_size_what_keeps_everything_is_named_with_its_recall():
    with pytest.raises(ValueError, match="SelfExtend reaches 28736") as refusal:
        dial.choose(NANO, 65_536)
    for kind in (InfLLM, InfiniteHiP):
        command, evidence = re.search(rf"{kind.__name__} \(--method ([^;]*); ([^)]*)\)", str(refusal.value)).groups()
        name, *options = shlex.split(command)
        method = parameters.build(name, options)
        assert method == kind.recommended(512, 65_536) and method.capacity(512) is None and evidence == method.evidence and "32" in evidence
    with pytest.raises(ValueError, match="only the last 1 tokens"):
        dial.choose(configs.Window(1, "test"), 65_536)


def test_every_method_that_chooses_says_what_it_was_measured_to_find():
    """Whoever adds one states it beside the method; what was not measured is said too."""
    for method in offers.known(512, 4096):
        assert method.known == f"{method.sees}; {method.evidence or UNMEASURED}"
    assert all("on nano" in method.evidence for method in (Quest(), InfLLM(256), LongHeads(256, chunk=32), InfiniteHiP()))
    assert not InfLLM(256, heads="head").evidence and not InfLLM(256, relevance="max").evidence
    assert "12 of 12 far pass keys at 32 windows of filler" in InfLLM(256, heads="head", relevance="max").known
    assert LMInfinite(9, top_k=2).known.endswith(UNMEASURED) and Stock().known == Stock().sees
    assert offers.retrieving(Quest, 512, 500) == Quest() and offers.retrieving(Quest, 512, 4096) == Combined(YaRN(8.0), Quest())
    assert offers.retrieving(SelfExtend, 512, 4096) is None is offers.retrieving(Combined, 512, 4096)


# -- turns ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SirLLM(70, 2, 8), SirLLM(40), SirLLM(300)], ids=str)
@pytest.mark.parametrize("count", [60, 420])
@pytest.mark.filterwarnings("ignore:a sequence of")
@torch.no_grad()
def test_turns_are_those_that_are_read(method, count):
    """The places in the cache at which every forward begins, and the bytes at the end."""
    model, schedule, found = build("llama"), Schedule.of(method, count, 45, 16), []
    real = Batch.of

    def batch(*args: Any) -> Batch:
        found.append((made := real(*args)).groups[0].start)
        return made

    with longreach.extend(model, method) as extension, mock.patch.object(Batch, "of", batch):
        cache, ids = t.DynamicCache(), tokens(1, count)[0]
        list(stream(extension, ids[: schedule.prompt - 1], chunk_size=16, losses=False, cache=cache))
        extension.turn(cache, min(45, method.eviction.turn))
        for at in range(schedule.prompt - 1, count - 1):
            model(ids[None, at : at + 1], past_key_values=cache)
        assert cache_bytes(cache) == kv_bytes(read(model.config, torch.float32), method, schedule)
    forwards, reads = list(schedule.forwards()), list(schedule.reads())
    assert [start for start, _ in forwards] == found and sum(new for _, new in forwards) == count - 1
    assert forwards[: len(reads)] == reads and sum(new for _, new in reads) == schedule.prompt


def test_a_dialogue_costs_its_head_and_its_turns():
    """Every token is scored by logits, and what stays is written anew before a turn: more than the same window without."""
    architecture, speeds = read(LLAMA_8B), CARDS["A100-80"].speeds("bfloat16")
    sir, plain = SirLLM(), LMInfinite(1024, 4)
    one, other = (timing.prefill(architecture, method, Schedule.of(method, 100_000, 128), speeds) for method in (sir, plain))
    head = 2 * architecture.weights.head * 100_000 / speeds.gemm(1)
    assert one.compute > 0.9 * head and one.total > other.total
    longer = timing.prefill(architecture, sir, Schedule.of(sir, 200_000, 128), speeds)
    assert longer.total == pytest.approx(2 * one.total, rel=0.02)  # the same for every turn
    early, late = (timing.decode(architecture, sir, Schedule.of(sir, n, 128), speeds) for n in (10_000, 1_000_000))
    assert early == late
    wide = temporary_bytes(architecture, sir, Schedule.of(sir, 100_000, 128))
    assert wide >= 128_256 * (257 * 2 + 256 * 8) * 0.95


def test_needs_without_tiers_are_as_they_were():
    request = planned().request
    need = needs.of(request, YaRN(32.0), 262_144)
    assert need.each == need.kv == kv_bytes(request.architecture, YaRN(32.0), Schedule.of(YaRN(32.0), 262_144, 128)) and need.room is None is need.spread
