"""Cost: the published tables to the digit, and every count against what it counts (matrices, buffers, models)."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers as t
from torch.utils.flop_counter import FlopCounterMode

from families import BASE, FAMILIES, build, rope, tokens
from longreach import DualChunk, InfiniteHiP, InfLLM, LMInfinite, Quest, SelfExtend, Stock, StreamingLLM, Tiered, extend, stream
from longreach.core.matrices import matrices
from longreach.core.segments import Retention
from longreach.memory.buffer import Buffer
from longreach.memory.placement import ROLLBACK, Placement
from longreach.methods import infinitehip
from longreach.planning import devices, hardware, theory, timing, work
from longreach.planning.architecture import read
from longreach.planning.hardware import CARDS, Curve
from longreach.planning.memory import Budget, Schedule, entries, kv_bytes, largest, temporary_bytes, tier_bytes
from longreach.planning.theory import GIB, SpeContext
from methods_matrix import METHODS
from test_choice import TOGETHER

# -- the published models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PeakPerformance:
    """The framework for one dense model on `devices` equal devices; communication between them is left out, as in the paper."""

    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    memory: float
    flops: float
    bandwidth: float
    link: float
    itemsize: float = 2
    devices: int = 1
    attention: theory.AttentionCost = "causal"

    @property
    def weights(self) -> float:
        return self.parameters * self.itemsize

    def kv(self, tokens: int) -> float:
        heads = theory.kv_heads_per_device(self.kv_heads, self.devices) * self.devices
        return theory.kv_bytes_per_token(self.layers, heads, self.head_dim, self.itemsize) * tokens

    def concurrency(self, tokens: int) -> int:
        return theory.concurrency(self.memory * self.devices, self.weights, self.kv(tokens))

    def prefill(self, tokens: int) -> float:
        return theory.prefill_flop(self.parameters, tokens, self.layers, self.heads * self.head_dim, self.attention) / (self.flops * self.devices)

    def decode(self, tokens: int, new_tokens: int, users: int = 1) -> float:
        return theory.decode_seconds(self.weights, users * self.kv(tokens), new_tokens, self.bandwidth * self.devices)

    def switch(self, tokens: int) -> float:
        return theory.switch_seconds(self.kv(tokens), self.kv(tokens), self.link * self.devices)


A100 = dict(memory=80e9, flops=312e12, bandwidth=2.0e12, link=20e9)
YI = PeakPerformance(parameters=34e9, layers=60, heads=56, kv_heads=8, head_dim=128, **A100)


def test_the_check_table_of_the_deployment_paper():
    assert YI.kv(1) == 245_760 and YI.weights == 68e9
    assert [f"{YI.kv(n) / 1e9:.3f}" for n in (4000, 50_000)] == ["0.983", "12.288"]
    assert [f"{YI.kv(n) / GIB:.4g}" for n in (4000, 50_000, 100_000)] == ["0.9155", "11.44", "22.89"]
    for attention, seconds in (("figures", ["0.894", "14.34"]), ("causal", ["0.916", "17.79"]), ("none", ["0.872", "10.90"])):
        way = replace(YI, attention=attention)
        assert [f"{way.prefill(4000):.3f}", f"{way.prefill(50_000):.2f}"] == seconds
    # the paper writes GiB as GB: with its 0.91 and 11 "GB" its figures come out, with bytes they do not
    assert [f"{theory.decode_seconds(68e9, kv, 250, 2e12):.4g}" for kv in (0.91e9, 11e9)] == ["8.614", "9.875"]
    assert [f"{YI.decode(n, 250):.4g}" for n in (4000, 50_000)] == ["8.623", "10.04"]
    assert [f"{theory.switch_seconds(kv, kv, 20e9):.3f}" for kv in (0.91e9, 11e9)] == ["0.091", "1.100"]
    assert [f"{YI.switch(n):.3f}" for n in (4000, 50_000)] == ["0.098", "1.229"]
    assert theory.critical_tokens(312e12, 2e12, 2) == 156


def test_its_twenty_users_need_mixed_units():
    small, large = YI.kv(4000), YI.kv(50_000)
    assert (theory.concurrency(80e9, 68e9, small), theory.concurrency(80e9, 68e9, large)) == (12, 0)  # bytes
    assert theory.concurrency(80e9, 68e9, 0.91e9) == 13  # GiB written as GB
    assert (theory.concurrency(80 * GIB, 68e9, small), theory.concurrency(80 * GIB, 68e9, large)) == (18, 1)  # 80 GiB
    assert theory.concurrency(80 * GIB, 68e9, 0.91e9) == 19  # both


def test_scaling_laws_and_the_extensions():
    twice = replace(YI, devices=2)
    assert twice.prefill(4000) == YI.prefill(4000) / 2 and twice.decode(4000, 9) == YI.decode(4000, 9) / 2
    assert YI.kv(8000) == 2 * YI.kv(4000) and replace(YI, devices=16).kv(1) == 2 * YI.kv(1)  # 8 heads on 16 devices are kept twice
    whole = theory.prefill_flop(34e9, 6000, 60, 7168)
    assert whole == pytest.approx(theory.prefill_flop(34e9, 4000, 60, 7168) + theory.incremental_flop(34e9, 2000, 4000, 60, 7168))
    assert theory.distinct_experts(8, 2, 1) == pytest.approx(2) and 7.9 < theory.distinct_experts(8, 2, 16) < 8
    assert theory.all_reduce_seconds(1, 8, 2, 1, 1e9, 3) == 0 and theory.all_reduce_seconds(10, 8, 2, 2, 1e9, 3) == pytest.approx(6 * 160 / 1e9)
    assert theory.turns_per_second(2.0, 10.0, 1) == pytest.approx(1 / 12) and theory.turns_per_second(2.0, 10.0, 100) == 0.5
    assert theory.break_even_bandwidth(10e9, 5.0, 1.0) == 2.5e9 and theory.break_even_bandwidth(10e9, 1.0, 5.0) is None


def test_the_thresholds_of_specontext():
    llama = SpeContext(weights=16.06e9, draft=0.5e9, layers=32, entry=4 * 8 * 128, repeats=4, memory=80 * GIB)
    assert llama.thresholds()[:3] == [424_747, 436_489, 448_901]
    assert replace(llama, requests=32).thresholds()[:3] == [13_273, 13_585, 13_914]
    found = llama.thresholds()
    assert all(a < b for a, b in pairwise(found)) and len(found) == 33
    for i, most in enumerate(found):
        assert llama.split(most, i) <= llama.memory < llama.split(most + 1, i)
    for length in (1, found[0], found[0] + 1, found[5], found[32]):
        on_host = llama.layers_on_host(length)
        assert llama.split(length, on_host) <= llama.memory and (on_host == 0 or llama.split(length, on_host - 1) > llama.memory)
    assert llama.layers_on_host(found[32] + 1) is None
    assert replace(llama, memory=10 * GIB).threshold(0) == 0


# -- pairs --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, *(toy for toy in TOGETHER if toy.align is None)], ids=str)
def test_pairs_are_those_of_the_matrix(method):
    layout = method.layout(4)
    owner = matrices(layout.segments, 70).segment
    for start, stop in ((0, 70), (0, 1), (13, 14), (20, 47), (69, 70), (8, 9)):
        found, pairs, chosen, compared = work.count(layout, start, stop), 0, 0, 0
        for number, segment in enumerate(layout.segments):
            first, choosing = (start, False) if segment.choice is None else segment.choice.of(start, stop)
            keys = (owner[first:stop] == number).sum(1).tolist()
            if segment.choice is not None and choosing:
                seen = {i: n for i, n in zip(range(first, stop), keys) if n}
                groups: dict[int, list[int]] = {}
                for i in seen:
                    groups.setdefault(i // segment.choice.queries, []).append(i)
                of = {i: seen[group[0]] for group in groups.values() for i in group}
                if segment.choice.refresh and stop - start == 1:  # what was answered to an earlier query
                    of = {start: segment.visible.keys_of(segment.choice.asked(start)[0])}
                blocks = [segment.choice.complete(seen[group[0]]) for group in groups.values()]
                keys = [segment.choice.shown(seen[i], of[i]) for group in groups.values() for i in group]
                chosen, compared = chosen + sum(keys), compared + sum(blocks) * max(1, segment.choice.index.width)
            pairs += sum(keys)
        assert (found.pairs, found.chosen) == (pairs, chosen), (start, stop)
        assert found.scored == compared or layout.choice.index.probes, (start, stop)
    for index in (0, 9, 33, 69):
        spans = [j for first, last in work.spans(layout, index) for j in range(first, last)]
        assert sorted(spans) == (owner[index] >= 0).nonzero()[:, 0].tolist()


SCANS = [InfiniteHiP.small(8), InfiniteHiP(8, 4, 8, (12, 4), (24,), (4, 1), 8, (8, 4), 0), InfiniteHiP(8, 0, 8, (8,), (), (3,), 1, (1,), 0)]


@pytest.mark.parametrize("method", SCANS, ids=str)
@torch.no_grad()
def test_a_scan_compares_as_often_as_is_counted(method, monkeypatch):
    """One block of queries after the other, then two rounds of decoded tokens: products of a query head and a key, in a layer of the first ones and a later."""
    model, products = build("llama"), [0]

    def counting(q: torch.Tensor, k: torch.Tensor, real: Any = infinitehip.logits_of) -> torch.Tensor:
        products[0] += q.shape[1] * q.shape[2] * q.shape[3] * k.shape[3]
        return real(q, k)

    def forward(start: int, stop: int) -> tuple[int, int]:
        before = products[0]
        model(ids[:, start:stop], past_key_values=cache)
        heads = model.config.num_attention_heads
        return (products[0] - before) // heads, sum(work.count(method.layout(layer), start, stop).scored for layer in (0, 1))

    monkeypatch.setattr(infinitehip, "logits_of", counting)
    step, every = max(2, method.query_block), method.refresh[0]
    prompt, ids = -(-160 // (step * every)) * step * every, tokens(1, 300)
    with extend(model, method):
        cache = t.DynamicCache()
        counted = [forward(start, start + step) for start in range(0, prompt, step)]
        assert sum(found for found, _ in counted) > 10_000
        for found, said in counted[32 // step :]:  # blocks are complete; queries that choose apart in one call look at as many chunks as the last of them
            assert said == found if method.query_block > 1 else found - 32 <= said <= found
        for start in range(prompt, prompt + 2 * every, every):
            found, said = zip(*(forward(at, at + 1) for at in range(start, start + every)))
            assert sum(said) <= sum(found) < sum(said) + 2 * every * len(method.refresh) and sum(found) > 100  # shares are rounded down


def test_a_query_that_chooses_sees_full_blocks_and_the_last_one():
    choice = Quest(12, 4, 0, "all").layout(0).choice
    assert [choice.shown(n) for n in (1, 4, 7, 12, 13, 15, 16, 17)] == [1, 4, 7, 12, 9, 11, 12, 9]
    assert work.count(Quest(12, 4, 0).layout(0), 15, 16) == work.Counts(12, 2 * 4, 1, 12)
    assert work.count(Quest(12, 4, 0).layout(0), 14, 16) == work.Counts(31, 0, 1)  # a forward of two reads every key
    assert work.count(InfLLM(4, 2, 2, 1, repr_topk=1, exc_block_size=2).layout(), 12, 13) == work.Counts(4 + 3 + 2, 3, 3, 3, 4)  # [8] and one of three blocks
    assert work.count(InfLLM(4, 2, 2, 1, repr_topk=1, exc_block_size=2).layout(), 12, 15) == work.Counts(9 + 10 + 9, 7, 6, 10, 12)
    late = LMInfinite(9, 3, top_k=2, top_k_from_layer=0)
    assert work.count(late.layout(0), 0, 50).scored == 49 - 9 - 3 + 1 and work.count(late.layout(0), 0, 50).chosen == 2


# -- bytes --------------------------------------------------------------------------------------------------------------------------


def test_entries_are_those_of_a_real_buffer():
    rng = random.Random(0)
    for _ in range(150):
        tail = rng.choice([None, 0, 1, 10, 200, 700])
        kept = Retention(rng.choice([0, 3, 90]), tail)
        if tail is None and rng.random() < 0.4:
            kept = Retention(0, None, rng.choice([4, 16]), rng.choice([0, 5]))
        schedule = Schedule(rng.randint(1, 2500), rng.randint(1, 500), rng.choice([1, 7, 64, 100, 512, 4096]), rng.choice([1, 1, 1, None, 2, 16]))
        if kept == Retention():
            continue
        placement = Placement(replace(kept, head=0), 1)
        buffer = Buffer(placement, kept.head)
        for start, count in schedule.forwards():
            placement.reserve([(0, start, start + count)], ROLLBACK)
            new = kept.entries(start + count) - kept.entries(start)
            buffer.write(slice(0, 1), kept.entries(start), torch.empty(1, 1, new, 1, device="meta"))
            placement.commit()
            buffer.settle()
        allocated = sum(x.shape[2] for x in (buffer.head, *buffer.bodies.values()) if x is not None)
        assert entries(kept, schedule) == allocated, (kept, schedule)


def stored(model, method, schedule) -> int:
    """Bytes of the store of a real model that was fed by the schedule."""
    with extend(model, method, context=schedule.stored + 1 if method.needs_context else None) as extension:
        ids = tokens(1, schedule.stored)[0]
        cache, size = None, 0
        parts = [(0, schedule.chunked, schedule.step), (schedule.chunked, schedule.prompt, schedule.prompt), (schedule.prompt, schedule.stored, 1)]
        for first, last, chunk in parts:
            if first < last:
                for part in stream(extension, ids[first:last], chunk_size=chunk, losses=False, cache=cache):
                    cache, size = part.cache, part.store_bytes
        return size


# Every kind of retention on grouped heads and on layers that slide in part; and the other features that change bytes: all layers slide, experts,
# wide heads, latents.
RETENTIONS = [
    Stock(), SelfExtend(3, 8), LMInfinite(9, 3), LMInfinite(9, 3, top_k=2, top_k_from_layer=1), StreamingLLM(9, 3), DualChunk(24), Quest(16, 4, 1),
    InfLLM(9, 3, 4, 2, exc_block_size=8),
]  # fmt: skip
CELLS = [(family, m) for family in ("llama", "gemma2") for m in RETENTIONS] + [
    (family, m) for family in ("mistral-sliding", "gpt-oss", "qwen3-moe", "phi") for m in (Stock(), SelfExtend(3, 8))
]


@pytest.mark.parametrize(("family", "method"), CELLS, ids=str)
def test_kv_bytes_are_those_of_a_real_store(family, method):
    model = build(family)
    schedule = Schedule.of(method, 420, 30, 128)
    assert kv_bytes(read(model.config, torch.float32), method, schedule) == stored(model, method, schedule)


MLA = dict(
    **{k: v for k, v in BASE.items() if k != "num_key_value_heads"}, q_lora_rank=16, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
    n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=1,
)  # fmt: skip


def test_latent_attention_is_counted_as_the_attention_call_gets_it():
    architecture = read(t.DeepseekV3Config(**MLA), torch.float32)
    assert architecture.bytes_per_token == 2 * 4 * (16 + 8 + 12) * 4 and architecture.latent == 24 + 8
    assert (architecture.weights.experts, architecture.weights.experts_per_token) == (8, 2)
    assert dict(architecture.weights.expert_matrices) == {2 * 16 * 64: 1, 16 * 64: 1}  # gate and up in one, down; one layer has experts


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_a_built_model(family):
    for dtype in (torch.float32, torch.bfloat16):
        model = t.AutoModelForCausalLM.from_config(build(family).config, dtype=dtype)  # some weights stay in fp32, as loading keeps them
        found = read(model.config, dtype).weights
        assert found.nbytes == sum(p.numel() * p.element_size() for p in model.parameters())
        assert found.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "phi3", "gpt-neox", "stablelm"])
def test_active_weights_are_the_products_that_run(family):
    model, n = build(family), 40
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens(1, n), use_cache=False, logits_to_keep=1)
    architecture = read(model.config, torch.float32)
    weights = architecture.weights
    eager = sum(2 * layer.heads * n * n * (layer.key_width + layer.value_width) for layer in architecture.layers)  # eager attention computes all pairs
    rest = counter.get_total_flops() - 2 * (weights.active - weights.head) * n - 2 * weights.head
    assert eager <= rest <= eager + n * 64  # the rotary's own small product


def test_experts_are_counted_once_per_token():
    dense = read(t.MixtralConfig(**BASE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2), torch.float32).weights
    assert dense.experts == 4 and sum(elements * count for elements, count in dense.expert_matrices) == 2 * 3 * 64 * 80
    assert dense.active - dense.head - sum(e * n for e, n in dense.matrices) == 2 * (2 * 3 * 64 * 80)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (t.T5Config(), "encoder-decoder"),
        (t.BloomConfig(hidden_size=64, n_head=4, n_layer=2, vocab_size=96, num_key_value_heads=1), "query_key_value of width"),  # it has no groups
        (t.Qwen3NextConfig(**{**BASE, "num_hidden_layers": 4}), "linear_attention"),
        (t.GPT2Config(n_embd=16, n_layer=1, n_head=2), "names that plan does not know"),
    ],
    ids=lambda x: getattr(x, "model_type", None),
)
def test_what_cannot_be_counted_is_refused(config, says):
    with pytest.raises(ValueError, match=says):
        read(config)


def test_a_schedule_is_what_run_does():
    assert list(Schedule(10, 3, 4).forwards()) == [(0, 4), (4, 4), (8, 1), (9, 1), (10, 1), (11, 1)]
    assert list(Schedule(10, 2, 4, cut=None).forwards()) == [(0, 10), (10, 1)]
    assert list(Schedule(1, 1).forwards()) == [(0, 1)]
    with pytest.raises(ValueError, match="at least 9"):
        Schedule(0, 8)


def test_bounded_memory_does_not_grow_and_more_is_never_less():
    architecture = read(t.LlamaConfig(**BASE, num_key_value_heads=2), torch.float32)
    sizes = {kv_bytes(architecture, LMInfinite(512, 4), Schedule(n, 8)) for n in (5000, 50_000, 5_000_000)}
    assert len(sizes) == 1 and entries(Retention(tail=512), Schedule(5_000_000, 8)) == 512 + 128 + 64
    grown = [kv_bytes(architecture, SelfExtend(8, 64), Schedule(n, 8)) for n in range(1, 3000, 7)]
    assert grown == sorted(grown)
    assert temporary_bytes(architecture, Stock(), Schedule(5000, 8)) < temporary_bytes(architecture, Stock(), Schedule(5000, 8, cut=None))


def test_the_largest_that_fits():
    assert [largest(lambda n, most=most: n <= most, 100) for most in (0, 1, 57, 100, 500)] == [0, 1, 57, 100, 100]
    architecture = read(t.LlamaConfig(**BASE, num_key_value_heads=2), torch.float32)
    budget = Budget(architecture, 4_000_000)
    reach = largest(lambda n: budget.fits(Stock(), n), 1 << 20)
    assert budget.needs(Stock(), reach) <= 4_000_000 < budget.needs(Stock(), reach + 1)


# -- seconds and hardware -----------------------------------------------------------------------------------------------------------


def test_a_curve_goes_through_its_points():
    curve = Curve(((10.0, 1.0), (1000.0, 3.0)))
    assert [curve(x) for x in (1, 10, 1000, 5000)] == [1, 1, 3, 3] and curve(100) == pytest.approx(2)


def test_seconds_follow_the_work():
    llama = read(t.LlamaConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, vocab_size=5000), torch.bfloat16)
    speeds = CARDS["A100-80"].speeds("bfloat16")
    long, longer = (timing.prefill(llama, Stock(), Schedule(n, 8), speeds) for n in (200_000, 400_000))
    assert long.bound == "compute" and 3 < longer.compute / long.compute < 4  # mostly attention, which is quadratic
    windowed = timing.prefill(llama, LMInfinite(4096), Schedule(400_000, 8), speeds)
    assert windowed.compute < longer.compute / 5
    one = timing.token(llama, Stock(), 400_000, speeds)
    assert timing.token(llama, LMInfinite(4096), 400_000, speeds).total < one.total
    batch = timing.token(llama, Stock(), 400_000, speeds, rows=8)
    assert one.total < batch.total < 8 * one.total  # weights are read once for all
    assert timing.switch(1e9, speeds).total == pytest.approx(2e9 / (32e9 * 0.8))


def test_the_decode_of_a_token_at_the_peak_is_the_papers():
    """Without efficiencies, overheads and elementwise steps, the engine's plain attention costs what the paper's formula says."""
    llama = read(t.LlamaConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, vocab_size=1000, num_key_value_heads=2))
    ideal = replace(
        CARDS["A100-80"].speeds("bfloat16"), gemv=hardware.flat(1e12), gemm=hardware.flat(1e30), keys=1e12, elementwise=1e30,
        forward_seconds=0.0, layer_seconds=0.0, call_seconds=0.0,
    )  # fmt: skip
    norms_and_table = llama.weights.nbytes - llama.weights.active * 4
    found = timing.token(llama, Stock(), 9_999, ideal).total
    assert found == pytest.approx(theory.decode_seconds(llama.weights.nbytes - norms_and_table, 10_000 * llama.bytes_per_token, 1, 1e12))


WHOLE = 'memory = "24 GiB"\nflops = { bfloat16 = 165e12 }\nmemory_bandwidth = "1008 GB/s"\nhost_link = 32e9\n'


def test_hardware_from_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(WHOLE + 'name = "mine"\ncompute_efficiency = 0.25\nhost_memory = "64GB"\n')
    found = devices.find(str(path))
    assert (found.name, found.memory, found.bandwidth, found.link, found.host_memory) == ("mine", 24 * GIB, 1.008e12, 32e9, 64 * 10**9)
    assert found.speeds("bfloat16").gemm(1) == 165e12 / 4
    with pytest.raises(ValueError, match=r"no FLOP/s for float32.*--dtype bfloat16"):
        found.peak("float32")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("memory = ", "is not TOML"),
        (WHOLE + "bandwith = 3\n", "unknown key 'bandwith'; did you mean 'memory_bandwidth'"),
        (WHOLE.replace("host_link = 32e9\n", ""), "lacks host_link; a whole file is"),
        (WHOLE.replace('"24 GiB"', '"24 gallons"'), 'write memory = "24 GiB"'),
        (WHOLE.replace('"24 GiB"', "-1"), "positive number of bytes"),
        (WHOLE.replace('"24 GiB"', "true"), "positive number of bytes"),
        (WHOLE.replace("bfloat16", "int4"), "write flops = { bfloat16"),
        (WHOLE.replace("165e12", '"fast"'), "write for example bfloat16 = 165e12"),
        (WHOLE + "memory_efficiency = 1.5\n", "above 0 and at most 1"),
        (WHOLE + "name = 3\n", 'write name = "..."'),
    ],
    ids=range(10),
)
def test_mistakes_in_a_file_are_sentences(tmp_path, text, says):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r".*" + says.replace("(", r"\(").replace("{", r"\{")):
        devices.find(str(path))


def test_unknown_hardware():
    assert devices.find("a100-80").name == "A100-80" and all(card.source and card.peak("bfloat16") for card in CARDS.values())
    with pytest.raises(ValueError, match="did you mean RTX4090"):
        devices.find("rtx4080")
    with pytest.raises(ValueError, match="cannot read"):
        devices.find("absent.toml")


def test_rope_is_not_part_of_the_cost():
    plain, scaled = (read(t.LlamaConfig(**{**BASE, **more}), torch.float32) for more in ({}, rope("linear", factor=2.0)))
    assert plain == scaled


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("method", RETENTIONS, ids=str)
@torch.no_grad()
def test_bytes_in_tiers_are_those_of_a_real_store(method, block):
    model = build("llama")
    schedule = Schedule.of(method, 420, 30, 128)
    expected = tier_bytes(read(model.config, torch.float32), method, schedule, block)
    with extend(model, method, memory=Tiered("64MiB", block=block)) as extension:
        cache, ids = t.DynamicCache(), tokens(1, schedule.stored)
        for start, new in schedule.forwards():
            model(ids[:, start : start + new], past_key_values=cache)
        found = extension.report()["memory"]
    if any(kept.place is None for layer in extension.layers for kept in layer.kept.values()):
        device = found["tiers"]["device"]
        assert {"blocks": device["bytes"], "summaries": device["summaries"], "apart": found["apart"]["tails"]} == expected
    else:
        assert expected["blocks"] == expected["summaries"] == 0 < expected["apart"] and found["tiers"]["device"]["bytes"] == 0
