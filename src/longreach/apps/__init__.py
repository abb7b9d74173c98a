"""Work on text with a model, as a user of the library would write it. Names are imported when they are first used."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from longreach.apps.infiniretri.reading import InfiniRetri as InfiniRetri

_HOMES = {"InfiniRetri": "infiniretri.reading", "Rag": "rag", "RagConfig": "rag"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"longreach.apps.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'longreach.apps' has no attribute {name!r}")
