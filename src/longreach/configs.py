"""What a configuration of Transformers says of a model: its trained window, its rotary scaling, how every layer attends, its sizes; and where to find one.

The only reader of such facts: the dial, the cost model and the seam ask here. Knows the names that families give them; no weights, no forwards.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from longreach import gguf_file, gguf_positions
from longreach.methods.base import Method
from longreach.methods.stock import Stock

WINDOWS = ("max_position_embeddings", "max_seq_len", "seq_length")  # the second is MPT's, the third BLOOM's, where a checkpoint has it
SIZES = ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k")
KEYS_AND_VALUES = {"full_attention", "sliding_attention", "chunked_attention"}  # kinds of layers whose bytes are counted
STATES = {"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding", "recurrent", "indexed_attention"}  # kinds that no method can be attached to

EMBEDDED = "nano"
KINDS = "a folder with config.json, tokenizer files and *.safetensors, a GGUF file, the id of a model on the Hub such as 'owner/name', or 'nano'"
DTYPES = {
    "float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip
LONGEST_REASON = 300  # characters of what a library says of its own error


# -- positions ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """How many tokens a model was trained to read, after any scaling, and how that was read from its configuration."""

    tokens: int
    reason: str
    base: float | None = None  # of the rotary frequencies; None: not stated, or the window was given


@dataclass(frozen=True)
class Scaling:
    """How one kind of layer rotates, as it is written down: `kind` is Transformers' rope_type, `original` the window before it was scaled."""

    kind: str
    factor: float | None
    original: int | None
    base: float | None


def trained_window(config: Any, given: int | None = None) -> Window:
    """The effective trained window of a text configuration, or the one that is `given` in its place."""
    if given is not None:
        return Window(given, "given")
    name, largest = stated_window(config)
    window, rope = Window(largest, f"{name} {largest}"), scaling(config)
    if rope.factor and rope.original and rope.kind in ("yarn", "linear") and int(rope.original * rope.factor) > largest:
        window = Window(int(rope.original * rope.factor), f"{rope.kind} scaling: {rope.original} x {rope.factor:g}")
    elif rope.factor and not rope.original and rope.kind == "linear":
        # some checkpoints give the window before scaling here, some after it: the smaller reading is safe
        window = Window(largest, f"max_position_embeddings {largest}; with its linear scaling by {rope.factor:g} it may be more: then pass trained_window=N")
    sliding = {layer.sliding_window for layer in trained_layers(config)}
    if len(sliding) == 1 and (width := sliding.pop()) is not None and width < window.tokens:
        window = Window(width, f"sliding window of every layer, {width}: no layer was trained on a larger distance")
    return replace(window, base=rope.base)


def stated_window(config: Any, otherwise: int | None = None) -> tuple[str, int]:
    """(the name that the configuration gives it, tokens). Raises ValueError where there is none, and nothing was given `otherwise`."""
    for name in WINDOWS:
        if isinstance(found := getattr(config, name, None), int) and found > 0:
            return name, found
    if otherwise is None:
        raise ValueError(f"the model's configuration has no {WINDOWS[0]}; pass trained_window=N")
    return "given", otherwise


def scaling(config: Any, layer_type: str = "full_attention") -> Scaling:
    """Of one kind of layer, from the flat or the nested form."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if isinstance(own := rope.get(layer_type), dict):
        rope = own
    base = rope.get("rope_theta") or getattr(config, "rope_theta", None) or getattr(config, "default_theta", None)
    return Scaling(rope.get("rope_type", "default"), rope.get("factor"), rope.get("original_max_position_embeddings"), base)


def original_window(config: Any, layer_type: str = "full_attention", otherwise: int | None = None) -> int:
    """The window before any scaling: positions below it use a checkpoint's short frequencies."""
    return int(scaling(config, layer_type).original or getattr(config, "original_max_position_embeddings", None) or stated_window(config, otherwise)[1])


# -- layers -------------------------------------------------------------------------------------------------------------------------


def layer_types(config: Any) -> list[str | None]:
    """The kind of every layer by Transformers' names; None where the configuration does not say."""
    count = getattr(config, "num_hidden_layers", None)
    return list(getattr(config, "layer_types", None) or [None] * (count if isinstance(count, int) else 1))


def trained_layers(config: Any) -> tuple[Stock, ...]:
    """How every layer attends by itself: to everything, in a sliding window, or in chunks."""
    window, chunk = first_of(config, ("sliding_window",)), first_of(config, ("attention_chunk_size",)) or None
    sliding = Stock(window) if window and getattr(config, "use_sliding_window", True) is not False else Stock()
    kinds = {None: sliding, "sliding_attention": sliding, "chunked_attention": Stock(attention_chunk=chunk)}
    return tuple(kinds.get(kind, Stock()) for kind in layer_types(config))


