"""This machine: how much memory it has and has free, what its processor is called, where a user's cache lies. Knows no models."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch


def cache_folder() -> Path:
    """Where the platform wants caches of this user: $XDG_CACHE_HOME or ~/.cache, ~/Library/Caches, or %LOCALAPPDATA%."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        given = os.environ.get("XDG_CACHE_HOME", "")
        base = given if Path(given).is_absolute() else str(Path.home() / ".cache")  # the rule: a relative path there is to be ignored
    return Path(base) / "longreach"


def total_memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or less in a container."""
    if sys.platform == "win32":
        return windows_memory()[0]
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = number(Path("/sys/fs/cgroup/memory.max"))
    return physical if limit is None else min(physical, limit)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    if sys.platform == "win32":
        return windows_memory()[1]
    available = field_of(Path("/proc/meminfo"), "MemAvailable:")
    if available is None:
        return None
    limit, used = number(Path("/sys/fs/cgroup/memory.max")), number(Path("/sys/fs/cgroup/memory.current"))
    if limit is None or used is None:
        return 1024 * available
    reclaimable = field_of(Path("/sys/fs/cgroup/memory.stat"), "inactive_file") or 0
    return min(1024 * available, max(0, limit - used + reclaimable))


def resident_memory() -> int:
    """Bytes of this process that are in memory now; their largest so far where the system tells no more."""
    resident = field_of(Path("/proc/self/status"), "VmRSS:")
    if resident is not None:
        return 1024 * resident
    if (peak := peak_memory()) is None:
        raise ValueError("calibration reads the memory of a process on Linux and macOS only; describe this machine in a TOML file instead")
    return peak


def peak_memory() -> int | None:
    """The largest resident size of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


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


def windows_memory() -> tuple[int, int]:
    """(all, free) bytes of main memory."""
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [(f"m{i}", ctypes.c_uint64) for i in range(7)]

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return int(status.m0), int(status.m1)
