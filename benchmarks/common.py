"""What every benchmark shares: facts about the machine, alternating timings, and JSON files that are whole or absent.

Knows nothing about attention. Facts name hardware and versions only: no host names, no paths outside the repository.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(name: str) -> torch.device:
    """The CPU, or the first card."""
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def facts(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, date and command line of this run."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", _inside(sys.argv[0]), *(_inside(argument) for argument in sys.argv[1:])]),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": device.type,
    }
    for package in ("torch", "transformers", "longreach"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source tree"
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _inside(argument: str) -> str:
    """Absolute paths are written relative to the repository, or by their name if they lie elsewhere."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _cpu_model() -> str:
    """The processor's name; family and model numbers too, because virtual machines often hide the name."""
    entries: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        name, _, value = line.partition(":")
        entries.setdefault(name.strip(), value.strip())
    numbers = ", ".join(f"{name} {entries[key]}" for name, key in (("family", "cpu family"), ("model", "model")) if key in entries)
    return f"{entries.get('model name', platform.machine())} ({numbers})" if numbers else entries.get("model name", platform.machine())


@dataclass
class Timing:
    """Seconds of one contestant, one entry per round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        return {"median": self.median, "mean": statistics.fmean(self.seconds), "min": min(self.seconds), "max": max(self.seconds), "seconds": self.seconds}


def alternate(contestants: dict[str, Callable[[], Any]], rounds: int, device: torch.device, warm_up: int = 1) -> dict[str, Timing]:
    """Run A, B, ... in turn, `rounds` times, so that drift of the machine hits all of them alike."""
    for _ in range(warm_up):
        for run in contestants.values():
            run()
    timings = {name: Timing() for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            timings[name].seconds.append(seconds_of(run, device))
    return timings


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3
    begin_time = time.perf_counter()
    run()
    return time.perf_counter() - begin_time


@dataclass(frozen=True)
class Ratio:
    """Ours over theirs: the ratio of medians, and the median over rounds of the ratio inside a round."""

    of_medians: float
    pairwise: float

    @classmethod
    def of(cls, ours: Timing, theirs: Timing) -> Ratio:
        pairs = [a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
        return cls(ours.median / theirs.median, statistics.median(pairs))

    def to_json(self) -> dict[str, float]:
        return {"of_medians": self.of_medians, "pairwise_median": self.pairwise}


@contextmanager
def one_thread() -> Iterator[None]:
    """Many small operations: on a busy machine every hand-over between threads costs a time slice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read_bandwidth(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes per second of reading a large fp32 buffer (best of five): what bounds decoding."""
    buffer = torch.ones(size // 4, device=device)
    best = min(seconds_of(buffer.sum, device) for _ in range(5))
    return size / best


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The whole file or the old one, never half of it. A number that is none, as a failed gate may measure, is written as its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n")
    os.replace(part, path)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return str(content) if isinstance(content, float) and not math.isfinite(content) else content


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table; numbers are formatted by the caller."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([cells[0].ljust(len(first)), *others]).rstrip()

    return "\n".join([title, line(header), line(["-" * width for width in widths]), *(line(row) for row in rows)])


def read_text(path: Path) -> str:
    """A plain or .xz text file."""
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")


def write_section(path: Path, name: str, content: str) -> None:
    """Put `content` between the lines `<!-- begin NAME -->` and `<!-- end NAME -->` of a Markdown file."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{path.name} has no section {name}: it needs the lines {begin} and {end}")
    part = path.with_name(path.name + ".part")
    part.write_text(f"{before}{begin}\n{content.strip()}\n{end}{after}", encoding="utf-8")
    os.replace(part, path)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