def methods_of(trained: Sequence[Stock], method: Method) -> list[Method]:
    """What each layer runs: those that slide or attend in chunks stay as trained, unless every layer slides; then the method takes them all."""
    overridden = all(own.sliding_window is not None for own in trained) and not isinstance(method, Stock)
    return [method if own == Stock() or overridden else own for own in trained]


def refuse_unsupported(config: Any) -> None:
    """Layers that no method can be attached to."""
    if found := STATES.intersection(layer_types(config)):
        raise ValueError(f"the model has layers of type {', '.join(sorted(found))}, whose state has no positions to extend; use a full-attention model")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError("the model shares keys and values between layers, which the store does not follow; use a model without shared layers")


# -- sizes --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attention:
    """One attention layer: what its attention call gets per token, and how it was trained."""

    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    trained: Stock

    @property
    def reach(self) -> int | None:
        """The most keys that a query of the trained layer sees; None: all."""
        return self.trained.sliding_window or self.trained.attention_chunk

    @property
    def entry(self) -> int:
        """Values of one key and one value of one token."""
        return self.kv_heads * (self.key_width + self.value_width)


@dataclass(frozen=True)
class Decoder:
    """Layers and widths at a dtype: enough for the bytes of keys and values. Tests compare them with the modules."""

    name: str
    dtype: torch.dtype
    hidden: int
    intermediate: int  # width of the feed-forward part that a token meets, all its experts together
    vocabulary: int
    layers: tuple[Attention, ...]
    latent: int | None = None  # MLA: values per token and layer of the compressed cache, which the attention call does not see
    shared_key: int = 0  # MLA: width of the rotated part of a key, which the heads share
    experts: int = 0  # per layer
    experts_per_token: int = 0

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in every layer, each once."""
        return sum(layer.entry for layer in self.layers) * self.itemsize


def decoder(config: Any, dtype: torch.dtype) -> Decoder:
    """Raises ValueError for layers that cannot be counted."""
    refuse_unsupported(config)
    if unknown := set(layer_types(config)) - KEYS_AND_VALUES - {None}:
        kinds = ", ".join(sorted(map(str, unknown)))
        raise ValueError(f"the model has layers of type {kinds}, whose cost is not known here; plan a model of full, sliding or chunked attention")
    for name in SIZES:
        if not isinstance(getattr(config, name, None), int):
            raise ValueError(f"the {config.model_type} configuration has no {name}, so its layers cannot be counted; pass that of a decoder")
    width = first_of(config, ("intermediate_size", "ffn_dim")) or 4 * config.hidden_size
    experts, chosen = first_of(config, EXPERTS), first_of(config, EXPERTS_PER_TOKEN)
    if experts and chosen:
        width = (first_of(config, ("moe_intermediate_size",)) or width) * chosen
    heads, latent, shared = config.num_attention_heads, None, 0
    if rank := first_of(config, ("kv_lora_rank",)):  # MLA: latents are expanded before attention, one key per query head
        latent, shared = rank + config.qk_rope_head_dim, config.qk_rope_head_dim
        kv_heads, key, value = heads, config.qk_nope_head_dim + shared, config.v_head_dim
    else:
        kv_heads = first_of(config, ("num_key_value_heads",)) or falcon_groups(config) or heads
        key = value = first_of(config, ("head_dim",)) or config.hidden_size // heads
    return Decoder(
        name=config.model_type,
        dtype=dtype,
        hidden=config.hidden_size,
        intermediate=max(width) if isinstance(width, list) else width,
        vocabulary=config.vocab_size,
        layers=tuple(Attention(heads, kv_heads, key, value, trained) for trained in trained_layers(config)),
        latent=latent,
        shared_key=shared,
        experts=experts,
        experts_per_token=chosen,
    )


def first_of(config: Any, names: Sequence[str]) -> Any:
    """The first of these that the configuration states, 0 if none."""
    try:
        return next((n for name in names if (n := getattr(config, name, None))), 0)
    except RuntimeError as error:  # Transformers' own, where layers differ in it
        raise ValueError(f"the layers of this {config.model_type} differ in {' or '.join(names)}; plan a model whose layers are alike") from error


def falcon_groups(config: Any) -> int | None:
    """Falcon names its groups otherwise, and one flag stands for a single group."""
    single = 1 if getattr(config, "multi_query", False) else None
    return int(config.num_kv_heads) if getattr(config, "new_decoder_architecture", False) else single


def text_part(config: Any, dtype: torch.dtype | None) -> tuple[Any, torch.dtype, tuple[str, ...]]:
    """-> (the decoder's own configuration without quantisation, at which dtype, what that leaves out). `dtype` goes before the stated one."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is an encoder-decoder; plan covers decoder-only causal language models")
    text, notes = copy.deepcopy(config.get_text_config()), []
    if text.model_type != config.model_type:
        notes.append(f"{config.model_type} wraps a text model; only its text model ({text.model_type}) is counted")
    if getattr(config, "quantization_config", None) is not None or getattr(text, "quantization_config", None) is not None:
        notes.append("the checkpoint is quantised; its weights are counted unquantised, so that less memory may do")
        text.quantization_config = None
        del text.quantization_config
    stated = getattr(text, "dtype", None) or getattr(config, "dtype", None)
    if dtype is None and stated is None:
        notes.append("the configuration states no dtype; float32 is counted, pass --dtype for another")
    return text, dtype or stated or torch.float32, tuple(notes)


# -- by name ------------------------------------------------------------------------------------------------------------------------


def load(model: Any, config: str | Path | dict[str, Any] | None = None) -> tuple[Any, str]:
    """-> (the configuration of a model, or the one in its place, what to call the model). No weights are read."""
    from transformers import AutoConfig, PretrainedConfig

    if isinstance(model, PretrainedConfig) and config is None:
        return model, model.name_or_path or model.model_type
    if not isinstance(model, str):
        raise ValueError(f"{model!r} is not a model; pass a name, a folder or a Transformers configuration")
    if config is not None:
        data = config if isinstance(config, dict) else content(Path(config).expanduser())
        if not data.get("model_type"):
            raise ValueError('a configuration names its architecture; add "model_type", such as "llama"')
        shown = "config" if isinstance(config, dict) else str(config)
        with reading(shown, "it is no configuration that Transformers knows; update transformers, or pass that of another model"):
            made = AutoConfig.for_model(**data)
        shown = str(Path(config).expanduser().parent) if isinstance(config, str | Path) else made.model_type
        return made, shown if model == EMBEDDED else model
    if embedded(model):
        with as_file(files("longreach") / "nano") as folder:
            return AutoConfig.from_pretrained(str(folder)), model
    file, folder = gguf_of(model), Path(model).expanduser()
    if file is not None:
        gguf_file.check_packages("gguf")
    with reading(model, "pass a folder with config.json, a GGUF file, a public id on the Hub, or --config FILE"):
        if file is not None:
            return gguf_file.configuration(file, gguf_file.header(file)), model
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else model, trust_remote_code=False), model


