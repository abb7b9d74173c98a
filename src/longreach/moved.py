"""Old module names that stay importable for one release; each is a file of two lines that says where its names went.

Knows nothing of what it hands out: the new module is imported when a name is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def moved(old: str, new: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module `old` whose names are in the module `new`."""

    def __getattr__(name: str) -> Any:
        if name.startswith("__") or not hasattr(import_module(new), name):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        warnings.warn(f"{old}.{name} will be removed in the next release: import it from {new}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(new), name)

    return __getattr__
