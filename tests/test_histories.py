"""The quick part of the random histories in pytest, and the faults that they are there to find, put back one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import histories
from longreach import Combined, InfLLM, YaRN
from longreach.engine import batch
from longreach.hf.flat import Flat
from longreach.memory import buffer, store


@pytest.mark.parametrize("block", range(12))
def test_histories(block):
    for seed in range(block * 25, block * 25 + 25, histories.SHARING):
        found = histories.run(seed)
        assert "error" not in found, "\n".join([found["error"], *found["log"], found["trace"]])


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_more_histories(block):
    for seed in range(1000 + block * 50, 1000 + block * 50 + 50):
        found = histories.run(seed)
        assert "error" not in found, "\n".join([found["error"], *found["log"], found["trace"]])


def test_rows_that_come_to_lie_alike_before_anything_is_written(monkeypatch):
    """Summaries of masses are read before the forward writes any; this history found rows that were read where they had been."""
    small = [InfLLM(7, 0, 3, 3, repr_topk=2, exc_block_size=1), InfLLM(9, 3, 4, 2, repr_topk=2, exc_block_size=1)]
    monkeypatch.setattr(histories, "CUTTABLE", [*small, Combined(YaRN(2.0), InfLLM(16, 2, 5, 1, repr_topk=5, exc_block_size=1))])
    found = histories.run(230)
    assert found["family"] == "mistral-sliding" and found["method"] == str(small[1]) and "error" not in found, found


def rows_that_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of equal length share a call, wherever their buffers begin."""
    monkeypatch.setattr(store, "alike", lambda placements, rows: [None] * len(rows))


def mask_from_the_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last columns of a mask are taken for the new tokens."""
    real = batch.Batch.of

    def of(rows: int, columns: int, mask: torch.Tensor | None, device: torch.device, kept: Any) -> batch.Batch:
        seen = 0 if kept is None else kept.seen
        return real(rows, columns, None if mask is None else torch.cat([mask[:, :seen], mask[:, mask.shape[1] - columns :]], 1), device, kept)

    monkeypatch.setattr(batch.Batch, "of", of)


def hidden_tokens_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a mask says of cached tokens is not read."""
    real = store.Store.past
    monkeypatch.setattr(store.Store, "past", lambda self, mask: real(self, None))


def failed_forward_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward changes a buffer as soon as its layer has run."""
    real = buffer.Buffer.release

    def release(self: buffer.Buffer) -> None:
        real(self)
        if self._waiting:
            self.placement.commit()
            self.settle()

    monkeypatch.setattr(buffer.Buffer, "release", release)


def crop_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crop that is refused has cut some buffers already, and the others follow with the next."""
    real = store.Store.crop

    def crop(self: store.Store, slots: int) -> None:
        try:
            real(self, slots)
        except ValueError:
            left = self.slots.without(min(slots, self.seen))
            for placement in self.placements.values():
                for row in range(self.rows):
                    if placement.reaches(row) <= left.tokens(row):
                        placement.rewind(row, left.tokens(row))
            raise

    monkeypatch.setattr(store.Store, "crop", crop)


def requests_keep_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a request leaves a flat batch, those behind it are looked for where they were."""
    real = Flat.leave

    def leave(self: Flat, request: int) -> None:
        rows = {other: row for other, row in self._rows.items() if other != request}
        real(self, request)
        self._rows = {other: min(row, len(rows) - 1) for other, row in rows.items()}

    monkeypatch.setattr(Flat, "leave", leave)


def single_tokens_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several requests that read one token each, the first gets that of the last."""
    real = batch.Batch.flat.__func__  # type: ignore[attr-defined]

    def flat(cls: Any, new: Any, device: torch.device, store: Any) -> batch.Batch:
        found = real(cls, new, device, store)
        found.singles = None if found.singles is None else replace(found.singles, columns=found.singles.columns.flip(0), stretch=None)
        return found

    monkeypatch.setattr(batch.Batch, "flat", classmethod(flat))


FAULTS = [
    rows_that_meet, mask_from_the_right, hidden_tokens_ignored, failed_forward_counts, crop_half_done, requests_keep_their_rows, single_tokens_mixed_up,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_histories_find_the_fault(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch):
    fault(monkeypatch)
    assert any("error" in histories.run(seed) for seed in range(0, 900, 4))
