"""Blocks so small that a text of some hundred tokens has many, in several files; and what the tests of documents on disk share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

from families import tokens
from longreach.memory import sealed, sealing

BLOCK, HORIZON, SEALED = 16, 32, 40_000


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sealed, "BLOCK", BLOCK)
        patch.setattr(sealed, "SEALED", SEALED)
        patch.setattr(sealing, "ROLLBACK", HORIZON)
        yield


@torch.no_grad()
def more(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor, stop: int) -> torch.Tensor:
    """Read up to `stop` -> logits."""
    return model(ids[:, cache.get_seq_length() : stop], attention_mask=mask[:, :stop], past_key_values=cache).logits


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def counted(folder: Path) -> bytes:
    """The records that count, in their order."""
    return b"".join((folder / sealed.blocks_name(file.number)).read_bytes()[: file.bytes] for file in sealed.read(folder).blocks)


def inputs(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(rows, length)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 37 * row] = 0
        mask[row, 120 : 120 + 5 * row] = 0
    return ids, mask


def saved(extension: Any, folder: Path, stop: int = 200, rows: int = 1, cache: Any = None) -> Any:
    ids, mask = inputs(rows, 300)
    cache = t.DynamicCache() if cache is None else cache
    more(extension.model, cache, ids, mask, stop)
    extension.save(cache, folder, ids[:, :stop])
    return cache
