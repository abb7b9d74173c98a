"""A GGUF file as an ordinary model: the header, checked before anything trusts it, and the weights one tensor at a time.

Knows the format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), how Transformers converts one, and how to keep its memory small.

Transformers reads the whole vocabulary again for the configuration, the tokenizer and the weights, maps the file into memory, and holds every weight in fp32.
Here the configuration comes from a copy of the header without lists and weights, and a weight is read, turned into fp32 and into its dtype before the next one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch

from longreach import gguf_positions
from longreach.gguf_positions import Unreadable

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # the first version counted in 32 bits; big-endian files say 2 or 3 the other way round
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4
ALIGNMENT = 32  # of the weights, where the file does not say
CHUNK = 2**22  # numbers turned into fp32 at a time


class Length(int):
    """Of a list in the metadata, which is not kept."""


@dataclass(frozen=True)
class Stored:
    """One tensor: `rows` of `row` bytes each from byte `start` of the file on."""

    name: str
    shape: tuple[int, ...]
    kind: int  # ggml's number of the type
    start: int
    rows: int
    row: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    facts    metadata; a list is given as its length.
    entries  the same as they stand in the file.
    """

    version: int
    facts: dict[str, Any]
    entries: dict[str, bytes]
    tensors: tuple[Stored, ...]

    @property
    def architecture(self) -> str:
        return str(self.facts["general.architecture"])

    @property
    def said(self) -> dict[str, Any]:
        """What is said of the architecture, without its name before each key."""
        return {key.removeprefix(f"{self.architecture}."): value for key, value in self.facts.items() if key.startswith(f"{self.architecture}.")}


def is_gguf(file: Path) -> bool:
    """By its first bytes: the name is a habit."""
    with file.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def check_packages(*names: str) -> None:
    """Raises ValueError, with the fix, if one that Transformers reads such files with is not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise ValueError(f"reading a GGUF file needs {' and '.join(missing)}; pip install 'longreach[interop]'")


def header(file: Path) -> Header:
    """Read and check the header. Raises Unreadable if it is not that of a whole file."""
    import mmap

    with file.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise Unreadable("it does not begin with the letters GGUF; name a GGUF file")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data).header()
            except (struct.error, UnicodeDecodeError, KeyError, OverflowError) as error:
                raise Unreadable("its header is cut off or damaged; download the file again") from error


class _Reader:
    """A place in the bytes of a file. Every length is checked against what is left, so that a forged one ends here."""

    def __init__(self, data: Any) -> None:
        self.data, self.at = data, 0

    def unpack(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def skip(self, count: int) -> int:
        """-> where it was."""
        if count > len(self.data) - self.at:
            raise Unreadable(f"its header speaks of {count} bytes where {len(self.data) - self.at} are left; download the file again")
        self.at += count
        return self.at - count

    def string(self) -> str:
        start = self.skip(*self.unpack("Q"))
        return bytes(self.data[start : self.at]).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])[0]
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise Unreadable(f"its metadata has a value of the unknown type {kind}; download the file again")
        inner, count = self.unpack("IQ")
        if inner in SCALARS:
            self.skip(count * struct.calcsize(SCALARS[inner]))
        elif inner == STRING:
            for _ in range(count):
                self.skip(*self.unpack("Q"))
        else:
            raise Unreadable(f"its metadata has a list of the unknown type {inner}; download the file again")
        return Length(count)

    def header(self) -> Header:
        self.at = len(MAGIC)
        version, tensors, count = self.unpack("IQQ")
        if version not in VERSIONS:
            raise Unreadable(f"it is of version {version}, and {' and '.join(map(str, VERSIONS))} are read; convert the model anew with llama.cpp")
        facts, entries = {}, {}
        for _ in range(count):
            start = self.at
            key = self.string()
            facts[key] = self.value(*self.unpack("I"))
            entries[key] = bytes(self.data[start : self.at])
        infos = [(self.string(), self.unpack(f"{self._dimensions()}Q"), *self.unpack("IQ")) for _ in range(tensors)]
        alignment = facts.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise Unreadable(f"it aligns its weights to {alignment!r} bytes; download the file again")
        if len({name for name, *_ in infos}) < len(infos):
            raise Unreadable("it has two tensors of one name; download the file again")
        begin = -(-self.at // alignment) * alignment
        stored = tuple(self._stored(name, dims, kind, begin + offset) for name, dims, kind, offset in infos)
        if not isinstance(facts["general.architecture"], str):  # every file has one: KeyError is a damaged header
            raise Unreadable("it does not name its architecture; download the file again")
        if (parts := facts.get("split.count", 1)) > 1:
            raise Unreadable(f"it is one of {parts} parts of a model; join them with llama-gguf-split --merge")
        return Header(version, facts, entries, stored)

    def _dimensions(self) -> int:
        (count,) = self.unpack("I")
        if not 1 <= count <= MOST_DIMENSIONS:
            raise Unreadable(f"it has a tensor of {count} dimensions; download the file again")
        return int(count)

    def _stored(self, name: str, dims: tuple[int, ...], kind: int, start: int) -> Stored:
        from gguf import GGML_QUANT_SIZES

        if kind not in GGML_QUANT_SIZES:
            raise Unreadable(f"{name} is of the unknown type {kind}; update the gguf package, or take a file of another quantisation")
        block, width = GGML_QUANT_SIZES[kind]  # type: ignore[index]  # an IntEnum
        row, rest = divmod(dims[0], block)
        rows = prod(dims[1:])
        if rest or not row or not rows:
            raise Unreadable(f"{name} has the impossible shape {dims}; download the file again")
        if start + rows * row * width > len(self.data):
            raise Unreadable(f"{name} would end at byte {start + rows * row * width} of {len(self.data)}: the file is cut off; download it again")
        return Stored(name, dims[::-1], kind, start, rows, row * width)


def streamed_by_transformers(architecture: str) -> bool:
    """Newer versions convert some architectures tensor by tensor themselves, and by other rules."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:
        return False
    return architecture in GGUF_CONFIG_ARCHS


