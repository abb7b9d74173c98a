"""One file per method. The registry finds the files; nothing else is touched to add one."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

from longreach.methods.base import Method


def registry() -> dict[str, type[Method]]:
    """Every method of this package by its command-line name, in alphabetical order."""
    found: dict[str, type[Method]] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name == "base":
            continue
        for value in vars(importlib.import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, type) and issubclass(value, Method) and value is not Method and value.__module__.endswith(module.name):
                found[value.name] = value
    return dict(sorted(found.items()))


def parameters(method: type[Method]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(method)  # type: ignore[arg-type]


def from_json(data: dict[str, Any]) -> Method:
    """The inverse of `Method.to_json`. Unknown names and parameters raise."""
    data = dict(data)
    name = data.pop("method", None)
    known = registry()
    if name not in known:
        raise ValueError(f"unknown method {name!r}; choose one of: {', '.join(known)}")
    allowed = {f.name for f in parameters(known[name])}
    if unknown := set(data) - allowed:
        raise ValueError(f"{name} has no parameter {', '.join(sorted(unknown))}; its parameters are: {', '.join(sorted(allowed)) or 'none'}")
    return known[name](**{key: from_json(value) if isinstance(value, dict) else value for key, value in data.items()})
