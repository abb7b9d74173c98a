"""The one list of methods that every matrix test runs over. Adding a method adds its file and its lines here."""

from __future__ import annotations

from typing import Any

import pytest

from families import FAMILIES
from longreach import (  # fmt: skip
    NTK,
    PI,
    STRING,
    BlockSelfExtend,
    Combined,
    DualChunk,
    DynamicNTK,
    DynamicYaRN,
    InfiniteHiP,
    InfLLM,
    LeakyReRoPE,
    LMInfinite,
    LogisticSelfExtend,
    LongHeads,
    LongRoPE,
    NTKByParts,
    Quest,
    ReRoPE,
    SelfExtend,
    SirLLM,
    Stock,
    StreamingLLM,
    YaRN,
)
from longreach.methods.base import Method

METHODS = [
    SelfExtend(3, 8),
    SelfExtend(4, 16),
    SelfExtend(5, 1),
    SelfExtend(2, 7, shift="true_division"),
    SelfExtend(3, 8, above=20),
    SelfExtend(3, 8, log_scale=32),
    LMInfinite(9, 3),
    LMInfinite(16, 0),
    LMInfinite(9, 3, distance_limit=14),
    LMInfinite(9, 3, distance_limit=14, distance="constant"),
    LMInfinite(9, 3, distance_limit=5),
    LMInfinite(1, 1),
    LMInfinite(9, 3, top_k=2, top_k_from_layer=0, top_k_rows="all"),
    LMInfinite(9, 3, top_k=2, top_k_from_layer=1),
    Stock(),
    Stock(sliding_window=11),
    Stock(attention_chunk=13),
    PI(2.5),
    NTK(4.0),
    DynamicNTK(2.0),
    NTKByParts(2.0, beta=4.0),
    YaRN(2.0),
    DynamicYaRN(attention_factor=1.3),
    LongRoPE(2.0, tuple(1.0 + 0.2 * a for a in range(8))),
    Combined(YaRN(2.0), LMInfinite(9, 3)),
    Combined(LongRoPE(2.0, (1.0, 2.0, 2.5, 3.0)), LMInfinite(9, 3, distance_limit=14, top_k=2, top_k_from_layer=0, top_k_rows="all")),
    Combined(DynamicNTK(), SelfExtend(2, 30, log_scale=32)),
    StreamingLLM(9, 3),
    StreamingLLM(9, 3, counting="chunkable"),
    ReRoPE(8),
    ReRoPE(7, log_scale=32),
    LeakyReRoPE(8, 4),
    LeakyReRoPE(7, 3, log_scale=32),
    DualChunk(24),
    DualChunk(24, preset="repository"),
    DualChunk(7, chunk_length=4),
    STRING(20, 5),
    BlockSelfExtend(3, 12),
    BlockSelfExtend(4, 4),
    LogisticSelfExtend(8, growth=0.3, largest_group=6),
    LogisticSelfExtend(1, growth=0.15, largest_group=4, log_scale=32),
    Quest(12, 4, 1, "all"),
    Quest(16, 4, 0),
    Combined(YaRN(2.0), Quest(18, 3, 0, "all")),
    LongHeads(12, 10, 3),
    LongHeads(16, 19, 4, together=2),
    Combined(YaRN(2.0), LongHeads(9, 6, 3)),
    InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=8),
    InfLLM(7, 0, 3, 3, repr_topk=2, exc_block_size=1),
    Combined(YaRN(2.0), InfLLM(16, 2, 5, 1, repr_topk=5, exc_block_size=3)),
    InfLLM(8, 2, 3, 2, repr_topk=2, exc_block_size=4, heads="head"),  # relevance="max": in test_infllm.py, for the tokens here come twice
    InfiniteHiP(8, 4, 8, (8, 4, 2), (24, 12), (2, 2, 1), 8, (8, 4, 2), 1, 10),
    InfiniteHiP(7, 0, 9, (6, 3), (12,), (1, 2), 5, (4, 2), 0),
    Combined(YaRN(2.0), InfiniteHiP(16, 5, 5, (5,), (), (3,), 4, (1,), 0)),
    SirLLM(70, 2, 8),  # one forward is one turn, which has to fit; what is evicted between turns is in `test_sirllm.py`
]

# What makes each method plain attention on up to 60 tokens.
NEUTRAL = [
    SelfExtend(1, 8),
    SelfExtend(4, 60),
    SelfExtend(3, 8, above=60),
    LMInfinite(60, 3),
    LMInfinite(9, 60, distance_limit=60),
    Stock(),
    PI(1.0),
    NTK(1.0),
    DynamicNTK(4.0),
    NTKByParts(1.0),
    YaRN(1.0),
    DynamicYaRN(),
    LongRoPE(1.0, (1.0,) * 8),
    Combined(YaRN(1.0), SelfExtend(4, 60)),
    StreamingLLM(56, 3),
    ReRoPE(60),
    LeakyReRoPE(8, 1),
    DualChunk(64),
    STRING(8, 8),
    BlockSelfExtend(1, 8),
    LogisticSelfExtend(8, largest_group=1),
    LogisticSelfExtend(7, growth=0.0),
    Quest(64, dense_layers=0, queries="all"),
    Quest(64, 8, 0),
    LongHeads(3, 60, 1),
    LongHeads(66, 60, 22),
    InfLLM(60),
    InfLLM(60, 3, 4, 2, exc_block_size=8),
    InfiniteHiP(60),
    InfiniteHiP(16, 0, 64, (16, 8), (1024,), (4, 1), 8, (4, 2)),
    SirLLM(60, 0),
]