def configuration(file: Path, found: Header) -> Any:
    """What Transformers makes of the metadata, and what it leaves out. Raises Unreadable for frequencies that it cannot express."""
    from transformers import AutoConfig

    if streamed_by_transformers(found.architecture):
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    else:
        with TemporaryDirectory() as folder:
            (Path(folder) / "sketch.gguf").write_bytes(sketch(found))
            config = AutoConfig.from_pretrained(folder, gguf_file="sketch.gguf")
    vectors = {tensor.name: _fp32(file, tensor).reshape(-1) for tensor in found.tensors if tensor.name in gguf_positions.VECTORS}
    gguf_positions.complete(config, found.said, vectors)
    return config


def sketch(found: Header) -> bytes:
    """A GGUF file of the same metadata without the lists of the vocabulary, which cost seconds, and with one number in place of every weight."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    known = GGUF_CONFIG_MAPPING.get(found.architecture, {})
    counted = "vocab_size" not in known or f"{found.architecture}.vocab_size" not in found.facts  # then Transformers counts the words
    lists = {key for key in found.facts if key.startswith("tokenizer.ggml.") and isinstance(found.facts[key], Length)}
    kept = [entry for key, entry in found.entries.items() if key not in lists or (counted and key == "tokenizer.ggml.tokens")]
    names = [tensor.name.encode() for tensor in found.tensors]
    made = MAGIC + struct.pack("<IQQ", found.version, len(names), len(kept)) + b"".join(kept)
    made += b"".join(struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 1, 0, 0) for name in names)
    return made + bytes(-len(made) % found.facts.get("general.alignment", ALIGNMENT)) + bytes(4)


def model(file: Path, found: Header, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """-> (the model, bit-equal to what Transformers' own loader makes of the file; what its loader says of names that were missing or left over)."""
    from transformers import AutoModelForCausalLM

    config = configuration(file, found)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    rotated = {2 * buffer.shape[-1] for name, buffer in empty.named_buffers() if name.endswith("inv_freq")}
    if rotated and (count := found.said.get("rope.dimension_count", min(rotated))) not in rotated:
        raise Unreadable(f"{count} dimensions of its heads rotate, and {min(rotated)} would in Transformers; {gguf_positions.ADVICE}")
    made, info = type(empty).from_pretrained(None, config=config, state_dict=weights(file, found, empty, dtype), dtype=dtype, output_loading_info=True)
    made.name_or_path = made.config.name_or_path = str(file)
    return made, info


def weights(file: Path, found: Header, empty: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The weights by their names in the model `empty`."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    processor = TENSOR_PROCESSORS.get(found.architecture, TensorProcessor)(config=empty.config.to_dict())
    names = names_of(empty, processor)
    made: dict[str, torch.Tensor] = {}
    # The largest while little else is there: the fp32 copy of one tensor is what comes on top of the weights.
    for tensor in sorted(found.tensors, key=lambda tensor: -prod(tensor.shape)):
        converted = processor.process(
            weights=_fp32(file, tensor), name=tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": made}
        )  # may put parts of fused weights into `made` itself
        if converted.name in names:
            made[names[converted.name]] = torch.from_numpy(converted.weights)
        del converted
        for name in [name for name, value in made.items() if value.dtype != dtype]:
            made[name] = made[name].to(dtype)
    return made


def names_of(model: Any, processor: Any) -> dict[str, str]:
    """{name in the file: name in the model}. Transformers' own map, of the model and of its trunk: it would walk through every module, which takes minutes for
    deep models and adds nothing."""
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    found: dict[str, str] = {}
    for part, prefix in ((model.base_model, f"{model.base_model_prefix}."), (model, "")):
        alone = SimpleNamespace(config=model.config, state_dict=part.state_dict, named_children=list)
        found |= get_gguf_hf_weights_map(alone, processor, qual_name=prefix)
    return found


def _fp32(file: Path, tensor: Stored) -> Any:
    """The numbers of one tensor, [*shape]. Read, not mapped: pages of a map count as memory in use."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    made = np.empty((tensor.rows, tensor.shape[-1]), np.float32)
    for first, last in _cuts(tensor.rows, max(1, CHUNK // tensor.shape[-1])):
        raw = np.fromfile(file, np.uint8, (last - first) * tensor.row, offset=tensor.start + first * tensor.row)
        made[first:last] = dequantize(raw.reshape(last - first, tensor.row), GGMLQuantizationType(tensor.kind))
    return made.reshape(tensor.shape)


def _cuts(count: int, step: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, step):
        yield first, min(first + step, count)
