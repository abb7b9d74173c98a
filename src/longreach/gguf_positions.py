"""What a GGUF file says of positions and attention and Transformers leaves out: rotary frequencies beyond their base, sliding windows, soft-caps.

Knows the metadata that llama.cpp writes (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and the names in configurations of Transformers.

Transformers reads the base of the frequencies, of most architectures, and no scaling of them: a Llama 3 or a Phi 3 with a long window would answer with
frequencies that it was not trained with, and only be worse. Those of its training are written into the configuration here; what has no name there is refused.
Where a file leaves something open, it means what it means in llama.cpp.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

SHORT, LONG, DIVISORS = "rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight"
VECTORS = (SHORT, LONG, DIVISORS)  # one number for each frequency
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
ROTARY = {
    "dimension_count", "dimension_count_swa", "dimension_sections", "freq_base", "freq_base_swa", "scale_linear", "scaling.type", "scaling.factor",
    "scaling.original_context_length", "scaling.attn_factor", "scaling.finetuned", "scaling.yarn_attn_factor", "scaling.yarn_ext_factor",
    "scaling.yarn_beta_fast", "scaling.yarn_beta_slow", "scaling.yarn_log_multiplier",
}  # fmt: skip
OTHER_NAMES = {"global.freq_base": "freq_base", "local.freq_base": "freq_base_swa"}  # in files that Ollama made
LOW, HIGH = 1.0, 4.0  # turns in the original window below which Llama 3 divides a frequency by the whole factor, and above which by none
USUAL = (8192, *(2**n for n in range(9, 18)))  # original windows
WIDE = {("gemma2", 46), ("gemma3_text", 62)}  # the 27B models scale queries by another width; files do not say, and llama.cpp goes by the layers, too
SLIDE_WHERE_SAID = {"gemma3_text", "mistral"}  # a file without a window means that no layer slides; Transformers has one by default
ADVICE = "load the safetensors that it was made from"


class Unreadable(ValueError):
    """What is wrong with a file. The sentence ends in the fix."""


def number(said: Mapping[str, Any], key: str, zero: bool = False) -> Any:
    """None where it is not said. Raises Unreadable for lists, words, infinity and what is not positive."""
    value = said.get(key)
    if value is None:
        return None
    if type(value) not in (int, float):
        raise Unreadable(f"its metadata has {value!r} for {key}, where one number belongs; download the file again")
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise Unreadable(f"its metadata has {value} for {key}, which cannot be; download the file again")
    return value


def complete(config: Any, said: Mapping[str, Any], vectors: Mapping[str, np.ndarray]) -> None:
    """Write it into a configuration, in place.

    said     the metadata without the name of the architecture before each key.
    vectors  those of VECTORS that the file has.

    Raises Unreadable for what cannot be, and for frequencies that no rule of Transformers makes.
    """
    attention(config, said)
    if not isinstance(getattr(config, "rope_parameters", None), dict):  # no rotary embedding
        return
    rope = copy.deepcopy(config.rope_parameters)  # it may be the default of every configuration
    own = rope.get("full_attention", rope)
    spoken = {key.removeprefix("rope."): value for key, value in said.items() if key.startswith("rope.")}
    spoken = {OTHER_NAMES.get(key, key): value for key, value in spoken.items()}
    if own.get("rope_type", "default") != "default" and "scaling.type" not in spoken:  # a rule of the family, of which files say nothing
        return
    if unknown := sorted(spoken.keys() - ROTARY):
        raise Unreadable(f"it says rope.{unknown[0]} of its rotary frequencies, which Transformers has no name for; {ADVICE}")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    own |= parameters(spoken, vectors, width, number(said, "context_length"), own)
    if rope is not own and "sliding_attention" in rope and (base := number(spoken, "freq_base_swa")) is not None:
        rope["sliding_attention"]["rope_theta"] = base
    if "original_max_position_embeddings" in own and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = own["original_max_position_embeddings"]
    config.rope_parameters = rope
    config.validate_rope()


def attention(config: Any, said: Mapping[str, Any]) -> None:
    """Sliding windows, soft-caps, and the scale of queries. A window or a soft-cap of 0 is none."""
    for name in CAPS:
        if name in said and hasattr(config, name):
            setattr(config, name, number(said, name, zero=True) or None)
    if config.model_type in ("gemma2", "gemma3_text"):
        wide = (config.model_type, config.num_hidden_layers) in WIDE
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if wide else config.head_dim
    window = number(said, "attention.sliding_window", zero=True)
    if not hasattr(config, "sliding_window") or (window is None and config.model_type not in SLIDE_WHERE_SAID):
        return
    if window:
        config.sliding_window = window
    elif getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * len(config.layer_types)
    else:
        config.sliding_window = None


def parameters(spoken: Mapping[str, Any], vectors: Mapping[str, np.ndarray], width: int, window: int | None, own: Mapping[str, Any]) -> dict[str, Any]:
    """What Transformers calls `rope_parameters`, as far as the file says it. `width`: of a head. `window`: the one that the file states."""
    made: dict[str, Any] = {}
    if (base := number(spoken, "freq_base")) is not None:
        made["rope_theta"] = base
    rotated = int(width * own.get("partial_rotary_factor", 1.0))
    if (count := number(spoken, "dimension_count")) is not None and count != rotated:
        made["partial_rotary_factor"], rotated = count / width, count
    for name, vector in vectors.items():
        if len(vector) != rotated // 2 or not np.isfinite(vector).all() or (vector <= 0).any():
            raise Unreadable(f"its {name} is not one positive number for each of {rotated // 2} frequencies; download the file again")
    scale = number(spoken, "scaling.attn_factor") or 1.0  # of cos and sin
    if SHORT in vectors or LONG in vectors or spoken.get("scaling.type") == "longrope":
        return made | longrope(spoken, vectors, window)
    kind, factor = spoken.get("scaling.type", "linear"), number(spoken, "scaling.factor") or number(spoken, "scale_linear")
    if kind == "yarn":
        return made | yarn(spoken, factor, number(spoken, "scaling.original_context_length") or window, scale)
    if kind not in ("linear", "none"):
        raise Unreadable(f"it scales its frequencies by the unknown rule {kind!r}; {ADVICE}")
    if scale != 1:
        raise Unreadable(f"it multiplies cos and sin by {scale}, for which Transformers has no name under this rule; {ADVICE}")
    scaled = kind == "linear" and factor not in (None, 1)
    if (divisors := vectors.get(DIVISORS)) is not None and not np.allclose(divisors, 1):
        if scaled:
            raise Unreadable(f"it has both {DIVISORS} and frequencies that are scaled by {factor}; {ADVICE}")
        return made | llama3(divisors, base or own["rope_theta"])
    return made | ({"rope_type": "linear", "factor": factor} if scaled else {})


def longrope(spoken: Mapping[str, Any], vectors: Mapping[str, np.ndarray], window: int | None) -> dict[str, Any]:
    """Without a factor of cos and sin, Transformers computes Phi 3's."""
    original = number(spoken, "scaling.original_context_length") or window
    if SHORT not in vectors or LONG not in vectors or original is None:
        raise Unreadable(f"it scales its frequencies by the rule 'longrope' and lacks {SHORT}, {LONG} or the original window; {ADVICE}")
    made = {"rope_type": "longrope", "short_factor": vectors[SHORT].tolist(), "long_factor": vectors[LONG].tolist()}
    made["original_max_position_embeddings"] = original
    return made | ({"attention_factor": spoken["scaling.attn_factor"]} if "scaling.attn_factor" in spoken else {})


