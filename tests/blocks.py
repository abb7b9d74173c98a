"""Blocks so small that a text of some hundred tokens has many, in several files."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from longreach.memory import sealed, sealing

BLOCK, HORIZON, SEALED = 16, 32, 40_000


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed, "BLOCK", BLOCK)
        patch.setattr(sealed, "SEALED", SEALED)
        patch.setattr(sealing, "ROLLBACK", HORIZON)
        yield
