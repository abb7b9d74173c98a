"""The benchmark tasks, one file for each benchmark or family, and the registry that finds them.

Knows that every class of these files with a name of its own is a task; not what any of them does.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

from longreach.evals.samples.base import Task


def tasks() -> dict[str, Task]:
    """Every task by its name."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        importlib.import_module(module.name)
    found: dict[str, Task] = {}
    for kind in dict.fromkeys(_below(Task)):
        if kind.__module__.startswith(f"{__name__}.") and "name" in vars(kind):
            assert kind.name not in found, f"two tasks are called {kind.name}"
            found[kind.name] = kind()
    return dict(sorted(found.items()))


def _below(kind: type[Task]) -> Iterator[type[Task]]:
    for below in kind.__subclasses__():
        yield below
        yield from _below(below)


def task(name: str) -> Task:
    known = tasks()
    if name not in known:
        raise ValueError(f"there is no task {name!r}; choose one of {', '.join(known)}")
    return known[name]
