"""What was measured on this machine: a small JSON file in the user's cache folder, written whole or not at all.

Knows the file and whether it still describes this machine; speedtest.py measures.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from longreach import files
from longreach.planning.hardware import Curve, Hardware, Speeds
from longreach.planning.machine import cache_folder, processor

VERSION = 1
AGAIN = "run longreach plan --calibrate once; it takes about a minute"


def default_path() -> Path:
    return cache_folder() / "calibration.json"


def facts(device: str) -> dict[str, Any]:
    """What the measured speeds depend on."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads() if device == "cpu" else None}


def save(hardware: Hardware, date: str, path: Path | None = None) -> Path:
    """Add or replace one device in the file."""
    path = path or default_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"version": VERSION, "devices": read(path).get("devices", {}) if path.exists() else {}}
    content["devices"][hardware.device] = {"date": date, "facts": facts(hardware.device), "hardware": dataclasses.asdict(hardware)}
    files.write(path, json.dumps(content, indent=1, allow_nan=False))
    return path


def read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"{str(path)!r} is not a calibration of this version of longreach; delete it and {AGAIN}")
    return content


def hardware(device: str, path: Path | None = None) -> Hardware:
    """This machine as it was measured. Raises if it was not, or is another one by now."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("this PyTorch sees no CUDA device; name a card such as A100-80 instead of cuda")
    path = path or default_path()
    entry = read(path)["devices"].get(device) if path.exists() else None
    if entry is None:
        where = " --device cuda" if device == "cuda" else ""
        raise ValueError(f"the speed of this machine's {device} was not measured yet; {AGAIN.replace('--calibrate', '--calibrate' + where)}")
    for name, now in facts(device).items():
        if entry["facts"].get(name) != now:
            raise ValueError(f"this machine was measured with {name} {entry['facts'].get(name)} and now has {now}; {AGAIN}")
    data = dict(entry["hardware"])
    data["measured"] = {name: speeds(values) for name, values in data["measured"].items()}
    return Hardware(**data)


def speeds(values: dict[str, Any]) -> Speeds:
    curves = {name: Curve(tuple((float(x), float(y)) for x, y in values[name]["points"])) for name in ("gemm", "gemv", "attention")}
    return Speeds(**{**values, **curves})
