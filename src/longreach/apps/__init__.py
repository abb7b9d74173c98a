"""Work on text with a model, as a user of the library would write it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {"Rag": "rag", "RagConfig": "rag"}  # name -> module; imported when it is first used


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"longreach.apps.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'longreach.apps' has no attribute {name!r}")