PRIMARY = (SelfExtend, LMInfinite, Stock)
# One family for each thing that can differ: grouped heads, scaling, frequencies by length, sliding layers, soft-caps, partial and interleaved rotary, sinks,
# attention outside the interface, ALiBi.
REPRESENTATIVE = {"llama", "llama-yarn", "llama-dynamic", "mistral-sliding", "gemma2", "phi", "cohere", "gpt-oss", "bloom"}
# Another composition of what other families have; the quick tests attach a method to each, the slow ones run every method.
REPEATING = {
    "llama4-rope", "deepseek-v2", "deepseek-v3-yarn", "cohere2", "glm", "glm4", "glm4-moe", "ernie4.5", "ernie4.5-moe", "nanochat", "granite", "granite-moe",
    "olmo", "olmo3", "olmoe", "starcoder2", "nemotron", "exaone4", "seed-oss", "helium", "arcee", "gemma", "apertus", "bitnet", "dots1", "phimoe", "minimax-m2",
    "ministral3", "qwen2-moe",
}  # fmt: skip
# Families that take the seam of gptj or bloom: `test_legacy.py` has their quick cells.
LEGACY = {"codegen", "falcon", "falcon-groups", "falcon-alibi", "falcon-alibi-groups", "mpt"}
REPEATING |= LEGACY


def each_family() -> list[Any]:
    return [pytest.param(family, marks=pytest.mark.slow if family in REPEATING else ()) for family in FAMILIES]


def cells(methods: list[Method]) -> list[Any]:
    """Every family with every method. Quick are all of them on Llama, one of each kind on the representative families, and the primary ones on those that
    are not REPEATING; the rest is slow (`pytest -m ""` runs all)."""
    first = {kind_of(method): method for method in reversed(methods)}

    def quick(family: str, method: Method) -> bool:
        primary = isinstance(method, PRIMARY) and family not in REPEATING
        return primary or family == "llama" or (family in REPRESENTATIVE and first[kind_of(method)] is method)

    return [
        pytest.param(family, method, id=f"{family}-{method}", marks=() if quick(family, method) else pytest.mark.slow)
        for family in FAMILIES for method in methods
    ]  # fmt: skip


def kind_of(method: Method) -> tuple[type, ...]:
    """Methods that differ in their parameters only are of one kind."""
    return (type(method.encoding), type(method.positions)) if isinstance(method, Combined) else (type(method),)


def slow_truths(methods: list[Method]) -> list[Any]:
    """InfLLM's truth goes through every token by itself; where many requests are compared token by token, it is left to the slow tests."""
    return [pytest.param(method, marks=pytest.mark.slow if isinstance(method, InfLLM) else ()) for method in methods]


SCALED = {"llama3", "llama-yarn", "llama-linear", "llama-dynamic", "phi3-longrope", "gpt-oss", "deepseek-v3-yarn", "ministral3"}
UNROTATED = {"llama4", "cohere2", "exaone4"}  # rotary in the sliding or chunked layers only
NARROW = {"deepseek-v2", "deepseek-v3", "deepseek-v3-yarn"}  # values narrower than keys
PARTLY = {"gemma2", "gemma3", "gpt-oss", "llama4", "llama4-rope", "cohere2", "olmo3", "exaone4"}  # some layers see a window or a chunk only
ALIBI = {"bloom", "mpt", "falcon-alibi", "falcon-alibi-groups"}
# rotary pairs of a head; the other families have 8
PAIRS = {
    "llama-head8": 4, "phi": 4, "gpt-neox": 2, "stablelm": 2, "glm": 4, "glm4": 4, "glm4-moe": 4, "nemotron": 4, "deepseek-v2": 4, "deepseek-v3": 4,
    "gptj": 4, "codegen": 4,
}  # fmt: skip


def refusal(family: str, method: Method) -> str | None:
    """What `extend` says where the method cannot apply to the family; None where it has to be exact."""
    if isinstance(method.positions if isinstance(method, Combined) else method, LongHeads) and family in NARROW:
        return "compares keys of"
    if method.eviction is not None and family in PARTLY:
        return "evicts tokens in all layers"
    if not method.rescales:
        return None
    if family in ALIBI:
        return "biases of ALiBi"
    if family in UNROTATED:
        return "rotate nothing"
    if family in SCALED:
        return "scaled already"
    encoding = method.encoding if isinstance(method, Combined) else method
    if isinstance(encoding, LongRoPE) and len(encoding.long_factor) != PAIRS.get(family, 8):
        return "one number per pair"
    return None


def context(method: Method, length: int) -> int | None:
    """The context to declare: only where the method cannot do without."""
    return length if method.needs_context else None