def embedded(name: Any) -> bool:
    """Whether it means the model that comes with the package. A folder of that name goes before it."""
    return isinstance(name, str) and name == EMBEDDED and not Path(name).exists()


def content(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r} ({error.strerror}); pass the config.json of a model") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); pass the config.json of a model") from None
    if not isinstance(data, dict):
        raise ValueError(f"{str(path)!r} holds no JSON object; pass the config.json of a model")
    return data


def gguf_of(name: str) -> Path | None:
    """The GGUF file that a name means; None where it means something else. Raises ValueError if it is a path that means nothing."""
    path = Path(name).expanduser()
    if not name.strip():
        raise ValueError(f"there is no model without a name; pass {KINDS}")
    if path.is_dir():
        if any(path.glob("*.safetensors")):
            return None
        found = sorted(file for file in path.iterdir() if file.is_file() and gguf_file.is_gguf(file))
        if len(found) > 1:
            raise ValueError(f"{name!r} holds {len(found)} GGUF files; name one of them: {', '.join(str(file) for file in found[:8])}")
        return found[0] if found else None
    if path.is_file():
        if gguf_file.is_gguf(path):
            return path
        fix = f"name its folder, {str(path.parent)!r}" if path.suffix == ".safetensors" else f"pass {KINDS}"
        raise ValueError(f"{name!r} is no GGUF file, for it does not begin with the letters GGUF; {fix}")
    if path.suffix.lower() == ".gguf":
        raise ValueError(f"there is no file {name!r}; pass {KINDS}")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"there is no folder {name!r}; pass {KINDS}")
    return None


@contextmanager
def reading(shown: str, advice: str, lacking: Callable[[], str | None] = lambda: None) -> Iterator[None]:
    """Whatever a reader of foreign files meets becomes one sentence that ends in a fix. What is `lacking` is looked for once they could not be read."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise
        own = str(error) if isinstance(error, gguf_positions.Unreadable) else f"{lacking() or sentence(error)}; {advice}"
        raise ValueError(f"could not load {shown!r}: {own}") from error


def sentence(error: Exception) -> str:
    """What an error says, in whole sentences."""
    text = " ".join(str(error).split()).removesuffix(".") or type(error).__name__
    if len(text) <= LONGEST_REASON:
        return text
    ends = [match.start() for match in re.finditer(r"[.;] ", text) if match.start() <= LONGEST_REASON]
    return text[: ends[-1]] if ends else text[:LONGEST_REASON].rsplit(" ", 1)[0] + " ..."


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of: {', '.join(DTYPES)}")
    return DTYPES[dtype]
