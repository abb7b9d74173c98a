"""The one list of methods that every matrix test runs over. Adding a method adds its file and its lines here."""

from __future__ import annotations

from longreach import STRING, BlockSelfExtend, DualChunk, LeakyReRoPE, LMInfinite, ReRoPE, SelfExtend, Stock, StreamingLLM

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
]

# What makes each method plain attention on up to 60 tokens.
NEUTRAL = [
    SelfExtend(1, 8),
    SelfExtend(4, 60),
    SelfExtend(3, 8, above=60),
    LMInfinite(60, 3),
    LMInfinite(9, 60, distance_limit=60),
    Stock(),
    StreamingLLM(56, 3),
    ReRoPE(60),
    LeakyReRoPE(8, 1),
    DualChunk(64),
    STRING(8, 8),
    BlockSelfExtend(1, 8),
]
