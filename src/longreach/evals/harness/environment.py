"""What a run was made with: versions, hardware, the commit of this toolkit. Knows the machine; nothing about tasks or results."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("longreach", "torch", "transformers", "tokenizers", "numpy")


def now() -> str:
    """UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def describe(device: Any) -> dict[str, Any]:
    """`device` is the torch device that the model is on."""
    import torch

    found: dict[str, Any] = {name: _version(name) for name in PACKAGES}
    found |= {"python": platform.python_version(), "system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count()}
    found |= {"threads": torch.get_num_threads(), "device": device.type, "commit": commit()}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the source tree that this file lies in, with "+" where it was changed; None where it was installed from a package or there is no git."""
    folder = Path(__file__).resolve().parent
    if "site-packages" in folder.parts:
        return None
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changes else "")