def yarn(spoken: Mapping[str, Any], factor: float | None, original: int | None, scale: float) -> dict[str, Any]:
    """YaRN's own factor of cos and sin is computed, as in llama.cpp, and multiplied by what the file says beside it."""
    if factor is None or original is None:
        raise Unreadable(f"it scales its frequencies by YaRN and does not say by how much, or from which window; {ADVICE}")
    if (more := spoken.get("scaling.yarn_ext_factor", 1.0)) not in (1.0, -1.0):
        raise Unreadable(f"it scales its frequencies by YaRN with an extrapolation factor of {more}, which Transformers does not have; {ADVICE}")
    made = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if (value := number(spoken, f"scaling.yarn_{name}")) is not None:
            made[name] = value
    computed, log = 0.1 * math.log(max(1.0, factor)) + 1, number(spoken, "scaling.yarn_log_multiplier")
    if log is not None:
        computed /= 0.1 * log * math.log(max(1.0, factor)) + 1
    if log is not None or scale != 1:
        made["attention_factor"] = scale * computed
    if (other := number(spoken, "scaling.yarn_attn_factor")) is not None and not math.isclose(other, computed, rel_tol=1e-3):
        warnings.warn(
            f"the file's yarn_attn_factor of {other:.4g} may replace YaRN's own factor or multiply it; as in llama.cpp, neither is done, and it is "
            f"{computed:.4g}. The model's own configuration tells: {ADVICE} if it states an attention_factor", UserWarning, stacklevel=2,
        )  # fmt: skip
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
    raise Unreadable(f"its {DIVISORS} divides the frequencies by another rule than Llama 3's; {ADVICE}")
