"""Loading a model: the embedded one, a Hub id, a local folder or a GGUF file.

Knows Transformers' loaders. Weights come from safetensors or GGUF only, and code of a checkpoint is never run.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from longreach import gguf_file
from longreach.configs import EMBEDDED, KINDS, embedded, gguf_of, parse_dtype, reading


def load(name: str = EMBEDDED, *, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None) -> tuple[Any, Any]:
    """-> (model, tokenizer), in eval mode.

    name    "nano", the id of a model on the Hugging Face Hub, a folder with a model in the format of Transformers, or a GGUF file (of any
            name, or the only one in a folder), whose weights become ordinary ones.
    dtype   a torch dtype or its name; None is fp32 for nano and GGUF, and the checkpoint's own for every other model.
    device  where the model goes; None is the CPU.

    Raises ValueError, with the fix, if there is no such model, if it has no safetensors, or if it lacks weights of its architecture.
    """
    dtype, where, path = parse_dtype(dtype), _device(device), Path(name).expanduser()
    if embedded(name):
        with as_file(files("longreach") / "nano") as folder:
            if not (folder / "model.safetensors").exists():
                raise ValueError("this installation lacks the files of nano; reinstall longreach, or pass a folder or a Hub id")
            return _load(str(folder), dtype or torch.float32, where, "nano")
    if (file := gguf_of(name)) is not None:
        return _load_gguf(file, dtype or torch.float32, where)
    return _load(str(path) if path.is_dir() else name, dtype, where, name)


def _load_gguf(file: Path, dtype: torch.dtype, where: torch.device) -> tuple[Any, Any]:
    gguf_file.check_packages("gguf", "accelerate")
    from transformers import TOKENIZER_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    with reading(str(file), "pass a whole GGUF file of an architecture that Transformers converts"):
        header = gguf_file.header(file)
        if gguf_file.streamed_by_transformers(header.architecture):
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
            config = gguf_file.configuration(file, header)
            model, info = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
            )
        else:
            model, info = gguf_file.model(file, header, dtype)
            tokenizer = TOKENIZER_MAPPING.get(type(model.config), PreTrainedTokenizerFast).from_pretrained(file.parent, gguf_file=file.name)
        _whole(info)
    return model.to(where).eval(), tokenizer


def _device(device: str | torch.device | None) -> torch.device:
    try:
        where = torch.device(device or "cpu")
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}; pass device='cpu' or device='cuda'") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but this PyTorch sees no CUDA device; pass device='cpu'")
    return where


def _load(source: str, dtype: torch.dtype | None, where: torch.device, shown: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with reading(shown, f"pass {KINDS}", lambda: _lacking(Path(source))):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype or "auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        _whole(info)
    return model.to(where).eval(), tokenizer


def _whole(info: dict[str, Any]) -> None:
    """Transformers fills in weights that a checkpoint lacks with random numbers; then every answer is noise."""
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"it lacks {missing[0]}{more}, without which the model would answer at random")


def _lacking(folder: Path) -> str | None:
    """What a folder would need to be a model's."""
    if not folder.is_dir():
        return None
    wanted = {
        "config.json": ("config.json", "adapter_config.json"),
        "tokenizer files (such as tokenizer.json)": ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json"),
        "weights (*.safetensors)": ("*.safetensors",),
    }
    lacking = [what for what, patterns in wanted.items() if not any(any(folder.glob(pattern)) for pattern in patterns)]
    if not lacking:
        return None
    pickled = any(folder.glob("pytorch_model*.bin"))
    return f"the folder has no {' and no '.join(lacking)}" + (" (pickled weights are not read: convert them to safetensors)" if pickled else "")


def shipped_book() -> str:
    """The public-domain book that comes with nano, which never saw it in training: Moby-Dick, complete."""
    import lzma

    return lzma.decompress((files("longreach") / "nano" / "book.txt.xz").read_bytes()).decode("utf-8")
