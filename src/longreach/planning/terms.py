"""The published models applied to an architecture and a card: every term with its formula and its numbers.

Peaks of the datasheet, so these are bounds. Knows the formulas of theory.py and sizes; no methods.
"""

from __future__ import annotations

from typing import Any

from longreach.methods.stock import Stock
from longreach.planning import theory
from longreach.planning.architecture import Architecture
from longreach.planning.hardware import Hardware
from longreach.planning.theory import SpeContext, Term


def plain_kv_bytes(architecture: Architecture, tokens: int) -> int:
    """Keys and values of plain attention, each once; layers with a window or chunks hold no more."""
    return sum(layer.entry * min(tokens, layer.reach or tokens) for layer in architecture.layers) * architecture.itemsize


def attention_flop(architecture: Architecture, tokens: int) -> float:
    """Causal: 2 (D_k + D_v) n_heads per pair of query and key."""
    return sum(2.0 * layer.heads * (layer.key_width + layer.value_width) * pairs(layer.trained, tokens) for layer in architecture.layers)


def pairs(trained: Stock, tokens: int) -> float:
    """Query and key that a layer attends to as it was trained, leading terms."""
    if (chunk := trained.attention_chunk) is not None:
        whole, rest = divmod(tokens, chunk)
        return (whole * chunk**2 + rest**2) / 2
    window = min(tokens, trained.sliding_window or tokens)
    return window**2 / 2 + (tokens - window) * window


def peak(architecture: Architecture, hardware: Hardware, context: int, new_tokens: int, users: int) -> list[Term]:
    """The framework of arXiv 2405.08944, term by term, for plain attention."""
    weights, prompt = architecture.weights, context - new_tokens
    dtype, flops = architecture.dtype_name, hardware.peak(architecture.dtype_name)
    kv = plain_kv_bytes(architecture, context)
    linear, attention = 2.0 * (weights.active - weights.head) * prompt + 2.0 * weights.head, attention_flop(architecture, prompt)
    met = expected_weights(architecture, users)
    limited = sum(layer.reach is not None for layer in architecture.layers)
    per_layer = "2 L n_kv D b" if architecture.latent is None else "L n_heads (D_k + D_v) b, expanded as the attention call gets them"
    found = [
        Term("weights", weights.nbytes, "bytes", f"{weights.parameters} parameters in {dtype}"),
        Term("KV per token", architecture.bytes_per_token, "bytes", f"{per_layer} over {len(architecture.layers)} layers"),
        Term("KV of one user", kv, "bytes", f"KV per token x {context}" + (f", {limited} layers at most their window or chunk" if limited else "")),
        Term("users at once", theory.concurrency(hardware.memory, weights.nbytes, kv), "users", "floor((memory - weights) / KV of one user)"),
        Term("prefill, linear", linear, "FLOP", f"2 x {weights.active - weights.head} active weights x {prompt} tokens, and the head once"),
        Term("prefill, attention", attention, "FLOP", f"2 n_heads (D_k + D_v) per causal pair, {len(architecture.layers)} layers"),
        Term("prefill", (linear + attention) / flops, "s", f"both / {flops:.4g} FLOP/s"),
        Term("decode", theory.decode_seconds(met, users * kv, new_tokens, hardware.bandwidth), "s",
             f"{new_tokens} x (weights met by {users} users + their KV) / {hardware.bandwidth:.4g} bytes/s"),
        Term("context switch", theory.switch_seconds(kv, kv, hardware.link), "s", f"(KV out + KV in) / {hardware.link:.4g} bytes/s"),
        Term("critical tokens", theory.critical_tokens(flops, hardware.bandwidth, architecture.itemsize), "tokens",
             "FLOP/s / (bytes/s) x b / 2 per read of the weights: compute binds above"),
    ]  # fmt: skip
    if architecture.latent is not None:
        latent = architecture.latent * architecture.itemsize * len(architecture.layers)
        found.insert(2, Term("KV per token, latent", latent, "bytes", "L (d_c + d_rope) b: what a cache of latents would need; the store does not keep them"))
    if weights.experts:
        experts = theory.distinct_experts(weights.experts, weights.experts_per_token, users)
        found.append(Term("distinct experts", experts, "per layer", f"E (1 - (1 - k/E)^n): E {weights.experts}, k {weights.experts_per_token}, n {users}"))
    return found


def expected_weights(architecture: Architecture, tokens: int) -> float:
    """Bytes of weights that one forward of `tokens` tokens reads: all but the experts that none of them is expected to meet."""
    weights = architecture.weights
    if not weights.experts:
        return weights.nbytes
    one = sum(elements * times for elements, times in weights.expert_matrices) * architecture.itemsize
    return weights.nbytes - one * (weights.experts - theory.distinct_experts(weights.experts, weights.experts_per_token, tokens))


def offloading(architecture: Architecture, hardware: Hardware, requests: int, tokens: int) -> dict[str, Any]:
    """SpeContext's model of this architecture without its retrieval head, whose size depends on its training."""
    layers = architecture.layers
    model = SpeContext(
        weights=architecture.weights.nbytes,
        layers=len(layers),
        entry=architecture.bytes_per_token / len(layers),
        repeats=sum(layer.heads / layer.kv_heads for layer in layers) / len(layers),
        memory=hardware.memory,
        requests=requests,
    )
    return {"budget": model.budget, "layers_on_host": model.layers_on_host(tokens), "thresholds": model.thresholds()}
