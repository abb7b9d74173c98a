"""This machine: how much memory it has and has free, what its processor is called, where a user's cache lies. Knows no models."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import psutil
import torch

GROUP = Path("/sys/fs/cgroup")  # of a container: its limit is not the machine's, and psutil does not know it


def cache_folder() -> Path:
    """Where the platform wants caches of this user: $XDG_CACHE_HOME or ~/.cache, ~/Library/Caches, or %LOCALAPPDATA%."""
    from platformdirs import user_cache_path

    return user_cache_path("longreach", appauthor=False, opinion=False)


def total_memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or less in a container."""
    physical, limit = psutil.virtual_memory().total, number(GROUP / "memory.max")
    return physical if limit is None else min(physical, limit)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    available = psutil.virtual_memory().available
    limit, used = number(GROUP / "memory.max"), number(GROUP / "memory.current")
    if limit is None or used is None:
        return available
    reclaimable = field_of(GROUP / "memory.stat", "inactive_file") or 0
    return min(available, max(0, limit - used + reclaimable))


def resident_memory() -> int:
    """Bytes of this process that are in memory now."""
    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """The largest resident size of this process so far."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def field_of(path: Path, name: str) -> int | None:
    """The number after `name` in a file of lines."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), None)
