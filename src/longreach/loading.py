"""Loading a model: the embedded one, a Hub id, a local folder or a GGUF file.

Knows Transformers' loaders. Weights come from safetensors or GGUF only, and code of a checkpoint is never run.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

EMBEDDED = "nano"


def load(name: str = EMBEDDED, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None) -> tuple[Any, Any]:
    """-> (model, tokenizer), in eval mode.

    name    "nano", the id of a model on the Hugging Face Hub, a folder with a model in the format of Transformers, or a GGUF file,
            whose weights Transformers turns into ordinary ones.
    dtype   a torch dtype or its name; None is fp32 for nano and GGUF, and the checkpoint's own for every other model.
    device  where the model goes; None is the CPU.

    Raises ValueError, with the fix, if there is no such model or it has no safetensors.
    """
    dtype = parse_dtype(dtype)
    if name == EMBEDDED and not Path(name).exists():
        with as_file(files("longreach") / "nano") as folder:
            if not (folder / "model.safetensors").exists():
                raise ValueError("this installation lacks the files of nano; reinstall longreach, or pass a folder or a Hub id")
            return _load(str(folder), dtype or torch.float32, device, "nano")
    if Path(name).suffix.lower() == ".gguf":
        return _load_gguf(Path(name).expanduser(), dtype or torch.float32, device)
    if (Path(name).is_absolute() or name.startswith((".", "~"))) and not Path(name).expanduser().is_dir():
        raise ValueError(f"there is no folder {name!r}; pass a folder with config.json and *.safetensors, a Hub id such as 'owner/name', or 'nano'")
    return _load(str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name, dtype, device, name)


def _load_gguf(file: Path, dtype: torch.dtype, device: str | torch.device | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = _device(device)
    if not file.is_file():
        raise ValueError(f"there is no file {str(file)!r}; pass the path of a GGUF file, a folder, a Hub id such as 'owner/name', or 'nano'")
    if missing := [name for name in ("gguf", "accelerate") if find_spec(name) is None]:
        raise ValueError(f"reading a GGUF file needs {' and '.join(missing)}; pip install 'longreach[interop]'")
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # readers of a foreign format meet anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"could not load {str(file)!r}: {reason} -- pass a whole GGUF file of an architecture that Transformers converts") from error
    return model.to(where).eval(), tokenizer


def _device(device: str | torch.device | None) -> torch.device:
    where = torch.device(device or "cpu")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but this PyTorch sees no CUDA device; pass device='cpu'")
    return where


def _load(source: str, dtype: torch.dtype | None, device: str | torch.device | None, shown: str) -> tuple[Any, Any]:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = _device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"could not load {shown!r}: {reason} -- pass a folder with config.json, tokenizer files and *.safetensors, or the id of a public model on the Hub"
        ) from error
    return model.to(where).eval(), tokenizer


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    names = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
    if dtype not in names:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of: {', '.join(names)}")
    return names[dtype]


def shipped_book() -> str:
    """The public-domain book that comes with nano, which never saw it in training: Moby-Dick, complete."""
    import lzma

    return lzma.decompress((files("longreach") / "nano" / "book.txt.xz").read_bytes()).decode("utf-8")
