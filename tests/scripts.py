"""The scripts of benchmarks/ and recipes/ as modules; they import each other by their plain names."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent


def scripts(folder: str, *names: str) -> SimpleNamespace:
    """The modules of these names, as attributes."""
    sys.path.insert(0, str(ROOT / folder))
    try:
        return SimpleNamespace(**{name: import_module(name) for name in names})
    finally:
        sys.path.pop(0)
