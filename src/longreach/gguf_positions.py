"""What a GGUF file says of positions and attention and Transformers leaves out: rotary frequencies beyond their base, sliding windows, soft-caps.

Knows the metadata that llama.cpp writes (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and the names in configurations of Transformers.

Transformers reads the base of the frequencies, of most architectures, and no scaling of them: a Llama 3 or a Phi 3 with a long window would answer with
frequencies that it was not trained with, and only be worse. Those of its training are written into the configuration here; what has no name there is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

SHORT, LONG, DIVISORS = "rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight"
VECTORS = (SHORT, LONG, DIVISORS)  # one number for each frequency
PLAIN = {"attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
ROTARY = {
    "dimension_count", "dimension_count_swa", "freq_base", "freq_base_swa", "scale_linear", "scaling.type", "scaling.factor", "scaling.original_context_length",
    "scaling.attn_factor", "scaling.finetuned", "scaling.yarn_attn_factor", "scaling.yarn_ext_factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow",
}  # fmt: skip
LOW, HIGH = 1.0, 4.0  # turns in the original window below which Llama 3 divides a frequency by the whole factor, and above which by none
WIDE = {("gemma2", 46), ("gemma3_text", 62)}  # the 27B models scale queries by another width, which files do not say: llama.cpp goes by the layers, too
USUAL = (8192, *(2**n for n in range(9, 18)))  # original windows
ADVICE = "load the safetensors that it was made from"


def complete(config: Any, said: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> None:
    """Write it into a configuration, in place.

    said     the metadata without the name of the architecture before each key; a list is given as its length and left alone.
    vectors  those of VECTORS that the file has.

    Raises ValueError for frequencies that no rule of Transformers makes.
    """
    for key, name in PLAIN.items():
        if type(said.get(key)) in (int, float) and hasattr(config, name):
            setattr(config, name, said[key])
    if (config.model_type, getattr(config, "num_hidden_layers", None)) in WIDE:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    if not isinstance(getattr(config, "rope_parameters", None), dict):  # no rotary embedding
        return
    rope = copy.deepcopy(config.rope_parameters)  # it may be the default of every configuration
    own = rope.get("full_attention", rope)
    spoken = {key.removeprefix("rope."): value for key, value in said.items() if key.startswith("rope.")}
    if own.get("rope_type", "default") != "default" and "scaling.type" not in spoken:  # a rule of the family, of which files say nothing
        return
    if unknown := sorted(spoken.keys() - ROTARY):
        raise ValueError(f"it says rope.{unknown[0]} of its rotary frequencies, which Transformers has no name for; {ADVICE}")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own |= parameters(spoken, vectors, width, said.get("context_length"), own)
    if rope is not own and "freq_base_swa" in spoken and "sliding_attention" in rope:
        rope["sliding_attention"]["rope_theta"] = spoken["freq_base_swa"]
    if "original_max_position_embeddings" in own and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = own["original_max_position_embeddings"]
    config.rope_parameters = rope
    config.validate_rope()


def parameters(spoken: Mapping[str, Any], vectors: Mapping[str, np.ndarray], width: int, window: int | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """What Transformers calls `rope_parameters`, as far as the file says it."""
    made: dict[str, Any] = {}
    if (base := spoken.get("freq_base")) is not None:
        made["rope_theta"] = base
    if (count := spoken.get("dimension_count")) is not None and count != int(width * own.get("partial_rotary_factor", 1.0)):
        made["partial_rotary_factor"] = count / width
    factor = spoken.get("scaling.factor") or spoken.get("scale_linear") or 1.0
    kind = "longrope" if LONG in vectors else spoken.get("scaling.type", "linear")
    original = spoken.get("scaling.original_context_length", window)
    divisors = vectors.get(DIVISORS)
    if divisors is not None and np.allclose(divisors, 1):
        divisors = None
    if divisors is not None:
        if kind not in ("linear", "none") or factor != 1:
            raise ValueError(f"it has both {DIVISORS} and frequencies scaled by the rule {kind!r}; {ADVICE}")
        return made | llama3(divisors, base or own["rope_theta"])
    if kind == "longrope":
        if SHORT not in vectors or LONG not in vectors:
            raise ValueError(f"it scales its frequencies by the rule 'longrope' and lacks {SHORT} or {LONG}; {ADVICE}")
        made |= {"rope_type": kind, "short_factor": vectors[SHORT].tolist(), "long_factor": vectors[LONG].tolist()}
        made["original_max_position_embeddings"] = original
        if "scaling.attn_factor" in spoken:
            made["attention_factor"] = spoken["scaling.attn_factor"]
    elif kind == "yarn":
        if (more := spoken.get("scaling.yarn_ext_factor", 1.0)) not in (1.0, -1.0):
            raise ValueError(f"it scales its frequencies by YaRN with an extrapolation factor of {more}, which Transformers does not have; {ADVICE}")
        made |= {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
        made |= {name: spoken[f"scaling.yarn_{name}"] for name in ("beta_fast", "beta_slow") if f"scaling.yarn_{name}" in spoken}
        if (scale := spoken.get("scaling.yarn_attn_factor", spoken.get("scaling.attn_factor", 1.0))) != 1:
            made["attention_factor"] = scale * (0.1 * math.log(factor) + 1)  # llama.cpp multiplies by YaRN's own factor, Transformers replaces it
    elif kind == "linear":
        if factor != 1:
            made |= {"rope_type": kind, "factor": factor}
    elif kind != "none":
        raise ValueError(f"it scales its frequencies by the unknown rule {kind!r}; {ADVICE}")
    return made


def llama3(divisors: np.ndarray, base: float) -> dict[str, Any]:
    """The parameters of Llama 3's rule, of which a file holds only the result.

    A frequency that turns t times in the original window L is divided by 1 / ((1 - s) / f + s), s = (t - LOW) / (HIGH - LOW) between 0 and 1. f is the largest
    divisor; L follows from any frequency with an s between, and where there is none, several L are the same rule.
    """
    values, factor = divisors.astype(np.float64), float(divisors.max())
    wavelengths = 2 * math.pi * base ** (np.arange(len(values)) / len(values))
    between = (values > 1.001) & (values < factor * 0.999)
    share = (1 / values[between] - 1 / factor) / (1 - 1 / factor)
    for window in {round(n) for n in wavelengths[between] * (LOW + share * (HIGH - LOW))} or USUAL:
        share = np.clip((window / wavelengths - LOW) / (HIGH - LOW), 0, 1)
        if np.allclose(1 / ((1 - share) / factor + share), values, rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, "low_freq_factor": LOW, "high_freq_factor": HIGH, "original_max_position_embeddings": window}
    raise ValueError(f"its {DIVISORS} divides the frequencies by another rule than Llama 3's; {ADVICE}")
