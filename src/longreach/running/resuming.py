"""A text that is kept while it is read: a folder from which reading goes on after whatever has ended the process.

The folder is a document (`hf.documents`), saved again and again between two chunks, at multiples of the method's cut: sealed blocks are appended, and a save
counts in one step or not at all. Which tokens were read is known by their number and a hash, so that none of them has to be kept; the logits of the last one
are a note, for the loss of the next.

Knows extensions, documents and ids; not texts, chunks or terminals.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from longreach import files
from longreach.hf import documents
from longreach.hf.extension import Extension
from longreach.memory import sealed

SHARE = 0.05  # of the time, at most, is spent on saving
NOTE, LOGITS = "reading", "logits"
AT_ONCE = 2**16  # ids


class Kept:
    """What has been read, and where it is kept. `tokens` of it were found in the folder, `cache` holds them, and `last` [V] predicts the next one."""

    def __init__(self, extension: Extension, folder: str | Path, most: int = sys.maxsize) -> None:
        """most  tokens that are kept at most: what stands behind them (a question) may be another one next time. The last chunk is never kept.

        Raises ValueError, with the fix, for a method that cannot go on from the middle of a text, and for a folder that holds something else."""
        _require_cuts(extension)
        self.extension, self.folder, self.most = extension, Path(folder), most
        self.cache: Any = DynamicCache()
        self.last: torch.Tensor | None = None
        self.tokens, self._hash = 0, hashlib.sha256()
        self._wanted = self._load() if held(self.folder) else None
        self._saved, self._at, self._cost = self.tokens, time.perf_counter(), 0.0

    def _load(self) -> str:
        """-> the hash of the ids that were read."""
        with _said():
            found = self.extension.load(self.folder)
        if NOTE not in found.notes:
            raise ValueError(f"{str(self.folder)!r} holds a document, and no text that was being read; pass it to extension.load (--document), or name another")
        try:
            said, logits = json.loads(found.notes[NOTE]), base64.b64decode(found.notes[LOGITS], validate=True)
            self.tokens, wanted = said["tokens"], said["sha256"]
            fine = type(self.tokens) is int and self.tokens == found.cache.get_seq_length() and type(wanted) is str and found.mask is None
            self.cache, self.last = found.cache, torch.frombuffer(bytearray(logits), dtype=torch.float32)
        except (ValueError, TypeError, KeyError):
            fine = False
        if not fine:
            raise self.forged()
        return wanted

    def forged(self) -> ValueError:
        return ValueError(f"what {str(self.folder)!r} says of the text that was being read is damaged or forged; remove the folder to read the text anew")

    def rest(self, ids: torch.Tensor | Iterable[int]) -> torch.Tensor | Iterator[int]:
        """What is to be read of a text that begins with what has been read. Raises ValueError where it does not."""
        if self._wanted is None:
            return ids if isinstance(ids, torch.Tensor) else iter(ids)
        left: torch.Tensor | Iterator[int]
        parts: Iterator[list[int]]
        if isinstance(ids, torch.Tensor):
            left, parts = ids[self.tokens :], (part.tolist() for part in ids[: self.tokens].split(AT_ONCE))
        else:
            left = iter(ids)
            read = itertools.islice(left, self.tokens)
            parts = iter(lambda: list(itertools.islice(read, AT_ONCE)), [])
        count, self._hash = 0, hashlib.sha256()
        for part in parts:
            self._count(part)
            count += len(part)
        if count < self.tokens or self._hash.hexdigest() != self._wanted:
            raise ValueError(
                f"the {self.tokens} tokens that {str(self.folder)!r} holds are not the beginning of this text; pass the text (and question, and model) that it "
                "was begun with, or name another folder"
            )
        return left

    def before(self, chunk: torch.Tensor, start: int, last: torch.Tensor | None, ends: bool) -> None:
        """The cache holds `start` tokens, `last` are their logits, and `chunk` [n] is read next. It is saved when it is time, and where no other save can
        follow: the text `ends` with this chunk, or `most` lies in it."""
        final = ends or start + chunk.numel() > self.most
        if self._saved < start <= self.most and (final or time.perf_counter() - self._at >= self._cost / SHARE):
            self.save(start, last)
        self._count(chunk.tolist())

    def save(self, tokens: int, last: torch.Tensor | None) -> None:
        assert last is not None
        begun = time.perf_counter()
        logits = base64.b64encode(last.detach().float().cpu().contiguous().numpy().tobytes()).decode()
        notes = {NOTE: json.dumps({"tokens": tokens, "sha256": self._hash.hexdigest()}), LOGITS: logits}
        documents.save(self.extension.forward, self.cache, self.folder, None, notes, alone=True)
        self._saved, self._at = tokens, time.perf_counter()
        self._cost = self._at - begun

    def _count(self, ids: list[int]) -> None:
        self._hash.update(array("q", ids).tobytes())


def with_end(chunks: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, bool]]:
    """The same, with whether each is the last one."""
    before: torch.Tensor | None = None
    for chunk in chunks:
        if before is not None:
            yield before, False
        before = chunk
    if before is not None:
        yield before, True


def held(folder: Path) -> int:
    """Tokens that a folder holds; 0 where nothing was saved to it yet. Raises ValueError where it cannot be saved to."""
    place = files.room_for(folder, "folder to keep what is read")
    if os.path.lexists(place / sealed.MANIFEST):
        with _said():
            seen = documents.facts(folder).get("seen")
        return seen if isinstance(seen, int) else 0
    if place.exists():
        documents.writable(place)
    return 0


@contextmanager
def _said() -> Iterator[None]:
    """What is wrong with a folder, and what else can be done about it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; or, to read the text from its beginning, remove the folder or name another one") from error


def _require_cuts(extension: Extension) -> None:
    method = extension.method
    if method.eviction is not None or method.cut is None:
        why = "what it keeps depends on the turns that came" if method.eviction is not None else "it reads a prompt in one forward"
        raise ValueError(f"{method.brief()} cannot go on from the middle of a text ({why}); leave out resume (--resume), or use a method that can be cut")
