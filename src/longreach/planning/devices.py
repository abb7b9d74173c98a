"""The device that a name means: a card, this machine as it was measured, or what a TOML file describes.

Knows names, units and the sentences that mend a file; hardware.py says what a device is.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Any

from longreach.planning import calibration as measured
from longreach.planning.hardware import CARDS, DISK, Hardware
from longreach.planning.theory import GIB
from longreach.quantities import UNITS

DTYPES = ("bfloat16", "float16", "float32")


def find(name: str, calibration: Path | None = None) -> Hardware:
    """A card by its name in any case, `cpu` or `cuda` of this machine as it was calibrated, or a TOML file."""
    known = {key.lower(): value for key, value in CARDS.items()}
    if name.lower() in known:
        return known[name.lower()]
    if name.lower() in ("cpu", "cuda"):
        return measured.hardware(name.lower(), calibration)
    if name.endswith(".toml"):
        return from_toml(Path(name).expanduser())
    near = difflib.get_close_matches(name.lower(), [*known, "cpu", "cuda"], 1)
    hint = f"did you mean {known[near[0]].name if near[0] in known else near[0]}? " if near else ""
    raise ValueError(f"unknown hardware {name!r}; {hint}choose one of {', '.join(CARDS)}, cpu, cuda, or pass a file such as my-card.toml")


EXAMPLE = 'memory = "24 GiB", flops = { bfloat16 = 165e12 }, memory_bandwidth = "1008 GB/s", host_link = "32 GB/s"'
REQUIRED = ("memory", "flops", "memory_bandwidth", "host_link")
OPTIONAL = ("name", "source", "reserved", "host_memory", "compute_efficiency", "memory_efficiency", "link_efficiency", "disk")


def from_toml(path: Path) -> Hardware:
    """A device from a file; every mistake is a sentence with the line to write instead."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r} ({error.strerror}); pass a TOML file with {EXAMPLE}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not TOML ({error}); write lines such as {EXAMPLE}") from None
    for key in data:
        if key not in REQUIRED + OPTIONAL:
            near = difflib.get_close_matches(key, REQUIRED + OPTIONAL, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{str(path)!r} has an unknown key {key!r}; {hint}known keys are {', '.join(REQUIRED + OPTIONAL)}")
    if missing := [key for key in REQUIRED if key not in data]:
        raise ValueError(f"{str(path)!r} lacks {' and '.join(missing)}; a whole file is {EXAMPLE}")
    return Hardware(
        name=text(data, "name", path.stem),
        memory=round(amount(data, "memory", '"24 GiB"')),
        flops=flops_of(data["flops"]),
        bandwidth=amount(data, "memory_bandwidth", '"1008 GB/s"'),
        link=amount(data, "host_link", '"32 GB/s"'),
        reserved=round(amount(data, "reserved", '"1 GiB"')) if "reserved" in data else GIB,
        source=text(data, "source", path.name),
        host_memory=round(amount(data, "host_memory", '"128 GiB"')) if "host_memory" in data else None,
        compute_efficiency=share(data, "compute_efficiency", 0.5),
        memory_efficiency=share(data, "memory_efficiency", 0.7),
        link_efficiency=share(data, "link_efficiency", 0.8),
        disk=amount(data, "disk", '"3 GB/s"') if "disk" in data else DISK,
    )


def text(data: dict[str, Any], key: str, default: str) -> str:
    value = data.get(key, default)
    if not isinstance(value, str) or not value:
        raise ValueError(f'{key} must be a text, not {value!r}; write {key} = "..."')
    return value


def amount(data: dict[str, Any], key: str, example: str) -> float:
    """A number of bytes or bytes/s: a number, or a text with its unit."""
    value = data[key]
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9.eE+]+)\s*([KMGT]?i?B)\s*(?:/s)?\s*", value, re.IGNORECASE)):
        try:
            value = float(match[1]) * UNITS[match[2].upper()]
        except ValueError:
            value = data[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{key} must be a positive number of bytes or a text with its unit, not {data[key]!r}; write {key} = {example}")
    return float(value)


def flops_of(value: Any) -> dict[str, float]:
    table = dict.fromkeys(DTYPES[:2], value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(table, dict) or not table or any(key not in DTYPES for key in table):
        raise ValueError(f"flops must be FLOP/s for {', '.join(DTYPES)}, not {value!r}; write flops = {{ bfloat16 = 165e12, float32 = 82e12 }}")
    for key, speed in table.items():
        if isinstance(speed, bool) or not isinstance(speed, int | float) or not 0 < speed < float("inf"):
            raise ValueError(f"flops.{key} must be FLOP/s, a positive number, not {speed!r}; write for example {key} = 165e12")
    return {key: float(speed) for key, speed in table.items()}


def share(data: dict[str, Any], key: str, default: float) -> float:
    value = data.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise ValueError(f"{key} is a share of the peak, above 0 and at most 1, not {value!r}; write {key} = 0.5")
    return float(value)
